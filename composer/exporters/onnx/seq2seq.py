"""The two graphs of an encoder-decoder, and the examples that they are traced with.

    encoder_model.onnx              input_ids, attention_mask [b, source]
                                      → last_hidden_state, present.N.encoder.key|value [b, heads, source, size]
    decoder_with_past_model.onnx    encoder_attention_mask [b, source], input_ids [b, n],
                                    past_key_values.N.decoder.key|value [b, heads, past, size],
                                    past_key_values.N.encoder.key|value [b, heads, source, size]
                                      → logits [b, n, vocabulary], present.N.decoder.key|value

The encoder's graph ends with the keys and values of every cross-attention, which stay the same through a generation. So
the decoder needs no hidden states, and one graph without a branch serves the first step, whose cache is empty, and all
others. Files and names are optimum's, whose decoder of this name takes and gives the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from composer.exporters.onnx.architectures import Architecture

if TYPE_CHECKING:
    import torch

__all__ = ["DECODER_FILE", "ENCODER_FILE", "Example", "example", "parts"]

ENCODER_FILE, DECODER_FILE = "encoder_model.onnx", "decoder_with_past_model.onnx"
PAIR = ("key", "value")


@dataclass(frozen=True, slots=True)
class Family:
    """Where models of one build keep what the two graphs need.

    attention: the cross-attention of layer {}; key, value: its projections, whose weights are the encoder graph's.
    layers, heads: the config's names for the number of the decoder's layers and heads.
    """

    attention: str
    key: str
    value: str
    layers: str
    heads: str


T5 = Family("decoder.block.{}.layer.1.EncDecAttention", "k", "v", "num_decoder_layers", "num_heads")
BART = Family("model.decoder.layers.{}.encoder_attn", "k_proj", "v_proj", "decoder_layers", "decoder_attention_heads")
FAMILIES = {"T5": T5, "MT5": T5, "UMT5": T5, "Bart": BART, "MBart": BART}


@dataclass(frozen=True, slots=True)
class Example:
    """What a trace starts from: a module, arguments, their free axes, and the names of the graph."""

    module: torch.nn.Module
    kwargs: dict[str, Any]
    shapes: dict[str, Any]
    input_names: list[str]
    output_names: list[str]


def parts(architecture: Architecture) -> dict[str, Architecture]:
    """The graphs of an encoder-decoder, by the name of their file; `unused` is what the other one holds."""
    family = _family(architecture)
    encoder = replace(
        architecture, part="encoder", output="last_hidden_state", unused=("decoder.", "lm_head.", "final_logits_bias")
    )
    stem = family.attention.rpartition(".")[2]
    decoder = replace(
        architecture,
        part="decoder",
        inputs=("encoder_attention_mask", "input_ids"),
        unused=("encoder.", f"{stem}.{family.key}.", f"{stem}.{family.value}."),
    )
    return {ENCODER_FILE: encoder, DECODER_FILE: decoder}


def example(module: torch.nn.Module, architecture: Architecture) -> Example:
    """The example of `architecture.part`; every parameter's name starts with ``model.``, the wrapper's attribute."""
    family = _family(architecture)
    return _encoder(module, family) if architecture.part == "encoder" else _decoder(module, family)


def _family(architecture: Architecture) -> Family:
    return FAMILIES[architecture.name.removesuffix("ForConditionalGeneration")]


def _encoder(module: torch.nn.Module, family: Family) -> Example:
    import torch

    layers, heads = (getattr(module.config, name) for name in (family.layers, family.heads))

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            encoder = self.model.get_encoder()
            hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            found = [hidden]
            for layer in range(layers):
                attention = self.model.get_submodule(family.attention.format(layer))
                for name in (family.key, family.value):
                    projected = getattr(attention, name)(hidden)
                    found.append(projected.view(*hidden.shape[:2], heads, -1).transpose(1, 2))
            return tuple(found)

    tokens = {0: "batch_size", 1: "encoder_sequence_length"}
    names = ["input_ids", "attention_mask"]
    return Example(
        Encoder(),
        {name: torch.ones(2, 5, dtype=torch.int64) for name in names},
        dict.fromkeys(names, tokens),
        names,
        ["last_hidden_state", *(f"present.{layer}.encoder.{part}" for layer in range(layers) for part in PAIR)],
    )


def _decoder(module: torch.nn.Module, family: Family) -> Example:
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    layers, heads = (getattr(module.config, name) for name in (family.layers, family.heads))
    attention = module.get_submodule(family.attention.format(0))
    size = getattr(attention, family.key).out_features // heads
    batch, source, past, length = 2, 5, 4, 3

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, encoder_attention_mask: Any, input_ids: Any, past_key_values: Any) -> Any:
            key = past_key_values[0][2]
            # Only its shape is read: a layer whose cross-attention is in the cache does not project again.
            hidden = key.new_zeros(key.shape[0], key.shape[2], self.model.config.d_model)
            out = self.model(
                encoder_outputs=(hidden,),
                attention_mask=encoder_attention_mask,
                decoder_input_ids=input_ids,
                past_key_values=EncoderDecoderCache(
                    DynamicCache([item[:2] for item in past_key_values]),
                    DynamicCache([item[2:] for item in past_key_values]),
                ),
                use_cache=True,
            )
            own = out.past_key_values.self_attention_cache.layers
            return (out.logits, *(part for layer in own for part in (layer.keys, layer.values)))

    def cache(length: int) -> torch.Tensor:
        return torch.zeros(batch, heads, length, size)

    grows = {0: "batch_size", 2: "past_decoder_sequence_length"}
    stays = {0: "batch_size", 2: "encoder_sequence_length"}
    names = [f"{layer}.{side}.{part}" for layer in range(layers) for side in ("decoder", "encoder") for part in PAIR]
    return Example(
        Decoder(),
        {
            "encoder_attention_mask": torch.ones(batch, source, dtype=torch.int64),
            "input_ids": torch.ones(batch, length, dtype=torch.int64),
            # Tensors of their own: the exporter takes one that stands in two places for one input.
            "past_key_values": [(cache(past), cache(past), cache(source), cache(source)) for _ in range(layers)],
        },
        {
            "encoder_attention_mask": {0: "batch_size", 1: "encoder_sequence_length"},
            "input_ids": {0: "batch_size", 1: "decoder_sequence_length"},
            "past_key_values": [(grows, grows, stays, stays)] * layers,
        },
        ["encoder_attention_mask", "input_ids", *(f"past_key_values.{name}" for name in names)],
        ["logits", *(f"present.{name}" for name in names if ".decoder." in name)],
    )
