"""The one loop: read a block of the base, sum the deltas in float32, round once, write.

run(plan, sink)      weights + index + the files that go along, into the sink's folder
compose(plan, out)   run, export, provenance, commit
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from composer.checkpoint import INDEX
from composer.exporters import find_exporter, find_plan_exporter, prepare_export
from composer.files import copy_names, read_json
from composer.kernels import (
    LoadedTerm,
    Survival,
    cast_block,
    check_overflow,
    fusible,
    merge_block,
    merge_fused,
    restores,
)
from composer.methods import BoundMethod, find_method
from composer.plan import IN_FLIGHT, THREADS, NewRows, Plan, ShardPlan, TensorJob
from composer.provenance import composition_record
from composer.quantised import QuantisedTensor
from composer.sinks import FolderSink
from composer.tensors import COPY_BYTES, DTYPES, TensorSpec

__all__ = ["Outcome", "Progress", "compose", "run"]

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
SAMPLE, TILE = 1 << 15, 16
LOCAL = threading.local()
SPARE: deque[np.ndarray] = deque(maxlen=IN_FLIGHT)  # results already written: fresh memory costs page faults
STREAM_TILE, ONE_AT_A_TIME = 8, threading.Lock()
CONFIG_DTYPE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


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
    report = progress or (lambda step, done, total: None)
    plan = prepare_export(plan)
    in_place = find_plan_exporter(plan.recipe.export)
    seconds: dict[str, float] = {}
    with FolderSink(out, replace=replace) as sink:
        started = time.perf_counter()
        if in_place is not None:
            exported, survival = in_place.export_plan(plan, sink, inputs or {}, report)
            seconds["export"] = time.perf_counter() - started
        else:
            survival = run(plan, sink, report)
            seconds["merge"] = time.perf_counter() - started
            exporter = find_exporter(plan.recipe.export)
            exported, export_seconds = exporter.export(plan, sink, cache_dir, lambda step: report(step, 0, 0))
            seconds.update(export_seconds)
        record = composition_record(plan, sink.files, survival, inputs or {}, exported)
        sink.write("composition.json", (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
        sink.commit()
    return Outcome(out, record, seconds)


def run(plan: Plan, sink: FolderSink, progress: Progress) -> Survival:
    """Write the weights, their index and the files that go along; the sink is not committed.

    Blocks are computed by a few threads and written in order by this one; at most `IN_FLIGHT` of them are held.
    """
    survival = Survival(len(plan.terms))
    total, done = plan.nbytes, 0
    with ThreadPoolExecutor(THREADS) as pool:
        for shard in plan.shards:
            with sink.open(shard.name) as writer:
                writer.write(shard.header)
                done += len(shard.header)
                for data, measured, spare in in_order(pool, _blocks(shard, plan), IN_FLIGHT):
                    if isinstance(data, Unread):
                        writer.write_from(data.source.read_into, data.start, data.stop)
                    else:
                        writer.write(data)
                    if measured is not None:
                        survival.merge(measured)
                    if spare is not None:
                        SPARE.append(spare)
                    done += len(data)
                    progress("merging", done, total)
    if plan.checkpoint.sharded:
        sink.write(INDEX, _index(plan))
    for name in dict.fromkeys((*copy_names(plan.checkpoint.files), *plan.files)):
        sink.write(name, _companion(plan, name))
    return survival


def in_order(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]], in_flight: int) -> Iterator[T]:
    """The results of `tasks`, run by `pool`, in their own order; at most `in_flight` are begun and not yet taken."""
    running: deque[Future[T]] = deque()
    try:
        for task in tasks:
            running.append(pool.submit(task))
            if len(running) == in_flight:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


@dataclass(frozen=True, slots=True)
class Unread:
    """Bytes [start, stop) of a tensor that goes along unchanged: read straight into what is written."""

    source: TensorSpec
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


# What to write, what was measured, and the memory of the result, which a later block may take once it is written
Block = tuple[memoryview | Unread, Survival | None, np.ndarray | None]


def _blocks(shard: ShardPlan, plan: Plan) -> Iterator[Callable[[], Block]]:
    """One task a block, in file order; a tensor's deltas are loaded when its first block is asked for."""
    for job in shard.jobs:
        if job.new_rows is None:
            yield from (task for _, _, task in _job_blocks(job, plan))
        else:
            yield from _grown_blocks(job, job.new_rows, plan)


