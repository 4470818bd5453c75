"""Put virtual tokens into a bound graph: a soft prompt before its embeddings, or a prefix into its empty cache.

    caller's      attention_mask [b, past + n]     position_ids [b, n]     input_ids [b, n]     past_key_values.*
    graph's       1 … 1 | mask                     0 … k-1 | ids + k       prompt | embeddings  prefix | cache

The caller speaks of real tokens only: k ones come before every mask, and positions count from k on. The prompt or the
prefix itself comes in where the cache is empty, so that generation goes on with the cache that the first pass returned.
An encoder has no cache: a prompt comes before every input, a prefix before the keys and values of every Attention node.
Logits are those of the real tokens.
The tensors stay in their safetensors file, and the initializers point into it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.errors import OnnxExportError
from composer.exporters.companions import PAST_KEY_VALUES, SOFT_PROMPT
from composer.exporters.onnx.architectures import Architecture
from composer.exporters.onnx.bind import FLOAT32, rename_inputs
from composer.exporters.onnx.session import PAST
from composer.exporters.vocabulary import embedding_scale
from composer.tensors import TensorSpec, read_header

if TYPE_CHECKING:
    import onnx

__all__ = ["insert_virtual_tokens"]

INT64, BOOL = 7, 9
POSITIONS = "position_embeddings.weight"
END = 2**62  # of a slice that goes on to the last
WHOLE = "text-classification"  # its output has no positions


def insert_virtual_tokens(
    model: onnx.ModelProto, folder: Path, config: dict[str, Any], architecture: Architecture
) -> None:
    """Add what soft_prompt.safetensors and past_key_values.safetensors in `folder` hold to `model`, which is changed.

    Raises OnnxExportError where the graph does not look up its embeddings in one place, or has no cache for a prefix.
    """
    for name, insert in ((SOFT_PROMPT, _Splice.prompt), (PAST_KEY_VALUES, _Splice.prefix)):
        if (folder / name).is_file():
            insert(_Splice(model.graph, folder / name, architecture), config)


class _Splice:
    """New nodes before those of a graph, and the names that its own nodes read in place of its inputs."""

    def __init__(self, graph: onnx.GraphProto, path: Path, architecture: Architecture) -> None:
        self.graph, self.path, self.architecture = graph, path, architecture
        self.tensors = read_header(path).tensors
        self.nodes: list[onnx.NodeProto] = []
        self.renamed: dict[str, str] = {}
        self.made = 0

    def prompt(self, config: dict[str, Any]) -> None:
        """Concatenate [virtual | real] wherever a pass has a position, and cut the virtual ones off its output."""
        spec = self.tensors["embeddings"]
        count, width = spec.shape
        look_up = self._look_up()
        batch, inserted = self._common(count)
        self._mask(batch, count)
        if "position_ids" in self.architecture.inputs:
            numbers = self._constant("positions", range(count), [1, count])
            before = self._repeated(numbers, inserted, [batch, inserted])
            moved = self._add("Add", ["position_ids", self._constant("count", [count])])
            self._rename("position_ids", self._add("Concat", [before, moved], axis=1))
        padding = config.get("pad_token_id")
        # What is looked up for these ids is cut off again. They are not the padding's: some models find positions by
        # comparing with that.
        for name, value in (("input_ids", 1 if padding == 0 else 0), ("token_type_ids", 0)):
            if name in self.architecture.inputs:
                before = self._repeated(self._constant(f"{name}_before", [value] * count, [1, count]), inserted,
                                        [batch, inserted])  # fmt: skip
                self._rename(name, self._add("Concat", [before, name], axis=1))
        vectors = self._external(spec, [1, count, width])
        if (scale := embedding_scale(config)) != 1.0:
            vectors = self._add("Div", [vectors, self._constant("scale", [scale], to=FLOAT32)])
        before = self._repeated(vectors, inserted, [batch, inserted, self._constant("width", [width])])
        own = list(self.graph.node)
        rename_inputs(own, self.renamed)
        found, looked_up, real = look_up.output[0], self._name("looked_up"), self._name("real")
        look_up.output[0] = looked_up
        cut = [looked_up, inserted, self._constant("end", [END]), self._constant("axis_1", [1])]
        put: list[onnx.NodeProto] = []
        self._add("Slice", cut, real, into=put)
        self._add("Concat", [before, real], found, axis=1, into=put)
        place = own.index(look_up) + 1
        after = [] if self.architecture.task == WHOLE else self._cut_output(own, inserted)
        self._finish([*own[:place], *put, *own[place:]], after)

    def prefix(self, config: dict[str, Any]) -> None:
        """Concatenate [prefix | cache] where the cache is empty, in every layer; or, in an encoder, [prefix | keys]."""
        del config
        if not self.architecture.is_causal:
            self._prefix_of_encoder()
            return
        caches = [item.name for item in self.graph.input if item.name.startswith(PAST)]
        specs = {f"{PAST}{name.removeprefix('layers.')}": spec for name, spec in self.tensors.items()}
        if set(caches) != set(specs):
            raise self._lost("no cache of as many layers: a prefix is keys and values in it")
        count = next(iter(specs.values())).shape[2]
        batch, inserted = self._common(count)
        self._mask(batch, count)
        if "position_ids" in self.architecture.inputs:
            self._rename("position_ids", self._add("Add", ["position_ids", self._constant("count", [count])]))
        for name in caches:
            _, heads, _, size = specs[name].shape
            sizes = [batch, self._constant("heads", [heads]), inserted, self._constant("size", [size])]
            before = self._repeated(self._external(specs[name], specs[name].shape), inserted, sizes, axis=2)
            self._rename(name, self._add("Concat", [before, name], axis=2))
        own = list(self.graph.node)
        rename_inputs(own, self.renamed)
        self._finish(own, [])

    def _prefix_of_encoder(self) -> None:
        own = list(self.graph.node)
        layers = [node for node in own if node.op_type == "Attention"]
        gathers = [node for node in own if node.op_type == "Gather"]
        places = [node for node in gathers if node.input[0].removesuffix(".float32").endswith(POSITIONS)]
        if 2 * len(layers) != len(self.tensors) or len(places) != 1:
            raise self._lost(f"{len(layers)} attention nodes and {len(places)} look-ups of positions")
        count = self.tensors["layers.0.key"].shape[2]
        batch, inserted = self._common(count)
        before: dict[str, list[onnx.NodeProto]] = {node.output[0]: [] for node in (*places, *layers)}
        moved = [places[0].input[1], self._constant("count", [count])]
        places[0].input[1] = self._add("Add", moved, into=before[places[0].output[0]])
        masks: dict[str, str] = {}
        for number, node in enumerate(layers):
            here = before[node.output[0]]
            for position, part in ((1, "key"), (2, "value")):
                spec = self.tensors[f"layers.{number}.{part}"]
                _, heads, _, size = spec.shape
                sizes = [batch, self._constant("heads", [heads]), inserted, self._constant("size", [size])]
                first = self._repeated(self._external(spec, spec.shape), inserted, sizes, axis=2)
                node.input[position] = self._add("Concat", [first, node.input[position]], axis=2, into=here)
            for mask in node.input[3:4]:
                if mask not in masks:
                    shape = self._add("Shape", [mask], start=0, end=3, into=here)
                    sizes = self._add("Concat", [shape, inserted], axis=0, into=here)
                    seen = self._constant("seen", [True], [1, 1, 1, 1], to=BOOL)
                    first = self._add("Expand", [seen, sizes], into=here)
                    masks[mask] = self._add("Concat", [first, mask], axis=3, into=here)
                node.input[3] = masks[mask]
        self._finish([item for node in own for item in (*before.get(node.output[0], ()), node)], [])

    def _look_up(self) -> onnx.NodeProto:
        """The node that gives [batch, length, width] of the ids."""
        ids = {"input_ids"}
        for node in self.graph.node:  # in the order of their use
            if node.op_type in ("Reshape", "Identity", "Cast") and node.input[0] in ids:
                ids.add(node.output[0])
        found = [node for node in self.graph.node if node.op_type == "Gather" and node.input[1] in ids]
        if len(found) != 1:
            raise self._lost(f"{len(found)} places where embeddings are looked up")
        return found[0]

    def _common(self, count: int) -> tuple[str, str]:
        """[batch], and how many virtual tokens this pass puts in: all where the cache is empty, else none."""
        batch = self._add("Shape", ["input_ids"], start=0, end=1)
        if not self.architecture.is_causal:
            return batch, self._constant("count", [count])
        past = self._add("Shape", [f"{PAST}0.key"], start=2, end=3)
        none = self._constant("none", [0])
        return batch, self._add("Where", [self._add("Equal", [past, none]), self._constant("count", [count]), none])

    def _mask(self, batch: str, count: int) -> None:
        ones = self._constant("ones", [1] * count, [1, count])
        shape = self._add("Concat", [batch, self._constant("count", [count])], axis=0)
        self._rename(
            "attention_mask", self._add("Concat", [self._add("Expand", [ones, shape]), "attention_mask"], axis=1)
        )

    def _repeated(self, values: str, count: str, shape: list[str], axis: int = 1) -> str:
        """The first `count` along `axis` of `values`, for every row of the batch."""
        none, where = self._constant("none", [0]), self._constant(f"axis_{axis}", [axis])
        first = self._add("Slice", [values, none, count, where])
        return self._add("Expand", [first, self._add("Concat", shape, axis=0)])

    def _cut_output(self, own: list[onnx.NodeProto], inserted: str) -> list[onnx.NodeProto]:
        """The node that gives the output without its virtual positions; its own producer gets another name."""
        name, whole = self.architecture.output, self._name("whole")
        for node in own:
            for position, output in enumerate(node.output):
                if output == name:
                    node.output[position] = whole
        rename_inputs(own, {name: whole})
        end = self._constant("end", [END])
        cut: list[onnx.NodeProto] = []
        self._add("Slice", [whole, inserted, end, self._constant("axis_1", [1])], name, into=cut)
        return cut

    def _finish(self, own: list[onnx.NodeProto], after: list[onnx.NodeProto]) -> None:
        """All nodes in order; shapes noted inside the graph no longer hold, those of the outputs' caches neither."""
        nodes = [*self.nodes, *own, *after]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        del self.graph.value_info[:]
        for output in self.graph.output:
            dims = output.type.tensor_type.shape.dim
            if output.name != self.architecture.output and len(dims) > 2:
                dims[2].dim_param = "cache_length"

    def _external(self, spec: TensorSpec, shape: Any) -> str:
        from onnx import TensorProto

        name = self._name(spec.name)
        initializer = TensorProto(name=name, data_type=FLOAT32, dims=shape, data_location=TensorProto.EXTERNAL)
        for field, value in (("location", self.path.name), ("offset", spec.offset), ("length", spec.nbytes)):
            initializer.external_data.add(key=field, value=str(value))
        self.graph.initializer.append(initializer)
        return name

    def _constant(self, name: str, values: Any, shape: list[int] | None = None, to: int = INT64) -> str:
        """An initializer; one name stands for one value."""
        from onnx import helper

        name, values = self._name(name), list(values)
        if all(initializer.name != name for initializer in self.graph.initializer):
            self.graph.initializer.append(helper.make_tensor(name, to, shape or [len(values)], values))
        return name

    def _rename(self, name: str, to: str) -> None:
        self.renamed[name] = to

    def _name(self, name: str) -> str:
        return f"virtual_tokens.{name}"

    def _add(
        self,
        op: str,
        inputs: list[str],
        output: str | None = None,
        *,
        into: list[onnx.NodeProto] | None = None,
        **attributes: object,
    ) -> str:
        """A node before the graph's own, or at the end of `into`; returns the name of its output."""
        from onnx import helper

        self.made += 1
        output = output or self._name(f"{op.lower()}_{self.made}")
        node = helper.make_node(op, inputs, [output], name=self._name(f"node_{self.made}"), **attributes)
        (self.nodes if into is None else into).append(node)
        return output

    def _lost(self, found: str) -> OnnxExportError:
        return OnnxExportError(
            f"onnx: {self.architecture.name}: the graph cannot take the virtual tokens of {self.path.name}: {found}",
            expected="one look-up of embeddings, or a cache of every layer",
            found=found,
            remedy="export bundle, which keeps them in a file for transformers",
        )
