"""``registry import``: adapters and bases of a hub."""

from __future__ import annotations

from typing import Any

import click

from cli.options import Settings, common_options, pass_settings
from cli.output import emit

__all__ = ["COMMANDS"]


@click.command("import")
@click.argument("ref", metavar="hf://ORG/NAME[@REVISION]")
@click.option("--name", help="What to call it here; default: ORG/NAME.")
@click.option("--version", help="Of an adapter: a semantic version; default: the next one.")
@click.option("--base", metavar="NAME|wf1:…", help="Of an adapter: the base it was trained on.")
@click.option("--max-bytes", type=click.IntRange(min=1), metavar="BYTES", help="The most to fetch; default: 64 GiB.")
@click.option("--allow-private", is_flag=True, help="The hub may be at a private address.")
@click.option("--queue", is_flag=True, help="Only queue it, for a worker to fetch; prints the job.")
@common_options
@pass_settings
def import_(
    settings: Settings,
    ref: str,
    name: str | None,
    version: str | None,
    base: str | None,
    max_bytes: int | None,
    allow_private: bool,
    queue: bool,
) -> None:
    """Fetch an adapter or a base from a hub and publish or register it.

    The hub is HF_ENDPOINT (default: huggingface.co), the token HF_TOKEN; with --url those of the service, which uses
    its token only if it was started with --imports token. Only safetensors, configs, card, licence and
    tokenizer are fetched, each file checked against the sha256 that the hub states. An import that broke off goes on
    where it ended.
    """
    from cli.views import base_block, job_block
    from registry.interface import DEFAULT_MAX_BYTES

    words: dict[str, Any] = {"name": name, "version": version, "base": base, "allow_private": allow_private}
    words["max_bytes"] = max_bytes or DEFAULT_MAX_BYTES
    if queue:
        job = settings.registry.submit_import(ref, **words)
        emit(settings, job, lambda: job_block(job), lambda: job.id)
        return
    with settings.progress() as progress:
        result = settings.registry.import_model(ref, **words, progress=progress)
    verb = "imported" if result.created else "here already"
    if result.base is not None:
        info = result.base
        emit(settings, result, lambda: f"{verb}: {info.name}\n\n{base_block(info)}", lambda: info.name, result.warnings)
    elif result.version is not None:
        found = result.version
        text = f"{found.name}@{found.version}"
        emit(settings, result, lambda: f"{verb}: {text}\n{found.digest}", lambda: text, result.warnings)


COMMANDS = {"import": import_}
