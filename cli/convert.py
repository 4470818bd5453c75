"""LoRAs made of other things: extract, resize."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from cli.options import Settings, common_options, pass_settings
from cli.output import emit

__all__ = ["COMMANDS"]

F = TypeVar("F", bound=Callable[..., Any])


def size_options(command: F) -> F:
    """--rank or --energy, and --out."""
    command = click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="A new folder.")(command)
    command = click.option("--energy", type=float, metavar="E", help="The share to keep, such as 0.99.")(command)
    return click.option("--rank", type=click.IntRange(min=1, max=1 << 16), help="Of every module.")(command)


@click.command()
@click.argument("finetune")
@click.option("--base", required=True, metavar="NAME|PATH", help="The base that the fine-tune began with.")
@size_options
@click.option("--ignore-rest", is_flag=True, help="Leave out what changed and is no linear weight.")
@common_options
@pass_settings
def extract(
    settings: Settings,
    finetune: str,
    base: str,
    rank: int | None,
    energy: float | None,
    out: Path,
    ignore_rest: bool,
) -> None:
    """Extract a LoRA from FINETUNE: the best low-rank part of what it changed in its base.

    FINETUNE is a checkpoint folder or a registered base. Norms, biases and embeddings that changed are carried whole.
    Give --rank or --energy.
    """
    from cli.views import conversion_block

    with settings.progress() as progress:
        result = settings.registry.extract(
            finetune, base, out, rank=rank, energy=energy, ignore_rest=ignore_rest, progress=progress
        )
    emit(settings, result, lambda: conversion_block(result), lambda: result.out)


@click.command()
@click.argument("adapter")
@size_options
@common_options
@pass_settings
def resize(settings: Settings, adapter: str, rank: int | None, energy: float | None, out: Path) -> None:
    """Write the LoRA ADAPTER at another rank: the best of that rank; a larger one is exact.

    ADAPTER is a name or a folder. Give --rank or --energy.
    """
    from cli.views import conversion_block

    result = settings.registry.resize(adapter, out, rank=rank, energy=energy)
    emit(settings, result, lambda: conversion_block(result), lambda: result.out)


COMMANDS = {"extract": extract, "resize": resize}
