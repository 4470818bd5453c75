"""The service, and the state of the registry: serve, doctor."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any, NoReturn

import click

from cli.options import LOG_FORMATS, Settings, common_options, pass_settings
from cli.output import emit
from composer.errors import ConflictError, PolicyError, TypedError, UsageError

__all__ = ["COMMANDS", "end_now"]

RATE = 6000  # requests a minute of one token


@click.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="An address to listen at; beyond loopback, tokens are needed.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 is any that is free.")
@click.option("--require-tokens", is_flag=True, help="Ask for tokens on loopback too.")
@click.option(
    "--rate",
    type=click.IntRange(min=1),
    metavar="N",
    help="Requests a minute of a caller; with tokens 6000.",
)
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
@click.option(
    "--imports",
    type=click.Choice(("off", "anonymous", "token")),
    default="anonymous",
    show_default=True,
    help="What publishers may have fetched from the hub: nothing, what is public, or what HF_TOKEN may read.",
)
@click.option("--imports-from-private", is_flag=True, help="The hub may be at a private address.")
@click.option(
    "--log-format",
    type=click.Choice(LOG_FORMATS),
    default="text",
    show_default=True,
    help="Of the lines on stderr; json is one object a line.",
)
@common_options
@pass_settings
def serve(
    settings: Settings,
    host: str,
    port: int,
    require_tokens: bool,
    rate: int | None,
    jobs: int,
    max_queue: int,
    max_disk: int | None,
    max_upload: int | None,
    imports: str,
    imports_from_private: bool,
    log_format: str,
) -> None:
    """Serve the registry over HTTP until interrupted; its URL is printed on stdout.

    On a loopback address access is open, unless --require-tokens is given. Beyond it every request needs a token of
    'registry token create', and the service does not start before there is one. Put a proxy that speaks TLS in front.
    The API is described at /api/v1/docs; /api/v1/ready says whether it can serve, /metrics what Prometheus scrapes.
    """
    if settings.url:
        raise UsageError(
            "serve runs on this machine", expected="no --url", found=settings.url, remedy="leave --url out"
        )
    address, loopback = _address(host)
    local = settings.open_local()
    app = None
    try:
        from registry.services.importing import ImportRules
        from registry.services.jobs import JobLimits, JobService

        rules = ImportRules(allowed=imports != "off", token=imports == "token", private=imports_from_private)
        limits = JobLimits(queued=max_queue, disk_bytes=max_disk)
        queue = JobService(local, limits=limits, slots=jobs, imports=rules)
        app = _application(local, queue, tokens=require_tokens or not loopback, rate=rate, max_upload=max_upload)
        with _listen(address, port) as listener:
            _run(app, listener, log_format, quiet=settings.format == "quiet")
    finally:
        local.close()
        if app is not None and app.state.left_behind:
            end_now()


def end_now() -> NoReturn:
    """End the process where a thread was left behind: one inside torch would make Python's own way out abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _application(local: Any, queue: Any, *, tokens: bool, rate: int | None, max_upload: int | None) -> Any:
    """The service, closed to all but holders of tokens or open. Raises PolicyError when nobody could enter."""
    from registry.api.app import MAX_UPLOAD_BYTES, create_app
    from registry.api.guard import LOOPBACK_HOSTS

    if tokens and not local.tokens.any_valid():
        raise PolicyError(
            "access needs tokens, and there is none",
            expected="a valid token, or a loopback address",
            found="none",
            remedy="make one first: registry token create NAME --subject YOU --scope admin",
        )
    return create_app(
        local,
        queue,
        max_upload_bytes=max_upload or MAX_UPLOAD_BYTES,
        hosts=None if tokens else LOOPBACK_HOSTS,
        authenticators=(local.authenticator(),) if tokens else None,
        requests_per_minute=rate or (RATE if tokens else None),
    )


def _address(host: str) -> tuple[str, bool]:
    """The address of `host`, and whether it is of this machine only. Raises UsageError for a name."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise UsageError(
            f"{host!r} is not an address",
            expected="127.0.0.1, ::1, localhost, or an address of this machine such as 0.0.0.0",
            found=host,
            remedy="give an address",
        ) from None
    return str(address), address.is_loopback


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


def _run(app: Any, listener: socket.socket, log_format: str, *, quiet: bool) -> None:
    """Serve until SIGINT or SIGTERM: what is being answered is finished, what is followed ends, jobs are given back."""
    import uvicorn

    from registry.logs import log_config

    class Server(uvicorn.Server):
        """Says at once that it is closing, so that long answers end and balancers turn away."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            app.state.closing.set()
            super().handle_exit(sig, frame)

    level = "warning" if quiet else "info"
    config = uvicorn.Config(
        app, log_config=log_config(log_format, level), log_level=level, access_log=False, timeout_graceful_shutdown=5
    )
    server = Server(config)
    host, port = listener.getsockname()[:2]
    click.echo(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    # uvicorn raises both signals again after it has shut down; as an exception they leave our own way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if not server.started:
        raise TypedError("the service did not start", remedy="look at the messages above, and at 'registry doctor'")


@click.command()
@click.option("--repair", is_flag=True, help="Hash everything that is stored, and restore what is damaged.")
@common_options
@pass_settings
def doctor(settings: Settings, repair: bool) -> None:
    """Check that everything is in place; exits with 1 when something is not.

    --repair restores a damaged file from another copy of its bytes, the xorbs that it came by, or its recipe; what is
    made anew anyway is dropped. It exits with 5 where something stays damaged, and says what to do.
    """
    from cli.integrity import show_store_check
    from cli.views import checks_table

    if repair:
        show_store_check(settings, repair=True)
        return
    checks = settings.registry.doctor()
    failed = [check for check in checks if not check.ok]
    emit(settings, checks, lambda: checks_table(checks), lambda: [check.name for check in failed])
    if failed:
        click.get_current_context().exit(1)


COMMANDS = {"serve": serve, "doctor": doctor}
