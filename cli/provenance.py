"""Signatures and proofs: sign, verify."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import Settings, common_options, pass_settings
from cli.output import emit

__all__ = ["COMMANDS"]


@click.command()
@click.argument("ref", metavar="REF|PATH")
@click.option("--key", required=True, type=click.Path(path_type=Path), help="An EC private key in PEM.")
@click.option(
    "-o", "--out", metavar="BUNDLE", type=click.Path(path_type=Path), help="The signature; default: model.sig."
)
@common_options
@pass_settings
def sign(settings: Settings, ref: str, key: Path, out: Path | None) -> None:
    """Sign a composed model or an adapter in a folder, or a version of the registry.

    The signature is a bundle of OpenSSF's model signing and the key stays here; a version's signature is kept by its
    registry. A composed model gets attestation.json too: recipe, inputs, verdicts, tool and outputs, as in-toto in a
    signed envelope. REGISTRY_KEY_PASSWORD opens an encrypted key.
    """
    from composer.recipe import is_path
    from registry.verification import sign_folder, sign_version

    signed = sign_folder(Path(ref), key, out) if is_path(ref) else sign_version(settings.registry, ref, key, out)
    text = f"signed {signed.ref}: {len(signed.files)} files\nkey        {signed.key}"
    where = f"\nsignature  {signed.bundle}" if signed.bundle else ""
    emit(settings, signed, lambda: f"{text}{where}", lambda: signed.key)


@click.command()
@click.argument("ref", metavar="REF|PATH")
@click.option(
    "--public-key", type=click.Path(path_type=Path), help="The EC public key in PEM that must have signed it."
)
@click.option(
    "--signature", metavar="BUNDLE", type=click.Path(path_type=Path), help="Of a folder; default: its model.sig."
)
@click.option("--rebuild", is_flag=True, help="Compose it again from the same inputs and compare every byte.")
@common_options
@pass_settings
def verify(settings: Settings, ref: str, public_key: Path | None, signature: Path | None, rebuild: bool) -> None:
    """Check that a composed model, or a version of the registry, is what it claims to be.

    Every file of a composed model is hashed and compared with composition.json; --rebuild makes it a second time, from
    the inputs that it names by their hashes, in a folder beside it. A version's files are fetched. Exits with 5 and the
    names of the files where something differs.
    """
    from cli.views import verification_block
    from composer.recipe import is_path
    from registry.verification import verify_folder, verify_version

    with settings.progress() as progress:
        if is_path(ref):
            registry = settings.registry if rebuild else None
            folder = Path(ref)
            found = verify_folder(registry, folder, public_key=public_key, bundle=signature, progress=progress)
        elif rebuild or signature:
            raise click.UsageError("--rebuild and --signature are for folders: write them with ./ in front")
        else:
            found = verify_version(settings.registry, ref, public_key=public_key, progress=progress)
    emit(settings, found, lambda: verification_block(found), lambda: found.digest or found.ref)


COMMANDS = {"sign": sign, "verify": verify}
