"""The packages depend one way: cli -> registry -> composer; and starting costs little."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {
    "composer": {"registry", "cli", "migrations", "sqlalchemy", "alembic", "fastapi", "starlette", "click", "httpx"},
    "registry": {"cli", "click"},
}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_a_package_does_not_import_what_lies_above_it(package: str) -> None:
    """No file of the composer knows database, web or command line; none of the registry knows the command line."""
    found = {str(path): imported(path) & FORBIDDEN[package] for path in (ROOT / package).rglob("*.py")}
    assert len(found) > 10
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize("module", ["composer.plan", "composer.run", "registry.services.local"])
def test_planning_imports_no_heavy_library(module: str) -> None:
    """torch, transformers and onnx are imported where they are used, so that headers are read at once."""
    code = f"import {module}, sys; print([m for m in ('torch', 'transformers', 'onnx', 'onnxruntime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
