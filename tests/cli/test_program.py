"""The command as a program: exit codes, stdout apart from stderr, no tracebacks, a fast start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from composer import errors

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """This process's environment, with the source tree importable."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """`registry --help` starts without torch, transformers, sqlalchemy, fastapi, pydantic or httpx."""
    code = (
        "import sys\nfrom cli.main import cli\n"
        "try:\n    cli(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'sqlalchemy', 'fastapi', 'pydantic', 'httpx', 'numpy', 'onnx'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert "compose" in done.stdout


def test_version_names_the_program(program: Any) -> None:
    """`registry --version` is one line on stdout."""
    done = program("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("registry ")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["list", "--nonsense"], 2),
        (["frobnicate"], 2),
        (["plan", "+"], 2),
        (["show", "team/nobody"], 3),
        (["base", "add", "./missing"], 3),
        (["serve", "--host", "0.0.0.0"], 6),
        (["list", "--url", "http://127.0.0.1:9"], 1),
        (["list", "--url", "http://127.0.0.1:9", "--home", "x"], 2),
    ],
)
def test_failures_have_their_exit_code_and_leave_stdout_empty(program: Any, words: list[str], code: int) -> None:
    """People read `error: …` on stderr; programs read the same as JSON there."""
    done = program(*words)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    done = program(*words, "--format", "json")
    assert (done.returncode, done.stdout) == (code, "")
    error = json.loads(done.stderr)["error"]
    assert error["message"]
    assert error["category"]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.UsageError, 2),
        (errors.NotFoundError, 3),
        (errors.WeakCompatibilityError, 4),
        (errors.NonFiniteError, 5),
        (errors.UnsafeFormatError, 6),
        (errors.ConflictError, 7),
        (errors.StorageError, 1),
    ],
)
def test_each_category_has_one_exit_code(
    monkeypatch: pytest.MonkeyPatch, kind: type[errors.TypedError], code: int
) -> None:
    """What a registry raises becomes message, expected, found, remedy and the category's code."""
    result = _run_raising(monkeypatch, kind("it broke", expected=[1, 2], found="three", remedy="mend it"))
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == "error: it broke\nexpected: 1, 2\nfound:    three\nremedy:   mend it\n"


def test_the_unforeseen_is_one_line_unless_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback by default; REGISTRY_DEBUG=1 shows it."""
    result = _run_raising(monkeypatch, RuntimeError("two\nlines"))
    assert result.exit_code == 1
    assert "unexpected RuntimeError: two lines" in result.stderr
    assert "REGISTRY_DEBUG=1" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is told on stderr."""
    result = _run_raising(monkeypatch, KeyboardInterrupt())
    assert (result.exit_code, result.stdout) == (130, "")
    assert "interrupted" in result.stderr


def test_messages_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control characters of a stranger's name are replaced."""
    result = _run_raising(monkeypatch, errors.NotFoundError("no \x1b[31mred\x07"))
    assert "\x1b" not in result.stderr
    assert "\x07" not in result.stderr


def _run_raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    from cli.main import cli
    from cli.options import Settings

    def refuse(_: Settings) -> Any:
        raise error

    monkeypatch.setattr(Settings, "open_local", refuse)
    monkeypatch.delenv("REGISTRY_URL", raising=False)
    monkeypatch.delenv("REGISTRY_DEBUG", raising=False)
    return CliRunner().invoke(cli, ["doctor"])


def test_a_closed_pipe_is_silent(program: Any, home: Path, tmp_path: Path) -> None:
    """`registry … | head` leaves no traceback when head is gone first."""
    command = [sys.executable, "-m", "cli", "doctor", "--home", str(home)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path, check=False
    )
    os.close(writer)
    assert done.stderr == ""


def test_serve_prints_its_url_and_stops_when_asked(home: Path, tmp_path: Path) -> None:
    """A free port is chosen with 0; SIGINT ends the service within seconds."""
    import httpx

    command = [sys.executable, "-m", "cli", "serve", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        deadline = time.monotonic() + 30
        while True:
            try:
                answer = httpx.get(f"{url}/healthz", trust_env=False)
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert answer.json()["status"] == "ok"
        foreign = httpx.get(f"{url}/healthz", headers={"Host": "evil.example"}, trust_env=False)
        assert foreign.status_code == 403
        taken = subprocess.run(
            [*command[:-1], url.rsplit(":", maxsplit=1)[-1]], capture_output=True, env=environment(), check=False
        )
        assert taken.returncode == 7
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=20)
    assert process.returncode in (0, 130)
    assert "Traceback" not in messages
