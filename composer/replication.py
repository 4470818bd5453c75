"""Layers used more than once (layer_replication of a LoRA): a deeper model, each of its layers a tensor of its own.

    layer_replication [[0, 4], [2, 5]]  ->  layers 0 1 2 3 2 3 4 of the base; end is not included
    adapter   model.layers.5.self_attn.q_proj   the sixth layer of the deeper model, which begins as the base's third

PEFT lets the copies share storage, and its merge adds the LoRA of every copy to that; its live forward, which the
training saw, gives each copy its own.
Source: PEFT's tuners/tuners_utils.py, replicate_layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from composer.checkpoint import Checkpoint, Shard
from composer.errors import CorruptFileError, TargetMismatchError, UnsupportedAdapterError

__all__ = ["layer_map", "original_name", "replicate"]

LAYER = re.compile(r"(?P<before>(?:.*?\.)?layers?)\.(?P<index>\d+)(?P<after>\..+)")
# Architectures whose layers are alike. Where config.json gives types to layers, PEFT's own forward fails.
MODELS = ("llama", "mistral", "bert")
MAX_LAYERS = 10_000


def layer_map(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The base's layer that each layer of the deeper model is; None where adapter_config.json replicates none.

    Raises CorruptFileError unless layer_replication is a list of ranges.
    """
    ranges = config.get("layer_replication")
    if not ranges:
        return None
    valid = isinstance(ranges, list) and all(
        isinstance(each, list) and len(each) == 2 and all(type(end) is int for end in each) and 0 <= each[0] < each[1]
        for each in ranges
    )
    if not valid or sum(stop - start for start, stop in ranges) > MAX_LAYERS:
        raise CorruptFileError(
            "adapter_config.json: layer_replication is not a list of ranges of layers",
            expected="[[start, end], …] with 0 <= start < end",
            found=ranges,
            remedy="restore the config that was saved with the adapter",
        )
    return tuple(layer for start, stop in ranges for layer in range(start, stop))


def original_name(name: str, layers: tuple[int, ...]) -> str:
    """The base's name of a parameter of the deeper model. Raises CorruptFileError for a layer that it does not have."""
    match = LAYER.fullmatch(name)
    if match is None:
        return name
    index = int(match["index"])
    if index >= len(layers):
        raise CorruptFileError(
            f"{name}: layer_replication makes {len(layers)} layers",
            expected=f"layers 0 to {len(layers) - 1}",
            found=index,
            remedy="the config belongs to another adapter: restore the right one",
        )
    return f"{match['before']}.{layers[index]}{match['after']}"


def replicate(checkpoint: Checkpoint, layers: tuple[int, ...]) -> Checkpoint:
    """The deeper model as a checkpoint whose tensors lie where the base's do, and config.json to match.

    Raises UnsupportedAdapterError for an architecture whose layers may depend on their place, TargetMismatchError
    where the base has fewer layers than are asked for.
    """
    config = checkpoint.config
    if config.get("model_type") not in MODELS or "layer_types" in config:
        raise UnsupportedAdapterError(
            f"layer_replication on {config.get('model_type')!r}: whether a layer depends on its place is not known",
            expected=sorted(MODELS),
            found=config.get("model_type"),
            remedy="serve the base with the adapter loaded by PEFT",
        )
    count = config.get("num_hidden_layers")
    if type(count) is not int or max(layers) >= count:
        raise TargetMismatchError(
            f"layer_replication uses layer {max(layers)}, and the base has {count} layers",
            expected=f"at least {max(layers) + 1} layers",
            found=count,
            remedy="compose it with the base that it was trained on",
            keys=[],
        )
    places: dict[int, list[int]] = {}
    for new, old in enumerate(layers):
        places.setdefault(old, []).append(new)
    shards = tuple(
        Shard(shard.name, shard.header, {
            new: spec for name, spec in shard.tensors.items() for new in _new_names(name, places)
        })
        for shard in checkpoint.shards
    )  # fmt: skip
    tensors = {name: spec for shard in shards for name, spec in shard.tensors.items()}
    return replace(checkpoint, shards=shards, tensors=tensors, config={**config, "num_hidden_layers": len(layers)})


def _new_names(name: str, places: Mapping[int, list[int]]) -> list[str]:
    match = LAYER.fullmatch(name)
    if match is None:
        return [name]
    return [f"{match['before']}.{new}{match['after']}" for new in places.get(int(match["index"]), ())]
