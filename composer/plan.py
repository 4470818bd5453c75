"""From a recipe and headers to a frozen list of jobs: every name, shape and error is known before a byte is read.

    Plan
    ├── ShardPlan model-00001-of-00002.safetensors     header bytes + jobs in file order
    │   ├── TensorJob model.embed_tokens.weight        no deltas: copied
    │   └── TensorJob model.layers.0…q_proj.weight     deltas: read, merged, rounded once
    ├── …
    └── PlannedAddition                               what adapters add besides, in the order of the recipe

The output keeps the base's files and order, so the plan is also an honest dry run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from composer.adapters import Adapter
from composer.additions import PlannedAddition, SoftPrompt, check_positions, check_stack, check_weight, check_whole
from composer.bottlenecks import Bottlenecks, stack_sites
from composer.checkpoint import Checkpoint
from composer.deltas import Delta, LowRank, Replace
from composer.deltas_checkpoint import CheckpointDelta
from composer.deltas_experts import ExpertLowRank, ExpertSlice
from composer.deltas_residual import Residual
from composer.ends import Ends, tied_ends, untie
from composer.errors import (
    IncompatibleError,
    RecipeError,
    UnsupportedAdapterError,
)
from composer.methods import MergeMethod, find_method
from composer.places import places
from composer.quantised import QuantisedTensor, find_scheme
from composer.recipe import Dtype, ModuleWeight, Recipe
from composer.replication import layer_map, replicate
from composer.resolve import resolve
from composer.tensors import DTYPES, FLOAT_DTYPES, TensorSpec, encode_header
from composer.vocabulary import Vocabulary, resized_vocabulary
from composer.writer import ROOM_BYTES

if TYPE_CHECKING:
    from composer.apart import ApartAdapter

__all__ = ["NewRows", "Plan", "ShardPlan", "TensorJob", "Term", "WeightedDelta", "encode_shard", "make_plan"]

BLOCK_BYTES = 2 << 20
TILE_ROWS = 4  # the compiled kernel merges so many rows at a time, the rest of a block slowly
STREAM_BYTES = 16 << 20  # the same where adapters are loaded one after another for each block
FACTOR_BYTES = 64 << 20  # more factors than this are not held at once
THREADS = min(4, os.cpu_count() or 1)
LANES = 2  # files that are written at a time
IN_FLIGHT = THREADS  # blocks of each that are begun and not yet passed on
ROOMS = IN_FLIGHT + 3  # buffers of each: those, and some on their way to the disk
DECODING = 16  # bytes a number that a decoder holds besides its result: stored numbers, scales, one copy
SCRATCH = 32  # bytes a number and delta that a method holds besides its arguments: masks, ranks, random numbers
SAFETENSORS_DTYPE = {Dtype.BF16: "BF16", Dtype.FP16: "F16", Dtype.FP32: "F32"}


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter of a recipe, opened: `label` names it in messages and in the provenance."""

    label: str
    adapter: Adapter
    weight: float
    modules: tuple[ModuleWeight, ...] = ()
    task: int | None = None

    def weight_of(self, target: str) -> float:
        """The weight of the first pattern in `modules` that fits the base tensor's name, else `weight`."""
        return next((entry.weight for entry in self.modules if entry.fits(target)), self.weight)


@dataclass(frozen=True, slots=True)
class WeightedDelta:
    """A delta, its weight and the index of its term."""

    delta: Delta
    weight: float
    term: int


