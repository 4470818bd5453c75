"""What the tests of merge methods compare with: each paper's formula in float64, PEFT itself, and mergekit's results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from composer.deltas import LoadedLowRank
from composer.methods import find_method

__all__ = ["BASE", "COLUMNS", "DEGREES", "ORACLES", "ROWS", "TENSOR", "Deltas", "case", "dense", "exact", "make",
           "merged", "model_stock_oracle", "peft_oracle", "uniform"]  # fmt: skip

TENSOR = "model.q_proj.weight"
ROWS, COLUMNS = 12, 10
Deltas = list[LoadedLowRank]
BASE = np.random.default_rng(99).normal(size=(ROWS, COLUMNS)).astype(np.float32)
MERGEKIT = Path(__file__).parents[2] / "fixtures" / "mergekit" / "results.safetensors"


def make(count: int, *, rank: int = 2, seed: int = 0) -> Deltas:
    """Random low-rank deltas, the ranks 2, 3, … unless `rank` is negative, which makes them all -rank."""
    random = np.random.default_rng(seed)
    ranks = [-rank if rank < 0 else rank + i for i in range(count)]
    return [
        LoadedLowRank(
            random.normal(size=(ROWS, r)).astype(np.float32), random.normal(size=(r, COLUMNS)).astype(np.float32),
            np.float32(0.5 + i),
        )
        for i, r in enumerate(ranks)
    ]  # fmt: skip


def dense(delta: LoadedLowRank) -> np.ndarray:
    """The float32 block that the composer computes, so that both sides trim the same numbers."""
    return delta.rows(0, ROWS, np.zeros((ROWS, COLUMNS), np.float32))


def merged(name: str, deltas: Deltas, weights: list[float], **parameters: Any) -> np.ndarray:
    """The method's result for a whole tensor."""
    bound = find_method(name).bind(parameters, TENSOR)
    return bound([dense(d) for d in deltas], weights, BASE, 0, deltas)


# The oracles: float64, one number or one whole matrix at a time, nothing shared with the methods.


def exact(deltas: Deltas) -> list[np.ndarray]:
    """The deltas as float64."""
    return [dense(d).astype(np.float64) for d in deltas]


def trimmed(delta: np.ndarray, density: float, skip: int = 0) -> np.ndarray:
    """By sorting all numbers."""
    order = sorted(range(delta.size), key=lambda i: -abs(delta.flat[i]))
    out = np.zeros(delta.shape)
    for i in order[skip : skip + int(density * delta.size)]:
        out.flat[i] = delta.flat[i]
    return out


def elected(terms: list[np.ndarray]) -> np.ndarray:
    """Number by number."""
    out = np.zeros(terms[0].shape)
    for i in np.ndindex(out.shape):
        values = [term[i] for term in terms]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [value for value in values if value * sign > 0]
        out[i] = sum(agreeing) / len(agreeing) if agreeing else 0
    return out


