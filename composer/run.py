"""The one loop: read a block of the base, sum the deltas in float32, round once, write.

run(plan, sink)      weights + index + the files that go along, into the sink's folder
compose(plan, out)   run, export, provenance, commit
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from composer.checkpoint import INDEX
from composer.companions import companion_files
from composer.exporters import find_exporter, find_plan_exporter, prepare_export
from composer.growth import grown_parts
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
from composer.plan import IN_FLIGHT, LANES, ROOMS, THREADS, TILE_ROWS, Plan, ShardPlan, TensorJob, WeightedDelta
from composer.probe import check_probe, probe
from composer.provenance import composition_record, record_file, sealed
from composer.sinks import FolderSink
from composer.tensors import DTYPES, TensorSpec
from composer.writer import ROOM_BYTES, HashingWriter, Room, Staging

__all__ = ["Outcome", "Progress", "compose", "in_order", "index_file", "read_rows", "run", "sampled", "write_jobs"]

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
SAMPLE, TILE = 1 << 15, 16
LOCAL = threading.local()
STREAM_TILE, ONE_AT_A_TIME = 8, threading.Lock()


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
    text: str | None = None,
    confirm: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run `plan` and publish the artefact at `out`, whole or not at all.

    inputs: what the caller knows of the base and of each adapter (digests, verdicts); goes into composition.json.
    cache_dir: where graphs are kept between exports. progress: called with (step, bytes done, bytes in all).
    text: what perplexity is measured on before and after, for the record (composer.probe).
    confirm: called last; what it raises keeps the artefact from being published.
    Raises every TypedError of the steps; `out` is untouched then.
    """
    from composer.requantise import requantise  # built on this module

    report = progress or (lambda step, done, total: None)
    plan = prepare_export(plan)
    if text is not None:
        check_probe(plan)
    in_place = find_plan_exporter(plan.recipe.export)
    seconds: dict[str, float] = {}
    with FolderSink(out, replace=replace) as sink:
        started = time.perf_counter()
        if in_place is not None:
            exported, survival = in_place.export_plan(plan, sink, inputs or {}, report)
            seconds["export"] = time.perf_counter() - started
        else:
            survival = requantise(plan, sink, report) if plan.recipe.requantise else run(plan, sink, report)
            seconds["merge"] = time.perf_counter() - started
            exporter = find_exporter(plan.recipe.export)
            exported, export_seconds = exporter.export(plan, sink, cache_dir, lambda step: report(step, 0, 0))
            if plan.recipe.requantise and plan.quantised.scheme:
                exported["quantisation"] = plan.quantised.scheme.name
            seconds.update(export_seconds)
        record = composition_record(plan, sink.files, survival, inputs or {}, exported)
        if text is not None:
            started = time.perf_counter()
            words = plan.facts.get("virtual_tokens", {}).get("ids", ())
            record["probe"] = probe(plan, sink.folder, text, lambda step: report(step, 0, 0), words)
            seconds["probe"] = time.perf_counter() - started
        record = sealed(record)
        sink.write("composition.json", record_file(record))
        confirm()
        sink.commit()
    return Outcome(out, record, seconds)


def run(plan: Plan, sink: FolderSink, progress: Progress) -> Survival:
    """Write the weights, their index and the files that go along; the sink is not committed.

    Two files at a time, so that their sha256, which is a chain, do not hold each other up. Of each, threads fill rooms
    of the output or compute blocks, at most `IN_FLIGHT`, and they are passed on in order.
    """
    survival, tally = Survival(len(plan.terms)), Tally(progress, plan.nbytes)
    with ThreadPoolExecutor(THREADS) as pool, ThreadPoolExecutor(LANES) as lanes, tally.until_one_fails():
        shards = [lanes.submit(_write_shard, shard, plan, sink, pool, tally) for shard in plan.shards]
        wait(shards)
        for shard in sorted(shards, key=_stopped):  # what went wrong before what was stopped for it
            shard.result()
        for shard in shards:
            survival.merge(shard.result())
    if plan.checkpoint.sharded:
        weight_map = {job.name: shard.name for shard in plan.shards for job in shard.jobs}
        sink.write(INDEX, index_file(weight_map, sum(job.nbytes for job in plan.jobs)))
    for name, data in companion_files(plan):
        sink.write(name, data)
    return survival


