"""Additions as files beside the weights: float32, one file a family, for what puts them in place at run time.

soft_prompt.safetensors        embeddings [k, d]                              the prompts one after the other
past_key_values.safetensors    layers.<i>.key, layers.<i>.value [1, h, k, D]  what transformers' DynamicCache holds
bottlenecks.safetensors        <i>.<module>.down.weight [r, d], …             and bottlenecks.json: composer.bottlenecks

docs/additions.md shows how transformers runs each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.additions import Addition, Prefix, SoftPrompt
from composer.bottlenecks import BUNDLE, TENSORS, Bottlenecks, bundle_json, stack_sites
from composer.deltas import read_array
from composer.peft_format import write_tensors
from composer.plan import Plan
from composer.sinks import FolderSink
from composer.tensors import encode_header

__all__ = ["COMPANIONS", "PAST_KEY_VALUES", "SOFT_PROMPT", "Companion", "companion_files", "write_companions"]

SOFT_PROMPT, PAST_KEY_VALUES = "soft_prompt.safetensors", "past_key_values.safetensors"

Layout = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Companion:
    """The file of one family: its name, and the names, shapes and values of its tensors, in one order."""

    file: str
    layout: Callable[[Sequence[Any]], Layout]
    tensors: Callable[[Sequence[Any]], Iterator[tuple[str, np.ndarray]]]


def _prompt_layout(prompts: Sequence[SoftPrompt]) -> Layout:
    return [("embeddings", (sum(prompt.tokens for prompt in prompts), prompts[0].width))]


def _prompt_tensors(prompts: Sequence[SoftPrompt]) -> Iterator[tuple[str, np.ndarray]]:
    yield "embeddings", np.concatenate([prompt.load() for prompt in prompts])


def _prefix_layout(prefixes: Sequence[Prefix]) -> Layout:
    (prefix,) = prefixes
    shape = (1, prefix.heads, prefix.tokens, prefix.head_size)
    return [(f"layers.{layer}.{part}", shape) for layer in range(prefix.layers) for part in ("key", "value")]


def _prefix_tensors(prefixes: Sequence[Prefix]) -> Iterator[tuple[str, np.ndarray]]:
    (prefix,) = prefixes
    for layer, pair in enumerate(prefix.load()):
        for part, values in zip(("key", "value"), pair, strict=True):
            yield f"layers.{layer}.{part}", values[None]


def _bottleneck_layout(additions: Sequence[Bottlenecks]) -> Layout:
    return [(name, spec.shape) for name, spec in stack_sites(additions)[1].items()]


def _bottleneck_tensors(additions: Sequence[Bottlenecks]) -> Iterator[tuple[str, np.ndarray]]:
    for addition in additions:
        addition.check_copies()
    for name, spec in stack_sites(additions)[1].items():
        yield name, read_array(spec)


COMPANIONS = {
    SoftPrompt.family: Companion(SOFT_PROMPT, _prompt_layout, _prompt_tensors),
    Prefix.family: Companion(PAST_KEY_VALUES, _prefix_layout, _prefix_tensors),
    Bottlenecks.family: Companion(TENSORS, _bottleneck_layout, _bottleneck_tensors),
}


def companion_files(plan: Plan) -> dict[str, int]:
    """The files that `write_companions` writes, and their sizes in bytes."""
    sizes = {}
    for family, additions in _by_family(plan).items():
        layout = [(name, "F32", shape) for name, shape in COMPANIONS[family].layout(additions)]
        numbers = sum(int(np.prod(shape)) for _, _, shape in layout)
        sizes[COMPANIONS[family].file] = len(encode_header(layout, {"format": "pt"})) + 4 * numbers
    return sizes


def write_companions(plan: Plan, sink: FolderSink) -> dict[str, str]:
    """Write the additions of a plan; returns the file of each family."""
    files = {}
    for family, additions in _by_family(plan).items():
        files[family] = COMPANIONS[family].file
        write_tensors(sink, files[family], COMPANIONS[family].tensors(additions))
        if family == Bottlenecks.family:
            labels = [plan.terms[item.term].label for item in plan.additions if item.addition.family == family]
            sink.write(BUNDLE, bundle_json(labels, stack_sites(additions)[0]))
    return files


def _by_family(plan: Plan) -> dict[str, list[Addition]]:
    found: dict[str, list[Addition]] = {}
    for item in plan.additions:
        found.setdefault(item.addition.family, []).append(item.addition)
    return found
