"""LoRA on bare parameters (target_parameters), such as the stacked experts of a mixture.

PEFT wraps the module once for each of its parameters, the first that the module holds innermost:

    <module>.base_layer.lora_A.weight      gate_up_proj, the first parameter of the experts
    <module>.lora_A.weight                 down_proj, the second; or the only one that is trained

The names of the parameters are in adapter_config.json alone.
Source: PEFT's tuners/tuners_utils.py, _inject_parameters; tuners/lora/layer.py, ParamWrapper.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from composer.adapters import Target, refuse
from composer.adapters._common import damaged
from composer.adapters._lora_config import lora_scale, pattern_value
from composer.deltas import Delta, LowRank
from composer.deltas_experts import ExpertLowRank
from composer.tensors import TensorSpec

__all__ = ["check_parameters", "parameter_delta", "parameter_target", "split_parameters"]

Sides = dict[str, TensorSpec]
# The order in which the modules of transformers hold them
ORDER = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "down_proj", "down_proj_bias")
SWAPPED_SINCE = (0, 19)


def split_parameters(config: dict[str, Any], factors: Mapping[str, Sides]) -> tuple[dict[str, Sides], dict[str, Sides]]:
    """The factors of modules, by module, and those of bare parameters, by the parameter's own name.

    Raises CorruptFileError, or UnsupportedAdapterError where it is not known which parameter a pair belongs to.
    """
    wanted = config.get("target_parameters") or []
    if not isinstance(wanted, list) or not all(isinstance(name, str) and name for name in wanted):
        raise damaged("adapter_config.json: target_parameters is not a list of names", "names", wanted)
    if not wanted:
        return dict(factors), {}
    layers: dict[str, dict[int, Sides]] = {}
    for name, sides in factors.items():
        module = re.sub(r"(\.base_layer)+$", "", name)
        layers.setdefault(module, {})[name[len(module) :].count(".base_layer")] = sides
    modules, parameters = {}, {}
    for module, depths in layers.items():
        names = _parameters_of(module, wanted)
        if len(depths) == 1 and 0 in depths and (not names or _is_target_module(module, config)):
            modules[module] = depths[0]
            continue
        if len(names) > 1 and not set(names) <= set(ORDER):
            raise refuse(
                f"{module}: in which order it holds {', '.join(names)} is not known",
                expected=f"parameters named {', '.join(ORDER)}, or one of a module",
                found=names,
                remedy="merge it with PEFT",
            )
        ordered = sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else 0)
        if set(depths) != set(range(len(ordered))):
            expected = f"one pair of factors for each of {', '.join(ordered) or 'target_parameters'}"
            raise damaged(f"{module}: target_parameters and the factors disagree", expected, f"{len(depths)} pairs")
        for depth, name in enumerate(reversed(ordered)):
            parameters[f"{module}.{name}"] = depths[depth]
    return modules, parameters


def _parameters_of(module: str, wanted: list[str]) -> list[str]:
    """The names in target_parameters that are parameters of the module: each names a parameter, or its path's end."""
    found = []
    for name in wanted:
        path, _, parameter = name.rpartition(".")
        if not path or f".{module}".endswith(f".{path}"):
            found.append(parameter)
    return sorted(set(found))


def _is_target_module(module: str, config: Mapping[str, Any]) -> bool:
    """Whether target_modules names the module itself."""
    modules = config.get("target_modules") or []
    if isinstance(modules, str):
        try:
            return re.fullmatch(modules, module) is not None
        except re.error:
            return False
    return any(f".{module}".endswith(f".{name}") for name in modules)


def check_parameters(config: dict[str, Any], parameters: Mapping[str, Sides]) -> None:
    """Raise CorruptFileError where the rows of A are not as many factors as experts, or options do not go together."""
    for option in ("use_dora", "lora_bias", "fan_in_fan_out"):
        if parameters and config.get(option):
            raise damaged(f"adapter_config.json: PEFT has no {option} on target_parameters", f"no {option}", True)
    for parameter, sides in parameters.items():
        rank = pattern_value(config.get("rank_pattern"), parameter, config["r"])
        rows = sides["A"].shape[0]
        if rows % rank:
            raise damaged(f"{parameter}: lora_A has {rows} rows, which are not {rank} an expert", rank, rows)


def parameter_target(config: dict[str, Any], parameter: str, sides: Sides) -> Target:
    """[experts, y, x], in the order that PEFT has since 0.19, or [out, in] of a parameter that is one matrix."""
    shape = (sides["B"].shape[0], sides["A"].shape[1])
    experts = _experts(config, parameter, sides)
    return Target(parameter, shape if experts == 1 else (experts, *shape))


def parameter_delta(config: dict[str, Any], parameter: str, sides: Sides, target: str) -> Delta:
    """One ExpertLowRank, or a LowRank on a single matrix."""
    experts = _experts(config, parameter, sides)
    scale = lora_scale(config, parameter, sides["A"].shape[0] // experts)
    if experts == 1:
        return LowRank(target, sides["A"], sides["B"], scale, plain=False)
    return ExpertLowRank(target, sides["A"], sides["B"], experts, scale, _version(config) >= SWAPPED_SINCE)


def _experts(config: dict[str, Any], parameter: str, sides: Sides) -> int:
    return sides["A"].shape[0] // int(pattern_value(config.get("rank_pattern"), parameter, config["r"]))


def _version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The version of PEFT that saved the adapter; those before 0.18 do not say."""
    found = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return tuple(map(int, found.groups())) if found else (0, 0)
