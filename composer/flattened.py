"""Module names whose dots were replaced by underscores, as kohya-ss and LyCORIS write them.

lora_te_text_model_encoder_layers_0_self_attn_q_proj  ->  text_model.encoder.layers.0.self_attn.q_proj

`self_attn` has an underscore of its own, so such a name has a meaning only against the names of a base: those are
flattened and looked up. Two tensors of a base that flatten to one name make it ambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["FLATTENED", "flattened_candidates"]

FLATTENED = re.compile(r"(?:lora_te\d?|lycoris)_(?P<module>[^.]+)\.weight")


def flattened_candidates(parameters: Sequence[str], names: Iterable[str]) -> list[dict[str, tuple[str, ...]]]:
    """The base tensors that each flattened parameter may be, once for every way to map all of them.

    The first way is name for name; then those in which the base has one more prefix, or one less, than the adapter.
    Every name of the result's dicts is one of `names`; a parameter without any has an empty tuple.
    """
    known: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(".weight"):
            known.setdefault(name.removesuffix(".weight").replace(".", "_"), []).append(name)
    modules = {parameter: _module(parameter) for parameter in parameters}
    first = next(iter(modules.values()), "")
    more = sorted({flat.removesuffix(first) for flat in known if flat.endswith(f"_{first}")})
    less = sorted({first.removesuffix(flat) for flat in known if first.endswith(f"_{flat}")})
    ways = [{parameter: prefix + flat for parameter, flat in modules.items()} for prefix in ("", *more)]
    ways += [
        {parameter: flat.removeprefix(prefix) if flat.startswith(prefix) else "" for parameter, flat in modules.items()}
        for prefix in less
    ]
    return [{parameter: tuple(known.get(flat, ())) for parameter, flat in way.items()} for way in ways]


def _module(parameter: str) -> str:
    match = FLATTENED.fullmatch(parameter)
    return match["module"] if match else parameter.removesuffix(".weight").replace(".", "_")
