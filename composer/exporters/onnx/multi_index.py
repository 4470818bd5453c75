"""Which adapter takes which vectors where in a graph: what the index says, and what the graph's metadata notes.

groups      the modules that any adapter changes, by the input that they read, in the graph's order
places      for each group the ranks of all its A, then of all its B: the columns of the index
metadata    names, modules with their sizes and ranks, how many vectors there are: what adding an adapter takes
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import numpy as np

from composer.errors import OnnxExportError
from composer.exporters.onnx.adapted import METADATA, note_adapters
from composer.exporters.onnx.sites import Form, Site, find_sites
from composer.exporters.onnx.vectors import Block
from composer.recipe import Placement

if TYPE_CHECKING:
    import onnx

__all__ = ["Group", "Module", "arrange", "make_index", "note_rows", "noted_rows", "places_of", "read_index"]


@dataclass(frozen=True, slots=True)
class Module:
    """A weight that adapters change: its sizes, and the largest rank that any of them has there."""

    inputs: int
    outputs: int
    rank: int


@dataclass(frozen=True, slots=True)
class Group:
    """Sites that read one input, with their modules."""

    x: str
    form: Form
    sites: tuple[Site, ...]
    modules: tuple[Module, ...]


def arrange(graph: onnx.GraphProto, modules: Mapping[str, Module]) -> list[Group]:
    """The modules (weight's name → sizes) by the input that they read, in the graph's order.

    Raises OnnxExportError where the graph has no place for one.
    """
    found: dict[tuple[str, Form], list[Site]] = {}
    for site in find_sites(graph, modules):
        found.setdefault((site.x, site.form), []).append(site)
    return [
        Group(x, form, tuple(sites), tuple(modules[f"{site.module}.weight"] for site in sites))
        for (x, form), sites in found.items()
    ]


def places_of(groups: Sequence[Group]) -> tuple[dict[tuple[str, str], slice], int]:
    """Where in the index the places of each weight's A and B are, and how many there are in all."""
    places: dict[tuple[str, str], slice] = {}
    end = 0
    for group in groups:
        for site, module in zip(group.sites, group.modules, strict=True):
            for side in "AB":
                places[f"{site.module}.weight", side] = slice(end, end + module.rank)
                end += module.rank
    return places, end


def make_index(groups: Sequence[Group], adapters: Sequence[Mapping[str, Block]]) -> np.ndarray:
    """int32 [1 + adapters, places]: the rows that each adapter (weight's name → block) takes; the base takes row 0."""
    places, end = places_of(groups)
    index = np.zeros((1 + len(adapters), end), np.int32)
    for row, blocks in zip(index[1:], adapters, strict=True):
        for target, block in blocks.items():
            for side, first in (("A", block.a), ("B", block.b)):
                row[places[target, side]][: block.rank] = np.arange(first, first + block.rank)
    return index


def read_index(groups: Sequence[Group], index: np.ndarray) -> list[dict[str, Block]]:
    """The blocks of each adapter: what `make_index` was given."""
    places, _ = places_of(groups)
    adapters = []
    for row in index[1:]:
        blocks = {}
        for target in {target for target, _ in places}:
            a, b = row[places[target, "A"]], row[places[target, "B"]]
            if rank := int(np.count_nonzero(a)):
                blocks[target] = Block(rank, int(a[0]), int(b[0]))
        adapters.append(blocks)
    return adapters


def note_rows(
    model: onnx.ModelProto, names: Sequence[str], modules: Mapping[str, Module], counts: Mapping[int, int]
) -> None:
    """Write into the metadata what `noted_rows` reads: what it takes to add another adapter."""
    fields = {
        "placement": Placement.MULTI.value,
        "adapters": [{"name": name} for name in names],
        "modules": {name: astuple(module) for name, module in sorted(modules.items())},
        "vectors": {str(width): rows for width, rows in sorted(counts.items())},
    }
    note_adapters(model, fields)


def noted_rows(model: onnx.ModelProto) -> tuple[list[str], dict[str, Module], dict[int, int]]:
    """The adapters' names, the modules and the rows of each length of vector.

    Raises OnnxExportError for a graph that holds no adapters in this way.
    """
    noted = next((entry.value for entry in model.metadata_props if entry.key == METADATA), "{}")
    fields = json.loads(noted)
    if fields.get("placement") != Placement.MULTI:
        raise OnnxExportError(
            "this graph holds no adapters that could be added to",
            expected="a graph that was composed with --multi",
            found=fields.get("placement", Placement.MERGED.value),
            remedy="compose it with --multi",
        )
    modules = {name: Module(*sizes) for name, sizes in fields["modules"].items()}
    names = [entry["name"] for entry in fields["adapters"]]
    return names, modules, {int(width): rows for width, rows in fields["vectors"].items()}
