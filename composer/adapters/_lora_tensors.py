"""The tensors of a LoRA file by the module that they belong to."""

from __future__ import annotations

import re
from typing import Any

from composer.adapters import refuse
from composer.adapters._common import PREFIX, WRAPPED
from composer.adapters._tokens import token_tensors
from composer.errors import CorruptFileError
from composer.tensors import SafetensorsHeader, TensorSpec

__all__ = [
    "base_shape",
    "check_extras",
    "check_pair",
    "copies_of",
    "extras_of",
    "factors_of",
    "is_transposed",
    "on_embedding",
    "whole_of",
]

FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.default)?(?(embedding)|\.weight)"
)
EXTRA = {
    "lora_bias": re.compile(r"(?P<module>.+)\.lora_B(?:\.default)?\.bias"),
    "use_dora": re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?"),
}
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
    """Whether the base keeps W as [in, out]: an embedding always does, as [V, d]."""
    return on_embedding(sides) or bool(config.get("fan_in_fan_out"))


def base_shape(sides: dict[str, TensorSpec], config: dict[str, Any]) -> tuple[int, ...]:
    """The shape of W in the base."""
    shape = (sides["B"].shape[0], sides["A"].shape[1])
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


def whole_of(header: SafetensorsHeader) -> dict[str, TensorSpec]:
    used = {spec.name for spec in copies_of(header).values()}
    used |= {spec.name for option in EXTRA for spec in extras_of(header, option).values()}
    used |= {spec.name for spec in token_tensors(header).values()}
    return {
        WRAPPED.sub("", name.removeprefix(PREFIX)): spec
        for name, spec in sorted(header.tensors.items())
        if name not in used and not FACTOR.fullmatch(name.removeprefix(PREFIX))
    }


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
        wrong = [m for m, spec in extras.items() if m in factors and spec.shape != (factors[m]["B"].shape[0],)]
        if unpaired or wrong:
            module = (unpaired or wrong)[0]
            raise CorruptFileError(
                f"{module}: {option} is set, and its tensor or its LoRA is missing or of another size",
                expected="one tensor [out] for each LoRA module",
                found=list(extras[module].shape) if module in extras else "none",
                remedy="the file is damaged: save the adapter again",
            )


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
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise refuse(
            f"{module}: LoRA on a convolution is not supported yet",
            expected="matrices",
            found=[list(a.shape), list(b.shape)],
            remedy="merge it with PEFT",
        )
    if a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise CorruptFileError(
            f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} have no common rank",
            expected="A [r, in] and B [out, r]",
            found=[list(a.shape), list(b.shape)],
            remedy="the file is damaged: save the adapter again",
        )
