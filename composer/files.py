"""A folder of a model or an adapter as a mapping from file name to path.

The same mapping stands for a plain folder and for blobs of a content-addressed store, so that nothing has to be
copied or linked to be read. Names are flat or with `/`; hidden files and links that leave the folder are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer.errors import CorruptFileError, NotFoundError, UnsafeFormatError

__all__ = ["FileSet", "copy_names", "folder_files", "git_oid", "read_json", "refuse_pickles", "sha256_file"]

FileSet = Mapping[str, Path]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_JSON_BYTES = 16 << 20
QUANTISATION_CONFIGS = ("quantize_config.json", "quant_config.json")  # of GPTQ and AWQ; a result is not quantised
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md", ".tiktoken")


def folder_files(folder: Path) -> dict[str, Path]:
    """The files of `folder`, one level deep plus subfolders, by relative name in sorted order."""
    if not folder.is_dir():
        raise NotFoundError(
            f"{folder} is not a folder",
            expected="a folder with config.json or adapter_config.json and safetensors",
            found="a file" if folder.exists() else "nothing",
            remedy="check the path",
            path=folder,
        )
    root = folder.resolve()
    hub_blobs = root.parent.parent / "blobs"  # a hub cache links snapshots/REV/* to blobs/*
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")) or not path.is_file():
            continue
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in (root, hub_blobs)):
            continue
        found[name] = path
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`, at most 16 MiB. Raises NotFoundError or CorruptFileError."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CorruptFileError(
                f"{path.name} is too large", expected=f"at most {MAX_JSON_BYTES} bytes", found=size, path=path
            )
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist", remedy="check the path", path=path) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits, too deep
        raise CorruptFileError(
            f"{path.name} is not valid JSON: {error}", expected="a JSON object", found=str(error), path=path
        ) from None
    if not isinstance(value, dict):
        raise CorruptFileError(
            f"{path.name} does not hold a JSON object", expected="an object", found=type(value).__name__, path=path
        )
    return value


def refuse_pickles(files: FileSet, wanted: str) -> None:
    """Raise UnsafeFormatError when pickled weights lie where `wanted` is missing."""
    pickles = [name for name in files if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise UnsafeFormatError(
            f"{pickles[0]} is a pickle: loading it can run any program",
            expected=wanted,
            found=", ".join(pickles),
            remedy="convert it where you trust it: load it with torch.load(weights_only=True) and save it with "
            "safetensors.torch.save_file, or call save_pretrained(safe_serialization=True)",
            files=pickles,
        )


def copy_names(files: FileSet) -> list[str]:
    """The files that go along with composed weights: configs, tokenizer, chat template; no README, no index."""
    return [
        name
        for name in files
        if name.endswith(COPIED_SUFFIXES)
        and "/" not in name
        and not name.endswith(".safetensors.index.json")
        and name not in ("README.md", "composition.json", *QUANTISATION_CONFIGS)
    ]


def sha256_file(path: Path) -> str:
    """The sha256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_oid(data: bytes) -> str:
    """The id that git gives a file of these bytes, as 40 hex digits."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
