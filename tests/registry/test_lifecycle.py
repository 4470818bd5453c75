"""The life of a version: yanked, deprecated, quarantined, deleted; bases that are needed stay; what nothing names goes."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from composer.errors import ConflictError, NotFoundError, UsageError
from composer.recipe import parse_recipe
from registry.access import Principal, Role, Scope
from registry.api.app import create_app
from registry.db import session_scope
from registry.errors import (
    CollectedError,
    DependentsError,
    ForbiddenError,
    LicenceConflictError,
    QuarantinedError,
    VersionTakenError,
    YankedError,
)
from registry.licences import TERMS, assess_licences
from registry.models import VersionRow
from registry.schemas import LicenceLevel, Relation, VersionState
from registry.services.blobs import LOCK, require_blobs
from registry.services.jobs import JobService
from registry.services.local import LocalRegistry
from registry.services.publishing import Publishing
from registry.services.pushing import Pushing, Put
from registry.services.worker import Worker
from tests.support import write_base, write_lora

API = "/api/v1"
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def registry(any_registry: LocalRegistry, tmp_path: Path) -> LocalRegistry:
    """A base, and two versions of an adapter on it."""
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": np.ones((6, 4), np.float32)})
    any_registry.add_base(base, name="base")
    for seed, version in enumerate(("1.0.0", "2.0.0")):
        folder = write_lora(tmp_path / version, {MODULE: (6, 4)}, seed=seed)
        any_registry.publish(folder, name="team/a", version=version, base="base")
    return any_registry


def test_a_yanked_version_goes_on_by_its_digest_only(registry: LocalRegistry, tmp_path: Path) -> None:
    """It is the latest no more; its name, and an alias on it, say why; undone, all is as before."""
    registry.set_alias("team/a@2.0.0", "prod")
    info = registry.yank("team/a@2.0.0", "wrong data")
    assert (info.state, info.state_reason, info.aliases) == (VersionState.YANKED, "wrong data", ("prod",))
    assert registry.get_version("team/a").version == "1.0.0"
    assert [item.version for item in registry.list_adapters().items] == ["1.0.0"]
    for ref in ("team/a@2.0.0", "team/a@prod"):
        for use in (
            lambda ref=ref: registry.pull(ref, tmp_path / "out"),
            lambda ref=ref: registry.plan(parse_recipe(f"base+{ref}")),
            lambda ref=ref: registry.inspect(ref),
        ):
            with pytest.raises(YankedError, match="wrong data") as refused:
                use()
            assert info.digest in refused.value.remedy
    assert registry.pull(f"team/a@{info.digest}", tmp_path / "pulled").version == "2.0.0"
    assert registry.plan(parse_recipe(f"base+team/a@{info.digest}")).accepted
    registry.yank("team/a@1.0.0", "both")
    assert registry.list_adapters().items == ()
    with pytest.raises(YankedError):
        registry.pull("team/a", tmp_path / "none")
    registry.yank("team/a@2.0.0", None)
    assert registry.get_version("team/a@prod").aliases == ("latest", "prod")


def test_quarantine_blocks_the_bytes_everywhere(registry: LocalRegistry, tmp_path: Path) -> None:
    """By version and digest, under another name, in a folder, published again, and in what was composed of them."""
    registry.publish(tmp_path / "2.0.0", name="other/copy", base="base")
    job = registry.submit(parse_recipe("base+team/a"))
    Worker(registry).drain()
    jobs = JobService(registry)
    assert jobs.files(job.id)
    blocked = registry.quarantine("team/a@2.0.0", "backdoor")
    assert {f"{item.name}@{item.version}" for item in blocked} == {"team/a@2.0.0", "other/copy@0.1.0"}
    digest = blocked[0].digest
    for use in (
        lambda: registry.pull("team/a@2.0.0", tmp_path / "out"),
        lambda: registry.pull(f"team/a@{digest}", tmp_path / "out"),
        lambda: registry.pull("other/copy", tmp_path / "out"),
        lambda: registry.plan(parse_recipe(f"base+team/a@{digest}")),
        lambda: registry.plan(parse_recipe(f"base+{tmp_path / '2.0.0'}")),
        lambda: registry.publish(tmp_path / "2.0.0", name="third/copy"),
        lambda: registry.inspect("other/copy"),
        lambda: jobs.files(job.id),
    ):
        with pytest.raises(QuarantinedError, match="backdoor"):
            use()
    assert not (tmp_path / "out").exists()
    assert registry.get_version("team/a").version == "1.0.0"
    with pytest.raises(ConflictError):
        registry.yank("team/a@2.0.0", "too")
    registry.quarantine("other/copy", None)
    assert registry.get_version("team/a").version == "2.0.0"
    assert jobs.files(job.id)
    with pytest.raises(ConflictError):
        registry.quarantine("other/copy", None)


def test_a_deprecated_version_works_and_names_its_successor(registry: LocalRegistry, tmp_path: Path) -> None:
    """A warning in plan and result, and never in the record, which is the same bytes as before."""
    before = registry.compose(parse_recipe("base+team/a@1.0.0"), tmp_path / "before")
    info = registry.deprecate("team/a@1.0.0", "old", successor="team/a")
    assert (info.deprecated, info.successor) == ("old", "team/a@2.0.0")
    warning = "team/a@1.0.0 is deprecated: old; use team/a@2.0.0"
    assert warning in registry.plan(parse_recipe("base+team/a@1.0.0")).warnings
    after = registry.compose(parse_recipe("base+team/a@1.0.0"), tmp_path / "after")
    assert (warning in after.warnings, after.record) == (True, before.record)
    with pytest.raises(UsageError, match="itself"):
        registry.deprecate("team/a@1.0.0", "old", successor="team/a@1.0.0")
    with pytest.raises(UsageError):
        registry.deprecate("team/a@1.0.0", "  ")
    assert registry.deprecate("team/a@1.0.0", None).successor is None


def test_a_version_that_something_depends_on_is_not_deleted(registry: LocalRegistry, tmp_path: Path) -> None:
    """Aliases, successors and recorded compositions are named; without them it goes, and its name never comes back."""
    registry.set_alias("team/a@1.0.0", "prod")
    registry.deprecate("team/a@2.0.0", "worse", successor="team/a@1.0.0")
    result = registry.compose(parse_recipe("base+team/a@1.0.0"), tmp_path / "out")
    with pytest.raises(DependentsError) as refused:
        registry.delete_version("team/a@1.0.0")
    assert refused.value.fields["dependents"] == [
        "alias team/a@prod", "deprecated team/a@2.0.0", f"composition {result.output_digest}"
    ]  # fmt: skip
    registry.delete_alias("team/a", "prod")
    registry.deprecate("team/a@2.0.0", None)
    registry.collect(keep_records_days=0)
    registry.delete_version("team/a@1.0.0")
    with pytest.raises(NotFoundError):
        registry.get_version("team/a@1.0.0")
    with pytest.raises(VersionTakenError, match="was deleted"):
        registry.publish(tmp_path / "1.0.0", name="team/a", version="1.0.0")
    registry.delete_version("team/a@2.0.0")
    assert registry.publish(tmp_path / "1.0.0", name="team/b").version.version == "0.1.0"
    registry.delete_version("team/b")
    assert registry.publish(tmp_path / "1.0.0", name="team/b").version.version == "0.1.1"


def test_a_base_that_is_needed_does_not_vanish(registry: LocalRegistry, tmp_path: Path) -> None:
    """Adapters, descendants and compositions hold it; without them it goes."""
    child = write_base(tmp_path / "child", {f"{MODULE}.weight": np.full((6, 4), 2, np.float32)})
    registry.add_base(child, name="child", parent="base", relation=Relation.FINETUNE)
    with pytest.raises(DependentsError) as refused:
        registry.remove_base("base")
    assert sorted(refused.value.fields["dependents"]) == ["adapter team/a@1.0.0", "adapter team/a@2.0.0", "base child"]
    registry.compose(parse_recipe("child"), tmp_path / "out")
    with pytest.raises(DependentsError, match="composition"):
        registry.remove_base("child")
    registry.collect(keep_records_days=0)
    for remove in (
        lambda: registry.remove_base("child"),
        lambda: registry.delete_version("team/a@2.0.0"),
        lambda: registry.delete_version("team/a@1.0.0"),
        lambda: registry.remove_base("base"),
    ):
        remove()
    assert registry.list_bases().items == ()


def test_roles_decide_who_changes_a_life(registry: LocalRegistry) -> None:
    """A publisher yanks and deprecates, an owner deletes, an admin quarantines and removes bases."""
    registry.grant("team", "pub", Role.PUBLISHER)
    registry.grant("team", "own", Role.OWNER)
    reader, publisher, owner = (
        registry.acting_as(Principal(name, frozenset({Scope.PUBLISH}))) for name in ("none", "pub", "own")
    )
    assert publisher.yank("team/a@1.0.0", "x").state == "yanked"
    assert publisher.deprecate("team/a@2.0.0", "x").deprecated
    for refused in (
        lambda: reader.yank("team/a@2.0.0", "x"),
        lambda: publisher.delete_version("team/a@1.0.0"),
        lambda: owner.quarantine("team/a@2.0.0", "x"),
        lambda: owner.remove_base("base"),
        lambda: owner.collect(),
    ):
        with pytest.raises(ForbiddenError):
            refused()
    owner.delete_version("team/a@1.0.0")


def test_an_adapter_has_one_latest_version(registry: LocalRegistry) -> None:
    """The database refuses a second one, and one that is not published."""
    for values in ({"latest": True}, {"state": "yanked"}, {"state": "gone"}):
        with pytest.raises(sa.exc.IntegrityError), session_scope(registry.engine, writes=True) as session:
            session.execute(sa.update(VersionRow).values(**values))


@pytest.fixture
def old(registry: LocalRegistry) -> Iterator[Any]:
    """Makes everything under the home look as if it had not been touched for a year."""

    def age() -> None:
        for path in registry.home.rglob("*"):
            os.utime(path, (0, 0))

    return age


def test_gc_removes_what_nothing_names_and_nothing_else(registry: LocalRegistry, tmp_path: Path, old: Any) -> None:
    """A dry run says the same and removes nothing; what is young stays; what is named works as before."""
    gone = registry.get_version("team/a@1.0.0")
    job = registry.submit(parse_recipe("base+team/a"))
    Worker(registry).drain()
    registry.delete_version("team/a@1.0.0")
    for name in ("store/incoming/half", "uploads/abc", "compositions/.dead.x.part"):
        (registry.home / name).mkdir(parents=True)
        (registry.home / name / "file").write_bytes(b"12345")
    assert registry.collect() == registry.collect(dry_run=True).model_copy(update={"dry_run": False})
    assert registry.collect(dry_run=True).nbytes == 0
    old()
    planned = registry.collect(dry_run=True)
    assert (planned.blobs, planned.uploads, planned.compositions, planned.jobs) == (1, 1, 2, 0)
    assert registry.store.path(gone.files[1].sha256).is_file()
    assert registry.collect() == planned.model_copy(update={"dry_run": False})
    with pytest.raises(Exception, match="damaged"):
        registry.store.path(gone.files[1].sha256)
    registry.pull("team/a", tmp_path / "still")
    assert JobService(registry).files(job.id)
    last = registry.collect(keep_jobs_days=0)
    assert (last.jobs, last.compositions, list(registry.layout.compositions.iterdir())) == (1, 1, [])
    assert registry.audit().items[0].action == "gc"


def test_a_file_that_is_published_while_gc_looks_is_kept(
    registry: LocalRegistry, tmp_path: Path, old: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publish finds the file there and names it, or only touches it, after gc saw that nothing did."""
    from registry.services import collection

    registry.delete_version("team/a@1.0.0")
    look, insert = collection._older, Publishing._insert
    for named in (False, True):

        def look_first(*args: Any, named: bool = named) -> Any:
            found = list(look(*args))
            if args[0] == registry.layout.blobs:
                assert found
                if not named:
                    monkeypatch.setattr(Publishing, "_insert", Mock())
                registry.publish(tmp_path / "1.0.0", name="team/again", base="base")
                monkeypatch.setattr(Publishing, "_insert", insert)
            return iter(found)

        old()
        monkeypatch.setattr(collection, "_older", look_first)
        assert registry.collect().blobs == 0
    registry.pull("team/again", tmp_path / "whole")


