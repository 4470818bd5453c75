"""Quantised checkpoints, one file a scheme: the stored tensors of a layer are one float tensor, decoded as it is read.

    quantization_config ──► find_scheme
    stored tensors                          logical tensors
      q_proj.weight          U8 [n/2, 1] ─┐
      q_proj.weight.absmax   U8          ─┼─► q_proj.weight  F32 [out, in]     a QuantisedTensor
      q_proj.weight.quant_…              ─┘
      norm.weight            BF16        ───► norm.weight    BF16              the stored one itself

An adapter trained over a quantised base (QLoRA, arXiv:2305.14314) was trained on the dequantised numbers: it is merged
into those. A scheme registers itself with ``@scheme``; siblings are imported in sorted order and a duplicate is
an error. A decoder reads the bytes of the rows asked for, and the scales that belong to them; nothing is kept.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from composer.errors import CorruptFileError, UnsupportedQuantisationError
from composer.tensors import TensorSpec

__all__ = [
    "Decoder",
    "Encodable",
    "Encoder",
    "QuantisedTensor",
    "Scheme",
    "corrupt",
    "find_scheme",
    "logical_tensors",
    "refuse",
    "scheme",
    "schemes",
]

# Of config.json's dtype names, those that a dequantised weight is written in.
FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class Decoder(Protocol):
    """One logical tensor of a quantised checkpoint."""

    @property
    def name(self) -> str:
        """The name that the layer's weight has in the unquantised model."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it has there."""
        ...

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The stored tensors that it takes the place of; the first says in which shard it is written."""
        ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32 [stop - start, numbers a row]; called from several threads at once.

        Raises CorruptFileError when the file is short.
        """
        ...


class Encoder(Protocol):
    """One layer on its way back into the tensors that its scheme stores; see composer.requantise."""

    @property
    def dtype(self) -> str:
        """What the numbers are rounded to before they are encoded: the dtype that the layer was quantised from."""
        ...

    @property
    def step(self) -> int:
        """Rows are encoded from a multiple of this to a multiple of this, or to the end."""
        ...

    def encode(self, start: int, values: np.ndarray) -> None:
        """Take the rows from `start` on, float32 [rows, columns]; each row once, in any order, from several threads."""
        ...

    def finish(self) -> Decoder:
        """The layer as stored, in memory: its parts have the names, dtypes and sizes of the base's."""
        ...


@runtime_checkable
class Encodable(Protocol):
    """A decoder whose scheme can be written as well."""

    def encoder(self) -> Encoder:
        """An encoder with the settings of this layer."""
        ...


