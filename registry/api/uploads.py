"""Multipart bodies, streamed: each part goes to its file as it arrives, and no part is held in memory.

    home/uploads/<random>/<name>/config.json …      removed unless keep() was called

Limits are checked while the bytes come in: files, names, fields, bytes in all.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from composer.errors import TypedError, UsageError
from composer.sinks import fsync_tree, storage_errors
from registry.api.rules import MAX_FILES, UploadTooLargeError, check_file_name

__all__ = ["MULTIPART", "Upload", "feed_body", "receive"]

CHUNK = 1 << 20
DRAIN = 64 << 20
MAX_FIELD = 64 << 10
MAX_FIELDS = 1000
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MULTIPART = "multipart/form-data"


class Upload:
    """What a multipart body held: `fields` by name, and `folder` with the files. A context manager that cleans up."""

    def __init__(self, uploads: Path) -> None:
        with storage_errors("making room for an upload"):
            self._place = uploads / uuid.uuid4().hex
            self.folder = self._place / "files"
            self.folder.mkdir(parents=True)
        self.fields: dict[str, list[str]] = {}
        self.files: set[str] = set()
        self._kept = False

    def text(self, name: str) -> str | None:
        """The one value of a field; None when it is absent or empty."""
        values = self.fields.get(name, [])
        if len(values) > 1:
            raise UsageError(f"the field {name!r} is given {len(values)} times", expected="once", found=values)
        return values[0] or None if values else None

    def required(self, name: str) -> str:
        """The value of a field that must be there."""
        value = self.text(name)
        if value is None:
            raise UsageError(
                f"the field {name!r} is missing", expected=f"a form field {name!r}", found=sorted(self.fields)
            )
        return value

    def only(self, *names: str) -> None:
        """Raise UsageError when another field is there, or no file."""
        unknown = sorted(set(self.fields).difference(names))
        if unknown:
            raise UsageError(f"unknown field {unknown[0]!r}", expected=list(names), found=unknown)
        if not self.files:
            raise UsageError("the upload holds no files", expected="parts named 'files', each with a filename", found=0)

    def rename(self, name: str | None) -> None:
        """Give the folder a name, which becomes the default name of what is in it."""
        if name and FOLDER_NAME.fullmatch(name):
            with storage_errors("naming an upload"):
                self.folder = self.folder.rename(self._place / name)

    def settle(self) -> None:
        """Make what arrived durable: before anything is told of it."""
        with storage_errors("writing an upload"):
            fsync_tree(self._place)

    def keep(self) -> None:
        """Leave the folder where it is."""
        self._kept = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._kept:
            shutil.rmtree(self._place, ignore_errors=True)


class _Receiver:
    """Takes chunks of a multipart body and writes an Upload."""

    def __init__(self, upload: Upload, boundary: bytes) -> None:
        self._upload = upload
        self._size = 0
        self._parts = 0
        self._header: list[bytes] = [b"", b""]
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._value: bytearray | None = None
        self._file: BinaryIO | None = None
        self._done = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._open,
                "on_part_data": self._data,
                "on_part_end": self._close,
                "on_end": self._finish,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        self._size += len(chunk)
        try:
            with storage_errors("writing an upload"):
                self._parser.write(chunk)
        except FormParserError as error:
            raise UsageError(f"the multipart body cannot be read: {error}") from None

    def finish(self) -> None:
        """Raise UsageError when the body ended too early."""
        if not self._done:
            raise UsageError(
                "the multipart body is cut short", expected="a closing boundary", found=f"{self._size} bytes"
            )

    def abort(self) -> None:
        """Close what is open."""
        if self._file:
            self._file.close()

    def _begin(self) -> None:
        self._headers = {}
        self._header = [b"", b""]
        self._parts += 1
        if self._parts > MAX_FILES + MAX_FIELDS:
            raise UploadTooLargeError("too many parts", expected=f"at most {MAX_FILES} files", found=self._parts)

    def _add_header(self, which: int, data: bytes) -> None:
        self._header[which] += data

    def _end_header(self) -> None:
        self._headers[self._header[0].lower()] = self._header[1]
        self._header = [b"", b""]

    def _open(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b"").decode("latin-1"))
        try:
            self._name = options[b"name"].decode()
            filename = options[b"filename"].decode() if b"filename" in options else None
        except (KeyError, UnicodeDecodeError):
            raise UsageError("a part has no readable name", expected="Content-Disposition, in UTF-8") from None
        if filename is None:
            self._value = bytearray()
            return
        if self._name != "files":
            raise UsageError(f"a file in the part {self._name!r}", expected="the part 'files'", found=self._name)
        if len(self._upload.files) >= MAX_FILES:
            raise UploadTooLargeError("too many files", expected=f"at most {MAX_FILES}", found=MAX_FILES + 1)
        path = self._upload.folder / check_file_name(filename)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb")
        except (FileExistsError, NotADirectoryError):
            raise UsageError(f"{filename!r} is there twice", expected="each file once", found=filename) from None
        self._upload.files.add(filename)

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._file:
            self._file.write(memoryview(data)[start:end])
        elif self._value is not None:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD:
                raise UploadTooLargeError(f"{self._name!r} is too long", expected=f"at most {MAX_FIELD} bytes")

    def _close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
        elif self._value is not None:
            try:
                self._upload.fields.setdefault(self._name, []).append(self._value.decode())
            except UnicodeDecodeError:
                raise UsageError(f"the field {self._name!r} is not UTF-8") from None
            self._value = None

    def _finish(self) -> None:
        self._done = True


async def receive(request: Request) -> Upload:
    """Stream the body of `request` into a new Upload, which the caller must close."""
    limit: int = request.app.state.max_upload_bytes
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != MULTIPART.encode() or not options.get(b"boundary"):
        found = kind.decode("latin-1")
        raise UsageError("the body is not a form with files", expected=MULTIPART, found=found or "no content type")
    upload = await run_in_threadpool(Upload, request.app.state.registry.home / "uploads")
    receiver = _Receiver(upload, options[b"boundary"])
    try:
        await feed_body(request, receiver.feed, limit)
        receiver.finish()
    except BaseException:
        receiver.abort()
        upload.__exit__(None, None, None)
        raise
    return upload


async def feed_body(request: Request, feed: Callable[[bytes], None], limit: int) -> int:
    """Give the body to `feed`, about 1 MiB at a time and in a thread; returns its size.

    Raises UploadTooLargeError beyond `limit` bytes, UsageError when the sender goes away, and what `feed` raises.
    """
    stream = request.stream()
    size = 0
    try:
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large(limit, int(declared))
        pending = bytearray()
        async for chunk in stream:
            size += len(chunk)
            if size > limit:
                raise too_large(limit, size)
            pending += chunk
            if len(pending) >= CHUNK:
                await run_in_threadpool(feed, bytes(pending))
                pending.clear()
        await run_in_threadpool(feed, bytes(pending))
    except ClientDisconnect:
        raise UsageError("the sender went away") from None
    except TypedError:
        await _drain(stream)
        raise
    return size


async def _drain(stream: AsyncIterator[bytes]) -> None:
    """Read what is still being sent, within reason, so that the sender gets to read the answer."""
    drained = 0
    with suppress(ClientDisconnect):
        async for chunk in stream:
            drained += len(chunk)
            if drained > DRAIN:
                return


def too_large(limit: int, size: int) -> UploadTooLargeError:
    """The failure of a body with too many bytes."""
    return UploadTooLargeError(
        "the upload is too large",
        expected=f"at most {limit} bytes",
        found=f"{size} bytes or more",
        remedy="raise the service's --max-upload, or register it on the service's own machine",
    )
