"""Jobs, and the process that runs them: jobs list|show|cancel|retry, worker."""

from __future__ import annotations

import logging.config
import os
import signal
from functools import partial

import click

from cli.listing import collect, limit_option
from cli.options import JOB_STATES, LOG_FORMATS, Settings, common_options, pass_settings
from cli.output import emit
from cli.service import end_now
from composer.errors import UsageError

__all__ = ["COMMANDS"]

STOP_S = 10.0  # how long a block may take before what runs it is left behind


@click.group()
def jobs() -> None:
    """Look at what runs in the background, cancel it, or run it again."""


@jobs.command("list")
@click.option("--state", type=click.Choice(JOB_STATES), help="Only those in this state.")
@limit_option
@common_options
@pass_settings
def list_jobs(settings: Settings, state: str | None, limit: int | None) -> None:
    """List jobs, newest first."""
    from cli.views import job_table
    from registry.schemas import JobState

    found = collect(partial(settings.registry.list_jobs, state=JobState(state) if state else None), limit)
    emit(settings, found, lambda: job_table(found), lambda: [job.id for job in found])


def _job_command(name: str, method: str, summary: str) -> click.Command:
    """`registry jobs NAME JOB`, which calls one method of the registry."""

    @jobs.command(name, help=summary)
    @click.argument("job")
    @common_options
    @pass_settings
    def command(settings: Settings, job: str) -> None:
        from cli.views import job_block

        info = getattr(settings.registry, method)(job)
        emit(settings, info, lambda: job_block(info), lambda: info.state.value)

    return command


_job_command("show", "get_job", "Show one job: its state, how far it is, and its result or error.")
_job_command("cancel", "cancel_job", "Cancel a job that waits or runs; a running one stops at its next block.")
_job_command("retry", "retry_job", "Queue a failed or cancelled job again.")


@jobs.command("publish")
@click.argument("job")
@click.argument("name")
@common_options
@pass_settings
def publish_job(settings: Settings, job: str, name: str) -> None:
    """Make what a compose made the base NAME; with --export peft the adapter NAME. Prints the job that does it."""
    from cli.views import job_block

    info = settings.registry.submit_publication(job, name)
    emit(settings, info, lambda: job_block(info), lambda: info.id)


@click.command()
@click.option("--slots", type=click.IntRange(1, 64), default=1, show_default=True, help="Jobs at a time.")
@click.option("--drain", is_flag=True, help="Stop when no job waits.")
@click.option(
    "--lease",
    type=click.FloatRange(0.5, 3600),
    metavar="SECONDS",
    default=30.0,
    show_default=True,
    help="How long a job may be silent before another worker takes it.",
)
@click.option(
    "--log-format",
    type=click.Choice(LOG_FORMATS),
    default="text",
    show_default=True,
    help="Of the lines on stderr; json is one object a line.",
)
@common_options
@pass_settings
def worker(settings: Settings, slots: int, drain: bool, lease: float, log_format: str) -> None:
    """Run jobs of the registry on this machine until interrupted.

    Any number of workers may run, on any machine that reaches the database and REGISTRY_HOME. SIGTERM and Ctrl-C give
    back what runs; a worker that is killed loses its job to another one when the lease ends.
    """
    if settings.url:
        raise UsageError("a worker runs where the registry lies", expected="no --url", found=settings.url)
    from registry.logs import log_config
    from registry.services.worker import Worker

    logging.config.dictConfig(log_config(log_format, "warning" if settings.format == "quiet" else "info"))

    local = settings.open_local()
    try:
        running = Worker(local, slots=slots, lease_s=lease)
        # A pipe and no event: a handler runs between two steps of the waiting thread, which may hold the event's lock.
        told, tell = os.pipe()
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: running.stopping.set() if drain else os.write(tell, b"."))
        click.echo(running.name, err=settings.format == "quiet")
        if drain:
            running.drain()
            return
        running.start()
        os.read(told, 1)
        left_behind = not running.stop(STOP_S)
    finally:
        local.close()
    if left_behind:
        end_now()


COMMANDS = {"jobs": jobs, "worker": worker}
