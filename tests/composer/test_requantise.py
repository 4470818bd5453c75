"""Results written quantised as their base is: the bits of bitsandbytes, what survives, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import composer.plan as plan_module
import composer.requantise as requantise_module
from composer.adapters import open_adapter
from composer.checkpoint import open_checkpoint
from composer.errors import ErasedAdapterError, RecipeError, UnsupportedQuantisationError
from composer.plan import Plan, Term, make_plan
from composer.quantised import Encodable, Encoder, QuantisedTensor
from composer.recipe import Dtype, Export, Recipe
from composer.requantise import check_requantise
from composer.run import compose
from composer.tensors import read_header
from tests.support import compose_folders, read_tensors, reshard, weight_bytes, write_base, write_lora

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantised"
NF4 = FIXTURES / "tiny-llama-nf4"
CASES = ("nf4", "fp4", "nf4_nested", "fp4_nested", "nf4_odd", "nf4_many_blocks")
FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def plan_of(base: Path, adapters: list[tuple[Path, float]], original: Path | None = None, **fields: Any) -> Plan:
    """A plan that quantises its result again, merged into `original` where one is given."""
    terms = [Term(path.name, open_adapter(path), weight) for path, weight in adapters]
    recipe = Recipe(base="base", requantise=True, **fields)
    return make_plan(recipe, open_checkpoint(original or base), terms, open_checkpoint(base))


def lora_on(base: Path, folder: Path, std: float, seed: int = 0) -> Path:
    """On all projections of `base`."""
    shapes = {name.removesuffix(".weight"): shape for name, shape in open_checkpoint(base).shapes.items()}
    modules = {name: shape for name, shape in shapes.items() if name.endswith("_proj")}
    return write_lora(folder, modules, std=std, seed=seed)


def encoders(base: Path) -> dict[str, Encoder]:
    """One a quantised layer."""
    decoders = {n: t.decoder for n, t in open_checkpoint(base).tensors.items() if isinstance(t, QuantisedTensor)}
    assert decoders
    assert all(isinstance(decoder, Encodable) for decoder in decoders.values())
    return {name: decoder.encoder() for name, decoder in decoders.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("height", [1, 1000])
def test_4_bit_layers_are_encoded_as_bitsandbytes_does(tmp_path: Path, case: str, height: int) -> None:
    """Its own output for other numbers. Nested scales: by nearest code, one off in 1% at most from its table's."""
    stored = {name: spec.read() for name, spec in read_header(FIXTURES / "bitsandbytes.safetensors").tensors.items()}
    new = {
        name: spec.read() for name, spec in read_header(FIXTURES / "bitsandbytes_encoded.safetensors").tensors.items()
    }
    mine = {
        name.replace(case, "q_proj", 1): array for name, array in stored.items() if name.startswith(f"{case}.weight")
    }
    base = write_base(tmp_path / "base", mine, quantization_config=FOUR_BIT)
    [encoder] = encoders(base).values()
    values = new[f"{case}.input"].astype(np.float32)
    step = encoder.step * height
    for start in reversed(range(0, len(values), step)):
        encoder.encode(start, values[start : start + step])
    for part in encoder.finish().parts:
        expected = new[part.name.replace("q_proj", case, 1)].reshape(-1).view(np.uint8)
        found = np.frombuffer(part.read_bytes(0, part.nbytes), np.uint8)
        if "quant_state" in part.name and "nested" in bytes(found).decode():
            one, other = json.loads(bytes(found)), json.loads(bytes(expected))
            assert one.pop("nested_offset") == pytest.approx(other.pop("nested_offset"), rel=1e-6)
            assert one == other
        elif part.name.endswith("nested_absmax"):
            np.testing.assert_allclose(found.view(np.float32), expected.view(np.float32), rtol=1e-5)
        elif part.name.endswith("absmax") and part.dtype == "U8":
            assert np.count_nonzero(found != expected) <= 0.01 * found.size
        else:
            assert np.array_equal(found, expected)


def test_int8_rows_are_encoded_as_bitsandbytes_does(tmp_path: Path) -> None:
    """Its own output for other numbers, bit for bit; a row of zeros stays one."""
    stored = {name: spec.read() for name, spec in read_header(FIXTURES / "bitsandbytes.safetensors").tensors.items()}
    new = {
        name: spec.read() for name, spec in read_header(FIXTURES / "bitsandbytes_encoded.safetensors").tensors.items()
    }
    tensors = {f"q_proj.{part}": stored[f"int8.{part}"] for part in ("SCB", "weight", "weight_format")}
    base = write_base(tmp_path / "base", tensors, quantization_config={"load_in_8bit": True})
    for values, expected in ((new["int8.input"], new["int8.weight"]), (np.zeros((9, 33)), np.zeros((9, 33)))):
        [encoder] = encoders(base).values()
        for start in (5, 0):
            encoder.encode(start, values[start : start + 5 if start == 0 else None].astype(np.float32))
        weight, scale, _ = encoder.finish().parts
        assert np.array_equal(weight.read(), expected)
        assert np.array_equal(scale.read(), new["int8.SCB"] if expected.any() else np.zeros(9, np.float32))


