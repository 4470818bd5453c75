"""Adapters: publish, list, show, versions, search, alias, pull."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from cli.listing import collect, limit_option
from cli.options import Settings, common_options, pass_settings
from cli.output import emit, size

__all__ = ["COMMANDS"]


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="NAMESPACE/NAME, such as team/shout.")
@click.option("--version", help="A semantic version; default: the next one.")
@click.option("--base", metavar="NAME|wf1:…|PATH", help="The base it was trained on.")
@click.option("--license", help="An SPDX expression, such as Apache-2.0.")
@click.option("--tag", "tags", multiple=True, help="A word to search for; may be repeated.")
@click.option("--description", help="One paragraph.")
@click.option("--private/--public", default=None, help="Whether only the namespace's members see a new adapter.")
@click.option("--sign", "key", metavar="KEY", type=click.Path(path_type=Path), help="Sign it with this EC private key.")
@click.option("--allow-nonfinite", is_flag=True, help="Keep weights that hold NaN or infinity; compose refuses them.")
@common_options
@pass_settings
def publish(
    settings: Settings,
    folder: Path,
    name: str,
    version: str | None,
    base: str | None,
    license: str | None,
    tags: tuple[str, ...],
    description: str | None,
    private: bool | None,
    key: Path | None,
    allow_nonfinite: bool,
) -> None:
    """Publish the adapter in DIR as a new version.

    A version never changes: the same bytes again are no news, other bytes under the same version are a conflict. A
    model.sig in DIR goes along as its signature.
    """
    from cli.views import template_lines
    from registry.verification import signed_publish

    with settings.progress() as progress:
        result = signed_publish(
            settings.registry,
            folder,
            key,
            name=name,
            version=version,
            base=base,
            license=license,
            tags=tags,
            description=description,
            private=private,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    info = result.version
    ref = f"{info.name}@{info.version}"
    text = f"published {ref}" if result.created else f"{ref} holds these very bytes already"
    kind = f"{info.kind}, {info.parameters:,} parameters"
    emit(
        settings,
        result,
        lambda: f"{text}\n{info.digest}\n{kind}{template_lines(result.chat_template_diff)}",
        lambda: ref,
        result.warnings,
    )


@click.command("list")
@click.option("--namespace", help="Only in this namespace.")
@click.option("--kind", help="Only of this kind, such as lora.")
@click.option("--base", metavar="NAME", help="Only those trained on this base.")
@limit_option
@common_options
@pass_settings
def list_adapters(
    settings: Settings, namespace: str | None, kind: str | None, base: str | None, limit: int | None
) -> None:
    """List the latest version of each adapter."""
    from cli.views import version_table

    lister = partial(settings.registry.list_adapters, namespace=namespace, kind=kind, base=base)
    found = collect(lister, limit)
    empty = "no adapters: publish one with 'registry publish DIR --name NAMESPACE/NAME'"
    emit(settings, found, lambda: version_table(found, empty), lambda: [f"{v.name}@{v.version}" for v in found])


@click.command()
@click.argument("words", metavar="[TEXT]...", nargs=-1)
@click.option("--namespace", help="Only in this namespace.")
@click.option("--kind", help="Only of this kind, such as lora.")
@click.option("--rank", type=click.IntRange(min=1), help="Only of this rank.")
@click.option("--task", help="Only for this task, such as CAUSAL_LM.")
@click.option("--license", help="Only under this licence.")
@click.option("--base", metavar="NAME", help="Only those trained on this base.")
@click.option("--tag", help="Only with this tag.")
@limit_option
@common_options
@pass_settings
def search(settings: Settings, words: tuple[str, ...], limit: int | None, **wanted: Any) -> None:
    """Find adapters, newest first, by beginnings of words in name, description, tags, base or target modules.

    All words must be there.
    """
    from cli.views import version_table

    text = " ".join(words)
    found = collect(partial(settings.registry.search, text, **wanted), limit)
    emit(
        settings,
        found,
        lambda: version_table(found, f"nothing holds all of: {text}" if text else "nothing is like that"),
        lambda: [f"{item.name}@{item.version}" for item in found],
    )


@click.command()
@click.argument("ref")
@common_options
@pass_settings
def show(settings: Settings, ref: str) -> None:
    """Show one version: NAME, NAME@1.0.0, NAME@ALIAS or NAME@sha256:…"""
    from cli.views import version_block

    info = settings.registry.get_version(ref)
    emit(settings, info, lambda: version_block(info), lambda: info.digest)


@click.command()
@click.argument("name")
@limit_option
@common_options
@pass_settings
def versions(settings: Settings, name: str, limit: int | None) -> None:
    """List all versions of the adapter NAME, the highest first."""
    from cli.views import version_table

    found = collect(partial(settings.registry.list_versions, name), limit)
    emit(settings, found, lambda: version_table(found, "no versions"), lambda: [f"{v.name}@{v.version}" for v in found])


@click.command()
@click.argument("ref")
@click.argument("alias")
@click.option("--delete", is_flag=True, help="Remove the alias; the version stays.")
@common_options
@pass_settings
def alias(settings: Settings, ref: str, alias: str, delete: bool) -> None:
    """Point ALIAS at the version REF, or move it there."""
    if delete:
        settings.registry.delete_alias(ref, alias)
        value = {"name": ref, "alias": alias, "deleted": True}
        emit(settings, value, lambda: f"removed {ref}@{alias}", lambda: f"{ref}@{alias}")
        return
    info = settings.registry.set_alias(ref, alias)
    emit(
        settings,
        info,
        lambda: f"{info.name}@{alias} is {info.version} ({info.digest})",
        lambda: f"{info.name}@{info.version}",
    )


@click.command()
@click.argument("ref")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="A new folder; default: ./ and the adapter's name.")
@common_options
@pass_settings
def pull(settings: Settings, ref: str, out: Path | None) -> None:
    """Write the files of the version REF into a new folder, each checked against its digest."""
    from composer.recipe import split_reference

    folder = out or Path(split_reference(ref)[0].rsplit("/", maxsplit=1)[-1])
    with settings.progress() as progress:
        info = settings.registry.pull(ref, folder, progress=progress)
    value = {"out": str(folder), "version": info.model_dump(mode="json")}
    files = "\n".join(f"  {file.name}  {size(file.size)}" for file in info.files)
    emit(settings, value, lambda: f"pulled {info.name}@{info.version} to {folder}\n{files}", lambda: str(folder))


@click.command()
@click.argument("name")
@click.option("--private/--public", required=True, help="Only members of the namespace see it, or everybody.")
@common_options
@pass_settings
def visibility(settings: Settings, name: str, private: bool) -> None:
    """Hide the adapter NAME from all but the members of its namespace, or show it."""
    info = settings.registry.set_private(name, private)
    text = "private" if info.private else "public"
    emit(settings, info, lambda: f"{info.name} is {text}", lambda: text)


COMMANDS = {
    "publish": publish,
    "list": list_adapters,
    "search": search,
    "show": show,
    "versions": versions,
    "alias": alias,
    "pull": pull,
    "visibility": visibility,
}
