"""Every kind, method, format and quantised scheme has an oracle that exists, and a row in docs/kinds.md."""

from __future__ import annotations

import ast
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import composer.adapters
import composer.formats
import composer.methods
import composer.quantised
from cli.tables import formulas, render
from tests.oracles import ORACLES, PEFT_FORWARD

ROOT = Path(__file__).resolve().parents[1]
REGISTRIES: dict[str, tuple[ModuleType, Any]] = {
    "kinds": (composer.adapters, composer.adapters.kinds),
    "methods": (composer.methods, composer.methods.methods),
    "formats": (composer.formats, composer.formats.formats),
    "schemes": (composer.quantised, composer.quantised.schemes),
}
SHARED = {"composer.quantised.packing"}  # what several files of a package import, and registers nothing


@pytest.mark.parametrize("family", REGISTRIES)
def test_every_name_of_a_registry_has_an_oracle(family: str) -> None:
    """A new name fails here until tests/oracles.py says which test holds it to something outside this project."""
    assert set(ORACLES[family]) == set(REGISTRIES[family][1]())


@pytest.mark.parametrize("family", REGISTRIES)
def test_every_file_of_a_package_registers_something(family: str) -> None:
    """So that no file escapes the walk over the registry; names that begin with an underscore are shared parts."""
    package, registered = REGISTRIES[family]
    files = {f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__)}
    named = {name for name in files - SHARED if not name.rpartition(".")[2].startswith("_")}
    origins = {getattr(item, "function", type(item)).__module__ for item in registered().values()}
    assert named == origins


@pytest.mark.parametrize("node", sorted({node for nodes in ORACLES.values() for node in nodes.values()}))
def test_every_oracle_is_a_test(node: str) -> None:
    """The file is there and defines that function."""
    path, _, name = node.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {item.name for item in tree.body if isinstance(item, ast.FunctionDef)}


def test_every_kind_says_what_a_weight_becomes() -> None:
    """The docstring of its module has a formula, which docs/kinds.md prints."""
    found = composer.adapters.kinds()
    assert all(formulas(found[name]) for name, oracle in ORACLES["kinds"].items() if oracle == PEFT_FORWARD)


def test_the_table_of_kinds_is_current() -> None:
    """docs/kinds.md is what the registries say now; else run `python -m cli.tables > docs/kinds.md`."""
    assert (ROOT / "docs" / "kinds.md").read_text(encoding="utf-8") == render(ORACLES)
