"""``registry verify``: is every stored byte what it was?"""

from __future__ import annotations

import click

from cli.options import Settings, common_options, pass_settings
from cli.output import emit

__all__ = ["COMMANDS", "show_store_check"]

DAMAGED = 5


def show_store_check(settings: Settings, *, repair: bool = False) -> None:
    """Hash everything that is stored and print what was found; exits with 5 where something is damaged and stays so."""
    from cli.views import store_check_block

    with settings.progress() as progress:
        found = settings.registry.verify_store(repair=repair, progress=progress)
    left = [item for item in found.damaged if not item.restored]
    emit(settings, found, lambda: store_check_block(found), lambda: [item.path for item in left])
    if left:
        click.get_current_context().exit(DAMAGED)


@click.command()
@click.option("--all", "everything", is_flag=True, required=True, help="Everything that is stored.")
@common_options
@pass_settings
def verify(settings: Settings, everything: bool) -> None:
    """Hash everything that is stored: adapters, bases, compositions, uploads and caches.

    It exits with 5 where a byte is not what it was, and names what is damaged, what uses it and what can restore it;
    'registry doctor --repair' does that.
    """
    assert everything
    show_store_check(settings)


COMMANDS = {"verify": verify}
