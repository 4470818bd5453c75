"""What the state of a version allows. Said once, for the services and for the client.

published    found, chosen by `latest`, pulled, composed
yanked       not chosen; refused by version and alias with the reason; still pulled and composed by digest
quarantined  nothing: its bytes are refused by every name, in every adapter, in folders and in what was composed
deprecated   (beside the state) usable, with a warning that names the successor
"""

from __future__ import annotations

from typing import Protocol

from registry.errors import QuarantinedError, YankedError
from registry.schemas import VersionState

__all__ = ["deprecation", "quarantined", "require_usable"]


class Standing(Protocol):
    """The part of a version that says what may be done with it; rows and schemas both have it."""

    @property
    def digest(self) -> str:
        """sha256:…"""
        ...

    @property
    def state(self) -> str:
        """A VersionState."""
        ...

    @property
    def state_reason(self) -> str | None:
        """Why it is yanked or quarantined."""
        ...

    @property
    def deprecated(self) -> str | None:
        """Why it should no longer be used."""
        ...

    @property
    def successor(self) -> str | None:
        """What to use in its place."""
        ...


def require_usable(version: Standing, label: str, asked: str | None) -> None:
    """Raise QuarantinedError or YankedError unless the bytes may be used. `asked`: the version of the reference."""
    if version.state == VersionState.QUARANTINED:
        raise quarantined(label, version.digest, version.state_reason)
    if version.state == VersionState.YANKED and not (asked or "").startswith("sha256:"):
        raise YankedError(
            f"{label} was yanked: {version.state_reason}",
            expected="a version that is not yanked",
            found=label,
            remedy=f"use another version, or this very one by its digest: @{version.digest}",
        )


def quarantined(label: str, digest: str, reason: str | None) -> QuarantinedError:
    """The failure of bytes that nobody may use."""
    return QuarantinedError(
        f"{label} is quarantined: {reason}",
        expected="bytes that are not quarantined",
        found=digest,
        remedy="use something else; an admin may lift it with 'registry quarantine --lift'",
    )


def deprecation(version: Standing, label: str) -> str | None:
    """A warning for a deprecated version."""
    if version.deprecated is None:
        return None
    return f"{label} is deprecated: {version.deprecated}" + (f"; use {version.successor}" if version.successor else "")
