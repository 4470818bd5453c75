"""Full fine-tunes as deltas: the same files come back, weight 1 gives the same bits, other weights a float64 sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from composer.adapters import open_adapter
from composer.checkpoint import open_checkpoint
from composer.checkpoint_delta import Made, make_delta, restore
from composer.deltas_checkpoint import pack, unpack
from composer.errors import (
    CorruptFileError,
    IncompatibleError,
    IntegrityError,
    TargetMismatchError,
    UnsupportedAdapterError,
)
from composer.files import sha256_file
from composer.recipe import Dtype
from composer.tensors import DTYPES, read_header
from tests.support import (
    compose_folders,
    edit_json,
    plan_folders,
    read_tensors,
    reshard,
    write_base,
    write_lora,
    write_tensors,
)


def finetuned(base: Path, folder: Path, *, seed: int = 0, std: float = 1e-3) -> Path:
    """Every tensor of `base` moved a little, in its own dtype; some numbers become zeros of both signs, some large."""
    import shutil

    random = np.random.default_rng(seed)
    tensors = {}
    for name, spec in read_header(base / "model.safetensors").tensors.items():
        moved = spec.read().astype(np.float32) + random.normal(0, std, spec.shape).astype(np.float32)
        flat = moved.reshape(-1)
        flat[:3] = [-0.0, 1e-30, 3e4]
        tensors[name] = moved.astype(DTYPES[spec.dtype])
    shutil.copytree(base, folder)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt", "made": "by hand"})
    edit_json(folder / "config.json", note="a field of its own")
    return folder


def made(finetune: Path, base: Path, out: Path) -> Made:
    """Make a delta of folders."""
    return make_delta(open_checkpoint(finetune), open_checkpoint(base), out)


def digests(folder: Path) -> dict[str, str]:
    """sha256 by file name."""
    return {path.name: sha256_file(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def float_bases(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama in each number format."""
    found = {"BF16": tiny_llama}
    for name in ("F16", "F32"):
        folder = tmp_path_factory.mktemp("models") / name
        header = read_header(tiny_llama / "model.safetensors")
        arrays = {key: spec.read().astype(np.float32).astype(DTYPES[name]) for key, spec in header.tensors.items()}
        found[name] = write_base(folder, arrays)
    return found


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_same_files_come_back(float_bases: dict[str, Path], tmp_path: Path, name: str, shards: int) -> None:
    """SHA-256 of every file: weights in their own layout and sharding, config, index."""
    base = float_bases[name]
    tuned = finetuned(base, tmp_path / "tuned")
    if shards > 1:
        tuned = reshard(tuned, tmp_path / "sharded", shards)
    made(tuned, base, tmp_path / "delta")
    restore(open_adapter(tmp_path / "delta"), open_checkpoint(base), tmp_path / "back")
    assert digests(tmp_path / "back") == digests(tuned)


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
def test_weight_1_gives_the_fine_tunes_own_bits(float_bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Zeros of both signs and numbers far below the base's included, where W + (W' − W) in float32 would not."""
    base = float_bases[name]
    tuned = finetuned(base, tmp_path / "tuned")
    made(tuned, base, tmp_path / "delta")
    compose_folders(base, [(tmp_path / "delta", 1.0)], tmp_path / "out")
    written = read_header(tmp_path / "out" / "model.safetensors").tensors
    expected = read_header(tuned / "model.safetensors").tensors
    assert set(written) == set(expected)
    assert all(
        written[key].read_bytes(0, spec.nbytes) == spec.read_bytes(0, spec.nbytes) for key, spec in expected.items()
    )
    wide = compose_folders(base, [(tmp_path / "delta", 1.0)], tmp_path / "wide", dtype=Dtype.FP32)
    exact = {key: tensor.float() for key, tensor in read_tensors(tuned).items()}
    assert all(torch.equal(tensor, exact[key]) for key, tensor in read_tensors(tmp_path / "wide").items())
    assert wide.record["adapters"][0]["survival"] == 1.0


def test_other_weights_and_other_adapters_add_up(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """Oracle: W + 0.3·(W' − W) + s·B·A in float64, to the rounding of float32."""
    tuned = finetuned(tiny_llama, tmp_path / "tuned")
    made(tuned, tiny_llama, tmp_path / "delta")
    compose_folders(tiny_llama, [(tmp_path / "delta", 0.3), (tiny_lora, 1.0)], tmp_path / "out", dtype=Dtype.FP32)
    old, new, out = (read_tensors(folder) for folder in (tiny_llama, tuned, tmp_path / "out"))
    lora = open_adapter(tiny_lora)
    changes = {
        delta.target: delta.scale * delta.b.read().astype(float) @ delta.a.read().astype(float)
        for delta in lora.deltas(lora.bind(open_checkpoint(tiny_llama).shapes).names)
    }
    assert changes
    for name, tensor in out.items():
        base = old[name].double().numpy()
        expected = base + 0.3 * (new[name].double().numpy() - base) + changes.get(name, 0)
        np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_a_tied_embedding_may_change(tmp_path: Path) -> None:
    """A delta changes what is stored, so both ends of a tied pair move, as in the fine-tune itself."""
    tensors = {"model.embed_tokens.weight": np.ones((6, 4), np.float32)}
    base = write_base(tmp_path / "base", tensors, tie_word_embeddings=True)
    tuned = write_base(tmp_path / "tuned", {key: value * 2 for key, value in tensors.items()}, tie_word_embeddings=True)
    made(tuned, base, tmp_path / "delta")
    compose_folders(base, [(tmp_path / "delta", 1.0)], tmp_path / "out")
    assert torch.equal(read_tensors(tmp_path / "out")["model.embed_tokens.weight"], torch.full((6, 4), 2.0))


def test_another_base_is_noticed(tiny_llama: Path, tmp_path: Path) -> None:
    """One number of the base changed: composing and restoring fail and write nothing; in fp32 the base is another one too."""
    tuned = finetuned(tiny_llama, tmp_path / "tuned")
    made(tuned, tiny_llama, tmp_path / "delta")
    other = finetuned(tiny_llama, tmp_path / "other", std=0)
    for weight in (1.0, 0.5):
        with pytest.raises(TargetMismatchError, match="another base"):
            compose_folders(other, [(tmp_path / "delta", weight)], tmp_path / "out")
    with pytest.raises((TargetMismatchError, IntegrityError)):
        restore(open_adapter(tmp_path / "delta"), open_checkpoint(other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_untouched_tensor_costs_nothing_and_is_still_verified(tmp_path: Path) -> None:
    """Only what differs is stored; a base whose other tensors changed does not restore."""
    tensors = {"a.weight": np.ones((8, 8), np.float32), "b.weight": np.zeros((8, 8), np.float32)}
    base = write_base(tmp_path / "base", tensors)
    tuned = write_base(tmp_path / "tuned", tensors | {"a.weight": tensors["a.weight"] * 3})
    assert made(tuned, base, tmp_path / "delta").tensors == 1
    stored = read_header(tmp_path / "delta" / "adapter_model.safetensors").tensors
    assert set(stored) == {"a.weight.bits", "a.weight.rows"}
    changed = write_base(tmp_path / "changed", tensors | {"b.weight": tensors["a.weight"]})
    with pytest.raises(IntegrityError, match="not the file"):
        restore(open_adapter(tmp_path / "delta"), open_checkpoint(changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fine_tune_is_stored_in_fewer_bytes(tmp_path: Path) -> None:
    """A small change of a bf16 matrix: signs and exponents hardly move, so less than 70% of it is stored."""
    weights = np.random.default_rng(0).normal(0, 0.02, (512, 512)).astype(np.float32)
    bf16 = DTYPES["BF16"]
    moved = weights + np.random.default_rng(1).normal(0, 2e-5, weights.shape).astype(np.float32)
    base = write_base(tmp_path / "base", {"q.weight": weights.astype(bf16)})
    tuned = write_base(tmp_path / "tuned", {"q.weight": moved.astype(bf16)})
    made(tuned, base, tmp_path / "delta")
    stored = read_header(tmp_path / "delta" / "adapter_model.safetensors").tensors["q.weight.bits"]
    assert stored.nbytes < 0.7 * weights.size * 2


def test_packing_is_undone_and_damage_is_named(tmp_path: Path) -> None:
    """Any bits, any shape; too few, too many, cut or foreign bytes are a CorruptFileError."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, (5, 7), np.uint32)
    packed = pack(bits)
    cases = {
        "good": packed,
        "cut": packed[:-4],
        "foreign": packed[::-1].copy(),
        "more": np.concatenate([packed, packed]),
    }
    path = write_tensors(tmp_path / "t.safetensors", cases)
    specs = read_header(path).tensors
    assert np.array_equal(unpack(specs["good"], "F32", (5, 7)), bits.reshape(-1))
    for name, shape in (("cut", (5, 7)), ("foreign", (5, 7)), ("more", (5, 7)), ("good", (5, 6)), ("good", (5, 8))):
        with pytest.raises(CorruptFileError):
            unpack(specs[name], "F32", shape)


def test_what_has_no_delta_is_refused(tmp_path: Path, tiny_lora: Path) -> None:
    """Equal weights, another number format, other shapes, an adapter that is no delta."""
    base = write_base(tmp_path / "base", {"q.weight": np.ones((4, 4), np.float32)})
    cases: list[tuple[np.ndarray, type[Exception]]] = [
        (np.ones((4, 4), np.float32), IncompatibleError),
        (np.ones((4, 4), np.float16), UnsupportedAdapterError),
        (np.ones((4, 5), np.float32), TargetMismatchError),
    ]
    for index, (array, error) in enumerate(cases):
        tuned = write_base(tmp_path / f"tuned{index}", {"q.weight": array})
        with pytest.raises(error):
            made(tuned, base, tmp_path / "delta")
        assert not (tmp_path / "delta").exists()
    with pytest.raises(UnsupportedAdapterError, match="lora"):
        restore(open_adapter(tiny_lora), open_checkpoint(base), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"format_version": 2}, UnsupportedAdapterError),
        ({"tensors": {"q.weight": {"dtype": "I8", "shape": [4, 4]}}}, CorruptFileError),
        ({"tensors": {"q.weight": {"dtype": "F32", "shape": [5, 4]}}}, CorruptFileError),
        ({"tensors": {}}, CorruptFileError),
        ({"shards": [{"name": "../x", "header": "", "sha256": ""}]}, CorruptFileError),
        ({"shards": []}, CorruptFileError),
        ({"files": {"a/b": {"sha256": ""}}}, CorruptFileError),
        ({"files": {"config.json": {"sha256": "0", "data": "!"}}}, CorruptFileError),
        ({"files": {"config.json": {"sha256": "0"}}}, IntegrityError),
    ],
)  # fmt: skip
def test_a_config_that_was_changed_is_refused(tmp_path: Path, changes: dict[str, Any], error: type[Exception]) -> None:
    """Nothing is written, inside the folder or out of it."""
    base = write_base(tmp_path / "base", {"q.weight": np.ones((4, 4), np.float32)})
    tuned = write_base(tmp_path / "tuned", {"q.weight": np.full((4, 4), 2, np.float32)})
    made(tuned, base, tmp_path / "delta")
    edit_json(tmp_path / "delta" / "adapter_config.json", **changes)
    with pytest.raises(error):
        restore(open_adapter(tmp_path / "delta"), open_checkpoint(base), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists() or not list((tmp_path / "deep").iterdir())


def test_a_large_delta_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never streamed adapter by adapter, which would decompress it for every block; the plan counts its bytes."""
    import composer.plan as plan_module

    monkeypatch.setattr(plan_module, "FACTOR_BYTES", 1)
    base = write_base(tmp_path / "base", {"q.weight": np.ones((64, 64), np.float32)})
    tuned = write_base(tmp_path / "tuned", {"q.weight": np.full((64, 64), 2, np.float32)})
    made(tuned, base, tmp_path / "delta")
    lora = write_lora(tmp_path / "lora", {"q": (64, 64)})
    plan = plan_folders(base, [(tmp_path / "delta", 1.0), (lora, 1.0)])
    assert not plan.jobs[0].streamed
    assert plan_folders(base, [(lora, 1.0), (lora, 1.0)]).jobs[0].streamed
    assert plan.peak_bytes > 2 * 64 * 64 * 4


def test_a_delta_is_a_way_back_from_a_composition(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """Made from the composed model to its base, it restores the base's files when only the composed model is left."""
    compose_folders(tiny_llama, [(tiny_lora, 1.0)], tmp_path / "composed")
    made(tiny_llama, tmp_path / "composed", tmp_path / "back")
    restore(open_adapter(tmp_path / "back"), open_checkpoint(tmp_path / "composed"), tmp_path / "base")
    original = digests(tiny_llama)
    assert digests(tmp_path / "base") == original
