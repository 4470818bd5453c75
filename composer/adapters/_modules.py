"""Kinds whose tensors are named <module>.<part>: a kind says what its parts are, this file does the rest.

class Hra(ModuleKind):
    parts = ("hra_u",)
    def shape(config, module, parts)   [out, in] of the module's weight, or CorruptFileError
    def build(config, parts)           the change of that weight, out of the parts, as a BlockDelta
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from composer.adapters import Signature, Target, parameter_count, refuse
from composer.adapters._common import PREFIX, check_floats, damaged, factors_by_module, module_names, whole_tensors
from composer.conditions import turned
from composer.deltas import BlockDelta, Delta, LoadedLowRank, Replace
from composer.errors import TargetMismatchError
from composer.tensors import SafetensorsHeader, TensorSpec

__all__ = ["Computed", "ModuleKind", "Parts", "check_number", "low_rank", "unfit"]

Parts = Mapping[str, TensorSpec]
SHARED_PREFIX = PREFIX.removesuffix("model.")


@dataclass(frozen=True, slots=True)
class Computed:
    """A change of one tensor that `build` makes of the sources; `transposed` where the base keeps [in, out].

    scratch: bytes a number of the tensor that computing it takes besides the result. held: bytes that are in memory
    besides the sources.
    """

    target: str
    sources: tuple[TensorSpec, ...]
    build: Callable[[], BlockDelta]
    transposed: bool = False
    mixes_rows: bool = False
    scratch: int = 0
    held: int = 0
    replaces: bool = False

    @property
    def whole(self) -> bool:
        return self.mixes_rows or self.transposed

    def load(self) -> BlockDelta:
        loaded = self.build()
        return Transposed(loaded) if self.transposed else loaded


@dataclass(frozen=True, slots=True)
class Transposed:
    """A change of [out, in], for a base that keeps [in, out] (Conv1D); it needs all rows at once."""

    inner: BlockDelta

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.inner.rows(0, base.shape[1], np.ascontiguousarray(base.T)).T)


class ModuleKind:
    """Base class of such kinds: header and config in, one Computed a module and one Replace a whole tensor out."""

    name: ClassVar[str]
    peft_types: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()  # tensors of the adapter as a whole, base_model.<name>
    optional: ClassVar[tuple[str, ...]] = ()  # parts that a module may lack
    integers: ClassVar[tuple[str, ...]] = ()  # parts that are no floating-point numbers
    mixes_rows: ClassVar[bool] = False
    scratch: ClassVar[int] = 0  # see Computed
    parameter: ClassVar[str] = "weight"  # of the module, which changes
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # config fields and the values that can be composed
    numbers: ClassVar[tuple[str, ...]] = ()  # config fields that must hold a number
    saved: ClassVar[Mapping[str, str]] = {}  # config fields that say what the file holds: why it cannot be computed

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        """[out, in] of the module's weight, ANY_SIZE where the parts do not say; raises CorruptFileError."""
        raise NotImplementedError

    def conditions(self, config: dict[str, Any], parts: Parts) -> tuple[str, ...]:
        """What is known of the sizes that `shape` leaves open, as composer.conditions of [out, in]."""
        return ()

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        """The change of the weight [out, in]; reads the parts."""
        raise NotImplementedError

    def build_module(self, config: dict[str, Any], module: str, parts: Parts) -> BlockDelta:
        """The same for a kind whose config has values by module."""
        return self.build(config, parts)

    def held(self, config: dict[str, Any]) -> int:
        """Bytes that a loaded change takes besides its parts."""
        return 0

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise UnsupportedAdapterError for options that are not composed, CorruptFileError for a damaged adapter."""
        if config.get("fan_in_fan_out") not in (True, False, None):
            found = config["fan_in_fan_out"]
            raise damaged(f"adapter_config.json: fan_in_fan_out={found!r}", "true or false", found)
        for field, reason in self.saved.items():
            if config.get(field) is False:
                raise refuse(
                    f"{config['peft_type']} with {field}=false is not supported: {reason}",
                    expected=f"{field}=true",
                    found=False,
                    remedy=f"load it with PEFT where it was trained, set {field}=True in its config and save it again",
                )
        for field in self.numbers:
            check_number(config, field)
        for field, values in self.options.items():
            if config.get(field, values[0]) not in values:
                raise refuse(
                    f"{config['peft_type']} with {field}={config[field]!r} is not supported",
                    expected=f"{field} of {', '.join(map(repr, values))}",
                    found=config[field],
                    remedy="merge it with PEFT",
                )
        modules = self._modules(header)
        check_floats(
            header, {spec.name for parts in modules.values() for n, spec in parts.items() if n in self.integers}
        )
        required = {*self.parts, *self.shared} - set(self.optional)
        for module, parts in modules.items():
            if not required <= set(parts):
                raise damaged(f"{module}: parts of {config['peft_type']} are missing", sorted(required), sorted(parts))
            self.shape(config, module, parts)

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """[out, in] of each module ([in, out] with fan_in_fan_out), the own shape of each whole tensor."""
        modules = self._modules(header)
        targets, optional = [], []
        for module, parts in modules.items():
            shape = self.shape(config, module, parts)
            if self.changes_bias:
                optional.append(Target(f"{module}.bias", shape[:1]))
            conditions = self.conditions(config, parts)
            if config.get("fan_in_fan_out"):
                shape, conditions = shape[::-1], tuple(map(turned, conditions))
            targets.append(Target(f"{module}.{self.parameter}", shape, conditions))
        targets += [Target(name, spec.shape) for name, spec in self._whole(header).items()]
        rank = config.get("r")
        return Signature(
            kind=self.name,
            targets=tuple(targets),
            parameters=parameter_count(header),
            rank=rank if type(rank) is int and rank > 0 else None,
            target_modules=module_names(modules),
            optional=tuple(optional),
        )

    changes_bias: ClassVar[bool] = False  # the same change holds for the module's bias as a column

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """One Computed a module (and a bias where that changes too), one Replace a whole tensor."""
        transposed = bool(config.get("fan_in_fan_out"))
        deltas: list[Delta] = []
        shared = self._shared(header)
        for module, parts in self._modules(header).items():
            build = partial(self.build_module, config, module, parts)
            sources = (*parts.values(), *(spec for name, spec in shared.items() if parts.get(name, spec) != spec))
            target = names[f"{module}.{self.parameter}"]
            held = self.held(config)
            deltas.append(Computed(target, sources, build, transposed, self.mixes_rows, self.scratch, held))
            if f"{module}.bias" in names and self.changes_bias:
                deltas.append(Computed(names[f"{module}.bias"], sources, build, mixes_rows=self.mixes_rows))
        return deltas + [Replace(names[name], spec) for name, spec in self._whole(header).items()]

    def _modules(self, header: SafetensorsHeader) -> dict[str, dict[str, TensorSpec]]:
        shared = self._shared(header)
        return {module: {**shared, **parts} for module, parts in self._own(header).items()}

    def _own(self, header: SafetensorsHeader) -> dict[str, dict[str, TensorSpec]]:
        shared = {spec.name for spec in self._shared(header).values()}
        rest = {name: spec for name, spec in header.tensors.items() if name not in shared}
        return factors_by_module(rest, self.parts)

    def _shared(self, header: SafetensorsHeader) -> dict[str, TensorSpec]:
        found = {name: header.tensors.get(f"{SHARED_PREFIX}{name}") for name in self.shared}
        return {name: spec for name, spec in found.items() if spec is not None}

    def _whole(self, header: SafetensorsHeader) -> dict[str, TensorSpec]:
        return whole_tensors(header, {"": self._shared(header), **self._own(header)})


def check_number(config: dict[str, Any], field: str) -> None:
    """Raise CorruptFileError unless the field holds a finite number."""
    value = config.get(field)
    if type(value) not in (int, float) or not abs(value) < 2**53:
        raise damaged(f"adapter_config.json: {field}={value!r} is not a number", "a finite number", value)


def low_rank(left: np.ndarray, right: np.ndarray, scale: float = 1.0) -> LoadedLowRank:
    """scale · left [out, r] · right [r, in], float32."""
    return LoadedLowRank(
        np.ascontiguousarray(left, np.float32), np.ascontiguousarray(right, np.float32), np.float32(scale)
    )


def unfit(kind: str, expected: object, found: object) -> TargetMismatchError:
    """The error for a base tensor whose size does not fit, where only the base could tell."""
    return TargetMismatchError(
        f"{kind}: a tensor of the base has another size than the adapter needs",
        expected=expected,
        found=found,
        remedy="compose it with the base that it was trained on",
        keys=[],
    )
