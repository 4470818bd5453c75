"""`--untie` from publish to a model that runs, on this machine and through a service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.composer.adapters.oracles import live_logits, load_model, logits, random_adapter
from tests.conftest import llama_config, save_model


@pytest.fixture
def tied(run: Any, tmp_path: Path) -> Any:
    """A registry with a base whose ends are tied and a LoRA on its head, published on it; gives `run`."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(9)
    base = save_model(LlamaForCausalLM(llama_config(tie_word_embeddings=True)), tmp_path / "tied")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    adapter = random_adapter(base, tmp_path / "head", config)
    run("base", "add", base, "--name", "tied")
    run("publish", adapter, "--name", "team/head", "--base", "tied")
    return run


def test_an_adapter_of_a_tied_head_belongs_on_its_base(tied: Any, tmp_path: Path) -> None:
    """The catalogue knows the head that is not stored: exact; plan and compose ask for the option and take it."""
    assert tied("check", "team/head", "tied", "--format", "quiet").stdout.strip() == "exact"
    assert "team/head" in tied("compatible", "tied").stdout
    assert "--untie" in tied("compose", "tied+team/head", code=4).stderr
    planned = json.loads(tied("plan", "tied+team/head", "--untie", "--format", "json").stdout)
    tied("compose", "tied+team/head", "--untie", "-o", "out")
    assert planned["files"] == {
        path.name: path.stat().st_size for path in Path("out").iterdir() if path.name != "composition.json"
    }
    live = live_logits(tmp_path / "tied", tmp_path / "head")
    torch.testing.assert_close(logits(load_model(Path("out"))), live, atol=1e-5, rtol=1e-5)
    Path("recipe.yaml").write_text("{base: tied, adapters: [team/head], untie: true}")
    tied("compose", "recipe.yaml", "-o", "again")
    for name in planned["files"]:
        assert Path("out", name).read_bytes() == Path("again", name).read_bytes()


def test_a_service_unties_too(run: Any, service: str, tmp_path: Path) -> None:
    """The recipe's field travels; the model that is fetched has both ends."""
    from transformers import LlamaForCausalLM

    base = save_model(LlamaForCausalLM(llama_config(tie_word_embeddings=True)), tmp_path / "tied")
    adapter = random_adapter(base, tmp_path / "head", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    run("--url", service, "base", "add", base, "--name", "tied-too")
    run("--url", service, "publish", adapter, "--name", "team/end", "--base", "tied-too")
    assert "--untie" in run("--url", service, "compose", "tied-too+team/end", code=4).stderr
    run("--url", service, "compose", "tied-too+team/end", "--untie", "-o", "out")
    live = live_logits(base, adapter)
    torch.testing.assert_close(logits(load_model(Path("out"))), live, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_an_untied_model_runs_in_onnx_runtime(tied: Any) -> None:
    """The graph is traced for two ends; what is published was compared with torch."""
    pytest.importorskip("onnxruntime")
    tied("compose", "tied+team/head", "--untie", "--export", "onnx", "-o", "graph")
    export = json.loads(Path("graph/composition.json").read_text())["export"]
    assert export["max_abs_diff"] <= export["tolerance"]
    assert Path("graph/model.onnx").is_file()
