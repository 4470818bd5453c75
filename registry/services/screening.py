"""The population that an adapter is compared with: the latest versions of the others on its base."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from composer.screening import Measurement
from registry.models import AdapterRow, VersionRow
from registry.schemas import Screening
from registry.screening import judge

__all__ = ["others", "population", "screen_version"]

NEWEST = 500


def population(session: Session, fingerprint: str | None) -> list[tuple[int, Measurement]]:
    """What was measured of the latest versions on a base, newest first, each with the id of its adapter.

    Private adapters are no part of it, for anybody: a score must not tell of them.
    """
    if fingerprint is None:
        return []
    query = (
        select(VersionRow.adapter_id, VersionRow.screening)
        .join(AdapterRow, AdapterRow.id == VersionRow.adapter_id)
        .where(VersionRow.base_fingerprint == fingerprint, VersionRow.latest, ~AdapterRow.private)
        .where(VersionRow.screening.is_not(None))
    )
    rows = session.execute(query.order_by(VersionRow.id.desc()).limit(NEWEST)).tuples()
    return [(adapter_id, Measurement.from_json(fields)) for adapter_id, fields in rows if fields]


def others(known: list[tuple[int, Measurement]], adapter_id: int | None) -> list[Measurement]:
    """A population without one adapter."""
    return [measured for other, measured in known if other != adapter_id]


def screen_version(session: Session, row: VersionRow) -> Screening | None:
    """The scores of a version as of now; None for one that was published before there were any."""
    if row.screening is None:
        return None
    known = population(session, row.base_fingerprint)
    return judge(Measurement.from_json(row.screening), others(known, row.adapter_id))
