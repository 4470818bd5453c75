"""Module names where they differ from the names that checkpoints store, a family of architectures a row.

transformers renames tensors as it loads them, and PEFT saves an adapter under the names of modules. A row says, in
that direction, what it does: regular expressions applied one after another to every stored name. A family takes part
when all names of an adapter are found through it; its config is not asked, so renamed copies work as well.
Source: transformers 5, conversion_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

__all__ = ["FAMILIES", "module_names"]

Rules = tuple[tuple[str, str], ...]
_TOWERS = r"^(vision_tower|image_tower|video_tower|audio_tower|vision_model|multi_modal_projector|image_newline)"
_IMAGE: Rules = (
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)
_QKV = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
FAMILIES: dict[str, Rules] = {
    "mixtral": ((r"\.block_sparse_moe\.", ".mlp."),),
    "phimoe": ((r"\.block_sparse_moe\.", ".mlp."), (r"\.gate\.weight$", ".router.weight")),
    "granitemoe": (
        (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
        (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
        (r"\.block_sparse_moe\.router\.layer\.weight$", ".block_sparse_moe.router.weight"),
    ),
    "aria_text": (
        (r"\.mlp\.experts\.fc1\.weight$", ".mlp.experts.gate_up_proj"),
        (r"\.mlp\.experts\.fc2\.weight$", ".mlp.experts.down_proj"),
    ),
    "llava": (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (_TOWERS, r"model.\1"),
    ),
    "granite_speech": (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(encoder|projector)\.", r"model.\1."),
    ),
    "qwen2_vl": (
        (r"^(visual|audio_tower)\.", r"model.\1."),
        (r"^model\.(?!language_model\.|visual\.|audio_tower\.)", "model.language_model."),
    ),
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
    "vit": (
        (r"\.encoder\.layer\.", ".layers."),
        *((rf"attention\.attention\.{old}\.", f"attention.{new}.") for old, new in _QKV.items()),
        *_IMAGE,
    ),
    "dinov2": (
        *((rf"attention\.attention\.{old}\.", f"attention.{new}.") for old, new in _QKV.items()),
        (r"attention\.output\.dense", "attention.o_proj"),
        (r"mlp\.weights_out", "mlp.down_proj"),
    ),
    "swin": (*((rf"attention\.self\.{old}\.", f"attention.{new}.") for old, new in _QKV.items()), *_IMAGE),
}


@lru_cache(maxsize=64)  # a catalogue asks the same of one base for every adapter
def module_names(family: str, names: tuple[str, ...]) -> Mapping[str, str] | None:
    """Module name to stored name under the rules of a family; None where they change nothing or two names collide."""
    rules = [(re.compile(pattern), replacement) for pattern, replacement in FAMILIES[family]]
    found: dict[str, str] = {}
    changed = False
    for name in names:
        renamed = name
        for pattern, replacement in rules:
            renamed = pattern.sub(replacement, renamed)
        changed |= renamed != name
        found[renamed] = name
    return found if changed and len(found) == len(names) else None
