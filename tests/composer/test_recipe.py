"""Recipes as people type them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from composer.errors import RecipeError
from composer.recipe import AdapterTerm, Recipe, is_path, parse_recipe, split_reference

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "base", "terms"),
    [
        ("smollm2", "smollm2", []),
        ("smollm2+team/shout", "smollm2", [("team/shout", None, 1.0)]),
        ("base+a@1.0.0:0.7+b", "base", [("a", "1.0.0", 0.7), ("b", None, 1.0)]),
        ("base+a@prod", "base", [("a", "prod", 1.0)]),
        (f"base+a@{DIGEST}:0.5", "base", [("a", DIGEST, 0.5)]),
        (f"base+a@{DIGEST}", "base", [("a", DIGEST, 1.0)]),
        ("base+a:-0.5", "base", [("a", None, -0.5)]),
        ("base+a:0", "base", [("a", None, 0.0)]),
        ("base+a:1e-3", "base", [("a", None, 0.001)]),
        ("base+a@2.0.0-rc.1", "base", [("a", "2.0.0-rc.1", 1.0)]),
        ("./my base+/srv/x/adapter:0.3+~/b", "./my base", [("/srv/x/adapter", None, 0.3), ("~/b", None, 1.0)]),
        ("models/llama+runs/a/final", "models/llama", [("runs/a/final", None, 1.0)]),
    ],
)
def test_a_recipe_reads_as_documented(text: str, base: str, terms: list[tuple[str, str | None, float]]) -> None:
    """Names, versions, aliases, digests, weights and folders each land in their field."""
    recipe = parse_recipe(text)
    assert (recipe.base, [(t.ref, t.version, t.weight) for t in recipe.adapters]) == (base, terms)


@pytest.mark.parametrize(
    "text",
    [
        "", "+a", "base+", "base++a", "base+a:", "base+a:x", "base+a:nan", "base+a:inf", "base+a@", "base+@1.0.0",
        "base@1.0.0+a", "base:0.5+a", "base+a@1:0.5:0.6", "base + a", "base+./folder@1.0.0", "base+a@sha256:zz",
    ],
)  # fmt: skip
def test_a_bad_recipe_is_a_typed_error_that_shows_the_syntax(text: str) -> None:
    """Every malformed recipe raises RecipeError with a remedy, never something else."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    assert caught.value.code == "bad-recipe"
    assert caught.value.expected
    assert "BASE+ADAPTER" in caught.value.remedy


names = st.from_regex(r"[a-z][a-z0-9._-]{0,20}", fullmatch=True)
weights = st.floats(-10, 10).map(lambda value: float(f"{value:g}")).filter(math.isfinite)
terms = st.builds(AdapterTerm, ref=names, version=st.none() | st.just("1.2.3") | st.just(DIGEST), weight=weights)


@given(st.builds(Recipe, base=names, adapters=st.lists(terms, max_size=4).map(tuple)))
def test_what_is_printed_can_be_typed_again(recipe: Recipe) -> None:
    """str and parse_recipe are inverse, so a recipe in a log or a record can be run."""
    assert parse_recipe(str(recipe)) == recipe


@given(st.text(max_size=40))
def test_no_text_makes_the_parser_fail_otherwise(text: str) -> None:
    """Whatever is typed is a recipe or a RecipeError."""
    try:
        parse_recipe(text)
    except RecipeError:
        pass


def test_the_digest_names_the_intent() -> None:
    """Equal recipes have equal digests; a weight changes it."""
    assert parse_recipe("b+a:0.5").digest == parse_recipe("b+a:0.50").digest
    assert parse_recipe("b+a:0.5").digest != parse_recipe("b+a:0.6").digest


def test_a_weight_that_is_not_finite_is_refused_in_a_model_too() -> None:
    """REST builds recipes from JSON, past the parser."""
    with pytest.raises(ValidationError, match="finite"):
        AdapterTerm(ref="a", weight=math.inf)


def test_references_split_into_name_and_version() -> None:
    """A weight does not belong into a reference."""
    assert split_reference("team/a@prod") == ("team/a", "prod")
    assert split_reference(f"a@{DIGEST}") == ("a", DIGEST)
    with pytest.raises(RecipeError):
        split_reference("a:0.5")


def test_paths_are_told_from_names() -> None:
    """One slash is a namespace, of an adapter or of a base; a folder begins with a dot or has more."""
    assert [is_path(ref) for ref in ("./a", "/a", "~/a", "..", "x/y/z", "x/y", "a")] == [True] * 5 + [False] * 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("b+a#2", ("a", None, 2, 1.0)),
        ("b+team/a@1.0.0#0:0.5", ("team/a", "1.0.0", 0, 0.5)),
        ("b+./a#b", ("./a#b", None, None, 1.0)),
        ("b+./a#b#7", ("./a#b", None, 7, 1.0)),
    ],
)
def test_a_task_stands_between_version_and_weight(text: str, found: tuple[object, ...]) -> None:
    """Digits after the last '#'; what is read is written the same way."""
    (term,) = parse_recipe(text).adapters
    assert (term.ref, term.version, term.task, term.weight) == found
    assert str(parse_recipe(text)) == text


def test_a_reference_without_recipe_has_no_task() -> None:
    """It names an adapter, not how it acts."""
    with pytest.raises(RecipeError, match="task or a weight"):
        split_reference("team/a@1.0.0#2")
