"""Does this adapter belong on this base?

    exact          trained on these very weights (same fingerprint)
    same-values    the same weights up to bf16 rounding, same config       accepted, with a warning
    lineage        a declared relative of the base it was trained on       needs --allow lineage
    shape          every tensor finds a place of the right size            needs --allow shape: "it loads", no more
    incompatible   some tensor does not

Pure functions over facts; the services look the facts up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from composer.adapters import Binding, Target, bind_targets
from composer.recipe import Allow
from registry.schemas import Level, Reason, Verdict

__all__ = ["BaseClaim", "BaseFacts", "accepts", "assess"]

ORDER = list(Level)
LISTED = 5


@dataclass(frozen=True, slots=True)
class BaseClaim:
    """What an adapter says of the base it was trained on; all empty but the name when nothing was hashed."""

    fingerprint: str | None = None
    value_root: str | None = None
    config_digest: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What is known of a base at hand. `relatives`: fingerprint to a phrase such as "a finetune of smollm2"."""

    name: str
    fingerprint: str
    value_root: str
    config_digest: str
    shapes: Mapping[str, tuple[int, ...]]
    relatives: Mapping[str, str] = field(default_factory=dict)


def better_or_equal(level: Level, than: Level) -> bool:
    """Whether `level` is at least as good as `than`."""
    return ORDER.index(level) <= ORDER.index(than)


def accepts(allow: Allow, level: Level) -> bool:
    """Whether compose goes on at this level."""
    return better_or_equal(level, Level(allow.value))


def assess(
    targets: tuple[Target, ...],
    claim: BaseClaim,
    base: BaseFacts,
    differing: tuple[str, ...] | None = None,
    *,
    binding: Binding | None = None,
) -> Verdict:
    """The verdict for one adapter and one base, over the modules it touches.

    binding: of these targets on this base, where it is known already.
    differing: names of the tensors in which the adapter's own base and this one differ, where both are registered.
    """
    binding = binding or bind_targets(targets, base.shapes)
    if binding.mismatches:
        listed = "; ".join(map(str, binding.mismatches[:LISTED]))
        more = len(binding.mismatches) - LISTED
        return Verdict(
            level=Level.INCOMPATIBLE,
            reasons=(
                Reason(
                    code="target-mismatch",
                    message=f"{len(binding.mismatches)} of {len(targets)} tensors do not fit {base.name}: {listed}"
                    + (f"; and {more} more" if more > 0 else ""),
                    remedy="use the base it was trained on; 'registry bases ADAPTER' lists the ones it fits",
                ),
            ),
        )
    if claim.fingerprint == base.fingerprint:
        return Verdict(
            level=Level.EXACT, reasons=(Reason(code="same-fingerprint", message="trained on these weights"),)
        )
    if claim.value_root and (claim.value_root, claim.config_digest) == (base.value_root, base.config_digest):
        return Verdict(
            level=Level.SAME_VALUES,
            reasons=(
                Reason(
                    code="storage-rounding",
                    message=f"{base.name} holds the weights it was trained on in another number format",
                    remedy="results differ by rounding only",
                ),
            ),
        )
    if claim.fingerprint and claim.fingerprint in base.relatives:
        return Verdict(
            level=Level.LINEAGE,
            reasons=(
                Reason(
                    code="declared-lineage",
                    message=f"{base.relatives[claim.fingerprint]}; other weights than it was trained on",
                    remedy="evaluate the result; --allow lineage composes it",
                ),
                *_difference(differing),
            ),
        )
    return Verdict(level=Level.SHAPE, reasons=(_unproven(claim, base), *_difference(differing)))


def _unproven(claim: BaseClaim, base: BaseFacts) -> Reason:
    if claim.fingerprint is None:
        return Reason(
            code="base-unverified",
            message=f"its base is known by name only ({claim.name or 'no name'}): shapes fit {base.name}, nothing more "
            "is known",
            remedy=f"if it was trained on it, publish it again as a new version with --base {base.name}",
        )
    return Reason(
        code="different-base",
        message=f"trained on other weights ({claim.fingerprint[:16]}…, {claim.name or 'unnamed'}); only the shapes fit "
        f"{base.name}",
        remedy="use its own base; --allow shape composes it, and the result is likely to be wrong",
    )


def _difference(differing: tuple[str, ...] | None) -> tuple[Reason, ...]:
    if differing is None:
        return ()
    listed = ", ".join(differing[:LISTED]) or "the config only"
    return (Reason(code="differs-in", message=f"the two bases differ in {len(differing)} tensors: {listed}"),)
