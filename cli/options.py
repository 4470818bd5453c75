"""What is common to the commands: global options, which registry they talk to, and names of choices.

The global options may stand before or after the command; the nearer to the command's end wins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.progress import ProgressLine
from composer.errors import UsageError

if TYPE_CHECKING:
    from registry.interface import Registry

__all__ = [
    "ALLOW",
    "COMPUTE",
    "DTYPES",
    "EXPORTS",
    "FLAVOURS",
    "JOB_STATES",
    "LEVELS",
    "LOG_FORMATS",
    "ONNX_QUANTISE",
    "PRECISIONS",
    "RELATIONS",
    "ROLES",
    "SCOPES",
    "Settings",
    "common_options",
    "pass_settings",
]

F = TypeVar("F", bound=Callable[..., Any])

# The values of the enums in composer.recipe and registry.schemas, so that --help need not import pydantic; a test
# compares them.
DTYPES = ("keep", "bf16", "fp16", "fp32")
EXPORTS = ("safetensors", "onnx", "bundle", "peft")
FLAVOURS = ("portable", "genai")
COMPUTE = ("fp32", "fp16", "bf16")
ONNX_QUANTISE = ("int8", "int4")
PRECISIONS = ("quantised", "original")
ALLOW = ("same-values", "lineage", "shape")
LEVELS = ("exact", "same-values", "lineage", "shape")
RELATIONS = ("finetune", "quantized", "merged", "resized")
JOB_STATES = ("queued", "running", "succeeded", "failed", "cancelled")
SCOPES = ("read", "publish", "compose", "admin")
ROLES = ("reader", "publisher", "owner")
LOG_FORMATS = ("text", "json")
FORMATS = ("human", "json", "quiet")


class Settings:
    """The global options of one run, and the registry that they name, opened when it is first asked for."""

    def __init__(self) -> None:
        self.format = "human"
        self.home: Path | None = None
        self.url: str | None = None
        self.database_url: str | None = None
        self._registry: Any = None

    @property
    def remote_url(self) -> str | None:
        """The service to talk to: --url, or REGISTRY_URL unless a place on this machine is given."""
        local = self.home is not None or self.database_url is not None
        if self.url and local:
            raise UsageError(
                "--url names a service, --home and --database-url a registry on this machine",
                expected="one or the other",
                found="both",
                remedy="leave one out",
            )
        return self.url or (None if local else os.environ.get("REGISTRY_URL") or None)

    @property
    def registry(self) -> Registry:
        """The registry: the service at --url, or the one on this machine."""
        if self._registry is None:
            if url := self.remote_url:
                from registry.client import RemoteRegistry

                self._registry = RemoteRegistry(url, token=os.environ.get("REGISTRY_TOKEN") or None)
            else:
                self._registry = self.open_local()
        opened: Registry = self._registry
        return opened

    def open_local(self) -> Any:
        """The registry on this machine."""
        from registry.services.local import open_registry

        return open_registry(self.home, self.database_url)

    @contextmanager
    def progress(self) -> Iterator[ProgressLine | None]:
        """Show how far something long is; nothing with --format quiet."""
        if self.format == "quiet":
            yield None
        else:
            with ProgressLine() as line:
                yield line

    def close(self) -> None:
        """Close the registry, if one was opened."""
        if self._registry is not None:
            self._registry.close()


pass_settings = click.make_pass_decorator(Settings)


def common_options(command: F) -> F:
    """Add the global options; each keeps what it is given in the run's Settings."""

    def keep(ctx: click.Context, option: click.Parameter, value: Any) -> None:
        if value is not None:
            setattr(ctx.ensure_object(Settings), str(option.name), value)

    options: dict[str, dict[str, Any]] = {
        "--database-url": {"metavar": "URL", "help": "Its database [REGISTRY_DATABASE_URL]."},
        "--url": {"metavar": "URL", "help": "Talk to the service there instead [REGISTRY_URL]."},
        "--home": {"type": click.Path(path_type=Path), "help": "Where the registry lies [REGISTRY_HOME]."},
        "--format": {"type": click.Choice(FORMATS), "help": "What to print on stdout."},
    }
    for name, settings in options.items():
        command = click.option(name, expose_value=False, callback=keep, **settings)(command)
    return command
