"""Finding adapters in large catalogues: words, properties, levels of compatibility, page by page; and older databases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command

from composer.errors import UsageError
from registry.db import _alembic_config, create_database_engine
from registry.schemas import Level, Page, Relation
from registry.services import matching, search
from registry.services.local import LocalRegistry, open_registry
from tests.support import write_base, write_lora

Q, MLP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture
def registry(any_registry: LocalRegistry) -> LocalRegistry:
    """An empty registry on each database."""
    return any_registry


def all_pages(lister: Callable[..., Page[Any]], *args: Any, **options: Any) -> list[Any]:
    """Every item, two a page; each page but the last is full."""
    items, cursor = [], None
    while True:
        page = lister(*args, limit=2, cursor=cursor, **options)
        assert len(page.items) == 2 or page.next is None
        items += page.items
        cursor = page.next
        if cursor is None:
            return items


@pytest.fixture
def filled(registry: LocalRegistry, tmp_path: Path) -> LocalRegistry:
    """A base and its cast, its finetune and a stranger of the same shape; adapters of all of them, and one that fits none."""
    weights = {f"{name}.weight": np.arange(24, dtype=np.float16).reshape(6, 4) for name in (Q, MLP)}
    registry.add_base(write_base(tmp_path / "base", weights), name="base")
    cast = {name: array.astype(np.float32) for name, array in weights.items()}
    registry.add_base(write_base(tmp_path / "cast", cast), name="cast")
    tuned = {name: array + 1 for name, array in weights.items()}
    registry.add_base(write_base(tmp_path / "tuned", tuned), name="tuned", parent="base", relation=Relation.FINETUNE)
    other = {name: array * 2 for name, array in weights.items()}
    registry.add_base(write_base(tmp_path / "other", other), name="other")
    wide = {name: np.zeros((8, 4), np.float16) for name in weights}
    registry.add_base(write_base(tmp_path / "wide", wide), name="wide")
    for index, base in enumerate(("base", "other", "tuned", "cast", "base", "tuned", "other", "cast", "base")):
        name = f"team/{base}{index}"
        folder = write_lora(tmp_path / name, {Q: (6, 4)}, seed=index, rank=2 + index % 2, task_type="CAUSAL_LM")
        registry.publish(folder, name=name, base=base, tags=("even" if index % 2 == 0 else "odd",), license="MIT")
    registry.publish(
        write_lora(tmp_path / "w", {Q: (8, 4)}), name="team/wide9", base="wide", description="Answers LOUDLY"
    )
    registry.publish(write_lora(tmp_path / "n", {MLP: (6, 4)}, seed=3), name="lab/named10")
    return registry


def test_adapters_of_a_base_come_level_by_level(filled: LocalRegistry) -> None:
    """Best first, then the newest, each once whatever the page; the weakest level asked for is the last."""
    found = all_pages(filled.compatible, "base")
    assert [(fit.adapter.name, fit.verdict.level.value) for fit in found] == [
        ("team/base8", "exact"), ("team/base4", "exact"), ("team/base0", "exact"),
        ("team/cast7", "same-values"), ("team/cast3", "same-values"),
        ("team/tuned5", "lineage"), ("team/tuned2", "lineage"),
        ("lab/named10", "shape"), ("team/other6", "shape"), ("team/other1", "shape"),
    ]  # fmt: skip
    assert found == list(filled.compatible("base").items)
    assert found[:7] == all_pages(filled.compatible, "base", level=Level.LINEAGE)
    everything = filled.compatible("base", level=Level.INCOMPATIBLE).items
    assert [fit.adapter.name for fit in everything[10:]] == ["team/wide9"]
    for fit in everything:
        assert filled.check(fit.adapter.name, "base") == fit.verdict


def test_the_ways_to_read_a_large_catalogue_give_the_same_pages(
    filled: LocalRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of very many bases, a base of very many versions, rare and common words: as in a small catalogue."""
    queries = [{"text": text, "base": base} for text in ("te", "base4", "q_proj team") for base in ("base", "tuned")]

    def pages() -> list[Any]:
        found = [all_pages(filled.compatible, base, level=Level.INCOMPATIBLE) for base in ("base", "tuned", "wide")]
        return found + [all_pages(filled.search, **query) for query in queries]

    expected = pages()
    assert any(expected[3:])
    for wide, recent, few in ((0, 500, 2), (0, 1, 0), (200, 500, 1)):
        monkeypatch.setattr(matching, "WIDE", wide)
        monkeypatch.setattr(matching, "RECENT", recent)
        monkeypatch.setattr(search, "FEW", few)
        assert pages() == expected


