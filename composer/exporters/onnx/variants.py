"""What may be made of one traced graph: the operators it attends with, the dtype it computes in, quantised matrices.

    traced once, float32 ─► bound ─► additions ─► half ─► grouped ─► quantise ─► written aside, verified, published
                                                compute   flavour    quantise

Every step changes the bound graph in milliseconds (quantising takes seconds), so one cached graph serves all variants.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from composer.errors import UnsupportedArchitectureError
from composer.exporters.onnx.architectures import Architecture

if TYPE_CHECKING:
    import onnx

__all__ = ["GROUPED", "ONNX_DTYPES", "Variant", "check_variant", "prune", "use_contributed"]

ONNX_DTYPES = {"float32": 1, "float16": 10, "bfloat16": 16}
CONTRIBUTED = "com.microsoft"
GROUPED = frozenset(
    {
        "CohereForCausalLM",
        "GPT2LMHeadModel",
        "GPTNeoXForCausalLM",
        "Gemma3ForCausalLM",
        "GemmaForCausalLM",
        "GraniteForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "OPTForCausalLM",
        "Olmo2ForCausalLM",
        "Phi3ForCausalLM",
        "PhiForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "SmolLM3ForCausalLM",
        "StableLmForCausalLM",
        "Starcoder2ForCausalLM",
    }
)
"""Attention of these is causal, over all or over a window, and nothing else; each is tested with onnxruntime-genai."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One of them.

    flavour: ``portable`` has standard operators alone; ``genai`` attends by GroupQueryAttention and is what
        onnxruntime-genai reads.
    compute: the dtype of arithmetic and of the KV cache; ids, masks and logits are int64 and float32 in all.
    quantise: None, ``int8`` or ``int4``: the weights of matrix products.
    min_agreement: the share of positions at which a variant that rounds must choose the token that torch chooses.
    """

    flavour: str = "portable"
    compute: str = "float32"
    quantise: str | None = None
    min_agreement: float = 0.5

    @property
    def rounds(self) -> bool:
        """Whether it computes something else than float32 does, on purpose."""
        return self.compute != "float32" or self.quantise is not None

    @property
    def is_plain(self) -> bool:
        """Whether it is the bound graph as it is."""
        return self.flavour == "portable" and not self.rounds

    @property
    def on_cpu(self) -> Variant:
        """This variant in a dtype that the CPU multiplies in."""
        return replace(self, compute="float16") if self.compute == "bfloat16" else self


def check_variant(architecture: Architecture, variant: Variant) -> None:
    """Raise UnsupportedArchitectureError for a model of which this variant cannot be made."""
    if architecture.is_seq2seq and not variant.is_plain:
        raise UnsupportedArchitectureError(
            f"onnx: {architecture.name}: an encoder-decoder has two graphs, which are portable and compute in float32",
            expected="the portable flavour in float32",
            found=variant.quantise or variant.flavour if variant.compute == "float32" else variant.compute,
            remedy="leave the flavour, the dtype of arithmetic and quantising out",
            architecture=architecture.name,
        )
    if variant.flavour == "genai" and architecture.name not in GROUPED:
        raise UnsupportedArchitectureError(
            f"onnx: {architecture.name} is not exported for onnxruntime-genai; supported: {', '.join(sorted(GROUPED))}",
            expected=sorted(GROUPED),
            found=architecture.name,
            remedy="export the portable flavour",
            architecture=architecture.name,
        )


def use_contributed(model: onnx.ModelProto) -> None:
    """Declare ONNX Runtime's own operators."""
    from onnx import helper

    if all(entry.domain != CONTRIBUTED for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIBUTED, 1))


def prune(graph: onnx.GraphProto) -> None:
    """Drop nodes that no output depends on, initializers that nothing reads, and what was noted of lost values."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(node.input)
            for attribute in node.attribute:
                needed.update(name for inner in attribute.g.node for name in inner.input)
    nodes = list(reversed(kept))
    initializers = [initializer for initializer in graph.initializer if initializer.name in needed]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    del graph.value_info[:]