class Scheme(Protocol):
    """What one file of this package provides. `config` is the quantization_config of config.json.

    `ignored`, where a scheme has it, names stored tensors that are no weights and that the config says as well.
    """

    name: str

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether the config names this scheme."""
        ...

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise UnsupportedQuantisationError for a variant of the scheme that is not read."""
        ...

    def decoders(self, config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> list[Decoder]:
        """A decoder for each quantised layer. May read small tensors that describe others (shapes, block sizes).

        Raises CorruptFileError when tensors that belong together are missing or do not fit one another.
        """
        ...


@dataclass(frozen=True, slots=True)
class QuantisedTensor:
    """A logical float32 tensor, decoded from stored ones as it is read; by default it is written in the dtype `kept`.

    It stands where a TensorSpec does: the plan and the run see its name, shape, dtype and bytes.
    """

    decoder: Decoder
    kept: str

    @property
    def name(self) -> str:
        """The logical name."""
        return self.decoder.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return self.decoder.shape

    @property
    def dtype(self) -> str:
        """What the bytes of `read_bytes` are."""
        return "F32"

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return 4 * math.prod(self.shape)

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The stored tensors."""
        return self.decoder.parts

    def read_bytes(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of the decoded tensor; only the rows that they lie in are read and decoded."""
        width = self.nbytes // self.shape[0] or 1
        first, last = start // width, -(-stop // width)
        decoded = self.decoder.rows(first, last)
        return memoryview(decoded.reshape(-1).view(np.uint8))[start - first * width : stop - first * width]


S = TypeVar("S", bound=type)
_SCHEMES: dict[str, Scheme] = {}


def scheme(cls: S) -> S:
    """Register a quantisation scheme."""
    instance = cls()
    if instance.name in _SCHEMES:
        raise RuntimeError(f"two quantisation schemes are named {instance.name!r}")
    _SCHEMES[instance.name] = instance
    return cls


def schemes() -> dict[str, Scheme]:
    """All schemes by name."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        importlib.import_module(f"{__name__}.{module.name}")
    return _SCHEMES


def find_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme that reads a model of this config.json; None where it is not quantised.

    Raises UnsupportedQuantisationError, which names the scheme, or CorruptFileError.
    """
    quantisation = _quantisation(config)
    if quantisation is None:
        return None
    for candidate in schemes().values():
        if candidate.matches(quantisation):
            candidate.check(quantisation)
            return candidate
    method = quantisation.get("quant_method", "unnamed")
    raise refuse(f"a base quantised with {method!r} cannot be read", found=method)


def logical_tensors(
    found: Scheme, config: Mapping[str, Any], stored: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec | QuantisedTensor]:
    """What the stored tensors stand for, by name: decoded ones where the scheme consumes some, the rest as they are.

    Raises CorruptFileError when two decoders claim a tensor, or a decoded name is also stored.
    """
    quantisation = _quantisation(config) or {}
    kept = _kept_dtype(config, quantisation)
    tensors: dict[str, TensorSpec | QuantisedTensor] = {}
    consumed: dict[str, str] = {}
    for decoder in found.decoders(quantisation, stored):
        for part in decoder.parts:
            if part.name in consumed:
                raise corrupt(part.name, "tensors of one layer only", f"{consumed[part.name]} and {decoder.name}")
            consumed[part.name] = decoder.name
        if decoder.name in tensors:
            raise corrupt(decoder.name, "each layer quantised once", "two sets of stored tensors")
        tensors[decoder.name] = QuantisedTensor(decoder, kept)
    for name, spec in stored.items():
        if name in consumed or name in getattr(found, "ignored", ()):
            continue
        if name in tensors:
            raise corrupt(name, "either a quantised or a plain tensor", "both")
        tensors[name] = spec
    return tensors


def _quantisation(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    quantisation = config.get("quantization_config")
    if quantisation is None or isinstance(quantisation, dict):
        return quantisation or None
    raise CorruptFileError(
        "config.json: quantization_config is not an object",
        expected="an object",
        found=quantisation,
        remedy="fetch config.json again, or save the model anew with save_pretrained",
    )


def _kept_dtype(config: Mapping[str, Any], quantisation: Mapping[str, Any]) -> str:
    """The dtype that the quantised layers compute in, if the config says; else the model's own; else bfloat16.

    A bnb_4bit_compute_dtype of float32 says nothing: BitsAndBytesConfig writes it where none was chosen, and for int8.
    """
    computed = quantisation.get("bnb_4bit_compute_dtype")
    stated = [config.get("dtype"), config.get("torch_dtype")]
    if computed not in ("float32", "torch.float32"):
        stated.insert(0, computed)
    names = [value.removeprefix("torch.") for value in stated if isinstance(value, str)]
    return next((FLOATS[name] for name in names if name in FLOATS), "BF16")


def refuse(message: str, *, found: Any, expected: Any = None) -> UnsupportedQuantisationError:
    """The error for a quantisation that is not read."""
    return UnsupportedQuantisationError(
        message,
        expected=expected if expected is not None else sorted(schemes()),
        found=found,
        remedy="dequantise the base where its own library runs, save it with save_pretrained and register the result",
    )


def corrupt(name: str, expected: Any, found: Any) -> CorruptFileError:
    """The error for stored tensors that do not make up a quantised layer."""
    return CorruptFileError(
        f"{name}: the quantised layer is not whole: expected {expected}, found {found}",
        expected=expected,
        found=found,
        remedy="fetch the checkpoint again, or save it anew; config.json must be the one of these weights",
        tensor=name,
    )
