"""Quantise the matrices of a bound graph by ONNX Runtime's own block quantiser, into a data file of their own.

    MatMul(x, Transpose(weight))  →  MatMulNBits(x, packed, scales, zero points)     blocks of 32 along the input
    model.onnx.data                  packed, scales and zero points of one matrix after the other, aligned to 4096

int4 keeps the head in int8: its rows choose the token. Embeddings, norms and biases stay in their safetensors files.
One matrix is read, quantised and written at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from composer.errors import OnnxExportError
from composer.exporters.onnx.variants import CONTRIBUTED, ONNX_DTYPES, Variant, prune, use_contributed
from composer.tensors import DTYPES

if TYPE_CHECKING:
    import onnx

__all__ = ["BITS", "DATA_FILE", "quantise"]

DATA_FILE = "model.onnx.data"
BITS = {"int8": 8, "int4": 4}
BLOCK = 32
ALIGNMENT = 4096
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level at which the CPU multiplies in int8
STORED = {1: "F32", 10: "F16", 16: "BF16"}
IDENTICAL = ("Cast", "Identity")


@dataclass(frozen=True, slots=True)
class _Product:
    """A product x · W: the node, the initializer of W, and whether it is stored [out, in]."""

    node: onnx.NodeProto
    weight: onnx.TensorProto
    transposed: bool


def quantise(model: onnx.ModelProto, folder: Path, variant: Variant, file: IO[bytes], location: str) -> int:
    """Replace every product with a weight of `model`; the data go to `file`, which is `location` in `folder`.

    variant: its `quantise` is what the matrices become, its `compute` what the products are in.
    Returns how many matrices were quantised. Raises OnnxExportError where there are none.
    """
    products = _products(model.graph)
    if not products:
        raise OnnxExportError(
            "onnx: the graph has no product with a matrix, so there is nothing to quantise",
            expected="MatMul or Gemm with a weight",
            found="none",
            remedy="leave the quantisation out",
        )
    replaced: dict[str, list[onnx.NodeProto]] = {}
    done: dict[tuple[str, bool, int], list[str]] = {}
    bits = BITS[variant.quantise or "int8"]
    for product in products:
        width = 8 if product.node.output[0] in _logits(model.graph) else bits
        key = (product.weight.name, product.transposed, width)
        if key not in done:
            done[key] = _write(model.graph, product, width, variant.compute, folder, file, location)
        replaced[product.node.output[0]] = _nodes(product, width, done[key])
    nodes = [item for node in model.graph.node for item in replaced.get(node.output[0], [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    use_contributed(model)
    prune(model.graph)
    return len(done)


def _logits(graph: onnx.GraphProto) -> set[str]:
    """The values that become the first output by way of Casts, sums and scalings."""
    reached = {graph.output[0].name}
    for node in reversed(graph.node):
        if node.output[0] in reached and node.op_type in ("Cast", "Add", "Mul", "Div", "Tanh"):
            reached.update(node.input)
    return reached


def _products(graph: onnx.GraphProto) -> list[_Product]:
    from onnx import TensorProto

    makers = {node.output[0]: node for node in graph.node}
    weights = {item.name: item for item in graph.initializer if item.data_location == TensorProto.EXTERNAL}
    found = []
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm") or not _plain(node):
            continue
        name, transposed = node.input[1], _attribute(node, "transB", 0) == 1
        while name in makers:
            maker = makers[name]
            if maker.op_type == "Transpose" and list(_attribute(maker, "perm", [1, 0])) == [1, 0]:
                transposed = not transposed
            elif maker.op_type not in IDENTICAL:
                break
            name = maker.input[0]
        if name in weights and len(weights[name].dims) == 2:
            found.append(_Product(node, weights[name], transposed))
    return found


def _plain(node: onnx.NodeProto) -> bool:
    return all(
        _attribute(node, name, default) == default for name, default in (("alpha", 1), ("beta", 1), ("transA", 0))
    )


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def _write(
    graph: onnx.GraphProto, product: _Product, bits: int, compute: str, folder: Path, file: IO[bytes], location: str
) -> list[str]:
    """Quantise one matrix, append it to the file and name its parts in the graph."""
    from onnx import TensorProto
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    matrix = _read(product.weight, folder)
    matrix = np.ascontiguousarray(matrix.T if product.transposed else matrix, np.float32)
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, bits=bits)
    packed, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
    names, number = [], ONNX_DTYPES[compute]
    for part, array, kind in (
        ("packed", packed, TensorProto.UINT8),
        ("scales", scales.astype(DTYPES[STORED[number]]), number),
        ("zeros", zeros, TensorProto.UINT8),
    ):
        offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
        file.write(bytes(offset - file.tell()))
        file.write(np.ascontiguousarray(array).view(np.uint8).data)
        name = f"{product.weight.name}.int{bits}.{part}"
        initializer = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        for field, value in (("location", location), ("offset", offset), ("length", array.nbytes)):
            initializer.external_data.add(key=field, value=str(value))
        graph.initializer.append(initializer)
        names.append(name)
    return names


def _read(weight: onnx.TensorProto, folder: Path) -> np.ndarray:
    where = {entry.key: entry.value for entry in weight.external_data}
    dtype = DTYPES[STORED[weight.data_type]]
    count = int(np.prod(weight.dims))
    values = np.fromfile(folder / where["location"], dtype, count, offset=int(where["offset"]))
    return values.reshape(tuple(weight.dims)).astype(np.float32)


def _nodes(product: _Product, bits: int, names: list[str]) -> list[onnx.NodeProto]:
    from onnx import helper

    node = product.node
    rows, columns = product.weight.dims if product.transposed else reversed(product.weight.dims)
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else None
    output = f"{node.output[0]}.product" if bias else node.output[0]
    nodes = [
        helper.make_node(
            "MatMulNBits",
            [node.input[0], *names],
            [output],
            name=f"{node.output[0]}.matmul",
            domain=CONTRIBUTED,
            K=columns,
            N=rows,
            bits=bits,
            block_size=BLOCK,
            accuracy_level=INT8_ACTIVATIONS,
        )
    ]
    if bias:
        nodes.append(helper.make_node("Add", [output, bias], [node.output[0]], name=f"{node.output[0]}.bias"))
    return nodes
