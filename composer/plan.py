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
from typing import Any

from composer.adapters import Adapter, Binding
from composer.additions import PlannedAddition, SoftPrompt, check_stack, check_weight
from composer.bottlenecks import Bottlenecks, stack_sites
from composer.checkpoint import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, Checkpoint
from composer.deltas import Delta, LowRank
from composer.deltas_checkpoint import CheckpointDelta
from composer.errors import (
    IncompatibleError,
    RecipeError,
    TargetMismatchError,
    TiedWeightsError,
    UnsupportedAdapterError,
)
from composer.files import read_json
from composer.methods import MergeMethod, find_method
from composer.quantised import QuantisedTensor, find_scheme
from composer.recipe import Dtype, ModuleWeight, Recipe
from composer.tensors import DTYPES, FLOAT_DTYPES, TensorSpec, encode_header
from composer.writer import ROOM_BYTES

__all__ = ["NewRows", "Plan", "ShardPlan", "TensorJob", "Term", "WeightedDelta", "encode_shard", "make_plan", "tied"]

RECORD = "composition.json"
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
# Where transformers keeps a weight as [in, out]; all other architectures have plain linear layers.
CONV1D_MODELS = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer")
CONV1D_MODULES = ("c_attn", "q_attn", "c_proj", "c_fc")
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

    `rename` is its name where that is not the base's, `new_rows` what its vocabulary gains.
    """

    source: TensorSpec | QuantisedTensor
    dtype: str
    deltas: tuple[WeightedDelta, ...]
    method: MergeMethod | None = None
    rename: str | None = None
    new_rows: NewRows | None = None

    @property
    def name(self) -> str:
        """Its name in the output."""
        return self.rename or self.source.name

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
        """(rows, numbers a row): the first dimension against the rest."""
        shape = self.source.shape
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
    """All that a run needs.

    An exporter that needs another checkpoint than the merged one derives a plan with other shards, with `files` that
    take the place of the base's or stand beside them, with `config_changes`, and with `facts` and `warnings` for
    composition.json.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    terms: tuple[Term, ...]
    shards: tuple[ShardPlan, ...]
    additions: tuple[PlannedAddition, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

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
        return lanes * (largest + ROOMS * ROOM_BYTES)


def make_plan(recipe: Recipe, checkpoint: Checkpoint, terms: Sequence[Term]) -> Plan:
    """Resolve every adapter tensor to a base tensor, and lay out the output files. Reads headers only.

    A term of weight 0 is checked and then left out, so the output is the same bytes as without it.
    Raises TargetMismatchError unless each adapter tensor is consumed exactly once, TiedWeightsError,
    UnsupportedQuantisationError (the base's weights cannot be decoded), UnsupportedAdapterError (weighted replacement),
    IncompatibleError (two replacements of one tensor, two prefixes, a base with additions beside its weights) or
    RecipeError (unknown method or parameter, too many adapters for it, a module pattern that fits nothing, a
    task that the adapter lacks, weights changed after an addition).
    """
    find_scheme(checkpoint.config)
    _check_whole(checkpoint)
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
    for index, term in enumerate(terms):
        resolved = _resolve(term, checkpoint)
        if term.adapter.adds:
            check_weight(term.label, term.weight, term.modules)
            names = term.adapter.bind(checkpoint.shapes).names
            additions += [
                PlannedAddition(each.bound(names), index) for each in term.adapter.additions() if _counts(term)
            ]
        _check_patterns(term, [delta.target for delta in resolved])
        for delta in resolved:
            if (weight := term.weight_of(delta.target)) != 0.0:
                changes.setdefault(delta.target, []).append(WeightedDelta(delta, weight, index))
    stack_sites([item.addition for item in additions if isinstance(item.addition, Bottlenecks)])
    for target, deltas in changes.items():
        _check_combination(target, deltas, terms, checkpoint)
        _check_factors(method, target, deltas, terms)
    shards = []
    for shard in checkpoint.shards:
        jobs = tuple(
            TensorJob(spec, _output_dtype(recipe.dtype, spec), tuple(changes.get(name, ())), method)
            for name, spec in shard.tensors.items()
        )
        if jobs or len(checkpoint.shards) == 1:
            shards.append(ShardPlan(shard.name, encode_shard(jobs), jobs))
    return Plan(recipe, checkpoint, tuple(terms), tuple(shards), tuple(additions))


def encode_shard(jobs: Sequence[TensorJob]) -> bytes:
    """The header of a file that holds these tensors in order."""
    return encode_header([(job.name, job.dtype, job.shape) for job in jobs], {"format": "pt"})


def _check_whole(checkpoint: Checkpoint) -> None:
    """Raise IncompatibleError for a composed model whose additions lie beside its weights: they would be lost."""
    record = read_json(checkpoint.files[RECORD]) if RECORD in checkpoint.files else {}
    added = record.get("additions")
    beside = isinstance(record.get("export"), dict) and record["export"].get("format") != "safetensors"
    if added and beside:
        raise IncompatibleError(
            f"the base is a composition whose additions lie beside its weights: {record.get('recipe_text')}",
            expected="a base that is all in its weights",
            found=added,
            remedy="compose from the base that it was made of, with its adapters in the recipe",
        )


def _resolve(term: Term, checkpoint: Checkpoint) -> list[Delta]:
    binding = term.adapter.bind(checkpoint.shapes)
    touched = [*binding.names, *binding.names.values()]
    head = next((name for name in touched if name.endswith(OUTPUT_EMBEDDINGS)), None)
    embedding = next((name for name in touched if name.endswith(INPUT_EMBEDDINGS)), None)
    stored = getattr(term.adapter.kind, "stored_tensors", False)
    if (head or embedding) and not stored and tied(checkpoint):
        raise TiedWeightsError(
            f"{term.label} changes {head or embedding}, which this base shares between embedding and output head",
            expected="an adapter that touches neither end, or a base with tie_word_embeddings false and both tensors",
            found=head or embedding,
            remedy="untie the base and register it anew, or train the adapter without that module",
            keys=[head or embedding],
        )
    if binding.mismatches:
        _check_vocabulary(term.label, binding)
        listed = "; ".join(map(str, binding.mismatches[:3]))
        raise TargetMismatchError(
            f"{term.label}: {len(binding.mismatches)} of {len(term.adapter.signature.targets)} tensors do not fit the "
            f"base: {listed}",
            expected="a base whose tensors match the adapter's in name and shape",
            found=[str(mismatch) for mismatch in binding.mismatches[:20]],
            remedy="see 'registry bases ADAPTER' for the bases it fits",
            keys=[mismatch.parameter for mismatch in binding.mismatches],
        )
    deltas, additions = term.adapter.deltas(binding.names), term.adapter.additions()
    consumed = {source.name for part in (*deltas, *additions) for source in part.sources}
    wrong = sorted(set(term.adapter.header.tensors) ^ consumed)
    targets = [delta.target for delta in deltas]
    if wrong or len(set(targets)) != len(targets):
        wrong = wrong or sorted({target for target in targets if targets.count(target) > 1})
        raise TargetMismatchError(
            f"{term.label}: {len(wrong)} tensors would not be used exactly once: {', '.join(wrong[:3])}",
            expected="every tensor of the adapter consumed exactly once",
            found=wrong[:20],
            remedy="the adapter's file and its config do not belong together: save it again",
            keys=wrong,
        )
    for delta in deltas:
        _check_layout(term.label, delta, checkpoint)
    for addition in additions:
        addition.check(term.label, checkpoint)
    return deltas


def _check_vocabulary(label: str, binding: Binding) -> None:
    """Raise TargetMismatchError with both sizes where an embedding or head differs in its number of rows alone."""
    for mismatch in binding.mismatches:
        end, found = mismatch.parameter.endswith(INPUT_EMBEDDINGS + OUTPUT_EMBEDDINGS), mismatch.found
        if end and found and found[1:] == mismatch.expected[1:]:
            raise TargetMismatchError(
                f"{label}: {mismatch.parameter} has {mismatch.expected[0]} rows in the adapter and {found[0]} in the "
                "base: the vocabulary was resized for the training",
                expected=list(mismatch.expected),
                found=list(found),
                remedy=f"resize the base as the training did (resize_token_embeddings({mismatch.expected[0]})), "
                "save it and compose with that base",
                keys=[mismatch.parameter],
            )


def _check_layout(label: str, delta: Delta, checkpoint: Checkpoint) -> None:
    """A square matrix does not show whether the adapter's layout is the base's; the architecture does."""
    shape = checkpoint.tensors[delta.target].shape
    transposed = getattr(delta, "transposed", None)
    if transposed is None or getattr(delta, "embedding", False) or len(shape) != 2 or shape[0] != shape[1]:
        return
    module = delta.target.removesuffix(".weight").rpartition(".")[2]
    conv1d = checkpoint.config.get("model_type") in CONV1D_MODELS and module in CONV1D_MODULES
    if transposed != conv1d:
        raise IncompatibleError(
            f"{label}: fan_in_fan_out={transposed} in adapter_config.json, but {delta.target} is "
            f"{'[in, out]' if conv1d else '[out, in]'} in this base",
            expected=conv1d,
            found=transposed,
            remedy="correct fan_in_fan_out in adapter_config.json and publish the adapter again",
        )


def tied(checkpoint: Checkpoint) -> bool:
    """Whether the base shares its embedding with its output head.

    A stored head that the config does not tie is its own tensor; without one, a language model can only be tied.
    An encoder without any head is not tied to anything. A config that does not say counts as tied: that was the
    default of transformers before 5, and a refusal harms less than a head that is overwritten on loading.
    """
    has_head = any(name.endswith(OUTPUT_EMBEDDINGS) for name in checkpoint.tensors)
    generates = checkpoint.architecture.endswith(
        ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")
    )
    if not has_head:
        return generates
    config = checkpoint.config
    nested = config.get("text_config")
    inner = nested.get("tie_word_embeddings", True) if isinstance(nested, dict) else True
    return bool(config.get("tie_word_embeddings", inner))


def _check_combination(target: str, deltas: list[WeightedDelta], terms: Sequence[Term], checkpoint: Checkpoint) -> None:
    spec = checkpoint.tensors[target]
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
    if isinstance(item.delta, CheckpointDelta):
        return item.delta.loaded_bytes
    return sum(math.prod(source.shape) * 4 for source in item.delta.sources)


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
    widths += DECODING if isinstance(job.source, QuantisedTensor) else 0
    if job.method and job.method.name != "linear":
        widths += SCRATCH * len(job.deltas)
    return min(rows, job.block_rows) * columns * widths
