"""1 GB through the service against cp: `python -m tests.bench.transfer`.

Each way ends with the bytes fsynced. `upload, LFS` is one PUT, hashed as it comes; `upload, REST` a multipart form of a
base, up to the answer that its fingerprinting is queued; `download` one GET of it, written to a file. The ways take turns;
the peak is that of the service's process over all of them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import click
import httpx
import numpy as np

from registry.transfer import file_parts
from tests.support import write_base

CHUNK = 1 << 20
API = "/api/v1"


@contextmanager
def served(home: Path) -> Iterator[tuple[str, int]]:
    """`registry serve` over `home`: its URL and its process id."""
    command = [sys.executable, "-m", "cli", "serve", "--port", "0", "--jobs", "0", "--format", "quiet"]
    environment = {**os.environ, "REGISTRY_HOME": str(home)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process.pid
        finally:
            process.send_signal(signal.SIGINT)


def peak_mib(pid: int) -> float:
    """The most memory that a process had resident."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def copied(source: Path, target: Path) -> None:
    """cp and fsync."""
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def sent(source: Path, size: int) -> Iterator[bytes]:
    """`size` bytes of a file, in chunks; its first 8 are replaced, so that no two uploads are the same."""
    with source.open("rb") as file:
        first = file.read(CHUNK)
        yield time.time_ns().to_bytes(8, "little") + first[8:]
        while chunk := file.read(CHUNK):
            yield chunk


def put(client: httpx.Client, source: Path) -> Callable[[], None]:
    """One object by LFS; its digest is known before, as a client knows it."""
    chunks = list(sent(source, source.stat().st_size))
    digest, size = hashlib.sha256(), sum(map(len, chunks))
    for chunk in chunks:
        digest.update(chunk)
    body = {"operation": "upload", "objects": [{"oid": digest.hexdigest(), "size": size}]}
    batch = client.post("/lab/model.git/info/lfs/objects/batch", json=body).json()
    url = batch["objects"][0]["actions"]["upload"]["href"]
    return lambda: client.put(url, content=iter(chunks), headers={"Content-Length": str(size)}).raise_for_status()


def post(client: httpx.Client, folder: Path) -> None:
    """A base by REST, as registry.client sends it."""
    files = {path.name: path for path in folder.iterdir()}
    with file_parts(files, None) as parts:
        data = {"name": f"base{time.time_ns()}"}
        client.post(f"{API}/bases?background=true", data=data, files=parts).raise_for_status()


def get(client: httpx.Client, out: Path) -> None:
    """The weights of the base, to a file."""
    with client.stream("GET", "/big/resolve/main/model.safetensors") as response, out.open("wb") as file:
        for chunk in response.iter_bytes(CHUNK):
            file.write(chunk)
        os.fsync(file.fileno())


@click.command()
@click.option("--megabytes", default=1000, show_default=True, help="How large.")
@click.option("--runs", default=3, show_default=True, help="How often each way runs.")
@click.option("--work", default=Path(".bench"), show_default=True, type=click.Path(path_type=Path), help="Where.")
def main(megabytes: int, runs: int, work: Path) -> None:
    """Print the table."""
    from registry.services.local import open_registry

    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as text:
        place = Path(text).resolve()
        weights = np.random.default_rng(1).integers(0, 1 << 15, megabytes * 500_000, np.uint16).view(np.float16)
        folder = write_base(place / "big", {"weight": np.nan_to_num(weights.reshape(1000, -1), posinf=1, neginf=-1)})
        source, out = folder / "model.safetensors", place / "out"
        registry = open_registry(place / "home")
        registry.add_base(folder, name="big")
        registry.close()
        with served(place / "home") as (url, pid), httpx.Client(base_url=url, timeout=600, trust_env=False) as client:
            client.post("/api/repos/create", json={"organization": "lab", "name": "model"}).raise_for_status()
            found: dict[str, list[float]] = {}
            for _ in range(runs):
                ways: dict[str, Callable[[], None]] = {
                    "cp + fsync": lambda: copied(source, out),
                    "upload, LFS": put(client, source),
                    "upload, REST": lambda: post(client, folder),
                    "download": lambda: get(client, out),
                }
                for name, run in ways.items():
                    os.sync()
                    started = time.perf_counter()
                    run()
                    found.setdefault(name, []).append(time.perf_counter() - started)
                    out.unlink(missing_ok=True)
                    shutil.rmtree(place / "home" / "uploads", ignore_errors=True)
            peak = peak_mib(pid)
    floor = median(found["cp + fsync"])
    print("| way | wall s | ÷ cp |\n|---|---|---|")
    for name, times in found.items():
        print(f"| {name} | {median(times):.2f} | {median(times) / floor:.2f} |")
    print(f"\nPeak of the service: {peak:.0f} MiB.")


if __name__ == "__main__":
    main()
