"""``registry delta``: full fine-tunes stored as their difference from the base."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import Settings, common_options, pass_settings
from cli.output import emit

__all__ = ["COMMANDS"]

out_option = click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
base_option = click.option("--base", required=True, metavar="NAME|PATH", help="The base that the fine-tune began with.")


@click.group()
def delta() -> None:
    """Store full fine-tunes as exact differences from their base."""


@delta.command()
@click.argument("finetune")
@base_option
@out_option
@common_options
@pass_settings
def make(settings: Settings, finetune: str, base: str, out: Path) -> None:
    """Write an adapter that turns the base into FINETUNE, bit for bit.

    FINETUNE is a checkpoint folder or a registered base with the same tensors in the same number format. The adapter
    is published and composed like any other.
    """
    from cli.views import delta_block

    with settings.progress() as progress:
        result = settings.registry.make_delta(finetune, base, out, progress=progress)
    emit(settings, result, lambda: delta_block(result), lambda: result.out)


@delta.command()
@click.argument("adapter")
@base_option
@out_option
@common_options
@pass_settings
def restore(settings: Settings, adapter: str, base: str, out: Path) -> None:
    """Write the checkpoint that the delta ADAPTER was made of; every file has the SHA-256 that it had."""
    from cli.views import delta_block

    with settings.progress() as progress:
        result = settings.registry.restore_delta(adapter, base, out, progress=progress)
    emit(settings, result, lambda: delta_block(result), lambda: result.out)


COMMANDS = {"delta": delta}
