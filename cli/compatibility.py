"""What fits what: compatible, bases, check."""

from __future__ import annotations

from functools import partial

import click

from cli.listing import collect, limit_option
from cli.options import LEVELS, Settings, common_options, pass_settings
from cli.output import emit

__all__ = ["COMMANDS"]

INCOMPATIBLE = 4

level_option = click.option(
    "--level", type=click.Choice(LEVELS), default="shape", show_default=True, help="The weakest level that counts."
)


@click.command()
@click.argument("base")
@level_option
@limit_option
@common_options
@pass_settings
def compatible(settings: Settings, base: str, level: str, limit: int | None) -> None:
    """List the adapters that fit the base BASE, best first."""
    from cli.views import compatible_table
    from registry.schemas import Level

    fits = collect(partial(settings.registry.compatible, base, level=Level(level)), limit)
    emit(
        settings,
        fits,
        lambda: compatible_table(fits, base),
        lambda: [f"{fit.adapter.name}@{fit.adapter.version}" for fit in fits],
    )


@click.command()
@click.argument("adapter")
@level_option
@limit_option
@common_options
@pass_settings
def bases(settings: Settings, adapter: str, level: str, limit: int | None) -> None:
    """List the registered bases that the adapter ADAPTER fits, best first."""
    from cli.views import fits_table
    from registry.schemas import Level

    fits = collect(partial(settings.registry.bases_for, adapter, level=Level(level)), limit)
    emit(settings, fits, lambda: fits_table(fits, adapter), lambda: [fit.base.name for fit in fits])


@click.command()
@click.argument("adapter")
@click.argument("base")
@common_options
@pass_settings
def check(settings: Settings, adapter: str, base: str) -> None:
    """Check whether ADAPTER belongs on BASE; each is a name or a folder.

    Exits with 4 when they are incompatible or the level is weaker than same-values.
    """
    from cli.views import verdict_lines
    from registry.schemas import Level

    verdict = settings.registry.check(adapter, base)
    emit(settings, verdict, lambda: verdict_lines(verdict), lambda: verdict.level.value)
    if verdict.level not in (Level.EXACT, Level.SAME_VALUES):
        click.get_current_context().exit(INCOMPATIBLE)


COMMANDS = {"compatible": compatible, "bases": bases, "check": check}
