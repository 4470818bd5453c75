"""Signatures of versions: taken in where they list exactly a version's files, and given out again.

Whether a signature is by the key that it names can only be said by who has that key, so a bundle is checked for what
it lists, and verified where it is used (registry.verification).
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Engine, select

from registry.access import Role
from registry.db import session_scope
from registry.errors import SignatureError
from registry.models import AttestationRow, now
from registry.schemas import SignatureInfo, SignedBundle
from registry.services.audit import acting, record
from registry.services.catalogue import find_version
from registry.services.namespaces import require_role
from registry.signing import read_claim

__all__ = ["Signatures"]


class Signatures:
    """Reads and writes the bundles of versions."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def list(self, ref: str, version: str | None) -> tuple[SignedBundle, ...]:
        """The bundles of a version, the first that came first."""
        with session_scope(self._engine) as session:
            row = find_version(session, ref, version)
            query = select(AttestationRow).where(AttestationRow.version_id == row.id)
            found = session.scalars(query.order_by(AttestationRow.created_at, AttestationRow.key))
            return tuple(
                SignedBundle(key=item.key, subject=item.subject, created_at=item.created_at, bundle=item.bundle)
                for item in found
            )

    def add(self, ref: str, version: str | None, bundle: dict[str, Any]) -> SignatureInfo:
        """Keep a bundle that lists exactly the files of a version; one of the same key takes the place of its last.

        Raises SignatureError where it lists other files, and ForbiddenError for who may not publish there.
        """
        claim = read_claim(json.dumps(bundle).encode())
        with session_scope(self._engine, writes=True) as session:
            row = find_version(session, ref, version)
            require_role(session, row.adapter.namespace, Role.PUBLISHER)
            label = f"{row.adapter.full_name}@{row.version}"
            files = {file.name: file.sha256 for file in row.files}
            if wrong := sorted(name for name, _ in files.items() ^ claim.files.items()):
                raise SignatureError(
                    f"the signature is not of the files of {label}: {', '.join(dict.fromkeys(wrong))}",
                    expected=files,
                    found=dict(claim.files),
                    remedy=f"sign the version: 'registry sign {label} --key KEY'",
                )
            subject = acting(session).subject
            held = session.get(AttestationRow, (row.id, claim.key))
            if held is None:
                held = AttestationRow(version_id=row.id, key=claim.key, bundle=bundle, subject=subject)
                session.add(held)
            else:
                held.bundle, held.subject, held.created_at = bundle, subject, now()
            record(session, "sign", label, key=claim.key)
            session.flush()
            return SignatureInfo(key=held.key, subject=held.subject, created_at=held.created_at)
