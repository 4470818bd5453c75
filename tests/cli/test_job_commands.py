"""Jobs from the command line: queued, run by a worker, shown, cancelled and retried."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cli.options import JOB_STATES
from registry.schemas import JobState
from tests.cli.conftest import Run
from tests.support import write_base, write_lora

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def filled(run: Run, tmp_path: Path) -> Run:
    """A base and an adapter."""
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": np.ones((6, 4), np.float32)})
    run("base", "add", base, "--name", "base")
    run("publish", write_lora(tmp_path / "lora", {MODULE: (6, 4)}), "--name", "a", "--base", "base")
    return run


def test_a_queued_recipe_waits_for_a_worker(filled: Run) -> None:
    """compose --queue prints the job, the same again prints the same, a worker runs it."""
    job = filled("compose", "base+a:0.5", "--queue", "--format", "quiet").stdout.strip()
    assert filled("compose", "base+a:0.5", "--queue", "--format", "quiet").stdout.strip() == job
    assert filled("jobs", "list", "--state", "queued", "--format", "quiet").stdout.split() == [job]
    filled("worker", "--drain", "--format", "quiet")
    shown = json.loads(filled("jobs", "show", job, "--format", "json").stdout)
    assert (shown["state"], shown["title"]) == ("succeeded", "base+a:0.5")
    assert "succeeded" in filled("jobs", "list").stdout


def test_a_job_is_cancelled_and_retried(filled: Run) -> None:
    """What is over is not cancelled (7), what waits is not retried (7), what is unknown is not found (3)."""
    job = filled("compose", "base+a", "--queue", "--format", "quiet").stdout.strip()
    filled("jobs", "retry", job, code=7)
    assert filled("jobs", "cancel", job, "--format", "quiet").stdout.strip() == "cancelled"
    filled("jobs", "cancel", job, code=7)
    assert filled("jobs", "retry", job, "--format", "quiet").stdout.strip() == "queued"
    filled("jobs", "show", "nothing", code=3)
    filled("compose", "./x+a", "--queue", code=6)


def test_a_base_is_verified(filled: Run, tmp_path: Path) -> None:
    """0 while every tensor is what was registered, 5 with the tensor's name when one is not."""
    assert "yes" in filled("base", "verify", "base").stdout
    write_base(tmp_path / "base", {f"{MODULE}.weight": np.zeros((6, 4), np.float32)})
    assert MODULE in filled("base", "verify", "base", code=5).stdout


def test_the_states_are_those_of_the_schema() -> None:
    """The list of --state is written twice, so that --help imports nothing."""
    assert tuple(JobState) == JOB_STATES
