"""`compose --export peft` from names to a folder that can be published again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def test_a_composed_lora_is_published_like_any_other(two: Any) -> None:
    """The card carries the base's fingerprint, so the new adapter is exact on it, and composing it needs no flag."""
    two("compose", "tiny+team/shout:0.7+team/json", "--export", "peft", "-o", "both")
    two("publish", "./both", "--name", "team/both")
    shown = json.loads(two("show", "team/both", "--format", "json").stdout)
    assert (shown["kind"], shown["base"], shown["base_status"]) == ("lora", "tiny", "verified")
    assert shown["rank"] == 12
    assert two("check", "team/both", "tiny", "--format", "quiet").stdout.strip() == "exact"
    two("compose", "tiny+team/both")


def test_the_plan_says_how_large_and_the_result_what_it_cost(two: Any) -> None:
    """Bytes to the last one; the energy that the rank discards, in the record and on the screen."""
    recipe = ("tiny+team/shout:0.7+team/json", "--export", "peft", "--rank", "3")
    planned = json.loads(two("plan", *recipe, "--format", "json").stdout)
    shown = two("compose", *recipe).stdout
    out = Path("tiny+shout+json-peft-r3")
    assert planned["files"] == {"adapter_model.safetensors": (out / "adapter_model.safetensors").stat().st_size}
    lost = json.loads((out / "composition.json").read_text())["export"]["discarded_energy"]
    assert 0 < lost < 1
    assert f"{lost:.3%}" in shown
    assert "it was there already" in two("compose", *recipe).stdout
    Path("recipe.yaml").write_text("{base: tiny, adapters: [team/shout], export: peft, rank: 2}")
    two("compose", "recipe.yaml", "-o", "small")
    assert json.loads(Path("small/adapter_config.json").read_text())["r"] == 2
    two("compose", "tiny+team/shout", "--rank", "3", code=2)


def test_inputs_of_another_base_make_no_claim(two: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """A LoRA made with --allow shape was not trained on this base, and its card does not say so."""
    import shutil

    from tests.support import read_tensors, write_base

    changed = {name: tensor.float().numpy() for name, tensor in read_tensors(tiny_llama).items()}
    changed["model.norm.weight"] = changed["model.norm.weight"] + 1
    shutil.copytree(tiny_llama, tmp_path / "changed")
    config = json.loads((tiny_llama / "config.json").read_text())
    write_base(tmp_path / "changed", changed, **config)
    two("compose", f"{tmp_path / 'changed'}+team/shout", "--export", "peft", "--allow", "shape", "-o", "loose")
    assert "base_model_fingerprint" not in Path("loose/README.md").read_text()
    two("compose", "tiny+team/shout", "--export", "peft", "-o", "tied")
    assert 'base_model_fingerprint: "wf1:' in Path("tied/README.md").read_text()


def test_a_service_writes_the_same_lora(registry: Any, service: str, two: Any) -> None:
    """Over REST, as a job: the same three files."""
    recipe = ("tiny+team/shout:0.7+team/json", "--export", "peft", "--rank", "5")
    two("compose", *recipe, "-o", "here")
    two("--url", service, "compose", *recipe, "-o", "there")
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert Path("here", name).read_bytes() == Path("there", name).read_bytes()
