"""Lines of bases: declared, held in the closure, compared by their leaves, and suggested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from composer.errors import UsageError
from registry.db import session_scope
from registry.models import BaseClosureRow, BaseModelRow
from registry.schemas import Level, Relation
from registry.services.local import LocalRegistry
from tests.support import write_base, write_lora

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def registry(any_registry: LocalRegistry) -> LocalRegistry:
    """An empty registry on each database."""
    return any_registry


def add(registry: LocalRegistry, folder: Path, name: str, seed: int, parent: str | None = None) -> None:
    """A base of four matrices and a norm of ones; the last `seed` matrices are its own."""
    tensors = {
        f"model.layers.{index}.self_attn.q_proj.weight": np.full(
            (6, 4), index + 10 * (seed if index >= 4 - seed else 0), np.float32
        )
        for index in range(4)
    }
    folder = write_base(folder / name, tensors | {"model.norm.weight": np.ones(4, np.float32)})
    registry.add_base(folder, name=name, parent=parent, relation=Relation.FINETUNE if parent else None)


def test_a_line_is_found_from_both_ends(registry: LocalRegistry, tmp_path: Path) -> None:
    """Each relative with its distance, nearest first; siblings are none; the shared weights are counted exactly."""
    for seed, (name, parent) in enumerate([("a", None), ("b", "a"), ("c", "b"), ("sibling", "a")]):
        add(registry, tmp_path, name, seed, parent)
    line = registry.lineage("c")
    assert [(edge.name, edge.depth) for edge in line.ancestors] == [("b", 1), ("a", 2)]
    assert [(edge.name, edge.depth) for edge in registry.lineage("a").descendants] == [
        ("b", 1),
        ("sibling", 1),
        ("c", 2),
    ]
    edge = line.ancestors[0]
    assert (edge.parent, edge.relation, edge.verified) == ("a", Relation.FINETUNE, True)
    assert (edge.evidence.tensors, edge.evidence.shared_tensors, edge.evidence.shared_parameters) == (4, 3, 0.75)
    assert edge.evidence.same_layout


def test_a_line_that_moves_takes_its_branch_along(registry: LocalRegistry, tmp_path: Path) -> None:
    """The closure after every change equals the one computed from the parents."""
    for seed, (name, parent) in enumerate([("a", None), ("b", None), ("c", "b")]):
        add(registry, tmp_path, name, seed, parent)
    add(registry, tmp_path / "far", "d", 4, "c")
    registry.add_base(tmp_path / "b", name="b", parent="a", relation=Relation.MERGED)
    assert [(edge.name, edge.depth) for edge in registry.lineage("d").ancestors] == [("c", 1), ("b", 2), ("a", 3)]
    registry.add_base(tmp_path / "c", name="c", parent="a", relation=Relation.FINETUNE)
    assert [(edge.name, edge.depth) for edge in registry.lineage("d").ancestors] == [("c", 1), ("a", 2)]
    with pytest.raises(UsageError, match="descends from a"):
        registry.add_base(tmp_path / "a", name="a", parent="c", relation=Relation.FINETUNE)
    with session_scope(registry.engine) as session:
        parents = dict(session.execute(sa.select(BaseModelRow.id, BaseModelRow.parent_id)).tuples().all())
        found = set(
            session.execute(
                sa.select(BaseClosureRow.descendant_id, BaseClosureRow.ancestor_id, BaseClosureRow.depth)
            ).tuples()
        )
    wanted = set()
    for base, parent in parents.items():
        above, depth = parent, 1
        while above is not None:
            wanted.add((base, above, depth))
            above, depth = parents[above], depth + 1
    assert found == wanted


def test_shared_weights_suggest_a_line_and_norms_do_not(registry: LocalRegistry, tmp_path: Path) -> None:
    """The base that shares most comes first; one that shares only a norm of ones is not suggested."""
    add(registry, tmp_path, "a", 0)
    add(registry, tmp_path, "near", 1)
    add(registry, tmp_path, "far", 3)
    add(registry, tmp_path, "stranger", 4)
    names = [edge.name for edge in registry.lineage("a").suggestions]
    assert names == ["near", "far"]
    registry.add_base(tmp_path / "near", name="near", parent="a", relation=Relation.FINETUNE)
    assert [edge.name for edge in registry.lineage("a").suggestions] == ["far"]


def test_a_declared_line_that_shares_nothing_is_not_verified(registry: LocalRegistry, tmp_path: Path) -> None:
    """It stays declared; a verdict goes by what was declared, through any number of steps."""
    add(registry, tmp_path, "a", 0)
    add(registry, tmp_path, "b", 4, "a")
    add(registry, tmp_path / "x", "c", 2, "b")
    assert registry.lineage("a").descendants[0].verified is False
    registry.publish(write_lora(tmp_path / "lora", {Q: (6, 4)}), name="team/x", base="c")
    verdict = registry.check("team/x", "a")
    assert (verdict.level, "in 2 steps" in verdict.reasons[0].message) == (Level.LINEAGE, True)
    assert [(fit.base.name, fit.verdict.level) for fit in registry.bases_for("team/x").items] == [
        ("c", Level.EXACT), ("a", Level.LINEAGE), ("b", Level.LINEAGE)
    ]  # fmt: skip
