"""``registry verify``: is every stored byte what it was, and is this model, or this version, what it claims to be?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import Settings, common_options, pass_settings
from cli.output import emit

if TYPE_CHECKING:
    from registry.schemas import Verification

__all__ = ["COMMANDS", "show_store_check"]

DAMAGED = 5


def show_store_check(settings: Settings, *, repair: bool = False) -> None:
    """Hash everything that is stored and print what was found; exits with 5 where something is damaged and stays so."""
    from cli.views import store_check_block

    with settings.progress() as progress:
        found = settings.registry.verify_store(repair=repair, progress=progress)
    left = [item for item in found.damaged if not item.restored]
    emit(settings, found, lambda: store_check_block(found), lambda: [item.path or item.name for item in left])
    if left:
        click.get_current_context().exit(DAMAGED)


@click.command()
@click.argument("refs", metavar="[REF|PATH]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Everything that is stored, without any REF.")
@click.option("--public-key", type=click.Path(path_type=Path), help="The EC public key (PEM) that must have signed it.")
@click.option("--signature", metavar="FILE", type=click.Path(path_type=Path), help="Of a PATH; default: its model.sig.")
@click.option("--rebuild", is_flag=True, help="Compose it again from the same inputs and compare every byte.")
@common_options
@pass_settings
def verify(
    settings: Settings,
    refs: tuple[str, ...],
    everything: bool,
    public_key: Path | None,
    signature: Path | None,
    rebuild: bool,
) -> None:
    """Check composed models and versions of the registry, or with --all everything that is stored.

    Every file of a composed model (PATH, with ./ in front) is hashed and compared with composition.json; --rebuild
    makes it a second time, from the inputs that it names by their hashes, in a folder beside it. A version's files are
    fetched. --all hashes adapters, bases, compositions, uploads and caches, holds the catalogue against its own
    digests, and names what is damaged, what uses it and what can restore it; 'registry doctor --repair' does that.
    Exits with 5 where a byte is not what it was.
    """
    from cli.views import verification_block

    options = public_key or signature or rebuild
    if everything == bool(refs) or (everything and options):
        raise click.UsageError("give what is to be verified, or --all by itself")
    if everything:
        show_store_check(settings)
        return
    if signature and len(refs) > 1:
        raise click.UsageError("--signature is of one folder")
    found = [_verified(settings, ref, public_key, signature, rebuild) for ref in refs]
    blocks = [verification_block(item) for item in found]
    emit(settings, found, lambda: "\n\n".join(blocks), lambda: [item.digest or item.ref for item in found])


def _verified(
    settings: Settings, ref: str, public_key: Path | None, signature: Path | None, rebuild: bool
) -> Verification:
    from composer.recipe import is_path
    from registry.verification import verify_folder, verify_version

    with settings.progress() as progress:
        if is_path(ref):
            registry = settings.registry if rebuild else None
            return verify_folder(registry, Path(ref), public_key=public_key, bundle=signature, progress=progress)
        if rebuild or signature:
            raise click.UsageError("--rebuild and --signature are for folders: write them with ./ in front")
        return verify_version(settings.registry, ref, public_key=public_key, progress=progress)


COMMANDS = {"verify": verify}
