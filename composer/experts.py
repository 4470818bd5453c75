"""Experts of a mixture: one parameter of three dimensions in the module, one matrix an expert in many checkpoints.

    module        …mlp.experts.gate_up_proj [E, 2i, d]       …mlp.experts.down_proj [E, d, i]
    checkpoint    …mlp.experts.0.gate_proj.weight [i, d]     …mlp.experts.0.down_proj.weight [d, i]
                  …mlp.experts.0.up_proj.weight [i, d]       …
    Mixtral       …experts.0.w1.weight, w3 (gate, up)        …experts.0.w2.weight

Source: transformers 5, conversion_mapping.py, whose modules stack what checkpoints store apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ExpertStack", "expert_stacks"]

EXPERT = re.compile(r"(?P<module>.+\.experts)\.(?P<index>\d+)\.(?P<part>\w+)\.weight")
# The parameter of the module, and what its rows are called in checkpoints
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("down_proj", ("down_proj",)),
    ("down_proj", ("w2",)),
    ("up_proj", ("up_proj",)),  # experts without a gate
)


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """The stored matrices that a stacked parameter is made of.

    names: [expert][part], in the parameter's order; rows: of each part; columns: of all.
    """

    names: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...]
    columns: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[experts, rows, columns] of the stacked parameter."""
        return len(self.names), sum(self.rows), self.columns


def expert_stacks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ExpertStack]:
    """The stacked parameters that the modules of a checkpoint have, by name; none where experts differ in size."""
    found: dict[str, dict[str, dict[int, str]]] = {}
    for name in shapes:
        if ".experts." in name and (match := EXPERT.fullmatch(name)):
            found.setdefault(match["module"], {}).setdefault(match["part"], {})[int(match["index"])] = name
    stacks: dict[str, ExpertStack] = {}
    for module, parts in found.items():
        for parameter, wanted in PARTS:
            name = f"{module}.{parameter}"
            gated = parameter == "up_proj" and "gate_proj" in parts
            if not gated and name not in shapes and set(wanted) <= set(parts):
                stack = _stack([parts[part] for part in wanted], shapes)
                if stack is not None:
                    stacks[name] = stack
    return stacks


def _stack(parts: list[dict[int, str]], shapes: Mapping[str, tuple[int, ...]]) -> ExpertStack | None:
    count = len(parts[0])
    if any(set(part) != set(range(count)) for part in parts):
        return None
    sizes = [{shapes[name] for name in part.values()} for part in parts]
    if any(len(size) != 1 or len(next(iter(size))) != 2 for size in sizes):
        return None
    rows, columns = zip(*(next(iter(size)) for size in sizes), strict=True)
    names = tuple(tuple(part[index] for part in parts) for index in range(count))
    return ExpertStack(names, rows, columns[0]) if len(set(columns)) == 1 else None
