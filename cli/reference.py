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
    parts += [
        "## Adapter kinds and formats, quantised bases",
        "In [kinds.md](kinds.md), with what each becomes and where it is tested.",
        "## Merge methods",
        _methods(),
    ]
    return "\n\n".join(parts) + "\n"


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