def test_a_file_that_gc_removes_before_it_is_named_is_stored_again(
    registry: LocalRegistry, tmp_path: Path, old: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that jumps, or no grace at all: gc comes between the bytes and the row, and the publish is whole."""
    store, runs = Publishing._store_files, []

    def store_first(self: Any, *args: Any) -> Any:
        found = store(self, *args)
        if not runs:
            old()
            runs.append(registry.collect())
        return found

    monkeypatch.setattr(Publishing, "_store_files", store_first)
    write_lora(tmp_path / "fresh", {MODULE: (6, 4)}, seed=77)
    registry.publish(tmp_path / "fresh", name="team/fresh", base="base")
    assert runs[0].blobs > 0
    registry.pull("team/fresh", tmp_path / "whole")


def test_nobody_removes_while_somebody_names(registry: LocalRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at the bytes comes after the lock, and the lock is held to the end: another's gc could not begin."""
    looks: list[bool] = []

    def locked(*_: Any) -> bool:
        if registry.engine.dialect.name == "sqlite":
            other = sqlite3.connect(str(registry.engine.url.database), timeout=0)
            with closing(other), pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
        else:
            with registry.engine.connect() as connection:
                assert not connection.exec_driver_sql(f"SELECT pg_try_advisory_xact_lock({LOCK})").scalar()
        looks.append(True)
        return True

    monkeypatch.setattr(registry.store, "holds", locked)
    with session_scope(registry.engine, writes=True) as session:
        require_blobs(session, registry.store, {"README.md": "0" * 64})
        locked()
    assert len(looks) == 2


def test_a_push_whose_bytes_were_collected_is_refused(
    registry: LocalRegistry, old: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gc removes what was sent while the push is checked: no commit names it, and the same push again is whole."""
    publish, runs = Pushing._publish, []

    def publish_and_collect(self: Any, *args: Any) -> Any:
        outcome = publish(self, *args)
        if not runs:
            old()
            runs.append(registry.collect().blobs)
        return outcome

    monkeypatch.setattr(Pushing, "_publish", publish_and_collect)
    registry.repository_admin.create("team/draft")
    for attempt in range(2):
        with registry.store.receive() as writer:
            writer.write(b"---\nlicense: mit\n---\n")
        operations = [Put("README.md", writer.sha256)]
        with nullcontext() if attempt else pytest.raises(CollectedError, match=r"README\.md"):
            registry.pushing.commit("team/draft", "main", operations, title="a card")
        assert registry.store.holds(writer.sha256) == bool(attempt)
    assert runs == [1]


@pytest.mark.parametrize(
    ("licences", "level"),
    [
        (("apache-2.0", "mit"), "clear"),
        (("Apache-2.0", "MIT", "CC-BY-4.0"), "clear"),
        (("llama3.1", "apache-2.0"), "terms"),
        (("apache-2.0", "cc-by-nc-4.0"), "terms"),
        (("apache-2.0", None), "unknown"),
        (("apache-2.0", "my-own"), "unknown"),
        (("llama3.1", "gpl-3.0"), "conflict"),
        (("gpl-3.0-only", "cc-by-nc-4.0"), "conflict"),
        (("gpl-3.0-or-later", "agpl-3.0"), "terms"),
        (("gpl-2.0", "gpl-3.0"), "conflict"),
        (("cc-by-nc-sa-4.0", "cc-by-sa-4.0"), "conflict"),
        (("cc-by-nc-sa-4.0", "cc-by-nc-4.0"), "terms"),
        (("apache-2.0", "cc-by-nd-4.0"), "conflict"),
        (("gemma", "openrail"), "terms"),
        ((None, "cc-by-nd-4.0"), "conflict"),
    ],
)
def test_licences_have_a_verdict(licences: tuple[str | None, ...], level: str) -> None:
    """Whatever the order; a verdict that is not clear names who asks for what."""
    parts = [(f"part{index}", licence) for index, licence in enumerate(licences)]
    for order in (parts, parts[::-1]):
        verdict = assess_licences(order)
        assert verdict.level == level
        assert bool(verdict.reasons) == (level != "clear")
    assert all(name == name.lower() for name in TERMS)


def test_conflicting_licences_are_refused_unless_accepted(registry: LocalRegistry, tmp_path: Path) -> None:
    """The licence of the base's card against the adapter's: plan says it, compose and submit refuse it by name."""
    base = write_base(tmp_path / "llama", {f"{MODULE}.weight": np.full((6, 4), 3, np.float32)})
    (base / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    assert registry.add_base(base, name="llama").license == "llama3.1"
    registry.publish(tmp_path / "1.0.0", name="lab/gpl", base="llama", license="GPL-3.0")
    recipe = parse_recipe("llama+lab/gpl")
    assert registry.plan(recipe).licences.level is LicenceLevel.CONFLICT
    for run in (lambda: registry.compose(recipe, tmp_path / "out"), lambda: registry.submit(recipe)):
        with pytest.raises(LicenceConflictError, match="llama3"):
            run()
    assert not (tmp_path / "out").exists()
    result = registry.compose(recipe, tmp_path / "out", accept_licences=True)
    assert any("licences: conflict" in warning for warning in result.warnings)
    job = registry.submit(recipe, accept_licences=True)
    Worker(registry).drain()
    assert registry.get_job(job.id).state == "succeeded"


def test_the_life_of_a_version_over_rest(registry: LocalRegistry) -> None:
    """The same through the service: states, refusals and their codes."""
    client = TestClient(create_app(registry, JobService(registry)))
    version = f"{API}/adapters/team/a/versions/2.0.0"
    assert client.put(f"{version}/yank", json={"reason": "x"}).json()["state"] == "yanked"
    answer = client.get(f"{API}/adapters/team/a/files/adapter_config.json", params={"version": "2.0.0"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "yanked")
    digest = registry.get_version("team/a@2.0.0").digest
    assert client.get(f"{API}/adapters/team/a/files/adapter_config.json", params={"version": digest}).status_code == 200
    assert client.put(f"{version}/quarantine", json={"reason": "x"}).json()["items"][0]["state"] == "quarantined"
    answer = client.get(f"{API}/adapters/team/a/files/adapter_config.json", params={"version": digest})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "quarantined")
    assert client.delete(f"{version}/quarantine").json()["items"][0]["state"] == "published"
    body = {"reason": "old", "successor": "team/a@1.0.0"}
    assert client.put(f"{version}/deprecation", json=body).json()["successor"] == "team/a@1.0.0"
    assert client.delete(f"{API}/adapters/team/a/versions/1.0.0").json()["error"]["code"] == "in-use"
    assert client.delete(f"{version}/deprecation").json()["deprecated"] is None
    assert client.delete(f"{API}/adapters/team/a/versions/1.0.0").status_code == 204
    assert client.delete(f"{API}/bases/base").status_code == 409
    assert client.post(f"{API}/collections", json={"dry_run": True}).json()["dry_run"]
