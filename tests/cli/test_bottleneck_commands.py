"""Bottlenecks through the commands, here and over REST."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from composer.bottlenecks import BUNDLE, TENSORS
from tests.support import read_tensors

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bottlenecks"
LLAMA = FIXTURES / "llama"


@pytest.mark.parametrize("remote", [False, True])
def test_a_bottleneck_goes_through_every_command(run: Any, service: str, remote: bool) -> None:
    """Published, checked, planned, composed and pulled as any adapter is."""
    to = ("--url", service) if remote else ()
    run(*to, "base", "add", LLAMA / "base", "--name", "tiny")
    houlsby = (LLAMA / "houlsby", "--name", "team/houlsby", "--version", "1.0.0", "--base", "tiny")
    assert run(*to, "publish", *houlsby).stdout.splitlines()[-1] == "bottleneck, 592 parameters"
    run(*to, "publish", LLAMA / "lora", "--name", "team/lora", "--version", "1.0.0", "--base", "tiny")
    shown = json.loads(run(*to, "show", "team/houlsby", "--format", "json").stdout)
    assert (shown["kind"], shown["rank"], shown["parameters"]) == ("bottleneck", 4, 592)
    facts = json.loads(run(*to, "inspect", "team/houlsby", "--format", "json").stdout)
    assert (facts["parameters"], facts["adds"]) == (592, ["4 bottlenecks of rank 4, 592 parameters"])
    assert run(*to, "check", "team/houlsby", "tiny", "--format", "quiet").stdout.split() == ["exact"]
    fits = json.loads(run(*to, "compatible", "tiny", "--format", "json").stdout)
    assert {fit["adapter"]["name"] for fit in fits} == {"team/houlsby", "team/lora"}
    recipe = "tiny+team/lora+team/houlsby"
    plan = json.loads(run(*to, "plan", recipe, "--export", "bundle", "--format", "json").stdout)
    assert plan["additions"] == ["team/houlsby@1.0.0: 4 bottlenecks of rank 4, 592 parameters"]
    run(*to, "compose", recipe, "--export", "bundle", "-o", "out")
    assert {BUNDLE, TENSORS, "model.safetensors", "config.json"} <= {path.name for path in Path("out").iterdir()}
    assert plan["files"][TENSORS] == (Path("out") / TENSORS).stat().st_size
    assert json.loads(run("inspect", "./out", "--format", "json").stdout)["intact"]
    run(*to, "pull", "team/houlsby", "-o", "pulled")
    assert (Path("pulled") / "adapter.safetensors").read_bytes() == (LLAMA / "houlsby/adapter.safetensors").read_bytes()


def test_a_bottleneck_is_taken_out_again(run: Any) -> None:
    """What is left is the merged LoRA, the bottleneck alone, or the base's own tensors."""
    run("base", "add", LLAMA / "base", "--name", "tiny")
    for name in ("lora", "houlsby"):
        run("publish", LLAMA / name, "--name", f"team/{name}", "--version", "1.0.0", "--base", "tiny")
    run("compose", "tiny+team/lora+team/houlsby", "--export", "bundle", "-o", "both")
    run("undo", "./both", "-o", "none")
    run("undo", "./both", "--adapter", "team/houlsby", "-o", "lora")
    run("undo", "./both", "--adapter", "team/lora", "-o", "houlsby")
    run("compose", "tiny+team/lora", "-o", "expected")
    weights = {name: read_tensors(Path(name)) for name in ("none", "lora", "houlsby", "expected")}
    base = read_tensors(LLAMA / "base")
    for name, tensor in base.items():
        assert torch.equal(weights["none"][name], tensor)
        assert torch.equal(weights["houlsby"][name], tensor)
        assert torch.equal(weights["lora"][name], weights["expected"][name])
    assert [(Path(name) / TENSORS).exists() for name in ("none", "lora", "houlsby")] == [False, False, True]


def test_a_pickled_bottleneck_is_refused_with_a_way_to_convert_it(run: Any, tmp_path: Path) -> None:
    """What the library saves by default; it is never opened."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((LLAMA / "houlsby" / "adapter_config.json").read_bytes())
    (folder / "pytorch_adapter.bin").write_bytes(b"\x80\x04not to be loaded")
    result = run("publish", folder, "--name", "team/pickled", code=6)
    assert "pytorch_adapter.bin is a pickle" in result.stderr
    assert "weights_only=True" in result.stderr