def _job_blocks(job: TensorJob, plan: Plan) -> Iterator[tuple[int, int, Callable[[], Block]]]:
    """(first byte, last byte, task) of each block of a tensor."""
    if job.copied:
        for start in range(0, job.nbytes, COPY_BYTES):
            stop = min(start + COPY_BYTES, job.nbytes)
            yield start, stop, partial(_copy, job, start, stop)
        return
    merge, width = _merger(job, plan), job.matrix[1] * DTYPES[job.dtype].itemsize
    for start, stop in job.blocks:
        if width:
            yield start * width, stop * width, partial(merge, start, stop)


def _merger(job: TensorJob, plan: Plan) -> Callable[[int, int], Block]:
    """What merges rows [start, stop) of a tensor, with its deltas loaded."""
    if job.streamed:
        return partial(_merge_streamed, job, plan)
    return partial(_merge, job, plan, [LoadedTerm(item.delta.load(), item.weight, item.term) for item in job.deltas])


def _grown_blocks(job: TensorJob, new: NewRows, plan: Plan) -> Iterator[Callable[[], Block]]:
    """The tensor's own rows, with the new ones between or behind them."""
    old = replace(job, new_rows=None)
    width = job.matrix[1] * DTYPES[job.dtype].itemsize
    first, last = new.start * width, (new.start + new.count) * width
    for start, stop, task in _job_blocks(old, plan):
        if start < first:
            yield partial(_cut, task, 0, min(stop, first) - start)
    yield partial(_new_rows, old, new, plan)
    for start, stop, task in _job_blocks(old, plan) if last < old.nbytes else ():
        if stop > last:
            yield partial(_cut, task, max(start, last) - start, stop - start)


def _cut(task: Callable[[], Block], first: int, last: int) -> Block:
    """Bytes [first, last) of a block."""
    data, measured, spare = task()
    if isinstance(data, Unread):
        return Unread(data.source, data.start + first, data.start + last), measured, spare
    return data[first:last], measured, spare


def _new_rows(job: TensorJob, new: NewRows, plan: Plan) -> Block:
    """The rows that a vocabulary gains; `job` is the tensor without them."""
    if new.prompts:
        rows = np.concatenate([prompt.load() for prompt in new.prompts]) / np.float32(new.scale)
    else:
        rows = np.repeat(_mean(job, new.start, plan)[None], new.count, 0)
    return (
        memoryview(np.ascontiguousarray(cast_block(rows, job.dtype, job.name)).reshape(-1).view(np.uint8)),
        None,
        None,
    )


def _mean(job: TensorJob, rows: int, plan: Plan) -> np.ndarray:
    """The mean of the first `rows` rows of a tensor as it is written, float32 [numbers a row]."""
    total = np.zeros(job.matrix[1])
    merge = _merger(job, plan)
    for start, stop in job.blocks:
        if start < rows:
            data, _, _ = merge(start, stop)
            block = np.frombuffer(data, DTYPES[job.dtype]).reshape(stop - start, -1)
            total += block[: rows - start].astype(np.float64).sum(0)
    return (total / rows).astype(np.float32)


def _copy(job: TensorJob, start: int, stop: int) -> Block:
    if isinstance(job.source, TensorSpec):
        return Unread(job.source, start, stop), None, None
    return memoryview(job.source.read_bytes(start, stop)), None, None


def _read(source: TensorSpec | QuantisedTensor, start: int, stop: int) -> memoryview:
    """Bytes of the base, in a buffer of this thread that its next block reuses: fresh memory costs page faults."""
    if not isinstance(source, TensorSpec):
        return source.read_bytes(start, stop)
    buffer: bytearray | None = getattr(LOCAL, "buffer", None)
    if buffer is None or len(buffer) < stop - start:
        buffer = LOCAL.buffer = bytearray(stop - start)
    view = memoryview(buffer)[: stop - start]
    source.read_into(start, view)
    return view


