"""Chat templates as text: where a folder keeps them, and how one folder's differ from another's. Nothing renders them.

chat_template.jinja                    "chat_template.jinja"
additional_chat_templates/NAME.jinja   the same name
tokenizer_config.json, chat_template   "tokenizer_config.json", or "tokenizer_config.json#NAME" of several

A template decides what a model is told before its user speaks, so that an adapter which brings another one than its
base's can change what the model does as its weights do.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer.errors import TypedError
from composer.files import FileSet, read_json

__all__ = ["MAX_DIFF_LINES", "chat_templates", "template_diff"]

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
FOLDER = "additional_chat_templates/"
MAX_TEMPLATE = 1 << 20
MAX_DIFF_LINES = 2_000


def chat_templates(files: FileSet) -> dict[str, str]:
    """The templates of a folder by where they stand; the file takes the place of the config's, as in transformers."""
    found = {name: _text(path) for name, path in files.items() if name == FILE or _is_additional(name)}
    if FILE not in found and CONFIG in files:
        found |= _of_config(files[CONFIG])
    return found


def _is_additional(name: str) -> bool:
    return name.startswith(FOLDER) and name.endswith(".jinja")


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_TEMPLATE).decode("utf-8", "replace")


def _of_config(path: Path) -> dict[str, str]:
    try:
        value: Any = read_json(path).get("chat_template")
    except TypedError:  # who reads the tokenizer says what is wrong with its config
        return {}
    if isinstance(value, str):
        return {CONFIG: value}
    entries = value if isinstance(value, list) else []
    named = [item for item in entries if isinstance(item, dict) and isinstance(item.get("template"), str)]
    return {f"{CONFIG}#{item.get('name', index)}": item["template"] for index, item in enumerate(named)}


def template_diff(base: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """A unified diff from the base's templates to the other's; None where the other brings none or the same ones.

    The main template is compared wherever it stands, the others by name. At most 2,000 lines.
    """
    olds, news = _by_purpose(base), _by_purpose(other)
    lines: list[str] = []
    for purpose, (place, text) in news.items():
        old_place, old = olds.get(purpose, ("no template", ""))
        if text != old:
            lines += difflib.unified_diff(
                _lines(old), _lines(text), f"base: {old_place}", f"adapter: {place}", n=1, lineterm=""
            )
    if len(lines) > MAX_DIFF_LINES:
        lines = [*lines[:MAX_DIFF_LINES], f"… {len(lines) - MAX_DIFF_LINES} lines more"]
    return "\n".join(lines) or None


def _by_purpose(templates: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What each template is for, with its place and its text."""
    found = {}
    for place, text in templates.items():
        purpose = "default" if place in (FILE, CONFIG) else place.rpartition("#")[2].removeprefix(FOLDER)
        found[purpose.removesuffix(".jinja")] = (place, text)
    return found


def _lines(text: str) -> list[str]:
    """Lines of a bounded length: a template may be one line of a megabyte."""
    return [line[:1000] for line in text.splitlines()]
