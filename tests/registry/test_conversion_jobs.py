"""Extract, resize, delta and restore as jobs of a service: the bytes of the local registry, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from composer.errors import ConflictError, NotFoundError, PolicyError, UsageError
from composer.recipe import parse_recipe
from registry.client import RemoteRegistry
from registry.schemas import JobState
from registry.undo import undo
from tests.registry.test_client import remote  # noqa: F401
from tests.support import read_tensors, weight_bytes


@pytest.fixture
def both(remote: RemoteRegistry, registry: Any, tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> RemoteRegistry:  # noqa: F811
    """A service that knows a base, a fine-tune of it, a LoRA and the fine-tune's delta."""
    registry.add_base(tiny_llama, name="tiny")
    registry.publish(tiny_lora, name="team/shout", base="tiny")
    registry.compose(parse_recipe("tiny+team/shout"), tmp_path / "tuned")
    registry.add_base(tmp_path / "tuned", name="tuned")
    registry.make_delta("tuned", "tiny", tmp_path / "full")
    registry.publish(tmp_path / "full", name="team/full")
    return remote


def same_files(one: Path, other: Path) -> bool:
    """Names and bytes."""
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)]
    return bool(files[0]) and files[0] == files[1]


def test_conversions_give_the_bytes_of_the_local_registry(both: RemoteRegistry, registry: Any, tmp_path: Path) -> None:
    """Every file of all four; the weights of a restored fine-tune are its own."""
    for side in (registry, both):
        out = tmp_path / type(side).__name__
        extracted = side.extract("tuned", "tiny", out / "extract", rank=4, ignore_rest=True)
        assert extracted.out == str(out / "extract")
        assert 0.9 < extracted.kept_energy <= 1
        assert side.resize("team/shout", out / "resize", rank=2).record["rank"] == 2
        assert side.make_delta("tuned", "tiny", out / "delta").tensors > 0
        side.restore_delta("team/full", "tiny", out / "restore")
    for name in ("extract", "resize", "delta", "restore"):
        assert same_files(tmp_path / "LocalRegistry" / name, tmp_path / "RemoteRegistry" / name), name
    assert weight_bytes(tmp_path / "RemoteRegistry" / "restore") == weight_bytes(tmp_path / "tuned")


def test_the_same_conversion_is_the_same_job(both: RemoteRegistry, tmp_path: Path) -> None:
    """By what its names mean; another rank is another job."""
    for name, rank in (("one", 2), ("two", 2), ("three", 3)):
        both.resize("team/shout", tmp_path / name, rank=rank)
    jobs = both.list_jobs().items
    assert [job.kind for job in jobs] == ["resize", "resize"]
    assert {job.state for job in jobs} == {JobState.SUCCEEDED}
    assert same_files(tmp_path / "one", tmp_path / "two")
    assert not same_files(tmp_path / "one", tmp_path / "three")


def test_a_conversion_that_fails_leaves_nothing(both: RemoteRegistry, tmp_path: Path) -> None:
    """The job's own error arrives; names and places are checked before any work."""
    with pytest.raises(UsageError):
        both.extract("tuned", "tiny", tmp_path / "sizeless")
    with pytest.raises(NotFoundError):
        both.extract("nobody", "tiny", tmp_path / "out", rank=2)
    with pytest.raises(NotFoundError):
        both.restore_delta("team/nobody", "tiny", tmp_path / "out")
    for call in (
        lambda: both.extract("./tuned", "tiny", tmp_path / "out", rank=2),
        lambda: both.make_delta("tuned", str(tmp_path), tmp_path / "out"),
        lambda: both.restore_delta("./full", "tiny", tmp_path / "out"),
    ):
        with pytest.raises(PolicyError, match="is a local path"):
            call()
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConflictError):
        both.make_delta("tuned", "tiny", tmp_path / "taken")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "sizeless").exists()
    assert [job.kind for job in both.list_jobs().items] == ["extract"]


def test_paths_are_refused_by_the_service_itself(both: RemoteRegistry) -> None:
    """Whatever client asks."""
    for kind, body in (("extract", {"finetune": "/etc", "base": "tiny", "rank": 1}), ("resize", {"ref": "./x", "rank": 1}),
                       ("delta", {"finetune": "tuned", "base": "../x"}), ("restore", {"ref": "/x", "base": "tiny"})):  # fmt: skip
        with pytest.raises(PolicyError, match="is a local path"):
            both._send("POST", f"/conversions/{kind}", json=body)


def test_undo_composes_on_the_service(both: RemoteRegistry, tiny_llama: Path, tmp_path: Path) -> None:
    """The record lies at the client, the inputs at the service: the base's own tensors come back."""
    both.compose(parse_recipe("tiny+team/shout"), tmp_path / "composed")
    undo(both, tmp_path / "composed", tmp_path / "bare")
    expected, found = read_tensors(tiny_llama), read_tensors(tmp_path / "bare")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
