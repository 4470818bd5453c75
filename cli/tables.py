"""docs/kinds.md from the registries themselves: ``python -m cli.tables > docs/kinds.md``, in a checkout.

What a weight becomes is read off the docstring of a kind's module, what changes off that of its class; what is refused
off `options` (values that compose), `saved` (what the file must hold) and `refuses` (the rest), and off the reasons of
composer/adapters/unmergeable.py. The test that is a row's oracle comes from tests/oracles.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import click

__all__ = ["formulas", "render"]

FORMULA = re.compile(r"(?:^|\s)(?:W|b|V|h₁')(?:'|\[[^\]]*\]|\.flat\[\w+\])?\s+(?:\+?=) ")
INTRODUCTION = """\
Written by `python -m cli.tables > docs/kinds.md`; a test fails when it is stale. W is a weight [out, in] of the base
and b its bias, W' and b' what they become. The oracle of a row is the test that compares it with PEFT's own forward,
with another library or with a formula in float64. The ten kinds that people use most are also trained on SmolLM2 and
compared with the model they were trained in: tests/test_trained_kinds.py."""
Oracles = Mapping[str, Mapping[str, str]]


def render(oracles: Oracles) -> str:
    """The whole page as Markdown."""
    return "\n\n".join([
        "# Kinds, methods, formats, quantised bases",
        INTRODUCTION,
        "## Adapter kinds that change weights",
        _kinds(oracles["kinds"]),
        "## Adapters that are refused by name",
        _refused(),
        "## Formats",
        "Besides PEFT's own, which the table of kinds is about. The published files stay as they are.",
        _formats(oracles["formats"]),
        "## Merge methods",
        "Their parameters are in [cli.md](cli.md).",
        _methods(oracles["methods"]),
        "## Quantised bases",
        _schemes(oracles["schemes"]),
    ]) + "\n"  # fmt: skip


def formulas(kind: Any) -> list[str]:
    """The lines of a kind's module that say what a weight or bias becomes."""
    lines = (_docstring(kind) or "").splitlines()[1:]
    pieces = [piece for line in lines if FORMULA.search(line) for piece in re.split(r"\s{4,}", line.strip())]
    return [piece.rstrip(";.") for piece in pieces if FORMULA.search(piece)]


def _kinds(oracles: Mapping[str, str]) -> str:
    from composer.adapters import kinds
    from composer.adapters.unmergeable import Unmergeable

    rows = []
    for name, kind in sorted(kinds().items()):
        if isinstance(kind, Unmergeable):
            continue
        types = [f"`{peft_type}`{_switches(kind)}" for peft_type in kind.peft_types]
        becomes = "<br>".join(f"`{line}`" for line in formulas(kind)) or "its own tensors"
        changes = (type(kind).__doc__ or "").splitlines()[0].removesuffix(".")
        rows.append((name, "<br>".join(types), changes, becomes, "<br>".join(_refusals(kind)), _link(oracles[name])))
    return _table(("kind", "`peft_type`", "changes", "what they become", "refused", "oracle"), rows)


def _switches(kind: Any) -> str:
    fields = " or ".join(f"`{field}`" for field in getattr(kind, "switches", ()))
    return f" with {fields}" if fields else ""


def _refusals(kind: Any) -> list[str]:
    found = [f"`{field}=false`: {reason}" for field, reason in getattr(kind, "saved", {}).items()]
    for field, values in getattr(kind, "options", {}).items():
        if set(values) == {False, None}:
            found.append(f"`{field}`")
        elif not {True, False} <= set(values):
            listed = ", ".join(f"`{value}`" for value in values if value is not None)
            found.append(f"`{field}` other than {listed}")
    return found + [f"{what}: {reason}" for what, reason in getattr(kind, "refuses", {}).items()]


def _refused() -> str:
    from composer.adapters.unmergeable import REASONS, SWITCHES, UNTOLD

    rows = [(f"`{name}`", reason) for name, reason in sorted({**REASONS, **UNTOLD}.items())]
    rows += [(f"`LORA` with `{field}`", reason) for field, reason in SWITCHES.items()]
    return _table(("`peft_type`", "why"), rows)


def _formats(oracles: Mapping[str, str]) -> str:
    from composer.formats import formats

    found = sorted(formats().items())
    return _table(("saved by", "files", "oracle"), [(name, one.layout, _link(oracles[name])) for name, one in found])


def _methods(oracles: Mapping[str, str]) -> str:
    from composer.methods import methods

    found = sorted(methods().items())
    return _table(
        ("`--method`", "what it computes", "oracle"),
        [(f"`{name}`", one.summary, _link(oracles[name])) for name, one in found],
    )


def _schemes(oracles: Mapping[str, str]) -> str:
    from composer.quantised import schemes

    rows = []
    for name, scheme in sorted(schemes().items()):
        rows.append((name, (_docstring(scheme) or "").splitlines()[0], _link(oracles[name])))
    return _table(("scheme", "what is decoded", "oracle"), rows)


def _docstring(item: Any) -> str | None:
    """Of the module that the item's class is in."""
    return sys.modules[type(item).__module__].__doc__


def _link(node: str) -> str:
    """A test by its file and name."""
    path, _, test = node.partition("::")
    return f"[{test}](../{path})"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    from tests.oracles import ORACLES

    click.echo(render(ORACLES), nl=False)
