"""Adapters added to a composed graph that holds several: composed by themselves on the same base, then joined to it.

The new ones are composed as any recipe is, with their verdicts, licences and verification, here or by a service; what
comes of that is joined by composer.exporters.onnx.append and removed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from composer.errors import CorruptFileError, RecipeError
from composer.provenance import read_record
from composer.recipe import Allow, Placement, Recipe, is_path, parse_recipe
from registry.interface import Progress, Registry
from registry.schemas import Advice, CompositionInfo

__all__ = ["append"]


def append(
    registry: Registry,
    folder: Path,
    adapters: Sequence[str],
    *,
    allow: Allow = Allow.SAME_VALUES,
    accept_licences: bool = False,
    progress: Progress | None = None,
) -> CompositionInfo:
    """Add `adapters` (NAME[@VERSION][#TASK][:WEIGHT] or a folder) to the composition in `folder`, made with --multi.

    Raises NotFoundError (no composition), RecipeError (one that keeps no rows), CorruptFileError (a record that is
    none), what `compose` raises, and what `append_adapters` raises.
    """
    from composer.exporters.onnx.append import append_adapters

    folder = folder.expanduser().resolve()
    recipe = _recipe(read_record(folder / "composition.json"), adapters, allow)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        result = registry.compose(recipe, scratch / "added", accept_licences=accept_licences, progress=progress)
        record = append_adapters(folder, Path(result.out))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return CompositionInfo(
        recipe_text=record["recipe_text"],
        export=result.export,
        out=str(folder),
        output_digest=record["output_digest"],
        nbytes=sum(entry["size"] for entry in record["outputs"].values()),
        cached=False,
        warnings=result.warnings,
        advice=tuple(Advice(**entry) for entry in record.get("advice", ())),
        record=record,
        seconds=result.seconds,
    )


def _recipe(record: dict[str, Any], adapters: Sequence[str], allow: Allow) -> Recipe:
    """The recipe of the new adapters alone, on the base of the composition and written as it was."""
    try:
        recipe = Recipe.model_validate(record["recipe"])
        base = recipe.base if is_path(recipe.base) else record["base"]["fingerprint"]
        original = record["base"]["original"]["ref"] if "original" in record["base"] else None
    except (KeyError, TypeError, ValidationError) as error:
        raise CorruptFileError(
            "composition.json does not say what went in",
            expected="the record that 'registry compose' wrote",
            found=str(error).partition("\n")[0],
            remedy="compose it again",
        ) from None
    if recipe.placement is not Placement.MULTI:
        raise RecipeError(
            "adapters can be added to a graph that holds several, row by row",
            expected="a composition made with --export onnx --multi",
            found={"export": recipe.export.value, "placement": recipe.placement.value},
            remedy="compose it anew with all of its adapters",
        )
    terms = parse_recipe("+".join(["base", *adapters])).adapters
    return recipe.model_copy(update={"base": base, "original": original, "adapters": terms, "allow": allow})
