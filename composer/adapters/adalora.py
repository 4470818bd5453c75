"""AdaLoRA: a LoRA in SVD form whose ranks were pruned while training (arXiv:2303.10512; peft/tuners/adalora/layer.py).

base_model.model.<module>.lora_A [r, in]   lora_E [r, 1]   lora_B [out, r]

W += s·B·(E ⊙ A)     s = alpha / (init_r + 1e-5), whatever rank is left; alpha ≤ 0 stands for the rank left
rank_pattern keeps, by <module>.lora_E, which of the initial ranks were left
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.adapters import Signature, Target, adapter_kind, parameter_count
from composer.adapters._common import PREFIX, check_floats, damaged, factors_by_module, module_names, whole_tensors
from composer.deltas import Delta, LoadedLowRank, Replace, read_array
from composer.tensors import SafetensorsHeader, TensorSpec

__all__ = ["Adalora"]

PARTS = ("lora_A", "lora_B", "lora_E")
EPSILON = 1e-5  # PEFT's guard against a division by zero


@dataclass(frozen=True, slots=True)
class SingularFactors:
    """scale · B·(E ⊙ A); `transposed` where the base keeps W as [in, out] (Conv1D)."""

    target: str
    a: TensorSpec
    b: TensorSpec
    e: TensorSpec
    scale: float
    transposed: bool = False
    replaces: bool = False
    whole: bool = False

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return (self.a, self.b, self.e)

    def load(self) -> LoadedLowRank:
        a, b = read_array(self.a) * read_array(self.e), read_array(self.b)
        if not len(a):  # pruned to nothing: one rank of zeros
            a, b = np.zeros((1, a.shape[1]), np.float32), np.zeros((len(b), 1), np.float32)
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return LoadedLowRank(np.ascontiguousarray(left), np.ascontiguousarray(right), np.float32(self.scale))


@adapter_kind
class Adalora:
    """Low-rank deltas with singular values on linear (and Conv1D) weights, each module of its own rank."""

    name = "adalora"
    peft_types = ("ADALORA",)

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise CorruptFileError for factors that do not fit one another, or not the ranks of the config."""
        check_floats(header)
        alpha, rank = config.get("lora_alpha"), config.get("init_r")
        if type(alpha) not in (int, float) or not abs(alpha) < 2**53:
            raise damaged(f"adapter_config.json: lora_alpha={alpha!r} is not a number", "a finite number", alpha)
        if type(rank) is not int or not 0 < rank < 2**31:
            raise damaged(f"adapter_config.json: init_r={rank!r} is not a rank", "a positive integer", rank)
        if config.get("fan_in_fan_out") not in (True, False, None):
            raise damaged("adapter_config.json: fan_in_fan_out", "true or false", config["fan_in_fan_out"])
        ranks = _ranks_left(config)
        for module, parts in factors_by_module(header, PARTS).items():
            shapes = {name: spec.shape for name, spec in parts.items()}
            left = ranks.get(module, rank)
            fits = (
                set(shapes) == set(PARTS)
                and all(len(shape) == 2 for shape in shapes.values())
                and shapes["lora_A"][0] == shapes["lora_B"][1] == left
                and shapes["lora_E"] == (left, 1)
            )
            if not fits:
                expected = f"lora_A [{left}, in], lora_E [{left}, 1] and lora_B [out, {left}]"
                raise damaged(f"{module}: the factors of AdaLoRA do not fit one another", expected, str(shapes))

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """[out, in] for each module ([in, out] with fan_in_fan_out), the own shape of each whole tensor.

        The rank is the largest that is left.
        """
        factors = factors_by_module(header, PARTS)
        targets = []
        for module, parts in factors.items():
            shape = (parts["lora_B"].shape[0], parts["lora_A"].shape[1])
            targets.append(Target(f"{module}.weight", shape[::-1] if config.get("fan_in_fan_out") else shape))
        targets += [Target(parameter, spec.shape) for parameter, spec in whole_tensors(header, factors).items()]
        return Signature(
            kind=self.name,
            targets=tuple(targets),
            parameters=parameter_count(header),
            rank=max(parts["lora_A"].shape[0] for parts in factors.values()),
            alpha=config["lora_alpha"],
            target_modules=module_names(factors),
        )

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """One SingularFactors a module, one Replace a whole tensor."""
        factors = factors_by_module(header, PARTS)
        deltas: list[Delta] = []
        for module, parts in factors.items():
            rank, alpha = parts["lora_A"].shape[0], config["lora_alpha"]
            scale = (alpha if alpha > 0 else rank) / (config["init_r"] + EPSILON)
            target, transposed = names[f"{module}.weight"], bool(config.get("fan_in_fan_out"))
            deltas.append(SingularFactors(target, *(parts[part] for part in PARTS), scale, transposed))
        return deltas + [Replace(names[parameter], spec) for parameter, spec in whole_tensors(header, factors).items()]


def _ranks_left(config: dict[str, Any]) -> dict[str, int]:
    """The rank of each module that rank_pattern names: a mask over the initial ranks, or the rank itself."""
    patterns = config.get("rank_pattern") or {}
    if not isinstance(patterns, dict):
        raise damaged("adapter_config.json: rank_pattern is not an object", "a map from lora_E to a mask", patterns)
    ranks = {}
    for name, mask in patterns.items():
        if type(mask) is int and mask >= 0:
            rank = mask
        elif isinstance(mask, list) and all(type(kept) is bool for kept in mask):
            rank = sum(mask)
        else:
            raise damaged(f"adapter_config.json: rank_pattern of {name} is not a mask", "a list of booleans", mask)
        ranks[name.removeprefix(PREFIX).removesuffix(".default").removesuffix(".lora_E")] = rank
    return ranks
