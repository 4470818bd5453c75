"""A registry that is served by a process of its own, and the Hub's own clients as programs beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from registry.services.local import open_registry

ROOT = Path(__file__).resolve().parents[3]
CLIENTS = Path(__file__).parent / "clients"


@dataclass(frozen=True)
class Hub:
    """A service: its URL, its REGISTRY_HOME, its process, and a folder for its clients' caches."""

    url: str
    home: Path
    process: subprocess.Popen[str]
    scratch: Path

    def environment(self, cache: str = "cache", **more: str) -> dict[str, str]:
        """What a user sets: HF_ENDPOINT, and a cache of one's own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        quiet = {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }
        return {**kept, **quiet, "HF_ENDPOINT": self.url, "HF_HOME": str(self.scratch / cache), **more}

    def client(self, script: str, *words: Any, check: bool = True, **more: str) -> Any:
        """Run a script of clients/; it prints JSON on its last line."""
        command = [sys.executable, str(CLIENTS / f"{script}.py"), *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment(**more), timeout=300, check=False
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def hf(self, *words: Any, **more: str) -> subprocess.CompletedProcess[str]:
        """Run the command line `hf`."""
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment(**more), timeout=300, check=False
        )

    def peak_bytes(self) -> int:
        """The most memory that the service had resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10


def serve(home: Path, scratch: Path, *options: str) -> Iterator[Hub]:
    """Start `registry serve` over `home`; stopped at the end."""
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "cli", "serve", "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "REGISTRY_HOME": str(home)}
    with (
        (scratch / "service.log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        try:
            assert process.stdout is not None
            yield Hub(process.stdout.readline().strip(), home, process, scratch)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_lora: Path) -> Iterator[Hub]:
    """A service with the base `tiny` and the adapter team/shout in three versions, shared by the tests of a module."""
    folder = tmp_path_factory.mktemp("hub")
    registry = open_registry(folder / "home")
    registry.add_base(tiny_llama, name="tiny")
    for version in ("1.0.0", "1.1.0", "2.0.0-rc.1"):
        registry.publish(tiny_lora, name="team/shout", version=version, base="tiny", tags=(version,), license="MIT")
    registry.set_alias("team/shout@1.0.0", "prod")
    registry.close()
    yield from serve(folder / "home", folder / "clients")
