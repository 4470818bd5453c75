"""Trace a model into a graph without weights: once per configuration, whatever the weights and their dtype.

    config.json → module with zero-stride parameters → torch.onnx.export(dynamo) → optimise, weights protected by name
                → ModelProto in float32; every parameter is an initializer with external data that points nowhere yet

The parameters keep the module's own names and [out, in] layout, so that `bind` can point them into safetensors files.
What `bind` has to know besides is in the graph's metadata: which names are tied, the base model's prefix, and the rules
by which checkpoints of this family are renamed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.errors import OnnxExportError
from composer.exporters.onnx import seq2seq
from composer.exporters.onnx.architectures import Architecture
from composer.exporters.onnx.experts import translations
from composer.exporters.onnx.skeleton import quiet, weightless_module

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    import torch

__all__ = ["ALIASES", "FAMILY", "PREFIX", "UNUSED", "trace"]

ALIASES = "composer.aliases"
"""Metadata: JSON object, initializer → every name of that parameter in the module (tied ones have several)."""
PREFIX = "composer.base_model_prefix"
"""Metadata: the prefix that checkpoints of the bare base model leave out, such as ``bert`` or ``transformer``."""
FAMILY = "composer.family"
"""Metadata: the row of composer.renames whose checkpoints name parameters otherwise than the module; "" for none."""
UNUSED = "composer.unused"
"""Metadata: JSON list of the module's parameters that the output does not depend on."""


def trace(folder: Path, architecture: Architecture) -> onnx.ModelProto:
    """The graph of the model that `folder/config.json` describes: float32, dynamic batch and sequence, no weights.

    Reads no weights and allocates next to none (see `skeleton`).
    Raises OnnxExportError when the exporter fails or when a parameter did not survive as an initializer.
    """
    import onnx_ir as ir

    with quiet():
        try:
            module = weightless_module(folder, architecture)
            graph_model = _export(module, architecture)
        except Exception as error:
            raise OnnxExportError(
                f"onnx: tracing {architecture.name} failed: {type(error).__name__}: {error}",
                remedy="export safetensors instead, or report the configuration that failed",
                architecture=architecture.name,
            ) from error
        used = _used(graph_model)
        aliases = _aliases(module)
        _optimise(graph_model, {f"model.{name}" for names in aliases.values() for name in names})
        metadata = _name_parameters(graph_model, aliases, used, architecture)
        _strip(graph_model)
    metadata |= {PREFIX: getattr(module, "base_model_prefix", ""), FAMILY: architecture.family}
    graph_model.metadata_props.update(metadata)
    graph_model.producer_name = "composer"
    graph_model.graph.name = architecture.name
    return ir.serde.serialize_model(graph_model)


def _export(module: torch.nn.Module, architecture: Architecture) -> ir.Model:
    """Run the exporter on small example inputs; every name starts with ``model.``, the wrapper's attribute."""
    import torch

    if architecture.is_seq2seq:
        return _run(seq2seq.example(module, architecture), architecture)
    batch, length, past = 2, 3, 4
    tokens = {0: "batch_size", 1: "sequence_length"}
    kwargs: dict[str, Any] = {
        "input_ids": torch.ones(batch, length, dtype=torch.int64),
        "attention_mask": torch.ones(batch, length, dtype=torch.int64),
    }
    shapes: dict[str, Any] = {"input_ids": tokens, "attention_mask": tokens}
    output_names = [architecture.output]
    input_names = list(architecture.inputs)
    if architecture.is_causal:
        config = module.config
        layers = config.num_hidden_layers
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kwargs["attention_mask"] = torch.ones(batch, past + length, dtype=torch.int64)
        shapes["attention_mask"] = {0: "batch_size", 1: "total_sequence_length"}
        if "position_ids" in architecture.inputs:
            kwargs["position_ids"] = torch.arange(past, past + length)[None].expand(batch, length).clone()
            shapes["position_ids"] = tokens
        cache = {0: "batch_size", 2: "past_sequence_length"}
        kwargs["past_key_values"] = [
            (torch.zeros(batch, heads, past, head_dim), torch.zeros(batch, heads, past, head_dim))
            for _ in range(layers)
        ]
        shapes["past_key_values"] = [(cache, cache)] * layers
        names = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
        input_names += [f"past_key_values.{name}" for name in names]
        output_names += [f"present.{name}" for name in names]
    elif "token_type_ids" in architecture.inputs:
        kwargs["token_type_ids"] = torch.zeros(batch, length, dtype=torch.int64)
        shapes["token_type_ids"] = tokens
    wrapper = _wrap_causal(module, architecture) if architecture.is_causal else _wrap_encoder(module, architecture)
    return _run(seq2seq.Example(wrapper, kwargs, shapes, input_names, output_names), architecture)


