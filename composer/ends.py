"""The two ends of a language model: the input embedding and the output head, which may be one tensor.

    tied(checkpoint)                whether they are
    with_tied_head(shapes, …)       shapes that an adapter may bind to: the stored ones, and a tied head under its name
    keep_tied(label, deltas, …)     the deltas of one adapter, checked against the tie
    keep_shared(label, deltas, …)   the same where the ends are two, and one embedding serves encoder and decoder
    untie(ends, changes, …)         the head as a tensor of its own, where an adapter changes one end and not the other

PEFT's own merge of an adapter on one end changes both; its live forward, which the training saw, changes that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from composer.checkpoint import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, Checkpoint
from composer.deltas import Delta, Replace
from composer.deltas_rows import TokenRows
from composer.errors import IncompatibleError, TiedWeightsError

if TYPE_CHECKING:
    from composer.plan import WeightedDelta

__all__ = [
    "Ends",
    "is_end",
    "is_shared",
    "keep_shared",
    "keep_tied",
    "refuse_tied",
    "tied",
    "tied_ends",
    "untie",
    "with_tied_head",
]

DECODERS = ("LMHeadModel", "ForCausalLM")
GENERATING = (*DECODERS, "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")
OWN_HEADS = ("mt5", "umt5")  # transformers 5 calls them tied in every config; a head that is stored is its own
SHARED = "shared.weight"
HEADS = {"embed_in.weight": "embed_out.weight"}  # GPT-NeoX; all other decoders call it lm_head


@dataclass(frozen=True, slots=True)
class Ends:
    """The names of a tied pair; the head's need not be stored."""

    embedding: str
    head: str


def is_end(name: str) -> bool:
    """Whether a tensor of this name is an input embedding or an output head."""
    return name.endswith(INPUT_EMBEDDINGS + OUTPUT_EMBEDDINGS)


def tied(checkpoint: Checkpoint) -> bool:
    """Whether the base shares its embedding with its output head.

    A stored head that the config does not tie is its own tensor; without one, a language model can only be tied.
    An encoder without any head is not tied to anything. A config that does not say counts as tied: that was the
    default of transformers before 5, and a refusal harms less than a head that is overwritten on loading.
    transformers 5 writes of every T5 that it is tied. One with a head of its own does not scale its output.
    """
    if not any(name.endswith(OUTPUT_EMBEDDINGS) for name in checkpoint.tensors):
        return checkpoint.architecture.endswith(GENERATING)
    config = checkpoint.config
    if config.get("model_type") in OWN_HEADS or config.get("scale_decoder_outputs") is False:
        return False
    nested = config.get("text_config")
    inner = nested.get("tie_word_embeddings", True) if isinstance(nested, dict) else True
    return bool(config.get("tie_word_embeddings", inner))


def decoder_ends(checkpoint: Checkpoint) -> Ends | None:
    """The ends of a decoder, tied or not; None where it has not exactly one embedding to name them by."""
    return _decoder_ends(checkpoint.tensors, checkpoint.architecture)


def tied_ends(checkpoint: Checkpoint) -> Ends | None:
    """The tied pair of a decoder; None where there is none."""
    return decoder_ends(checkpoint) if tied(checkpoint) else None


