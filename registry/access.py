"""Who asks, and what they may do.

    Principal   a subject with scopes, within some namespaces or all
    Scope       read < publish, compose < admin
    Role        what a subject is in a namespace: reader < publisher < owner

A request is turned into a Principal by an Authenticator; the services see only the Principal. The command line on the
registry's own machine, and a service that is open on loopback, act as LOCAL, which may do everything.

Trusted publishing (OIDC) is an Authenticator of one's own: see docs/access.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from registry.errors import ForbiddenError

__all__ = ["LOCAL", "Authenticator", "Principal", "Role", "Scope"]


class Scope(StrEnum):
    """What a token is good for. Publish and compose include read, admin includes all."""

    READ = "read"
    PUBLISH = "publish"
    COMPOSE = "compose"
    ADMIN = "admin"


class Role(StrEnum):
    """What a subject may do in a namespace: see private adapters, publish, and decide who else may."""

    READER = "reader"
    PUBLISHER = "publisher"
    OWNER = "owner"


@dataclass(frozen=True, slots=True)
class Principal:
    """A subject with scopes. `namespaces`: the only ones it may touch, None for all that its subject may."""

    subject: str
    scopes: frozenset[Scope]
    namespaces: frozenset[str] | None = None
    token: str | None = None

    def may(self, scope: Scope) -> bool:
        """Whether one of the scopes includes `scope`."""
        return scope in self.scopes or Scope.ADMIN in self.scopes or (scope is Scope.READ and bool(self.scopes))

    @property
    def is_admin(self) -> bool:
        """Whether it may do everything, everywhere."""
        return Scope.ADMIN in self.scopes and self.namespaces is None

    def require(self, scope: Scope) -> None:
        """Raise ForbiddenError without the scope."""
        if not self.may(scope):
            raise ForbiddenError(
                f"this needs the scope {scope.value!r}",
                expected=scope.value,
                found=sorted(self.scopes),
                remedy="use a token that has it: 'registry token create'",
            )

    def require_everywhere(self, scope: Scope) -> None:
        """Raise ForbiddenError without the scope, and for a token that is limited to namespaces."""
        self.require(scope)
        if self.namespaces is not None:
            raise ForbiddenError(
                "this concerns the whole registry, and the token is limited to namespaces",
                expected="a token without a limit",
                found=sorted(self.namespaces),
                remedy="use a token that was created without --namespace",
            )


LOCAL = Principal("local", frozenset(Scope))


class Authenticator(Protocol):
    """Turns the value of an Authorization header into a Principal."""

    def authenticate(self, credentials: str) -> Principal | None:
        """The principal of these credentials; None when they are not of this authenticator's kind.

        Raises AuthenticationError when they are, and are no good.
        """
        ...
