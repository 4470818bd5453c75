"""How the chat template of a stored version differs from its base's: read from the files, never from the database."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine, select

from composer.errors import TypedError
from composer.templates import chat_templates, template_diff
from registry.db import session_scope
from registry.models import BaseFileRow, BaseModelRow
from registry.schemas import VersionInfo
from registry.store.local import LocalStore

__all__ = ["with_template_diff"]

TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")


def with_template_diff(engine: Engine, store: LocalStore, info: VersionInfo) -> VersionInfo:
    """`info` with the difference, where the version brings a template and its base is registered.

    A file that cannot be read is named in the difference's place: the facts of a version are shown whatever befell it.
    """
    brought = [file for file in info.files if file.name in TEMPLATES or file.name.endswith(".jinja")]
    if not brought or info.base is None:
        return info
    try:
        own = chat_templates({file.name: store.path(file.sha256, verify=True) for file in brought})
        diff = template_diff(chat_templates(_files_of_base(engine, info.base)), own)
    except TypedError as error:
        diff = f"not known: {error.message}"
    return info.model_copy(update={"chat_template_diff": diff})


def _files_of_base(engine: Engine, name: str) -> dict[str, Path]:
    """The files of a base that lie where they were registered."""
    with session_scope(engine) as session:
        row = session.scalar(select(BaseModelRow).where(BaseModelRow.name == name))
        names = session.scalars(select(BaseFileRow.name).where(BaseFileRow.base_id == row.id)) if row else ()
        paths = {file: Path(row.location) / file for file in names} if row else {}
    return {file: path for file, path in paths.items() if path.is_file()}
