"""What the files of a stranger's folder may be, by name and by their first bytes, before any of them is stored.

never      pickles, archives, programs                  refused, or left out of what is kept
disguised  one of these under another name              refused
remote     a config that names code to be fetched       refused
text       chat templates, cards, licences, vocabulary  carried as they are, UTF-8 of a bounded size, never rendered

Weights have a validator of their own (composer.tensors), and so has adapter_config.json (composer.adapter_config).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from composer.errors import CorruptFileError, UnsafeFormatError
from composer.files import read_json
from composer.tensors import read_header

__all__ = [
    "admit",
    "check_text",
    "left_out",
    "refuse_disguised",
    "refuse_pickles",
    "refuse_remote_code",
    "refuse_unsafe",
    "split_unsafe",
    "unsafe_kind",
]

PICKLE = "a pickle: loading it can run any program"
CONVERT = (
    "convert it where you trust it: load it with torch.load(weights_only=True) and save it with "
    "safetensors.torch.save_file, or call save_pretrained(safe_serialization=True)"
)
SUFFIXES = {
    PICKLE: (
        ".bin", ".pt", ".pt2", ".pth", ".ckpt", ".pkl", ".pickle", ".dill", ".joblib", ".npy", ".mar", ".h5", ".keras",
    ),
    "an archive: what is in it is not checked": (
        ".zip", ".npz", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar", ".nemo",
    ),
    "a program, and none is run here": (
        ".py", ".pyc", ".pyd", ".pyo", ".ipynb", ".whl", ".egg", ".jar", ".so", ".dll", ".dylib", ".exe", ".msi",
        ".sh", ".bash", ".bat", ".cmd", ".ps1", ".js", ".mjs", ".wasm",
    ),
}  # fmt: skip
# What such files begin with, whatever they are called.
BEGINNINGS = (
    (re.compile(rb"PK(\x03\x04|\x05\x06)"), "a zip archive, or a pickle of torch"),
    (re.compile(rb"\x80[\x02-\x05](?=[^\x00-\x08]|$)"), "a pickle"),
    (re.compile(rb"\x1f\x8b|BZh[1-9]1AY&SY|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|\x04\x22\x4d\x18"), "an archive"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07|.{257}ustar", re.DOTALL), "an archive"),
    (re.compile(rb"\x93NUMPY|\x89HDF"), "an array file that may hold a pickle"),
    (re.compile(rb"\x7fELF|MZ.\x00|#! ?/|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe|\x00asm", re.DOTALL), "a program"),
)
WEIGHTS = (".safetensors", ".gguf")  # a length may look like anything; their own readers tell what they are
HEAD = 512
SHOWN = 5
TEXTS = re.compile(r"(.*/)?([^/]+\.(jinja|md|txt)|LICENSE|NOTICE)", re.IGNORECASE)
MAX_TEXT_BYTES = 1 << 20
MAX_VOCABULARY_BYTES = 64 << 20
CONFIGS = re.compile(r"(.*/)?[^/]*config\.json")


def admit(files: Mapping[str, Path]) -> None:
    """Look at all files that are to be stored, besides those that an adapter or a checkpoint is read from.

    Raises UnsafeFormatError or CorruptFileError for the first that may not be.
    """
    refuse_unsafe(files)
    refuse_disguised(files)
    for name, path in files.items():
        check_text(name, path)
        if name.endswith(".safetensors"):
            read_header(path)
        elif CONFIGS.fullmatch(name):
            refuse_remote_code(name, read_json(path))


def unsafe_kind(name: str) -> str | None:
    """What a file of this name would be that nobody should load, in words; None for any other."""
    lower = name.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if lower.endswith(suffixes)), None)


def split_unsafe(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(names that may be kept, names of pickles, archives and programs)."""
    kept, unsafe = [], []
    for name in names:
        (unsafe if unsafe_kind(name) else kept).append(name)
    return kept, unsafe


def left_out(names: Iterable[str]) -> list[str]:
    """A warning on those of the names that are not kept; none where all are."""
    unsafe = split_unsafe(sorted(names))[1]
    more = f" and {len(unsafe) - SHOWN} more" if len(unsafe) > SHOWN else ""
    told = f"left out, for pickles, archives and programs are never kept: {', '.join(unsafe[:SHOWN])}{more}"
    return [told] if unsafe else []


def refuse_unsafe(names: Iterable[str], wanted: str = "safetensors, configs, tokenizer and texts") -> None:
    """Raise UnsafeFormatError where one of the names is that of a pickle, an archive or a program."""
    unsafe = split_unsafe(names)[1]
    if not unsafe:
        return
    kind = unsafe_kind(unsafe[0]) or ""
    raise UnsafeFormatError(
        f"{unsafe[0]} is {kind}",
        expected=wanted,
        found=", ".join(unsafe[:20]),
        remedy=CONVERT if kind == PICKLE else "leave it out",
        files=unsafe,
    )


def refuse_pickles(names: Iterable[str], wanted: str) -> None:
    """Raise UnsafeFormatError when pickled weights lie where `wanted` is missing."""
    refuse_unsafe([name for name in names if unsafe_kind(name) == PICKLE], wanted)


def refuse_disguised(files: Mapping[str, Path]) -> None:
    """Raise UnsafeFormatError for a pickle, an archive or a program under the name of something else."""
    for name, path in files.items():
        if name.endswith(WEIGHTS):
            continue
        with path.open("rb") as file:
            head = file.read(HEAD)
        for beginning, kind in BEGINNINGS:
            if beginning.match(head):
                raise UnsafeFormatError(
                    f"{name} begins as {kind} does",
                    expected="what its name says",
                    found=kind,
                    remedy="leave it out, or save what it is meant to be",
                    files=[name],
                )


def check_text(name: str, path: Path) -> None:
    """Raise CorruptFileError for a template, a card or another text that is too large or is not UTF-8."""
    if TEXTS.fullmatch(name) is None:
        return
    vocabulary = name.rpartition("/")[2] in ("vocab.txt", "merges.txt")
    limit, size = MAX_VOCABULARY_BYTES if vocabulary else MAX_TEXT_BYTES, path.stat().st_size
    try:
        if size <= limit:
            path.read_bytes().decode()
            return
        found = f"{size} bytes"
    except UnicodeDecodeError as error:
        found = str(error)
    raise CorruptFileError(
        f"{name} is not a text of a usual size",
        expected=f"UTF-8, at most {limit} bytes",
        found=found,
        remedy="save it as UTF-8, or leave it out",
    )


def refuse_remote_code(name: str, config: Mapping[str, Any]) -> None:
    """Raise UnsafeFormatError for a config that has transformers or PEFT fetch a program to run."""
    pending: list[Any] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, Mapping):
            pending += value.values()
            library = value.get("parent_library")
            named = value.get("auto_map") or (library if str(library).startswith("transformers_modules") else None)
            if named:
                raise UnsafeFormatError(
                    f"{name} needs remote code ({'auto_map' if value.get('auto_map') else 'parent_library'})",
                    expected="an architecture of the transformers library",
                    found=str(named)[:200],
                    remedy="convert the model to an architecture that transformers has built in",
                )
