"""Adapters taken out of a composition again, exactly: by composing what is left anew, never by subtracting.

Rounding to bf16 cannot be subtracted: about 2% of the weights would be wrong. composition.json names the base by its
fingerprint and each adapter by its digest, so what is left can be composed from the very same inputs; without any
adapter the base's own tensors come out, which is verified.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from composer.adapters import open_adapter
from composer.errors import CorruptFileError, IntegrityError, NotFoundError
from composer.files import sha256_file
from composer.provenance import manifest_digest, read_record
from composer.recipe import AdapterTerm, Export, Recipe, is_path
from registry.claims import fingerprint_folder
from registry.interface import Progress, Registry
from registry.schemas import CompositionInfo
from registry.services.publishing import publishable_files

__all__ = ["recipe_without", "recorded_recipe", "undo"]


def undo(
    registry: Registry,
    folder: Path,
    out: Path,
    *,
    adapters: Sequence[str] = (),
    replace: bool = False,
    progress: Progress | None = None,
) -> CompositionInfo:
    """Compose into `out` what the composition in `folder` is without `adapters`; without all of them by default.

    Raises NotFoundError (no record, no such adapter in it, an input that is gone), CorruptFileError (a record that is
    none), IntegrityError (an input changed, or the tensors are not the base's), and what `compose` raises.
    """
    record = read_record(folder.expanduser() / "composition.json")
    recipe = recipe_without(record, adapters)
    result = registry.compose(recipe, out, replace=replace, accept_licences=True, progress=progress)
    if not recipe.adapters:
        found = fingerprint_folder(Path(result.out), progress).identity
        if found != recipe.base:
            shutil.rmtree(result.out)
            raise IntegrityError(
                "what came out are not the base's own tensors; it was removed",
                expected=recipe.base,
                found=found,
                remedy="a quantised base is written decoded: its own files lie where it was registered",
            )
    return result


def recipe_without(record: dict[str, Any], adapters: Sequence[str]) -> Recipe:
    """The recipe of a composition without `adapters` (all where none is named), each input pinned to its digest.

    Without any adapter left it is the base (or the original that was merged into) in its own number format, as
    safetensors.
    """
    recipe, pairs = _parts(record)
    fingerprint = record["base"]["fingerprint"]
    original = record["base"]["original"]["fingerprint"] if "original" in record["base"] else None
    known = {name for term, (label, _) in pairs for name in (term.ref, label)}
    if unknown := [name for name in adapters if name not in known]:
        raise NotFoundError(
            f"{unknown[0]} is not part of this composition",
            expected=sorted(known),
            found=unknown,
            remedy="name one of its adapters",
        )
    kept = [(term, entry) for term, entry in pairs if adapters and not {term.ref, entry[0]} & set(adapters)]
    if not kept:
        return Recipe(base=original or fingerprint, requantise=recipe.requantise and original is None)
    left = [_pinned(term, digest) for term, (_, digest) in kept]
    changes: dict[str, Any] = {"base": fingerprint, "original": original, "adapters": tuple(left)}
    beside = {item.get("ref") for item in record.get("additions", ())}
    if recipe.export is Export.BUNDLE and not beside & {label for _, (label, _) in kept}:
        changes["export"] = Export.SAFETENSORS  # nothing is left to put beside the weights
    return recipe.model_copy(update=changes)


def recorded_recipe(record: dict[str, Any]) -> tuple[Recipe, tuple[str | None, ...]]:
    """The recipe of a composition as it was given, and the digest that each registered adapter had then.

    Raises CorruptFileError (a record that is none) and IntegrityError (a folder that no longer holds its adapter).
    """
    recipe, pairs = _parts(record)
    pinned = [_pinned(term, digest) for term, (_, digest) in pairs]
    return recipe, tuple(None if is_path(term.ref) else term.version for term in pinned)


def _parts(record: dict[str, Any]) -> tuple[Recipe, list[tuple[AdapterTerm, tuple[str, str]]]]:
    """The recipe, and each of its terms with the label and the digest that it had."""
    try:
        recipe = Recipe.model_validate(record["recipe"])
        entries = [(entry["ref"], entry["digest"]) for entry in record["adapters"]]
        pairs = list(zip(recipe.adapters, entries, strict=True))
        _ = [entry["fingerprint"] for entry in (record["base"], record["base"].get("original", record["base"]))]
    except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
        raise CorruptFileError(
            "composition.json does not say what went in",
            expected="the record that 'registry compose' wrote, with the base's fingerprint and the adapters' digests",
            found=str(error).partition("\n")[0],
            remedy="compose it again",
        ) from None
    return recipe, pairs


def _pinned(term: AdapterTerm, digest: str) -> AdapterTerm:
    """The term by the digest of its bytes; a folder must still hold them."""
    if not is_path(term.ref):
        return term.model_copy(update={"version": digest})
    files = publishable_files(open_adapter(Path(term.ref).expanduser().resolve()))
    found = manifest_digest({name: {"sha256": sha256_file(path)} for name, path in files.items()})
    if found != digest:
        raise IntegrityError(
            f"{term.ref} no longer holds the adapter that was composed",
            expected=digest,
            found=found,
            remedy="restore its files",
        )
    return term
