"""The command in process, as a program, and a service to talk to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., Result]
Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Invoke the command in this process, in an empty folder."""
    from cli.main import cli

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def invoke(*words: Any, code: int = 0) -> Result:
        result = CliRunner().invoke(cli, [str(word) for word in words])
        assert result.exit_code == code, f"{words}: {result.exit_code}\n{result.stdout}\n{result.stderr}"
        return result

    return invoke


@pytest.fixture
def two(run: Any, tiny_llama: Path, tiny_lora: Path, other_lora: Path) -> Any:
    """A registry with a base and two adapters on it; gives `run`."""
    run("base", "add", tiny_llama, "--name", "tiny")
    run("publish", tiny_lora, "--name", "team/shout", "--base", "tiny")
    run("publish", other_lora, "--name", "team/json", "--base", "tiny")
    return run


def environment() -> dict[str, str]:
    """This process's environment, with the source tree importable."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def program(home: Path, tmp_path: Path) -> Program:
    """Run the command as a process of its own: real exit codes, stdout and stderr apart."""

    def start(*words: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cli", *map(str, words)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment(),
            cwd=tmp_path,
            timeout=120,
            check=False,
            **options,
        )

    return start


@pytest.fixture
def service(registry: Any) -> Iterator[str]:
    """The URL of a service over an empty registry, on a free port."""
    import uvicorn

    from registry.api.app import create_app
    from registry.services.jobs import JobService

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(registry, JobService(registry)), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()
