"""The tensors of a LoRA file by the module that they belong to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from composer.adapters import ANY_SIZE, Target, refuse
from composer.adapters._common import PREFIX, WRAPPED
from composer.adapters._tokens import token_indices, token_tensors
from composer.deltas import Replace
from composer.ends import is_end
from composer.errors import CorruptFileError
from composer.tensors import SafetensorsHeader, TensorSpec

__all__ = [
    "as_matrices",
    "as_vector",
    "base_shape",
    "check_extras",
    "check_pair",
    "copies_of",
    "extras_of",
    "factors_of",
    "is_transposed",
    "on_embedding",
    "on_kernel",
    "whole_deltas",
    "whole_of",
    "whole_targets",
]

FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.default)?(?(embedding)|\.weight)"
)
EXTRA = {
    "lora_bias": re.compile(r"(?P<module>.+)\.lora_B(?:\.default)?\.bias"),
    "use_dora": re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?"),
}
PARTS = re.compile(r"\.(?:modules_to_save(?:\.default)?|original_module)\.")
COPY = re.compile(r"(?P<module>.+)\.base_layer\.weight")


def factors_of(header: SafetensorsHeader) -> dict[str, dict[str, TensorSpec]]:
    found: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in sorted(header.tensors.items()):
        if match := FACTOR.fullmatch(name.removeprefix(PREFIX)):
            found.setdefault(match["module"], {})[match["side"]] = spec
    return found


def on_embedding(sides: dict[str, TensorSpec]) -> bool:
    return "lora_embedding_" in sides["A"].name


def is_transposed(sides: dict[str, TensorSpec], config: dict[str, Any]) -> bool:
    """Whether the base keeps W as [in, out]: an embedding always does, as [V, d], a convolution never."""
    return on_embedding(sides) or (bool(config.get("fan_in_fan_out")) and not on_kernel(sides))


def base_shape(sides: dict[str, TensorSpec], config: dict[str, Any]) -> tuple[int, ...]:
    """The shape of W in the base."""
    shape = (sides["B"].shape[0], *sides["A"].shape[1:])
    return shape[::-1] if is_transposed(sides, config) else shape


def copies_of(header: SafetensorsHeader) -> dict[str, TensorSpec]:
    """The base's own weights in the file, by the LoRA module they belong to."""
    factors = factors_of(header)
    matches = ((COPY.fullmatch(name.removeprefix(PREFIX)), spec) for name, spec in header.tensors.items())
    return {match["module"]: spec for match, spec in matches if match and match["module"] in factors}


def extras_of(header: SafetensorsHeader, option: str) -> dict[str, TensorSpec]:
    """The tensors [out] that belong to `option`, by their LoRA module."""
    matches = ((EXTRA[option].fullmatch(name.removeprefix(PREFIX)), spec) for name, spec in header.tensors.items())
    return {match["module"]: spec for match, spec in matches if match}


def whole_of(header: SafetensorsHeader) -> dict[str, list[TensorSpec]]:
    """The tensors that take the base's place, by parameter, and after each what PEFT saves besides it.

    Where the vocabulary was resized, the parts of a trained end's wrapper lie beside it: PEFT loads none of them again.
    """
    used = {spec.name for spec in copies_of(header).values()}
    used |= {spec.name for option in EXTRA for spec in extras_of(header, option).values()}
    used |= {spec.name for spec in token_tensors(header).values()}
    found: dict[str, list[TensorSpec]] = {}
    for name, spec in sorted(header.tensors.items(), key=lambda item: (len(item[0]), item[0])):
        short = name.removeprefix(PREFIX)
        if name in used or FACTOR.fullmatch(short):
            continue
        parameter = WRAPPED.sub("", short).replace(".token_adapter.", ".")
        if is_end(parameter) and parameter in found and PARTS.search(short):
            found[parameter].append(spec)
        else:
            found[parameter] = [spec]
    return dict(sorted(found.items()))


def whole_targets(header: SafetensorsHeader) -> list[Target]:
    """The own shape of each; where both ends are there in one number of rows, the base may have another."""
    whole = whole_of(header)
    shapes = {parameter: specs[0].shape for parameter, specs in whole.items()}
    resizable = both_ends(whole) if len({shapes[end][:1] for end in both_ends(whole)}) == 1 else ()
    return [
        Target(parameter, (ANY_SIZE, *shape[1:]) if parameter in resizable else shape)
        for parameter, shape in shapes.items()
    ]


def whole_deltas(config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Replace]:
    """One Replace each. Ends that modules_to_save does not name were saved because the vocabulary was resized."""
    whole = whole_of(header)
    saved = config.get("modules_to_save") or []
    trained = [end for end in both_ends(whole) if any(f".{name}." in f".{end}" for name in saved)]
    shared = () if trained else both_ends(whole)
    tokens = token_tensors(header)
    deltas = []
    for parameter, (first, *rest) in whole.items():
        delta = Replace(names[parameter], first, unused=tuple(rest), shares_ends=parameter in shared)
        module = parameter.removesuffix(".weight")
        if module in tokens:
            delta = replace(delta, rows=tokens[module], indices=token_indices(config, module))
        deltas.append(delta)
    return deltas


