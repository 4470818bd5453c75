"""Who may do what: token create|list|revoke, namespace list|grant|revoke, audit."""

from __future__ import annotations

from functools import partial

import click

from cli.listing import collect, limit_option
from cli.options import ROLES, SCOPES, Settings, common_options, pass_settings
from cli.output import emit

__all__ = ["COMMANDS"]


@click.group()
def token() -> None:
    """Make, list and revoke the API tokens of a service."""


@token.command("create")
@click.argument("name")
@click.option("--subject", required=True, help="Whom it stands for, such as alice or repo:acme/train.")
@click.option("--scope", "scopes", multiple=True, required=True, type=click.Choice(SCOPES), help="May be repeated.")
@click.option("--namespace", "namespaces", multiple=True, help="The only one it is good for; may be repeated.")
@click.option("--days", type=click.IntRange(1, 3650), default=90, show_default=True, help="How long it is valid.")
@common_options
@pass_settings
def create_token(
    settings: Settings, name: str, subject: str, scopes: tuple[str, ...], namespaces: tuple[str, ...], days: int
) -> None:
    """Make a token called NAME. It is printed once, on stdout, and kept nowhere: only its hash is stored.

    Give it to clients as REGISTRY_TOKEN, and to those of the Hugging Face Hub as HF_TOKEN.
    """
    from registry.access import Scope

    made = settings.registry.create_token(
        name, subject=subject, scopes=tuple(map(Scope, scopes)), namespaces=namespaces or None, days=days
    )
    emit(settings, made, lambda: made.token, lambda: made.token)


@token.command("list")
@limit_option
@common_options
@pass_settings
def list_tokens(settings: Settings, limit: int | None) -> None:
    """List all tokens, those that are expired or revoked too."""
    from cli.views import token_table

    found = collect(settings.registry.list_tokens, limit)
    emit(settings, found, lambda: token_table(found), lambda: [item.id for item in found])


@token.command("revoke")
@click.argument("token_id", metavar="ID")
@common_options
@pass_settings
def revoke_token(settings: Settings, token_id: str) -> None:
    """End the token ID (the part between the underscores), for good."""
    info = settings.registry.revoke_token(token_id)
    emit(settings, info, lambda: f"revoked {info.id} ({info.name})", lambda: info.id)


@click.group()
def namespace() -> None:
    """Say who may see, publish and decide in a namespace."""


@namespace.command("list")
@limit_option
@common_options
@pass_settings
def list_namespaces(settings: Settings, limit: int | None) -> None:
    """List the namespaces that have members, and these."""
    from cli.views import namespace_table

    found = collect(settings.registry.list_namespaces, limit)
    emit(settings, found, lambda: namespace_table(found), lambda: [item.name for item in found])


@namespace.command()
@click.argument("name")
@click.argument("subject")
@click.argument("role", type=click.Choice(ROLES))
@common_options
@pass_settings
def grant(settings: Settings, name: str, subject: str, role: str) -> None:
    """Make SUBJECT a member of the namespace NAME, or change its role."""
    from cli.views import namespace_table
    from registry.access import Role

    info = settings.registry.grant(name, subject, Role(role))
    emit(settings, info, lambda: namespace_table([info]), lambda: info.name)


@namespace.command()
@click.argument("name")
@click.argument("subject")
@common_options
@pass_settings
def revoke(settings: Settings, name: str, subject: str) -> None:
    """Take SUBJECT out of the namespace NAME."""
    from cli.views import namespace_table

    info = settings.registry.revoke(name, subject)
    emit(settings, info, lambda: namespace_table([info]), lambda: info.name)


@click.command()
@click.option("--subject", help="Only what this subject did.")
@click.option("--target", help="Only what concerns this, such as team/shout@1.0.0.")
@limit_option
@common_options
@pass_settings
def audit(settings: Settings, subject: str | None, target: str | None, limit: int | None) -> None:
    """Show who changed what, newest first."""
    from cli.views import audit_table

    found = collect(partial(settings.registry.audit, subject=subject, target=target), limit)
    emit(settings, found, lambda: audit_table(found), lambda: [f"{item.action} {item.target}" for item in found])


COMMANDS = {"token": token, "namespace": namespace, "audit": audit}
