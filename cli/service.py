"""The service, and the state of the registry: serve, doctor."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from contextlib import suppress
from typing import Any

import click

from cli.options import Settings, common_options, pass_settings
from cli.output import emit
from composer.errors import ConflictError, PolicyError, TypedError, UsageError

__all__ = ["COMMANDS"]


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="A loopback address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 is any that is free.")
@click.option(
    "--jobs",
    type=click.IntRange(0, 64),
    default=1,
    show_default=True,
    help="Jobs at a time; 0 leaves them to 'registry worker'.",
)
@click.option("--max-queue", type=click.IntRange(min=1), default=1000, show_default=True, help="Jobs that may wait.")
@click.option(
    "--max-disk",
    type=click.IntRange(min=1),
    metavar="BYTES",
    help="What compositions may take; default: all but 512 MiB.",
)
@click.option("--max-upload", type=click.IntRange(min=1), metavar="BYTES", help="The largest upload to take.")
@common_options
@pass_settings
def serve(
    settings: Settings,
    host: str,
    port: int,
    jobs: int,
    max_queue: int,
    max_disk: int | None,
    max_upload: int | None,
) -> None:
    """Serve the registry over HTTP until interrupted; its URL is printed on stdout.

    Access is open, so only this machine may connect. The API is described at /api/v1/docs.
    """
    address = _loopback(host)
    if settings.url:
        raise UsageError(
            "serve runs on this machine", expected="no --url", found=settings.url, remedy="leave --url out"
        )
    listener = _listen(address, port)
    with listener:
        _run(settings, listener, max_upload, jobs, max_queue, max_disk)


def _loopback(host: str) -> str:
    """The address of `host`. Raises PolicyError for one that others can reach."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        address = None
    if address is None or not address.is_loopback:
        raise PolicyError(
            f"access is open, so it is not offered at {host}",
            expected="127.0.0.1, ::1 or localhost",
            found=host,
            remedy="leave --host out; put a proxy that knows your users in front, or use an SSH tunnel",
        )
    return str(address)


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConflictError(
            f"cannot listen at {address} port {port}: {error.strerror}",
            expected="a free port",
            found=error.strerror,
            remedy="choose another --port, or 0 for any that is free",
        ) from error
    return listener


def _run(
    settings: Settings,
    listener: socket.socket,
    max_upload: int | None,
    slots: int,
    max_queue: int,
    max_disk: int | None,
) -> None:
    import uvicorn

    from registry.api.app import MAX_UPLOAD_BYTES, create_app
    from registry.api.guard import LOOPBACK_HOSTS
    from registry.services.jobs import JobLimits, JobService

    local = settings.open_local()
    app = None
    try:
        jobs = JobService(local, limits=JobLimits(queued=max_queue, disk_bytes=max_disk), slots=slots)
        app = create_app(local, jobs, max_upload_bytes=max_upload or MAX_UPLOAD_BYTES, hosts=LOOPBACK_HOSTS)
        level = "warning" if settings.format == "quiet" else "info"
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=_log_config(), log_level=level, timeout_graceful_shutdown=5)
        )
        host, port = listener.getsockname()[:2]
        click.echo(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has shut down: that is how a service ends
            server.run(sockets=[listener])
        if not server.started:
            raise TypedError("the service did not start", remedy="look at the messages above, and at 'registry doctor'")
    finally:
        local.close()
        if app is not None and app.state.left_behind:
            sys.stderr.flush()
            os._exit(0)  # a thread inside torch would make Python's own way out abort


def _log_config() -> dict[str, Any]:
    """Uvicorn's and the registry's messages, on stderr."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {name: {"level": "INFO"} for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "registry")},
    }


@click.command()
@common_options
@pass_settings
def doctor(settings: Settings) -> None:
    """Check that everything is in place; exits with 1 when something is not."""
    from cli.views import checks_table

    checks = settings.registry.doctor()
    failed = [check for check in checks if not check.ok]
    emit(settings, checks, lambda: checks_table(checks), lambda: [check.name for check in failed])
    if failed:
        click.get_current_context().exit(1)


COMMANDS = {"serve": serve, "doctor": doctor}
