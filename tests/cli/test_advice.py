"""Advice through the commands, here and over REST."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

LLAMA = Path(__file__).parents[1] / "fixtures" / "bottlenecks" / "llama"
CODES = ["bottlenecks-add-latency", "few-training-examples"]


@pytest.mark.parametrize("remote", [False, True])
def test_advice_is_given_by_publish_plan_and_compose(run: Any, service: str, remote: bool, tmp_path: Path) -> None:
    """With code and source; people read it on stderr, and it stays in composition.json."""
    shutil.copytree(LLAMA / "houlsby", tmp_path / "houlsby")
    (tmp_path / "houlsby" / "README.md").write_text("Trained on 40 examples.")
    to = ("--url", service) if remote else ()
    recipe = ("tiny+team/houlsby", "--export", "bundle")
    run(*to, "base", "add", LLAMA / "base", "--name", "tiny")
    publish = ("publish", tmp_path / "houlsby", "--name", "team/houlsby", "--base", "tiny")
    for words in (publish, ("plan", *recipe), ("compose", *recipe, "-o", "out")):
        found = json.loads(run(*to, *words, "--format", "json").stdout)
        assert [advice["code"] for advice in found["advice"]] == CODES
        assert all(advice["source"].startswith("https://arxiv.org/abs/") for advice in found["advice"])
        assert all(advice["adapter"].startswith("team/houlsby") for advice in found["advice"])
    lines = run(*to, "plan", *recipe).stderr.splitlines()
    assert [line.startswith("advice: team/houlsby@0.1.0: ") for line in lines] == [True, True]
    assert "[few-training-examples, https://arxiv.org/abs/2006.05987]" in lines[1]
    record = json.loads((Path("out") / "composition.json").read_text())
    assert [advice["code"] for advice in record["advice"]] == CODES
