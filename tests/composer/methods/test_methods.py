"""What every merge method must show: its paper's formula in float64, and the algebra that it promises."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
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
from tests.composer.methods.oracles import (
    COLUMNS,
    DEGREES,
    ORACLES,
    ROWS,
    case,
    dense,
    exact,
    make,
    merged,
    mergekit_oracle,
    model_stock_oracle,
    peft_oracle,
)
from tests.support import plan_folders, read_tensors, weight_bytes, write_base, write_lora


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


@pytest.mark.parametrize("name", [name for name in sorted(ORACLES) if DEGREES.get(name, 1) is not None])
@settings(max_examples=10, deadline=None)
@given(st.floats(0.1, 8), st.lists(st.floats(0.25, 2), min_size=3, max_size=3), st.integers(0, 99))
def test_all_weights_times_a_number_give_the_result_times_that_number(
    name: str, factor: float, weights: list[float], seed: int
) -> None:
    """Or the same result, where a method divides by the sum of the weights."""
    deltas, parameters = case(name, seed=seed), ORACLES[name][0]
    degree = DEGREES.get(name, 1)
    assert degree is not None
    expected = merged(name, deltas, weights[: len(deltas)], **parameters) * factor**degree
    found = merged(name, deltas, [weight * factor for weight in weights[: len(deltas)]], **parameters)
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


def test_model_stock_of_deltas_that_agree_equals_its_formula() -> None:
    """Random deltas are nearly orthogonal; these share a part, so the ratio lies well inside (0, 1)."""
    one, two = make(2, rank=-3)
    both = LoadedLowRank(one.left + np.float32(0.3) * two.left, one.right, one.scale)
    deltas, weights = [one, both], [1.0, 0.8]
    expected = model_stock_oracle(deltas, weights)
    assert_close(merged("model_stock", deltas, weights), expected, 2e-6)


def test_methods_that_mergekit_names_otherwise_or_alike_are_the_same() -> None:
    """nuslerp is slerp with t from the weights, task_arithmetic is what it is here."""
    deltas = case("slerp")
    expected = mergekit_oracle("nuslerp")(deltas, [1.0, 3.0])
    assert_close(merged("slerp", deltas, [1.0, 1.0], t=0.75), expected, 2e-6)
    expected = mergekit_oracle("task_arithmetic")(deltas, [1.0, 3.0])
    assert_close(merged("task_arithmetic", deltas, [1.0, 3.0]), expected, 2e-6)


def test_small_deltas_count_alike_in_mergekits_sce() -> None:
    """Its threshold is absolute; the paper's formula has none and gives something else."""
    deltas = case("slerp")
    expected = mergekit_oracle("sce of small deltas")(deltas, [1e-4, 1e-4])
    assert_close(merged("sce@mergekit", deltas, [1e-4, 1e-4]), expected, 2e-6)
    assert np.linalg.norm(merged("sce", deltas, [1e-4, 1e-4]) - expected) > 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["dare_linear@peft", "dare_linear_svd@peft"])
def test_drops_of_pefts_dialects_keep_the_expected_value(name: str) -> None:
    """The mean over 400 seeds comes near what nothing dropped gives, at full rank."""
    deltas, weights = case(name, 2), [1.0, -0.5]
    full = {"rank": COLUMNS} if "svd" in name else {}
    expected = merged(name, deltas, weights, density=1, **full)
    draws = [merged(name, deltas, weights, density=0.5, seed=seed, **full) for seed in range(400)]
    error = np.linalg.norm(np.mean(draws, axis=0) - expected) / np.linalg.norm(expected)
    spread = np.linalg.norm(np.std(draws, axis=0)) / np.linalg.norm(expected)
    assert 0.3 < spread
    assert error < 3 * spread / 400**0.5


LAPACK = [name for name, method in sorted(methods().items()) if method.factors and not method.equal_ranks]
PROCESS = """
import numpy as np, sys
from composer.deltas import LoadedLowRank
from composer.methods import find_method
random = np.random.default_rng(0)
draw = lambda *shape: random.normal(size=shape).astype(np.float32)
deltas = [LoadedLowRank(draw(384, 16), draw(16, 640), np.float32(0.5)) for _ in range(3)]
for name in sys.argv[1:]:
    left, right = find_method(name).bind({}, "t").pair(deltas, [1, 0.7, -0.4])
    sys.stdout.buffer.write(left.tobytes() + right.tobytes() + (left.astype(float) @ right).tobytes())
"""


def in_process(**environment: str) -> bytes:
    """The factors of every method on factors, and their products, from a new process."""
    command = [sys.executable, "-c", PROCESS, *LAPACK]
    return subprocess.run(command, capture_output=True, check=True, env={**os.environ, **environment}).stdout


@pytest.mark.slow
def test_lapack_gives_the_same_bytes_at_any_number_of_threads() -> None:
    """svd, knots, tsv, iso_c and core_space leave their linear algebra to OpenBLAS."""
    results = {in_process(OPENBLAS_NUM_THREADS=str(count), OMP_NUM_THREADS=str(count)) for count in (1, 2, 4)}
    assert len(results) == 1


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names kernels of x86")
def test_lapack_on_another_processor_differs_in_the_last_digits() -> None:
    """Its kernels are chosen by the processor: what is promised there is 1e-6, not the bytes."""
    here, there = in_process(), in_process(OPENBLAS_CORETYPE="Nehalem")
    position = 0
    for name in LAPACK:
        rank, size = 16 if "@peft" in name or name == "svd" else 48, 8 * 384 * 640
        position += 4 * rank * (384 + 640)
        one, other = (np.frombuffer(each[position : position + size]) for each in (here, there))
        assert_close(other, one, 1e-6)
        position += size
    assert position == len(here) == len(there)


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
    order, weights = [i for i in order if i < len(deltas)], weights[: len(deltas)]
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
    weights = [1.0, 0.5][: find_method(name).terms]
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
    kept = [(first, 0.6), (last, 0.9)][-(find_method(name).terms or 2) :]
    with_zero = outcome((base, [first, middle, last]), tmp_path / "zero", name, [dict(kept).get(first, 0.0), 0.0, 0.9])
    without = outcome((base, [path for path, _ in kept]), tmp_path / "without", name, [weight for _, weight in kept])
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