def test_an_int8_base_is_written_as_one(tmp_path: Path) -> None:
    """Every row after the merge, times 127 over its largest, rounded: in float64 from what was merged to fp16."""
    random = np.random.default_rng(0)
    tensors = {
        "model.q_proj.SCB": np.ones(6, np.float32), "model.q_proj.weight": random.integers(-127, 128, (6, 8), np.int8),
        "model.q_proj.weight_format": np.zeros((), np.uint8),
    }  # fmt: skip
    base = write_base(tmp_path / "base", tensors, quantization_config={"load_in_8bit": True})
    lora = write_lora(tmp_path / "lora", {"model.q_proj": (6, 8)})
    compose(plan_of(base, [(lora, 1.0)]), tmp_path / "out")
    compose_folders(base, [(lora, 1.0)], tmp_path / "merged", dtype=Dtype.FP16)
    merged = read_tensors(tmp_path / "merged")["model.q_proj.weight"].double().numpy()
    found = {name: tensor.numpy() for name, tensor in read_tensors(tmp_path / "out").items()}
    top = np.abs(merged).max(axis=1)
    assert np.array_equal(found["model.q_proj.SCB"], top.astype(np.float32))
    assert np.array_equal(found["model.q_proj.weight"], np.rint(merged * 127 / top[:, None]))
    assert found["model.q_proj.weight_format"] == 0


def test_what_is_encoded_decodes_to_the_nearest_of_its_grid(tmp_path: Path) -> None:
    """Oracle: all 16 values of each block in float64, for what the scales of the result allow."""
    base = write_base(tmp_path / "base", _layer(), quantization_config=FOUR_BIT)
    [encoder] = encoders(base).values()
    values = np.random.default_rng(3).normal(size=(24, 40)).astype(np.float32)
    encoder.encode(0, values)
    layer = encoder.finish()
    levels = next(part for part in layer.parts if part.name.endswith("quant_map")).read().astype(np.float64)
    scales = next(part for part in layer.parts if part.name.endswith(".absmax")).read().astype(np.float64)
    grid = np.repeat(scales, 64)[: values.size, None] * levels
    distance = np.abs(grid - values.reshape(-1, 1)).min(axis=1)
    found = np.abs(layer.rows(0, 24).reshape(-1) - values.reshape(-1))
    np.testing.assert_allclose(found, distance, atol=1e-6)