@dataclass(frozen=True, slots=True)
class NewRows:
    """Rows [start, start + count) of a vocabulary's tensor, in place of its own where it has as many.

    They are the prompts' vectors divided by `scale`; without prompts, each is the mean of the rows before `start`.
    """

    start: int
    count: int
    prompts: tuple[SoftPrompt, ...] = ()
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class TensorJob:
    """One tensor of the output: `source` is where the base's lies, `dtype` what is written.

    `renamed` is its name where that is not the source's: the head of a pair that is tied in the base. `new_rows` is
    what its vocabulary gains.
    """

    source: TensorSpec | QuantisedTensor
    dtype: str
    deltas: tuple[WeightedDelta, ...]
    method: MergeMethod | None = None
    renamed: str | None = None
    new_rows: NewRows | None = None

    @property
    def name(self) -> str:
        """The name in the output."""
        return self.renamed or self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the output."""
        if self.new_rows is None:
            return self.source.shape
        return (max(self.source.shape[0], self.new_rows.start + self.new_rows.count), *self.source.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def copied(self) -> bool:
        """Whether the base's bytes go through as they are."""
        return not self.deltas and self.dtype == self.source.dtype and isinstance(self.source, TensorSpec)

    @property
    def block_rows(self) -> int:
        """How many rows are merged at once: a float32 block stays within BLOCK_BYTES, unless all are needed."""
        rows, columns = self.matrix
        if any(item.delta.whole for item in self.deltas) or (self.deltas and self.method and self.method.whole):
            return rows
        count = max(1, (STREAM_BYTES if self.streamed else BLOCK_BYTES) // (4 * max(columns, 1)))
        return count if count < TILE_ROWS else count - count % TILE_ROWS

    @property
    def streamed(self) -> bool:
        """Whether the factors are too large to hold at once: a linear sum then takes one adapter after another."""
        if self.method is None or self.method.name != "linear" or any(item.delta.whole for item in self.deltas):
            return False
        if any(isinstance(item.delta, CheckpointDelta) for item in self.deltas):
            return False
        return sum(map(_loaded_bytes, self.deltas)) > FACTOR_BYTES

    @property
    def blocks(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of each block of rows, adjacent and in order."""
        rows = self.matrix[0]
        for start in range(0, rows, self.block_rows):
            yield start, min(rows, start + self.block_rows)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, numbers a row): the first dimension against the rest; of a stack of experts all but the last.

        One expert may be a hundred times larger than a block. A quantised one is decoded whole.
        """
        shape = self.source.shape
        stacked = self.deltas and all(getattr(item.delta, "stacked", False) for item in self.deltas)
        if stacked and isinstance(self.source, TensorSpec):
            return math.prod(shape[:-1]), shape[-1]
        return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file."""

    name: str
    header: bytes
    jobs: tuple[TensorJob, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(job.nbytes for job in self.jobs)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a run needs. `quantised` is the recipe's own base where `checkpoint` is its original, else the same.

    An exporter that needs another checkpoint than the merged one derives a plan with other shards, with `files` that
    take the place of the base's or stand beside them, with `config_fields`, and with `facts` and `warnings` for
    composition.json.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    terms: tuple[Term, ...]
    shards: tuple[ShardPlan, ...]
    quantised: Checkpoint
    additions: tuple[PlannedAddition, ...] = ()
    untied: Ends | None = None
    layers: tuple[int, ...] | None = None  # the base's layer that each of the output's is, where some are used again
    vocabulary: Vocabulary | None = None  # where it is not the base's
    files: Mapping[str, bytes] = field(default_factory=dict)
    config_fields: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    apart: tuple[ApartAdapter, ...] = ()  # adapters beside the weights, which are then the base's own

    @property
    def config_changes(self) -> dict[str, Any]:
        """Fields of config.json that the output needs otherwise than the base, besides its number format."""
        changes: dict[str, Any] = {"tie_word_embeddings": False} if self.untied else {}
        changes |= {"num_hidden_layers": len(self.layers)} if self.layers else {}
        changes |= {"vocab_size": self.vocabulary.size} if self.vocabulary else {}
        return {**changes, **self.config_fields}

    @property
    def nbytes(self) -> int:
        """Bytes of weights written."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def jobs(self) -> tuple[TensorJob, ...]:
        """All jobs, in file order."""
        return tuple(job for shard in self.shards for job in shard.jobs)

    @property
    def touched(self) -> int:
        """How many tensors a delta changes."""
        return sum(bool(job.deltas) for job in self.jobs)

    @property
    def config_dtype(self) -> str | None:
        """The dtype that config.json of the output has to name; None where the base's own config.json goes along."""
        if self.recipe.dtype is not Dtype.KEEP:
            return SAFETENSORS_DTYPE[self.recipe.dtype]
        kept = (job.dtype for job in self.jobs if isinstance(job.source, QuantisedTensor))
        return next(kept, "BF16") if self.checkpoint.scheme else None

    @property
    def peak_bytes(self) -> int:
        """An upper bound on the bytes a run holds at once: the factors of the tensors in flight, and their blocks."""
        lanes = min(LANES, len(self.shards))
        largest = max((_factor_bytes(job) + IN_FLIGHT * _block_bytes(job) for job in self.jobs), default=0)
        return lanes * (largest + ROOMS * ROOM_BYTES) + (self._largest_layer if self.recipe.requantise else 0)

    @property
    def _largest_layer(self) -> int:
        layers = (tensor for tensor in self.quantised.tensors.values() if isinstance(tensor, QuantisedTensor))
        return max((sum(part.nbytes for part in tensor.parts) for tensor in layers), default=0)


def make_plan(
    recipe: Recipe, checkpoint: Checkpoint, terms: Sequence[Term], quantised: Checkpoint | None = None
) -> Plan:
    """Resolve every adapter tensor to a base tensor, and lay out the output files. Reads headers only.

    checkpoint: what is merged into. quantised: the recipe's base, where that is the quantised form of `checkpoint`.
    A term of weight 0 is checked and then left out, so the output is the same bytes as without it.
    Raises TargetMismatchError unless each adapter tensor is consumed exactly once, TiedWeightsError (one end of a tied
    pair changes, and the recipe does not untie), UnsupportedQuantisationError (the base's weights cannot be decoded),
    UnsupportedAdapterError (weighted replacement), IncompatibleError (two replacements of one tensor, two prefixes,
    more virtual tokens than positions, a base with additions beside its weights) or RecipeError (unknown method or
    parameter, too many adapters for it, a module pattern that fits nothing, a task that the adapter lacks, weights
    changed after an addition).
    """
    find_scheme(checkpoint.config)
    check_whole(checkpoint)
    layers = _layers([term for term in terms if _counts(term)])
    base, checkpoint = checkpoint, replicate(checkpoint, layers) if layers else checkpoint
    method = find_method(recipe.method)
    method.resolve(recipe.parameters)
    terms = [replace(term, adapter=term.adapter.for_task(term.label, term.task)) for term in terms]
    counted = [term for term in terms if _counts(term)]
    _check_terms(method, [term for term in counted if not term.adapter.adds])
    check_stack(
        [term.label for term in counted],
        [[addition.family for addition in term.adapter.additions()] for term in counted],
    )
    additions: list[PlannedAddition] = []
    changes: dict[str, list[WeightedDelta]] = {}
    ends = tied_ends(checkpoint)
    for index, term in enumerate(terms):
        own = layer_map(term.adapter.config)
        view = checkpoint if own == layers else replicate(base, own) if own else base
        resolved = resolve(term, view, ends, untie=recipe.untie)
        if term.adapter.adds:
            check_weight(term.label, term.weight, term.modules)
            names = term.adapter.bind(places(view)).names
            bound = [each.bound(names) for each in term.adapter.additions()]
            additions += [PlannedAddition(each, index) for each in bound if _counts(term)]
        _check_patterns(term, [delta.target for delta in resolved])
        for delta in resolved:
            if (weight := term.weight_of(delta.target)) != 0.0:
                changes.setdefault(delta.target, []).append(WeightedDelta(delta, weight, index))
    check_positions([terms[item.term].label for item in additions], [item.addition for item in additions], checkpoint)
    stack_sites([item.addition for item in additions if isinstance(item.addition, Bottlenecks)])
    labels = [term.label for term in terms]
    untied, changes = untie(ends, changes, labels)
    sources = _sources(checkpoint, untied)
    vocabulary = resized_vocabulary(checkpoint, changes, [term.adapter.files for term in terms], labels)
    for target, deltas in changes.items():
        _check_combination(target, deltas, terms, sources[target])
        _check_factors(method, target, deltas, terms)
    shards = []
    for shard in checkpoint.shards:
        names = list(shard.tensors)
        if untied and untied.embedding in names and untied.head not in checkpoint.tensors:
            names.insert(names.index(untied.embedding) + 1, untied.head)
        jobs = tuple(_job(name, sources[name], tuple(changes.get(name, ())), recipe, method) for name in names)
        if jobs or len(checkpoint.shards) == 1:
            shards.append(ShardPlan(shard.name, encode_shard(jobs), jobs))
    quantised = quantised or base
    added = tuple(additions)
    return Plan(recipe, checkpoint, tuple(terms), tuple(shards), quantised, added, untied, layers, vocabulary)


def encode_shard(jobs: Sequence[TensorJob]) -> bytes:
    """The header of a file that holds these tensors in order."""
    return encode_header([(job.name, job.dtype, job.shape) for job in jobs], {"format": "pt"})


def _job(
    name: str,
    source: TensorSpec | QuantisedTensor,
    deltas: tuple[WeightedDelta, ...],
    recipe: Recipe,
    method: MergeMethod,
) -> TensorJob:
    """One tensor of the output; what a Replace brings in another shape than the base's is read where that lies."""
    dtype = _output_dtype(recipe.dtype, source)
    if deltas and isinstance(deltas[0].delta, Replace) and deltas[0].delta.tensor.shape != source.shape:
        source = deltas[0].delta.tensor
    return TensorJob(source, dtype, deltas, method, None if source.name == name else name)


def _layers(terms: Sequence[Term]) -> tuple[int, ...] | None:
    """How the terms replicate the base's layers. Raises IncompatibleError where they disagree."""
    maps = {layer_map(term.adapter.config) for term in terms}
    if len(maps) > 1:
        raise IncompatibleError(
            "the adapters use the base's layers in different ways (layer_replication): they are of models of different "
            "depth",
            expected="one layer_replication in all adapters",
            found={term.label: term.adapter.config.get("layer_replication") for term in terms},
            remedy="compose the one that replicates layers first, and the others with the result",
        )
    return maps.pop() if maps else None


def _sources(checkpoint: Checkpoint, untied: Ends | None) -> dict[str, TensorSpec | QuantisedTensor]:
    """Where the base's numbers of each output tensor lie; an untied head begins as the embedding that it was."""
    return {**checkpoint.tensors, **({untied.head: checkpoint.tensors[untied.embedding]} if untied else {})}


def _check_combination(
    target: str, deltas: list[WeightedDelta], terms: Sequence[Term], spec: TensorSpec | QuantisedTensor
) -> None:
    if spec.dtype not in FLOAT_DTYPES:
        raise UnsupportedAdapterError(
            f"{target} is {spec.dtype}: merging into a quantised base is not supported yet",
            expected=sorted(FLOAT_DTYPES),
            found=spec.dtype,
            remedy="dequantise the base first and register the result",
        )
    replacements = [item for item in deltas if item.delta.replaces]
    if replacements and len(deltas) > 1:
        labels = [terms[item.term].label for item in deltas]
        raise IncompatibleError(
            f"{target}: {' and '.join(labels)} cannot be combined, one of them replaces the whole tensor",
            expected="at most one adapter that trains this tensor whole",
            found=labels,
            remedy="compose one of them, or merge one into a new base first",
        )
    for item in replacements:
        if item.weight != 1.0:
            raise RecipeError(
                f"{terms[item.term].label} replaces {target}: its weight must be 1 (or 0), not {item.weight:g}",
                expected=1.0,
                found=item.weight,
                remedy="leave the weight out",
            )


def _counts(term: Term) -> bool:
    return any(weight != 0.0 for weight in (term.weight, *(entry.weight for entry in term.modules)))


def _check_terms(method: MergeMethod, terms: Sequence[Term]) -> None:
    """Raise RecipeError when `method` combines fewer adapters than these."""
    if method.terms is not None and len(terms) > method.terms:
        raise RecipeError(
            f"method {method.name!r} combines {method.terms} adapters, not {len(terms)}",
            expected=f"at most {method.terms} of a weight other than 0",
            found=[term.label for term in terms],
            remedy="leave adapters out, or choose another method",
        )


def _check_patterns(term: Term, targets: Sequence[str]) -> None:
    for entry in term.modules:
        if not any(entry.fits(target) for target in targets):
            raise RecipeError(
                f"{term.label}: no tensor that it changes is named like {entry.pattern!r}",
                expected="a glob that fits a tensor of the base, such as *.layers.0.*",
                found=entry.pattern,
                remedy=f"its tensors are {', '.join(targets[:3])}{', …' if len(targets) > 3 else ''}",
            )


def _check_factors(method: MergeMethod, target: str, deltas: list[WeightedDelta], terms: Sequence[Term]) -> None:
    """A method on factors combines plain LoRA only, some of them of one rank only."""
    if not method.factors or deltas[0].delta.replaces:
        return
    for item in deltas:
        if not isinstance(item.delta, LowRank):
            raise IncompatibleError(
                f"method {method.name!r} works on low-rank factors: {terms[item.term].label} has none for {target}",
                expected="adapters of kind lora",
                found=type(item.delta).__name__,
                remedy="use a method on whole deltas, such as linear or ties",
            )
    ranks = [item.delta.a.shape[0] for item in deltas if isinstance(item.delta, LowRank)]
    if method.equal_ranks and len(set(ranks)) > 1:
        raise IncompatibleError(
            f"method {method.name!r} combines A and B apart: {target} has adapters of ranks {ranks}",
            expected="one rank",
            found=ranks,
            remedy="use a method in product space, such as linear or ties",
        )


def _output_dtype(dtype: Dtype, spec: TensorSpec | QuantisedTensor) -> str:
    if dtype is Dtype.KEEP and isinstance(spec, QuantisedTensor):
        return spec.kept
    if dtype is Dtype.KEEP or spec.dtype not in FLOAT_DTYPES:
        return spec.dtype
    return SAFETENSORS_DTYPE[dtype]


def _loaded_bytes(item: WeightedDelta) -> int:
    if isinstance(item.delta, CheckpointDelta | ExpertLowRank | ExpertSlice):
        return item.delta.loaded_bytes
    held: int = getattr(item.delta, "held", 0)
    return held + sum(math.prod(source.shape) * 4 for source in item.delta.sources)


def _factor_bytes(job: TensorJob) -> int:
    """Of one tensor's deltas, in float32; as many more small tensors may be loaded as blocks are in flight."""
    if job.streamed:
        return max(map(_loaded_bytes, job.deltas))
    return sum(map(_loaded_bytes, job.deltas)) * (IN_FLIGHT if job.block_rows >= job.matrix[0] else 2)


def _block_bytes(job: TensorJob) -> int:
    if job.copied:
        return 0
    rows, columns = job.matrix
    # base, its float32, the result in float32 and rounded, one product a delta
    widths = DTYPES[job.source.dtype].itemsize + 4 + 4 + DTYPES[job.dtype].itemsize
    widths += 4 * (2 if job.streamed else len(job.deltas))
    widths += sum(getattr(item.delta, "scratch", 0) for item in job.deltas)
    widths += DECODING if isinstance(job.source, QuantisedTensor) else 0
    if job.method and job.method.name != "linear":
        widths += SCRATCH * len(job.deltas)
    scratch = sum(item.delta.scratch_bytes(rows, columns) for item in job.deltas if isinstance(item.delta, Residual))
    return min(rows, job.block_rows) * columns * widths + scratch
