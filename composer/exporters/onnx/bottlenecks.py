"""Put bottleneck adapters into a bound graph: a few nodes where each sublayer's output meets the residual stream.

    MatMul(…, module.weight) ─► [Add bias] ─► [Reshape] ─► h ─────────► Add(h, x) ─► [LayerNormalization] ─►
                                                           h ─► … ─► h' ──┘                 v ───────────►  not closed

The equations are those of composer.bottlenecks. The tensors stay in bottlenecks.safetensors: each becomes an
initializer that points into that file, stored as it is and computed with in float32, as the weights are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from composer.bottlenecks import BUNDLE, EPSILON, TENSORS, Network, Site, read_sites
from composer.errors import OnnxExportError
from composer.exporters.onnx.bind import FLOAT32, STORED
from composer.tensors import TensorSpec, read_header

if TYPE_CHECKING:
    import onnx

__all__ = ["insert_bottlenecks"]

WEIGHT_OPS = ("MatMul", "Gemm")


def insert_bottlenecks(model: onnx.ModelProto, folder: Path, *, half: bool = False) -> int:
    """Add the networks of the folder's bundle to `model`, which is changed. Returns how many were added.

    half: `model` is one of the two graphs of an encoder-decoder, and takes the sites of the modules that it has.
    Raises OnnxExportError where the graph does not have a site as the equations need it, or a tensor is left over;
    CorruptFileError for a bundle that cannot be read.
    """
    sites = read_sites(folder / BUNDLE)
    tensors = dict(read_header(folder / TENSORS).tensors)
    if half:
        held = {initializer.name for initializer in model.graph.initializer}
        others = [site for site in sites if f"{site.module}.weight" not in held]
        sites = [site for site in sites if site not in others]
        prefixes = tuple(f"{network.weights}." for site in others for network in site.networks)
        tensors = {name: spec for name, spec in tensors.items() if not name.startswith(prefixes)}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in set(node.input):
            readers[name].append(node)
    before: dict[str, list[onnx.NodeProto]] = {}
    for site in sites:
        splice = _Splice(model.graph, readers, site, tensors)
        before[splice.run()] = splice.nodes
    if tensors:
        raise OnnxExportError(
            f"onnx: no site uses {len(tensors)} tensors of {TENSORS}, such as {min(tensors)}", keys=sorted(tensors)
        )
    nodes = [item for node in model.graph.node for item in (*before.get(node.output[0], ()), node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return sum(len(site.networks) for site in sites)


class _Splice:
    """One site: where it is in the graph, and the nodes that go there."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        readers: Mapping[str, list[onnx.NodeProto]],
        site: Site,
        tensors: dict[str, TensorSpec],
    ) -> None:
        self.graph, self.readers, self.site, self.left = graph, readers, site, tensors
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> str:
        """Make the nodes, and read them in place of what they change. Returns the output of the node they precede."""
        add, h, x = self._meeting()
        norm = self._norm(add)
        v = self._flow(h, x, norm)
        if norm is None or self.site.networks[-1].closes:
            for position, name in enumerate(add.input):
                if name == h:
                    add.input[position] = v
        else:
            output = norm.output[0]
            norm.output[0] = f"{output}.unused"
            self._add("Identity", [v], output)
        return str(add.output[0])

    def _meeting(self) -> tuple[onnx.NodeProto, str, str]:
        """The node Add(h, x) after the site's linear layer, and the names of h and x."""
        value = f"{self.site.module}.weight"
        while True:
            node = self._reader(value)
            value = node.output[0]
            if node.op_type in WEIGHT_OPS:
                break
            if node.op_type not in ("Transpose", "Cast"):
                raise self._lost(f"{node.op_type} of the weight")
        while True:
            node = self._reader(value)
            own = self._is_bias(node)
            if node.op_type == "Add" and not own:
                other = [name for name in node.input if name != value]
                if len(other) != 1:
                    raise self._lost("an addition to itself")
                return node, value, other[0]
            if node.op_type != "Reshape" and not own:
                raise self._lost(f"{node.op_type} after the linear layer")
            value = node.output[0]

    def _reader(self, name: str) -> onnx.NodeProto:
        """The only node that reads `name`."""
        found = self.readers.get(name, [])
        if len(found) != 1:
            raise self._lost(f"{len(found)} readers of {name}")
        return found[0]

    def _is_bias(self, node: onnx.NodeProto) -> bool:
        bias = f"{self.site.module}.bias"
        return node.op_type == "Add" and bool({bias, f"{bias}.float32"} & set(node.input))

    def _norm(self, add: onnx.NodeProto) -> onnx.NodeProto | None:
        if self.site.norm is None:
            return None
        weights = {f"{self.site.norm}.{name}{cast}" for name in ("weight", "gamma") for cast in ("", ".float32")}
        for node in self.readers[add.output[0]]:
            if node.op_type == "LayerNormalization" and node.input[1] in weights:
                return node
        raise self._lost(f"no LayerNormalization of {self.site.norm}")

    def _lost(self, found: str) -> OnnxExportError:
        return OnnxExportError(
            f"onnx: {self.site.module}: the graph has no place for a bottleneck: {found}",
            expected="the layer's output, added to the residual stream",
            found=found,
            remedy="export safetensors: the bottlenecks run there by hooks",
            keys=[self.site.module],
        )

    def _flow(self, h: str, x: str, norm: onnx.NodeProto | None) -> str:
        """What stands in place of h (or of the norm's output). Without a norm the value is v + k·x, k kept apart."""
        v, k = h, 0
        for network in self.site.networks:
            value = self._plus(v, k, x)
            z = {"output": value, "stream": x, "sum": ""}[network.reads] or self._sum(value, x, norm)
            placed = self._place(network)
            u, r, times = self._change(network, placed, z), v, k
            if network.keeps == "sum":
                r = self._add("Add", [v, x])
            elif network.keeps == "read" and network.reads == "sum":
                r, times = (z, 0) if norm is not None else (v, k + 1)
            if network.residual_inside and "norm_after.weight" in placed:
                v, k = self._layer_norm(placed, "norm_after", self._add("Add", [u, self._plus(r, times, x)])), 0
            else:
                v, k = self._add("Add", [self._layer_norm(placed, "norm_after", u), r]), times
        if norm is None:
            k += int(self.site.networks[-1].closes) - 1
        return self._plus(v, k, x)

    def _plus(self, v: str, k: int, x: str) -> str:
        """v + k·x"""
        for _ in range(abs(k)):
            v = self._add("Add" if k > 0 else "Sub", [v, x])
        return v

    def _sum(self, value: str, x: str, norm: onnx.NodeProto | None) -> str:
        total = self._add("Add", [value, x])
        if norm is None:
            return total
        epsilon = next((attribute.f for attribute in norm.attribute if attribute.name == "epsilon"), EPSILON)
        return self._add("LayerNormalization", [total, *norm.input[1:]], epsilon=epsilon, axis=-1)

    def _change(self, network: Network, placed: dict[str, str], z: str) -> str:
        """scaling · up(activation(down(norm_before(z))))"""
        z = self._layer_norm(placed, "norm_before", z)
        z = self._activation(network.activation, self._linear(placed, "down", z))
        u = self._linear(placed, "up", z)
        if network.scaling != 1.0:
            u = self._add("Mul", [u, self._constant(network.scaling)])
        return self._add("Mul", [u, placed["scaling"]]) if "scaling" in placed else u

    def _place(self, network: Network) -> dict[str, str]:
        """Initializers for a network's tensors: each part to its name in float32."""
        from onnx import TensorProto

        prefix = f"{network.weights}."
        placed: dict[str, str] = {}
        for name in sorted(name for name in self.left if name.startswith(prefix)):
            spec = self.left.pop(name)
            initializer = TensorProto(name=name, data_type=STORED[spec.dtype], dims=spec.shape)
            initializer.data_location = TensorProto.EXTERNAL
            for field, value in (("location", TENSORS), ("offset", spec.offset), ("length", spec.nbytes)):
                initializer.external_data.add(key=field, value=str(value))
            self.graph.initializer.append(initializer)
            cast = [] if spec.dtype == "F32" else [self._add("Cast", [name], f"{name}.float32", to=FLOAT32)]
            placed[name.removeprefix(prefix)] = [name, *cast][-1]
        return placed

    def _linear(self, placed: dict[str, str], part: str, z: str) -> str:
        turned = self._add("Transpose", [placed[f"{part}.weight"]], perm=[1, 0])
        return self._add("Add", [self._add("MatMul", [z, turned]), placed[f"{part}.bias"]])

    def _layer_norm(self, placed: dict[str, str], part: str, value: str) -> str:
        if f"{part}.weight" not in placed:
            return value
        inputs = [value, placed[f"{part}.weight"], placed[f"{part}.bias"]]
        return self._add("LayerNormalization", inputs, epsilon=EPSILON, axis=-1)

    def _activation(self, name: str, z: str) -> str:
        plain = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "linear": "Identity"}
        if name in plain:
            return self._add(plain[name], [z])
        special: dict[str, Callable[[], str]] = {
            "gelu": lambda: self._add("Gelu", [z]),
            "gelu_new": lambda: self._add("Gelu", [z], approximate="tanh"),
            "leakyrelu": lambda: self._add("LeakyRelu", [z], alpha=0.01),
            "silu": lambda: self._add("Mul", [z, self._add("Sigmoid", [z])]),
        }
        return special["silu" if name == "swish" else name]()

    def _constant(self, value: float) -> str:
        from onnx import helper

        name = f"{self.site.module}.constant_{len(self.nodes)}"
        self.graph.initializer.append(helper.make_tensor(name, FLOAT32, [], [value]))
        return name

    def _add(self, op: str, inputs: list[str], output: str | None = None, **attributes: object) -> str:
        """Append a node; returns the name of its output."""
        from onnx import helper

        output = output or f"{self.site.module}.bottleneck_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output
