"""The life of a version, and what nothing names any more: yank, deprecate, quarantine, delete, gc."""

from __future__ import annotations

import click

from cli.options import Settings, common_options, pass_settings
from cli.output import emit
from composer.errors import UsageError

__all__ = ["COMMANDS"]

reason_option = click.option("--reason", help="Why; people who are refused or warned read it.")


def _reason(reason: str | None, undo: bool, flag: str) -> str | None:
    """The reason, or None to take the change back; one of the two must be given."""
    if (reason is None) != undo:
        raise UsageError(f"give either --reason or {flag}", expected="one of the two", found="both or none")
    return reason


@click.command()
@click.argument("ref")
@reason_option
@click.option("--undo", is_flag=True, help="Publish it again.")
@common_options
@pass_settings
def yank(settings: Settings, ref: str, reason: str | None, undo: bool) -> None:
    """Withdraw the version REF: it is refused by name, and is the latest no more; its digest goes on working."""
    info = settings.registry.yank(ref, _reason(reason, undo, "--undo"))
    text = f"{info.name}@{info.version} is {info.state}"
    emit(settings, info, lambda: text, lambda: info.state.value)


@click.command()
@click.argument("ref")
@reason_option
@click.option("--successor", metavar="REF", help="What to use in its place.")
@click.option("--undo", is_flag=True, help="Warn no longer.")
@common_options
@pass_settings
def deprecate(settings: Settings, ref: str, reason: str | None, successor: str | None, undo: bool) -> None:
    """Warn everybody who composes with the version REF, and name its successor."""
    info = settings.registry.deprecate(ref, _reason(reason, undo, "--undo"), successor=successor)
    text = f"{info.name}@{info.version} is {'deprecated' if info.deprecated else 'not deprecated'}"
    emit(settings, info, lambda: text, lambda: info.digest)


@click.command()
@click.argument("ref")
@reason_option
@click.option("--lift", is_flag=True, help="Publish the bytes again.")
@common_options
@pass_settings
def quarantine(settings: Settings, ref: str, reason: str | None, lift: bool) -> None:
    """Block the bytes of the version REF, whatever names them: no pull, no compose, no download of what holds them."""
    from cli.views import version_table

    found = settings.registry.quarantine(ref, _reason(reason, lift, "--lift"))
    emit(settings, found, lambda: version_table(found, ""), lambda: [f"{item.name}@{item.version}" for item in found])


@click.command()
@click.argument("ref")
@common_options
@pass_settings
def delete(settings: Settings, ref: str) -> None:
    """Remove the version REF; refused (7) while aliases, successors or recorded compositions name it.

    Its name is never given again. 'registry gc' removes its files.
    """
    settings.registry.delete_version(ref)
    emit(settings, {"ref": ref, "deleted": True}, lambda: f"deleted {ref}", lambda: ref)


@click.command()
@click.option("--grace", type=click.FloatRange(min=0), default=7, show_default=True, metavar="DAYS",
              help="Leave alone what was touched within.")  # fmt: skip
@click.option("--keep-jobs", type=click.FloatRange(min=0), default=30, show_default=True, metavar="DAYS",
              help="Keep jobs that ended within, and their outputs.")  # fmt: skip
@click.option("--keep-records", type=click.FloatRange(min=0), metavar="DAYS",
              help="Let older records of compositions go; default: none.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@common_options
@pass_settings
def gc(settings: Settings, grace: float, keep_jobs: float, keep_records: float | None, dry_run: bool) -> None:
    """Remove what nothing names any more: stored files, uploads, outputs of jobs that ended long ago."""
    from cli.views import collected_block

    found = settings.registry.collect(
        grace_days=grace, keep_jobs_days=keep_jobs, keep_records_days=keep_records, dry_run=dry_run
    )
    emit(settings, found, lambda: collected_block(found), lambda: str(found.nbytes))


COMMANDS = {"yank": yank, "deprecate": deprecate, "quarantine": quarantine, "delete": delete, "gc": gc}