def _stopped(shard: Future[Survival]) -> bool:
    return isinstance(shard.exception(), CancelledError)


class Tally:
    """Counts the bytes of all files; once one has failed, the others stop at their next block."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock, self._stopped = threading.Lock(), False

    def add(self, count: int) -> None:
        """Report `count` more bytes. Raises CancelledError once stopped, and whatever the report raises."""
        with self._lock:
            if self._stopped:
                raise CancelledError
            self._done += count
            with self.until_one_fails():
                self._progress("merging", self._done, self._total)

    @contextmanager
    def until_one_fails(self) -> Iterator[None]:
        """Stop the others when what is done within fails."""
        try:
            yield
        except BaseException:
            self._stopped = True
            raise


def _write_shard(shard: ShardPlan, plan: Plan, sink: FolderSink, pool: ThreadPoolExecutor, tally: Tally) -> Survival:
    survival = Survival(len(plan.terms))
    with tally.until_one_fails(), Staging(ROOMS) as staging, sink.open(shard.name, staging) as writer:
        writer.write(shard.header)
        tally.add(len(shard.header))
        for written in write_jobs(writer, pool, shard, plan, survival):
            tally.add(written)
    return survival


def write_jobs(
    writer: HashingWriter, pool: ThreadPoolExecutor, shard: ShardPlan, plan: Plan, survival: Survival
) -> Iterator[int]:
    """Write the tensors of a shard in its order and yield the bytes of each part; `survival` is added to."""
    for part, measured in in_order(pool, _tasks(shard, plan, writer), IN_FLIGHT):
        if isinstance(part, Room):
            writer.append(part)
        else:
            writer.write(part.data, part.offset)
        if measured is not None:
            survival.merge(measured)
        yield len(part)


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
class Computed:
    """A block that was computed in memory of its own, and where it begins in its file."""

    offset: int
    data: memoryview

    def __len__(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a room: bytes [start, stop) of the base as they are, or its rows with `terms` merged into them."""

    job: TensorJob
    terms: list[LoadedTerm] | None
    start: int
    stop: int
    size: int


# A room that was filled or a block that was computed, and what was measured of its deltas
Done = tuple[Room | Computed, Survival | None]


