"""How the Hub's URLs name things: a repository is one or two segments, a revision is one."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from starlette.convertors import StringConvertor, register_url_convertor

__all__ = ["RepositoryId", "Revision"]


class RepositoryConvertor(StringConvertor):
    """``namespace/name``, or the name of a base."""

    regex = "[^/]+(?:/[^/]+)?"


register_url_convertor("repository", RepositoryConvertor())

RepositoryId = Annotated[str, Path(description="namespace/name, or the name of a base")]
Revision = Annotated[str, Path(description="main, a branch, a version, an alias, a commit, sha256:… or wf1:…")]
