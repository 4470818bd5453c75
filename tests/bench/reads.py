"""Reads a second over REST, against MLflow's registry: `python -m tests.bench.reads --mlflow PYTHON`.

Both are SQLite behind one server process, asked for the first 50 of one of two bases by four clients that keep their
connections, in turns. MLflow's adds models one by one and holds a tenth of the adapters.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from urllib.parse import quote

import click

from registry.services.local import open_registry
from tests.bench.catalogue import fill
from tests.bench.transfer import served

BASES, PAGE, CLIENTS = 2, 50, 4


@contextmanager
def mlflow(python: str, place: Path, models: int) -> Iterator[str]:
    """MLflow's server over a database of its own: its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, str(Path(__file__).with_name("mlflow_peer.py")), place / "mlflow.db", str(models), str(port)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            address = f"127.0.0.1:{port}"
            while not answers(address):
                time.sleep(0.5)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def answers(address: str) -> bool:
    """Whether a server is there."""
    try:
        connection = http.client.HTTPConnection(address, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def reads(address: str, path: str, field: str, seconds: float) -> tuple[float, list[float]]:
    """(requests a second, their times in ms) of all clients; each answer must hold a page."""
    until, times = time.perf_counter() + seconds, list[float]()

    def client(seed: int) -> None:
        pick, connection = random.Random(seed), http.client.HTTPConnection(address, timeout=60)
        while (begun := time.perf_counter()) < until:
            connection.request("GET", path.format(base=f"base{1 + pick.randrange(BASES)}"))
            response = connection.getresponse()
            found = json.loads(response.read())
            assert response.status == 200
            assert len(found[field]) == PAGE
            times.append((time.perf_counter() - begun) * 1000)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(times) / seconds, times


@click.command()
@click.option("--models", default=1000, show_default=True, help="How many MLflow holds.")
@click.option("--seconds", default=5.0, show_default=True, help="Of each round.")
@click.option("--rounds", default=3, show_default=True, help="How often each is measured.")
@click.option("--mlflow", "python", help="The interpreter of an environment that has mlflow.")
def main(models: int, seconds: float, rounds: int, python: str | None) -> None:
    """Print the table."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        registry = open_registry(place / "home")
        fill(registry, 20 * models)  # two versions each; the second base has one adapter in 16
        registry.close()
        url, _ = stack.enter_context(served(place / "home"))
        peers = {
            "this project, adapters of a base": (
                url.removeprefix("http://"),
                f"/api/v1/search?base={{base}}&limit={PAGE}",
                "items",
            ),
        }
        if python:
            wanted = quote("tags.base = '{base}'", safe="{}")
            path = f"/api/2.0/mlflow/registered-models/search?max_results={PAGE}&filter={wanted}"
            address = stack.enter_context(mlflow(python, place, models))
            peers["MLflow, registered models by tag"] = (address, path, "registered_models")
        found: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in peers}
        for address, path, field in peers.values():
            reads(address, path, field, 1.0)
        for _ in range(rounds):
            for name, (address, path, field) in peers.items():
                found[name].append(reads(address, path, field, seconds))
    print("| registry | reads a second | p50 ms |\n|---|---|---|")
    for name, measured in found.items():
        rate, middle = median(rate for rate, _ in measured), median(ms for _, times in measured for ms in times)
        print(f"| {name} | {rate:.0f} | {middle:.1f} |")


if __name__ == "__main__":
    main()
