"""A folder of a model or an adapter as a mapping from file name to path.

The same mapping stands for a plain folder and for blobs of a content-addressed store, so that nothing has to be
copied or linked to be read. Names are flat or with `/`; hidden files and links that leave the folder are left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer.errors import CorruptFileError, NotFoundError

__all__ = ["FileSet", "copy_names", "folder_files", "git_oid", "parse_json", "read_json", "sha256_file"]

FileSet = Mapping[str, Path]

MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 64
SURROGATE = re.compile(rb"\\u[dD]")
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
    """A JSON object from `path`, at most 16 MiB and 64 levels deep, each key once.

    Raises NotFoundError or CorruptFileError.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CorruptFileError(
                f"{path.name} is too large", expected=f"at most {MAX_JSON_BYTES} bytes", found=size, path=path
            )
        value = parse_json(path.read_bytes())
        if _deeper(value, MAX_JSON_DEPTH):
            raise ValueError(f"more than {MAX_JSON_DEPTH} levels")
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist", remedy="check the path", path=path) from None
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{path.name} is not valid JSON: {error}", expected="a JSON object", found=str(error), path=path
        ) from None
    if not isinstance(value, dict):
        raise CorruptFileError(
            f"{path.name} does not hold a JSON object", expected="an object", found=type(value).__name__, path=path
        )
    return value


def parse_json(raw: bytes) -> Any:
    """A JSON value that every reader takes for the same: each key of an object once, no half of a surrogate pair.

    Raises ValueError (not UTF-8, not JSON, a key twice, a number of thousands of digits) or RecursionError (too deep).
    """
    value = json.loads(raw, object_pairs_hook=_unique_keys)
    if SURROGATE.search(raw):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = sorted(key for key, count in counts.items() if count > 1)[:20]
        raise ValueError(f"each key once, but there are several of {twice}")
    return entries


def _deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value has more than so many levels of objects and lists."""
    layer = [value] if isinstance(value, dict | list) else []
    for _ in range(levels + 1):
        layer = [
            item
            for each in layer
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, dict | list)
        ]
        if not layer:
            return False
    return True


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
