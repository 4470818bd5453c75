"""A merged model written quantised as its base is, on request: merge in float32, encode, and see what is left.

    base (decoded, or its original) ──► merged in float32 ──► rounded to what it was quantised from ──► stored tensors
    stored tensors ──decode──► R, the change that came through          survival = ⟨R, Δᵢ⟩ / ⟨D, Δᵢ⟩, as for rounding

A grid of 4 bits is coarse: an adapter merged into the numbers that a base decodes to is mostly rounded back onto them,
so the share that survives is measured on what was written, and a result that lost an adapter is refused. Merged into
the original (base_precision) it survives, because those numbers lie off the grid. Layers that nothing changes keep the
base's own bytes, and so do the tensors that are not quantised.

Encoded layers are spooled to a file in the sink's folder, since the header of a shard precedes them and the JSON in a
quantisation state has no fixed length.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from composer.checkpoint import INDEX, Shard
from composer.errors import ErasedAdapterError, RecipeError, UnsupportedQuantisationError
from composer.files import copy_names
from composer.kernels import LoadedTerm, Survival, cast_block, merge_block
from composer.methods import find_method
from composer.plan import IN_FLIGHT, ROOMS, THREADS, Plan, ShardPlan, TensorJob
from composer.quantised import Encodable, Encoder, QuantisedTensor
from composer.recipe import Dtype, Export
from composer.run import Progress, in_order, index_file, read_rows, sampled, write_jobs
from composer.sinks import FolderSink
from composer.tensors import DTYPES, TensorSpec, encode_header
from composer.writer import HashingWriter, Staging

__all__ = ["check_requantise", "requantise", "requantised_companions", "requantised_files"]

SAMPLE = 1 << 18  # numbers of a tensor whose survival is measured: the grid's noise needs more of them than rounding's


@dataclass(frozen=True, slots=True)
class Sample:
    """A tile of rows before it was encoded, float32: the base, the exact sum, and each term's own delta."""

    start: int
    base: np.ndarray
    total: np.ndarray
    deltas: list[tuple[int, np.ndarray]]


def check_requantise(plan: Plan) -> None:
    """Raise before anything is written when the result cannot be written quantised as the base is.

    Raises RecipeError (another dtype or export is asked for as well) or UnsupportedQuantisationError (the base is not
    quantised, or its scheme is only read).
    """
    recipe, scheme = plan.recipe, plan.quantised.scheme
    if recipe.dtype is not Dtype.KEEP or recipe.export is not Export.SAFETENSORS:
        raise RecipeError(
            "requantise writes the base's own format: it goes with no other dtype or export",
            expected={"dtype": "keep", "export": "safetensors"},
            found={"dtype": recipe.dtype.value, "export": recipe.export.value},
            remedy="leave one of them out",
        )
    if plan.config_changes:
        raise RecipeError(
            "requantise writes the base's own tensors: this result has others",
            expected="no untied ends, replicated layers or resized vocabulary",
            found=plan.config_changes,
            remedy="compose without requantise, and quantise the result with the library that quantised the base",
        )
    layers = [tensor for tensor in plan.quantised.tensors.values() if isinstance(tensor, QuantisedTensor)]
    if scheme is None or not all(isinstance(tensor.decoder, Encodable) for tensor in layers):
        raise UnsupportedQuantisationError(
            f"the result cannot be written as {scheme.name}" if scheme else "the base is not quantised",
            expected="a base quantised by bitsandbytes",
            found=scheme.name if scheme else "unquantised weights",
            remedy="leave requantise out and quantise the result with the library that quantised the base",
        )


def requantised_files(plan: Plan) -> dict[str, int]:
    """The large files that it will write, and how many bytes each, but for the few digits of a quantisation state."""
    files = {}
    for shard in plan.quantised.shards:
        specs = shard.header.tensors.values()
        header = encode_header([(spec.name, spec.dtype, spec.shape) for spec in specs], {"format": "pt"})
        files[shard.name] = len(header) + sum(spec.nbytes for spec in specs)
    return files


def requantised_companions(plan: Plan) -> Iterator[tuple[str, bytes]]:
    """The base's own small files: the result is that base with other numbers."""
    for name in copy_names(plan.quantised.files):
        yield name, plan.quantised.files[name].read_bytes()


def requantise(plan: Plan, sink: FolderSink, progress: Progress) -> Survival:
    """Write the weights, their index and the files that go along; the sink is not committed.

    Raises ErasedAdapterError when less of an adapter is left than the recipe's min_survival.
    """
    survival = Survival(len(plan.terms))
    total, done, headers = sum(requantised_files(plan).values()), 0, 0
    weight_map: dict[str, str] = {}
    with (
        ThreadPoolExecutor(THREADS) as pool,
        Staging(ROOMS) as staging,
        tempfile.TemporaryDirectory(dir=sink.folder) as folder,
    ):
        layers = _Layers(plan, pool, Path(folder) / "spool", survival)
        for shard in plan.quantised.shards:
            with sink.open(shard.name, staging) as writer:
                pieces = _write_shard(writer, pool, shard, plan, layers, survival)
                headers += next(pieces)
                for written in pieces:
                    done += written
                    progress("merging", min(headers + done, total), total)
            weight_map |= dict.fromkeys(shard.header.tensors, shard.name)
    _check_survival(plan, survival)
    if plan.quantised.sharded:
        sink.write(INDEX, index_file(weight_map, done))
    for name, data in requantised_companions(plan):
        sink.write(name, data)
    return survival


