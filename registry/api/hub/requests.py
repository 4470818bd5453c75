"""How the Hub's requests name things: a repository is one or two segments of the URL, a revision is one."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, ConfigDict
from starlette.convertors import StringConvertor, register_url_convertor

__all__ = ["MODEL", "SHA256", "RepositoryId", "Revision", "Sent"]

MODEL = "/api/models/{repository:repository}"
SHA256 = r"^[0-9a-f]{64}$"


class RepositoryConvertor(StringConvertor):
    """``namespace/name``, or the name of a base."""

    regex = "[^/]+(?:/[^/]+)?"


register_url_convertor("repository", RepositoryConvertor())

RepositoryId = Annotated[str, Path(description="namespace/name, or the name of a base")]
Revision = Annotated[str, Path(description="main, a branch, a version, an alias, a commit, sha256:… or wf1:…")]


class Sent(BaseModel):
    """What clients send; they send more than is read here."""

    model_config = ConfigDict(extra="ignore", frozen=True)
