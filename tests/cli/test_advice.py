"""Advice through the commands, here and over REST."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import add_words

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


def test_a_probe_is_recorded_printed_and_part_of_what_a_composition_is(run: Any, tmp_path: Path) -> None:
    """The same text again finds the result there; another text, or none, is another composition."""
    base = add_words(shutil.copytree(LLAMA / "base", tmp_path / "base"), 24)
    Path("text.txt").write_text("w1 w2 w3 w4 w5 w6")
    compose = ("compose", f"{base}+{LLAMA / 'lora'}", "--allow", "shape", "-o", "out")
    lines = run(*compose, "--probe", "text.txt").stdout
    assert "perplexity" in lines
    assert "(5 tokens)" in lines
    assert json.loads(run(*compose, "--probe", "text.txt", "--format", "json").stdout)["cached"]
    assert "already exists" in run(*compose, code=7).stderr
    assert "cannot be read" in run(*compose, "--probe", "none.txt", code=2).stderr