def stream(name: str, index: int, seed: int) -> np.random.Generator:
    """The documented stream of the delta at `index`."""
    digest = hashlib.sha256(f"{seed}\n{name}\n{TENSOR}\n{index}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def uniform(name: str, index: int, seed: int) -> np.ndarray:
    """Of the size of the tensor, drawn one number at a time."""
    generator = stream(name, index, seed)
    return np.array([generator.random() for _ in range(ROWS * COLUMNS)]).reshape(ROWS, COLUMNS)


def dropped(name: str, deltas: Deltas, density: float, seed: int) -> list[np.ndarray]:
    return [d * (uniform(name, i, seed) < density) / density for i, d in enumerate(exact(deltas))]


def total(terms: list[np.ndarray], weights: list[float]) -> np.ndarray:
    return sum(w * t for w, t in zip(weights, terms, strict=True))


def scaled(terms: list[np.ndarray], weights: list[float]) -> list[np.ndarray]:
    return [w * t for w, t in zip(weights, terms, strict=True)]


def della_oracle(deltas: Deltas, weights: list[float]) -> np.ndarray:
    terms = []
    for index, delta in enumerate(exact(deltas)):
        draw, out = uniform("della", index, 3), np.zeros(delta.shape)
        for row in range(ROWS):
            ranked = sorted(range(COLUMNS), key=lambda c: -abs(delta[row, c]))
            for rank, column in enumerate(ranked):
                keep = 1 - ((1 - 0.6) - 0.3 / 2 + 0.3 / COLUMNS * rank)
                out[row, column] = delta[row, column] / keep if draw[row, column] < keep else 0
        terms.append(out)
    return elected(scaled(terms, weights))


def slerp_oracle(deltas: Deltas, weights: list[float]) -> np.ndarray:
    """By rotating in the plane of both: an orthonormal frame instead of the formula of sines."""
    a, b = (t.ravel() for t in scaled(exact(deltas), weights))
    size_a, size_b = np.linalg.norm(a), np.linalg.norm(b)
    x = a / size_a
    y = b / size_b - (b / size_b @ x) * x
    y /= np.linalg.norm(y)
    angle = np.arctan2(b @ y, b @ x)
    # sin((1-t)θ)/sinθ and sin(tθ)/sinθ are the coordinates of the rotated unit vector in the frame (x, b/‖b‖).
    turned = np.cos(0.3 * angle) * x + np.sin(0.3 * angle) * y
    along = np.linalg.lstsq(np.stack([x, b / size_b], axis=1), turned, rcond=None)[0]
    return (along[0] * a + along[1] * b).reshape(ROWS, COLUMNS)


def model_stock_oracle(deltas: Deltas, weights: list[float]) -> np.ndarray:
    terms = [t.ravel() for t in scaled(exact(deltas), weights)]
    gram = np.corrcoef(np.stack([np.concatenate([t, -t]) for t in terms]))  # mean 0: correlation is cosine
    k = len(terms)
    cosine = max(0.0, (gram.sum() - k) / (k * (k - 1)))
    return (k * cosine / (1 + (k - 1) * cosine) * np.mean(terms, axis=0)).reshape(ROWS, COLUMNS)


def sce_oracle(deltas: Deltas, weights: list[float]) -> np.ndarray:
    """Number by number; only the mean squares are taken of whole matrices."""
    terms = scaled(exact(deltas), weights)
    variance = {i: np.var([term[i] for term in terms]) for i in np.ndindex(terms[0].shape)}
    varying = [i for i in variance if variance[i] > 0]
    selected = set(sorted(varying, key=lambda i: -variance[i])[: int(0.6 * len(varying))])
    kept = [
        np.array([[term[r, c] if (r, c) in selected else 0 for c in range(COLUMNS)] for r in range(ROWS)])
        for term in terms
    ]
    shares = np.array([(term**2).mean() for term in kept])
    shares /= shares.sum()
    out = np.zeros(terms[0].shape)
    for i in selected:
        values = np.array([term[i] for term in kept])
        agrees = values * (1 if values.sum() >= 0 else -1) > 0
        out[i] = (shares * values)[agrees].sum() / shares[agrees].sum()
    return out


def svd_oracle(deltas: Deltas, weights: list[float], rank: int = 3) -> np.ndarray:
    u, s, v = np.linalg.svd(total(exact(deltas), weights))
    return u[:, :rank] * s[:rank] @ v[:rank]


def iso_c_oracle(deltas: Deltas, weights: list[float]) -> np.ndarray:
    u, s, v = np.linalg.svd(total(exact(deltas), weights))
    k = min(sum(d.right.shape[0] for d in deltas), COLUMNS)
    return 2 * s[:k].mean() * u[:, :k] @ v[:k]


def tsv_oracle(deltas: Deltas, weights: list[float]) -> np.ndarray:
    """Polar factors by inverse square roots of Gram matrices."""
    parts = [np.linalg.svd(t) for t in scaled(exact(deltas), weights)]
    ranks = [min(d.right.shape[0], COLUMNS // len(deltas)) for d in deltas]
    u = np.concatenate([p[0][:, :r] for p, r in zip(parts, ranks, strict=True)], axis=1)
    v = np.concatenate([p[2][:r].T for p, r in zip(parts, ranks, strict=True)], axis=1)
    s = np.concatenate([p[1][:r] for p, r in zip(parts, ranks, strict=True)])

    def polar(m: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(m.T @ m)
        return m @ (vectors / np.sqrt(values)) @ vectors.T

    return polar(u) * s @ polar(v).T


def core_space_oracle(deltas: Deltas, weights: list[float]) -> np.ndarray:
    """Bases as eigenvectors of B·Bᵀ and AᵀA, cores as projections of the dense deltas."""
    k = sum(d.right.shape[0] for d in deltas)
    b = np.concatenate([d.left.astype(np.float64) * float(d.scale) for d in deltas], axis=1)
    a = np.concatenate([d.right.astype(np.float64) for d in deltas])
    u = np.linalg.eigh(b @ b.T)[1][:, ::-1][:, : min(k, ROWS)]
    v = np.linalg.eigh(a.T @ a)[1][:, ::-1][:, : min(k, COLUMNS)]
    cores = [u.T @ t @ v for t in exact(deltas)]
    return u @ elected(scaled([trimmed(core, 0.5) for core in cores], weights)) @ v.T


def knots_oracle(deltas: Deltas, weights: list[float]) -> np.ndarray:
    """From the dense matrices."""
    u, s, v = np.linalg.svd(np.concatenate(exact(deltas), axis=1), full_matrices=False)
    k = min(sum(d.right.shape[0] for d in deltas), ROWS)
    parts = [trimmed(v[:k, i * COLUMNS : (i + 1) * COLUMNS], 0.5) for i in range(len(deltas))]
    return u[:, :k] * s[:k] @ elected(scaled(parts, weights))


def linear_oracle(deltas: Deltas, weights: list[float]) -> np.ndarray:
    return total(exact(deltas), weights)


def peft_oracle(name: str, **options: Any) -> Callable[[Deltas, list[float]], np.ndarray]:
    """PEFT's own add_weighted_adapter on a model of one linear layer."""

    def run(deltas: Deltas, weights: list[float]) -> np.ndarray:
        import peft
        import torch

        model = torch.nn.Sequential(torch.nn.Linear(COLUMNS, ROWS, bias=False))
        for index, delta in enumerate(deltas):
            rank = delta.right.shape[0]
            config = peft.LoraConfig(r=rank, lora_alpha=float(delta.scale) * rank, target_modules=["0"])
            if index == 0:
                model = peft.get_peft_model(model, config, adapter_name="0")
            else:
                model.add_adapter(str(index), config)
            layer = model.base_model.model[0]
            layer.lora_A[str(index)].weight.data = torch.from_numpy(delta.right.copy())
            layer.lora_B[str(index)].weight.data = torch.from_numpy(delta.left.copy())
        model.add_weighted_adapter([str(i) for i in range(len(deltas))], weights, "sum", name, **options)
        return layer.get_delta_weight("sum").detach().numpy().astype(np.float64)

    return run


@contextmanager
def bernoulli_of(draws: list[np.ndarray]) -> Iterator[None]:
    """torch.bernoulli with these uniform numbers, one array a call, instead of torch's own."""
    import torch

    waiting = list(draws)

    def bernoulli(chances: Any) -> Any:
        return torch.from_numpy(waiting.pop(0) < chances.numpy().astype(np.float64)).to(chances.dtype)

    with mock.patch.object(torch, "bernoulli", bernoulli):
        yield
    assert not waiting


def peft_masked_oracle(method: str, seed: int, **options: Any) -> Callable[[Deltas, list[float]], np.ndarray]:
    """As `peft_oracle` for a random `method`, with the masks of ours: PEFT draws every A before every B, we B and A."""
    name = method.removesuffix("@peft")

    def run(deltas: Deltas, weights: list[float]) -> np.ndarray:
        streams = [stream(method, index, seed) for index in range(len(deltas))]
        if name.endswith("_svd"):
            draws = [each.random((ROWS, COLUMNS)) for each in streams]
        else:
            pairs = [
                (each.random(d.left.shape), each.random(d.right.shape)) for each, d in zip(streams, deltas, strict=True)
            ]
            draws = [right for _, right in pairs] + [left for left, _ in pairs]
        with bernoulli_of(draws):
            return peft_oracle(name, **options)(deltas, weights)

    return run


def mergekit_oracle(name: str) -> Callable[[Deltas, list[float]], np.ndarray]:
    """What mergekit made of the same deltas, kept beside the script that asked it."""

    def run(deltas: Deltas, weights: list[float]) -> np.ndarray:
        from safetensors.numpy import load_file

        kept = load_file(MERGEKIT)
        for index, delta in enumerate(deltas):
            np.testing.assert_allclose(dense(delta), kept[f"{len(deltas)}.{index}"], rtol=1e-6, atol=1e-6)
        return kept[mergekit_key(name, weights)].astype(np.float64)

    return run


def mergekit_key(name: str, weights: list[float]) -> str:
    """The tensor of the fixture."""
    return json.dumps([name, *weights])


# name -> (parameters, oracle, parameters that change nothing or None, whether the order of adapters matters)
ORACLES: dict[str, tuple[dict[str, Any], Callable[[Deltas, list[float]], np.ndarray], dict[str, Any] | None, bool]] = {
    "linear": ({}, linear_oracle, {}, False),
    "cat": ({}, peft_oracle("cat"), {}, False),
    "task_arithmetic": ({"scaling": 0.3}, lambda d, w: 0.3 * linear_oracle(d, w), {}, False),
    "ties": (
        {"density": 0.37, "scaling": 1.5},
        lambda d, w: 1.5 * elected(scaled([trimmed(t, 0.37) for t in exact(d)], w)),
        {"density": 1},
        False,
    ),
    "dare_linear": (
        {"density": 0.4, "seed": 5},
        lambda d, w: total(dropped("dare_linear", d, 0.4, 5), w),
        {"density": 1},
        True,
    ),
    "dare_ties": (
        {"density": 0.4, "seed": 5, "scaling": 0.5},
        lambda d, w: 0.5 * elected(scaled(dropped("dare_ties", d, 0.4, 5), w)),
        {"density": 1},
        True,
    ),
    "magnitude_prune": (
        {"density": 0.6},
        lambda d, w: total([trimmed(t, 0.6) for t in exact(d)], w),
        {"density": 1},
        False,
    ),
    "breadcrumbs": (
        {"density": 0.7, "gamma": 0.1},
        lambda d, w: total([trimmed(t, 0.7, skip=int(0.1 * t.size)) for t in exact(d)], w),
        {"density": 1, "gamma": 0},
        False,
    ),
    "della": ({"density": 0.6, "epsilon": 0.3, "seed": 3}, della_oracle, {"density": 1, "epsilon": 0}, True),
    "slerp": ({"t": 0.3}, slerp_oracle, {}, True),
    "model_stock": ({}, model_stock_oracle, {}, False),
    "svd": ({"rank": 3}, svd_oracle, {}, False),
    "iso_c": ({"scaling": 2}, iso_c_oracle, None, False),
    "core_space": ({"density": 0.5}, core_space_oracle, {"density": 1}, False),
    "knots": ({"density": 0.5}, knots_oracle, {"density": 1}, False),
    "tsv": ({}, tsv_oracle, {}, False),
    "linear@peft": ({}, peft_oracle("linear"), {}, False),
    "magnitude_prune@peft": ({"density": 0.6}, peft_oracle("magnitude_prune", density=0.6), {"density": 1}, False),
    "ties@peft": ({"density": 0.6}, peft_oracle("ties", density=0.6), {"density": 1}, False),
    "dare_linear@peft": (
        {"density": 0.6, "seed": 2}, peft_masked_oracle("dare_linear@peft", 2, density=0.6), {"density": 1}, True
    ),
    "dare_ties@peft": (
        {"density": 0.6, "seed": 2}, peft_masked_oracle("dare_ties@peft", 2, density=0.6), {"density": 1}, True
    ),
    "magnitude_prune_svd@peft": (
        {"density": 0.6, "rank": 3}, peft_oracle("magnitude_prune_svd", density=0.6, svd_rank=3), {"density": 1}, False
    ),
    "ties_svd@peft": ({"density": 0.6}, peft_oracle("ties_svd", density=0.6), {"density": 1}, False),
    "dare_linear_svd@peft": (
        {"density": 0.6, "rank": 5}, peft_masked_oracle("dare_linear_svd@peft", 0, density=0.6, svd_rank=5),
        {"density": 1}, True,
    ),
    "dare_ties_svd@peft": (
        {"density": 0.6, "majority_sign": "frequency"},
        peft_masked_oracle("dare_ties_svd@peft", 0, density=0.6, majority_sign_method="frequency"), {"density": 1}, True,
    ),
    "sce": ({"density": 0.6}, sce_oracle, {}, False),
    "sce@mergekit": ({"density": 0.6}, mergekit_oracle("sce@mergekit"), {}, False),
    "ties@mergekit": ({"density": 0.37, "scaling": 1.5}, mergekit_oracle("ties@mergekit"), {}, False),
    "dare_linear@mergekit": ({"density": 0.6, "seed": 1}, mergekit_oracle("dare_linear@mergekit"), {}, True),
    "dare_ties@mergekit": ({"density": 0.6, "seed": 1}, mergekit_oracle("dare_ties@mergekit"), {}, True),
    "breadcrumbs@mergekit": ({"density": 0.7, "gamma": 0.4}, mergekit_oracle("breadcrumbs@mergekit"), {}, False),
    "breadcrumbs_ties@mergekit": ({"density": 0.7, "gamma": 0.1, "normalize": "yes"}, mergekit_oracle("breadcrumbs_ties@mergekit"), {}, False),
    "della@mergekit": ({"density": 0.6, "epsilon": 0.3, "seed": 1}, mergekit_oracle("della@mergekit"), {}, True),
    "della_linear@mergekit": ({"density": 0.6, "seed": 1}, mergekit_oracle("della_linear@mergekit"), {}, True),
    "model_stock@mergekit": ({"filter_wise": "yes"}, mergekit_oracle("model_stock@mergekit"), {}, False),
    "slerp@mergekit": ({"t": 0.3}, mergekit_oracle("slerp@mergekit"), {"t": 1}, True),
}  # fmt: skip

# All weights times c give the result times c to this power, 1 where it is not named; None: neither.
DEGREES = {"ties@mergekit": 0, "della@mergekit": 0, "breadcrumbs_ties@mergekit": 0, "slerp@mergekit": None}


def case(name: str, count: int = 3, seed: int = 0) -> Deltas:
    """As many deltas as the method takes, of equal ranks where it asks for that."""
    method = find_method(name)
    return make(min(count, method.terms or count), rank=-3 if method.equal_ranks else 2, seed=seed)
