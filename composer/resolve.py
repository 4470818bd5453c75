"""One adapter of a recipe against one base: its deltas, each on a tensor that is there and has the right shape.

adapter.bind(places)      names: stored ones, a tied head, stacks of experts
adapter.deltas(names)     ── on stored tensors ──►  every adapter tensor once, no target twice, layouts agree
                                                    the ends of a tied pair alike, unless the recipe unties them
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from composer.adapters import Binding
from composer.checkpoint import Checkpoint
from composer.deltas import Delta, Replace
from composer.deltas_experts import ExpertLowRank
from composer.deltas_residual import Residual
from composer.deltas_rows import TokenRows
from composer.ends import Ends, is_end, keep_shared, keep_tied, refuse_tied, tied
from composer.errors import IncompatibleError, TargetMismatchError, UnsupportedAdapterError
from composer.experts import ExpertStack, expert_stacks
from composer.missing import missing_modules
from composer.places import places
from composer.vocabulary import refuse_resized

if TYPE_CHECKING:
    from composer.plan import Term

__all__ = ["CONV1D_MODELS", "CONV1D_MODULES", "resolve"]

# Where transformers keeps a weight as [in, out]; all other architectures have plain linear layers.
CONV1D_MODELS = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer")
CONV1D_MODULES = ("c_attn", "q_attn", "c_proj", "c_fc")


def resolve(term: Term, checkpoint: Checkpoint, ends: Ends | None, *, untie: bool) -> list[Delta]:
    """The changes that a term makes to stored tensors of the checkpoint, and to a head that it does not store.

    ends: of a decoder whose ends are tied; untie: whether the recipe lets them part. Raises TargetMismatchError unless
    each adapter tensor is consumed exactly once, TiedWeightsError, IncompatibleError (a layout that is not the base's)
    or UnsupportedAdapterError (a change that these weights cannot take).
    """
    shapes = places(checkpoint)
    binding = term.adapter.bind(shapes)
    if binding.mismatches:
        end = next((name for name in binding.names if is_end(name)), None)
        if end and tied(checkpoint) and not untie:
            raise refuse_tied(term.label, end, ends)
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
    missing = missing_modules(term.adapter.config, binding.names, checkpoint.shapes, checkpoint.config)
    if missing:
        raise TargetMismatchError(
            f"{term.label}: its config lists target modules of which the file lacks {len(missing)}: "
            f"{', '.join(missing[:3])}",
            expected="every module of this base that target_modules names",
            found=missing[:20],
            remedy="the file is incomplete, or the adapter belongs to a base with fewer layers; if they were left out "
            "on purpose, list the others by their full names in target_modules",
            keys=missing,
        )
    stacks = expert_stacks(checkpoint.shapes)
    tensors = {**({ends.head: checkpoint.tensors[ends.embedding]} if ends else {}), **checkpoint.tensors}
    deltas = [
        placed
        for delta in term.adapter.deltas(binding.names, tensors)
        for placed in _on_stored(term.label, delta, shapes[delta.target], stacks.get(delta.target), checkpoint)
    ]
    additions = term.adapter.additions()
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
    for addition in additions:
        addition.check(term.label, checkpoint)
    for delta in deltas:
        _check_layout(term.label, delta, shapes[delta.target], checkpoint)
        if isinstance(delta, TokenRows) or (isinstance(delta, Replace) and not is_end(delta.target)):
            delta.check(shapes[delta.target])
    if not tied(checkpoint):
        return keep_shared(term.label, deltas, checkpoint)
    return keep_tied(term.label, deltas, ends, allowed=untie)


def _on_stored(
    label: str, delta: Delta, shape: tuple[int, ...], stack: ExpertStack | None, checkpoint: Checkpoint
) -> list[Delta]:
    """The same change as one of stored tensors: that of a stack of experts is one of each expert's own matrices."""
    if isinstance(delta, ExpertLowRank):
        return delta.placed(shape, stack, checkpoint.config)
    if isinstance(delta, Residual):
        return [delta.placed(checkpoint.tensors[delta.target])]
    if stack is not None:
        raise UnsupportedAdapterError(
            f"{label} replaces {delta.target}, which this base stores expert by expert",
            expected="low-rank changes of the experts",
            found=type(delta).__name__,
            remedy="save the base with its experts stacked, or train the adapter without modules_to_save on them",
        )
    return [delta]


def _check_vocabulary(label: str, binding: Binding) -> None:
    """Raise TargetMismatchError with both sizes where an embedding or head differs in its number of rows alone."""
    for mismatch in binding.mismatches:
        found = mismatch.found
        if is_end(mismatch.parameter) and found and found[1:] == mismatch.expected[1:]:
            raise refuse_resized(label, mismatch.parameter, mismatch.expected, found)


def _check_layout(label: str, delta: Delta, shape: tuple[int, ...], checkpoint: Checkpoint) -> None:
    """A square matrix does not show whether the adapter's layout is the base's; the architecture does."""
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
