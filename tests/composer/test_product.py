"""The kernels: one chain of multiply-adds, the same bytes compiled and in numpy, at any size, and PEFT's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from composer.product import Factors, add_product, kernel_name, product
from tests.support import compose_folders, read_tensors, weight_bytes, write_base, write_lora

SHAPES = [(1, 1, 1), (3, 16, 500), (4, 8, 16), (5, 9, 33), (64, 1, 512), (67, 17, 515), (130, 192, 600)]


def factors(rows: int, rank: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random left [rows, rank] and right [rank, columns] over many orders of magnitude, float32."""
    random = np.random.default_rng(seed)
    left, right = random.normal(size=(rows, rank)), random.normal(size=(rank, columns))
    return (left * 10.0 ** random.integers(-6, 6, left.shape)).astype(np.float32), right.astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_the_chain_of_fused_multiply_adds(shape: tuple[int, int, int]) -> None:
    """Oracle: the chain in exact rational arithmetic, each step rounded once to float32."""
    from fractions import Fraction

    left, right = factors(*shape)
    found = product(left, right)
    random = np.random.default_rng(1)
    for row, column in zip(random.integers(0, shape[0], 20), random.integers(0, shape[2], 20), strict=True):
        total = np.float32(0)
        for a, b in zip(left[row], right[:, column], strict=True):
            total = nearest(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(total)))
        assert found[row, column] == total


def nearest(exact: object) -> np.float32:
    """The float32 nearest to a Fraction, ties to even."""
    from fractions import Fraction

    guess = np.float32(float(exact))  # twice rounded: at most one step off
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    distance = [abs(Fraction(float(value)) - exact) for value in around]
    best = min(distance)
    ties = [value for value, far in zip(around, distance, strict=True) if far == best]
    return next((value for value in ties if not value.view(np.uint32) & 1), ties[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numpy_gives_the_bytes_of_the_compiled_kernel(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products and fused sums of two terms, bit for bit."""
    left, right = factors(*shape)
    other = factors(shape[0], 5, shape[2], seed=3)
    base = np.random.default_rng(2).normal(size=(shape[0], shape[2])).astype(ml_dtypes.bfloat16).view(np.uint16)
    terms = [
        Factors(left, right, np.float32(0.37), np.float32(1)),
        Factors(*other, np.float32(2.1), np.float32(-0.7)),
    ]
    assert kernel_name() == "llvm"
    compiled, finite = (product(left, right), base.copy()), []
    finite.append(add_product(compiled[1], terms))
    monkeypatch.setenv("REGISTRY_KERNEL", "numpy")
    assert kernel_name() == "numpy"
    plain = product(left, right), base.copy()
    finite.append(add_product(plain[1], terms))
    assert finite == [True, True]
    assert compiled[0].tobytes() == plain[0].tobytes()
    assert compiled[1].tobytes() == plain[1].tobytes()


@pytest.mark.parametrize("rank", [1, 4, 16, 64, 160])
def test_a_product_has_the_bits_of_torch(rank: int) -> None:
    """Oracle: torch's matrix product, which PEFT's merge takes, at the ranks that people use."""
    import torch

    left, right = factors(96, rank, 320)
    assert np.array_equal(product(left, right), (torch.from_numpy(left) @ torch.from_numpy(right)).numpy())


@pytest.mark.parametrize("kernel", ["llvm", "numpy"])
@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_in_the_base_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, special: float, kernel: str
) -> None:
    """An infinity or NaN of the base stays what it is, and its neighbours get their sums."""
    monkeypatch.setenv("REGISTRY_KERNEL", kernel)
    weight = np.ones((8, 40), ml_dtypes.bfloat16)
    weight[3, 5] = special
    base = write_base(tmp_path / "base", {"x.weight": weight})
    one = {"base_model.model.x.lora_A.weight": np.ones((1, 40), np.float32),
           "base_model.model.x.lora_B.weight": np.ones((8, 1), np.float32)}  # fmt: skip
    lora = write_lora(tmp_path / "lora", {}, rank=1, lora_alpha=1, extra=one)
    compose_folders(base, [(lora, 1.0)], tmp_path / "out")
    result = read_tensors(tmp_path / "out")["x.weight"].float().numpy()
    assert np.array_equal(result[3, 5], np.float32(special), equal_nan=True)
    assert (np.delete(result.ravel(), 3 * 40 + 5) == 2).all()


@pytest.mark.parametrize("kernel", ["llvm", "numpy"])
def test_a_sum_beyond_bf16_is_said(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Finite numbers whose sum rounds to infinity are reported by both kernels."""
    monkeypatch.setenv("REGISTRY_KERNEL", kernel)
    one, row = np.ones((8, 1), np.float32), np.ones((1, 40), np.float32)
    for value, finite in ((3.38e38, False), (1.0, True)):
        block = np.full((8, 40), value, ml_dtypes.bfloat16).view(np.uint16)
        assert add_product(block, [Factors(one, row * np.float32(value), np.float32(1), np.float32(1))]) is finite


def test_a_composition_has_the_same_bytes_without_llvm(
    tiny_llama: Path, tiny_lora: Path, other_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole files, two adapters with weights."""
    adapters = [(tiny_lora, 0.7), (other_lora, -0.4)]
    compose_folders(tiny_llama, adapters, tmp_path / "llvm")
    monkeypatch.setenv("REGISTRY_KERNEL", "numpy")
    compose_folders(tiny_llama, adapters, tmp_path / "numpy")
    assert weight_bytes(tmp_path / "llvm") == weight_bytes(tmp_path / "numpy")


def test_a_plain_merge_imports_no_torch(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """torch costs a second and 200 MiB; a merge of LoRA into safetensors has no use for it."""
    body = """
import sys
from pathlib import Path
from tests.support import compose_folders
compose_folders(Path(sys.argv[1]), [(Path(sys.argv[2]), 1.0)], Path(sys.argv[3]))
print([name for name in ("torch", "transformers", "onnx", "sqlalchemy") if name in sys.modules])
"""
    command = [sys.executable, "-c", body, tiny_llama, tiny_lora, tmp_path / "out"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
