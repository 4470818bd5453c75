"""The benchmark's inputs: a Llama of a given size in bf16 shards, and random LoRA adapters. Made once, seeded."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from composer.tensors import encode_header

__all__ = ["ALL_LINEAR", "make_adapter", "make_base"]

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY, SHARD_BYTES = 2048, 5632, 256, 32000, 500_000_000
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
ALL_LINEAR = tuple(SHAPES)


def make_base(folder: Path, layers: int) -> Path:
    """TinyLlama's shape (22 layers are 2.2 GB), untied, random normal weights."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    names = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    for layer in range(layers):
        names += [(f"model.layers.{layer}.{module}.weight", shape) for module, shape in SHAPES.items()]
        names += [(f"model.layers.{layer}.{norm}.weight", (HIDDEN,)) for norm in ("input_layernorm", "post_attention_layernorm")]  # fmt: skip
    names += [("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (VOCABULARY, HIDDEN))]
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, shape in names:
        if sum(2 * int(np.prod(s)) for _, s in shards[-1]) + 2 * int(np.prod(shape)) > SHARD_BYTES:
            shards.append([])
        shards[-1].append((name, shape))
    random, weight_map, total = np.random.default_rng(1), {}, 0
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(encode_header([(name, "BF16", shape) for name, shape in shard], {"format": "pt"}))
            for name, shape in shard:
                values = random.standard_normal(shape, np.float32) * 0.02 if len(shape) == 2 else np.ones(shape)
                out.write(values.astype(ml_dtypes.bfloat16).tobytes())
                weight_map[name], total = file, total + 2 * int(np.prod(shape))
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": VOCABULARY, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapter(
    folder: Path, base: Path, modules: tuple[str, ...], *, layers: int, rank: int = 16, seed: int = 7
) -> Path:
    """A LoRA of `rank` in float32 on `modules` of every layer."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True)
    random, tensors = np.random.default_rng(seed), {}
    for layer in range(layers):
        for module in modules:
            rows, columns = SHAPES[module]
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            a = random.uniform(-1, 1, (rank, columns)) / columns**0.5
            tensors[f"{prefix}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = (random.standard_normal((rows, rank)) * 0.002).astype(np.float32)
    layout = [(name, "F32", array.shape) for name, array in tensors.items()]
    with (folder / "adapter_model.safetensors").open("wb") as out:
        out.write(encode_header(layout, {"format": "pt"}))
        for array in tensors.values():
            out.write(array.tobytes())
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank,
        "lora_alpha": 2 * rank, "bias": "none", "target_modules": sorted(m.rpartition(".")[2] for m in modules),
        "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
