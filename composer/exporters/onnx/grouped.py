"""Let a bound graph attend by ONNX Runtime's GroupQueryAttention, the operator that onnxruntime-genai and CUDA want.

    portable   Concat(past, key) → repeated for every query head → Attention(query, …, mask)
    grouped    GroupQueryAttention(query, key, value, past …, lengths)    [b, n, heads · size], no mask, no repetition

Everything else stays: rotary embeddings, norms of heads, biases. The operator masks by the length of each row, so
padding goes on the right: a row's first tokens are the real ones, and its cache is filled from 0 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from composer.errors import OnnxExportError
from composer.exporters.onnx.architectures import Architecture
from composer.exporters.onnx.bind import rename_inputs
from composer.exporters.onnx.session import PADDING, PAST, PRESENT
from composer.exporters.onnx.variants import CONTRIBUTED, prune, use_contributed

if TYPE_CHECKING:
    import onnx

__all__ = ["attend_grouped"]

HEADS_FIRST = [0, 2, 1, 3]
INT32 = 6


@dataclass(frozen=True, slots=True)
class _Layer:
    """The attention of one layer: its node, and the new keys and values [b, heads, n, size], put to the cache."""

    number: int
    node: onnx.NodeProto
    key: str
    value: str


def attend_grouped(model: onnx.ModelProto, config: dict[str, Any], architecture: Architecture) -> None:
    """Replace the attention of every layer of `model`.

    config: config.json, for the windows of layers that see no further back.
    Raises OnnxExportError where a layer attends in another way.
    """
    _Surgery(model, config, architecture).run()


class _Surgery:
    """New nodes in place of the old ones; pruning takes away what only these needed."""

    def __init__(self, model: onnx.ModelProto, config: dict[str, Any], architecture: Architecture) -> None:
        self.model, self.graph, self.config, self.architecture = model, model.graph, config, architecture
        self.makers = {output: node for node in self.graph.node for output in node.output}
        self.before: list[onnx.NodeProto] = []
        self.made = 0

    def run(self) -> None:
        layers = self._layers()
        sizes = {item.name: item.type.tensor_type.shape.dim for item in self.graph.input}
        lengths, total = self._lengths()
        replaced: dict[str, list[onnx.NodeProto]] = {}
        renamed: dict[str, str] = {}
        for layer in layers:
            _, heads, _, size = sizes[f"{PAST}{layer.number}.key"]
            nodes, output = self._attention(layer, heads.dim_value, size.dim_value, lengths, total)
            replaced[layer.node.output[0]] = nodes
            renamed[layer.node.output[0]] = output
        dropped = {f"{PRESENT}{layer.number}.{part}" for layer in layers for part in ("key", "value")}
        own = [node for node in self.graph.node if node.output[0] not in dropped]
        nodes = [item for node in own for item in replaced.get(node.output[0], [node])]
        rename_inputs(nodes, renamed)
        del self.graph.node[:]
        self.graph.node.extend([*self.before, *nodes])
        use_contributed(self.model)
        self.model.metadata_props.add(key=PADDING, value="right")
        prune(self.graph)

    def _layers(self) -> list[_Layer]:
        """Every Attention, found by the cache that its keys come from."""
        found = []
        for node in self.graph.node:
            if node.op_type != "Attention":
                continue
            sources = [self._cache(node.input[position]) for position in (1, 2)]
            if None in sources or len(node.output) > 1:
                raise self._lost(f"an Attention whose keys come from no cache ({node.input[1]})")
            (key, value) = sources
            number = int(str(key).removeprefix(PRESENT).split(".")[0])
            news = [self._new(str(name)) for name in (key, value)]
            found.append(_Layer(number, node, *news))
        caches = sum(item.name.startswith(PAST) for item in self.graph.input)
        if len(found) * 2 != caches or len({layer.number for layer in found}) != len(found):
            raise self._lost(f"{len(found)} Attention nodes over {caches // 2} caches")
        return found

    def _cache(self, name: str) -> str | None:
        """The output of the graph that a key or value is a repetition of."""
        while not name.startswith(PRESENT):
            maker = self.makers.get(name)
            if maker is None or maker.op_type not in ("Reshape", "Expand", "Unsqueeze", "Identity", "Cast"):
                return None
            name = maker.input[0]
        return name

    def _new(self, present: str) -> str:
        maker = self.makers[present]
        if maker.op_type != "Concat" or len(maker.input) != 2 or not maker.input[0].startswith(PAST):
            raise self._lost(f"a cache that is not the old one and the new part ({present})")
        return str(maker.input[1])

    def _lengths(self) -> tuple[str, str]:
        """The place of each row's last token, int32 [batch], and the length of the longest, an int32 scalar."""
        mask = "attention_mask"
        real = self._add("ReduceSum", [mask, self._constant("tokens", [1], [1])], keepdims=0)
        last = self._add("Sub", [real, self._constant("one", [1], [1])])
        length = self._add("Squeeze", [self._add("Shape", [mask], start=1, end=2)])
        return self._add("Cast", [last], to=INT32), self._add("Cast", [length], to=INT32)

    def _attention(
        self, layer: _Layer, heads: int, size: int, lengths: str, total: str
    ) -> tuple[list[onnx.NodeProto], str]:
        """The nodes that take the place of an Attention, and what they give, [b, query heads, n, size]."""
        nodes: list[onnx.NodeProto] = []
        flat = [self._flat(name, nodes) for name in (layer.node.input[0], layer.key, layer.value)]
        groups = self._groups(layer, heads)
        attributes: dict[str, Any] = {"num_heads": heads * groups, "kv_num_heads": heads, "do_rotary": 0}
        for name in ("scale", "softcap"):
            value = self._attribute(layer.node, name)
            if value:
                attributes[name] = value
        if (window := self._window(layer.number)) is not None:
            attributes["local_window_size"] = window
        past = [f"{PAST}{layer.number}.{part}" for part in ("key", "value")]
        present = [name.replace(PAST, PRESENT, 1) for name in past]
        together = self._add(
            "GroupQueryAttention", [*flat, *past, lengths, total], into=nodes, more=present, domain=CONTRIBUTED,
            **attributes,
        )  # fmt: skip
        shape = self._constant(f"heads_{heads * groups}", [0, 0, heads * groups, size], [4])
        apart = self._add("Reshape", [together, shape], into=nodes)
        return nodes, self._add("Transpose", [apart], into=nodes, perm=HEADS_FIRST)

    def _groups(self, layer: _Layer, heads: int) -> int:
        """How many query heads share one of keys."""
        queries = self.config.get("num_attention_heads") or self.config.get("n_head") or heads
        return int(queries) // heads

    def _window(self, number: int) -> int | None:
        """How many tokens, its own among them, a layer sees; None for all before it."""
        window = self.config.get("sliding_window")
        kinds = self.config.get("layer_types")
        if not isinstance(window, int) or self.config.get("use_sliding_window") is False:
            return None
        if isinstance(kinds, list) and kinds[number] != "sliding_attention":
            return None
        return window

    def _flat(self, name: str, nodes: list[onnx.NodeProto]) -> str:
        """[b, heads, n, size] as [b, n, heads · size]; a transposition that made it so is gone round."""
        maker = self.makers.get(name)
        together = self._constant("together", [0, 0, -1], [3])
        if maker is not None and maker.op_type == "RotaryEmbedding" and len(maker.input) == 3:
            inner = self.makers.get(maker.input[0])
            heads = self._attribute(maker, "num_heads")
            if heads and inner is not None and self._moves_heads(inner):
                flat = self._add("Reshape", [inner.input[0], together], into=nodes)
                kept = {item: self._attribute(maker, item) for item in ("interleaved", "rotary_embedding_dim")}
                kept = {item: value for item, value in kept.items() if value is not None}
                return self._add("RotaryEmbedding", [flat, *maker.input[1:]], into=nodes, num_heads=heads, **kept)
        if maker is not None and self._moves_heads(maker):
            return self._add("Reshape", [maker.input[0], together], into=nodes)
        moved = self._add("Transpose", [name], into=nodes, perm=HEADS_FIRST)
        return self._add("Reshape", [moved, together], into=nodes)

    def _moves_heads(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Transpose" and self._attribute(node, "perm") == HEADS_FIRST

    @staticmethod
    def _attribute(node: onnx.NodeProto, name: str) -> Any:
        from onnx import helper

        return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), None)

    def _add(
        self,
        op: str,
        inputs: list[str],
        *,
        into: list[onnx.NodeProto] | None = None,
        more: list[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """A node before all others, or at the end of `into`; returns the name of its first output."""
        from onnx import helper

        self.made += 1
        output = f"grouped.{op.lower()}_{self.made}"
        node = helper.make_node(op, inputs, [output, *(more or ())], name=f"{output}.node", domain=domain, **attributes)
        (self.before if into is None else into).append(node)
        return output

    def _constant(self, name: str, values: list[int], shape: list[int]) -> str:
        """An int64 initializer; one name stands for one value."""
        from onnx import TensorProto, helper

        name = f"grouped.{name}"
        if all(initializer.name != name for initializer in self.graph.initializer):
            self.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, shape, values))
        return name

    def _lost(self, found: str) -> OnnxExportError:
        return OnnxExportError(
            f"onnx: {self.architecture.name} does not attend as GroupQueryAttention does: {found}",
            expected="one Attention over each cache",
            found=found,
            remedy="export the portable flavour",
        )
