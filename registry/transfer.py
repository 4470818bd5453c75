"""What crosses the network, seen from the client: failures rebuilt, files sent, files received and checked.

{"error": {"code": "version-taken", …}}   ->  VersionTakenError
folder                                    ->  multipart parts, read as they are sent
response                                  ->  a file in a FolderSink, kept only if its sha256 is right
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from composer import errors
from composer.errors import CorruptFileError, TypedError, UsageError
from composer.sinks import FolderSink, storage_errors
from registry import errors as registry_errors
from registry.api.rules import check_file_name
from registry.interface import Progress

__all__ = ["ServiceReplyError", "ServiceUnreachableError", "connection_errors", "file_parts", "read_error", "save_file"]

CHUNK = 1 << 20
ROOTS = {
    "usage": errors.UsageError,
    "not-found": errors.NotFoundError,
    "incompatible": errors.IncompatibleError,
    "integrity": errors.IntegrityError,
    "policy": errors.PolicyError,
    "conflict": errors.ConflictError,
}
assert registry_errors  # its classes are found by walking the tree


class ServiceUnreachableError(TypedError):
    """No service answers at the URL, or the connection broke."""

    code = "service-unreachable"


class ServiceReplyError(TypedError):
    """Something answered, but not as this version of the registry would."""

    code = "service-reply"


@contextmanager
def connection_errors(url: str) -> Iterator[None]:
    """Turn httpx's failures into typed ones that name the service."""
    try:
        yield
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise UsageError(
            f"{url!r} is not the URL of a service: {error}",
            expected="http://HOST:PORT or https://…",
            found=url,
            remedy="correct --url or REGISTRY_URL",
        ) from error
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ServiceUnreachableError(
            f"no service answers at {url}: {error}",
            expected="a running service",
            found=str(error),
            remedy="start it with 'registry serve', or correct --url or REGISTRY_URL",
        ) from error
    except httpx.TransportError as error:
        raise ServiceUnreachableError(
            f"the connection to {url} broke: {error or type(error).__name__}",
            expected="an answer",
            found=type(error).__name__,
            remedy="look at the service's log, then try again: a repeat is harmless",
        ) from error


def read_error(response: httpx.Response, url: str) -> TypedError:
    """The typed error that a response carries; its class is found by its code, or else by its category."""
    try:
        body = json.loads(response.read())["error"]
        code, category, message = str(body["code"]), str(body["category"]), str(body["message"])
        fields = body.get("fields") or {}
        fields = {str(name): value for name, value in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return ServiceReplyError(
            f"{url} answered {response.status_code} without saying why",
            expected="the answer of a registry",
            found=response.text[:200],
            remedy="check that the URL is that of 'registry serve'",
        )
    kind = _classes(TypedError).get(code) or ROOTS.get(category, TypedError)
    for taken in ("self", "message", "expected", "found", "remedy"):
        fields.pop(taken, None)
    error = kind(message, expected=body.get("expected"), found=body.get("found"), remedy=body.get("remedy"), **fields)
    if error.code != code:
        error.fields["code"] = code
    return error


def _classes(root: type[TypedError]) -> dict[str, type[TypedError]]:
    """Every class of the tree by its own code; the one nearest to the root wins."""
    found = {root.code: root} if "code" in vars(root) else {}
    for child in root.__subclasses__():
        for code, kind in _classes(child).items():
            found.setdefault(code, kind)
    return found


class _Part:
    """A file that is opened when its turn comes, and reports how much of it was read."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        self._path = path
        self._advance = advance
        self._size = path.stat().st_size
        self._file: BinaryIO | None = None

    def tell(self) -> int:
        """The start: httpx asks for the length before it reads."""
        return 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The size when the end is asked for; otherwise begin anew."""
        if whence == os.SEEK_END:
            return self._size
        self.close()
        return offset

    def read(self, count: int) -> bytes:
        """The next bytes; larger pieces than httpx asks for, because each is one write."""
        with storage_errors(f"reading {self._path.name}"):
            if self._file is None:
                self._file = self._path.open("rb")
            data = self._file.read(max(count, CHUNK))
        self._advance(len(data))
        if not data:
            self.close()
        return data

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._file is not None:
            self._file.close()
            self._file = None


@contextmanager
def file_parts(
    files: Mapping[str, Path], progress: Progress | None
) -> Iterator[list[tuple[str, tuple[str, Any, str]]]]:
    """The `files` argument of an httpx request; progress is called with ("uploading", bytes sent, bytes in all)."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("uploading", done, total)

    with storage_errors("reading the folder"):
        parts = {check_file_name(name): _Part(path, advance) for name, path in files.items()}
        total = sum(path.stat().st_size for path in files.values())
    try:
        yield [("files", (name, part, "application/octet-stream")) for name, part in parts.items()]
    finally:
        for part in parts.values():
            part.close()


def save_file(
    response: httpx.Response, sink: FolderSink, name: str, sha256: str, advance: Callable[[int], None]
) -> None:
    """Stream a response into the sink. Raises CorruptFileError unless its bytes have that digest."""
    path = sink.folder / check_file_name(name)
    with storage_errors(f"writing {name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with sink.open(name) as writer:
        for chunk in response.iter_bytes(CHUNK):
            writer.write(chunk)
            advance(len(chunk))
    if writer.sha256 != sha256:
        raise CorruptFileError(
            f"{name} arrived damaged",
            expected=f"sha256 {sha256}",
            found=writer.sha256,
            remedy="try again; if it persists, run 'registry doctor' on the service",
        )
