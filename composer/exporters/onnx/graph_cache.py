"""The graphs that were traced before, one file each.

    cache_dir/
      <digest>.onnx     a valid ONNX file: the graph, then 1 metadata entry with the sha256 of all bytes before it

The digest names everything the graph depends on: configuration, task, flavour, opset, library versions and this
exporter's version. Weights and their dtype are not in it: they are bound later.
A protobuf message may be continued by appending fields, so the checksum travels inside the file, and one rename
publishes both.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.exporters.onnx.architectures import Architecture

if TYPE_CHECKING:
    import onnx

__all__ = ["EXPORTER_VERSION", "FLAVOUR", "digest_of", "is_whole", "load", "store"]

EXPORTER_VERSION = 2
"""Raise it when a change to `trace` makes old graphs wrong."""
FLAVOUR = "portable"
CHECKSUM = "composer.sha256"

# They change nothing in the graph: where a config came from, who wrote it, and the dtype the weights are stored in.
IRRELEVANT = frozenset({"transformers_version", "dtype", "torch_dtype", "_name_or_path", "_model_name_or_path"})
LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def digest_of(config: dict[str, Any], architecture: Architecture) -> str:
    """sha256, in hex, over all that decides the graph: two checkpoints with equal digests share one graph."""
    split = (architecture.part, architecture.own_head) if architecture.is_seq2seq else ()
    key = {
        "config": {name: value for name, value in config.items() if name not in IRRELEVANT},
        "architecture": [architecture.name, architecture.task, FLAVOUR, architecture.opset, *split],
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "exporter": EXPORTER_VERSION,
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load(cache_dir: Path, digest: str) -> onnx.ModelProto | None:
    """The cached graph, or None when there is none or when its bytes are not the ones that were stored."""
    import onnx
    from google.protobuf.message import DecodeError

    body = _body(cache_dir / f"{digest}.onnx")
    if body is None:
        return None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(body)
    except DecodeError:
        return None
    return model


def is_whole(path: Path) -> bool:
    """Whether the bytes of a cached graph are the ones that were stored."""
    return _body(path) is not None


def _body(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    size = len(_trailer("0" * 64))
    body, trailer = data[:-size], data[-size:]
    return body if trailer == _trailer(hashlib.sha256(body).hexdigest()) else None


def store(cache_dir: Path, digest: str, model: onnx.ModelProto) -> Path:
    """Write the graph aside and rename it into place; two processes that race leave one whole file."""
    body = model.SerializeToString()
    cache_dir.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=cache_dir, prefix=f".{digest}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(body + _trailer(hashlib.sha256(body).hexdigest()))
            file.flush()
            os.fsync(file.fileno())
        path = cache_dir / f"{digest}.onnx"
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return path


def _trailer(checksum: str) -> bytes:
    """A ModelProto that holds only the checksum; its length does not depend on the checksum."""
    import onnx

    model = onnx.ModelProto()
    model.metadata_props.add(key=CHECKSUM, value=checksum)
    return model.SerializeToString()
