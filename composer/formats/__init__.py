"""Adapters of other tools, one file a format: each reads a folder as what the PEFT kinds understand.

    find_format(files, config)  ->  AdapterFormat, or None: PEFT's own
        .read(files, config)    ->  View (config and header in PEFT's terms, the files it is made of)

Nothing is converted on disk: a view points into the original file. A format registers itself with ``@adapter_format``;
siblings are imported in sorted order and a duplicate is an error.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from composer.admission import refuse_pickles
from composer.errors import CorruptFileError, NotFoundError, UnsupportedAdapterError
from composer.files import FileSet
from composer.tensors import DTYPES, SafetensorsHeader, TensorSpec

__all__ = [
    "PEFT_LAYOUT",
    "AdapterFormat",
    "TransposedSpec",
    "View",
    "adapter_format",
    "damaged",
    "find_format",
    "formats",
    "is_number",
    "is_rank",
    "readable",
    "refuse",
    "renamed",
    "require_weights",
    "transposed",
    "view_header",
    "weight_files",
]

PEFT_LAYOUT = "adapter_config.json with peft_type, adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class View:
    """A foreign adapter as a PEFT kind reads it; `stored` names the files of the folder that it consists of."""

    config: dict[str, Any]
    header: SafetensorsHeader
    stored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TransposedSpec(TensorSpec):
    """A matrix whose file holds its transpose: `shape` and `read` are turned, the byte ranges are the file's own."""

    def read(self) -> np.ndarray:
        """The matrix [rows, columns] of `shape`, a transposed view. Raises CorruptFileError when the file is short."""
        stored = np.frombuffer(self.read_bytes(0, self.nbytes), DTYPES[self.dtype])
        return stored.reshape(self.shape[::-1]).T


class AdapterFormat(Protocol):
    """What one file of this package provides; `layout` says in words which files make such an adapter."""

    name: str
    layout: str

    def recognises(self, files: FileSet, config: Mapping[str, Any] | None) -> bool:
        """Whether the folder is of this format; `config` is its adapter_config.json, where it has one."""
        ...

    def read(self, files: FileSet, config: Mapping[str, Any] | None) -> View:
        """The adapter as a PEFT kind reads it.

        Raises NotFoundError, UnsafeFormatError, CorruptFileError or UnsupportedAdapterError.
        """
        ...


F = TypeVar("F", bound=AdapterFormat)

_FORMATS: dict[str, AdapterFormat] = {}


def adapter_format(cls: type[F]) -> type[F]:
    """Register a format; its name must be new."""
    found = cls()
    if found.name in _FORMATS:
        raise RuntimeError(f"two adapter formats are named {found.name!r}")
    _FORMATS[found.name] = found
    return cls


def formats() -> dict[str, AdapterFormat]:
    """All formats besides PEFT's by name."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        importlib.import_module(f"{__name__}.{module.name}")
    return _FORMATS


def find_format(files: FileSet, config: Mapping[str, Any] | None) -> AdapterFormat | None:
    """The format of a folder; None where its config has a `peft_type`, or where no format recognises it."""
    if config is not None and "peft_type" in config:
        return None
    return next((found for found in formats().values() if found.recognises(files, config)), None)


def readable() -> str:
    """Every format that can be read, in words: what an error for an unknown folder lists."""
    return "; ".join([f"PEFT ({PEFT_LAYOUT})", *(f"{found.name} ({found.layout})" for found in formats().values())])


def renamed(spec: TensorSpec, name: str) -> TensorSpec:
    """The same data under another name."""
    return replace(spec, name=name)


def transposed(spec: TensorSpec, name: str) -> TransposedSpec:
    """The transpose of a matrix under another name, without reading it."""
    return TransposedSpec(name, spec.dtype, spec.shape[::-1], spec.offset, spec.nbytes, spec.path)


def view_header(header: SafetensorsHeader, specs: list[TensorSpec]) -> SafetensorsHeader:
    """The header with `specs` in place of its tensors. Raises CorruptFileError where two have one name."""
    tensors = {spec.name: spec for spec in specs}
    if len(tensors) != len(specs):
        names = [spec.name for spec in specs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise damaged(f"{len(twice)} tensors are there under two names", "each tensor once", twice[:5])
    return replace(header, tensors=tensors)


def require_weights(files: FileSet, name: str, tool: str) -> None:
    """Raise UnsafeFormatError or NotFoundError unless the folder has the safetensors file `name`."""
    if name in files:
        return
    refuse_pickles(files, name)
    raise NotFoundError(
        f"the adapter has no {name}",
        expected=name,
        found=", ".join(list(files)[:8]),
        remedy=f"save the adapter with {tool}, as safetensors",
    )


def weight_files(files: FileSet) -> list[str]:
    """The safetensors files at the top of the folder."""
    return [name for name in files if name.endswith(".safetensors") and "/" not in name]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number of a plausible size."""
    return type(value) in (int, float) and abs(value) < 2**53


def is_rank(value: Any) -> bool:
    """Whether a JSON value is a positive integer of a plausible size."""
    return type(value) is int and 0 < value < 2**31


def damaged(message: str, expected: Any, found: Any) -> CorruptFileError:
    """The error for a file that does not hold what its format defines."""
    return CorruptFileError(
        message,
        expected=expected,
        found=found,
        remedy="restore the files as the tool that trained the adapter saved them",
    )


def refuse(message: str, expected: Any, found: Any, remedy: str) -> UnsupportedAdapterError:
    """The error for a known format used in a way that cannot be composed."""
    return UnsupportedAdapterError(message, expected=expected, found=found, remedy=remedy)