def test_bases_of_an_adapter_come_level_by_level(filled: LocalRegistry) -> None:
    """Best first, then by name, and the verdicts are those of check."""
    found = all_pages(filled.bases_for, "team/base0", level=Level.INCOMPATIBLE)
    assert [(fit.base.name, fit.verdict.level.value) for fit in found] == [
        ("base", "exact"), ("cast", "same-values"), ("tuned", "lineage"), ("other", "shape"), ("wide", "incompatible")
    ]  # fmt: skip
    assert [filled.check("team/base0", fit.base.name) for fit in found] == [fit.verdict for fit in found]


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        ({"text": "base"}, [8, 4, 0]),
        ({"text": "loud"}, [9]),
        ({"text": "TEAM/cast q_proj"}, [7, 3]),
        ({"text": "ase"}, []),
        ({"text": "-- % *"}, []),
        ({"text": 'team" OR "x'}, []),
        ({"tag": "odd"}, [7, 5, 3, 1]),
        ({"tag": "odd", "base": "other"}, [1]),
        ({"rank": 3, "base": "cast"}, [7, 3]),
        ({"base": "base", "text": "base4"}, [4]),
        ({"base": "base", "text": "base4 mit"}, []),
        ({"license": "mit", "namespace": "lab"}, []),
        ({"namespace": "lab"}, [10]),
        ({"task": "CAUSAL_LM", "kind": "lora", "text": "tuned"}, [5, 2]),
        ({"kind": "ia3"}, []),
        ({}, list(range(10, -1, -1))),
    ],
)
def test_words_and_properties_find(filled: LocalRegistry, wanted: dict[str, Any], numbers: list[int]) -> None:
    """Newest first, each once, page by page; signs in a query are no syntax."""
    found = all_pages(filled.search, **wanted)
    assert [int("".join(filter(str.isdigit, item.name))) for item in found] == numbers


def test_the_text_index_follows_what_happens(filled: LocalRegistry, tmp_path: Path) -> None:
    """A new version takes the place of the old one, a yanked and a deleted one are not found."""
    filled.publish(write_lora(tmp_path / "v2", {Q: (6, 4)}, seed=50), name="team/base0", description="quieter")
    assert [(item.name, item.version) for item in filled.search("quiet").items] == [("team/base0", "0.1.1")]
    filled.yank("team/base0", "x")
    assert filled.search("quiet").items == ()
    assert [item.version for item in filled.search("base0").items] == ["0.1.0"]
    filled.delete_version("team/base4")
    assert filled.search("base4").items == ()


def test_versions_come_in_pages(registry: LocalRegistry, tmp_path: Path) -> None:
    """The highest first, each once."""
    versions = ["1.0.0", "1.10.0", "1.9.0", "2.0.0-rc.1", "2.0.0"]
    for seed, version in enumerate(versions):
        registry.publish(write_lora(tmp_path / version, {Q: (6, 4)}, seed=seed), name="a", version=version)
    assert [item.version for item in all_pages(registry.list_versions, "a")] == [
        "2.0.0", "2.0.0-rc.1", "1.10.0", "1.9.0", "1.0.0"
    ]  # fmt: skip


