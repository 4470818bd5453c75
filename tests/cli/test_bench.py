"""The command bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cli.bench import RUNTIMES
from composer import latency

BASE = Path(__file__).parents[1] / "fixtures" / "bottlenecks" / "llama" / "base"
QUICK = ("--prompt", 4, "--new", 2, "--rounds", 1)


def test_a_table_for_people_and_numbers_for_programs(run: Any) -> None:
    """Each model a line, against the first; JSON has the workload as well."""
    lines = run("bench", BASE, BASE, *QUICK).stdout.splitlines()
    assert lines[0].split()[:3] == ["MODEL", "RUNTIME", "PREFILL"]
    assert len(lines) == 3
    assert lines[1].rstrip().endswith("1.00×")
    found = json.loads(run("bench", BASE, *QUICK, "--format", "json").stdout)
    assert found["workload"] == {"prompt": 4, "new": 2, "batch": 1, "rounds": 1, "threads": None}
    assert [model["runtime"] for model in found["models"]] == ["torch"]
    assert float(run("bench", BASE, *QUICK, "--format", "quiet").stdout) > 0


def test_the_choices_are_the_modules() -> None:
    """--help need not import what measures."""
    assert RUNTIMES == latency.RUNTIMES
    assert "torch" in latency.RUNTIMES


def test_a_folder_that_is_none_ends_with_3(run: Any) -> None:
    """As everywhere."""
    assert "does not exist" in run("bench", "./nothing", code=3).stderr
