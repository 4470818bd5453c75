"""The base that a quantised one was made of, where a recipe asks to merge into that (composer.precision).

The user's word, or a declared lineage, is what ties the two; that it can be true is checked: the same tensors, the same
behaviour config apart from the quantisation, and weights no further apart than a quantisation brings them.
"""

from __future__ import annotations

from composer.checkpoint import Checkpoint
from composer.errors import IncompatibleError, NotFoundError, RecipeError
from composer.precision import quantisation_error
from composer.recipe import BasePrecision, Export, Recipe
from registry.fingerprint import behaviour_config

__all__ = ["difference_warning", "original_error", "original_reference"]


def original_reference(recipe: Recipe, parent: str | None) -> str | None:
    """Which base is merged into in place of the recipe's; None where that is the recipe's own.

    parent: the base that the recipe's is declared to be quantised from. Raises RecipeError for settings that
    contradict each other, NotFoundError where no original is known.
    """
    if recipe.base_precision is BasePrecision.QUANTISED:
        if recipe.original is None:
            return None
        raise RecipeError(
            "an original is named, but the quantised weights are to be merged into",
            expected="base_precision original",
            found=recipe.base_precision.value,
            remedy="give --base-precision original as well, or leave the original out",
        )
    if recipe.export is Export.PEFT:
        raise RecipeError(
            "a LoRA is merged into nothing: base_precision says nothing of the export 'peft'",
            expected="export safetensors or onnx",
            found=recipe.export.value,
            remedy="leave base_precision out",
        )
    if recipe.original is None and parent is None:
        raise NotFoundError(
            f"nothing is known of what {recipe.base} was quantised from",
            expected="the unquantised base",
            found="no original in the recipe, and no declared parent",
            remedy="name it: --original NAME; or declare it: registry base add PATH --parent NAME --relation quantized",
        )
    return recipe.original or parent


def original_error(base: str, quantised: Checkpoint, ref: str, original: Checkpoint) -> float:
    """How far the original is from what the quantised base decodes to, as a share of its norm.

    Raises IncompatibleError when it cannot be the original.
    """
    error = quantisation_error(quantised, original)
    before, after = (
        behaviour_config({key: value for key, value in each.config.items() if key != "quantization_config"})
        for each in (original, quantised)
    )
    if differing := sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key)):
        raise IncompatibleError(
            f"{ref} is configured in another way than {base}: {', '.join(differing)}",
            expected={key: after.get(key) for key in differing},
            found={key: before.get(key) for key in differing},
            remedy="name the very model that was quantised",
        )
    return error


def difference_warning(base: str, original: str, error: float) -> str:
    """What a composition into the original says of itself."""
    return (
        f"merged into {original}, not into the quantised weights of {base}, over which adapters are trained: the two "
        f"differ by {error:.1%} of their norm, and the result differs as much from what was trained; an adapter whose "
        "own change is smaller is drowned in that"
    )
