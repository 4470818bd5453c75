"""Downloads of which no byte leaves that is not what was stored: whole, in ranges, and from where a client broke off.

Each MiB is checked before it is sent. Where the first is damaged the answer is the failure; where a later one is, the
connection ends before it, short of its Content-Length, and the client's next attempt is told why.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Message, Receive, Scope, Send

from registry.store.chunks import CHUNK, ChunkStore, VerifiedFile

__all__ = ["VerifiedResponse"]


class _Reader:
    """What FileResponse reads from: a place in a verified file."""

    def __init__(self, file: VerifiedFile) -> None:
        self._file = file
        self._at = 0

    async def seek(self, offset: int) -> int:
        """Go on at `offset`."""
        self._at = offset
        return offset

    async def read(self, count: int) -> bytes:
        """`count` bytes, fewer at the end only. Raises BlobCorruptError."""
        data = await run_in_threadpool(self._file.read_at, self._at, count)
        self._at += len(data)
        return data


class VerifiedResponse(FileResponse):
    """A FileResponse over the file at `path` whose sha256 is known. Raises BlobCorruptError while it is sent."""

    chunk_size = CHUNK

    def __init__(self, path: Path, chunks: ChunkStore, sha256: str, **options: Any) -> None:
        super().__init__(path, **options)
        self._chunks, self._sha256 = chunks, sha256

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send nothing, the status included, before the first bytes are known to be right."""
        held: list[Message] = []

        async def send_after(message: Message) -> None:
            if message["type"] == "http.response.start":
                held.append(message)
                return
            while held:
                await send(held.pop())
            await send(message)

        await super().__call__(scope, receive, send_after)

    @asynccontextmanager
    async def _open_file(self) -> AsyncIterator[Any]:
        yield _Reader(await run_in_threadpool(self._chunks.reader, Path(os.fspath(self.path)), self._sha256))
