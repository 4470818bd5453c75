"""The config.json of a GGUF file's model: built from the metadata where none lies beside it, and rope_freqs.weight.

    llama.block_count, llama.attention.head_count …  ─►  num_hidden_layers, num_attention_heads …
    rope_freqs.weight                                ─►  rope_scaling of Llama 3.1 and later

rope_freqs.weight holds what each rotary frequency is divided by. transformers computes it from rope_scaling, so it is
no weight there: it is taken where it is what a config says (or, without one, what the settings of Llama 3 give for some
factor), and refused elsewhere. Sources: convert_hf_to_gguf.py's set_gguf_parameters and generate_extra_tensors of
llama.cpp; modeling_rope_utils.py of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from composer.errors import CorruptFileError, UnsupportedQuantisationError
from composer.gguf import GgufSpec
from composer.tensors import TensorSpec

__all__ = ["ROPE_FREQUENCIES", "build_config", "check_rope_frequencies"]

ROPE_FREQUENCIES = "rope_freqs.weight"
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
REQUIRED = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
HEAD_SIZES = {"llama": "rope.dimension_count", "qwen3": "attention.key_length"}
TOKENS = ("bos_token_id", "eos_token_id")
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
DEFAULT_THETA = 10000.0
TOLERANCE = 1e-4  # llama.cpp's are float32


def build_config(metadata: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """config.json as save_pretrained would write it. tensors: of the file's header.

    Raises UnsupportedQuantisationError for an architecture or a rotary scaling that is not read, CorruptFileError when
    the metadata lacks a field.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in CLASSES:
        raise UnsupportedQuantisationError(
            f"gguf: no config.json lies beside it, and none is built for the architecture {architecture!r}",
            expected=sorted(CLASSES),
            found=architecture,
            remedy="put the config.json of the model that was converted beside the .gguf",
        )
    missing = [f"{architecture}.{key}" for key in REQUIRED if f"{architecture}.{key}" not in metadata]
    embedding = tensors.get("token_embd.weight")
    if missing or not isinstance(embedding, GgufSpec):
        missing = missing or ["token_embd.weight"]
        raise CorruptFileError(
            f"the GGUF file lacks {missing[0]}, and no config.json lies beside it",
            expected=[*(f"{architecture}.{key}" for key in REQUIRED), "token_embd.weight"],
            found=missing,
            remedy="put the config.json of the model that was converted beside the .gguf",
        )
    config: dict[str, Any] = {"architectures": [CLASSES[architecture]], "model_type": architecture}
    config |= {field: _plain(metadata[f"{architecture}.{key}"]) for key, field in REQUIRED.items()}
    config["num_key_value_heads"] = metadata.get(
        f"{architecture}.attention.head_count_kv", config["num_attention_heads"]
    )
    config["vocab_size"] = embedding.logical[0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["rope_theta"] = _plain(metadata.get(f"{architecture}.rope.freq_base", DEFAULT_THETA))
    if (size := metadata.get(f"{architecture}.{HEAD_SIZES.get(architecture)}")) is not None:
        config["head_dim"] = size
    if architecture != "qwen2" and "blk.0.attn_q.bias" in tensors:
        config["attention_bias"] = True
    config |= {key: metadata[f"tokenizer.ggml.{key}"] for key in TOKENS if f"tokenizer.ggml.{key}" in metadata}
    if scaling := _scaling(metadata, architecture, tensors, config):
        config["rope_scaling"] = scaling
    return config


def _plain(value: Any) -> Any:
    """A float32 of the metadata as the shortest decimal that is it: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _scaling(
    metadata: Mapping[str, Any], architecture: str, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = _plain(metadata.get(f"{architecture}.rope.scaling.factor", 1.0))
    original = metadata.get(f"{architecture}.rope.scaling.original_context_length")
    if ROPE_FREQUENCIES in tensors:
        factor = float(f"{tensors[ROPE_FREQUENCIES].read().max():.5g}")  # computed in float32 there
        return None if factor == 1.0 else {"rope_type": "llama3", "factor": factor, **LLAMA3}
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and original is not None:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UnsupportedQuantisationError(
        f"gguf: no config.json lies beside it, and its rotary scaling {kind!r} is not known",
        expected=["linear", "none", "yarn"],
        found=kind,
        remedy="put the config.json of the model that was converted beside the .gguf",
    )


def check_rope_frequencies(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> None:
    """Raise CorruptFileError unless rope_freqs.weight, where there is one, is what the config implies."""
    spec = tensors.get(ROPE_FREQUENCIES)
    if spec is None:
        return
    rope = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    expected = _divisors(rope, float(rope.get("rope_theta", config.get("rope_theta", DEFAULT_THETA))), size)
    found = spec.read().reshape(-1).astype(np.float64)
    if expected is None or found.shape != expected.shape or not np.allclose(found, expected, rtol=TOLERANCE, atol=0):
        kind = rope.get("rope_type", rope.get("type", "default"))
        raise CorruptFileError(
            f"{ROPE_FREQUENCIES} is not what rope_scaling of config.json implies ({kind})",
            expected=None if expected is None else [float(f"{value:.6g}") for value in expected[:8]],
            found=[float(f"{value:.6g}") for value in found[:8]],
            remedy="put the config.json of the very model that was converted beside the .gguf",
            tensor=ROPE_FREQUENCIES,
        )


def _divisors(rope: Mapping[str, Any], theta: float, size: int) -> np.ndarray | None:
    """What each of size/2 frequencies is divided by, float64; None for a scaling that llama.cpp has no tensor for."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return np.ones(size // 2)
    try:
        factor, low, high, original = (float(rope[key]) for key in ("factor", *LLAMA3))
    except (KeyError, TypeError, ValueError):
        return None
    if kind != "llama3" or high == low:
        return None
    turns = original * theta ** -(np.arange(0, size, 2) / size) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
