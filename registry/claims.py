"""What an adapter folder says of the base it was trained on.

--base NAME, wf1:…, or a folder             the publisher's word, checked against shapes
README.md   base_model_fingerprint: wf1:…   written by the trainer, travels with the adapter
adapter_config.json  base_model_name_or_path  hashed when it is a folder of this machine; else a name, no proof
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.adapters import Adapter
from composer.checkpoint import open_checkpoint
from composer.errors import CorruptFileError
from composer.safe_yaml import load_yaml
from registry.compat import BaseClaim
from registry.fingerprint import Fingerprint, fingerprint_checkpoint
from registry.interface import Progress

__all__ = ["Card", "claim_from_folder", "read_card", "split_card"]

FINGERPRINT = re.compile(r"wf1:[0-9a-f]{64}")
MAX_CARD_BYTES = 1 << 20
TEMPLATE = "[More Information Needed]"  # what PEFT writes into a card that nobody filled in


@dataclass(frozen=True, slots=True)
class Card:
    """The front matter of a model card, as far as we use it."""

    fingerprint: str | None = None
    base_model: str | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()
    description: str = ""


def read_card(path: Path | None) -> Card:
    """The card at `path`, empty where there is none. Raises CorruptFileError for YAML that does not parse."""
    if path is None or not path.is_file():
        return Card()
    fields, body = split_card(path.read_bytes()[:MAX_CARD_BYTES].decode("utf-8", "replace"), path.name)
    fingerprint = fields.get("base_model_fingerprint")
    return Card(
        fingerprint=fingerprint if isinstance(fingerprint, str) and FINGERPRINT.fullmatch(fingerprint) else None,
        base_model=_text(fields.get("base_model")),
        license=_text(fields.get("license")),
        tags=tuple(tag for tag in _list(fields.get("tags")) if isinstance(tag, str)),
        description=_first_paragraph(body),
    )


def split_card(text: str, name: str = "README.md") -> tuple[dict[str, Any], str]:
    """(front matter, what follows it); without front matter ({}, text).

    Raises CorruptFileError for YAML that does not parse, has merge keys or is longer than 64 KiB.
    """
    match = re.match(r"---\s*\n(.*?)\n---\s*\n?(.*)", text, re.DOTALL)
    try:
        fields = load_yaml(match[1]) if match else {}
    except ValueError as error:
        raise CorruptFileError(
            f"the front matter of {name} is not YAML",
            expected="YAML between two lines ---",
            found=str(error),
            remedy="correct README.md",
        ) from None
    return fields if isinstance(fields, dict) else {}, match[2] if match else text


def _text(value: Any) -> str | None:
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, str) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _first_paragraph(text: str) -> str:
    paragraphs = (part.strip() for part in text.split("\n\n"))
    first = next(
        (part for part in paragraphs if part and not part.startswith(("#", "<", "```")) and TEMPLATE not in part), ""
    )
    return " ".join(first.split())[:500]


def claim_of(fingerprint: Fingerprint, name: str | None) -> BaseClaim:
    """A claim with everything known."""
    return BaseClaim(fingerprint.identity, fingerprint.value_root, fingerprint.config, name)


def claim_from_folder(adapter: Adapter, card: Card, *, read_paths: bool, progress: Progress | None = None) -> BaseClaim:
    """The claim that an adapter folder makes by itself.

    read_paths: whether base_model_name_or_path may be looked up on this machine (never for uploads).
    """
    name = card.base_model or adapter.base_name
    if card.fingerprint:
        return BaseClaim(fingerprint=card.fingerprint, name=name)
    place = Path(adapter.base_name or "")
    if read_paths and place.is_absolute() and (place / "config.json").is_file():
        return claim_of(fingerprint_folder(place, progress), name)
    return BaseClaim(name=name)


def fingerprint_folder(folder: Path, progress: Progress | None = None) -> Fingerprint:
    """Fingerprint a checkpoint folder, showing bytes."""
    report = (lambda done, total: progress("fingerprinting", done, total)) if progress else None
    return fingerprint_checkpoint(open_checkpoint(folder), report)