def both_ends(whole: Mapping[str, Any]) -> tuple[str, ...]:
    """The input embedding and the output head, where both are among the parameters."""
    ends = tuple(parameter for parameter in whole if is_end(parameter))
    return ends if len(ends) == 2 else ()


def check_extras(config: dict[str, Any], header: SafetensorsHeader, factors: dict[str, dict[str, TensorSpec]]) -> None:
    """Every LoRA module has its bias or magnitude where the config says so, and none where it does not."""
    if config.get("use_dora") and config.get("lora_bias"):
        raise refuse(
            "DoRA with a bias on lora_B has no defined merge",
            expected="use_dora or lora_bias, not both",
            found={"use_dora": True, "lora_bias": True},
            remedy="retrain with one of them, as PEFT demands",
        )
    for option in EXTRA:
        extras = extras_of(header, option)
        if extras and not config.get(option):
            raise refuse(
                f"the file holds {next(iter(extras.values())).name}, but adapter_config.json does not set {option}",
                expected=f"{option}: true",
                found=config.get(option),
                remedy="restore the config that was saved with these tensors",
            )
        unpaired = sorted(set(extras) ^ set(factors)) if config.get(option) else []
        wrong = [m for m, spec in extras.items() if m in factors and not _is_vector(spec, factors[m])]
        if unpaired or wrong:
            module = (unpaired or wrong)[0]
            raise CorruptFileError(
                f"{module}: {option} is set, and its tensor or its LoRA is missing or of another size",
                expected="one tensor [out] for each LoRA module",
                found=list(extras[module].shape) if module in extras else "none",
                remedy="the file is damaged: save the adapter again",
            )


def _is_vector(spec: TensorSpec, sides: dict[str, TensorSpec]) -> bool:
    """[out], or [1, out, 1, …] as the magnitudes of a convolution are."""
    out, dimensions = sides["B"].shape[0], len(sides["A"].shape)
    return spec.shape == (out,) or (dimensions > 2 and spec.shape == (1, out, *(1,) * (dimensions - 2)))


def as_vector(spec: TensorSpec) -> TensorSpec:
    """The same numbers as [out]."""
    return replace(spec, shape=(math.prod(spec.shape),))


def as_matrices(sides: dict[str, TensorSpec]) -> tuple[TensorSpec, TensorSpec]:
    """A [r, in·kernel] and B [out, r]: those of a convolution have more dimensions, in the same order."""
    a, b = sides["A"], sides["B"]
    return replace(a, shape=(a.shape[0], math.prod(a.shape[1:]))), replace(b, shape=b.shape[:2])


def on_kernel(sides: dict[str, TensorSpec]) -> bool:
    """Whether the module is a convolution."""
    return len(sides["A"].shape) > 2


def check_pair(module: str, sides: dict[str, TensorSpec]) -> None:
    missing = {"A", "B"} - set(sides)
    if missing:
        raise CorruptFileError(
            f"{module} has no lora_{missing.pop()}",
            expected="lora_A and lora_B",
            found=[s.name for s in sides.values()],
            remedy="the file is incomplete: save the adapter again",
        )
    a, b = sides["A"], sides["B"]
    if on_embedding(sides) != ("lora_embedding_" in b.name):
        raise CorruptFileError(
            f"{module} has one factor of an embedding and one of a linear layer",
            expected="lora_embedding_A and lora_embedding_B, or lora_A and lora_B",
            found=[a.name, b.name],
            remedy="the file is damaged: save the adapter again",
        )
    if not 2 <= len(a.shape) <= 5 or len(b.shape) != len(a.shape) or set(b.shape[2:]) - {1}:
        raise CorruptFileError(
            f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are of no layer",
            expected="matrices, or A with a convolution's kernel and B with one of size 1",
            found=[list(a.shape), list(b.shape)],
            remedy="the file is damaged: save the adapter again",
        )
    if on_kernel(sides) and a.shape[0] != b.shape[1] and b.shape[1] and a.shape[0] % b.shape[1] == 0:
        raise refuse(
            f"{module} is a convolution in {a.shape[0] // b.shape[1]} groups: its LoRA mixes the channels of all "
            "groups, which the grouped kernel has no numbers for",
            expected="a convolution with groups=1",
            found=[list(a.shape), list(b.shape)],
            remedy="serve the base with the adapter loaded by PEFT, which does not merge it either",
        )
    if a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise CorruptFileError(
            f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} have no common rank",
            expected="A [r, in] and B [out, r]",
            found=[list(a.shape), list(b.shape)],
            remedy="the file is damaged: save the adapter again",
        )