def _tasks(shard: ShardPlan, plan: Plan, writer: HashingWriter) -> Iterator[Callable[[], Done]]:
    """The file in order: rooms as full as they get, to be filled in place, and blocks that need memory of their own.

    A tensor's deltas are loaded when its first block is asked for.
    """
    pieces: list[Piece] = []
    space, offset = ROOM_BYTES, len(shard.header)

    def room() -> Callable[[], Done]:
        nonlocal pieces, space
        filled, pieces, space = pieces, [], ROOM_BYTES
        return partial(_fill, plan, writer.reserve(sum(piece.size for piece in filled)), filled)

    for job in shard.jobs:
        terms = None if (job.copied and not job.new_rows) or job.streamed else [_load(item) for item in job.deltas]
        begin, offset = offset, offset + job.nbytes
        if job.new_rows is not None:
            if pieces:
                yield room()
            for size, part in grown_parts(job, job.new_rows, partial(_rows, replace(job, new_rows=None), plan, terms)):
                yield partial(_computed, part, writer.hold(size))
            continue
        if job.copied or (terms and _in_place(job, terms, plan, begin)):
            done, end = 0, job.nbytes if job.copied else job.matrix[0]
            while done < end and job.nbytes:
                piece = _piece(job, terms, done, space)
                if piece is None:
                    yield room()
                    continue
                pieces.append(piece)
                done, space = piece.stop, space - piece.size
            continue
        if pieces:
            yield room()
        merge = partial(_merge_streamed, job, plan) if terms is None else partial(_merge, job, plan, terms)
        for start, stop in job.blocks:
            if job.nbytes:
                held = writer.hold((stop - start) * job.nbytes // job.matrix[0])
                yield partial(merge, start, stop, held)
    if pieces:
        yield room()


def _rows(
    job: TensorJob, plan: Plan, terms: list[LoadedTerm] | None, start: int, stop: int
) -> tuple[memoryview, Survival | None]:
    """Rows of a tensor as they are written, in memory of their own."""
    done = _merge_streamed(job, plan, start, stop, 0) if terms is None else _merge(job, plan, terms, start, stop, 0)
    assert isinstance(done[0], Computed)
    return done[0].data, done[1]


def _computed(part: Callable[[], tuple[memoryview, Survival | None]], offset: int) -> Done:
    data, measured = part()
    return Computed(offset, data), measured


def _load(item: WeightedDelta) -> LoadedTerm:
    return LoadedTerm(item.delta.load(), item.weight, item.term)


def _in_place(job: TensorJob, terms: list[LoadedTerm], plan: Plan, offset: int) -> bool:
    """Whether the fused kernel may work in a room of the output: whole numbers, and some rows fit into one."""
    fits = job.nbytes // job.matrix[0] * TILE_ROWS <= ROOM_BYTES and offset % DTYPES[job.dtype].itemsize == 0
    return fits and fusible(terms, plan.recipe.method, job.source.dtype, job.dtype)


def _piece(job: TensorJob, terms: list[LoadedTerm] | None, start: int, space: int) -> Piece | None:
    """What of the job, from byte or row `start` on, fits into `space` bytes: whole tiles of the kernel."""
    if terms is None or job.copied:
        size = min(space, job.nbytes - start)
        return Piece(job, None, start, start + size, size) if size else None
    width, left = job.nbytes // job.matrix[0], job.matrix[0] - start
    count = min(left, space // width)
    count -= count % TILE_ROWS if count < left else 0
    return Piece(job, terms, start, start + count, count * width) if count else None


def _fill(plan: Plan, room: Room, pieces: list[Piece]) -> Done:
    survival, begin = Survival(len(plan.terms)), 0
    for piece in pieces:
        view = room.view[begin : begin + piece.size]
        begin += piece.size
        assert isinstance(piece.job.source, TensorSpec)
        if piece.terms is None:
            piece.job.source.read_into(piece.start, view)
        else:
            _merge_in_place(piece, plan, view, survival)
    return room, survival


def _merge_in_place(piece: Piece, plan: Plan, view: memoryview, survival: Survival) -> None:
    """Read rows of the base into `view` and change them there; a sample is kept to measure what is left of deltas."""
    job, terms, start = piece.job, piece.terms, piece.start
    assert isinstance(job.source, TensorSpec)
    assert terms is not None
    columns = job.matrix[1]
    first = start * columns * DTYPES[job.dtype].itemsize
    job.source.read_into(first, view)
    block = np.frombuffer(view, DTYPES[job.dtype]).reshape(-1, columns)
    tiles = [(row, block[row - start : last - start].copy()) for row, last in sampled(job, start, piece.stop)]
    if not merge_fused(block.view(np.uint16), terms, start):
        job.source.read_into(first, view)
        base = block.copy()
        block[:] = merge_block(base, terms, start, _method(plan, job), job.dtype)[0]
        check_overflow(base, block, job.name)
    _measure(job, plan, terms, tiles, block, start, survival)


def read_rows(job: TensorJob, start: int, stop: int) -> np.ndarray:
    """Rows of the base in their dtype, in a buffer of this thread that its next block reuses: fresh memory costs."""
    rows, columns = job.matrix
    source, width = job.source, job.source.nbytes // rows
    if isinstance(source, TensorSpec):
        raw: bytearray | None = getattr(LOCAL, "buffer", None)
        if raw is None or len(raw) < (stop - start) * width:
            raw = LOCAL.buffer = bytearray((stop - start) * width)
        view = memoryview(raw)[: (stop - start) * width]
        source.read_into(start * width, view)
    else:
        view = source.read_bytes(start * width, stop * width)
    return np.frombuffer(view, DTYPES[source.dtype]).reshape(stop - start, columns)


def _merge(job: TensorJob, plan: Plan, terms: list[LoadedTerm], start: int, stop: int, offset: int) -> Done:
    name, base = job.name, read_rows(job, start, stop)
    survival = Survival(len(plan.terms)) if terms else None
    if survival is None:
        result = cast_block(base, job.dtype, name)
    elif job.deltas[0].delta.replaces:
        result = cast_block(terms[0].delta.rows(start, stop, base.astype(np.float32)), job.dtype, name)
    elif restores(terms, plan.recipe.method):
        original = base.astype(np.float32)
        new = terms[0].delta.restored(start, stop, original)
        result = cast_block(new, job.dtype, name)
        survival.add(result.astype(np.float32) - original, new - original, [(terms[0].term, new - original)])
    else:
        result, total, deltas = merge_block(base, terms, start, _method(plan, job), job.dtype)
        survival.add(result.astype(np.float32) - base.astype(np.float32), total, deltas)
        check_overflow(base, result, name)
    return Computed(offset, memoryview(result.reshape(-1).view(np.uint8))), survival


def _merge_streamed(job: TensorJob, plan: Plan, start: int, stop: int, offset: int) -> Done:
    """The linear sum with one adapter loaded at a time, in the order of operations of the fused kernel.

    Survival is measured on the first STREAM_TILE rows of each block.
    """
    with ONE_AT_A_TIME:
        base = read_rows(job, start, stop)
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
        check_overflow(base, result, job.name)
    survival = Survival(len(plan.terms))
    change = result[:STREAM_TILE].astype(np.float32) - original[:STREAM_TILE]
    survival.add(change, total[:STREAM_TILE], kept, (stop - start) / len(change))
    return Computed(offset, memoryview(result.reshape(-1).view(np.uint8))), survival


def sampled(job: TensorJob, start: int, stop: int, numbers: int = SAMPLE) -> Iterator[tuple[int, int]]:
    """The parts of rows [start, stop) that are measured: about `numbers` of a tensor, all of a small one."""
    for first in range(0, job.matrix[0], TILE * _step(job, numbers)):
        if (begin := max(first, start)) < (end := min(first + TILE, job.matrix[0], stop)):
            yield begin, end


def _step(job: TensorJob, numbers: int) -> int:
    return max(1, math.prod(job.matrix) // numbers)


def _measure(
    job: TensorJob, plan: Plan, terms: list[LoadedTerm], tiles: list[tuple[int, np.ndarray]], block: np.ndarray,
    start: int, survival: Survival,
) -> None:  # fmt: skip
    """Account for the sampled rows of a block: `tiles` are those of the base, each with its first row."""
    rows = job.matrix[0]
    covered = sum(min(rows, first + TILE) - first for first in range(0, rows, TILE * _step(job, SAMPLE)))
    for first, base in tiles:
        _, total, deltas = merge_block(base, terms, first, _method(plan, job), job.dtype)
        written = block[first - start : first - start + len(base)].astype(np.float32) - base.astype(np.float32)
        survival.add(written, total, deltas, rows / covered)


def _method(plan: Plan, job: TensorJob) -> BoundMethod:
    return find_method(plan.recipe.method).bind(plan.recipe.parameters, job.name)


def index_file(weight_map: dict[str, str], nbytes: int) -> bytes:
    """The index of a sharded checkpoint: tensor name to file, and the bytes of all tensors."""
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
