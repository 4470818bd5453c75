"""LoRAs out of fine-tunes and at other ranks, against numpy's full float64 SVD and PEFT's forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from composer.adapters import open_adapter
from composer.checkpoint import open_checkpoint
from composer.errors import (
    IncompatibleError,
    NonFiniteError,
    TargetMismatchError,
    UnsupportedAdapterError,
    UsageError,
)
from composer.extract import Converted, extract_lora
from composer.factors import leading, truncate
from composer.resize import resize_lora
from composer.tensors import read_header
from tests.composer.exporters.test_peft import bases, dense, loaded, logits
from tests.conftest import random_lora
from tests.support import compose_folders, read_tensors, write_base, write_lora

__all__ = ["bases"]

SHAPES = {"model.layers.0.q_proj": (24, 16), "model.layers.0.down_proj": (12, 40)}


def random_matrix(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """float64, with singular values that fall off."""
    random = np.random.default_rng(seed)
    rank = min(shape)
    left, right = random.normal(size=(shape[0], rank)), random.normal(size=(rank, shape[1]))
    return left * 0.7 ** np.arange(rank) @ right


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (7, 7), (1, 9)])
@pytest.mark.parametrize(
    "size", [{"rank": 1}, {"rank": 5}, {"rank": 100}, {"energy": 0.9}, {"energy": 0.999}, {"energy": 1.0}]
)
def test_the_leading_part_is_that_of_the_full_svd(shape: tuple[int, int], size: dict[str, Any]) -> None:
    """Oracle: numpy's SVD in float64; both ways, from the dense matrix and from factors of it."""
    matrix = random_matrix(shape)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    held = np.cumsum(np.square(s)) / np.square(s).sum()
    k = min(size["rank"], min(shape)) if "rank" in size else int(np.sum(held < size["energy"] - 1e-12)) + 1
    best = u[:, :k] * s[:k] @ v[:k]
    for left, right, lost, total in (leading(matrix, **size), truncate(matrix, np.eye(shape[1]), **size)):
        np.testing.assert_allclose(left @ right, best, atol=1e-7 * s[0])
        assert lost == pytest.approx(np.square(s[k:]).sum(), rel=1e-6, abs=1e-12 * s[0] ** 2)
        assert total == pytest.approx(np.square(s).sum(), rel=1e-9)
        np.testing.assert_allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1), atol=1e-6 * s[0])
    if "energy" in size and size["energy"] < 1:
        assert leading(matrix, **size)[1].shape[0] == k


def extracted(finetune: Path, base: Path, out: Path, **options: Any) -> Converted:
    """Extract from folders."""
    return extract_lora(open_checkpoint(finetune), open_checkpoint(base), out, **options)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_merged_lora_is_recovered(bases: Any, tmp_path: Path, name: str) -> None:
    """A fine-tune that is base + rank 4: the extracted LoRA computes what it does, in PEFT and in our composer."""
    base = bases(name)
    modules = {"llama": "all-linear", "gpt2": ["c_attn", "c_proj", "c_fc"]}[name]
    lora = random_lora(base, tmp_path / "lora", target_modules=modules, fan_in_fan_out=name == "gpt2")
    compose_folders(base, [(lora, 1.0)], tmp_path / "finetune")
    result = extracted(tmp_path / "finetune", base, tmp_path / "out", rank=4)
    assert result.record["kept_energy"] > 1 - 1e-9
    found = {target.parameter: target.shape for target in open_adapter(tmp_path / "out").signature.targets}
    assert found == {target.parameter: target.shape for target in open_adapter(lora).signature.targets}
    for module, change in dense(base, [(lora, 1.0)]).items():
        np.testing.assert_allclose(dense(base, [(tmp_path / "out", 1.0)])[module], change, atol=2e-6)
    expected = logits(loaded(tmp_path / "finetune"))
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out")), expected, rtol=0, atol=2e-5)
    compose_folders(base, [(tmp_path / "out", 1.0)], tmp_path / "again")
    torch.testing.assert_close(logits(loaded(tmp_path / "again")), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_at_full_rank_a_fine_tune_is_reproduced_whole(bases: Any, tmp_path: Path, name: str) -> None:
    """Every tensor moved (gpt2: but the tied embedding): norms, biases and embeddings are carried as they are."""
    import transformers

    base = bases(name)
    torch.manual_seed(9)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not (name == "gpt2" and "wte" in key):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "finetune")
    result = extracted(tmp_path / "finetune", base, tmp_path / "out", rank=1 << 10)
    expected = logits(loaded(tmp_path / "finetune"))
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out")), expected, rtol=0, atol=2e-5)
    assert result.record["saved_whole"]
    ignored = extracted(tmp_path / "finetune", base, tmp_path / "linear", rank=1 << 10, ignore_rest=True)
    assert ignored.record["left_out"] == result.record["saved_whole"]
    only = read_header(tmp_path / "linear" / "adapter_model.safetensors").tensors
    assert all(".lora_" in key for key in only)
    assert (logits(loaded(base, tmp_path / "linear")) - expected).abs().max() > 1e-3


