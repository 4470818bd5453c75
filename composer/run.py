"""The one loop: read a block of the base, sum the deltas in float32, round once, write.

run(plan, sink)      weights + index + the files that go along, into the sink's folder
compose(plan, out)   run, export, provenance, commit
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer.checkpoint import INDEX
from composer.deltas import torch_dtype
from composer.exporters import find_exporter
from composer.files import copy_names, read_json
from composer.kernels import Survival, cast_block, check_overflow, merge_block
from composer.methods import find_method
from composer.plan import Plan, TensorJob
from composer.provenance import composition_record
from composer.recipe import Dtype
from composer.sinks import FolderSink, HashingWriter

__all__ = ["Outcome", "Progress", "compose", "run"]

Progress = Callable[[str, int, int], None]
CONFIG_DTYPE = {Dtype.BF16: "bfloat16", Dtype.FP16: "float16", Dtype.FP32: "float32"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a compose made: the folder, its record (also in composition.json), and the times, which are not recorded."""

    out: Path
    record: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)


def compose(
    plan: Plan,
    out: Path,
    *,
    inputs: dict[str, Any] | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    replace: bool = False,
) -> Outcome:
    """Run `plan` and publish the artefact at `out`, whole or not at all.

    inputs: what the caller knows of the base and of each adapter (digests, verdicts); goes into composition.json.
    cache_dir: where graphs are kept between exports. progress: called with (step, bytes done, bytes in all).
    Raises every TypedError of the steps; `out` is untouched then.
    """
    import time

    report = progress or (lambda step, done, total: None)
    exporter = find_exporter(plan.recipe.export)
    exporter.check(plan.checkpoint)
    seconds: dict[str, float] = {}
    with FolderSink(out, replace=replace) as sink:
        started = time.perf_counter()
        survival = run(plan, sink, report)
        seconds["merge"] = time.perf_counter() - started
        exported, export_seconds = exporter.export(sink, cache_dir, lambda step: report(step, 0, 0))
        seconds.update(export_seconds)
        record = composition_record(plan, sink.files, survival, inputs or {}, exported)
        sink.write("composition.json", (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
        sink.commit()
    return Outcome(out, record, seconds)


def run(plan: Plan, sink: FolderSink, progress: Progress) -> Survival:
    """Write the weights, their index and the files that go along; the sink is not committed."""
    import torch

    survival = Survival(len(plan.terms))
    total, done = plan.nbytes, 0
    with torch.inference_mode():
        for shard in plan.shards:
            with sink.open(shard.name) as writer:
                writer.write(shard.header)
                done += len(shard.header)
                for job in shard.jobs:
                    for written in _write_tensor(job, plan, writer, survival):
                        done += written
                        progress("merging", done, total)
    if plan.checkpoint.sharded:
        sink.write(INDEX, _index(plan))
    for name in copy_names(plan.checkpoint.files):
        sink.write(name, _companion(plan, name))
    return survival


def _write_tensor(job: TensorJob, plan: Plan, writer: HashingWriter, survival: Survival) -> Any:
    if job.copied:
        for chunk in job.source.chunks():
            writer.write(chunk)
            yield len(chunk)
        return
    import torch

    rows, columns = job.matrix
    method = find_method(plan.recipe.method)
    loaded = [(item, item.delta.load()) for item in job.deltas]
    width = job.source.nbytes // max(rows, 1)
    for start, stop in job.blocks:
        raw = job.source.read_bytes(start * width, stop * width)
        if not raw:
            continue
        base = torch.frombuffer(raw, dtype=torch_dtype(job.source.dtype)).reshape(stop - start, columns)
        for _, delta in loaded:
            delta.check_base(base, start, stop)
        blocks = [(item, delta.rows(start, stop).reshape(stop - start, columns)) for item, delta in loaded]
        if blocks and blocks[0][0].delta.replaces:
            result = cast_block(blocks[0][1], job.dtype, job.source.name)
        elif blocks:
            result = merge_block(
                base, [(item.term, item.weight, block) for item, block in blocks], method, job.dtype, survival
            )
            check_overflow(base, result, job.source.name)
        else:
            result = cast_block(base, job.dtype, job.source.name)
        data = memoryview(result.contiguous().view(torch.uint8).numpy()).cast("B")
        writer.write(data)
        yield len(data)


def _index(plan: Plan) -> bytes:
    weight_map = {job.source.name: shard.name for shard in plan.shards for job in shard.jobs}
    index = {
        "metadata": {"total_size": sum(job.nbytes for job in plan.jobs)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def _companion(plan: Plan, name: str) -> bytes:
    """A file of the base that goes along; config.json names the new dtype where that changed."""
    path = plan.checkpoint.files[name]
    if name != "config.json" or plan.recipe.dtype is Dtype.KEEP:
        return path.read_bytes()
    config = read_json(path)
    config.pop("torch_dtype", None)
    config["dtype"] = CONFIG_DTYPE[plan.recipe.dtype]
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
