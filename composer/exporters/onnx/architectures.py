"""Which models the ONNX exporter knows, and what their graphs take and give.

    causal LM   input_ids, attention_mask [, position_ids], past_key_values.N.key|value → logits, present.N.key|value
    encoder     input_ids, attention_mask [, token_type_ids]                            → last_hidden_state | logits
    seq2seq     two graphs of one row: see `seq2seq`

Adding a model is adding a row to `ARCHITECTURES`, once the tests cover it. Opset 23 has the fused operators (Attention,
RMSNormalization, RotaryEmbedding); a row says 20 where a fused operator rejects what the model feeds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from composer.errors import UnsupportedArchitectureError
from composer.exporters.onnx.experts import EXPERT_ACTIVATION

__all__ = ["ARCHITECTURES", "Architecture", "supported"]

Task = Literal[
    "text-generation", "feature-extraction", "text-classification", "token-classification", "text2text-generation"
]

# Both rescale the rotary frequencies by the length of the running sequence: control flow that a trace would freeze.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True, slots=True)
class Architecture:
    """One class of `transformers`: what it computes, and the graph made of it.

    inputs: the graph's int64 inputs without the KV cache, in order.
    output: the first output; `present.N.*` follow it for text generation.
    unused: the parts of the module that the output does not depend on; their weights are not in the graph.
    family: the row of composer.renames that says how checkpoints name what the module names otherwise; "" for none.
    experts: what checkpoints call the gate, up and down projection of an expert; empty for dense models.
    part: which of the two graphs of an encoder-decoder, once `seq2seq.parts` has split the row.
    own_head: the checkpoint stores an output head although the config ties it to the embedding.
    """

    name: str
    task: Task
    opset: int = 23
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    output: str = "logits"
    unused: tuple[str, ...] = ()
    family: str = ""
    experts: tuple[str, str, str] | tuple[()] = ()
    part: Literal["", "encoder", "decoder"] = ""
    own_head: bool = False

    @property
    def is_causal(self) -> bool:
        """True when the graph carries a KV cache and generates text."""
        return self.task == "text-generation"

    @property
    def generates(self) -> bool:
        """True when it writes text."""
        return self.is_causal or self.is_seq2seq

    @property
    def is_seq2seq(self) -> bool:
        """True for an encoder-decoder, which becomes two graphs."""
        return self.task == "text2text-generation"


def _causal(name: str, *, positions: bool = True, **options: Any) -> Architecture:
    """positions: False for a model that takes them from the attention mask alone."""
    inputs = ("input_ids", "attention_mask") + (("position_ids",) if positions else ())
    return Architecture(name, "text-generation", inputs=inputs, **options)


def _encoder(stem: str, *, token_types: bool, opset: int = 23) -> tuple[Architecture, ...]:
    inputs = ("input_ids", "attention_mask") + (("token_type_ids",) if token_types else ())
    return (
        Architecture(f"{stem}Model", "feature-extraction", opset, inputs, "last_hidden_state", ("pooler.",)),
        Architecture(f"{stem}ForSequenceClassification", "text-classification", opset, inputs),
        Architecture(f"{stem}ForTokenClassification", "token-classification", opset, inputs),
    )


def _seq2seq(stem: str) -> Architecture:
    return Architecture(f"{stem}ForConditionalGeneration", "text2text-generation")


GATED = ("gate_proj", "up_proj", "down_proj")


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _causal("BloomForCausalLM", positions=False),
        _causal("CohereForCausalLM"),
        _causal("GPT2LMHeadModel"),
        _causal("GPTNeoXForCausalLM", family="gpt_neox"),
        _causal("Gemma2ForCausalLM"),
        _causal("Gemma3ForCausalLM"),
        _causal("GemmaForCausalLM"),
        _causal("GraniteForCausalLM"),
        _causal("LlamaForCausalLM"),
        _causal("MistralForCausalLM"),
        _causal("MixtralForCausalLM", family="mixtral", experts=("w1", "w3", "w2")),
        _causal("OPTForCausalLM"),
        _causal("Olmo2ForCausalLM"),
        _causal("Phi3ForCausalLM"),
        _causal("PhiForCausalLM"),
        _causal("Qwen2ForCausalLM"),
        _causal("Qwen2MoeForCausalLM", experts=GATED),
        _causal("Qwen3ForCausalLM"),
        _causal("Qwen3MoeForCausalLM", experts=GATED),
        _causal("SmolLM3ForCausalLM"),
        _causal("StableLmForCausalLM"),
        _causal("Starcoder2ForCausalLM"),
        *_encoder("Bert", token_types=True),
        *_encoder("DebertaV2", token_types=False),
        *_encoder("DistilBert", token_types=False),
        *_encoder("ModernBert", token_types=False, opset=20),
        *_encoder("Roberta", token_types=False),
        *_encoder("XLMRoberta", token_types=False),
        _seq2seq("Bart"),
        _seq2seq("MBart"),
        _seq2seq("MT5"),
        _seq2seq("T5"),
        _seq2seq("UMT5"),
    )
}


def supported(config: dict[str, Any]) -> None:
    """Raise `UnsupportedArchitectureError` unless a model with this config.json can be exported; write nothing.

    config: the parsed config.json of a checkpoint folder.
    Refused: an architecture that is not in the table, remote code, quantised weights, rotary embeddings that depend on
    the length of the sequence, other decoders with cross-attention than those of the table, and experts with another
    activation than SiLU.
    """
    architecture_of(config)


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The row of `ARCHITECTURES` for this config.json, or the error that `supported` documents."""
    names = config.get("architectures") or []
    found = names[0] if len(names) == 1 else names
    known = sorted(ARCHITECTURES)

    def refuse(reason: str, remedy: str | None = None) -> UnsupportedArchitectureError:
        return UnsupportedArchitectureError(
            f"onnx: {found or 'a config without architectures'}: {reason}; supported: {', '.join(known)}",
            expected=known,
            found=found,
            remedy=remedy or "export safetensors instead",
            architecture=found,
        )

    if config.get("auto_map"):
        raise refuse("needs remote code (auto_map), which is never run")
    if not isinstance(found, str) or found not in ARCHITECTURES:
        raise refuse("config.json must name exactly one supported architecture")
    if config.get("quantization_config"):
        raise refuse("its weights are quantised", "compose from the unquantised base")
    seq2seq = ARCHITECTURES[found].is_seq2seq
    if bool(config.get("is_encoder_decoder", seq2seq)) != seq2seq or config.get("add_cross_attention"):
        raise refuse("its config has cross-attention where the architecture has none, or none where it has")
    if config.get("is_decoder") and not ARCHITECTURES[found].is_causal:
        raise refuse("an encoder configured as a decoder (is_decoder) is not exported")
    for kind in _rope_types(config):
        if kind in LENGTH_DEPENDENT_ROPE:
            raise refuse(f"rotary embedding of type {kind!r} depends on the length of the sequence")
    activation = config.get("hidden_act", EXPERT_ACTIVATION)
    if ARCHITECTURES[found].experts and activation != EXPERT_ACTIVATION:
        raise refuse(f"experts with the activation {activation!r} are not exported, only {EXPERT_ACTIVATION!r}")
    return ARCHITECTURES[found]


def _rope_types(config: dict[str, Any]) -> list[Any]:
    entries = [config[key] for key in ("rope_parameters", "rope_scaling") if isinstance(config.get(key), dict)]
    # Models with several kinds of attention layers nest one entry per kind.
    entries += [item for entry in entries for item in entry.values() if isinstance(item, dict)]
    return [entry.get("rope_type", entry.get("type")) for entry in entries]
