"""What every merge method must show: its paper's formula in float64, and the algebra that it promises."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import composer.plan as plan_module
import composer.run as run_module
from composer.adapters import open_adapter
from composer.checkpoint import open_checkpoint
from composer.deltas import LoadedLowRank
from composer.errors import IncompatibleError, RecipeError
from composer.methods import find_method, methods
from composer.plan import Term, make_plan
from composer.recipe import AdapterTerm, Dtype, Recipe, load_recipe
from composer.run import compose
from tests.support import plan_folders, read_tensors, weight_bytes, write_base, write_lora

TENSOR = "model.q_proj.weight"
ROWS, COLUMNS = 12, 10
Deltas = list[LoadedLowRank]


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
    return bound([dense(d) for d in deltas], weights, np.zeros((ROWS, COLUMNS), np.float32), 0, deltas)


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


def uniform(name: str, index: int, seed: int) -> np.ndarray:
    """The documented stream, drawn one number at a time."""
    digest = hashlib.sha256(f"{seed}\n{name}\n{TENSOR}\n{index}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
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
}  # fmt: skip


def case(name: str, count: int = 3, seed: int = 0) -> Deltas:
    """As many deltas as the method takes, of equal ranks where it asks for that."""
    method = find_method(name)
    return make(min(count, method.terms or count), rank=-3 if method.equal_ranks else 2, seed=seed)


def assert_close(found: np.ndarray, expected: np.ndarray, relative: float) -> None:
    """By the Frobenius norm, and not trivially."""
    size = np.linalg.norm(expected)
    assert size > 0
    assert np.linalg.norm(found - expected) <= relative * size


def test_every_method_has_an_oracle() -> None:
    """A new file in composer/methods fails here until its formula is written down a second time."""
    assert set(methods()) == set(ORACLES)
    assert all(method.summary for method in methods().values())


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -0.4, 1.3]], ids=["ones", "one-negative"])
@pytest.mark.parametrize("name", sorted(ORACLES))
def test_a_method_computes_its_papers_formula(name: str, weights: list[float]) -> None:
    """Against the oracle: 2e-7 relative for cat, 1e-5 where A and B go apart, 2e-6 in product space."""
    parameters, oracle, _, _ = ORACLES[name]
    deltas = case(name)
    expected = oracle(deltas, weights[: len(deltas)])
    found = merged(name, deltas, weights[: len(deltas)], **parameters)
    assert found.dtype == np.float32
    if name == "model_stock" and not expected.any():
        assert not found.any()
    else:
        assert_close(found, expected, 2e-7 if name == "cat" else 1e-5 if "@peft" in name else 2e-6)


def test_model_stock_of_deltas_that_agree_equals_its_formula() -> None:
    """Random deltas are nearly orthogonal; these share a part, so the ratio lies well inside (0, 1)."""
    one, two = make(2, rank=-3)
    both = LoadedLowRank(one.left + np.float32(0.3) * two.left, one.right, one.scale)
    deltas, weights = [one, both], [1.0, 0.8]
    expected = model_stock_oracle(deltas, weights)
    assert_close(merged("model_stock", deltas, weights), expected, 2e-6)


def test_ties_at_peft_elects_by_frequency_as_peft_does() -> None:
    """The other majority_sign."""
    deltas = case("ties@peft")
    expected = peft_oracle("ties", density=0.7, majority_sign_method="frequency")(deltas, [0.5, 1.0, -0.7])
    found = merged("ties@peft", deltas, [0.5, 1.0, -0.7], density=0.7, majority_sign="frequency")
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("name", [name for name, entry in sorted(ORACLES.items()) if entry[2] is not None])
def test_one_adapter_at_weight_1_gives_its_own_delta(name: str) -> None:
    """With parameters that neither prune nor scale."""
    [delta] = case(name, 1)
    assert_close(merged(name, [delta], [1.0], **(ORACLES[name][2] or {})), exact([delta])[0], 1e-6)


@pytest.mark.parametrize("name", [name for name, entry in sorted(ORACLES.items()) if not entry[3]])
@settings(max_examples=10, deadline=None)
@given(st.permutations([0, 1, 2]), st.lists(st.floats(0.25, 2), min_size=3, max_size=3), st.integers(0, 99))
def test_the_order_of_adapters_does_not_matter(name: str, order: list[int], weights: list[float], seed: int) -> None:
    """To float32 accumulation."""
    deltas, parameters = case(name, seed=seed), ORACLES[name][0]
    expected = merged(name, deltas, weights, **parameters)
    found = merged(name, [deltas[i] for i in order], [weights[i] for i in order], **parameters)
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("name", ["linear", "cat", "task_arithmetic", "dare_linear", "magnitude_prune", "breadcrumbs"])
@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_sums_are_linear_in_the_weights(name: str, first: list[float], second: list[float]) -> None:
    """f(u + v) = f(u) + f(v)."""
    deltas = case(name)
    both = merged(name, deltas, [a + b for a, b in zip(first, second, strict=True)])
    np.testing.assert_allclose(both, merged(name, deltas, first) + merged(name, deltas, second), atol=1e-4)


# Through plan and run.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A bf16 base of two matrices, one replaced tensor's worth of other weights, and three LoRAs of one rank."""
    import ml_dtypes

    root = tmp_path_factory.mktemp("methods")
    random = np.random.default_rng(1)
    shapes = {"model.layers.0.q_proj": (24, 10), "model.layers.1.q_proj": (24, 10)}
    tensors = {f"{name}.weight": random.normal(size=shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    base = write_base(root / "base", {**tensors, "model.norm.weight": np.ones(10, np.float32)})
    return base, [write_lora(root / f"lora-{i}", shapes, rank=3, seed=i) for i in range(3)]


def outcome(folders: tuple[Path, list[Path]], out: Path, method: str, weights: list[float], **fields: Any) -> Path:
    """Compose the first adapters with these weights."""
    base, adapters = folders
    terms = [Term(p.name, open_adapter(p), w) for p, w in zip(adapters, weights, strict=False)]
    recipe = Recipe(base="base", adapters=tuple(AdapterTerm(ref=t.label, weight=t.weight) for t in terms),
                    method=method, dtype=Dtype.FP32, **fields)  # fmt: skip
    compose(make_plan(recipe, open_checkpoint(base), terms), out)
    return out


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_bytes_depend_on_neither_blocks_nor_threads(
    folders: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One block a tensor at one thread, a row a block at two and at four."""
    weights = [1.0, 0.5]
    files = []
    for threads, block in ((1, 1 << 20), (2, 1), (4, 160)):
        monkeypatch.setattr(run_module, "THREADS", threads)
        monkeypatch.setattr(plan_module, "BLOCK_BYTES", block)
        files.append(weight_bytes(outcome(folders, tmp_path / f"{threads}", name, weights)))
    assert files[0] == files[1] == files[2]
    plain = weight_bytes(outcome(folders, tmp_path / "base", name, [0.0, 0.0]))
    assert files[0] != plain


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_weight_0_is_the_same_bytes_as_leaving_the_adapter_out(
    folders: tuple[Path, list[Path]], tmp_path: Path, name: str
) -> None:
    """Random masks included: the adapters that stay draw what they drew."""
    base, (first, middle, last) = folders
    with_zero = outcome((base, [first, middle, last]), tmp_path / "zero", name, [0.6, 0.0, 0.9])
    without = outcome((base, [first, last]), tmp_path / "without", name, [0.6, 0.9])
    assert weight_bytes(with_zero) == weight_bytes(without)


def test_random_methods_are_the_same_in_another_process() -> None:
    """No global state, no hash seed."""
    code = (
        "import numpy as np, hashlib; from composer.methods import find_method\n"
        "d = [np.linspace(-1, i + 1, 120, dtype=np.float32).reshape(12, 10) for i in range(2)]\n"
        "names = ('dare_linear', 'dare_ties', 'della')\n"
        "out = [find_method(n).bind({'seed': 4}, 't')(d, [1, .5], d[0], 0, d).tobytes() for n in names]\n"
        "print(hashlib.sha256(b''.join(out)).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == 64


def test_a_seed_changes_what_is_dropped() -> None:
    """And so does the tensor's name."""
    deltas, zeros = case("dare_linear"), np.zeros((ROWS, COLUMNS), np.float32)
    blocks, weights = [dense(d) for d in deltas], [1.0] * 3
    results = [
        find_method("dare_linear").bind({"seed": seed}, tensor)(blocks, weights, zeros, 0, deltas).tobytes()
        for seed, tensor in ((0, "a"), (1, "a"), (0, "b"), (0, "a"))
    ]
    assert results[0] == results[3]
    assert len(set(results)) == 3


# Parameters, patterns, refusals.


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"density": 0.5}), ("ties", {"densty": 0.5}), ("ties", {"density": 0}), ("ties", {"density": 1.01}),
        ("ties", {"density": "much"}), ("ties", {"density": "nan"}), ("svd", {"rank": 2.5}), ("svd", {"rank": -1}),
        ("svd", {"rank": float("inf")}), ("ties@peft", {"majority_sign": "loudest"}), ("della", {"epsilon": 1.0}),
        ("dare_ties", {"seed": -1}), ("ties", {"seed": 1}),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_refused_with_the_valid_ones(
    folders: tuple[Path, list[Path]], method: str, parameters: dict[str, Any]
) -> None:
    """By the plan, before a byte is read."""
    recipe = Recipe(base="base", method=method, parameters=parameters)
    with pytest.raises(RecipeError, match=f"method '{method}'") as caught:
        make_plan(recipe, open_checkpoint(folders[0]), [])
    assert all(name in caught.value.remedy for name in find_method(method).parameters)


def test_parameters_arrive_as_text_or_numbers() -> None:
    """`-p density=0.2` and JSON's 0.2 are one."""
    method = find_method("ties")
    assert method.resolve({"density": "0.2"}) == method.resolve({"density": 0.2}) == {"density": 0.2, "scaling": 1.0}
    assert find_method("svd").resolve({"rank": "8"}) == {"rank": 8}


def test_slerp_takes_two(folders: tuple[Path, list[Path]]) -> None:
    """A third adapter is refused, one of weight 0 does not count."""
    base, adapters = folders
    assert plan_folders(base, [(p, w) for p, w in zip(adapters, (1, 0, 1), strict=True)], method="slerp").touched == 2
    with pytest.raises(RecipeError, match="combines 2 adapters, not 3"):
        plan_folders(base, [(p, 1.0) for p in adapters], method="slerp")


def test_pefts_dialects_want_one_rank(folders: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """PEFT raises as well."""
    base, adapters = folders
    other = write_lora(tmp_path / "other", {"model.layers.0.q_proj": (24, 10)}, rank=2)
    with pytest.raises(IncompatibleError, match=r"ranks \[3, 2\]"):
        plan_folders(base, [(adapters[0], 1.0), (other, 1.0)], method="linear@peft")


RECIPE = """
base: base
adapters:
  - {ref: lora-0, weight: 0.5, modules: {"*.layers.1.*": 0, "*.q_proj.weight": 0.25}}
  - ref: lora-1
method: ties
parameters: {density: 0.5}
dtype: fp32
"""


def test_a_recipe_file_gives_weights_by_module(folders: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """The first pattern that fits wins; layer 1 is as without the first adapter, layer 0 as with its weight 0.25."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    base, adapters = folders
    terms = [
        Term(p.name, open_adapter(p), t.weight, t.modules) for p, t in zip(adapters, recipe.adapters, strict=False)
    ]
    compose(make_plan(recipe, open_checkpoint(base), terms), tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    for layer, weight in ((0, 0.25), (1, 0.0)):
        out = outcome(folders, tmp_path / str(layer), "ties", [weight, 1.0], parameters={"density": 0.5})
        name = f"model.layers.{layer}.q_proj.weight"
        assert read_tensors(out)[name].equal(found[name])
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_the_digest_of_a_recipe_holds_parameters_and_the_order_of_patterns() -> None:
    """They decide the output, so they decide the cache's key."""

    def digest(modules: dict[str, float], **fields: Any) -> str:
        return Recipe(base="b", adapters=(AdapterTerm(ref="a", modules=modules),), **fields).digest

    digests = [
        digest({"*": 1, "q*": 0}), digest({"q*": 0, "*": 1}), digest({}), digest({}, parameters={"density": 0.1}),
    ]  # fmt: skip
    assert len(set(digests)) == 4


def test_a_pattern_that_fits_nothing_is_refused(folders: tuple[Path, list[Path]]) -> None:
    """A typing error must not pass as weight 1."""
    base, (path, *_) = folders
    modules = AdapterTerm(ref="a", modules={"*.layer.0.*": 0.5}).modules
    with pytest.raises(RecipeError, match=r"no tensor that it changes is named like '\*\.layer\.0\.\*'"):
        make_plan(Recipe(base="b"), open_checkpoint(base), [Term("a", open_adapter(path), 1.0, modules)])


def test_a_recipe_file_may_write_adapters_as_the_command_line_does(tmp_path: Path) -> None:
    """A text with version and weight, and a version within `ref`."""
    text = (
        "base: b\nadapters: ['t/a@1.0.0:0.5', {ref: t/a@1.0.0, weight: 0.5}, {ref: t/a, version: 1.0.0, weight: 0.5}]"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    assert set(load_recipe(tmp_path / "recipe.yaml").adapters) == {AdapterTerm(ref="t/a", version="1.0.0", weight=0.5)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "text",
        "base: [",
        "base: b\nmethd: ties",
        "base: b\nadapters: [{ref: a, modules: {q: .inf}}]",
        "b: 1",
    ],
)
def test_a_bad_recipe_file_is_a_typed_error(tmp_path: Path, text: str) -> None:
    """It names the file."""
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(tmp_path / "recipe.yaml")
