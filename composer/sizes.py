"""Sizes of a model read off its tensors: what an adapter that names no tensor needs of a base.

@hidden_size        numbers in an embedding                               (576,)
@layers             attention layers                                      (30,)
@key_value_width    numbers that a layer caches of a token's key          (192,)

A target of one of these names (composer.adapters.Target) is compared with what the base's shapes say. A size that they
do not show, or not for all layers alike, is left out, and no adapter that needs it fits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from composer.checkpoint import INPUT_EMBEDDINGS

__all__ = ["HIDDEN_SIZE", "KEY_VALUE_WIDTH", "LAYERS", "SIZE_MARK", "model_sizes"]

SIZE_MARK = "@"
HIDDEN_SIZE, LAYERS, KEY_VALUE_WIDTH = "@hidden_size", "@layers", "@key_value_width"

Shapes = Mapping[str, tuple[int, ...]]

LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.(.+)")
KEYS = re.compile(r".*(?:k_proj|\.key|k_lin)\.weight")  # [width, hidden]
CONV1D_FUSED = re.compile(r"attn\.c_attn\.weight")  # GPT-2: [hidden, 3 · width]
FUSED = re.compile(r"(.*)qkv_proj\.weight")  # Phi-3: [queries + 2 · width, hidden], and o_proj [hidden, queries]


def model_sizes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The sizes that a checkpoint's tensor names and shapes show, by name."""
    sizes: dict[str, tuple[int, ...]] = {}
    embeddings = [shape for name, shape in shapes.items() if name.endswith(INPUT_EMBEDDINGS) and len(shape) == 2]
    if len(embeddings) == 1:
        sizes[HIDDEN_SIZE] = embeddings[0][1:]
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if found := LAYER.search(name):
            layers.setdefault(int(found[1]), {})[found[2]] = shape
    widths = [_key_value_width(layer) for layer in layers.values()]
    if layers:
        sizes[LAYERS] = (len(layers),)
    if widths and widths[0] is not None and set(widths) == {widths[0]}:
        sizes[KEY_VALUE_WIDTH] = (widths[0],)
    return sizes


def _key_value_width(layer: Shapes) -> int | None:
    for name, shape in layer.items():
        if len(shape) != 2:
            continue
        if KEYS.fullmatch(name):
            return shape[0]
        if CONV1D_FUSED.fullmatch(name):
            return shape[1] // 3
        if (fused := FUSED.fullmatch(name)) and f"{fused[1]}o_proj.weight" in layer:
            return (shape[0] - layer[f"{fused[1]}o_proj.weight"][1]) // 2
    return None