def _layer(rows: int = 24, columns: int = 40) -> dict[str, np.ndarray]:
    stored = {name: spec.read() for name, spec in read_header(FIXTURES / "bitsandbytes.safetensors").tensors.items()}
    count = rows * columns
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [rows, columns]}
    return {
        "q_proj.weight": np.zeros((count // 2, 1), np.uint8),
        "q_proj.weight.absmax": np.zeros(count // 64, np.float32),
        "q_proj.weight.quant_map": stored["nf4.weight.quant_map"],
        "q_proj.weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16 weights of which the NF4 Llama could have been made: what it decodes to, and 12% of noise."""
    root = tmp_path_factory.mktemp("source")
    compose_folders(NF4, [], root / "decoded")
    random = np.random.default_rng(0)
    tensors = {}
    for name, spec in read_header(root / "decoded" / "model.safetensors").tensors.items():
        array = spec.read()
        noise = 0.12 * float(np.std(array.astype(np.float32))) * random.normal(size=array.shape)
        tensors[name] = (array.astype(np.float32) + (noise if name.endswith("proj.weight") else 0)).astype(array.dtype)
    config = json.loads((root / "decoded" / "config.json").read_text())
    return write_base(root / "source", tensors, **config)


def test_a_result_is_what_merging_and_then_encoding_gives(tmp_path: Path, source: Path) -> None:
    """Oracle: compose to bf16, then encode each layer of that; the rest has the base's bytes; the folder reads back."""
    lora = lora_on(NF4, tmp_path / "lora", 0.2)
    compose(plan_of(NF4, [(lora, 0.7)]), tmp_path / "out")
    compose_folders(NF4, [(lora, 0.7)], tmp_path / "merged")
    merged = open_checkpoint(tmp_path / "merged").tensors
    found = open_checkpoint(tmp_path / "out")
    for name, encoder in encoders(NF4).items():
        encoder.encode(0, merged[name].read().astype(np.float32))  # type: ignore[union-attr]
        for part in encoder.finish().parts:
            spec = found.stored[part.name]
            assert spec.read_bytes(0, spec.nbytes) == part.read_bytes(0, part.nbytes)
    base = open_checkpoint(NF4)
    for name, spec in base.tensors.items():
        if not isinstance(spec, QuantisedTensor):
            assert found.stored[name].read_bytes(0, spec.nbytes) == spec.read_bytes(0, spec.nbytes)
    assert (tmp_path / "out" / "config.json").read_bytes() == (NF4 / "config.json").read_bytes()
    assert found.scheme is not None
    assert set(read_tensors(tmp_path / "out")) == set(read_tensors(NF4))  # safetensors' own reader takes the file


def test_without_an_adapter_the_bases_own_tensors_are_written(tmp_path: Path, source: Path) -> None:
    """Every stored tensor, also where the original would be merged into."""
    for name, original in (("own", None), ("original", source)):
        compose(plan_of(NF4, [], original), tmp_path / name)
        expected, found = read_tensors(NF4), read_tensors(tmp_path / name)
        assert set(found) == set(expected)
        assert all(found[key].equal(tensor) for key, tensor in expected.items())


def test_a_small_adapter_is_refused_and_survives_in_the_original(tmp_path: Path, source: Path) -> None:
    """The grid swallows what is merged into its own numbers, and not what lies between them."""
    lora = lora_on(NF4, tmp_path / "lora", 0.008)
    with pytest.raises(ErasedAdapterError, match="lora is left") as caught:
        compose(plan_of(NF4, [(lora, 1.0)]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
    assert caught.value.found < 0.1
    forced = compose(plan_of(NF4, [(lora, 1.0)], min_survival=0), tmp_path / "forced")
    assert forced.record["adapters"][0]["survival"] == caught.value.found
    assert any("survives the quantisation" in line for line in forced.record["warnings"])
    kept = compose(plan_of(NF4, [(lora, 1.0)], source), tmp_path / "kept")
    assert kept.record["adapters"][0]["survival"] > 0.5
    assert kept.record["export"]["quantisation"] == "bitsandbytes 4-bit"


def test_survival_is_the_projection_of_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: both models decoded whole, in float64; and measured on a sample, near it."""
    lora = lora_on(NF4, tmp_path / "lora", 0.025)
    out = compose(plan_of(NF4, [(lora, 1.0)]), tmp_path / "out")
    compose_folders(NF4, [(lora, 1.0)], tmp_path / "exact", dtype=Dtype.FP32)
    compose_folders(NF4, [], tmp_path / "before", dtype=Dtype.FP32)
    compose_folders(tmp_path / "out", [], tmp_path / "after", dtype=Dtype.FP32)
    exact, before, after = (read_tensors(tmp_path / name) for name in ("exact", "before", "after"))
    names = [name for name in exact if name.endswith("proj.weight")]
    delta = np.concatenate([(exact[n].double() - before[n].double()).numpy().ravel() for n in names])
    change = np.concatenate([(after[n].double() - before[n].double()).numpy().ravel() for n in names])
    expected = change @ delta / (delta @ delta)
    assert 0.1 < expected < 0.9
    assert out.record["adapters"][0]["survival"] == pytest.approx(expected, abs=2e-3)
    monkeypatch.setattr(requantise_module, "SAMPLE", 512)
    sampled = compose(plan_of(NF4, [(lora, 1.0)]), tmp_path / "sampled")
    assert sampled.record["adapters"][0]["survival"] == pytest.approx(expected, abs=0.15)


def test_bytes_depend_on_neither_blocks_nor_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a method that takes whole tensors; shards give the same tensors."""
    adapters = [(lora_on(NF4, tmp_path / "one", 0.2), 1.0), (lora_on(NF4, tmp_path / "two", 0.2, seed=1), 0.5)]
    for method in ("linear", "ties"):
        files = []
        for threads, block in ((1, 1 << 20), (4, 1)):
            monkeypatch.setattr(requantise_module, "THREADS", threads)
            monkeypatch.setattr(plan_module, "BLOCK_BYTES", block)
            out = tmp_path / f"{method}-{threads}"
            compose(plan_of(NF4, adapters, method=method), out)
            files.append(weight_bytes(out))
        assert files[0] == files[1]
    sharded = reshard(NF4, tmp_path / "sharded")
    compose(plan_of(sharded, adapters, method="ties"), tmp_path / "sharded-out")
    expected, found = read_tensors(tmp_path / "ties-1"), read_tensors(tmp_path / "sharded-out")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    index = json.loads((tmp_path / "sharded-out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_what_cannot_be_written_so_is_refused(tmp_path: Path, source: Path) -> None:
    """An unquantised base, a scheme that is only read, another dtype or export."""
    with pytest.raises(UnsupportedQuantisationError, match="is not quantised"):
        compose(plan_of(source, []), tmp_path / "out")
    import ml_dtypes

    config = {"quant_method": "fp8", "weight_block_size": [4, 8]}
    layer = {
        "q_proj.weight": np.zeros((4, 8), ml_dtypes.float8_e4m3fn),
        "q_proj.weight_scale_inv": np.ones((1, 1), np.float32),
    }
    with pytest.raises(UnsupportedQuantisationError, match="cannot be written as"):
        compose(plan_of(write_base(tmp_path / "fp8", layer, quantization_config=config), []), tmp_path / "out")
    for fields in ({"dtype": Dtype.FP16}, {"export": Export.ONNX}, {"export": Export.PEFT}):
        with pytest.raises(RecipeError, match="requantise writes"):
            compose(plan_of(NF4, [], **fields), tmp_path / "out")
    with pytest.raises(RecipeError, match="has others"):
        check_requantise(replace(plan_of(NF4, []), layers=(0, 0)))