@dataclass(slots=True)
class _Layers:
    """The changed layers, each encoded when the first shard asks for a part of it; another may hold the rest."""

    plan: Plan
    pool: ThreadPoolExecutor
    spool: Path
    survival: Survival
    _jobs: dict[str, TensorJob] = field(init=False)
    _owners: dict[str, QuantisedTensor] = field(init=False)
    _encoded: dict[str, TensorSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._jobs = {job.source.name: job for job in self.plan.jobs}
        layers = [tensor for tensor in self.plan.quantised.tensors.values() if isinstance(tensor, QuantisedTensor)]
        self._owners = {part.name: layer for layer in layers for part in layer.parts}

    def part(self, spec: TensorSpec) -> TensorSpec:
        """Where the tensor that is written for a stored one lies: in the spool, or in the base."""
        owner = self._owners.get(spec.name)
        if owner is None or not self._jobs[owner.name].deltas:
            return spec
        if spec.name not in self._encoded:
            self._encode(owner, self._jobs[owner.name])
        return self._encoded[spec.name]

    def plain(self, spec: TensorSpec) -> TensorJob | None:
        """How a tensor that is not quantised is merged, in the base's dtype; None where the base's bytes will do."""
        job = self._jobs.get(spec.name)
        own = job is None or (not job.deltas and self.plan.quantised is self.plan.checkpoint)
        return None if own or job is None or spec.name in self._owners else replace(job, dtype=spec.dtype)

    def _encode(self, tensor: QuantisedTensor, job: TensorJob) -> None:
        assert isinstance(tensor.decoder, Encodable)
        encoder = tensor.decoder.encoder()
        samples: list[Sample] = []
        for measured in in_order(self.pool, _blocks(job, self.plan, encoder), IN_FLIGHT):
            samples += measured
        decoder = encoder.finish()
        covered = sum(len(sample.base) for sample in samples)
        for sample in samples:
            written = decoder.rows(sample.start, sample.start + len(sample.base)) - sample.base
            self.survival.add(written, sample.total, sample.deltas, tensor.shape[0] / covered)
        with self.spool.open("ab") as file:
            for part in decoder.parts:
                place = TensorSpec(part.name, part.dtype, part.shape, file.tell(), part.nbytes, self.spool)
                file.write(part.read_bytes(0, part.nbytes))
                self._encoded[part.name] = place


def _write_shard(
    writer: HashingWriter, pool: ThreadPoolExecutor, shard: Shard, plan: Plan, layers: _Layers, survival: Survival
) -> Iterator[int]:
    """Yields the bytes of each piece, the header first. The order is the base's, wider dtypes first, which aligns."""
    stored = [layers.part(spec) for spec in shard.header.tensors.values()]
    stored.sort(key=lambda spec: -DTYPES[spec.dtype].itemsize)
    header = encode_header([(spec.name, spec.dtype, spec.shape) for spec in stored], {"format": "pt"})
    writer.write(header)
    yield len(header)
    for spec in stored:
        if (job := layers.plain(spec)) is not None:
            yield from write_jobs(writer, pool, ShardPlan(shard.name, b"", (job,)), plan, survival)
        else:
            for chunk in spec.chunks():
                writer.write(chunk)
                yield len(chunk)


def _blocks(job: TensorJob, plan: Plan, encoder: Encoder) -> Iterator[Callable[[], list[Sample]]]:
    """One task a block: merge its rows, hand them to the encoder, keep the tiles that are measured."""
    terms = [LoadedTerm(item.delta.load(), item.weight, item.term) for item in job.deltas]
    rows = job.matrix[0]
    height = max(encoder.step, job.block_rows // encoder.step * encoder.step)
    height = rows if job.block_rows >= rows else height
    for start in range(0, rows, height):
        yield partial(_merge, job, plan, encoder, terms, start, min(rows, start + height))


def _merge(
    job: TensorJob, plan: Plan, encoder: Encoder, terms: list[LoadedTerm], start: int, stop: int
) -> list[Sample]:
    base = read_rows(job, start, stop).astype(np.float32)
    if job.deltas[0].delta.replaces:
        encoder.encode(start, cast_block(terms[0].delta.rows(start, stop, base), "F32", job.source.name))
        return []
    method = find_method(plan.recipe.method).bind(plan.recipe.parameters, job.source.name)
    result, total, deltas = merge_block(base, terms, start, method, "F32")
    cast_block(result, encoder.dtype, job.source.name)  # named here where it overflows
    encoder.encode(start, result)
    samples = []
    for first, last in sampled(job, start, stop, SAMPLE):
        part = slice(first - start, last - start)
        tiles = [(term, delta[part].copy()) for term, delta in deltas]
        samples.append(Sample(first, base[part].copy(), total[part].copy(), tiles))
    return samples


def _check_survival(plan: Plan, survival: Survival) -> None:
    least = plan.recipe.min_survival
    for term, share in zip(plan.terms, survival.shares(), strict=True):
        if share is not None and share < least:
            raise ErasedAdapterError(
                f"only {share:.1%} of {term.label} is left after quantising the result again: it was rounded away",
                expected=f"at least {least:.0%} of each adapter (min_survival)",
                found=share,
                remedy="compose without --requantise, or into the original with --base-precision original; "
                f"--min-survival {max(0.0, share):.2g} takes it as it is",
                adapter=term.label,
            )
