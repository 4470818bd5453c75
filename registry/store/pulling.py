"""A version's files into a new folder, each checked against its digest on the way, with its signatures beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from composer.errors import ConflictError
from composer.sinks import FolderSink, storage_errors
from composer.tensors import COPY_BYTES
from registry.errors import BlobCorruptError
from registry.interface import Progress
from registry.schemas import FileInfo, SignedBundle, VersionInfo
from registry.signing import MODEL_SIG
from registry.store.local import LocalStore

__all__ = ["pull_files", "signature_files"]


def signature_files(info: VersionInfo, signatures: Sequence[SignedBundle]) -> dict[str, bytes]:
    """The signatures of a version as files beside its own: model.sig, and model-<key>.sig for each further one."""
    found = {
        f"model-{item.key[:8]}.sig" if index else MODEL_SIG: (json.dumps(item.bundle) + "\n").encode()
        for index, item in enumerate(signatures)
    }
    return {name: data for name, data in found.items() if name not in {file.name for file in info.files}}


def pull_files(
    store: LocalStore,
    files: Sequence[FileInfo],
    out: Path,
    progress: Progress | None,
    beside: Mapping[str, bytes],
) -> None:
    """Copy `files` out of the store into the new folder `out`, and write what goes `beside` them.

    Raises ConflictError when `out` exists, BlobCorruptError when a stored file is not what it was; `out` is not made.
    """
    out = out.expanduser().resolve()
    if out.exists():
        raise ConflictError(
            f"{out} already exists", expected="a new folder", found="an existing one", remedy="choose another --out"
        )
    total, done = sum(file.size for file in files), 0
    with FolderSink(out) as sink:
        for file in files:
            blob = store.path(file.sha256)
            with sink.open(file.name) as writer, storage_errors(f"reading {file.name}"), blob.open("rb") as source:
                while chunk := source.read(COPY_BYTES):
                    writer.write(chunk)
                    done += len(chunk)
                    if progress:
                        progress("pulling", done, total)
            if writer.sha256 != file.sha256:
                raise BlobCorruptError(
                    f"the stored {file.name} is damaged",
                    expected=f"sha256 {file.sha256}",
                    found=writer.sha256,
                    remedy="restore the store from a backup, or publish the version again from its source",
                )
        for name, data in beside.items():
            sink.write(name, data)
        sink.commit()
