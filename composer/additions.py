"""What an adapter adds to a model where it changes none of its weights.

    SoftPrompt   [k, d]             vectors before the embeddings of every input    prompt tuning, p-tuning, CPT …
    Prefix       L x 2 x [h, k, D]  keys and values before the cache of every input prefix tuning, P-Tuning v2
    Bottlenecks  composer.bottlenecks: small networks at the ends of sublayers      Houlsby, Pfeiffer, parallel

    tokens       1 … k      k+1 … k+n
                 virtual    the input: what it attends to, and where it stands, includes the virtual ones

Like a delta, an addition knows where its tensors lie and reads them when it is written. How one becomes part of an
artefact is the exporter's matter. Additions stand after the adapters that change weights, and in the order given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from composer.checkpoint import Checkpoint
from composer.deltas import read_array
from composer.errors import IncompatibleError, RecipeError, TargetMismatchError, UnsupportedAdapterError
from composer.files import read_json
from composer.tensors import TensorSpec

__all__ = [
    "Addition",
    "PlannedAddition",
    "Prefix",
    "SoftPrompt",
    "check_positions",
    "check_stack",
    "check_weight",
    "check_whole",
]


RECORD = "composition.json"


class Addition(Protocol):
    """A part that a model gains."""

    family: ClassVar[str]  # decides what may stand beside it, and how an exporter treats it

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        """The adapter tensors consumed."""
        ...

    @property
    def summary(self) -> str:
        """What it adds, in a few words, for plans and records."""
        ...

    def check(self, label: str, checkpoint: Checkpoint) -> None:
        """Raise IncompatibleError where this base cannot take it, for reasons that shapes do not show."""
        ...

    def bound(self, names: Mapping[str, str]) -> Self:
        """The same for one base; names: from the adapter's parameters to the base's."""
        ...


@dataclass(frozen=True, slots=True)
class PlannedAddition:
    """An addition and the index of its term."""

    addition: Addition
    term: int


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """k vectors that stand before the embeddings of every input (arXiv:2104.08691).

    factors: [tasks, k, r] and [tasks, r, d], whose product for `task` the vectors are multiplied by.
    """

    family: ClassVar[str] = "prompt"

    embeddings: TensorSpec
    factors: tuple[TensorSpec, ...] = ()
    task: int = 0

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return (self.embeddings, *self.factors)

    @property
    def tokens(self) -> int:
        """k, the number of virtual tokens."""
        return self.embeddings.shape[0]

    @property
    def width(self) -> int:
        """d, the numbers of an embedding."""
        return self.embeddings.shape[1]

    @property
    def summary(self) -> str:
        of_task = f" (task {self.task})" if self.factors else ""
        return f"{self.tokens} virtual tokens before every input{of_task}"

    def check(self, label: str, checkpoint: Checkpoint) -> None:
        """Raise UnsupportedAdapterError for an encoder-decoder: it has two inputs to stand before."""
        _check_decoder(label, checkpoint)

    def bound(self, names: Mapping[str, str]) -> Self:
        return self

    def load(self) -> np.ndarray:
        """float32 [k, d]."""
        shared = read_array(self.embeddings)
        if not self.factors:
            return shared
        columns, rows = (read_array(spec)[self.task] for spec in self.factors)
        return shared * (columns @ rows)


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of k virtual tokens, for every layer's cache (arXiv:2101.00190, arXiv:2110.07602).

    `flat` is [k, 2 · layers · heads · head size], as PEFT saves it: of each token, the key and the value of layer
    after layer. Keys are stored as the cache holds them, after any rotation.
    """

    family: ClassVar[str] = "prefix"

    flat: TensorSpec
    layers: int
    heads: int

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return (self.flat,)

    @property
    def tokens(self) -> int:
        """k, the number of virtual tokens."""
        return self.flat.shape[0]

    @property
    def head_size(self) -> int:
        """Numbers a head."""
        return self.flat.shape[1] // (2 * self.layers * self.heads)

    @property
    def summary(self) -> str:
        return f"{self.tokens} virtual tokens in the cache of {self.layers} layers"

    def check(self, label: str, checkpoint: Checkpoint) -> None:
        """Raise TargetMismatchError where the base splits its keys into another number of heads."""
        _check_decoder(label, checkpoint)
        config = checkpoint.config
        heads = next((config[key] for key in ("num_key_value_heads", *HEADS) if config.get(key)), None)
        if heads != self.heads:
            raise TargetMismatchError(
                f"{label} holds the keys of {self.heads} heads a layer, this base has {heads}",
                expected=self.heads,
                found=heads,
                remedy="compose it with the base it was trained on",
                keys=[self.flat.name],
            )

    def bound(self, names: Mapping[str, str]) -> Self:
        return self

    def load(self) -> np.ndarray:
        """float32 [layers, 2, heads, k, head size]: keys, then values."""
        shape = (self.tokens, self.layers, 2, self.heads, self.head_size)
        return np.ascontiguousarray(read_array(self.flat).reshape(shape).transpose(1, 2, 3, 0, 4))


HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


def check_stack(labels: Sequence[str], families: Sequence[Sequence[str]]) -> None:
    """Raise for a stack that has no meaning. families: of the additions of each adapter, none where it changes weights.

    RecipeError where weights are changed after an addition: the order would make no difference. IncompatibleError for a
    prefix beside another prefix or a prompt, since each was trained to be what an input begins with.
    """
    adding = [index for index, found in enumerate(families) if found]
    for index in range(adding[0] if adding else len(labels), len(labels)):
        if not families[index]:
            before = labels[adding[0]]
            raise RecipeError(
                f"{labels[index]} changes weights and stands after {before}, which adds to them: "
                "this order means nothing, the result would be that of the other one",
                expected="adapters that change weights first, then those that add",
                found=list(labels),
                remedy=f"write {labels[index]} before {before}",
            )
    starts = [(labels[index], family) for index in adding for family in families[index] if family in STARTS]
    if len(starts) > 1 and any(family == Prefix.family for _, family in starts):
        raise IncompatibleError(
            f"{' and '.join(label for label, _ in starts)} cannot be combined: a prefix was trained as what every "
            "input begins with, and only one can be",
            expected="one prefix, or any number of prompts",
            found=[f"{label}: {family}" for label, family in starts],
            remedy="leave one of them out; prompts are put one after the other in the order given",
        )


STARTS = (SoftPrompt.family, Prefix.family)


def check_whole(checkpoint: Checkpoint) -> None:
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


def check_positions(labels: Sequence[str], additions: Sequence[Addition], checkpoint: Checkpoint) -> None:
    """Raise IncompatibleError where the virtual tokens of these adapters leave the base no position for an input."""
    tokens = sum(item.tokens for item in additions if isinstance(item, SoftPrompt | Prefix))
    positions = next((checkpoint.config[key] for key in POSITIONS if checkpoint.config.get(key)), None)
    if isinstance(positions, int) and tokens >= positions:
        raise IncompatibleError(
            f"{' and '.join(labels)}: {tokens} virtual tokens, and the base has {positions} positions in all",
            expected=f"fewer than {positions}",
            found=tokens,
            remedy="leave a prompt out, or compose with the base that it was trained on",
        )


POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def check_weight(label: str, weight: float, modules: Sequence[Any]) -> None:
    """Raise RecipeError unless an addition is taken whole or left out."""
    if weight in (0.0, 1.0) and not modules:
        return
    raise RecipeError(
        f"{label} adds to the model: its weight must be 1 (or 0), not {'by module' if modules else f'{weight:g}'}",
        expected=1.0,
        found=weight,
        remedy="leave the weight out",
    )


def _check_decoder(label: str, checkpoint: Checkpoint) -> None:
    if checkpoint.config.get("is_encoder_decoder"):
        raise UnsupportedAdapterError(
            f"{label}: virtual tokens of a model with encoder and decoder are not supported",
            expected="a decoder or an encoder alone",
            found=checkpoint.architecture,
            remedy="serve the base with this adapter loaded by PEFT",
        )
