"""Screening: planted anomalies score above every honest adapter, and honest ones alarm nobody.

Honest are the adapters of examples/, which were trained on SmolLM2-135M. Oracle of the numbers: dense SVDs by numpy.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from composer.adapters import Adapter, open_adapter
from composer.deltas import LowRank
from composer.recipe import parse_recipe
from composer.screening import Measurement, measure, measure_sum, modified_z
from composer.tensors import read_header
from registry.access import Principal, Scope
from registry.api.app import create_app
from registry.schemas import Screening
from registry.screening import judge
from registry.services.jobs import JobService
from registry.services.local import LocalRegistry
from tests.support import plan_folders, write_base, write_lora, write_tensors

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "adapters"
HONEST = ("json", "shout")
MODULES = {f"model.layers.{layer}.self_attn.{kind}": (12, 8) for layer in range(8) for kind in ("q_proj", "v_proj")}


def values(screening: Screening) -> dict[str, float]:
    """Code to value."""
    return {score.code: score.value for score in screening.scores}


def alarmed(screening: Screening | None) -> set[str]:
    """The codes above their thresholds."""
    return {score.code for score in (screening.scores if screening else ()) if score.alarm}


def planted(folder: Path, name: str, changes: dict[str, Any]) -> Adapter:
    """An adapter of examples/ with a function applied to some of its tensors, by a part of their names."""
    shutil.copytree(EXAMPLES / name, folder)
    weights = folder / "adapter_model.safetensors"
    tensors = {key: spec.read() for key, spec in read_header(weights).tensors.items()}
    for part, change in changes.items():
        keys = [key for key in tensors if part in key]
        assert keys
        tensors |= {key: change(tensors[key]).astype(tensors[key].dtype) for key in keys}
    write_tensors(weights, tensors, {"format": "pt"})
    return open_adapter(folder)


def spike(times: float) -> Any:
    """One direction of B that is `times` the length of its longest."""

    def change(b: np.ndarray) -> np.ndarray:
        b = b.astype(np.float32)
        longest = np.linalg.norm(b, axis=0).max()
        direction = np.random.default_rng(0).normal(size=len(b)).astype(np.float32)
        b[:, 0] += direction / np.linalg.norm(direction) * longest * times
        return b

    return change


def test_the_numbers_are_those_of_dense_matrices(tmp_path: Path) -> None:
    """Norm, share of first directions, strongest module and outlier, each from the product itself."""
    adapter = open_adapter(write_lora(tmp_path / "adapter", MODULES, rank=3))
    names = {target.parameter: target.parameter for target in adapter.signature.targets}
    dense: dict[str, np.ndarray] = {}
    for delta in adapter.deltas(names):
        assert isinstance(delta, LowRank)
        loaded = delta.load()
        product = loaded.left.astype(np.float64) @ loaded.right.astype(np.float64) * float(loaded.scale)
        dense[delta.target] = np.linalg.svd(product, compute_uv=False)
    energies = {key: float(np.square(s).sum()) for key, s in dense.items()}
    total = sum(energies.values())
    found = measure(adapter)
    assert found.norm == pytest.approx(total**0.5, rel=1e-5)
    assert found.share == pytest.approx(sum(float(s[0]) ** 2 for s in dense.values()) / total, rel=1e-5)
    assert found.concentration == pytest.approx(max(energies.values()) * len(energies) / total, rel=1e-5)
    assert found.concentration_at == max(energies, key=energies.__getitem__)
    kind = str(found.outlier_at).split(".")[-2]
    logs = [np.log(s[0]) for key, s in dense.items() if key.split(".")[-2] == kind]
    assert found.outlier == pytest.approx(modified_z(max(logs), logs, 0.1), rel=1e-4)


def test_a_modified_z_is_the_papers() -> None:
    """0.6745 (x − median) / MAD, where one wild value among the others moves neither."""
    assert modified_z(10.0, [1.0, 2.0, 3.0, 4.0, 1e9], 0.0) == pytest.approx(0.6745 * 7)


@pytest.mark.parametrize("module", ["layers.4.self_attn.q_proj", "layers.17.self_attn.v_proj"])
@pytest.mark.parametrize("name", HONEST)
def test_a_planted_direction_scores_above_all_honest_adapters(tmp_path: Path, name: str, module: str) -> None:
    """One strong direction in one module, as a trigger would be written: in its spectrum and in its energy.

    shout's v_proj modules differ so much among themselves that there only the energy alarms.
    """
    honest = [judge(measure(open_adapter(EXAMPLES / each))) for each in HONEST]
    assert not any(alarmed(screening) for screening in honest)
    found = judge(measure(planted(tmp_path / "planted", name, {f"{module}.lora_B": spike(40)})))
    wide = name == "shout" and "v_proj" in module
    assert alarmed(found) == {"energy-concentration", *([] if wide else ["spectral-outlier"])}
    assert all(module in str(score.where) for score in found.scores)
    for code, value in values(found).items():
        assert value > max(values(screening)[code] for screening in honest)


def population(count: int = 9) -> list[Measurement]:
    """Honest adapters of one base: those of examples/ at strengths that differ by half."""
    random = np.random.default_rng(0)
    known = [measure(open_adapter(EXAMPLES / name)) for name in HONEST]
    return [replace(known[i % 2], rms=float(known[i % 2].rms or 0) * random.lognormal(0, 0.4)) for i in range(count)]


def test_a_population_shows_what_is_too_strong_too_narrow_or_new(tmp_path: Path) -> None:
    """Ten times the strength, one direction in all modules, an embedding; none of the honest alarms beside the others."""
    honest = population()
    quiet = [judge(item, honest[:index] + honest[index + 1 :]) for index, item in enumerate(honest)]
    assert not any(alarmed(screening) for screening in quiet)
    strong = planted(tmp_path / "strong", "json", {"lora_B": lambda b: b * 10})
    narrow = planted(tmp_path / "narrow", "json", {"lora_B": lambda b: b * (np.arange(b.shape[1]) == 0)})
    new = replace(honest[0], kinds=(*honest[0].kinds, "embed_tokens"))
    for found, code in (
        (measure(strong), "norm-of-population"),
        (measure(narrow), "rank-of-population"),
        (new, "unseen-modules"),
    ):
        screening = judge(found, honest)
        assert code in alarmed(screening)
        assert values(screening)[code] > max(values(each)[code] for each in quiet)
    assert alarmed(judge(measure(strong), honest[:7])) == set()  # too few to compare with


def test_a_sum_that_is_stronger_than_its_parts_is_shown(tmp_path: Path) -> None:
    """Two adapters that each carry half of one hidden change, beside two honest ones; oracle: the dense sums."""
    random = np.random.default_rng(0)
    base = write_base(
        tmp_path / "base",
        {f"{name}.weight": random.normal(0, 1, shape).astype(np.float32) for name, shape in MODULES.items()},
    )
    folders = [write_lora(tmp_path / name, MODULES, seed=seed) for seed, name in enumerate(("one", "two"))]
    honest = judge(measure_sum(plan_folders(base, [(folder, 1.0) for folder in folders])))
    hidden = "model.layers.3.self_attn.q_proj"
    part = {"a": random.normal(0, 1, (1, 8)), "b": random.normal(0, 1, (12, 1))}
    for folder in folders:
        weights = folder / "adapter_model.safetensors"
        tensors = {key: spec.read() for key, spec in read_header(weights).tensors.items()}
        for letter, axis in (("a", 0), ("b", 1)):
            key = f"base_model.model.{hidden}.lora_{letter.upper()}.weight"
            own = np.take(tensors[key], [1], axis)
            tensors[key] = np.concatenate([part[letter], own], axis).astype(np.float32)
        write_tensors(weights, tensors, {"format": "pt"})
    plan = plan_folders(base, [(folder, 0.5) for folder in folders])
    found = judge(measure_sum(plan))
    assert alarmed(honest) == set()
    assert "stacked-sum" in alarmed(found)
    assert values(found)["stacked-sum"] > values(honest)["stacked-sum"]
    job = next(job for job in plan.jobs if job.name == f"{hidden}.weight")
    dense = [item.weight * item.delta.load().rows(0, 12, np.zeros((12, 8), np.float32)) for item in job.deltas]
    apart = sum(float(np.square(each).sum()) for each in dense) ** 0.5
    assert values(found)["stacked-sum"] == pytest.approx(float(np.linalg.norm(sum(dense))) / apart, abs=1e-3)


def test_scores_are_shown_wherever_an_adapter_is(registry: LocalRegistry, tmp_path: Path) -> None:
    """At publish, in show, plan and compose, and over REST; nothing is refused, and private adapters do not count."""
    random = np.random.default_rng(0)
    base = write_base(
        tmp_path / "base",
        {f"{name}.weight": random.normal(0, 1, shape).astype(np.float32) for name, shape in MODULES.items()},
    )
    registry.add_base(base, name="base")
    for seed in range(9):
        folder = write_lora(tmp_path / f"a{seed}", MODULES, seed=seed)
        result = registry.publish(folder, name=f"team/a{seed}", base="base", private=seed == 8)
        assert alarmed(result.version.screening) == set()
    loud = registry.publish(write_lora(tmp_path / "loud", MODULES, seed=0, std=0.9), name="other/loud", base="base")
    assert alarmed(loud.version.screening) == {"norm-of-population"}
    assert loud.version.screening is not None
    assert loud.version.screening.population == 8
    assert "80.9 times as strong" in loud.warnings[-1]
    stranger = registry.acting_as(Principal("mallory", frozenset({Scope.READ})))
    assert stranger.get_version("other/loud").screening == registry.get_version("other/loud").screening
    plan = registry.plan(parse_recipe("base+team/a0+other/loud:0.0123"))
    assert [alarmed(item.screening) for item in plan.adapters] == [set(), {"norm-of-population"}]
    assert "stacked-sum" in alarmed(plan.screening)  # the same seed: one is the other, brought to its strength
    assert sum(line.startswith("screening: ") for line in plan.warnings) == 2
    made = registry.compose(parse_recipe("base+team/a0+other/loud:0.0123"), tmp_path / "out")
    assert (made.screening, made.warnings[-2:]) == (plan.screening, plan.warnings[-2:])
    assert "screening" not in made.record
    app = TestClient(create_app(registry, JobService(registry)))
    shown = app.get("/api/v1/adapters/other/loud").json()["screening"]
    assert Screening.model_validate(shown) == registry.get_version("other/loud").screening
    assert app.get("/api/v1/adapters").json()["items"][0]["screening"] is None
