"""(IA)³: learned factors for the outputs or the inputs of a layer (arXiv:2205.05638; peft/tuners/ia3/layer.py).

base_model.model.<module>.ia3_l [out, 1]     W' = l ⊙ W by rows, and b' = l ⊙ b where the base has a bias
base_model.model.<module>.ia3_l [1, in]      a feedforward module: W' = W ⊙ l by columns, the bias stays
base_model.model.<module>.ia3_l [1, n, 1…]   a convolution: its outputs, or inputs where feedforward_modules names it
base_model.model.<parameter>                 a module of modules_to_save, whole

With fan_in_fan_out (Conv1D) the base keeps [in, out], and rows and columns swap.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.adapters import ANY_SIZE, Signature, Target, adapter_kind, parameter_count
from composer.adapters._common import check_floats, damaged, factors_by_module, module_names, whole_tensors
from composer.deltas import Delta, Replace, read_array
from composer.tensors import SafetensorsHeader, TensorSpec

__all__ = ["Ia3", "Scaling"]


@dataclass(frozen=True, slots=True)
class Scaling:
    """W ⊙ l − W, with l along the rows of the base's layout (`by_rows`) or along its columns."""

    target: str
    factor: TensorSpec
    by_rows: bool
    transposed: bool
    replaces: bool = False
    whole: bool = False

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return (self.factor,)

    def load(self) -> LoadedScaling:
        return LoadedScaling(read_array(self.factor).ravel() - np.float32(1), self.by_rows)


@dataclass(frozen=True, slots=True)
class LoadedScaling:
    """l − 1 in memory, float32 [rows] or [columns]."""

    change: np.ndarray
    by_rows: bool

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        if self.by_rows:
            return base * self.change[start:stop, None]
        return base * np.repeat(self.change, base.shape[1] // len(self.change))  # a kernel has several numbers an input


@adapter_kind
class Ia3:
    """Outputs or inputs of linear, Conv1D and convolution weights, times a vector."""

    name = "ia3"
    peft_types = ("IA3",)

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise CorruptFileError for vectors that are neither [out, 1] nor [1, in]."""
        check_floats(header)
        if config.get("fan_in_fan_out") not in (True, False, None):
            found = config["fan_in_fan_out"]
            raise damaged(f"adapter_config.json: fan_in_fan_out={found!r}", "true or false", found)
        for module, spec in _vectors(header).items():
            flat = len(spec.shape) == 2 and sorted(spec.shape)[0] == 1 and max(spec.shape) > 1
            kernel = 3 <= len(spec.shape) <= 5 and spec.shape[1] > 1 and {spec.shape[0], *spec.shape[2:]} == {1}
            if not flat and not kernel:
                raise damaged(
                    f"{module}: ia3_l has the shape {list(spec.shape)}",
                    "[out, 1] or [1, in], or [1, channels, 1…] of a convolution",
                    list(spec.shape),
                )
            if kernel and not isinstance(config.get("feedforward_modules"), list | str):
                raise damaged(
                    f"{module} is a convolution, and adapter_config.json does not say whether it is feedforward",
                    "feedforward_modules",
                    config.get("feedforward_modules"),
                )

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """A weight of which one size is known, for each module; the bias too where rows of W [out, in] are scaled."""
        vectors = _vectors(header)
        targets, optional = [], []
        for module, spec in vectors.items():
            by_outputs = _by_outputs(config, module, spec)
            shape = tuple(ANY_SIZE if size == 1 else size for size in spec.shape)
            if len(shape) > 2 and by_outputs:
                shape = (shape[1], shape[0], *shape[2:])
            turned = len(shape) == 2 and config.get("fan_in_fan_out")
            targets.append(Target(f"{module}.weight", shape[::-1] if turned else shape))
            if by_outputs:
                optional.append(Target(f"{module}.bias", (max(spec.shape),)))
        factors = factors_by_module(header, ("ia3_l",))
        targets += [Target(parameter, spec.shape) for parameter, spec in whole_tensors(header, factors).items()]
        return Signature(
            kind=self.name,
            targets=tuple(targets),
            parameters=parameter_count(header),
            target_modules=module_names(factors),
            optional=tuple(optional),
        )

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """One Scaling a weight, one a bias that the base has, one Replace a whole tensor."""
        deltas: list[Delta] = []
        for module, spec in _vectors(header).items():
            transposed = bool(config.get("fan_in_fan_out")) and len(spec.shape) == 2
            by_outputs = _by_outputs(config, module, spec)
            deltas.append(Scaling(names[f"{module}.weight"], spec, by_outputs != transposed, transposed))
            if by_outputs and f"{module}.bias" in names:
                deltas.append(Scaling(names[f"{module}.bias"], spec, True, transposed))
        whole = whole_tensors(header, factors_by_module(header, ("ia3_l",)))
        return deltas + [Replace(names[parameter], spec) for parameter, spec in whole.items()]


def _by_outputs(config: dict[str, Any], module: str, spec: TensorSpec) -> bool:
    """Whether the vector is one of outputs. That of a convolution does not show it, and the config says.

    As PEFT matches feedforward_modules: a regular expression for the whole name, or ends of names.
    Raises CorruptFileError for a pattern that is none.
    """
    if len(spec.shape) == 2:
        return spec.shape[1] == 1
    feedforward = config["feedforward_modules"]
    if not isinstance(feedforward, str):
        return not any(module.endswith(str(name)) for name in feedforward)
    try:
        return re.fullmatch(feedforward, module) is None
    except re.error as error:
        raise damaged(f"adapter_config.json: feedforward_modules: {error}", "a pattern", feedforward) from None


def _vectors(header: SafetensorsHeader) -> dict[str, TensorSpec]:
    return {module: parts["ia3_l"] for module, parts in factors_by_module(header, ("ia3_l",)).items()}
