"""A recipe in its text form over REST says all that a recipe can."""

from __future__ import annotations

from composer.recipe import Recipe
from registry.api.schemas import RecipeRequest, to_recipe


def test_a_request_has_every_field_that_the_text_leaves_open() -> None:
    """With the recipe's own defaults, so that the same words mean the same here and there."""
    told_by_the_text = {"schema_version", "base", "adapters"}
    fields = {name: field.default for name, field in Recipe.model_fields.items() if name not in told_by_the_text}
    found = {name: field.default for name, field in RecipeRequest.model_fields.items() if name != "recipe"}
    assert found == fields
    recipe = to_recipe(RecipeRequest(recipe="base+a/b", export="onnx", flavour="genai", compute="fp16"))
    assert (recipe.flavour, recipe.compute, recipe.adapters[0].ref) == ("genai", "fp16", "a/b")
