"""Compositions become repositories: who may, what of them is private or blocked, locally and as jobs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.errors import ConflictError, NotFoundError, PolicyError
from composer.recipe import Export, parse_recipe
from registry.access import Principal, Role, Scope
from registry.errors import DependentsError, ForbiddenError, QuarantinedError
from registry.schemas import JobState, Relation
from registry.services.jobs import JobService
from registry.services.worker import Worker
from tests.support import write_base, write_lora

MODULE = "model.layers.0.self_attn.q_proj"
RECIPE = "base+team/open"
ALICE = Principal("alice", frozenset({Scope.PUBLISH, Scope.COMPOSE}))


@pytest.fixture
def filled(registry: Any, tmp_path: Path) -> Any:
    """A base, a public adapter and a private one."""
    registry.add_base(write_base(tmp_path / "base", {f"{MODULE}.weight": np.ones((6, 4), np.float32)}), name="base")
    for seed, name in enumerate(("open", "secret")):
        folder = write_lora(tmp_path / name, {MODULE: (6, 4)}, seed=seed, std=1.0)
        registry.publish(folder, name=f"team/{name}", base="base", private=name == "secret")
    registry.grant("team", "alice", Role.PUBLISHER)
    return registry


def test_a_composition_is_a_base_that_knows_its_parent(filled: Any, tmp_path: Path) -> None:
    """It is served with its record, composed upon, and needs no folder of the one who composed it."""
    result = filled.compose(parse_recipe(RECIPE), tmp_path / "out", publish="team/loud")
    assert result.published == "team/loud"
    shutil.rmtree(tmp_path / "out")
    base = filled.get_base("team/loud")
    assert (base.parent, base.relation) == ("base", Relation.MERGED)
    snapshot = filled.repositories.snapshot("team/loud")
    assert {"config.json", "model.safetensors", "composition.json"} <= set(snapshot.files)
    assert filled.repositories.path(snapshot, "model.safetensors").stat().st_size > 0
    filled.collect(grace_days=0)
    again = filled.compose(parse_recipe("team/loud+team/open", allow="lineage"), tmp_path / "twice")
    assert again.record["base"]["fingerprint"] == base.fingerprint
    with pytest.raises(DependentsError):
        filled.delete_version("team/open")
    with pytest.raises(NotFoundError):
        filled.publish_composed(tmp_path / "open", "team/not")


def test_one_lora_becomes_an_adapter(filled: Any, tmp_path: Path) -> None:
    """Exact on the base it was composed for, and as private as the most private of its parts."""
    recipe = parse_recipe("base+team/open:0.5+team/secret", export=Export.PEFT)
    result = filled.compose(recipe, tmp_path / "out", publish="team/both")
    assert result.published == "team/both@0.1.0"
    version = filled.get_version("team/both")
    assert version.private is True
    assert filled.check("team/both", "base").level == "exact"


def test_what_is_private_or_blocked_does_not_leave_through_a_composition(filled: Any, tmp_path: Path) -> None:
    """A private adapter in a base is refused; one that is quarantined later blocks the base."""
    with pytest.raises(PolicyError, match="private adapters"):
        filled.compose(parse_recipe("base+team/secret"), tmp_path / "one", publish="team/leak")
    filled.compose(parse_recipe(RECIPE), tmp_path / "two", publish="team/loud")
    filled.quarantine("team/open", "malicious")
    with pytest.raises(QuarantinedError):
        filled.repositories.snapshot("team/loud")
    with pytest.raises(QuarantinedError):
        filled.compose(parse_recipe("team/loud"), tmp_path / "three")
    filled.quarantine("team/open", None)
    assert filled.repositories.snapshot("team/loud").base is not None


def test_publishing_asks_for_a_role_before_the_work(filled: Any, tmp_path: Path) -> None:
    """A member may; a stranger's name, and a token that is limited to namespaces, are refused before anything is composed."""
    alice = filled.acting_as(ALICE)
    limited = filled.acting_as(Principal("alice", ALICE.scopes, frozenset({"team"})))
    for who, name in ((alice, "default/loud"), (limited, "team/loud")):
        with pytest.raises(ForbiddenError):
            who.compose(parse_recipe(RECIPE), tmp_path / "no", publish=name)
    assert not (tmp_path / "no").exists()
    compose = JobService(filled).submit(parse_recipe(RECIPE))
    Worker(filled).drain()
    for principal, name in ((ALICE, "default/loud"), (Principal("bob", ALICE.scopes), "team/loud")):
        with pytest.raises(ForbiddenError):
            JobService(filled).acting_as(principal).submit_publication(compose.id, name)
    assert alice.compose(parse_recipe(RECIPE), tmp_path / "out", publish="team/loud").published == "team/loud"


def test_a_publication_that_runs_twice_is_one(filled: Any, tmp_path: Path) -> None:
    """Its worker may have been killed after it registered the base."""
    jobs = JobService(filled)
    compose = jobs.submit(parse_recipe(RECIPE))
    with pytest.raises(ConflictError):
        jobs.submit_publication(compose.id, "team/loud")
    Worker(filled).drain()
    for _ in range(2):
        job = jobs.submit_publication(compose.id, "team/loud")
        Worker(filled).drain()
        assert jobs.get(job.id).state is JobState.SUCCEEDED, jobs.get(job.id).error
    kept = [path for path in filled.layout.uploads.iterdir() if path.is_dir()]
    assert len(kept) == 1
