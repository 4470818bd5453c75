"""Who may do what: tokens, members of namespaces, the audit log, and who asks."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from registry.access import Principal, Scope
from registry.api.deps import DEFAULT_LIMIT, Cursor, Limit, Registered, principal_of, require
from registry.api.schemas import MemberRequest, TokenRequest, Whoami
from registry.schemas import AuditEntry, NamespaceInfo, NewToken, Page, TokenInfo

router = APIRouter(tags=["access"])

ADMIN = [Depends(require(Scope.ADMIN, everywhere=True))]
MEMBER = "/namespaces/{namespace}/members/{subject:path}"


@router.get("/whoami", summary="Who asks?")
def whoami(principal: Annotated[Principal, Depends(principal_of)]) -> Whoami:
    """The subject, scopes and limits of the request's token."""
    return Whoami(
        subject=principal.subject,
        scopes=tuple(sorted(principal.scopes)),
        namespaces=None if principal.namespaces is None else tuple(sorted(principal.namespaces)),
        token=principal.token,
    )


@router.post("/tokens", summary="Create a token", status_code=201, dependencies=ADMIN)
def create_token(body: TokenRequest, registry: Registered) -> NewToken:
    """The only answer that ever holds the secret."""
    return registry.create_token(
        body.name, subject=body.subject, scopes=body.scopes, namespaces=body.namespaces, days=body.days
    )


@router.get("/tokens", summary="List tokens", dependencies=ADMIN)
def list_tokens(registry: Registered, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Page[TokenInfo]:
    """All tokens, without their secrets."""
    return registry.list_tokens(limit=limit, cursor=cursor)


@router.delete("/tokens/{token_id}", summary="Revoke a token", dependencies=ADMIN)
def revoke_token(token_id: str, registry: Registered) -> TokenInfo:
    """It is refused from now on."""
    return registry.revoke_token(token_id)


@router.get("/namespaces", summary="List namespaces")
def list_namespaces(registry: Registered, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Page[NamespaceInfo]:
    """Those with members, of which the caller is one; all for an admin."""
    return registry.list_namespaces(limit=limit, cursor=cursor)


@router.put(MEMBER, summary="Grant a role", dependencies=[Depends(require(Scope.PUBLISH))])
def grant(namespace: str, subject: str, body: MemberRequest, registry: Registered) -> NamespaceInfo:
    """Make a subject a member of the namespace, or change its role; for owners."""
    return registry.grant(namespace, subject, body.role)


@router.delete(MEMBER, summary="Revoke a role", dependencies=[Depends(require(Scope.PUBLISH))])
def revoke(namespace: str, subject: str, registry: Registered) -> NamespaceInfo:
    """Take a subject out of the namespace; for owners."""
    return registry.revoke(namespace, subject)


@router.get("/audit", summary="Read the audit log", dependencies=ADMIN)
def audit(
    registry: Registered,
    subject: Annotated[str | None, Query(description="only of this subject")] = None,
    target: Annotated[str | None, Query(description="only of this target, such as team/shout@1.0.0")] = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Page[AuditEntry]:
    """Who changed what, newest first."""
    return registry.audit(subject=subject, target=target, limit=limit, cursor=cursor)