@pytest.mark.parametrize("cursor", ["x", "-1", "9.x", "0.", "7.5", "0.9223372036854775808", "1" * 30, "²"])
def test_a_cursor_of_ones_own_is_refused(filled: LocalRegistry, cursor: str) -> None:
    """By a typed error, wherever it is given."""
    for lister in (
        lambda: filled.search(cursor=cursor),
        lambda: filled.compatible("base", cursor=cursor),
        lambda: filled.list_versions("team/base0", cursor=cursor),
        lambda: filled.audit(cursor=cursor),
    ):
        with pytest.raises(UsageError):
            lister()


def test_signatures_are_stored_once(filled: LocalRegistry) -> None:
    """Eleven versions that touch three different things make three rows."""
    with filled.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM signatures")).scalar() == 3


def test_downloads_are_counted(filled: LocalRegistry, tmp_path: Path) -> None:
    """Each pull once, seen after the counts are written."""
    for index in range(3):
        filled.pull("team/base0", tmp_path / f"out{index}")
    filled.downloads.write()
    filled.pull("team/base0", tmp_path / "last")
    filled.downloads.write()
    assert filled.get_version("team/base0").downloads == 4
    assert filled.get_version("team/base4").downloads == 0


def test_a_database_of_the_first_version_is_brought_along(home: Path, tmp_path: Path) -> None:
    """Rows of the first schema: targets, tags, words, lines, jobs and inputs are where the present code looks for them."""
    fresh = open_registry(tmp_path / "fresh")
    weights = {f"{Q}.weight": np.ones((6, 4), np.float32)}
    fresh.add_base(write_base(tmp_path / "base", weights), name="base")
    fresh.add_base(
        write_base(tmp_path / "tuned", {f"{Q}.weight": np.zeros((6, 4), np.float32)}),
        name="tuned", parent="base", relation=Relation.FINETUNE,
    )  # fmt: skip
    for seed, version in enumerate(("1.0.0", "2.0.0")):
        fresh.publish(
            write_lora(tmp_path / version, {Q: (6, 4)}, seed=seed),
            name="team/a",
            version=version,
            base="base",
            tags=("x",),
        )
    wanted = [
        fresh.search("team", tag="x").items,
        fresh.compatible("tuned").items,
        fresh.lineage("tuned"),
        fresh.list_versions("team/a"),
    ]
    command.downgrade(_alembic_config(fresh.engine), "0001")
    digest = "sha256:" + "0" * 64
    with fresh.engine.begin() as connection:
        recipe = {"base": "base", "adapters": [{"ref": "team/a"}]}
        connection.execute(sa.text(
            "INSERT INTO jobs (id, state, recipe, step, bytes_done, bytes_total, created_at)"
            " VALUES ('j', 'running', :recipe, '', 0, 0, CURRENT_TIMESTAMP)"), {"recipe": json.dumps(recipe)})  # fmt: skip
        inputs = {"base": {"fingerprint": wanted[2].ancestors[0].fingerprint}, "adapters": [{"digest": digest}]}
        connection.execute(sa.text(
            "INSERT INTO compositions (id, key, recipe, inputs, output_digest, created_at)"
            " VALUES (1, 'k', '{}', :inputs, :digest, CURRENT_TIMESTAMP)"), {"inputs": json.dumps(inputs), "digest": digest})  # fmt: skip
    fresh.close()
    opened = open_registry(tmp_path / "fresh")
    found = [
        opened.search("team", tag="x").items,
        opened.compatible("tuned").items,
        opened.lineage("tuned"),
        opened.list_versions("team/a"),
    ]
    assert json.loads(json.dumps(found, default=lambda item: item.model_dump(mode="json"))) == json.loads(
        json.dumps(wanted, default=lambda item: item.model_dump(mode="json"))
    )
    job = opened.get_job("j")
    assert (job.state, job.title, job.recipe.base) == ("queued", "base+team/a", "base")
    with create_database_engine(f"sqlite:///{tmp_path / 'fresh' / 'registry.db'}").connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM composition_inputs")).scalar() == 2
    opened.close()
