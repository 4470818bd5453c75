"""What the kinds of virtual tokens share: one tensor that PEFT saves evaluated, and modules trained beside it.

prompt_embeddings                   [k, d] or a prefix's [k, 2 · layers · width]; what an encoder of them gave
base_model.<parameter>              a module of modules_to_save (a classifier), whole
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from composer.adapters import Target, refuse
from composer.adapters._common import WRAPPED, check_floats, damaged
from composer.deltas import Delta, Replace
from composer.tensors import SafetensorsHeader, TensorSpec

__all__ = ["PROMPT", "check_prompt", "prompt_shape", "replaced", "trained_modules"]

PROMPT = "prompt_embeddings"
WRAPPER = "base_model."


def check_prompt(config: dict[str, Any], header: SafetensorsHeader, parts: Collection[str] = (PROMPT,)) -> None:
    """Raise CorruptFileError where config and tensors disagree, UnsupportedAdapterError for what PEFT does not save.

    parts: the tensors that make up the virtual tokens; all others must be of modules trained whole.
    """
    check_floats(header)
    others = [name for name in header.tensors if name not in parts and not name.startswith(WRAPPER)]
    missing = [part for part in parts if part not in header.tensors]
    if others or missing:
        raise damaged(
            f"the adapter's tensors are not those that PEFT saves of this kind: {', '.join(others or missing)}",
            sorted(parts),
            list(header.tensors)[:20],
        )
    if config.get("num_transformer_submodules") not in (None, 1) or config.get("task_type") == "SEQ_2_SEQ_LM":
        raise refuse(
            "virtual tokens of a model with encoder and decoder are not supported",
            expected="an adapter of a decoder or an encoder",
            found=config.get("task_type"),
            remedy="serve the base with this adapter loaded by PEFT",
        )
    spec = header.tensors[PROMPT]
    tokens = config.get("num_virtual_tokens")
    if len(spec.shape) != 2 or 0 in spec.shape or spec.shape[0] != tokens:
        raise damaged(f"{PROMPT} has the shape {list(spec.shape)}", [tokens, "numbers a token"], list(spec.shape))


def prompt_shape(header: SafetensorsHeader) -> tuple[int, int]:
    """(k, numbers a virtual token)."""
    tokens, numbers = header.tensors[PROMPT].shape
    return tokens, numbers


def trained_modules(header: SafetensorsHeader) -> dict[str, TensorSpec]:
    """The tensors of modules trained whole, by base parameter."""
    return {
        WRAPPED.sub("", name.removeprefix(WRAPPER)): spec
        for name, spec in sorted(header.tensors.items())
        if name.startswith(WRAPPER)
    }


def whole_targets(header: SafetensorsHeader) -> tuple[Target, ...]:
    """The same as targets."""
    return tuple(Target(parameter, spec.shape) for parameter, spec in trained_modules(header).items())


def replaced(header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
    """One Replace a tensor of these modules."""
    return [Replace(names[parameter], spec) for parameter, spec in trained_modules(header).items()]
