"""Unmodified clients write to the service: what they push becomes versions and bases, or is refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.recipe import parse_recipe
from composer.tensors import read_header
from registry.services.local import open_registry
from tests.registry.hub.conftest import Hub
from tests.support import edit_json, write_tensors


def changed(source: Path, folder: Path, file: str, value: float) -> Path:
    """A copy of a model or an adapter with another number in one tensor."""
    shutil.copytree(source, folder)
    tensors = {name: spec.read().copy() for name, spec in read_header(source / file).tensors.items()}
    next(iter(tensors.values())).reshape(-1)[0] = value
    write_tensors(folder / file, tensors, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pushed(hub: Hub, tiny_llama: Path, tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What huggingface_hub got for its writes; the adapter names its base as this hub's lab/base."""
    folder = tmp_path_factory.mktemp("push")
    adapter = Path(shutil.copytree(tiny_lora, folder / "adapter"))
    (adapter / "README.md").unlink()
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="lab/base")
    (adapter / "training_args.bin").write_bytes(b"a pickle")
    broken = changed(adapter, folder / "broken", "adapter_model.safetensors", np.nan)
    base = changed(tiny_llama, folder / "base", "model.safetensors", 1.0)
    found: dict[str, Any] = hub.client("push_small", adapter, base, broken)
    return found


def test_the_same_files_are_the_same_commit(pushed: dict[str, Any]) -> None:
    """A push of what is there is no news; a copy and its removal lead back to the commit before."""
    assert pushed["again"] == pushed["first"] == pushed["deleted"]
    assert pushed["copied"] != pushed["first"] != pushed["draft"]
    wanted = ["README.md", "adapter_config.json", "adapter_model.safetensors", "docs", "docs/copy.md"]
    assert pushed["tree"] == wanted  # training_args.bin is left out of every push


def test_what_is_refused_is_refused_with_its_reason(pushed: dict[str, Any]) -> None:
    """The status, and words that the client shows; the branch stays where it was."""
    for key, status, words in (
        ("exists", 409, "exists already"),
        ("gated", 403, "gated"),
        ("missing", 404, "nope.txt"),
        ("stale", 412, "a commit has happened since"),
        ("pickle", 403, "pickle"),
        ("nan", 422, "NaN"),
        ("pull request", 400, "create a branch"),
        ("taken", 409, "stable"),
        ("version stays", 403, "versions stay"),
        ("no branch", 404, "dev"),
        ("in use", 409, "lab/voice"),
    ):
        assert pushed[key][0] == status, (key, pushed[key])
        assert words in pushed[key][1], (key, pushed[key])
    assert pushed["hidden"] == [True, False]
    assert pushed["after"] == pushed["deleted"]


def test_tags_are_versions_and_aliases(pushed: dict[str, Any]) -> None:
    """A semantic version publishes the commit that is tagged, from any branch; other names are aliases of a version."""
    tags = pushed["tags"]
    assert tags["2.0.0"] == tags["v2.0.0"] == pushed["branches"]["dev"] == pushed["branches"]["main"]
    assert tags["stable"] == tags["0.1.0"] == pushed["first"]
    assert "Second." in pushed["read"]
    assert pushed["history"][0].startswith("Upload README.md")
    assert len(pushed["history"]) == 4  # the draft, the adapter, the copy and what was tagged


def test_repositories_are_named_moved_and_deleted(pushed: dict[str, Any]) -> None:
    """One without a namespace is the caller's; a base is not deleted while an adapter needs it."""
    assert (pushed["url"], pushed["own"]) == ("lab/echo", "default/mine")
    assert (pushed["moved"], pushed["gone"]) == (404, [False, False])


@pytest.mark.slow
def test_push_to_hub_of_transformers_peft_and_trainer(hub: Hub, tmp_path: Path) -> None:
    """What they push loads with the logits that it had; adapters are tied to the base that they were trained on.

    The base is known by this hub's name of it, by the folder of a download, and through a trainer's checkpoints. Other
    weights pushed to a model's repository are another base, and what main stands for.
    """
    assert hub.client("push_libraries", tmp_path) == dict.fromkeys(
        ("base", "named", "folder", "trained", "merged", "merged again"), 0.0
    )
    registry = open_registry(hub.home)
    base = registry.get_base("lab/model")
    for name in ("lab/named", "lab/folder", "lab/trained"):
        version = registry.get_version(name)
        assert (version.base_status, version.base, version.kind) == ("verified", "lab/model", "lora"), name
        pulled = tmp_path / name
        registry.pull(name, pulled)
        assert json.loads((pulled / "adapter_config.json").read_text())["base_model_name_or_path"] == "lab/model"
        card = (pulled / "README.md").read_text()
        assert f"base_model_fingerprint: {base.fingerprint}" in card
        assert "snapshots" not in card
        assert not list(pulled.rglob("*.bin"))
    assert len(registry.list_versions("lab/trained").items) >= 2
    merged = [item.name for item in registry.list_bases().items if item.name.startswith("lab/merged")]
    assert len(merged) == 2
    registry.compose(parse_recipe("lab/model+lab/named"), tmp_path / "composed")
    registry.close()
