"""Signatures: sign; what was signed is verified by cli/integrity.py."""

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


COMMANDS = {"sign": sign}
