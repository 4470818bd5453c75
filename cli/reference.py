"""docs/cli.md from the commands' own help: ``python -m cli.reference > docs/cli.md``."""

from __future__ import annotations

from collections.abc import Iterator

import click

from cli.main import cli
from cli.options import Settings

__all__ = ["render"]

WIDTH = 100


def render() -> str:
    """The whole reference as Markdown."""
    parts = [
        "# Command line",
        "Written by `python -m cli.reference > docs/cli.md`; a test fails when it is stale.",
    ]
    for path, text in _helps(cli, None, "registry"):
        parts.append(f"## {path}\n\n```\n{text}\n```")
    parts += ["## Adapter formats", _formats(), "## Adapter kinds", _kinds(), "## Merge methods", _methods()]
    return "\n\n".join(parts) + "\n"


def _formats() -> str:
    """A table of the tools whose folders are read, and the files that show it."""
    from composer.formats import PEFT_LAYOUT, formats

    lines = ["| saved by | files |", "|---|---|", f"| PEFT | {PEFT_LAYOUT} |"]
    lines += [f"| {name} | {found.layout} |" for name, found in sorted(formats().items())]
    return "\n".join(lines)


def _kinds() -> str:
    """A table of the adapters that are read, and what becomes of each."""
    import sys

    from composer.adapters import kinds
    from composer.adapters.unmergeable import REASONS

    lines = ["| `peft_type` | kind | on the weights |", "|---|---|---|"]
    for name, kind in sorted(kinds().items()):
        summary = (sys.modules[type(kind).__module__].__doc__ or "").strip().splitlines()[0]
        for peft_type in kind.peft_types:
            effect = f"refused: {REASONS[peft_type]}" if peft_type in REASONS else summary
            lines.append(f"| `{peft_type}` | {name} | {effect} |")
    return "\n".join(lines)


def _methods() -> str:
    """A table of the methods that `--method` takes, and the parameters that `-p` sets."""
    from composer.methods import methods

    lines = ["| `--method` | what it computes | `-p` |", "|---|---|---|"]
    for name, method in sorted(methods().items()):
        parameters = "<br>".join(f"`{parameter}`" for parameter in method.parameters.values())
        summary = method.summary.replace("|", r"\|")
        lines.append(f"| `{name}` | {summary} | {parameters} |")
    algebra = [f"`{name}`" for name, each in sorted(methods().items()) if each.factors and not each.equal_ranks]
    lines += [
        "",
        f"{', '.join(algebra)} leave their linear algebra to LAPACK: the same bytes at any number of threads,",
    ]
    lines += ["while another kind of processor gives the same numbers to 1e-6 only."]
    return "\n".join(lines)


def _helps(command: click.Command, parent: click.Context | None, name: str) -> Iterator[tuple[str, str]]:
    context = click.Context(
        command, info_name=name, parent=parent, obj=Settings(), terminal_width=WIDTH, max_content_width=WIDTH,
        help_option_names=["-h", "--help"],
    )  # fmt: skip
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found:
                yield from _helps(found, context, child)


if __name__ == "__main__":
    click.echo(render(), nl=False)
