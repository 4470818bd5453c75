"""What is fuzzed: a function from bytes that may raise TypedError and nothing else, and the seeds it begins with.

The files beside the one that is fuzzed (shards beside an index, weights beside a config) are good, so that what is
wrong is met where it lies.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from composer.adapters import kinds, open_adapter
from composer.admission import admit
from composer.checkpoint import open_checkpoint
from composer.errors import TypedError
from composer.finite import count_nonfinite
from composer.gguf import read_gguf
from composer.recipe import load_recipe, parse_recipe
from composer.sizes import model_sizes
from composer.templates import chat_templates, template_diff
from composer.tensors import encode_header, read_header
from registry.claims import read_card
from registry.fingerprint import fingerprint_checkpoint
from registry.store.shards import read_shard
from registry.store.xorbs import xorb_hash
from tests.support import reshard, write_base, write_lora

__all__ = ["TARGETS", "Target", "run_one"]

SHAPES = {"model.q.weight": (8, 8), "model.k.weight": (4, 8)}


@dataclass(frozen=True, slots=True)
class Target:
    """`read(folder, data)` reads one input; `folder` is empty before the first, `prepare` fills it."""

    read: Callable[[Path, bytes], object]
    seeds: Callable[[], list[bytes]]
    prepare: Callable[[Path], object] = lambda folder: None


def run_one(target: Target, folder: Path, data: bytes) -> TypedError | None:
    """The typed error of one input, or None. Raises whatever else it ends in."""
    try:
        target.read(folder, data)
    except TypedError as error:
        error.as_dict()
        return error
    return None


def _written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _safetensors(folder: Path, data: bytes) -> None:
    header = read_header(_written(folder, "model.safetensors", data))
    for spec in header.tensors.values():
        assert count_nonfinite(spec) >= 0
        assert spec.read().shape == spec.shape


@cache
def _safetensors_seeds() -> list[bytes]:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    texts = [
        json.dumps({"__metadata__": {"format": "pt"}, "a": entry}).encode(),
        json.dumps({"a": entry, "b.c": {**entry, "dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}}).encode(),
        b'{"a":{"dtype":"I64","shape":[],"data_offsets":[0,8]},"e":{"dtype":"U8","shape":[0,3],"data_offsets":[8,8]}}',
    ]
    made = [len(text).to_bytes(8, "little") + text + b"\0\x80\x7f\xff" * 4 for text in texts]
    return [*made, encode_header([("x", "F16", (2, 2))], {"a": "b"}) + b"\0" * 8]


def _adapter_config(folder: Path, data: bytes) -> None:
    _written(folder, "adapter_config.json", data)
    adapter = open_adapter(folder)
    binding = adapter.bind(SHAPES)
    if not binding.mismatches:
        adapter.deltas(binding.names)


def _prepare_adapter(folder: Path) -> None:
    write_lora(folder, {"model.q": (8, 8), "model.k": (4, 8)})


@cache
def _adapter_config_seeds() -> list[bytes]:
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "k"], "rank_pattern": {"q": 2},
            "alpha_pattern": {}, "base_model_name_or_path": "org/base", "use_rslora": False, "bias": "none",
            "layers_to_transform": [0], "modules_to_save": None, "task_type": "CAUSAL_LM"}  # fmt: skip
    others = [{**lora, "peft_type": name} for kind in kinds().values() for name in kind.peft_types]
    mlx = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0}, "model": "org/base"}
    hub = {"config": {"architecture": "lora", "r": 2, "alpha": 4}, "model_type": "llama", "hidden_size": 8}
    switched = {**lora, "use_dora": True, "layer_replication": [[0, 1]], "trainable_token_indices": [1, 2],
                "target_parameters": ["model.q"], "auto_mapping": {"parent_library": "transformers.models"}}  # fmt: skip
    return [json.dumps(fields).encode() for fields in (lora, switched, mlx, hub, *others)]


def _index(folder: Path, data: bytes) -> None:
    _written(folder, "model.safetensors.index.json", data)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.nbytes > 0


def _prepare_index(folder: Path) -> None:
    base = write_base(folder / "base", {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()})
    reshard(base, folder, 2)
    for path in base.iterdir():
        path.unlink()
    base.rmdir()


@cache
def _index_seeds() -> list[bytes]:
    files = {"model.q.weight": "model-00002-of-00002.safetensors", "model.k.weight": "model-00001-of-00002.safetensors"}
    return [
        json.dumps({"metadata": {"total_size": 384}, "weight_map": files}, indent=2).encode(),
        json.dumps({"weight_map": {**files, "../x": "../../etc/passwd"}}).encode(),
    ]


def _config(folder: Path, data: bytes) -> None:
    _written(folder, "config.json", data)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.architecture
    assert fingerprint_checkpoint(checkpoint, threads=1).identity
    assert model_sizes(checkpoint.shapes) is not None


def _prepare_config(folder: Path) -> None:
    write_base(folder, {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()})


@cache
def _config_seeds() -> list[bytes]:
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2,
             "num_key_value_heads": 1, "num_hidden_layers": 1, "rope_theta": 1e4, "tie_word_embeddings": False,
             "rope_scaling": {"type": "linear", "factor": 2.0}}  # fmt: skip
    schemes: list[dict[str, object]] = [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {"targets": ["Linear"],
         "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True}}}},
    ]  # fmt: skip
    return [json.dumps(fields).encode() for fields in (llama, *({**llama, "quantization_config": s} for s in schemes))]


def _gguf(folder: Path, data: bytes) -> None:
    path = _written(folder, "model.gguf", data)
    header, metadata = read_gguf(path)
    assert sum(spec.nbytes for spec in header.tensors.values()) <= len(data)
    assert isinstance(metadata, dict)
    open_checkpoint({"model.gguf": path})


@cache
def _gguf_seeds() -> list[bytes]:
    import tempfile

    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(2)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_feed_forward_length(64)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_rope_freq_base(10_000.0)
        writer.add_vocab_size(4)
        writer.add_token_list(["a", "b", "c", "d"])
        writer.add_array("numbers", [1, 2, 3])
        writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
        writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        data = path.read_bytes()
    return [data, data[:200], b"GGUF" + (3).to_bytes(4, "little") + bytes(16)]


def _recipe(folder: Path, data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    try:
        assert parse_recipe(text).base
    except TypedError as error:
        error.as_dict()
    load_recipe(_written(folder, "recipe.yaml", data))


@cache
def _recipe_seeds() -> list[bytes]:
    return [
        b"smollm2+team/shout@1.0.0:0.7+./my-adapter+team/multitask#2",
        b"wf1:" + b"a" * 64 + b"+team/x@sha256:" + b"b" * 64 + b":-1e3",
        b"base: smollm2\nadapters:\n  - {ref: team/shout, version: 1.0.0, weight: 0.7, modules: {'*.q': 0}}\nmethod: ties\n",
        b'{"base": "a", "adapters": ["b@1:2", {"ref": "c", "task": 1}], "untie": true, "export": "peft", "rank": 8}',
        b"base: &a x\nadapters: [*a, *a]\nparameters: {<<: {k: 1}}\n",
    ]


def _tokenizer(folder: Path, data: bytes) -> None:
    name, _, body = data.partition(b"\n")
    files = {
        path.name: path
        for path in [
            _written(folder, "tokenizer_config.json", body),
            _written(folder, "chat_template.jinja", body[:500]),
            _written(folder, "tokenizer.json", body),
            _written(folder, "README.md", data),
        ]
    }
    try:
        admit(files)
    except TypedError as error:
        error.as_dict()
    chosen = {item: files[item] for item in ("tokenizer_config.json", "README.md")}
    chosen |= {"chat_template.jinja": files["chat_template.jinja"]} if name == b"---" else {}
    template_diff({"chat_template.jinja": "{{ messages }}"}, chat_templates(chosen))
    read_card(files["README.md"])


@cache
def _tokenizer_seeds() -> list[bytes]:
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    several = [{"name": "default", "template": template}, {"name": "tool_use", "template": "x"}]
    card = "---\nlicense: mit\ntags: [a, b]\nbase_model: org/base\nbase_model_fingerprint: wf1:00\n---\n\n# Title\n\nText.\n"
    return [
        b"x\n" + json.dumps({"chat_template": template, "added_tokens_decoder": {"0": {"content": "<s>"}}}).encode(),
        b"---\n" + json.dumps({"chat_template": several, "auto_map": None}).encode(),
        card.encode(),
        b"---\n? [a]\n: !!python/object/apply:os.system [x]\n---\n",
    ]


def _xet(folder: Path, data: bytes) -> None:
    try:
        assert len(xorb_hash(io.BytesIO(data))) == 64
    except TypedError as error:
        error.as_dict()
    for file in read_shard(data):
        assert len(file.sha256) == 64


@cache
def _xet_seeds() -> list[bytes]:
    import lz4.frame

    packed = lz4.frame.compress(b"a" * 100)
    chunks = bytes(1) + (5).to_bytes(3, "little") + bytes(1) + (5).to_bytes(3, "little") + b"hello"
    chunks += bytes(1) + len(packed).to_bytes(3, "little") + b"\2" + (100).to_bytes(3, "little") + packed
    segment = bytes(32) + bytes(4) + b"".join(n.to_bytes(4, "little") for n in (105, 0, 2))
    file = bytes(32) + (1 << 30).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(8)
    return [chunks, chunks + b"XETBLOB", bytes(48) + file + segment + b"\1" * 32 + bytes(16) + b"\xff" * 32]


TARGETS = {
    "safetensors": Target(_safetensors, _safetensors_seeds),
    "adapter-config": Target(_adapter_config, _adapter_config_seeds, _prepare_adapter),
    "index": Target(_index, _index_seeds, _prepare_index),
    "config": Target(_config, _config_seeds, _prepare_config),
    "gguf": Target(_gguf, _gguf_seeds),
    "recipe": Target(_recipe, _recipe_seeds),
    "tokenizer": Target(_tokenizer, _tokenizer_seeds),
    "xet": Target(_xet, _xet_seeds),
}
