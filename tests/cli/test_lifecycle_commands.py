"""The life of a version from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.cli.conftest import Run
from tests.support import write_base, write_lora

MODULE = "model.layers.0.self_attn.q_proj"


def test_a_life_on_the_command_line(run: Run, tmp_path: Path) -> None:
    """Each command and its exit code: 6 where a policy refuses, 7 where something is in use, 2 for half a command."""
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": np.ones((6, 4), np.float32)})
    run("base", "add", base, "--name", "base", "--license", "llama3.1")
    run(
        "publish",
        write_lora(tmp_path / "lora", {MODULE: (6, 4)}),
        "--name",
        "a",
        "--base",
        "base",
        "--license",
        "gpl-3.0",
    )
    run("compose", "base+a", "-o", "out", code=6)
    run("compose", "base+a", "-o", "out", "--accept-licences")
    assert "wrong data" in run("yank", "a", "--reason", "wrong data").stdout + run("show", "a@0.1.0").stdout
    run("pull", "a@0.1.0", code=6)
    run("yank", "a@0.1.0", code=2)
    run("yank", "a@0.1.0", "--undo")
    run("quarantine", "a", "--reason", "bad", "--format", "quiet")
    run("pull", "a@0.1.0", code=6)
    run("quarantine", "a", "--lift")
    assert "is deprecated" in run("deprecate", "a", "--reason", "old").stdout
    run("delete", "a@0.1.0", code=7)
    run("base", "remove", "base", code=7)
    assert json.loads(run("gc", "--dry-run", "--keep-records", "0", "--format", "json").stdout)["records"] == 1
    run("gc", "--keep-records", "0")
    run("delete", "a@0.1.0")
    run("base", "remove", "base")
