"""PEANuT: the change is a small network's answer to the weight itself (arXiv:2410.01870; peft/tuners/peanut/layer.py).

base_model.model.<module>.peanut_A.weight [r, out]    peanut_B.weight [out, r]
                          peanut_encoders.<i>.weight, peanut_decoders.<i>.weight [r, r], `depth` of each

h = f(Wᵀ·Aᵀ)     h = f(h·Eᵢᵀ) going in     h = f(h·Dᵢᵀ) + (what went into the encoder at that depth) coming out
W += scaling · (h·Bᵀ)ᵀ     f = act_fn
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from composer.adapters import ANY_SIZE, adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts
from composer.deltas import BlockDelta, read_array
from composer.product import product

__all__ = ["Peanut"]

Activation = Callable[[np.ndarray], np.ndarray]

MAX_DEPTH = 64
ENDS = ("peanut_A.weight", "peanut_B.weight")
STAGES = ("peanut_encoders", "peanut_decoders")
ACTIVATIONS: Mapping[str, Activation] = {
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "linear": lambda x: x,
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


@dataclass(frozen=True, slots=True)
class LoadedNetwork:
    """first [r, out], last [out, r], the encoders and decoders [r, r] in the order of their use; float32."""

    first: np.ndarray
    last: np.ndarray
    encoders: tuple[np.ndarray, ...]
    decoders: tuple[np.ndarray, ...]
    activation: Activation
    scale: np.float32

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """All rows: an input's features mix all outputs."""
        with np.errstate(over="ignore"):  # exp of a large negative number: the sigmoid is 0 there
            hidden = self.activation(self.first @ base)  # [r, in]
            entered = []
            for encoder in self.encoders:
                entered.append(hidden)
                hidden = self.activation(encoder @ hidden)
            for decoder in self.decoders:
                hidden = self.activation(decoder @ hidden) + entered.pop()
        return product(self.last, hidden.astype(np.float32)) * self.scale


@adapter_kind
class Peanut(ModuleKind):
    """Changes of linear weights that a network computes from the weights."""

    name = "peanut"
    peft_types = ("PEANUT",)
    parts = (*ENDS, *(f"{stage}.{index}.weight" for stage in STAGES for index in range(MAX_DEPTH)))
    optional = parts[2:]
    mixes_rows = True
    numbers = ("scaling",)
    options: ClassVar = {"act_fn": tuple(ACTIVATIONS)}

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        shapes, depth = {name: spec.shape for name, spec in parts.items()}, config.get("depth", 0)
        a, b = (shapes[name] for name in ENDS)
        rank = a[0] if a else 0
        fits = len(a) == len(b) == 2 and a == b[::-1] and 0 not in a and type(depth) is int
        if not fits or shapes != {**dict(zip(ENDS, (a, b), strict=True)), **dict.fromkeys(_inner(depth), (rank, rank))}:
            found = {name: list(shape) for name, shape in shapes.items()}
            expected = f"A [r, out], B [out, r], {depth} encoders and decoders [r, r]"
            raise damaged(f"{module}: the parts of PEANuT do not fit", expected, found)
        return (a[1], ANY_SIZE)

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        depth = config.get("depth", 0)
        inner = [read_array(parts[name]) for name in _inner(depth)]
        first, last = (read_array(parts[name]) for name in ENDS)
        activation = ACTIVATIONS[config.get("act_fn", "relu")]
        return LoadedNetwork(
            first, last, tuple(inner[:depth]), tuple(inner[depth:]), activation, np.float32(config["scaling"])
        )


def _inner(depth: int) -> list[str]:
    """The names of the encoders, then of the decoders."""
    return [f"{stage}.{index}.weight" for stage in STAGES for index in range(depth)]
