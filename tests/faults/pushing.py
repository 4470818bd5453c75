"""kill -9 of `registry serve` while huggingface_hub pushes to it."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np

from tests.faults.shelf import MODULES, Shelf, files_of
from tests.faults.victims import Blow, Ended, Victim, command
from tests.support import write_lora

__all__ = ["PushSite"]

SERVER_S = 60
RANK, SIZE = 128, 3072  # 12 MiB: more than a commit takes, so the weights go ahead of it


class PushSite:
    """Every round starts a service, lets a client push a new adapter, and kills the service. Xet and LFS by turns."""

    name = "push"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shelf = Shelf(folder / "home")
        self._source = folder / "source"
        self._acknowledged: list[str] = []
        self._repository, self._round = "", 0

    def strike(self, index: int, blow: Blow) -> Ended:
        """Push to a service that is killed; what the client got for an answer is acknowledged."""
        shutil.rmtree(self._source, ignore_errors=True)
        write_lora(self._source, {MODULES[0]: (SIZE, SIZE)}, rank=RANK, seed=index + 500)
        (self._source / "adapter_config.json").write_text(_config(self._source))
        self._repository, self._round = f"lab/push{index + 2}", index
        self._shelf.wanted[f"{self._repository}@0.1.0"] = files_of(self._source)
        server, url = self._serve(blow.call)
        client = self._client(url)
        begun = time.monotonic()
        while blow.seconds is not None and time.monotonic() - begun < blow.seconds and not client.wait(0.005):
            pass
        if blow.seconds is not None:
            server.signal(signal.SIGKILL)
        elif blow.call is not None:
            while not server.wait(0) and not client.wait(0.02):
                pass
        if blow.seconds is not None or server.wait(0):
            client.wait(0.3)  # an answer that was sent is an acknowledgement; then it would try again for a minute
            client.signal(signal.SIGKILL)
        done = client.end()
        seconds = time.monotonic() - begun
        server.signal(signal.SIGTERM)
        ended = server.end(SERVER_S)
        return Ended(ended.killed, ended.code, done.output, done.errors + ended.errors, seconds, ended.calls)

    def lost(self, ended: Ended) -> list[str]:
        """A push that was answered made no version."""
        if ended.said is not None:
            self._acknowledged.append(f"{self._repository}@0.1.0")
        return self._shelf.lost(self._acknowledged)

    def partial(self, ended: Ended) -> list[str]:
        """A version is there without all its bytes."""
        return self._shelf.partial()

    def recover(self) -> list[str]:
        """The same push to a new service ends."""
        server, url = self._serve(None)
        done = self._client(url).end()
        server.signal(signal.SIGTERM)
        server.end(SERVER_S)
        if done.said is None:
            return [f"the push fails: {done.errors[-500:]}"]
        self._acknowledged.append(f"{self._repository}@0.1.0")
        return self._shelf.lost([f"{self._repository}@0.1.0"]) + self._shelf.partial()

    def left(self) -> list[str]:
        """All versions are read again after the collection."""
        left = self._shelf.left() + self._shelf.lost(self._acknowledged) + self._shelf.partial(again=True)
        left += [f"{path} is still there" for path in self._shelf.registry.layout.uploads.glob("*")]
        self._shelf.close()
        return left

    def _serve(self, call: int | None) -> tuple[Victim, str]:
        words = ("serve", "--port", 0, "--jobs", 0, "--home", self._shelf.home, "--format", "quiet")
        server = Victim(self._folder / "server", command, *map(str, words), call=call)
        deadline = time.monotonic() + SERVER_S
        while not (url := server.stdout.read_text()).endswith("\n"):
            assert time.monotonic() < deadline, server.stderr.read_text()
            if server.wait(0.02):  # killed before it listened
                return server, "http://127.0.0.1:9"
        return server, url.strip()

    def _client(self, url: str) -> Victim:
        cache = str(self._folder / "cache")
        xet = "1" if self._round % 2 else "0"
        return Victim(self._folder / "client", push, url, str(self._source), self._repository, cache, xet)


def push(url: str, folder: str, repository: str, cache: str, without_xet: str) -> None:
    """A client: prints the commit that it was answered with."""
    import os

    os.environ.update(HF_HOME=cache, HF_HUB_DISABLE_XET=without_xet, HF_HUB_DISABLE_PROGRESS_BARS="1")
    os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_ENDPOINT=url)
    os.environ.pop("HF_HUB_OFFLINE", None)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=url)
    with contextlib.suppress(HfHubHTTPError):  # it exists: an earlier try has made it
        api.create_repo(repository)
    print(json.dumps({"commit": api.upload_folder(repo_id=repository, folder_path=folder).oid}))


def _config(folder: Path) -> str:
    """The adapter's config without a base, as nobody knows it."""
    fields = json.loads((folder / "adapter_config.json").read_text())
    return json.dumps({**fields, "base_model_name_or_path": None, "note": float(np.float32(1))})
