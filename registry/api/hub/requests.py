"""How the Hub's requests name things: a repository is one or two segments of the URL, a revision is one."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, ConfigDict
from starlette.convertors import StringConvertor, register_url_convertor

from registry.access import LOCAL, Principal
from registry.names import DEFAULT_NAMESPACE, valid_name

__all__ = ["MODEL", "SHA256", "RepositoryId", "Revision", "Sent", "namespace_of"]

MODEL = "/api/models/{repository:repository}"
SHA256 = r"^[0-9a-f]{64}$"


class RepositoryConvertor(StringConvertor):
    """``namespace/name``, or the name of a base."""

    regex = "[^/]+(?:/[^/]+)?"


register_url_convertor("repository", RepositoryConvertor())

RepositoryId = Annotated[str, Path(description="namespace/name, or the name of a base")]
Revision = Annotated[str, Path(description="main, a branch, a version, an alias, a commit, sha256:… or wf1:…")]


def namespace_of(principal: Principal) -> str:
    """The namespace of what a caller creates without one: the one of its name, where that is a name."""
    return principal.subject if principal is not LOCAL and valid_name(principal.subject) else DEFAULT_NAMESPACE


class Sent(BaseModel):
    """What clients send; they send more than is read here."""

    model_config = ConfigDict(extra="ignore", frozen=True)
