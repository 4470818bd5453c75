"""Decoding with adapters kept apart in an ONNX graph, against the same model with one of them merged.

    make bench                                        the tables, after the others
    python -m tests.bench.multi --layers 4 --steps 5  a quick look

A random Llama of SmolLM2-135M's sizes, 135M parameters in float32; random LoRAs. One step decodes one token in each row
behind a cache of 16. What is compared takes turns, and a figure is the median of all steps. One thread, and its CPU time:
what else runs on the machine then disturbs less than it does the clock.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from composer.exporters.onnx import MODEL_FILE, export_onnx, open_session
from composer.exporters.onnx.adapted import activate, note_adapters
from composer.exporters.onnx.multi import insert_rows
from composer.exporters.onnx.multi_index import Module, arrange, make_index, note_rows
from composer.exporters.onnx.separate import insert_adapter_inputs, write_adapter
from composer.exporters.onnx.session import forward
from composer.exporters.onnx.vectors import Block, VectorFiles, encode_index, index_file
from composer.recipe import Placement
from composer.sinks import FolderSink
from composer.tensors import read_header

WEIGHTS, CACHE = "model.safetensors", 16
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Step = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Case:
    """Adapters on a base whose graph lies in `base`: how many, of which rank, on which modules."""

    base: Path
    adapters: int
    rank: int
    targets: tuple[str, ...]

    @property
    def modules(self) -> dict[str, Module]:
        """Each weight that they change."""
        specs = read_header(self.base / WEIGHTS).tensors
        return {
            name: Module(spec.shape[1], spec.shape[0], self.rank)
            for name, spec in specs.items()
            if name.endswith(tuple(f"{target}.weight" for target in self.targets))
        }

    def graph(self) -> Any:
        """The base's own, to be changed."""
        import onnx

        return onnx.load(self.base / MODEL_FILE, load_external_data=False)

    def multi(self, out: Path) -> Path:
        """All of them in one graph."""
        model, modules, random = self.graph(), self.modules, np.random.default_rng(0)
        counts = Counter[int]()
        for module in modules.values():
            counts.update({module.inputs: self.adapters * self.rank})
            counts.update({module.outputs: self.adapters * self.rank})
        rows = {width: 1 + count for width, count in counts.items()}
        with FolderSink(out) as sink:
            os.link(self.base / WEIGHTS, sink.folder / WEIGHTS)
            with VectorFiles(sink, rows) as files:

                def block(module: Module) -> Block:
                    a, b = (
                        random.standard_normal((self.rank, width), np.float32) * np.float32(0.02)
                        for width in (module.inputs, module.outputs)
                    )
                    return Block(self.rank, files.add(a), files.add(b))

                blocks = [{name: block(module) for name, module in modules.items()} for _ in range(self.adapters)]
            groups = arrange(model.graph, modules)
            sink.write(index_file(self.adapters), encode_index(make_index(groups, blocks)))
            insert_rows(model, sink.folder, groups, self.adapters, rows)
            note_rows(model, [str(number) for number in range(self.adapters)], modules, rows)
            sink.write(MODEL_FILE, model.SerializeToString())
            sink.commit()
        return out

    def separate(self, out: Path) -> Path:
        """One of them as a file."""
        model, random = self.graph(), np.random.default_rng(0)
        insert_adapter_inputs(model, {name: (each.inputs, each.outputs) for name, each in self.modules.items()})
        entries = [{"name": "0", "file": "0.onnx_adapter"}]
        note_adapters(model, {"placement": Placement.SEPARATE.value, "adapters": entries})
        with FolderSink(out) as sink:
            os.link(self.base / WEIGHTS, sink.folder / WEIGHTS)
            factors = {
                name: (
                    random.standard_normal((module.inputs, self.rank), np.float32) * np.float32(0.02),
                    random.standard_normal((self.rank, module.outputs), np.float32) * np.float32(0.02),
                )
                for name, module in self.modules.items()
            }
            write_adapter(sink.folder / "0.onnx_adapter", factors)
            sink.write(MODEL_FILE, model.SerializeToString())
            sink.commit()
        return out


