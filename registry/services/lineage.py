"""Lineage between bases: edges that were declared, what their weights say of them, and edges that they suggest.

base_closure holds every pair of an ancestor and a descendant with their distance, so that both directions are one index
lookup however long a line is. Leaves (one hash a tensor) tell how much two bases share; a tensor of one dimension says
nothing, because norms of ones are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from sqlalchemy import Engine, delete, insert, select
from sqlalchemy.orm import Session, aliased

from composer.errors import UsageError
from registry.db import session_scope
from registry.models import BaseClosureRow, BaseModelRow, BaseTensorRow
from registry.schemas import LineageEdge, LineageEvidence, LineageInfo, Relation
from registry.services.catalogue import find_base

__all__ = ["Lineage", "evidence", "set_parent"]

MAX_SUGGESTIONS = 10
MAX_LISTED = 1000
LEAST_SHARED = 0.01


def set_parent(session: Session, row: BaseModelRow, parent: BaseModelRow, relation: Relation) -> None:
    """Declare an edge, in place of the one there may be, and bring the closure up to date.

    Raises UsageError when the parent descends from the base.
    """
    session.flush()
    below = list(session.execute(
        select(BaseClosureRow.descendant_id, BaseClosureRow.depth).where(BaseClosureRow.ancestor_id == row.id)
    ).tuples())  # fmt: skip
    subtree = [(row.id, 0), *below]
    if parent.id in {base for base, _ in subtree}:
        raise UsageError(
            f"{parent.name} descends from {row.name}, so it cannot be its parent",
            expected="a base that is no descendant",
            found=parent.name,
            remedy="see 'registry base lineage'",
        )
    row.parent_id, row.relation = parent.id, relation.value
    ids = [base for base, _ in subtree]
    session.execute(
        delete(BaseClosureRow).where(BaseClosureRow.descendant_id.in_(ids), BaseClosureRow.ancestor_id.not_in(ids))
    )
    above = list(session.execute(
        select(BaseClosureRow.ancestor_id, BaseClosureRow.depth).where(BaseClosureRow.descendant_id == parent.id)
    ).tuples())  # fmt: skip
    pairs = [
        {"ancestor_id": ancestor, "descendant_id": base, "depth": up + 1 + down}
        for ancestor, up in [(parent.id, 0), *above]
        for base, down in subtree
    ]
    session.execute(insert(BaseClosureRow), pairs)
    session.flush()
    session.refresh(row, ["parent"])


def evidence(session: Session, one: BaseModelRow, other: BaseModelRow) -> LineageEvidence:
    """What the weights of two bases say: how much of `one` is also in `other`, bit for bit or as bf16 values."""
    mine, theirs = (_leaves(session, [row.id]) for row in (one, other))
    total = sum(prod(shape) for _, _, shape, _, _ in mine)
    digests = {digest for _, _, _, digest, _ in theirs} | {value for _, _, _, _, value in theirs}
    shared = [prod(shape) for _, _, shape, digest, value in mine if digest in digests or value in digests]
    return LineageEvidence(
        same_layout=one.layout_digest == other.layout_digest,
        tensors=len(mine),
        shared_tensors=len(shared),
        shared_parameters=sum(shared) / total if total else 0.0,
    )


def _leaves(session: Session, bases: Iterable[int]) -> list[tuple[int, str, list[int], str, str]]:
    rows = session.execute(
        select(BaseTensorRow.base_id, BaseTensorRow.name, BaseTensorRow.shape, BaseTensorRow.digest,
               BaseTensorRow.value_digest).where(BaseTensorRow.base_id.in_(list(bases)))
    ).tuples()  # fmt: skip
    return [row for row in rows if len(row[2]) > 1]


class Lineage:
    """Reads lines and suggests edges."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get(self, ref: str) -> LineageInfo:
        """Ancestors and descendants of a base, nearest first, and bases that its weights suggest."""
        with session_scope(self._engine) as session:
            row = find_base(session, ref)
            up = select(BaseModelRow, BaseClosureRow.depth).join(
                BaseClosureRow, BaseClosureRow.ancestor_id == BaseModelRow.id
            ).where(BaseClosureRow.descendant_id == row.id)  # fmt: skip
            down = select(BaseModelRow, BaseClosureRow.depth).join(
                BaseClosureRow, BaseClosureRow.descendant_id == BaseModelRow.id
            ).where(BaseClosureRow.ancestor_id == row.id)  # fmt: skip
            order = (BaseClosureRow.depth, BaseModelRow.name)
            lines = []
            for query in (up, down):
                found = session.execute(query.order_by(*order).limit(MAX_LISTED)).tuples()
                lines.append(tuple(_edge(session, base, depth) for base, depth in found))
            related = {edge.name for line in lines for edge in line}
            return LineageInfo(
                name=row.name, ancestors=lines[0], descendants=lines[1],
                suggestions=tuple(_suggest(session, row, related)),
            )  # fmt: skip


def _edge(session: Session, base: BaseModelRow, depth: int) -> LineageEdge:
    found = evidence(session, base, base.parent) if base.parent else None
    return LineageEdge(
        name=base.name, fingerprint=base.fingerprint, depth=depth, parent=base.parent.name if base.parent else None,
        relation=Relation(base.relation) if base.relation else None, evidence=found,
        verified=found is not None and found.shared_parameters >= LEAST_SHARED,
    )  # fmt: skip


def _suggest(session: Session, row: BaseModelRow, related: set[str]) -> list[LineageEdge]:
    """Bases that share weights with `row` and are not in its line, those that share most first."""
    other = aliased(BaseTensorRow)
    found: set[int] = set()
    for column in (BaseTensorRow.digest, BaseTensorRow.value_digest):
        theirs = other.digest if column is BaseTensorRow.digest else other.value_digest
        pairs = session.execute(
            select(other.base_id, BaseTensorRow.shape).join(BaseTensorRow, column == theirs)
            .where(BaseTensorRow.base_id == row.id, other.base_id != row.id)
        )  # fmt: skip
        found |= {base for base, shape in pairs if len(shape) > 1}
    bases = session.scalars(select(BaseModelRow).where(BaseModelRow.id.in_(found))) if found else []
    edges = [
        LineageEdge(name=base.name, fingerprint=base.fingerprint, depth=0, parent=None, relation=None,
                    evidence=share, verified=False)
        for base in bases
        if base.name not in related and (share := evidence(session, row, base)).shared_parameters >= LEAST_SHARED
    ]  # fmt: skip
    edges.sort(key=lambda edge: (-edge.evidence.shared_parameters if edge.evidence else 0, edge.name))
    return edges[:MAX_SUGGESTIONS]
