"""Adapters in one graph, one for each row of a batch: 0 is the base, 1 … n the adapters (S-LoRA, in plain ONNX).

    adapter_ids [batch] ─► the u that are present; for each its rows, m at most
    x [batch, s, in] ─► Gather ─► [u, m·s, in] ─► MatMul(·, A) ─► MatMul(·, B) ─► [u·m, s, out] ─► Gather ─► + base
                                    A = Gather(vectors of length in)  B = Gather(vectors of length out)

The rows of one adapter are brought together, so that its factors are gathered once however many rows it has, and
multiply them in one product; factors are gathered right where they are used, a module at a time, so that they are still
in the processor's cache. Nothing depends on how many adapters there are. `adapter_ids` may be left out: all rows are
then the base's. One number alone holds for all rows.
Source: arXiv:2311.03285 for the idea.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.exporters.onnx.adapted import ADAPTER_IDS
from composer.exporters.onnx.bind import FLOAT32
from composer.exporters.onnx.multi_index import Group, places_of
from composer.exporters.onnx.sites import place_nodes
from composer.exporters.onnx.vectors import index_spec, vectors_spec
from composer.tensors import TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["insert_rows", "strip_rows"]

PREFIX = "adapters/"
INT32, INT64 = 6, 7


def insert_rows(
    model: onnx.ModelProto, folder: Path, groups: Sequence[Group], adapters: int, counts: Mapping[int, int]
) -> None:
    """Add the nodes of all groups to `model`, which is changed; the files lie in `folder`.

    adapters: how many there are; counts: the rows of each length of vector.
    """
    _Builder(model.graph, folder, groups, adapters, counts).run()


def strip_rows(model: onnx.ModelProto) -> None:
    """Take out again what `insert_rows` put in: the graph of the base alone."""
    graph = model.graph
    own = [node for node in graph.node if not node.name.startswith(PREFIX)]
    sums = {node.input[0]: node.output[0] for node in graph.node if node.name.startswith(f"{PREFIX}sum/")}
    for node in own:
        if node.output and node.output[0] in sums:
            node.output[0] = sums[node.output[0]]
    initializers = [item for item in graph.initializer if not _is_own(item.name)]
    inputs = [item for item in graph.input if item.name != ADAPTER_IDS]
    for field, kept in ((graph.node, own), (graph.initializer, initializers), (graph.input, inputs)):
        copies = [type(item).FromString(item.SerializeToString()) for item in kept]
        del field[:]
        field.extend(copies)


def _is_own(name: str) -> bool:
    return name == ADAPTER_IDS or name.startswith(PREFIX)


class _Builder:
    """The nodes before a graph's own, and those behind its sites."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        folder: Path,
        groups: Sequence[Group],
        adapters: int,
        counts: Mapping[int, int],
    ) -> None:
        self.graph, self.folder, self.groups, self.adapters, self.counts = graph, folder, groups, adapters, counts
        self.before: list[onnx.NodeProto] = []
        self.after: dict[str, list[onnx.NodeProto]] = {}
        self.made: set[str] = set()

    def run(self) -> None:
        from onnx import helper

        graph = self.graph
        graph.input.append(helper.make_tensor_value_info(ADAPTER_IDS, INT64, ["adapter_rows"]))
        graph.initializer.append(helper.make_tensor(ADAPTER_IDS, INT64, [1], [0]))
        for width, rows in sorted(self.counts.items()):
            self._external(self._vectors(width), vectors_spec(self.folder, width, rows), FLOAT32)
        spec = index_spec(self.folder, self.adapters, places_of(self.groups)[1])
        self._external(f"{PREFIX}index", spec, INT32)
        self._segments()
        pieces = self._pieces()
        for group in self.groups:
            self._group(group, pieces)
        place_nodes(graph, [site for group in self.groups for site in group.sites], self.before, self.after)

    def _segments(self) -> None:
        """Which adapters are present [u], and where each row or token of a batch is among those of its adapter.

        there: what an adapter's m rows are taken from: the row [u, m] (pooled), the token of all rows [u, m·s] (flat)
        or row and token [u, m·s, 2] (tokens); an adapter of fewer rows takes the batch's first once more. back: where
        it is then found again: adapter and row [batch, 2], adapter and token [batch·s, 2] or [batch, s, 2].
        """
        before, zero, one = self.before, self._numbers("zero", [0]), self._numbers("one", [1])
        self._add(before, "Shape", ["input_ids"], "shape")
        batch = self._add(before, "Shape", ["input_ids"], "batch", start=0, end=1)
        length = self._add(before, "Shape", ["input_ids"], "length", start=1, end=2)
        ids = self._add(before, "Expand", [ADAPTER_IDS, batch], "ids")
        present, which, counts = (f"{PREFIX}{name}" for name in ("present", "which", "counts"))
        self._node(before, "Unique", [ids], [present, "", which, counts])
        most = self._add(before, "ReduceMax", [counts], "most", keepdims=1)
        column = self._add(before, "Unsqueeze", [which, one], "which_column")
        same = self._add(before, "Cast", [self._add(before, "Equal", [column, which], "same")], "ones", to=INT64)
        earlier = self._add(before, "Trilu", [same, self._scalar("below", -1)], "earlier", upper=0)
        within = self._add(before, "ReduceSum", [earlier, one], "within", keepdims=0)
        places = self._add(before, "Add", [self._add(before, "Mul", [which, most], "start"), within], "places")
        size = self._add(before, "Mul", [self._add(before, "Shape", [present], "count"), most], "size")
        empty = self._add(before, "Expand", [zero, size], "empty")
        rows = self._add(before, "ScatterElements", [empty, places, self._range(batch, "rows")], "segments", axis=0)
        tokens = self._range(length, "tokens")

        def by_token(name: str, row: str) -> str:
            """row · s + token, [rows, s]"""
            first = self._add(before, "Mul", [self._add(before, "Unsqueeze", [row, one], f"{name}_column"), length],
                              f"{name}_first")  # fmt: skip
            return self._add(before, "Add", [first, tokens], name)

        segment = self._add(before, "Concat", [f"{PREFIX}count", self._numbers("rest", [-1])], "segment", axis=0)
        self._add(before, "Reshape", [rows, segment], "there_pooled")
        self._pair(which, within, "back_pooled")
        flat = self._add(before, "Reshape", [by_token("there_by_token", rows), segment], "there_flat")
        row, token = (self._add(before, op, [flat, length], f"there_{op.lower()}") for op in ("Div", "Mod"))
        self._pair(row, token, "there_tokens")
        adapter = self._add(before, "Expand", [column, f"{PREFIX}shape"], "back_adapter")
        back = self._pair(adapter, by_token("back_token", within), "back_tokens")
        self._add(before, "Reshape", [back, self._numbers("pairs", [-1, 2])], "back_flat")

    def _range(self, end: str, name: str) -> str:
        """0 … end - 1"""
        limit = self._add(self.before, "Squeeze", [end], f"{name}_end")
        return self._add(self.before, "Range", [self._scalar("first", 0), limit, self._scalar("step", 1)], name)

    def _pair(self, one: str, other: str, name: str) -> str:
        """Two arrays as one with a last dimension of 2."""
        last = self._numbers("last", [-1])
        parts = [self._add(self.before, "Unsqueeze", [part, last], f"{name}_{number}")
                 for number, part in enumerate((one, other))]  # fmt: skip
        return self._add(self.before, "Concat", parts, name, axis=-1)

    def _pieces(self) -> list[str]:
        """The rows of each site's A and B, [u, rank], in the order of the index."""
        taken = self._add(self.before, "Gather", [f"{PREFIX}index", f"{PREFIX}present"], "taken", axis=0)
        ranks = [module.rank for group in self.groups for module in group.modules for _ in "AB"]
        pieces = [f"{PREFIX}rows_{number}" for number in range(len(ranks))]
        self._node(self.before, "Split", [taken, self._numbers("ranks", ranks)], pieces, axis=1)
        return pieces

    def _group(self, group: Group, pieces: list[str]) -> None:
        """The rows of one input by adapter, behind its first site; the products of each site behind that."""
        first = group.sites[0].module
        gather = "GatherND" if group.form == "tokens" else "Gather"
        x = self._add(
            self.after.setdefault(first, []), gather, [group.x, f"{PREFIX}there_{group.form}"], f"{first}.segments"
        )
        for site, module in zip(group.sites, group.modules, strict=True):
            name, into = site.module, self.after.setdefault(site.module, [])
            a = self._add(into, "Gather", [self._vectors(module.inputs), pieces.pop(0)], f"{name}.A", axis=0)
            turned = self._add(into, "Transpose", [a], f"{name}.A_turned", perm=[0, 2, 1])
            hidden = self._add(into, "MatMul", [x, turned], f"{name}.hidden")
            b = self._add(into, "Gather", [self._vectors(module.outputs), pieces.pop(0)], f"{name}.B", axis=0)
            change = self._add(into, "MatMul", [hidden, b], f"{name}.change")
            change = self._add(into, "GatherND", [change, f"{PREFIX}back_{group.form}"], f"{name}.in_order")
            self._node(into, "Add", [site.base_output, change], [site.node.output[0]], f"sum/{name}")

    def _vectors(self, width: int) -> str:
        return f"{PREFIX}vectors_{width}"

    def _external(self, name: str, spec: TensorSpec, kind: int) -> None:
        from onnx import TensorProto

        initializer = TensorProto(name=name, data_type=kind, dims=spec.shape, data_location=TensorProto.EXTERNAL)
        for field, value in (("location", spec.path.name), ("offset", spec.offset), ("length", spec.nbytes)):
            initializer.external_data.add(key=field, value=str(value))
        self.graph.initializer.append(initializer)

    def _numbers(self, name: str, values: Sequence[int]) -> str:
        """An int64 initializer [n]."""
        return self._constant(name, [len(values)], values)

    def _scalar(self, name: str, value: int) -> str:
        return self._constant(name, [], [value])

    def _constant(self, name: str, shape: Sequence[int], values: Sequence[int]) -> str:
        """One name stands for one value."""
        from onnx import helper

        if name not in self.made:
            self.made.add(name)
            self.graph.initializer.append(helper.make_tensor(f"{PREFIX}{name}", INT64, shape, values))
        return f"{PREFIX}{name}"

    def _add(self, into: list[onnx.NodeProto], op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """A node of one output, which is returned."""
        self.made.add(name)
        self._node(into, op, inputs, [f"{PREFIX}{name}"], **attributes)
        return f"{PREFIX}{name}"

    def _node(
        self,
        into: list[onnx.NodeProto],
        op: str,
        inputs: list[str],
        outputs: list[str],
        name: str | None = None,
        **attributes: Any,
    ) -> None:
        from onnx import helper

        named = f"{PREFIX}{name}" if name else f"{PREFIX}node/{outputs[0].removeprefix(PREFIX)}"
        into.append(helper.make_node(op, inputs, outputs, name=named, **attributes))