def _run(example: seq2seq.Example, architecture: Architecture) -> ir.Model:
    import torch

    with torch.no_grad():
        program = torch.onnx.export(
            example.module.eval(),
            kwargs=example.kwargs,
            dynamic_shapes=example.shapes,
            input_names=example.input_names,
            output_names=example.output_names,
            dynamo=True,
            opset_version=architecture.opset,
            custom_translation_table=translations() if architecture.experts else None,
            optimize=False,
            verbose=False,
        )
    return program.model


def _wrap_causal(module: torch.nn.Module, architecture: Architecture) -> torch.nn.Module:
    import torch
    from transformers import DynamicCache

    class Causal(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any) -> Any:
            return self.step(past_key_values, input_ids=input_ids, attention_mask=attention_mask,
                             position_ids=position_ids)  # fmt: skip

        def step(self, past_key_values: Any, **inputs: Any) -> Any:
            cache = DynamicCache([(key, value) for key, value in past_key_values])
            out = self.model(**inputs, past_key_values=cache, use_cache=True)
            return (out.logits, *(part for layer in out.past_key_values.layers for part in (layer.keys, layer.values)))

    class CausalWithoutPositions(Causal):
        def forward(self, input_ids: Any, attention_mask: Any, past_key_values: Any) -> Any:
            return self.step(past_key_values, input_ids=input_ids, attention_mask=attention_mask)

    return Causal() if "position_ids" in architecture.inputs else CausalWithoutPositions()


def _wrap_encoder(module: torch.nn.Module, architecture: Architecture) -> torch.nn.Module:
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
            return out[architecture.output]

    class EncoderWithoutTypes(Encoder):
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[architecture.output]

    return Encoder() if "token_type_ids" in architecture.inputs else EncoderWithoutTypes()


def _aliases(module: torch.nn.Module) -> dict[str, list[str]]:
    """First name of each parameter → all its names, in the module's order."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in groups.values()}


def _used(model: ir.Model) -> set[str]:
    """Names of the initializers that reach an output of the graph as it was traced."""
    pending = [value for value in model.graph.outputs if value is not None]
    seen: set[int] = set()
    used: set[str] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if value.is_initializer():
            used.add(value.name)
        node = value.producer()
        if node is not None:
            pending += [item for item in node.inputs if item is not None]
            for attribute in node.attributes.values():
                if attribute.type.name == "GRAPH":
                    for inner in attribute.as_graph():
                        pending += [item for item in inner.inputs if item is not None]
    return used


def _optimise(model: ir.Model, protected: set[str]) -> None:
    """onnxscript's optimiser and the opset-23 fusions, never folding a parameter away."""
    from onnxscript import optimizer
    from onnxscript.rewriter import onnx_fusions

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in protected for value in node.inputs) else None

    optimizer.optimize_ir(model, input_size_limit=4096, output_size_limit=4096, should_fold=should_fold)
    onnx_fusions.fuse(model)


def _name_parameters(
    model: ir.Model, aliases: dict[str, list[str]], used: set[str], architecture: Architecture
) -> dict[str, str]:
    """Rename each parameter's initializer to its first name, drop its value, and return the graph's metadata."""
    import onnx_ir as ir

    graph = model.graph
    by_name = {f"model.{name}": names for names in aliases.values() for name in names}
    placed: dict[str, list[str]] = {}
    for traced_name, value in list(graph.initializers.items()):
        names = by_name.get(traced_name)
        if names is None:
            continue
        tensor = value.const_value
        graph.initializers.pop(traced_name)
        value.name = names[0]
        value.const_value = ir.ExternalTensor(
            "unbound", 0, tensor.nbytes, value.dtype, shape=ir.Shape(tensor.shape), name=names[0], base_dir=""
        )
        graph.initializers[names[0]] = value
        placed[names[0]] = names
    absent = {first: names for first, names in aliases.items() if first not in placed}
    lost = [
        first
        for first, names in absent.items()
        # Gone although the traced graph needed it: the optimiser merged or folded a weight.
        if any(f"model.{name}" in used for name in names) or not any(part in first for part in architecture.unused)
    ]
    if lost:
        raise OnnxExportError(
            f"onnx: {architecture.name}: {len(lost)} parameters are not in the traced graph: {', '.join(lost[:5])}",
            remedy="report the configuration; weights outside the graph could not be replaced",
            keys=lost,
        )
    unused = [name for names in absent.values() for name in names]
    return {ALIASES: json.dumps(placed), UNUSED: json.dumps(unused)}


def _strip(model: ir.Model) -> None:
    """Drop what the exporter notes about its own source lines: paths of this machine, and most of the file's size."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
