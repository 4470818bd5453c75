"""Let a bound float32 graph compute in float16 or bfloat16, as the model does in transformers when loaded so.

    weights, cache     half            stored in that dtype: read in place; else Cast
    positions, masks   float32, int64  what no weight and no cache reaches stays as it is
    mean squares, …    float32         the operators of `EXACT`, between two Casts
    logits             float32         as in every variant

What is left half is what transformers computes in the model's dtype; where it widens (norms, rotary frequencies,
routers), so does this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from composer.errors import OnnxExportError
from composer.exporters.onnx.bind import FLOAT32, rename_inputs
from composer.exporters.onnx.session import PAST, PRESENT
from composer.exporters.onnx.variants import ONNX_DTYPES, prune

if TYPE_CHECKING:
    import onnx

__all__ = ["compute_in"]

# Squares overflow float16 and sums of many lose its digits; a router's ranks change with them.
EXACT = frozenset(
    {"Cos", "CumSum", "Exp", "Log", "Pow", "Reciprocal", "ReduceMean", "ReduceSum", "ScatterElements", "ScatterND"}
    | {"Sin", "Softmax", "Sqrt", "TopK"}
)
LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}


def compute_in(model: onnx.ModelProto, dtype: str) -> None:
    """Change `model`, whose weights are bound, so that it computes in `dtype`, ``float16`` or ``bfloat16``.

    Raises OnnxExportError for a graph with graphs inside it, whose values cannot be followed.
    """
    _Narrowing(model, dtype).run()


class _Narrowing:
    """Walks the nodes in order and knows of every float value whether it is half now."""

    def __init__(self, model: onnx.ModelProto, dtype: str) -> None:
        import onnx

        self.graph, self.dtype, self.number = model.graph, dtype, ONNX_DTYPES[dtype]
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.types |= {initializer.name: initializer.data_type for initializer in self.graph.initializer}
        self.half: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.casts: dict[tuple[str, int], str] = {}

    def run(self) -> None:
        for node in self.graph.node:
            if any(attribute.g.node for attribute in node.attribute):
                raise OnnxExportError(
                    f"onnx: {node.op_type} holds a graph of its own, which cannot be made to compute in {self.dtype}",
                    expected="a graph without control flow",
                    found=node.op_type,
                    remedy="compute in float32",
                )
        renamed = self._weights()
        own = list(self.graph.node)
        rename_inputs(own, renamed)
        for item in self.graph.input:
            if item.name.startswith(PAST):
                item.type.tensor_type.elem_type = self.number
                self.half.add(item.name)
        for node in own:
            self._convert(node)
        self._outputs()
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        prune(self.graph)

    def _weights(self) -> dict[str, str]:
        """Casts of weights go to half; returns the readers' new names of weights that need none, or a Cast now."""
        from onnx import TensorProto

        renamed = {}
        for initializer in self.graph.initializer:
            if initializer.data_location != TensorProto.EXTERNAL:
                self._clamp(initializer)
            elif initializer.data_type == self.number:
                renamed[f"{initializer.name}.float32"] = initializer.name
                self.half.add(initializer.name)
            elif initializer.data_type == FLOAT32:
                renamed[initializer.name] = self._cast(initializer.name, self.number)
        return renamed

    def _clamp(self, tensor: onnx.TensorProto) -> None:
        """Bring finite constants, such as those that mask, into the range of the dtype."""
        import numpy as np
        from onnx import numpy_helper

        if tensor.data_type != FLOAT32:
            return
        values = numpy_helper.to_array(tensor)
        largest = LARGEST[self.dtype]
        outside = np.isfinite(values) & (np.abs(values) > largest)
        if outside.any():
            clamped = np.where(outside, np.sign(values) * np.float32(largest), values).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(clamped, tensor.name))

    def _convert(self, node: onnx.NodeProto) -> None:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                self._clamp(attribute.t)
        if node.op_type == "Cast":
            (to,) = (attribute for attribute in node.attribute if attribute.name == "to")
            if to.i == FLOAT32 and (node.input[0] in self.half or node.name == f"{node.input[0]}.cast"):
                to.i = self.number
                self.half.add(node.output[0])
            self.nodes.append(node)
            return
        narrow = node.op_type not in EXACT and any(name in self.half for name in node.input)
        for position, name in enumerate(node.input):
            if name in self.half and not narrow:
                node.input[position] = self._cast(name, FLOAT32)
            elif narrow and name not in self.half and self.types.get(name) == FLOAT32:
                node.input[position] = self._cast(name, self.number)
        if narrow:
            self.half.update(name for name in node.output if self.types.get(name, FLOAT32) == FLOAT32)
        self.nodes.append(node)

    def _outputs(self) -> None:
        """The cache is what the graph computes in, the first output float32."""
        for output in self.graph.output:
            if output.name not in self.half:
                continue
            if output.name.startswith(PRESENT):
                output.type.tensor_type.elem_type = self.number
                continue
            inner = f"{output.name}.half"
            for node in self.nodes:
                for position, name in enumerate(node.output):
                    if name == output.name:
                        node.output[position] = inner
            rename_inputs(self.nodes, {output.name: inner})
            self._cast(inner, FLOAT32, output.name)

    def _cast(self, name: str, to: int, output: str | None = None) -> str:
        """The value in another dtype; one Cast serves all its readers."""
        from onnx import helper

        if (name, to) not in self.casts:
            output = output or f"{name}.to_{'half' if to == self.number else 'float32'}"
            self.nodes.append(helper.make_node("Cast", [name], [output], name=output, to=to))
            self.casts[name, to] = output
            if to == self.number:
                self.half.add(output)
        return self.casts[name, to]
