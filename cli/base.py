"""``registry base``: the models that adapters belong to."""

from __future__ import annotations

from pathlib import Path

import click

from cli.listing import collect, limit_option
from cli.options import RELATIONS, Settings, common_options, pass_settings
from cli.output import emit

__all__ = ["COMMANDS"]

CHANGED = 5


@click.group()
def base() -> None:
    """Register and list base models."""


@base.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", help="The base's name; default: the folder's.")
@click.option("--parent", metavar="NAME", help="The base that it was made from.")
@click.option("--relation", type=click.Choice(RELATIONS), help="How it was made from its parent.")
@click.option("--license", help="An SPDX expression; default: the one of README.md.")
@common_options
@pass_settings
def add(
    settings: Settings, path: Path, name: str | None, parent: str | None, relation: str | None, license: str | None
) -> None:
    """Fingerprint the checkpoint in PATH and register it.

    The files stay where they are; with --url they are uploaded.
    """
    from cli.views import base_block
    from registry.schemas import Relation

    with settings.progress() as progress:
        info = settings.registry.add_base(
            path,
            name=name,
            parent=parent,
            relation=Relation(relation) if relation else None,
            license=license,
            progress=progress,
        )
    verb = "registered" if info.created else "already registered"
    human = f"{verb}: {info.name}\n\n{base_block(info)}"
    emit(settings, info, lambda: human, lambda: info.fingerprint, info.warnings)


@base.command("list")
@limit_option
@common_options
@pass_settings
def list_bases(settings: Settings, limit: int | None) -> None:
    """List the registered bases."""
    from cli.views import base_table

    bases = collect(settings.registry.list_bases, limit)
    emit(settings, bases, lambda: base_table(bases), lambda: [item.name for item in bases])


@base.command()
@click.argument("name")
@common_options
@pass_settings
def show(settings: Settings, name: str) -> None:
    """Show the base NAME, which may be a fingerprint (wf1:…)."""
    from cli.views import base_block

    info = settings.registry.get_base(name)
    emit(settings, info, lambda: base_block(info), lambda: info.fingerprint)


@base.command()
@click.argument("name")
@common_options
@pass_settings
def verify(settings: Settings, name: str) -> None:
    """Hash every tensor of the base NAME again; exits with 5 when it is not what was registered."""
    from cli.views import base_check_block

    with settings.progress() as progress:
        check = settings.registry.verify_base(name, progress=progress)
    emit(settings, check, lambda: base_check_block(check), lambda: check.found)
    if not check.intact:
        click.get_current_context().exit(CHANGED)


@base.command()
@click.argument("name")
@common_options
@pass_settings
def lineage(settings: Settings, name: str) -> None:
    """Show the ancestors and descendants of the base NAME, what the weights say of each, and whom they suggest."""
    from cli.views import lineage_table

    line = settings.registry.lineage(name)
    relatives = [*line.ancestors, *line.descendants]
    emit(settings, line, lambda: lineage_table(line), lambda: [edge.name for edge in relatives])


@base.command()
@click.argument("name")
@common_options
@pass_settings
def remove(settings: Settings, name: str) -> None:
    """Forget the base NAME; refused while adapters, other bases or recorded compositions need it.

    Its files stay, except an upload's, which 'registry gc' removes.
    """
    settings.registry.remove_base(name)
    emit(settings, {"name": name, "removed": True}, lambda: f"removed {name}", lambda: name)


COMMANDS = {"base": base}
