"""Quantised bases: decoders against closed forms in float64 and against bitsandbytes' own output, and composed whole."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import composer.plan as plan_module
from composer.checkpoint import open_checkpoint
from composer.errors import CorruptFileError, TargetMismatchError, UnsupportedQuantisationError
from composer.quantised import QuantisedTensor, schemes
from composer.recipe import Dtype
from composer.tensors import DTYPES, read_header
from tests.conftest import random_lora
from tests.support import compose_folders, plan_folders, read_tensors, reshard, write_base, write_lora

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantised"
NF4_LLAMA = FIXTURES / "tiny-llama-nf4"
FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
NAME = "model.q_proj.weight"


def random() -> np.random.Generator:
    """The same numbers in every test."""
    return np.random.default_rng(5)


def decoded(folder: Path) -> dict[str, np.ndarray]:
    """Every quantised tensor in float32; read whole, and again in uneven blocks of rows, which must agree."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in open_checkpoint(folder).tensors.items():
        if isinstance(tensor, QuantisedTensor):
            rows, columns = tensor.shape[0], tensor.nbytes // 4 // tensor.shape[0]
            whole = np.frombuffer(tensor.read_bytes(0, tensor.nbytes), np.float32).reshape(tensor.shape)
            cuts = sorted({0, 1, rows // 3, rows - 1, rows} & set(range(rows + 1)))
            for start, stop in itertools.pairwise(cuts):
                part = tensor.read_bytes(4 * start * columns, 4 * stop * columns)
                assert np.array_equal(np.frombuffer(part, np.float32), whole[start:stop].reshape(-1), equal_nan=True), (
                    start,
                    stop,
                )
            found[name] = whole
    assert found
    return found


def quantised_base(folder: Path, tensors: dict[str, np.ndarray], quantisation: Any, **config: Any) -> Path:
    """A checkpoint with a quantization_config."""
    return write_base(folder, tensors, quantization_config=quantisation, **config)


def state(**fields: Any) -> np.ndarray:
    """A quant_state as bitsandbytes stores it."""
    return np.frombuffer(json.dumps(fields).encode(), np.uint8)


def four_bit(rows: int = 6, columns: int = 10, blocksize: int = 16, **changes: Any) -> dict[str, np.ndarray]:
    """One NF4 layer of random halves and scales; `changes` replace a companion (None leaves it out)."""
    count = rows * columns
    tensors = {
        NAME: random().integers(0, 256, (-(-count // 2), 1)).astype(np.uint8),
        f"{NAME}.absmax": random().uniform(0.01, 2, -(-count // blocksize)).astype(np.float32),
        f"{NAME}.quant_map": random().normal(size=16).astype(np.float32),
        f"{NAME}.quant_state.bitsandbytes__nf4": state(
            quant_type="nf4", blocksize=blocksize, dtype="float32", shape=[rows, columns]
        ),
    }
    tensors |= {f"{NAME}.{key}": value for key, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


def halves(packed: np.ndarray, count: int) -> np.ndarray:
    """Four-bit numbers, the high half of a byte first, by integer division."""
    return np.array([[byte // 16, byte % 16] for byte in packed.reshape(-1).tolist()]).reshape(-1)[:count]


@pytest.mark.parametrize(
    ("rows", "columns", "blocksize"), [(6, 10, 16), (7, 5, 16), (5, 64, 64), (3, 33, 2), (1, 1, 64)]
)
def test_4_bit_is_the_value_of_the_half_byte_times_its_blocks_scale(
    tmp_path: Path, rows: int, columns: int, blocksize: int
) -> None:
    """Oracle: map[half] · absmax[i // blocksize] in float64, rounded once to float32: equal in every bit."""
    tensors = four_bit(rows, columns, blocksize)
    count = rows * columns
    exact = (
        tensors[f"{NAME}.quant_map"].astype(np.float64)[halves(tensors[NAME], count)]
        * tensors[f"{NAME}.absmax"].astype(np.float64)[np.arange(count) // blocksize]
    )
    found = decoded(quantised_base(tmp_path / "base", tensors, FOUR_BIT))
    assert np.array_equal(found[NAME], exact.astype(np.float32).reshape(rows, columns))


@pytest.mark.parametrize("nested_blocksize", [1, 3, 256])
def test_double_quantisation_decodes_the_scales_first(tmp_path: Path, nested_blocksize: int) -> None:
    """Oracle: map[half] · (nested_map[byte] · nested_absmax + offset) in float64, to float32's precision."""
    rows, columns, blocksize, offset = 9, 20, 8, 0.3125
    count, blocks = rows * columns, -(-rows * columns // blocksize)
    nested = {
        "absmax": random().integers(0, 256, blocks).astype(np.uint8),
        "nested_absmax": random().uniform(0.5, 2, -(-blocks // nested_blocksize)).astype(np.float32),
        "nested_quant_map": random().normal(size=256).astype(np.float32),
        "quant_state.bitsandbytes__nf4": state(
            blocksize=blocksize, dtype="float32", shape=[rows, columns], nested_blocksize=nested_blocksize,
            nested_offset=offset, nested_dtype="float32", quant_type="nf4",
        ),
    }  # fmt: skip
    tensors = four_bit(rows, columns, blocksize, **nested)
    outer = nested["nested_absmax"].astype(np.float64)[np.arange(blocks) // nested_blocksize]
    scales = nested["nested_quant_map"].astype(np.float64)[nested["absmax"]] * outer + offset
    values = tensors[f"{NAME}.quant_map"].astype(np.float64)[halves(tensors[NAME], count)]
    exact = (values * scales[np.arange(count) // blocksize]).reshape(rows, columns)
    found = decoded(quantised_base(tmp_path / "base", tensors, FOUR_BIT))
    assert np.allclose(found[NAME], exact, rtol=1e-6, atol=1e-6)


def test_4_bit_numbers_may_be_stored_as_another_dtype(tmp_path: Path) -> None:
    """bnb_4bit_quant_storage=bfloat16 (FSDP) changes the header, not the bytes: the same numbers."""
    plain = four_bit(8, 10)
    as_bf16 = {**plain, NAME: plain[NAME].reshape(-1).view(DTYPES["BF16"]).reshape(-1, 1)}
    a = decoded(quantised_base(tmp_path / "a", plain, FOUR_BIT))
    b = decoded(quantised_base(tmp_path / "b", as_bf16, FOUR_BIT))
    assert np.array_equal(a[NAME], b[NAME])


@pytest.mark.parametrize("case", ["nf4", "fp4", "nf4_nested", "fp4_nested", "nf4_odd", "nf4_many_blocks", "int8"])
def test_decoding_equals_bitsandbytes_bit_for_bit(tmp_path: Path, case: str) -> None:
    """Oracle: dequantize_4bit and int8_vectorwise_dequant of bitsandbytes 0.50.2, in the dtype that they return."""
    stored = {name: spec.read() for name, spec in read_header(FIXTURES / "bitsandbytes.safetensors").tensors.items()}
    mine = {name: array for name, array in stored.items() if name.startswith(f"{case}.")}
    expected = mine.pop(f"{case}.expected")
    found = decoded(quantised_base(tmp_path / "base", mine, INT8 if case == "int8" else FOUR_BIT))[f"{case}.weight"]
    rounded = found.astype(expected.dtype)
    assert np.array_equal(rounded, expected)
    assert np.array_equal(rounded.astype(np.float32), found)


def test_int8_is_the_row_scale_over_127(tmp_path: Path) -> None:
    """Oracle: q · SCB / 127 in float64."""
    tensors = {
        NAME: random().integers(-127, 128, (7, 12)).astype(np.int8),
        "model.q_proj.SCB": random().uniform(0.01, 3, 7).astype(np.float32),
    }
    exact = tensors[NAME].astype(np.float64) * tensors["model.q_proj.SCB"].astype(np.float64)[:, None] / 127
    found = decoded(quantised_base(tmp_path / "base", tensors, INT8))
    assert np.allclose(found[NAME], exact, rtol=3e-7, atol=0)


@pytest.mark.parametrize("scale_dtype", [np.float32, DTYPES["BF16"]], ids=["fp32", "bf16"])
@pytest.mark.parametrize("block", [[4, 8], [128, 128], [1, 3], None], ids=str)
def test_fp8_multiplies_by_the_scale_of_the_block(tmp_path: Path, block: list[int] | None, scale_dtype: Any) -> None:
    """Oracle: fp8 · scale_inv[i // bm, j // bn] in float64, rounded once; a scale without shape counts for all."""
    rows, columns = 11, 21
    height, width = block or (rows, columns)
    weight = random().normal(size=(rows, columns)).astype(DTYPES["F8_E4M3"])
    grid = (-(-rows // height), -(-columns // width)) if block else ()
    scale = np.asarray(random().uniform(0.01, 3, grid)).astype(scale_dtype)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    found = decoded(quantised_base(tmp_path / "base", {NAME: weight, f"{NAME}_scale_inv": scale}, config))
    exact = weight.astype(np.float64)
    for i in range(rows):
        for j in range(columns):
            exact[i, j] *= float(scale[i // height, j // width] if block else scale)
    assert np.array_equal(found[NAME], exact.astype(np.float32))


def pack(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """int32 [rows, ceil(columns · bits / 32)] of [rows, columns]: by arithmetic on Python's integers, lowest bits first."""
    count = 32 // bits
    words = []
    for row in numbers.tolist():
        padded = row + [0] * (-len(row) % count)
        parts = [padded[start : start + count] for start in range(0, len(padded), count)]
        words.append([sum(part[number] * 2 ** (bits * place) for place, number in enumerate(order or range(count)))
                      for part in parts])  # fmt: skip
    return np.array(words, np.uint32).view(np.int32)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("order", ["g_idx", "desc_act", None])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_takes_the_zero_and_the_scale_of_the_inputs_group(
    tmp_path: Path, bits: int, order: str | None, checkpoint_format: str | None
) -> None:
    """Oracle: (q − zero) · scale in float64 over random integers, rounded once to the scales' fp16."""
    inputs, outputs, groups = 64, 48, 4
    numbers = random().integers(0, 2**bits, (inputs, outputs))
    zeros = random().integers(0, 2**bits, (groups, outputs))
    scales = random().uniform(0.001, 0.1, (groups, outputs)).astype(np.float16)
    group = random().integers(0, groups, inputs) if order == "desc_act" else np.arange(inputs) // 16
    stored = zeros if checkpoint_format == "gptq_v2" else (zeros - 1) % 2**bits
    tensors = {
        "model.q_proj.qweight": np.ascontiguousarray(pack(numbers.T, bits).T),
        "model.q_proj.qzeros": pack(stored, bits),
        "model.q_proj.scales": scales,
        "model.q_proj.bias": np.ones(outputs, np.float16),
    }
    if order:
        tensors["model.q_proj.g_idx"] = group.astype(np.int32)
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "checkpoint_format": checkpoint_format,
        "desc_act": order == "desc_act",
    }
    base = quantised_base(tmp_path / "base", tensors, config)
    exact = np.empty((outputs, inputs))
    for i in range(inputs):
        exact[:, i] = (numbers[i] - zeros[group[i]]) * scales[group[i]].astype(np.float64)
    assert np.array_equal(decoded(base)[NAME], exact.astype(np.float16).astype(np.float32))
    assert set(open_checkpoint(base).tensors) == {NAME, "model.q_proj.bias"}


@pytest.mark.parametrize("groups", [1, 4])
def test_awq_interleaves_the_outputs_of_a_word(tmp_path: Path, groups: int) -> None:
    """Oracle: (q − zero) · scale in float64 over random integers; the word's order is written out in the test."""
    inputs, outputs = 32, 40
    numbers, zeros = random().integers(0, 16, (inputs, outputs)), random().integers(0, 16, (groups, outputs))
    scales = random().uniform(0.001, 0.1, (groups, outputs)).astype(np.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "model.q_proj.qweight": pack(numbers, 4, order),
        "model.q_proj.qzeros": pack(zeros, 4, order),
        "model.q_proj.scales": scales,
    }
    config = {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": inputs // groups, "zero_point": True}
    exact = np.empty((outputs, inputs))
    for i in range(inputs):
        g = i * groups // inputs
        exact[:, i] = (numbers[i] - zeros[g]) * scales[g].astype(np.float64)
    found = decoded(quantised_base(tmp_path / "base", tensors, config))
    assert np.array_equal(found[NAME], exact.astype(np.float16).astype(np.float32))


def packed_config(bits: int = 4, strategy: str = "group", **changes: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors; `changes` replace fields of its one group."""
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": True}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **changes}}}  # fmt: skip


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("layout", ["group", "g_idx", "channel", "tensor"])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_unpacks_signed_integers(tmp_path: Path, bits: int, layout: str, asymmetric: bool) -> None:
    """Oracle: (q − zero) · scale in float64 over random signed integers, rounded once to the scales' bf16."""
    rows, columns, half = 19, 45, 2 ** (bits - 1)
    groups = 3 if layout in ("group", "g_idx") else 1
    numbers = random().integers(-half, half, (rows, columns))
    zeros = (
        random().integers(-half, half, (rows, groups))
        if asymmetric and layout != "tensor"
        else np.zeros((rows, groups), int)
    )
    shape = (1,) if layout == "tensor" else (rows, groups)
    scales = random().uniform(0.001, 0.1, shape).astype(DTYPES["BF16"])
    group = random().integers(0, groups, columns) if layout == "g_idx" else np.arange(columns) // -(-columns // groups)
    tensors = {
        "model.q_proj.weight_packed": pack(numbers + half, bits),
        "model.q_proj.weight_scale": scales,
        "model.q_proj.weight_shape": np.array([rows, columns]),
    }
    if zeros.any():
        tensors["model.q_proj.weight_zero_point"] = np.ascontiguousarray(pack((zeros + half).T, bits).T)
    if layout == "g_idx":
        tensors["model.q_proj.weight_g_idx"] = group.astype(np.int32)
    strategy = "group" if layout == "g_idx" else layout
    found = decoded(quantised_base(tmp_path / "base", tensors, packed_config(bits, strategy)))
    spread = np.broadcast_to(scales.astype(np.float64), (rows, groups))[:, group]
    exact = (numbers - zeros[:, group]) * spread
    # float64 to bf16 in one step: ml_dtypes goes through float32, which these products fit into
    assert np.array_equal(exact.astype(np.float32).astype(np.float64), exact)
    assert np.array_equal(found[NAME], exact.astype(np.float32).astype(DTYPES["BF16"]).astype(np.float32))


def plain_config(strategy: str = "channel", form: str = "float-quantized", **changes: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors whose weights are not packed; `changes` are of the one group."""
    weights = {"num_bits": 8, "strategy": strategy, "symmetric": True, "block_structure": [4, 8]}
    activations = {"num_bits": 8, "dynamic": True}
    return {"quant_method": "compressed-tensors", "format": form,
            "config_groups": {"g": {"weights": weights, "input_activations": activations, **changes}}}  # fmt: skip


@pytest.mark.parametrize("stored", ["F8_E4M3", "I8"])
@pytest.mark.parametrize(("strategy", "block"), [("tensor", (11, 21)), ("channel", (1, 21)), ("block", (4, 8))])
def test_compressed_tensors_8_bit_rounds_to_the_scales_dtype(
    tmp_path: Path, strategy: str, block: tuple[int, int], stored: str
) -> None:
    """Oracle: number · scale of its block in float64, which float32 holds exactly, rounded once to bf16."""
    numbers = (random().normal(size=(11, 21)) * 60).clip(-127, 127).astype(DTYPES[stored])
    grid = (1,) if strategy == "tensor" else (-(-11 // block[0]), -(-21 // block[1]))
    scales = random().uniform(0.001, 0.1, grid).astype(DTYPES["BF16"])
    config = plain_config(strategy, "float-quantized" if stored == "F8_E4M3" else "int-quantized")
    found = decoded(quantised_base(tmp_path / "base", {NAME: numbers, f"{NAME}_scale": scales}, config))
    exact = numbers.astype(np.float64)
    for i in range(11):
        for j in range(21):
            exact[i, j] *= float(scales[0] if strategy == "tensor" else scales[i // block[0], j // block[1]])
    assert np.array_equal(found[NAME], exact.astype(np.float32).astype(DTYPES["BF16"]).astype(np.float32))


@pytest.mark.parametrize("case", ["group_asymmetric", "channel", "fp8_channel"])
def test_decoding_equals_compressed_tensors_bit_for_bit(tmp_path: Path, case: str) -> None:
    """Oracle: the decompression of compressed-tensors 0.20.0."""
    path = FIXTURES / "compressed_tensors.safetensors"
    stored = {name: spec.read() for name, spec in read_header(path).tensors.items() if name.startswith(f"{case}.")}
    expected = stored.pop(f"{case}.expected")
    config = plain_config() if case == "fp8_channel" else packed_config(4, case.partition("_")[0])
    found = decoded(quantised_base(tmp_path / "base", stored, config))[f"{case}.weight"]
    assert np.array_equal(found, expected.astype(np.float32))


def test_mxfp4_equals_transformers_bit_for_bit(tmp_path: Path) -> None:
    """Oracle: transformers' own conversion of gpt-oss experts to bf16; the layout is [experts, in, out]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = random().integers(0, 256, (3, 10, 2, 16)).astype(np.uint8)
    scales = random().integers(100, 140, (3, 10, 2)).astype(np.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    bias = np.ones((3, 10), DTYPES["BF16"])
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": bias}
    base = quantised_base(tmp_path / "base", tensors, {"quant_method": "mxfp4"})
    expected = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    compose_folders(base, [], tmp_path / "out")
    written = read_tensors(tmp_path / "out")
    assert set(written) == {name, f"{name}_bias"}
    assert written[name].shape == (3, 64, 10)
    assert torch.equal(written[name], expected)
    assert np.array_equal(decoded(base)[name], expected.float().numpy())


def test_mxfp4_is_the_value_times_a_power_of_two(tmp_path: Path) -> None:
    """Oracle: sign, two exponent bits and one mantissa bit spelled out, times 2^(scale − 127), in float64: exact."""
    blocks = np.arange(16, dtype=np.uint8).reshape(1, 1, 1, 16) * 16 + 5
    base = quantised_base(tmp_path / "base", {"w_blocks": blocks, "w_scales": np.full((1, 1, 1), 120, np.uint8)},
                          {"quant_method": "mxfp4"})  # fmt: skip
    exact = []
    for byte in blocks.reshape(-1).tolist():
        for half in (byte % 16, byte // 16):
            sign, exponent, mantissa = half // 8, half // 2 % 4, half % 2
            magnitude = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
            exact.append((-1) ** sign * magnitude * 2.0**-7)
    assert decoded(base)["w"].reshape(-1).tolist() == exact


def test_a_qlora_composes_into_the_weights_it_was_trained_on(tmp_path: Path) -> None:
    """Oracle: bitsandbytes' dequantised matrices + s·B·A in float64, rounded once to float32; it loads in transformers."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    dequantised = load_file(FIXTURES / "tiny-llama-nf4.expected.safetensors")
    lora = nf4_lora(tmp_path)
    compose_folders(NF4_LLAMA, [(lora, 1.0)], tmp_path / "out", dtype=Dtype.FP32)
    written = read_tensors(tmp_path / "out")
    adapter = load_file(lora / "adapter_model.safetensors")
    prefix = "base_model.model."
    assert len(dequantised) == 7
    for name, base in dequantised.items():
        module = prefix + name.removesuffix(".weight")
        a, b = (adapter[f"{module}.lora_{side}.weight"].double() for side in "AB")
        exact = base.double() + 2.0 * (b @ a)
        assert written[name].dtype == torch.float32
        assert torch.allclose(written[name].double(), exact, rtol=2**-22, atol=1e-8)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.float32
    assert torch.equal(
        model.state_dict()["model.layers.0.mlp.up_proj.weight"], written["model.layers.0.mlp.up_proj.weight"]
    )


def nf4_lora(tmp_path: Path, **changes: Any) -> Path:
    """A LoRA that PEFT made on the unquantised shape of the fixture (PEFT's keys do not depend on quantisation)."""
    import shutil

    from transformers import AutoConfig, LlamaForCausalLM

    shape = tmp_path / "shape"
    config = AutoConfig.from_pretrained(NF4_LLAMA)
    del config.quantization_config
    LlamaForCausalLM(config).save_pretrained(shape)
    lora = random_lora(shape, tmp_path / "lora", **{"target_modules": "all-linear", **changes})
    shutil.rmtree(shape)
    return lora


def test_without_an_adapter_the_result_is_the_dequantised_model(tmp_path: Path) -> None:
    """Oracle: bitsandbytes' bf16 matrices bit for bit, the other tensors byte for byte, and nothing else in the file."""
    from safetensors.torch import load_file

    compose_folders(NF4_LLAMA, [], tmp_path / "out")
    written, stored = read_tensors(tmp_path / "out"), load_file(NF4_LLAMA / "model.safetensors")
    dequantised = load_file(FIXTURES / "tiny-llama-nf4.expected.safetensors")
    plain = {name for name in stored if not name.startswith(tuple(dequantised))}
    assert set(written) == set(dequantised) | plain
    assert len(plain) == 5
    for name, tensor in written.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, dequantised.get(name, stored.get(name)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert not {"quantization_config", "torch_dtype"} & set(config)


@pytest.mark.parametrize(
    ("computed", "own", "kept"),
    [
        ("float16", "bfloat16", np.dtype(np.float16)),
        ("torch.bfloat16", None, DTYPES["BF16"]),
        ("float32", None, DTYPES["BF16"]),
        ("float32", "float16", np.dtype(np.float16)),
        (None, "float32", np.dtype(np.float32)),
        (None, "auto", DTYPES["BF16"]),
        (None, None, DTYPES["BF16"]),
    ],
)
def test_kept_means_the_dtype_that_the_layers_compute_in(
    tmp_path: Path, computed: str | None, own: str | None, kept: np.dtype
) -> None:
    """What quantization_config states (its default float32 states nothing), else the model's, else bf16."""
    base = quantised_base(
        tmp_path / "base", four_bit(), FOUR_BIT | {"bnb_4bit_compute_dtype": computed}, torch_dtype=own
    )
    compose_folders(base, [], tmp_path / "out")
    assert DTYPES[read_header(tmp_path / "out" / "model.safetensors").tensors[NAME].dtype] == kept
    named = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
    assert named == {"float16": "float16", "bfloat16": "bfloat16", "float32": "float32"}[kept.name]


def test_shards_and_index_hold_the_logical_tensors(tmp_path: Path) -> None:
    """Companions dealt out over other files than their weight: each matrix is written once, in its weight's shard."""
    stored = sorted(read_header(NF4_LLAMA / "model.safetensors").tensors, key=lambda name: name.split(".weight")[-1])
    base = reshard(NF4_LLAMA, tmp_path / "base", names=stored)
    lora = nf4_lora(tmp_path)
    compose_folders(base, [(lora, 1.0)], tmp_path / "out")
    compose_folders(NF4_LLAMA, [(lora, 1.0)], tmp_path / "one")
    split, whole = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "one")
    assert set(split) == set(whole)
    assert all(torch.equal(split[name], tensor) for name, tensor in whole.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    held = {name: path.name for path in files for name in read_header(path).tensors}
    assert index["weight_map"] == held
    before = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert held == {name: before[name] for name in held}


def test_a_shard_that_holds_only_companions_is_not_written(tmp_path: Path) -> None:
    """Its tensors are gone: no empty file, none in the index."""
    names = [NAME, *sorted(set(four_bit()) - {NAME})]
    base = reshard(quantised_base(tmp_path / "one", four_bit(), FOUR_BIT), tmp_path / "base", 4, names=names)
    compose_folders(base, [], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model-00001-of-00004.safetensors"]


def test_reading_rows_holds_no_more_than_a_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of 4 million numbers (16 MiB in float32) composes within what the plan promises for blocks of 64 KiB.

    The buffers of the output are of one size whatever the layer's.
    """
    rows, columns = 4096, 1024
    tensors = four_bit(rows, columns, 64)
    base = quantised_base(tmp_path / "base", tensors, FOUR_BIT)
    lora = write_lora(tmp_path / "lora", {"model.q_proj": (rows, columns)})
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 1 << 16)
    plan = plan_folders(base, [(lora, 1.0)])
    compose_folders(base, [(lora, 1.0)], tmp_path / "warm")
    tracemalloc.start()
    compose_folders(base, [(lora, 1.0)], tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.peak_bytes - plan_module.ROOMS * plan_module.ROOM_BYTES < rows * columns
    assert peak < plan.peak_bytes + (1 << 20)


@pytest.mark.parametrize(
    "quantisation",
    [{"quant_method": "aqlm"}, {"quant_method": "hqq"}, {"bits": 3}, {"quant_method": "bitsandbytes"},
     {"quant_method": "fp8", "activation_scheme": "static"}, {"quant_method": "fp8", "weight_block_size": [128]},
     {"quant_method": "gptq", "bits": 3}, {"quant_method": "gptq", "bits": 4.0},
     {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
     {"quant_method": "gptq", "bits": 4, "checkpoint_format": ["gptq"]},
     {"quant_method": "gptq", "bits": 4, "is_marlin_format": True},
     {"quant_method": "gptq", "bits": 4, "rotation": "hadamard"},
     {"quant_method": "awq", "bits": 8}, {"quant_method": "awq", "bits": 4, "version": "gemv"},
     {"quant_method": "compressed-tensors"}, {"quant_method": "compressed-tensors", "config_groups": {"a": 1}},
     packed_config() | {"format": "float-quantized"}, packed_config() | {"format": "nvfp4-pack-quantized"},
     plain_config("group"), plain_config(input_activations={"num_bits": 8, "dynamic": False}),
     plain_config(weights={"num_bits": 8, "strategy": "channel", "symmetric": False}),
     plain_config(weights={"num_bits": 8, "strategy": "block"}), packed_config() | {"transform_config": {"a": 1}},
     packed_config(3), packed_config(4, "block"), packed_config(input_activations={"num_bits": 8})],
    ids=lambda config: "-".join(map(str, config.values()))[:60],
)  # fmt: skip
def test_a_scheme_that_is_not_read_is_refused_by_name(tmp_path: Path, quantisation: dict[str, Any]) -> None:
    """The base opens (it can be catalogued); a plan on it names the scheme, what can be read, and a remedy."""
    base = quantised_base(tmp_path / "base", {NAME: np.ones((4, 4), np.float32)}, quantisation)
    assert open_checkpoint(base).shapes == {NAME: (4, 4)}
    with pytest.raises(UnsupportedQuantisationError) as caught:
        plan_folders(base, [])
    assert str(quantisation.get("quant_method", "unnamed")) in str(caught.value)
    assert caught.value.remedy
    assert caught.value.expected


GPTQ = {"quant_method": "gptq", "bits": 4}
AWQ = {"quant_method": "awq", "bits": 4}


def gptq(**changes: Any) -> dict[str, np.ndarray]:
    """One GPTQ layer [out 16, in 16] of zeros in two groups; `changes` replace a tensor (None leaves it out)."""
    tensors = {"qweight": np.zeros((2, 16), np.int32), "qzeros": np.zeros((2, 2), np.int32),
               "scales": np.ones((2, 16), np.float16), "g_idx": np.arange(16, dtype=np.int32) // 8} | changes  # fmt: skip
    return {f"model.q_proj.{name}": array for name, array in tensors.items() if array is not None}


def packed(**changes: Any) -> dict[str, np.ndarray]:
    """One layer of compressed-tensors [out 4, in 16] in two groups; `changes` as above."""
    tensors = {"weight_packed": np.zeros((4, 2), np.int32), "weight_scale": np.ones((4, 2), np.float16),
               "weight_shape": np.array([4, 16])} | changes  # fmt: skip
    return {f"model.q_proj.{name}": array for name, array in tensors.items() if array is not None}


BREAKS: dict[str, Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]]] = {
    "no-map": lambda: (four_bit(quant_map=None), FOUR_BIT),
    "no-scales": lambda: (four_bit(absmax=None), FOUR_BIT),
    "no-state": lambda: (four_bit(**{"quant_state.bitsandbytes__nf4": None}), FOUR_BIT),
    "short-map": lambda: (four_bit(quant_map=np.ones(8, np.float32)), FOUR_BIT),
    "few-scales": lambda: (four_bit(absmax=np.ones(3, np.float32)), FOUR_BIT),
    "byte-scales-without-nesting": lambda: (four_bit(absmax=np.ones(4, np.uint8)), FOUR_BIT),
    "nested-without-its-map": lambda: (
        four_bit(absmax=np.ones(4, np.uint8), **{"quant_state.bitsandbytes__nf4": state(
            shape=[6, 10], dtype="float32", blocksize=16, nested_blocksize=256)}), FOUR_BIT),
    "not-json": lambda: (four_bit(**{"quant_state.bitsandbytes__nf4": np.full(9, 255, np.uint8)}), FOUR_BIT),
    "other-type": lambda: (four_bit(**{"quant_state.bitsandbytes__nf5": np.ones(9, np.uint8)}), FOUR_BIT),
    "zero-size": lambda: (four_bit(**{"quant_state.bitsandbytes__nf4": state(
        shape=[0, 10], dtype="float32", blocksize=16)}), FOUR_BIT),
    "zero-block": lambda: (four_bit(**{"quant_state.bitsandbytes__nf4": state(
        shape=[6, 10], dtype="float32", blocksize=0)}), FOUR_BIT),
    "huge-block": lambda: (four_bit(absmax=np.ones(1, np.float32), **{"quant_state.bitsandbytes__nf4": state(
        shape=[6, 10], dtype="float32", blocksize=2**62)}), FOUR_BIT),
    "infinite-offset": lambda: (four_bit(**{"quant_state.bitsandbytes__nf4": state(
        shape=[6, 10], dtype="float32", blocksize=16, nested_offset=float("inf"))}), FOUR_BIT),
    "offset-of-many-digits": lambda: (four_bit(**{"quant_state.bitsandbytes__nf4": state(
        shape=[6, 10], dtype="float32", blocksize=16, nested_offset=10**400)}), FOUR_BIT),
    "other-shape": lambda: (four_bit(**{"quant_state.bitsandbytes__nf4": state(
        shape=[6, 12], dtype="float32", blocksize=16)}), FOUR_BIT),
    "int8-without-weight": lambda: ({"model.q_proj.SCB": np.ones(4, np.float32)}, INT8),
    "int8-short-scale": lambda: ({NAME: np.ones((4, 4), np.int8), "model.q_proj.SCB": np.ones(3, np.float32)}, INT8),
    "int8-format-alone": lambda: ({"model.q_proj.weight_format": np.zeros((), np.uint8)}, INT8),
    "fp8-without-scale": lambda: ({NAME: np.ones((4, 4), DTYPES["F8_E4M3"])}, {"quant_method": "fp8"}),
    "fp8-scale-of-another-grid": lambda: (
        {NAME: np.ones((4, 4), DTYPES["F8_E4M3"]), f"{NAME}_scale_inv": np.ones((2, 2), np.float32)},
        {"quant_method": "fp8"}),
    "gptq-without-scales": lambda: (gptq(scales=None), GPTQ),
    "gptq-of-other-bits": lambda: (gptq(), GPTQ | {"bits": 8}),
    "gptq-scales-alone": lambda: (gptq(qweight=None), GPTQ),
    "gptq-short-g-idx": lambda: (gptq(g_idx=np.zeros(5, np.int32)), GPTQ),
    "awq-without-zeros": lambda: (gptq(qzeros=None, g_idx=None), AWQ),
    "awq-uneven-groups": lambda: (
        {"model.q_proj.qweight": np.zeros((16, 2), np.int32), "model.q_proj.qzeros": np.zeros((3, 2), np.int32),
         "model.q_proj.scales": np.ones((3, 16), np.float16)}, AWQ),
    "packed-without-shape": lambda: (packed(weight_shape=None), packed_config()),
    "packed-of-other-shape": lambda: (packed(weight_shape=np.array([4, 17])), packed_config()),
    "packed-of-negative-shape": lambda: (packed(weight_shape=np.array([-4, 16])), packed_config()),
    "packed-short-scale": lambda: (packed(weight_scale=np.ones((3, 2), np.float16)), packed_config()),
    "packed-scale-alone": lambda: (packed(weight_packed=None), packed_config()),
    "packed-without-its-zeros": lambda: (packed(), packed_config(weights={
        "num_bits": 4, "type": "int", "strategy": "group", "symmetric": False})),
    "8-bit-without-scale": lambda: ({NAME: np.ones((4, 4), np.int8)}, plain_config()),
    "8-bit-scale-alone": lambda: ({f"{NAME}_scale": np.ones((4, 1), np.float32)}, plain_config()),
    "8-bit-scale-of-another-grid": lambda: (
        {NAME: np.ones((4, 4), np.int8), f"{NAME}_scale": np.ones((3, 1), np.float32)}, plain_config()),
    "8-bit-with-zeros": lambda: (
        {NAME: np.ones((4, 4), np.int8), f"{NAME}_scale": np.ones((4, 1), np.float32),
         f"{NAME}_zero_point": np.ones((4, 1), np.int8)}, plain_config()),
    "mxfp4-without-scales": lambda: ({"w_blocks": np.zeros((1, 2, 1, 16), np.uint8)}, {"quant_method": "mxfp4"}),
    "mxfp4-scales-alone": lambda: ({"w_scales": np.zeros((1, 2, 1), np.uint8)}, {"quant_method": "mxfp4"}),
    "mxfp4-of-other-blocks": lambda: (
        {"w_blocks": np.zeros((1, 2, 1, 8), np.uint8), "w_scales": np.zeros((1, 2, 1), np.uint8)},
        {"quant_method": "mxfp4"}),
    "config-of-another-type": lambda: ({NAME: np.ones((4, 4), np.float32)}, "nf4"),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_a_layer_that_is_not_whole_is_corrupt(tmp_path: Path, case: str) -> None:
    """Nothing is guessed: a missing, short or contradictory companion fails when the base is opened, and is named."""
    tensors, quantisation = BREAKS[case]()
    base = quantised_base(tmp_path / "base", tensors, quantisation)
    with pytest.raises(CorruptFileError) as caught:
        open_checkpoint(base)
    assert caught.value.remedy


def test_an_int8_layout_for_a_gpu_is_refused(tmp_path: Path) -> None:
    """weight_format 1 and 2 interleave rows for Turing and Ampere: not decoded as if they were rows."""
    tensors = {NAME: np.ones((4, 4), np.int8), "model.q_proj.SCB": np.ones(4, np.float32),
               "model.q_proj.weight_format": np.ones((), np.uint8)}  # fmt: skip
    base = quantised_base(tmp_path / "base", tensors, INT8)
    with pytest.raises(UnsupportedQuantisationError, match="layout"):
        open_checkpoint(base)


def test_awq_that_scales_an_activation_is_refused(tmp_path: Path) -> None:
    """`act.scales` belongs to no layer of the unquantised model: leaving it out would change the model."""
    base = quantised_base(tmp_path / "base", {"model.mlp.act.scales": np.ones(8, np.float16)}, AWQ)
    with pytest.raises(UnsupportedQuantisationError, match="scales an activation"):
        open_checkpoint(base)


@pytest.mark.parametrize("wrong", [-1, 2, 1 << 30])
def test_a_group_that_does_not_exist_stops_the_run(tmp_path: Path, wrong: int) -> None:
    """A g_idx out of range is found when it is read, named, and nothing is written."""
    groups = np.arange(16, dtype=np.int32) // 8
    groups[3] = wrong
    base = quantised_base(tmp_path / "base", gptq(g_idx=groups), GPTQ)
    with pytest.raises(CorruptFileError, match=r"q_proj\.g_idx"):
        compose_folders(base, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gptq_base_with_a_lora_is_the_decoded_weight_plus_the_delta(tmp_path: Path) -> None:
    """Oracle: decoded + s·B·A in float64; the output has a plain weight, no packed tensor, and the model's own dtype."""
    tensors = gptq(qweight=random().integers(-(2**31), 2**31, (2, 16)).astype(np.int32))
    base = quantised_base(tmp_path / "base", tensors, GPTQ, torch_dtype="float16")
    lora = write_lora(tmp_path / "lora", {"model.q_proj": (16, 16)})
    (base / "quantize_config.json").write_text("{}")
    compose_folders(base, [(lora, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    written = read_tensors(tmp_path / "out")
    assert set(written) == {NAME}
    a, b = (spec.read().astype(np.float64) for spec in read_header(lora / "adapter_model.safetensors").tensors.values())
    exact = decoded(base)[NAME] + 2 * (b @ a)
    assert written[NAME].dtype == torch.float16
    assert np.allclose(written[NAME].double().numpy(), exact, rtol=2**-11 + 1e-6, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], "torch_dtype" in config, "quantization_config" in config) == ("float16", False, False)


def test_an_adapter_binds_by_the_decoded_shape(tmp_path: Path) -> None:
    """[out, in] of the quant_state, not the bytes of the file; another width is refused with both shapes."""
    base = quantised_base(tmp_path / "base", four_bit(6, 10), FOUR_BIT)
    assert open_checkpoint(base).shapes == {NAME: (6, 10)}
    assert plan_folders(base, [(write_lora(tmp_path / "fits", {"model.q_proj": (6, 10)}), 1.0)]).touched == 1
    with pytest.raises(TargetMismatchError, match=r"expects \[6, 12\], the base has \[6, 10\]"):
        plan_folders(base, [(write_lora(tmp_path / "wide", {"model.q_proj": (6, 12)}), 1.0)])


def test_the_catalogue_takes_a_quantised_base_by_its_own_bytes(registry: Any, tmp_path: Path) -> None:
    """`base add` hashes what is stored and lists what it decodes to; a LoRA binds by shape and composes."""
    from composer.recipe import parse_recipe
    from registry.fingerprint import fingerprint_checkpoint

    lora = nf4_lora(tmp_path)
    info = registry.add_base(NF4_LLAMA, name="tiny-nf4")
    checkpoint = open_checkpoint(NF4_LLAMA)
    assert info.fingerprint == fingerprint_checkpoint(checkpoint).identity
    assert {leaf.name for leaf in fingerprint_checkpoint(checkpoint).leaves} == set(
        read_header(NF4_LLAMA / "model.safetensors").tensors
    )
    assert info.dtype == "bitsandbytes 4-bit"
    assert info.tensors == len(checkpoint.tensors) == 12
    assert info.parameters == sum(int(np.prod(shape)) for shape in checkpoint.shapes.values())
    assert registry.add_base(NF4_LLAMA, name="tiny-nf4").tensors == 12
    registry.publish(lora, name="team/qlora", base="tiny-nf4")
    recipe = parse_recipe("tiny-nf4+team/qlora")
    assert registry.plan(recipe).touched == 7
    registry.compose(recipe, tmp_path / "out")
    compose_folders(NF4_LLAMA, [(lora, 1.0)], tmp_path / "direct")
    a, b = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "direct")
    assert all(torch.equal(a[name], tensor) for name, tensor in b.items())


def test_other_scales_are_another_base(tmp_path: Path) -> None:
    """The fingerprint covers the companions: one changed scale is other weights."""
    from registry.fingerprint import fingerprint_checkpoint, logical_leaves

    one = quantised_base(tmp_path / "one", four_bit(), FOUR_BIT)
    two = quantised_base(tmp_path / "two", four_bit(absmax=np.ones(4, np.float32)), FOUR_BIT)
    checkpoints = [open_checkpoint(folder) for folder in (one, two)]
    prints = [fingerprint_checkpoint(checkpoint) for checkpoint in checkpoints]
    assert prints[0].tensor_root != prints[1].tensor_root
    leaves = [logical_leaves(*pair) for pair in zip(checkpoints, prints, strict=True)]
    assert [[(leaf.name, leaf.shape) for leaf in found] for found in leaves] == [[(NAME, (6, 10))]] * 2
    assert leaves[0][0].digest != leaves[1][0].digest


def test_no_scheme_imports_a_heavy_library() -> None:
    """Every scheme is listed, and decoding needs numpy only."""
    import subprocess
    import sys

    code = "from composer.quantised import schemes; schemes(); import sys; print([m for m in ('torch', 'bitsandbytes', 'gguf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert sorted(schemes()) == [
        "awq", "bitsandbytes 4-bit", "bitsandbytes int8", "compressed-tensors", "compressed-tensors 8", "fp8", "gguf",
        "gptq", "mxfp4",
    ]  # fmt: skip


def test_a_decoded_base_exports_to_onnx_as_the_plain_model_does() -> None:
    """The exporter's check looks at what is composed; a quantisation that cannot be decoded is still refused."""
    from composer.errors import UnsupportedArchitectureError
    from composer.exporters import find_exporter

    checkpoint = open_checkpoint(NF4_LLAMA)
    find_exporter("onnx").check(checkpoint)
    assert "quantization_config" in checkpoint.config
    unread = dataclasses.replace(checkpoint, scheme=None)
    with pytest.raises(UnsupportedArchitectureError, match="quantised"):
        find_exporter("onnx").check(unread)


def test_a_config_without_a_quantisation_is_left_as_it_is(tmp_path: Path) -> None:
    """null and {} mean none: config.json goes along byte for byte."""
    for name, value in (("null", None), ("empty", {})):
        base = quantised_base(tmp_path / name, {NAME: np.ones((4, 4), np.float32)}, value)
        assert open_checkpoint(base).scheme is None
        compose_folders(base, [], tmp_path / f"{name}-out")
        assert (tmp_path / f"{name}-out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
