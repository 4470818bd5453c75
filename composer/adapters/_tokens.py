"""Trained rows of an embedding or a head, as PEFT saves them within a LoRA and as a kind of their own.

<module>.token_adapter.trainable_tokens_delta [n, d]        LoRA, trainable_token_indices: [i, …] or {layer: [i, …]}
<module>.token_adapter.base_layer.weight [V, d]             the rest of the rows, where the vocabulary was resized
<module>.trainable_tokens_delta [n, d]                      TRAINABLE_TOKENS, token_indices: [i, …]

Where the ends of a model are tied, PEFT trains their rows as one and may save them under both names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from composer.adapters import ANY_SIZE, Target
from composer.adapters._common import PREFIX, damaged
from composer.deltas_rows import TokenRows
from composer.tensors import SafetensorsHeader, TensorSpec

__all__ = ["check_tokens", "token_deltas", "token_indices", "token_targets", "token_tensors"]

REST = ".token_adapter.base_layer.weight"

ROWS = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?")


def token_tensors(header: SafetensorsHeader) -> dict[str, TensorSpec]:
    """The trained rows by module."""
    matches = ((ROWS.fullmatch(name.removeprefix(PREFIX)), spec) for name, spec in sorted(header.tensors.items()))
    return {match["module"]: spec for match, spec in matches if match}


def check_tokens(config: dict[str, Any], header: SafetensorsHeader) -> None:
    """Raise CorruptFileError unless every matrix of rows has its own tokens in the config."""
    found = token_tensors(header)
    if config.get("trainable_token_indices") and not found:
        raise damaged("adapter_config.json names trained tokens, and the file has no rows for them", "rows", "none")
    for module, spec in found.items():
        indices = _indices(config, module)
        if not isinstance(indices, list) or not indices or not all(type(i) is int and 0 <= i < 2**31 for i in indices):
            raise damaged(f"adapter_config.json does not say which tokens {module} has rows for", "token ids", indices)
        if len(set(indices)) != len(indices):
            raise damaged(f"adapter_config.json names a token of {module} twice", "each token once", indices[:20])
        if len(spec.shape) != 2 or spec.shape[0] != len(indices):
            raise damaged(f"{spec.name} is not one row a token", f"[{len(indices)}, d]", list(spec.shape))
        whole = header.tensors.get(f"{PREFIX}{module}{REST}")
        if whole is not None and (whole.shape[1:] != spec.shape[1:] or max(indices) >= whole.shape[0]):
            raise damaged(f"{whole.name} has no place for the trained rows", f"rows for {max(indices)}", whole.shape)


def token_targets(header: SafetensorsHeader) -> list[Target]:
    """[any, d] for each module: the adapter does not say how large the vocabulary is."""
    return [Target(f"{module}.weight", (ANY_SIZE, spec.shape[1])) for module, spec in _alone(header).items()]


def token_deltas(config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[TokenRows]:
    """One TokenRows a module."""
    return [
        TokenRows(names[f"{module}.weight"], spec, token_indices(config, module))
        for module, spec in _alone(header).items()
    ]


def token_indices(config: dict[str, Any], module: str) -> tuple[int, ...]:
    """The tokens of a module with trained rows, checked before."""
    return tuple(_indices(config, module))


def _alone(header: SafetensorsHeader) -> dict[str, TensorSpec]:
    """Rows that do not come with the rest of their matrix."""
    found = token_tensors(header)
    return {module: spec for module, spec in found.items() if f"{PREFIX}{module}{REST}" not in header.tensors}


def _indices(config: dict[str, Any], module: str) -> Any:
    """The tokens of a module as the config lists them; None unless exactly one entry is the module's."""
    indices = config.get("trainable_token_indices", config.get("token_indices"))
    if not isinstance(indices, dict):
        return indices
    fitting = [value for name, value in indices.items() if f".{module}".endswith(f".{name}")]
    return fitting[0] if len(fitting) == 1 else None
