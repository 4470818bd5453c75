"""Merge a LoRA into a bf16 Llama of 2.2 GB: this project against cp, PEFT and mergekit, interleaved, medians.

    make bench                                  the table, on stdout
    python -m tests.bench --runs 1 --layers 4   a quick look

Every run is a process of its own, from a warm page cache to bytes that are fsynced. mergekit needs a virtual
environment of its own: give its interpreter as --mergekit.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from tests.bench.synthetic import ALL_LINEAR, make_adapter, make_base

CASES = {"all linear layers": ALL_LINEAR, "q and v only": ("self_attn.q_proj", "self_attn.v_proj")}


@dataclass(frozen=True, slots=True)
class Run:
    """One process: seconds of wall clock and of CPU, and its largest resident set in MiB."""

    wall: float
    cpu: float
    peak: float


def measure(python: str, peer: str, base: Path, adapter: Path, out: Path) -> Run:
    """Run one peer once; its output is removed."""
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(
        [python, "-m", "tests.bench.peers", peer, base, adapter, out], env=environment, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    shutil.rmtree(out, ignore_errors=True)
    if status:
        sys.exit(f"{peer} failed with status {status}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def in_a_process(function: Callable[..., Path], *args: Any, **options: Any) -> Path:
    """Call it in a process of its own: a large parent would count in the peak memory of every child."""
    with ProcessPoolExecutor(1) as pool:
        return pool.submit(function, *args, **options).result()


@click.command()
@click.option("--layers", default=22, show_default=True, help="Layers of the model; 22 are 2.2 GB.")
@click.option("--runs", default=5, show_default=True, help="How often each peer runs.")
@click.option("--work", default=Path(".bench"), show_default=True, type=click.Path(path_type=Path), help="Where.")
@click.option("--mergekit", help="The interpreter of an environment that has mergekit.")
@click.option("--only", multiple=True, help="Only these peers.")
def main(layers: int, runs: int, work: Path, mergekit: str | None, only: tuple[str, ...]) -> None:
    """Print the table."""
    base = in_a_process(make_base, (work / f"base-{layers}").resolve(), layers)
    pythons = {"cp": sys.executable, "ours": sys.executable, "peft": sys.executable}
    if mergekit:
        pythons["mergekit"] = mergekit
    pythons = {name: python for name, python in pythons.items() if not only or name in only or name == "cp"}
    size = sum(path.stat().st_size for path in base.iterdir())
    print(f"{size / 1e9:.2f} GB, {os.cpu_count()} cores, {platform.processor() or platform.machine()}, {runs} runs\n")
    print("| case | peer | wall s | wall ÷ cp | CPU s | peak MiB |\n|---|---|---|---|---|---|")
    for case, modules in CASES.items():
        folder = (work / f"lora-{layers}-{len(modules)}").resolve()
        adapter = in_a_process(make_adapter, folder, base, modules, layers=layers)
        found: dict[str, list[Run]] = {name: [] for name in pythons}
        for index in range(runs * len(pythons)):
            name = list(pythons)[index % len(pythons)]
            found[name].append(measure(pythons[name], name, base, adapter, (work / "out").resolve()))
            print(f"{case}: {name} {found[name][-1].wall:.2f} s", file=sys.stderr)
        floor = median(run.wall for run in found["cp"])
        for name, measured in found.items():
            wall, cpu = median(run.wall for run in measured), median(run.cpu for run in measured)
            peak = max(run.peak for run in measured)
            print(f"| {case} | {name} | {wall:.2f} | {wall / floor:.2f} | {cpu:.2f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
