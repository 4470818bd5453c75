"""Where a bound graph multiplies with a weight: the places that an adapter's factors are added at.

    module.weight ─► [Cast] ─► [Transpose] ─► MatMul(x, ·) or Gemm(x, ·, bias) ─► y

A site's own output gets another name, and what is added to it gets the old one, so that no reader changes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from composer.errors import OnnxExportError

if TYPE_CHECKING:
    import onnx

__all__ = ["Form", "Site", "find_sites", "place_nodes"]

Form = Literal["tokens", "flat", "pooled"]
LINEAR = ("MatMul", "Gemm", "FusedMatMul")
FLAT = 2  # dimensions


@dataclass(frozen=True, slots=True)
class Site:
    """The product of one weight: `module` is its name without ``.weight``.

    x: the name of its input, whose shape is [batch, tokens, in] ("tokens"), [batch · tokens, in] ("flat") or
    [batch, in] ("pooled").
    """

    module: str
    node: onnx.NodeProto
    x: str
    form: Form

    @property
    def base_output(self) -> str:
        """The name that the product without an adapter gets."""
        return f"{self.module}.base_output"


def find_sites(graph: onnx.GraphProto, targets: Iterable[str]) -> list[Site]:
    """The site of each weight in `targets`, in the graph's order.

    Raises OnnxExportError where a weight is not read by one linear operator alone.
    """
    readers: dict[str, list[tuple[int, onnx.NodeProto]]] = defaultdict(list)
    for place, node in enumerate(graph.node):
        for name in dict.fromkeys(node.input):
            readers[name].append((place, node))
    shapes = {item.name: _shape(item) for item in (*graph.value_info, *graph.input, *graph.output)}
    found = [_find(target, readers, shapes) for target in targets]
    return [site for _, site in sorted(found, key=lambda item: item[0])]


def _shape(item: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in item.type.tensor_type.shape.dim)


def _find(
    target: str,
    readers: dict[str, list[tuple[int, onnx.NodeProto]]],
    shapes: dict[str, tuple[int | str, ...]],
) -> tuple[int, Site]:
    value = target
    while True:
        found = readers.get(value, [])
        operators = ", ".join(node.op_type for _, node in found) or "nothing"
        if len(found) != 1 or (found[0][1].op_type not in LINEAR and found[0][1].op_type not in ("Cast", "Transpose")):
            raise OnnxExportError(
                f"onnx: {target}: an adapter cannot be added beside it: the graph reads it by {operators}",
                expected="one linear layer",
                found=operators,
                remedy="merge the adapter: leave --separate and --multi out",
                keys=[target],
            )
        place, node = found[0]
        if node.op_type in LINEAR and node.input[1] == value:
            shape = shapes.get(node.output[0], ())
            form: Form = "flat" if node.op_type == "Gemm" or len(shape) == FLAT else "tokens"
            if form == "flat" and shape[:1] == shapes["input_ids"][:1]:
                form = "pooled"
            return place, Site(target.removesuffix(".weight"), node, node.input[0], form)
        value = node.output[0]


def place_nodes(
    graph: onnx.GraphProto,
    sites: Iterable[Site],
    before: Iterable[onnx.NodeProto],
    after: dict[str, list[onnx.NodeProto]],
) -> None:
    """Put `before` in front of all nodes, and what `after` has for a site's module behind the site."""
    behind = {}
    for site in sites:
        site.node.output[0] = site.base_output
        behind[site.base_output] = after[site.module]
    nodes = list(before)
    for node in graph.node:
        nodes.append(node)
        nodes += behind.get(node.output[0], ()) if node.output else ()
    del graph.node[:]
    graph.node.extend(nodes)