def pair(folder: Path, **changes: np.ndarray) -> tuple[Path, Path]:
    """A base and a fine-tune of two linear weights, with some tensors changed or added."""
    random = np.random.default_rng(1)
    weights = {f"{name}.weight": random.normal(size=shape) for name, shape in SHAPES.items()}
    weights |= {"model.embed_tokens.weight": random.normal(size=(10, 16)), "model.norm.weight": np.ones(16)}
    floats = {name: array.astype(np.float32) for name, array in weights.items()}
    tuned = {**floats, **{name.replace("__", "."): array.astype(np.float32) for name, array in changes.items()}}
    return write_base(folder / "base", floats), write_base(folder / "tuned", tuned)


def test_energy_chooses_a_rank_for_each_module(tmp_path: Path) -> None:
    """Oracle: numpy's singular values of the difference; the record says what is kept, by module and in all."""
    base, _ = pair(tmp_path)
    weights = {name: tensor.numpy() for name, tensor in read_tensors(base).items()}
    changes = {name: random_matrix(shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    tuned = weights | {
        f"{name}.weight": weights[f"{name}.weight"] + change.astype(np.float32) for name, change in changes.items()
    }
    result = extracted(write_base(tmp_path / "finetune", tuned), base, tmp_path / "out", energy=0.95)
    kept = whole = 0.0
    for module in SHAPES:
        change = tuned[f"{module}.weight"].astype(float) - weights[f"{module}.weight"].astype(float)
        squares = np.square(np.linalg.svd(change, compute_uv=False))
        k = int(np.sum(np.cumsum(squares) < 0.95 * squares.sum())) + 1
        header = read_header(tmp_path / "out" / "adapter_model.safetensors").tensors
        assert header[f"base_model.model.{module}.lora_A.weight"].shape[0] == k
        share = squares[:k].sum() / squares.sum()
        assert result.record["kept_energy_by_module"][module] == pytest.approx(share, abs=1e-5)
        kept, whole = kept + squares[:k].sum(), whole + squares.sum()
    assert result.record["kept_energy"] == pytest.approx(kept / whole, abs=1e-5)
    assert open_adapter(tmp_path / "out").signature.rank is not None


def test_what_cannot_be_extracted_is_refused(tmp_path: Path) -> None:
    """Equal checkpoints, other shapes, a tensor that is no linear weight of two dimensions, NaN, no size."""
    changed = random_matrix((24, 16)).astype(np.float32)
    base, same = pair(tmp_path / "same")
    _, other = pair(tmp_path / "other", model__norm__weight=np.ones(17))
    _, stacked = pair(tmp_path / "stacked", model__layers__0__q_proj__weight=changed)
    cases: list[tuple[Path, type[Exception], str, dict[str, Any]]] = [
        (same, IncompatibleError, "no linear weight differs", {"rank": 1}),
        (other, TargetMismatchError, "model.norm.weight", {"rank": 1}),
        (stacked, UsageError, "a rank or a share", {}),
        (stacked, UsageError, "a rank or a share", {"rank": 1, "energy": 0.5}),
        (stacked, UsageError, "a rank or a share", {"energy": 1.5}),
    ]
    tuned = {name.replace(".", "__"): tensor.numpy() for name, tensor in read_tensors(base).items()}
    tuned["model__layers__0__q_proj__weight"][0, 0] = np.nan
    cases.append((pair(tmp_path / "nan", **tuned)[1], NonFiniteError, "NaN", {"rank": 1}))
    for finetune, error, match, size in cases:
        with pytest.raises(error, match=match):
            extracted(finetune, base, tmp_path / "out", **size)
        assert not (tmp_path / "out").exists()


def test_a_changed_tensor_that_no_module_owns_needs_ignore_rest(tmp_path: Path) -> None:
    """MoE experts in one tensor, a changed tied embedding: refused by name, or left out and listed."""
    q = {"q_proj.weight": np.eye(4, dtype=np.float32)}
    for name, array, tie in (
        ("experts.gate_up", np.ones((2, 4, 4)), False),
        ("model.embed_tokens.weight", np.ones((9, 4)), True),
    ):
        folder = tmp_path / name
        old = {**q, name: array.astype(np.float32)}
        base = write_base(folder / "base", old, tie_word_embeddings=tie)
        tuned = write_base(folder / "tuned", {key: value * 2 for key, value in old.items()}, tie_word_embeddings=tie)
        with pytest.raises(IncompatibleError, match=name):
            extracted(tuned, base, folder / "out", rank=2)
        assert extracted(tuned, base, folder / "out", rank=2, ignore_rest=True).record["left_out"] == [name]


def test_a_smaller_rank_is_the_best_one(bases: Any, tmp_path: Path) -> None:
    """Oracle: numpy's SVD of each module's dense delta; PEFT loads the result with the same modules."""
    base = bases("gpt2")
    lora = random_lora(base, tmp_path / "lora", r=6, use_rslora=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True,
                       rank_pattern={"c_fc": 9})  # fmt: skip
    result = resize_lora(open_adapter(lora), tmp_path / "out", rank=3)
    new = dense(base, [(tmp_path / "out", 1.0)])
    for module, change in dense(base, [(lora, 1.0)]).items():
        u, s, v = np.linalg.svd(change, full_matrices=False)
        np.testing.assert_allclose(new[module], u[:, :3] * s[:3] @ v[:3], atol=1e-6)
        kept = np.square(s[:3]).sum() / np.square(s).sum()
        assert result.record["kept_energy_by_module"][module] == pytest.approx(kept, rel=1e-4)
    compose_folders(base, [(tmp_path / "out", 1.0)], tmp_path / "merged")
    found = logits(loaded(base, tmp_path / "out"))
    torch.testing.assert_close(found, logits(loaded(tmp_path / "merged")), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["use_rslora"]) == (3, {}, False)


@pytest.mark.parametrize("rank", [4, 16])
def test_a_rank_that_is_not_smaller_is_exact(bases: Any, tmp_path: Path, rank: int) -> None:
    """The same forward in PEFT, what is carried whole included; the file has the rank that was asked for."""
    base = bases("llama")
    lora = random_lora(base, tmp_path / "lora", target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    result = resize_lora(open_adapter(lora), tmp_path / "out", rank=rank)
    assert (result.record["kept_energy"], result.record["ranks"]) == (1.0, {"least": rank, "most": rank})
    expected = logits(loaded(base, lora))
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out")), expected, rtol=0, atol=1e-6)


def test_energy_keeps_at_least_its_share(tmp_path: Path) -> None:
    """A delta of numerical rank 2 at stored rank 8 shrinks to 2 when all its energy but 1e-9 is wanted."""
    lora = write_lora(tmp_path / "lora", {"q": (20, 30)}, rank=8)
    header = read_header(lora / "adapter_model.safetensors").tensors
    arrays = {name: spec.read().copy() for name, spec in header.items()}
    arrays["base_model.model.q.lora_B.weight"][:, 2:] = 0
    from tests.support import write_tensors

    write_tensors(lora / "adapter_model.safetensors", arrays)
    result = resize_lora(open_adapter(lora), tmp_path / "out", energy=1 - 1e-9)
    assert result.record["ranks"] == {"least": 2, "most": 2}
    for energy in (0.3, 0.9):
        assert resize_lora(open_adapter(lora), tmp_path / f"out{energy}", energy=energy).record["kept_energy"] >= energy


def test_what_has_no_rank_is_not_resized(bases: Any, tmp_path: Path) -> None:
    """DoRA's magnitudes do not follow a change of rank: refused, nothing written."""
    dora = random_lora(bases("llama"), tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(UnsupportedAdapterError, match="Dora"):
        resize_lora(open_adapter(dora), tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
