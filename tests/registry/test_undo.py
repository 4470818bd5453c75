"""Adapters taken out again: the base's own tensors, or what composing the others gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from composer.errors import CorruptFileError, IntegrityError, NotFoundError
from composer.recipe import Dtype, Recipe, parse_recipe
from registry.undo import undo
from tests.conftest import random_lora
from tests.support import edit_json, read_tensors, weight_bytes


@pytest.fixture
def composed(registry: Any, tiny_llama: Path, tiny_lora: Path, other_lora: Path, tmp_path: Path) -> Path:
    """A composition of two registered adapters on a registered base."""
    registry.add_base(tiny_llama, name="tiny")
    registry.publish(tiny_lora, name="team/shout", version="1.0.0", base="tiny")
    registry.publish(other_lora, name="team/json", base="tiny")
    registry.compose(parse_recipe("tiny+team/shout@1.0.0:0.7+team/json"), tmp_path / "both")
    return tmp_path / "both"


def test_without_all_adapters_the_bases_bytes_come_back(
    registry: Any, composed: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Every tensor, bit for bit, also where the composition was written in another number format."""
    result = undo(registry, composed, tmp_path / "base")
    registry.compose(parse_recipe("tiny+team/json", dtype=Dtype.FP32), tmp_path / "wide")
    undo(registry, tmp_path / "wide", tmp_path / "base2")
    expected = read_tensors(tiny_llama)
    for out in (tmp_path / "base", tmp_path / "base2"):
        found = read_tensors(out)
        assert set(found) == set(expected)
        assert all(found[name].dtype == tensor.dtype and found[name].equal(tensor) for name, tensor in expected.items())
    assert result.record["base"]["fingerprint"] == registry.get_base("tiny").fingerprint


@pytest.mark.parametrize("name", ["team/shout", "team/shout@1.0.0"])
def test_without_one_adapter_it_is_what_the_others_give(
    registry: Any, composed: Path, tmp_path: Path, name: str
) -> None:
    """Oracle: composing the others at first hand, byte for byte."""
    undo(registry, composed, tmp_path / "left", adapters=[name])
    registry.compose(parse_recipe("tiny+team/json"), tmp_path / "direct")
    assert weight_bytes(tmp_path / "left") == weight_bytes(tmp_path / "direct")


def test_a_newer_version_does_not_slip_in(registry: Any, composed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """The recipe said latest; what is left is pinned to the digest that was composed then."""
    registry.compose(parse_recipe("tiny+team/json"), tmp_path / "before")
    newer = random_lora(tiny_llama, tmp_path / "newer", seed=99, target_modules=["q_proj"])
    registry.publish(newer, name="team/json", base="tiny")
    undo(registry, composed, tmp_path / "left", adapters=["team/shout"])
    assert weight_bytes(tmp_path / "left") == weight_bytes(tmp_path / "before")


def test_a_folder_that_changed_is_refused(registry: Any, composed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """An adapter given as a folder must still hold the bytes that were composed."""
    folder = random_lora(tiny_llama, tmp_path / "mine", seed=5, target_modules=["q_proj"])
    adapters = ({"ref": "team/shout"}, {"ref": str(folder)})
    registry.compose(Recipe(base="tiny", adapters=adapters), tmp_path / "mixed")
    undo(registry, tmp_path / "mixed", tmp_path / "good", adapters=["team/shout"])
    edit_json(folder / "adapter_config.json", lora_alpha=99)
    with pytest.raises(IntegrityError, match="no longer holds"):
        undo(registry, tmp_path / "mixed", tmp_path / "bad", adapters=["team/shout"])
    assert not (tmp_path / "bad").exists()


def test_what_is_not_there_cannot_be_taken_out(registry: Any, composed: Path, tmp_path: Path) -> None:
    """An adapter that is no part of it, a folder without a record, a record that says nothing."""
    with pytest.raises(NotFoundError, match="team/other"):
        undo(registry, composed, tmp_path / "out", adapters=["team/other"])
    with pytest.raises(NotFoundError):
        undo(registry, tmp_path, tmp_path / "out")
    record = json.loads((composed / "composition.json").read_text())
    for damage in ({"base": {}}, {"adapters": []}, {"recipe": {}}):
        (composed / "composition.json").write_text(json.dumps({**record, **damage}))
        with pytest.raises(CorruptFileError):
            undo(registry, composed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_tensors_than_the_bases_do_not_stay(
    registry: Any, composed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault injection: a composition that gives other tensors (a quantised base is decoded) is an error, and removed."""
    import registry.undo as module
    from registry.claims import fingerprint_folder

    monkeypatch.setattr(module, "fingerprint_folder", lambda folder, progress: fingerprint_folder(composed))
    with pytest.raises(IntegrityError, match="not the base's own"):
        undo(registry, composed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