def _merge(job: TensorJob, plan: Plan, terms: list[LoadedTerm], start: int, stop: int) -> Block:
    rows, columns = job.matrix
    name, width = job.source.name, job.source.nbytes // rows
    raw = _read(job.source, start * width, stop * width)
    base = np.frombuffer(raw, DTYPES[job.source.dtype]).reshape(stop - start, columns)
    survival = Survival(len(plan.terms)) if terms else None
    spare: np.ndarray | None = None
    if not terms:
        result = cast_block(base, job.dtype, name)
    elif job.deltas[0].delta.replaces:
        result = cast_block(terms[0].delta.rows(start, stop, base.astype(np.float32)), job.dtype, name)
    elif restores(terms, plan.recipe.method):
        original = base.astype(np.float32)
        new = terms[0].delta.restored(start, stop, original)
        result = cast_block(new, job.dtype, name)
        survival.add(result.astype(np.float32) - original, new - original, [(terms[0].term, new - original)])
    elif fusible(terms, plan.recipe.method, job.source.dtype, job.dtype):
        spare, out = _result(base)
        result = merge_fused(base, terms, start, name, out)
        _sample(job, plan, terms, base, result, start, survival)
    else:
        method = _method(plan, job)
        result, total, deltas = merge_block(base, terms, start, method, job.dtype)
        survival.add(result.astype(np.float32) - base.astype(np.float32), total, deltas)
        check_overflow(base, result, name)
    return memoryview(result.reshape(-1).view(np.uint8)), survival, spare


def _result(base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Memory for a merged block, and the part of it in the shape of `base`, as bf16 bits."""
    try:
        spare = SPARE.pop()
    except IndexError:
        spare = np.empty(base.size, np.uint16)
    if spare.size < base.size:
        spare = np.empty(base.size, np.uint16)
    return spare, spare[: base.size].reshape(base.shape)


def _merge_streamed(job: TensorJob, plan: Plan, start: int, stop: int) -> Block:
    """The linear sum with one adapter loaded at a time, in the order of operations of the fused kernel.

    Survival is measured on the first STREAM_TILE rows of each block.
    """
    rows, columns = job.matrix
    width = job.source.nbytes // rows
    with ONE_AT_A_TIME:
        raw = _read(job.source, start * width, stop * width)
        base = np.frombuffer(raw, DTYPES[job.source.dtype]).reshape(stop - start, columns)
        original = base.astype(np.float32)
        total: np.ndarray | None = None
        kept: list[tuple[int, np.ndarray]] = []
        for item in job.deltas:
            delta = item.delta.load().rows(start, stop, original)
            kept.append((item.term, delta[:STREAM_TILE].copy()))
            delta *= np.float32(item.weight)
            total = delta if total is None else np.add(total, delta, out=total)
        assert total is not None
        with np.errstate(over="ignore"):
            result = (original + total).astype(DTYPES[job.dtype])
        check_overflow(base, result, job.source.name)
    survival = Survival(len(plan.terms))
    change = result[:STREAM_TILE].astype(np.float32) - original[:STREAM_TILE]
    survival.add(change, total[:STREAM_TILE], kept, (stop - start) / len(change))
    return memoryview(result.reshape(-1).view(np.uint8)), survival, None


def _sample(
    job: TensorJob, plan: Plan, terms: list[LoadedTerm], base: np.ndarray, result: np.ndarray, start: int,
    survival: Survival,
) -> None:  # fmt: skip
    """Measure survival on every `step`-th tile of rows: about SAMPLE numbers of a tensor, all of a small one."""
    rows, columns = job.matrix
    tiles = -(-rows // TILE)
    step = max(1, rows * columns // SAMPLE)
    chosen = range(0, tiles, step)
    covered = sum(min(rows, (tile + 1) * TILE) - tile * TILE for tile in chosen)
    method = _method(plan, job)
    for tile in chosen:
        first, last = max(tile * TILE, start), min((tile + 1) * TILE, start + len(base))
        if first >= last:
            continue
        part = base[first - start : last - start]
        _, total, deltas = merge_block(part, terms, first, method, job.dtype)
        written = result[first - start : last - start].astype(np.float32) - part.astype(np.float32)
        survival.add(written, total, deltas, rows / covered)


def _method(plan: Plan, job: TensorJob) -> BoundMethod:
    return find_method(plan.recipe.method).bind(plan.recipe.parameters, job.source.name)


def _index(plan: Plan) -> bytes:
    weight_map = {job.name: shard.name for shard in plan.shards for job in shard.jobs}
    index = {
        "metadata": {"total_size": sum(job.nbytes for job in plan.jobs)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def _companion(plan: Plan, name: str) -> bytes:
    """A file that goes along, the base's or the plan's own; config.json names a new dtype and other sizes."""
    if name in plan.files:
        return plan.files[name]
    path = plan.checkpoint.files[name]
    dtype = plan.config_dtype
    if name != "config.json" or (dtype is None and not plan.config_changes):
        return path.read_bytes()
    config = read_json(path)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config.pop("quantization_config", None)
        config["dtype"] = CONFIG_DTYPE[dtype]
    config.update(plan.config_changes)
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
