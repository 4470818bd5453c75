"""A vocabulary that the training resized: both ends of the model in another number of rows, and a tokenizer to match.

PEFT saves both ends whole with such an adapter. They take the places of the base's, config.json gets the new
vocab_size, and the tokenizer comes from the adapter's folder in place of the base's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from composer.checkpoint import Checkpoint
from composer.deltas import Replace
from composer.ends import Ends, decoder_ends
from composer.errors import TargetMismatchError
from composer.files import FileSet

if TYPE_CHECKING:
    from composer.plan import WeightedDelta

__all__ = ["Vocabulary", "refuse_resized", "resized_vocabulary", "tokenizer_files"]

TOKENIZER = re.compile(
    r"tokenizer.*\.json|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json"
    r"|.*\.(model|tiktoken|jinja)"
)
MODELS = ("tokenizer.json", "vocab.json", "vocab.txt")  # one of these, or a .model, holds the tokens themselves


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How many tokens the output has, and the files of their tokenizer."""

    size: int
    tokenizer: FileSet


def tokenizer_files(files: FileSet) -> dict[str, Path]:
    """The files of a tokenizer, chat template included."""
    return {name: path for name, path in files.items() if "/" not in name and TOKENIZER.fullmatch(name)}


def resized_vocabulary(
    checkpoint: Checkpoint,
    changes: Mapping[str, Sequence[WeightedDelta]],
    files: Sequence[FileSet],
    labels: Sequence[str],
) -> Vocabulary | None:
    """The vocabulary of the output; None where it is the base's.

    files, labels: of the terms. Raises TargetMismatchError where one end alone changes its number of rows, or where the
    adapter has no tokenizer.
    """
    ends = decoder_ends(checkpoint)
    resized = {}
    for name, items in changes.items():
        delta = items[0].delta
        if isinstance(delta, Replace) and delta.tensor.shape != _shape(checkpoint, name, ends):
            resized[name] = items[0]
    if not resized:
        return None
    name, item = next(iter(resized.items()))
    label, size = labels[item.term], item.delta.tensor.shape[0]
    rows = _shape(checkpoint, name, ends)[0]
    both = (ends.embedding, ends.head) if ends else ()
    written = {end for end in both if end in checkpoint.tensors or end in changes}
    whole = written == set(resized) and all(other.delta.tensor.shape[0] == size for other in resized.values())
    bias = ends is not None and f"{ends.head.removesuffix('.weight')}.bias" in checkpoint.tensors
    if not whole or bias or checkpoint.config.get("vocab_size") != rows:
        raise refuse_resized(label, name, (size,), (rows,))
    tokenizer = tokenizer_files(files[item.term])
    if not any(file in MODELS or file.endswith(".model") for file in tokenizer):
        raise TargetMismatchError(
            f"{label} resizes the vocabulary from {rows} to {size} tokens, and has no tokenizer for them",
            expected="tokenizer.json (or tokenizer.model, vocab.json, vocab.txt) beside the adapter",
            found=sorted(tokenizer) or "none",
            remedy="save the tokenizer of the training into the adapter's folder (tokenizer.save_pretrained)",
            keys=sorted(resized),
        )
    return Vocabulary(size, tokenizer)


def refuse_resized(label: str, name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> TargetMismatchError:
    """The error for an end of the model in another number of rows than the base's, where the output cannot have it.

    expected, found: the shapes in the adapter and in the base; the first sizes are the numbers of rows.
    """
    return TargetMismatchError(
        f"{label}: {name} has {expected[0]} rows in the adapter and {found[0]} in the base: the vocabulary was resized "
        "for the training",
        expected=list(expected),
        found=list(found),
        remedy=f"resize the base as the training did (resize_token_embeddings({expected[0]})), save it and compose "
        "with that base; only an adapter that holds both ends of a decoder whole, and its tokenizer, brings its own",
        keys=[name],
    )


def _shape(checkpoint: Checkpoint, name: str, ends: Ends | None) -> tuple[int, ...]:
    """Of the base's tensor; a head that is not stored is its embedding."""
    stored = name if name in checkpoint.tensors or ends is None else ends.embedding
    return checkpoint.tensors[stored].shape
