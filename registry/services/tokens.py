"""API tokens: made, listed, revoked, and recognised.

    ar_<id: 12 hex>_<secret: 43 characters>

Only the sha256 of the secret is stored: 256 random bits need no slow hash. The whole token is shown once.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections import OrderedDict
from datetime import timedelta

from sqlalchemy import Engine, func, select, update

from composer.errors import NotFoundError, UsageError
from registry.access import Principal, Scope
from registry.db import session_scope
from registry.errors import AuthenticationError
from registry.models import TokenRow, now
from registry.names import subject_name, valid_name
from registry.schemas import NewToken, Page, TokenInfo
from registry.services.audit import acting, record

__all__ = ["TokenAuthenticator", "Tokens"]

TOKEN = re.compile(r"ar_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
MAX_PAGE = 1000
MAX_DAYS = 3650
REMEMBERED = 10_000
REMEMBER_S = 2.0
USED_S = 60.0


class Tokens:
    """Makes, lists and revokes. Only an admin may, which is asked here."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(
        self, name: str, subject: str, scopes: tuple[Scope, ...], namespaces: tuple[str, ...] | None, days: int
    ) -> NewToken:
        """A new token; its secret is in the answer and nowhere else."""
        if not 1 <= days <= MAX_DAYS:
            raise UsageError(f"a token lives 1 to {MAX_DAYS} days", expected=f"1 to {MAX_DAYS}", found=days)
        if not scopes:
            raise UsageError("a token needs a scope", expected=list(Scope), found="none")
        if bad := [item for item in namespaces or () if not valid_name(item)]:
            raise UsageError(f"{bad[0]!r} is not a namespace", expected="such as team", found=bad[0])
        if not name.isprintable() or not 1 <= len(name) <= 100:
            raise UsageError("a token's name has 1 to 100 printable characters", found=name)
        secret = secrets.token_urlsafe(32)
        row = TokenRow(
            id=secrets.token_hex(6), name=name, subject=subject_name(subject), scopes=sorted(set(scopes)),
            namespaces=None if namespaces is None else sorted(set(namespaces)), digest=_digest(secret),
            expires_at=now() + timedelta(days=days),
        )  # fmt: skip
        with session_scope(self._engine, writes=True) as session:
            acting(session).require_everywhere(Scope.ADMIN)
            session.add(row)
            session.flush()
            record(session, "token.create", row.id, subject=row.subject, scopes=row.scopes, namespaces=row.namespaces)
            return NewToken(token=f"ar_{row.id}_{secret}", info=token_info(row))

    def list(self, limit: int, cursor: str | None) -> Page[TokenInfo]:
        """Tokens by id, revoked and expired ones included."""
        limit = max(1, min(limit, MAX_PAGE))
        query = select(TokenRow).order_by(TokenRow.id).limit(limit + 1)
        with session_scope(self._engine) as session:
            acting(session).require_everywhere(Scope.ADMIN)
            rows = list(session.scalars(query.where(TokenRow.id > cursor) if cursor else query))
        return Page(items=tuple(map(token_info, rows[:limit])), next=rows[limit - 1].id if len(rows) > limit else None)

    def revoke(self, token_id: str) -> TokenInfo:
        """End a token, at once and for good. Raises NotFoundError."""
        with session_scope(self._engine, writes=True) as session:
            acting(session).require_everywhere(Scope.ADMIN)
            row = session.get(TokenRow, token_id)
            if row is None:
                raise NotFoundError(
                    f"no token {token_id!r}",
                    expected="the id of a token",
                    found=token_id,
                    remedy="see 'registry token list'",
                )
            if row.revoked_at is None:
                row.revoked_at = now()
                record(session, "token.revoke", row.id, subject=row.subject)
            return token_info(row)

    def any_valid(self) -> bool:
        """Whether there is a token that opens the service."""
        with session_scope(self._engine) as session:
            return bool(session.scalar(select(func.count()).select_from(TokenRow).where(*_valid())))


class TokenAuthenticator:
    """Recognises tokens; one that was good is good for two seconds more without asking the database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: OrderedDict[str, tuple[float, Principal]] = OrderedDict()
        self._lock = threading.Lock()

    def authenticate(self, credentials: str) -> Principal | None:
        """The token's principal. Raises AuthenticationError for a token that is unknown, expired or revoked."""
        match = TOKEN.fullmatch(credentials)
        if match is None:
            return None
        key = _digest(credentials)
        with self._lock:
            known = self._known.get(key)
        if known and time.monotonic() - known[0] < REMEMBER_S:
            return known[1]
        with session_scope(self._engine) as session:
            row = session.scalar(select(TokenRow).where(TokenRow.id == match[1], *_valid()))
        if row is None or not hmac.compare_digest(row.digest, _digest(match[2])):
            with self._lock:
                self._known.pop(key, None)
            raise AuthenticationError(
                "this token is not valid",
                expected="a token that is neither expired nor revoked",
                remedy="ask for a new one: 'registry token create'",
            )
        if row.last_used_at is None or (now() - row.last_used_at).total_seconds() > USED_S:
            with session_scope(self._engine, writes=True) as session:
                session.execute(update(TokenRow).where(TokenRow.id == row.id).values(last_used_at=now()))
        principal = Principal(
            row.subject,
            frozenset(map(Scope, row.scopes)),
            None if row.namespaces is None else frozenset(row.namespaces),
            row.id,
        )
        with self._lock:
            self._known[key] = (time.monotonic(), principal)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return principal


def _valid() -> tuple[object, ...]:
    return TokenRow.revoked_at.is_(None), TokenRow.expires_at > now()


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def token_info(row: TokenRow) -> TokenInfo:
    """A row as a schema, without the digest."""
    return TokenInfo(
        id=row.id,
        name=row.name,
        subject=row.subject,
        scopes=tuple(row.scopes),
        namespaces=None if row.namespaces is None else tuple(row.namespaces),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )
