"""What adapter_config.json of a LoRA says of ranks and scales, as PEFT reads it."""

from __future__ import annotations

import math
import re
from typing import Any

from composer.errors import CorruptFileError, TargetMismatchError

__all__ = ["check_numbers", "lora_scale", "pattern_value"]

SWITCHES = ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias")


def lora_scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r or alpha / √r, after rank_pattern and alpha_pattern.

    A pattern is a regular expression for the whole module name or its end after a dot; the first that matches wins, as
    in PEFT's get_pattern_key.
    Raises TargetMismatchError when the configured rank is not that of the tensors.
    """
    configured = pattern_value(config.get("rank_pattern"), module, config["r"])
    if configured != rank:
        raise TargetMismatchError(
            f"{module}: adapter_config.json says rank {configured}, the tensors have {rank}",
            expected=configured,
            found=rank,
            remedy="the config belongs to another adapter, or rank_pattern is missing: restore the right one",
            keys=[module],
        )
    alpha = float(pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def pattern_value(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that fits the module's name or its end, or `default`, as in PEFT.

    Raises CorruptFileError for a pattern that is not a regular expression.
    """
    for pattern, value in (patterns or {}).items():
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise CorruptFileError(
                f"adapter_config.json: the pattern {pattern!r} is not a regular expression: {error}",
                expected="a module name or a regular expression",
                found=pattern,
                remedy="correct the pattern",
            ) from None
        if matched:
            return value
    return default


def check_numbers(config: dict[str, Any]) -> None:
    """Ranks are positive integers, alphas finite numbers, patterns map to them, switches are booleans."""
    wrong = [
        field for field, is_valid in (("r", _is_rank), ("lora_alpha", _is_number)) if not is_valid(config.get(field))
    ]
    for field, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict) or not all(map(is_valid, patterns.values())):
            wrong.append(field)
    wrong += [field for field in SWITCHES if config.get(field) not in (True, False, None)]
    if wrong:
        raise CorruptFileError(
            f"adapter_config.json: {wrong[0]}={config.get(wrong[0])!r} is not what PEFT writes",
            expected="a positive integer as rank, a finite number as alpha, true or false as switch",
            found={field: config.get(field) for field in wrong},
            remedy="restore the file that PEFT's save_pretrained wrote",
        )


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**53