def with_tied_head(shapes: Mapping[str, tuple[int, ...]], architecture: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint and, where a decoder stores no head, that of the head it takes from its embedding."""
    ends = _decoder_ends(shapes, architecture)
    return {**shapes, ends.head: shapes[ends.embedding]} if ends and ends.head not in shapes else dict(shapes)


def _decoder_ends(names: Iterable[str], architecture: str) -> Ends | None:
    embeddings = [name for name in names if name.endswith(INPUT_EMBEDDINGS)]
    heads = [name for name in names if name.endswith(OUTPUT_EMBEDDINGS)]
    if not architecture.endswith(DECODERS) or len(embeddings) != 1 or len(heads) > 1:
        return None
    default = next((head for end, head in HEADS.items() if embeddings[0].endswith(end)), "lm_head.weight")
    return Ends(embeddings[0], heads[0] if heads else default)


def keep_tied(label: str, deltas: Sequence[Delta], ends: Ends | None, *, allowed: bool) -> list[Delta]:
    """The deltas of one adapter for a base whose ends are tied.

    What PEFT saves of both ends though it is one there (trained rows, the tensor of a resized vocabulary) becomes one
    delta of the embedding. Rows of the head alone, or of other tokens than the embedding's, take the ends apart like
    any other change of one of them.
    Raises TiedWeightsError where the ends part and the recipe does not allow it, or `ends` is None.
    """
    kept = _fold(deltas, ends) if ends else list(deltas)
    for delta in kept:
        if is_end(delta.target) and not _shares_ends(delta) and not (allowed and ends):
            raise refuse_tied(label, delta.target, ends)
    return kept


def keep_shared(label: str, deltas: Sequence[Delta], checkpoint: Checkpoint) -> list[Delta]:
    """The deltas of one adapter for a base whose ends are two tensors.

    Raises TiedWeightsError for a change of the embedding that encoder and decoder share, unless a full fine-tune makes
    it: which of its modules an adapter on one of them reaches is not the same in transformers 4 and 5.
    """
    for delta in deltas:
        reaches = isinstance(delta, TokenRows) or not _shares_ends(delta)
        if reaches and is_shared(delta.target, checkpoint):
            raise TiedWeightsError(
                f"{label} changes {delta.target}, which this base shares between encoder and decoder",
                expected="an adapter that does not touch the shared embedding",
                found=delta.target,
                remedy="train the adapter without that module, or publish the whole fine-tune as a delta",
                keys=[delta.target],
            )
    return list(deltas)


def is_shared(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor is the embedding that encoder and decoder share, under any of its names."""
    return name.endswith(INPUT_EMBEDDINGS) and any(stored.endswith(SHARED) for stored in checkpoint.tensors)


def _fold(deltas: Sequence[Delta], ends: Ends) -> list[Delta]:
    by_target = {delta.target: delta for delta in deltas}
    embedding, head = by_target.get(ends.embedding), by_target.get(ends.head)
    if not isinstance(head, TokenRows | Replace) or not head.shares_ends:
        return list(deltas)
    rows = isinstance(embedding, TokenRows) and isinstance(head, TokenRows) and embedding.indices == head.indices
    whole = isinstance(embedding, Replace) and isinstance(head, Replace) and embedding.shares_ends
    if rows or whole:
        both = replace(embedding, copies=(*embedding.copies, head.tensor))
        if isinstance(head, Replace):  # its trained rows, if it has any, are those of the embedding
            both = replace(both, unused=(*both.unused, *head.sources[1:]))
        return [both if delta is embedding else delta for delta in deltas if delta is not head]
    return [replace(delta, shares_ends=False) if isinstance(delta, TokenRows) else delta for delta in deltas]


def untie(
    ends: Ends | None, changes: dict[str, list[WeightedDelta]], labels: Sequence[str]
) -> tuple[Ends | None, dict[str, list[WeightedDelta]]]:
    """The pair that has to be written as two tensors, None where the tie stays; and the changes of the two.

    labels: of the terms. What both ends share is then a change of each. Raises IncompatibleError where a full
    fine-tune changes the stored tensor of a pair that another adapter takes apart.
    """
    touching = [item for name in (ends.embedding, ends.head) for item in changes.get(name, ())] if ends else []
    apart = [item for item in touching if not _shares_ends(item.delta)]
    if ends is None or not apart:
        return None, changes
    shared = [item for item in touching if _shares_ends(item.delta)]
    heads = []
    for item in shared:
        if not isinstance(item.delta, TokenRows | Replace):
            raise IncompatibleError(
                f"{labels[apart[0].term]} changes one end of the tied pair {ends.embedding}, and "
                f"{labels[item.term]} is a full fine-tune that keeps it tied",
                expected="adapters that agree on whether the ends are tied",
                found=[labels[index] for index in sorted({each.term for each in touching})],
                remedy="compose the fine-tune first, and the adapter with the result",
            )
        heads.append(replace(item, delta=replace(item.delta, target=ends.head)))
    both = sorted([*changes.get(ends.head, ()), *heads], key=lambda item: item.term)
    return ends, {**changes, **({ends.head: both} if both else {})}


def _shares_ends(delta: Any) -> bool:
    """Whether a change of the stored tensor of a tied pair is meant for both ends."""
    return bool(getattr(delta, "shares_ends", False))


def refuse_tied(label: str, name: str, ends: Ends | None) -> TiedWeightsError:
    """The error for a change of one end of a tied pair."""
    return TiedWeightsError(
        f"{label} changes {name}, which this base shares between embedding and output head",
        expected="an adapter that touches neither end, or a decoder whose ends may be untied",
        found=name,
        remedy="give --untie to write both ends as tensors of their own (tie_word_embeddings false)"
        if ends
        else "train the adapter without that module: only decoders with one embedding and one head are untied",
        keys=[name],
    )
