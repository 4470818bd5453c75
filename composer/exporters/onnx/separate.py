"""Adapters as files beside one graph, which a session activates: ONNX Runtime's own hot swap.

    x ─┬─► MatMul(·, module.weight) ──────────────────────────► base_output ─┬─► Add ─► y
       └─► MatMul(·, module.lora_A) ─► MatMul(·, module.lora_B) ─────────────┘

lora_A [in, r] and lora_B [r, out] are inputs that need not be given: their defaults have a rank of 0, which adds zero.
`<name>.onnx_adapter` holds what one adapter gives for them (onnxruntime's AdapterFormat), of any rank, for any of the
modules. `activate` runs it; onnxruntime-genai reads the same files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from composer.exporters.onnx.bind import FLOAT32
from composer.exporters.onnx.session import require_runtime
from composer.exporters.onnx.sites import find_sites, place_nodes

if TYPE_CHECKING:
    import onnx

__all__ = ["ADAPTER_SUFFIX", "insert_adapter_inputs", "write_adapter"]

ADAPTER_SUFFIX = ".onnx_adapter"
VERSION = 1  # of an adapter and of its model, which ONNX Runtime stores and leaves to its callers


def insert_adapter_inputs(model: onnx.ModelProto, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Add the optional inputs of each module, given as its weight's name → (in, out); `model` is changed.

    Raises OnnxExportError where the graph has no place for one.
    """
    from onnx import helper

    graph = model.graph
    sites = find_sites(graph, sizes)
    after = {}
    for site in sites:
        rows, columns = sizes[f"{site.module}.weight"]
        a, b = f"{site.module}.lora_A", f"{site.module}.lora_B"
        for name, shape, empty in (
            (a, (rows, f"{site.module}.rank"), (rows, 0)),
            (b, (f"{site.module}.rank", columns), (0, columns)),
        ):
            graph.input.append(helper.make_tensor_value_info(name, FLOAT32, shape))
            graph.initializer.append(helper.make_tensor(name, FLOAT32, empty, b"", raw=True))
        hidden, change = f"{site.module}.lora_hidden", f"{site.module}.lora_change"
        after[site.module] = [
            helper.make_node("MatMul", [site.x, a], [hidden], name=hidden),
            helper.make_node("MatMul", [hidden, b], [change], name=change),
            helper.make_node("Add", [site.base_output, change], [site.node.output[0]], name=f"{change}.add"),
        ]
    place_nodes(graph, sites, (), after)


def write_adapter(path: Path, factors: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """One adapter's file: weight's name → A [in, r] and B [r, out], float32 and C-contiguous."""
    runtime = require_runtime()
    # The OrtValues refer to the arrays, so `factors` has to outlive export_adapter; else it writes garbage.
    values = {
        f"{target.removesuffix('.weight')}.lora_{side}": runtime.OrtValue.ortvalue_from_numpy(array)
        for target, pair in sorted(factors.items())
        for side, array in zip("AB", pair, strict=True)
    }
    file = runtime.AdapterFormat()
    file.set_adapter_version(VERSION)
    file.set_model_version(VERSION)
    file.set_parameters(values)
    file.export_adapter(str(path))
