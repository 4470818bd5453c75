"""ONNX exports of a real model: this project against full re-exports by others, loading, and decoding.

    make bench                                       three tables, on stdout
    python -m tests.bench.onnx --only bind           a quick look
    python -m tests.bench.onnx --mobius PYTHON       mobius as well, from an environment that has mobius-onnx

The model is SmolLM2-135M in bf16, as the demo builds it. Every export and every loading is a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

EXPORTERS = ("bind", "trace", "torch", "genai", "mobius")
NAMES = {
    "bind": "this project, another adapter: bind",
    "trace": "this project, a new configuration: trace and bind",
    "torch": "torch.onnx.export(dynamo=True), opset 23",
    "genai": "onnxruntime-genai's builder, fp32",
    "mobius": "mobius-onnx, f32",
}
VARIANTS = {
    "portable, fp32": {},
    "portable, fp16": {"compute": "float16"},
    "portable, int8": {"quantise": "int8"},
    "portable, int4": {"quantise": "int4"},
    "genai, fp32": {"flavour": "genai"},
    "genai, int8": {"flavour": "genai", "quantise": "int8"},
}


@dataclass(frozen=True, slots=True)
class Run:
    """One process: seconds of wall clock, its largest resident set in MiB, and what it printed."""

    wall: float
    peak: float
    said: dict[str, Any]


def measure(python: str, peer: str, model: Path, out: Path) -> Run:
    """Run one peer once; its children count in its peak."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [python, "-m", "tests.bench.onnx_peers", peer, model, out],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    text = process.stdout.read() if process.stdout else b""
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        sys.exit(f"{peer} failed with status {status}")
    return Run(wall, usage.ru_maxrss / 1024, json.loads(text.splitlines()[-1]))


def exports(model: Path, work: Path, pythons: dict[str, str], runs: int) -> None:
    """The table of exporters; the weights are the same folder's each time."""
    print("| exporter | the work, s | with start and imports, s | peak MiB | × bind |\n|---|---|---|---|---|")
    floor = 0.0
    for name, python in pythons.items():
        found = []
        for _ in range(runs if name == "bind" else 1):
            shutil.rmtree(work / "exported", ignore_errors=True)
            found.append(measure(python, name, model, work / "exported"))
        shutil.rmtree(work / "exported", ignore_errors=True)
        seconds = median(run.said["seconds"] for run in found)
        floor = floor or seconds
        wall, peak = median(run.wall for run in found), max(run.peak for run in found)
        print(f"| {NAMES[name]} | {seconds:.3f} | {wall:.1f} | {peak:.0f} | {seconds / floor:,.0f} |", flush=True)


def variants(model: Path, work: Path) -> dict[str, Path]:
    """A folder of each variant, the weights linked."""
    from composer.exporters.onnx import Variant, export_onnx
    from tests.bench.onnx_peers import graph_cache_of

    folders = {}
    for name, options in VARIANTS.items():
        folder = work / name.replace(", ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in model.iterdir():
            if "onnx" not in path.name:
                os.link(path, folder / path.name)
        export_onnx(folder, cache_dir=graph_cache_of(model), variant=Variant(**options, min_agreement=0.0))
        folders[name] = folder
    return folders


def loading(model: Path, folders: dict[str, Path], runs: int) -> None:
    """The table of sessions."""
    print("\n| graph | session opens in, s | anonymous memory after one pass, MiB |\n|---|---|---|")
    for name, folder in folders.items():
        found = [measure(sys.executable, "session", model, folder).said for _ in range(runs)]
        seconds = median(run["seconds"] for run in found)
        print(f"| {name} | {seconds:.2f} | {median(run['anonymous_mib'] for run in found):.0f} |", flush=True)


def decoding(model: Path, folders: dict[str, Path], threads: int | None) -> None:
    """The table of tokens a second against torch eager, in turn, in one process."""
    from composer.latency import Workload, measure_latency

    print("\n| graph | batch | tokens/s | torch eager, tokens/s | against it |\n|---|---|---|---|---|")
    for batch in (1, 8):
        workload = Workload(prompt=32, new=24, batch=batch, rounds=3, threads=threads)
        eager = measure_latency([model], workload, ["torch"])[0].tokens_per_s or 0.0
        for name, folder in folders.items():
            rate = measure_latency([folder], workload, ["onnx"])[0].tokens_per_s or 0.0
            print(f"| {name} | {batch} | {rate:.1f} | {eager:.1f} | {rate / eager:.2f} |", flush=True)


@click.command()
@click.option("--runs", default=3, show_default=True, help="How often bind and each loading run.")
@click.option("--work", default=Path(".bench/onnx"), show_default=True, type=click.Path(path_type=Path), help="Where.")
@click.option("--mobius", help="The interpreter of an environment that has mobius-onnx.")
@click.option("--only", multiple=True, type=click.Choice(EXPORTERS), help="Only these exporters, and no other table.")
@click.option("--threads", type=int, help="Of decoding; default: those of each runtime.")
def main(runs: int, work: Path, mobius: str | None, only: tuple[str, ...], threads: int | None) -> None:
    """Print the tables."""
    work = work.resolve()
    model = work / "smollm2"
    subprocess.run([sys.executable, "examples/build_base.py", "smollm2", model], check=True, stderr=subprocess.DEVNULL)
    print(f"SmolLM2-135M in bf16, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before it started\n")
    pythons = dict.fromkeys(EXPORTERS[:-1], sys.executable)
    if mobius:
        pythons["mobius"] = mobius
    pythons = {name: python for name, python in pythons.items() if not only or name in only}
    if "bind" in pythons:
        measure(sys.executable, "bind", model, work / "exported")  # traces once, where nothing is cached yet
    exports(model, work, pythons, runs)
    if not only:
        folders = variants(model, work)
        loading(model, folders, runs)
        decoding(model, folders, threads)


if __name__ == "__main__":
    main()