def make_base(folder: Path, layers: int) -> Path:
    """The model and its graph."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    export_onnx(folder)
    return folder


def stepper(session: Any, rows: int) -> Step:
    """One decoding step of so many rows, to be called again and again."""
    ids = np.random.default_rng(1).integers(1, 1000, (rows, CACHE))
    _, past = forward(session, ids, np.ones_like(ids))
    mask = np.ones((rows, CACHE + 1), np.int64)
    return lambda: forward(session, ids[:, :1], mask, past)


def measure(steps: Mapping[str, Step], count: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(count):
        for name, step in steps.items():
            started = time.thread_time()
            step()
            taken[name].append(1e3 * (time.thread_time() - started))
    return {name: median(values) for name, values in taken.items()}


def against_merged(case: Case, work: Path, count: int) -> Iterator[str]:
    """Rows of the first table."""
    merged = open_session(case.base / MODEL_FILE, threads=1)
    separate = open_session(case.separate(work / "separate") / MODEL_FILE, threads=1)
    multi = open_session(case.multi(work / "multi") / MODEL_FILE, threads=1)
    batches = {"1": ["0"], **{f"8, of {many} adapters": [str(n % many) for n in range(8)] for many in (1, 2, 4, 8)}}
    for label, rows in batches.items():
        steps = {
            "merged": stepper(merged, len(rows)),
            "multi": stepper(activate(multi, work / "multi", rows), len(rows)),
        }
        if len(set(rows)) == 1:
            steps["separate"] = stepper(activate(separate, work / "separate", rows), len(rows))
        found = measure(steps, count)
        ratios = [f"{found['merged'] / found[name]:.2f}" if name in found else "" for name in ("separate", "multi")]
        yield f"| {label} | {found['merged']:.1f} | {' | '.join(ratios)} |"


def by_number(base: Path, work: Path, numbers: tuple[int, ...], count: int) -> Iterator[str]:
    """Rows of the second table: the same batch, whose adapters are spread over all that are present."""
    cases = {number: Case(base, number, 8, ("q_proj", "v_proj")) for number in numbers}
    sessions = {
        number: (work / str(number), open_session(case.multi(work / str(number)) / MODEL_FILE, threads=1))
        for number, case in cases.items()
    }
    for rows in (1, 8):
        steps = {}
        for number, (folder, session) in sessions.items():
            spread = [str(number * (row % 5) // 5) for row in range(rows)]
            steps[str(number)] = stepper(activate(session, folder, spread), rows)
        found = measure(steps, count)
        first = found[str(numbers[0])]
        cells = [f"{1e3 * rows / found[str(number)]:.0f} ({first / found[str(number)]:.2f})" for number in numbers]
        yield f"| {rows} | {' | '.join(cells)} |"


@click.command()
@click.option("--layers", default=30, show_default=True)
@click.option("--steps", default=20, show_default=True, help="Of each that is compared.")
@click.option("--base", type=click.Path(path_type=Path), help="A folder composed with --export onnx, in its place.")
@click.option("--work", type=click.Path(path_type=Path), help="A folder for 3 GB of files; default: a temporary one.")
def main(layers: int, steps: int, base: Path | None, work: Path | None) -> None:
    """Print two tables."""
    numbers = (5, 100, 1000)
    folder = Path(tempfile.mkdtemp(prefix="multi-", dir=work))
    try:
        base = base or make_base(folder / "base", layers)
        click.echo("| rows of a batch | merged, ms a step | speed of separate | speed of multi |\n|---|---|---|---|")
        for line in against_merged(Case(base, 8, 16, ALL_LINEAR), folder, steps):
            click.echo(line)
        heads = " | ".join(f"{number} present" for number in numbers)
        click.echo(f"\n| rows of a batch | {heads} |\n|{'---|' * (1 + len(numbers))}")
        for line in by_number(base, folder, numbers, steps):
            click.echo(line)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
