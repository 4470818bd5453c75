"""The command `registry`: global options, commands loaded when they are needed, failures turned into exit codes.

0 done   2 usage   3 not found   4 incompatible   5 integrity   6 policy   7 conflict   1 internal   130 interrupted
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

import click

from cli.options import Settings, common_options
from cli.output import clean
from composer.errors import TypedError
from registry import __version__

__all__ = ["cli", "main"]

EXIT_CODES = {
    "usage": 2,
    "not-found": 3,
    "incompatible": 4,
    "integrity": 5,
    "policy": 6,
    "conflict": 7,
    "internal": 1,
}
INTERRUPTED = 130
COMMANDS = {
    "base": "base",
    "publish": "adapters",
    "import": "importing",
    "list": "adapters",
    "show": "adapters",
    "versions": "adapters",
    "search": "adapters",
    "alias": "adapters",
    "pull": "adapters",
    "visibility": "adapters",
    "yank": "lifecycle",
    "deprecate": "lifecycle",
    "quarantine": "lifecycle",
    "delete": "lifecycle",
    "gc": "lifecycle",
    "compatible": "compatibility",
    "bases": "compatibility",
    "check": "compatibility",
    "plan": "compose",
    "compose": "compose",
    "append": "compose",
    "undo": "compose",
    "extract": "convert",
    "resize": "convert",
    "delta": "delta",
    "inspect": "compose",
    "run": "run",
    "sign": "provenance",
    "verify": "integrity",
    "jobs": "jobs",
    "worker": "jobs",
    "bench": "bench",
    "serve": "service",
    "token": "access",
    "namespace": "access",
    "audit": "access",
    "doctor": "service",
}


class RegistryGroup(click.Group):
    """Loads one module a command, and ends every failure with one message and one exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the file that holds it."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"cli.{COMMANDS[cmd_name]}")
        command: click.Command = module.COMMANDS[cmd_name]
        return command

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Run and exit."""
        settings = Settings()
        words = list(sys.argv[1:] if args is None else args)
        settings.format = _asked_format(words)
        extra.pop("standalone_mode", None)
        try:
            code = super().main(words, prog_name or "registry", standalone_mode=False, obj=settings, **extra)
            sys.stdout.flush()
        except TypedError as error:
            code = _fail(settings, error.as_dict())
        except click.UsageError as error:
            code = _fail_usage(settings, error)
        except click.ClickException as error:
            code = _fail(settings, {"code": "usage", "category": "usage", "message": error.format_message()})
        except (click.Abort, KeyboardInterrupt):
            code = _fail(settings, {"code": "interrupted", "category": "interrupted", "message": "interrupted"})
        except BrokenPipeError:
            code = _close_pipes()
        except Exception as error:  # noqa: BLE001
            code = _fail_unexpected(settings, error)
        finally:
            settings.close()
        sys.exit(code if isinstance(code, int) else 0)


def _asked_format(words: list[str]) -> str:
    """The format that a command line asks for, so that even one that does not parse is answered in it."""
    json_pair = any(pair == ("--format", "json") for pair in pairwise(words))
    return "json" if json_pair or "--format=json" in words else "human"


def _fail(settings: Settings, error: dict[str, Any]) -> int:
    """Print a failure on stderr and give its exit code."""
    if settings.format == "json":
        click.echo(json.dumps({"error": error}, ensure_ascii=False), err=True)
    else:
        click.echo(f"error: {clean(error['message'])}", err=True)
        for name in ("expected", "found", "remedy"):
            if name in error:
                click.echo(f"{name + ':':<9} {_phrase(error[name])}", err=True)
    return INTERRUPTED if error["category"] == "interrupted" else EXIT_CODES.get(error["category"], 1)


def _phrase(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(clean(str(item)) for item in value)
    if isinstance(value, dict):
        return ", ".join(clean(f"{name}={item}") for name, item in value.items())
    return clean(str(value))


def _fail_usage(settings: Settings, error: click.UsageError) -> int:
    command = error.ctx.command_path if error.ctx else "registry"
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return EXIT_CODES["usage"]
    remedy = f"see '{command} --help'"
    return _fail(settings, {"code": "usage", "category": "usage", "message": error.format_message(), "remedy": remedy})


def _fail_unexpected(settings: Settings, error: Exception) -> int:
    if os.environ.get("REGISTRY_DEBUG"):
        import traceback

        traceback.print_exception(error)
    message = f"unexpected {type(error).__name__}: {error}".replace("\n", " ")
    remedy = "set REGISTRY_DEBUG=1 to see where, and report it"
    return _fail(settings, {"code": "internal-error", "category": "internal", "message": message, "remedy": remedy})


def _close_pipes() -> int:
    """The reader of stdout went away: nothing more can be said there, and Python must not try at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


@click.group(cls=RegistryGroup, name="registry", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="registry", message="%(prog)s %(version)s")
@common_options
def cli() -> None:
    """Adapters tied to their base models by hash, and models composed from them.

    \b
    registry base add ./smollm2
    registry publish ./shout --name team/shout
    registry compose smollm2+team/shout --export onnx

    A folder is as good as a name wherever a base or an adapter is expected: write it with ./ in front.

    \b
    Exit codes: 0 done, 2 usage, 3 not found, 4 incompatible, 5 integrity,
    6 policy, 7 conflict, 1 internal, 130 interrupted.
    """


def main() -> NoReturn:
    """The entry point of `registry`."""
    cli()
    raise SystemExit


if __name__ == "__main__":
    main()
