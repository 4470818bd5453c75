"""alpha / rank of the LyCORIS kinds (LoHa, LoKr), whose configs name it otherwise than LoRA's."""

from __future__ import annotations

from typing import Any

from composer.adapters._common import damaged
from composer.adapters._lora_config import pattern_value

__all__ = ["check_alpha", "scale_of"]


def check_alpha(config: dict[str, Any]) -> None:
    """Raise CorruptFileError unless rank and alpha, and their patterns, are numbers that divide."""
    ranks = [config.get("r"), *_values(config, "rank_pattern")]
    alphas = [config.get("alpha"), *_values(config, "alpha_pattern")]
    if not all(type(rank) is int and 0 < rank < 2**31 for rank in ranks):
        raise damaged(f"adapter_config.json: r={ranks[0]!r} is not a rank", "positive integers", ranks)
    if not all(type(alpha) in (int, float) and abs(alpha) < 2**53 for alpha in alphas):
        raise damaged(f"adapter_config.json: alpha={alphas[0]!r} is not a number", "finite numbers", alphas)


def scale_of(config: dict[str, Any], module: str) -> tuple[float, int]:
    """(alpha / rank, rank) of a module, after alpha_pattern and rank_pattern."""
    rank = pattern_value(config.get("rank_pattern"), module, config["r"])
    return pattern_value(config.get("alpha_pattern"), module, config["alpha"]) / rank, rank


def _values(config: dict[str, Any], field: str) -> list[Any]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise damaged(f"adapter_config.json: {field} is not an object", "a map from module to number", patterns)
    return list(patterns.values())
