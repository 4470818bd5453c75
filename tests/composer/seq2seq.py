"""Tiny random encoder-decoders of the T5 and BART families, and a batch of two rows of different lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

T5 = {
    "vocab_size": 160,
    "d_model": 32,
    "d_kv": 4,
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 160,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", T5),
    "flan-t5": ("T5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("Bart", BART),
    "mt5": ("MT5", {**T5, "feed_forward_proj": "gated-gelu"}),
    "umt5": ("UMT5", {**T5, "feed_forward_proj": "gated-gelu"}),
    "mbart": ("MBart", {**BART, "decoder_start_token_id": 3, "scale_embedding": True}),
}
SCORES = ("q", "k", "q_proj", "k_proj")  # smaller: a sharp softmax makes much of float32's rounding
IDS = np.array([[5, 9, 11, 33, 7, 150], [21, 22, 23, 24, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def tiny_names() -> dict[str, str]:
    """Architecture → the name under which `build` knows a tiny model of it."""
    return {f"{stem}ForConditionalGeneration": name for name, (stem, _) in MODELS.items()}


def build(name: str) -> Any:
    """A tiny random model; weights that all differ from what a fresh model has, biases included."""
    stem, options = MODELS[name]
    model = getattr(transformers, f"{stem}ForConditionalGeneration")(getattr(transformers, f"{stem}Config")(**options))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.no_grad():
            for key, value in (*model.named_parameters(), *model.named_buffers()):
                mean = float("norm" in key and key.endswith("weight"))
                small = value.ndim == 1 or "shared" in key or "embed" in key or key == "final_logits_bias"
                spread = 0.1 if small else 0.2 if key.split(".")[-2] in SCORES else 0.3
                value.copy_(torch.randn(value.shape) * spread + mean)
            if name in ("flan-t5", "mt5", "umt5"):
                model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape) * 0.3)
    return model.eval()
