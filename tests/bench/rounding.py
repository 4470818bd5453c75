"""How many elements of a stacked bf16 merge are not the float64 sum rounded once: `python -m tests.bench.rounding`.

PEFT merges one adapter after another and rounds after each; this project sums in float32 and rounds once.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import click
import ml_dtypes
import numpy as np

from composer.adapters import WEIGHTS
from composer.tensors import read_header
from tests.support import compose_folders, write_base, write_lora

SIZE, RANK, SCALE, STD = 2048, 16, 2.0, 0.02


def rounded_once(exact: np.ndarray) -> np.ndarray:
    """float64 to bf16 bits, to nearest even in one step (a cast through float32 would round twice)."""
    low = 1 << 45  # a float64 has 45 bits of mantissa more than a bf16, whose exponent is that of a float32
    bits = exact.view(np.int64)
    kept = (bits + (low // 2 - 1) + ((bits >> 45) & 1)) // low * low
    return kept.view(np.float64).astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def one_after_another(weight: np.ndarray, deltas: list[np.ndarray]) -> np.ndarray:
    """PEFT's merge of several adapters: each float32 delta is added to the bf16 weight and rounded."""
    for delta in deltas:
        weight = (weight.astype(np.float32) + delta).astype(ml_dtypes.bfloat16)
    return weight.view(np.uint16)


def differing(adapters: int, folder: Path) -> tuple[float, float]:
    """The share of elements that differ from the exact sum rounded once: ours, and one after another."""
    random = np.random.default_rng(adapters)
    weight = (random.standard_normal((SIZE, SIZE)) * STD).astype(ml_dtypes.bfloat16)
    base = write_base(folder / "base", {"x.weight": weight})
    loras = [write_lora(folder / str(i), {"x": (SIZE, SIZE)}, rank=RANK, seed=i, std=0.01) for i in range(adapters)]
    compose_folders(base, [(lora, 1.0) for lora in loras], folder / "out")
    factors = [tuple(spec.read() for spec in read_header(lora / WEIGHTS).tensors.values()) for lora in loras]
    exact = rounded_once(weight + sum(SCALE * (b.astype(np.float64) @ a.astype(np.float64)) for a, b in factors))
    ours = read_header(folder / "out" / "model.safetensors").tensors["x.weight"].read().view(np.uint16)
    peft = one_after_another(weight, [np.float32(SCALE) * (b @ a) for a, b in factors])
    return float((ours != exact).mean()), float((peft != exact).mean())


@click.command()
def main() -> None:
    """Print the table."""
    print("| adapters | this project | one after another (PEFT) |\n|---|---|---|")
    for adapters in (1, 2, 8, 16):
        with TemporaryDirectory() as folder:
            ours, peft = differing(adapters, Path(folder))
        print(f"| {adapters} | {ours:.4%} | {peft:.2%} |")


if __name__ == "__main__":
    main()
