"""May these be composed, as far as their licences say? Words for people, not legal advice.

    clear      all licences are known and ask for nothing that another one forbids
    terms      known, and some bind the result: named here
    unknown    a licence is missing or not known: somebody has to read it
    conflict   two cannot both be kept, or one forbids derivatives: compose refuses unless told to go on

A composition is a derivative of its base and of every adapter. What a licence means is in one table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from registry.schemas import LicenceLevel, LicenceVerdict

__all__ = ["assess_licences"]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a licence asks of derivatives. `alike`: the licences that a derivative may bear, empty for any."""

    alike: tuple[str, ...] = ()
    non_commercial: bool = False
    no_derivatives: bool = False
    use_restrictions: bool = False
    forbids_restrictions: bool = False
    duty: str | None = None


FREE = Terms()
RAIL = Terms(use_restrictions=True, duty="its use restrictions must be passed on")
GPL3 = ("gpl-3.0", "agpl-3.0")
TERMS: dict[str, Terms] = {
    **dict.fromkeys(
        ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0", "cc-by-4.0", "cc-by-3.0",
         "zlib", "bsl-1.0", "0bsd", "ms-pl", "afl-3.0", "odc-by", "cdla-permissive-2.0"), FREE),
    "lgpl-3.0": Terms(forbids_restrictions=True, duty="changes to it stay under it"),
    "mpl-2.0": Terms(duty="changes to its files stay under it"),
    "gpl-2.0": Terms(alike=("gpl-2.0",), forbids_restrictions=True, duty="the result must be under it"),
    "gpl-3.0": Terms(alike=GPL3, forbids_restrictions=True, duty="the result must be under it"),
    "agpl-3.0": Terms(alike=("agpl-3.0",), forbids_restrictions=True, duty="the result must be under it, also served"),
    "cc-by-sa-4.0": Terms(alike=("cc-by-sa-4.0", *GPL3), forbids_restrictions=True, duty="the result must be under it"),
    "cc-by-nc-4.0": Terms(non_commercial=True),
    "cc-by-nc-2.0": Terms(non_commercial=True),
    "cc-by-nc-sa-4.0": Terms(alike=("cc-by-nc-sa-4.0",), non_commercial=True, forbids_restrictions=True,
                             duty="the result must be under it"),
    "cc-by-nd-4.0": Terms(no_derivatives=True),
    "cc-by-nc-nd-4.0": Terms(no_derivatives=True, non_commercial=True),
    "openrail": RAIL, "openrail++": RAIL, "creativeml-openrail-m": RAIL, "bigscience-openrail-m": RAIL,
    "bigscience-bloom-rail-1.0": RAIL, "bigcode-openrail-m": RAIL,
    "gemma": Terms(use_restrictions=True, duty="the Gemma terms and prohibited uses must be passed on"),
    **dict.fromkeys(
        ("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
        Terms(use_restrictions=True, duty="the Llama licence and its acceptable use policy must be passed on")),
    "deepfloyd-if-license": Terms(non_commercial=True, use_restrictions=True),
}  # fmt: skip
ALIASES = {"apache 2.0": "apache-2.0", "apache2": "apache-2.0", "apache": "apache-2.0", "cc0": "cc0-1.0"}


def assess_licences(parts: Sequence[tuple[str, str | None]]) -> LicenceVerdict:
    """The verdict on composing (name, licence) pairs, the base first."""
    known = {name: _terms(licence) for name, licence in parts}
    listed = dict(parts)
    conflicts = _conflicts(known, listed)
    unknown = [
        f"{name}: " + ("no licence is given" if licence is None else f"the licence {licence!r} is not known here")
        for name, licence in parts
        if known[name] is None
    ]
    duties = [
        f"{name} ({listed[name]}): {duty}"
        for name, terms in known.items()
        if terms is not None
        for duty in (*(["the result must not be used commercially"] if terms.non_commercial else []), terms.duty)
        if duty
    ]
    if conflicts:
        level = LicenceLevel.CONFLICT
    elif unknown:
        level = LicenceLevel.UNKNOWN
    else:
        level = LicenceLevel.TERMS if duties else LicenceLevel.CLEAR
    return LicenceVerdict(level=level, reasons=tuple(dict.fromkeys((*conflicts, *unknown, *duties))))


def _terms(licence: str | None) -> Terms | None:
    if licence is None:
        return None
    name = licence.strip().lower()
    name = re.sub(r"-(only|or-later)$", "", ALIASES.get(name, name))
    return TERMS.get(name)


def _conflicts(known: dict[str, Terms | None], listed: dict[str, str | None]) -> list[str]:
    found = []
    terms = [(name, item) for name, item in known.items() if item is not None]
    for name, item in terms:
        if item.no_derivatives:
            found.append(f"{name} ({listed[name]}) forbids derivatives, which a composition is")
    for index, (name, item) in enumerate(terms):
        for other, against in terms[index + 1 :]:
            pair = f"{name} ({listed[name]}) and {other} ({listed[other]})"
            both_alike = item.alike and against.alike
            if both_alike and not set(item.alike) & set(against.alike):
                found.append(f"{pair} each want the result under their own licence")
            elif not both_alike and (_forbidden(item, against) or _forbidden(against, item)):
                found.append(f"{pair}: one forbids further restrictions, the other demands them")
    return found


def _forbidden(one: Terms, other: Terms) -> bool:
    restricts = other.use_restrictions or (other.non_commercial and not one.non_commercial)
    return bool(one.alike) and one.forbids_restrictions and restricts
