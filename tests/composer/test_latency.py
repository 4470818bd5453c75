"""Latency: the right models run the right work, each in turn; the times themselves are not tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer import latency
from composer.errors import NotFoundError, UnsupportedArchitectureError, UsageError
from composer.exporters.onnx import export_onnx
from composer.latency import Workload, measure_latency
from composer.recipe import Export
from composer.run import compose
from tests.support import edit_json, plan_folders

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bottlenecks"
LLAMA = FIXTURES / "llama"
WORK = Workload(prompt=6, new=4, batch=2, rounds=3, threads=1)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with bottlenecks."""
    out = tmp_path_factory.mktemp("latency") / "live"
    plan = plan_folders(LLAMA / "base", [(LLAMA / "houlsby", 1.0)], export=Export.BUNDLE)
    return compose(plan, out).out


def test_every_model_is_measured_against_the_first(live: Path) -> None:
    """One row a model, with multiples of the first one's times."""
    rows = measure_latency([LLAMA / "base", live], WORK)
    assert [(row.model, row.runtime) for row in rows] == [(str(LLAMA / "base"), "torch"), (str(live), "torch")]
    assert (rows[0].prefill_against, rows[0].token_against) == (1.0, 1.0)
    assert rows[1].prefill_against == rows[1].prefill_s / rows[0].prefill_s
    assert rows[1].token_against == rows[0].tokens_per_s / rows[1].tokens_per_s
    assert all(row.prefill_s > 0 and row.tokens_per_s > 0 for row in rows)


def test_an_encoder_has_no_tokens_to_decode() -> None:
    """One pass is all."""
    (row,) = measure_latency([FIXTURES / "bert-encoder" / "base"], WORK)
    assert row.tokens_per_s is None
    assert row.token_against is None


def test_rounds_go_through_all_models_in_turn(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to warm up, then as many as asked for; the medians are of the latter."""
    order: list[str] = []
    times = iter([9.0, 9.0, 1.0, 2.0, 3.0, 8.0, 2.0, 4.0])
    monkeypatch.setattr(latency, "_run", lambda runner, work: (next(times), 10.0))
    rows = measure_latency([LLAMA / "base", live], WORK, progress=order.append)
    assert order[:2] == ["loading base (torch)", "loading live (torch)"]
    assert order[2:6] == [f"round {n} of 3: {name} (torch)" for n in (0, 1) for name in ("base", "live")]
    assert [row.prefill_s for row in rows] == [2.0, 4.0]


def test_the_work_is_a_prefill_and_greedy_decoding() -> None:
    """The tokens of a step are the likeliest after the step before it, and the mask grows."""
    seen: list[tuple[np.ndarray, int, Any]] = []

    class Model:
        vocabulary, decodes = 11, True

        def step(self, ids: np.ndarray, mask: np.ndarray, past: Any) -> tuple[np.ndarray, Any]:
            seen.append((ids, mask.shape[1], past))
            logits = np.zeros((len(ids), ids.shape[1], 11))
            logits[:, -1, len(seen)] = 1
            return logits, len(seen)

    prefill, rate = latency._run(Model(), WORK)
    assert prefill >= 0 < rate
    assert seen[0][0].shape == (2, 6)
    assert seen[0][0].max() < 11
    assert [(ids.tolist(), width, past) for ids, width, past in seen[1:]] == [
        ([[n], [n]], 6 + n, n) for n in range(1, 5)
    ]


@pytest.mark.slow
def test_both_runtimes_where_there_is_a_graph(live: Path, tmp_path: Path) -> None:
    """torch for all, ONNX Runtime for those with a graph; asked for by name, all must have one."""
    plan = plan_folders(LLAMA / "base", [(LLAMA / "houlsby", 1.0)], export=Export.ONNX)
    graph = compose(plan, tmp_path / "graph").out
    rows = measure_latency([live, graph], WORK)
    assert [(Path(row.model).name, row.runtime) for row in rows] == [
        ("live", "torch"),
        ("graph", "torch"),
        ("graph", "onnx"),
    ]
    assert rows[2].prefill_against == 1.0
    with pytest.raises(NotFoundError, match=r"no model\.onnx"):
        measure_latency([live], WORK, ("onnx",))
    encoder = tmp_path / "encoder"
    compose(plan_folders(FIXTURES / "bert-encoder" / "base"), encoder)
    export_onnx(encoder)
    assert [row.tokens_per_s for row in measure_latency([encoder], WORK, ("onnx",))] == [None]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    """Too long a prompt, no class of transformers, two stacks, no checkpoint."""
    with pytest.raises(UsageError, match="has 48 positions"):
        measure_latency([LLAMA / "base"], Workload(prompt=40, new=9))
    with pytest.raises(UnsupportedArchitectureError, match="encoder and decoder"):
        measure_latency([FIXTURES / "t5" / "base"], WORK)
    with pytest.raises(NotFoundError):
        measure_latency([tmp_path], WORK)
    folder = compose(plan_folders(LLAMA / "base"), tmp_path / "odd").out
    edit_json(folder / "config.json", architectures=["NoSuchModel"])
    with pytest.raises(UnsupportedArchitectureError, match="NoSuchModel"):
        measure_latency([folder], WORK)
