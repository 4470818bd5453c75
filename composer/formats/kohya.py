"""LoRA, LoHa and LoKr as kohya-ss/sd-scripts and LyCORIS save them, for text models (lycoris/modules/*.py).

one .safetensors file, no config; <flat> is lora_te_… (or lora_te1_, lycoris_ …) and the module with _ for every dot
<flat>.lora_down.weight [r, in]   <flat>.lora_up.weight [out, r]       W += alpha/r · up·down
<flat>.hada_w1_a … hada_w2_b      as PEFT's LoHa                       <flat>.lokr_w1 … as PEFT's LoKr
<flat>.alpha                      a scalar; without one the scale is 1, as it is for a LoKr of two whole matrices
<flat>.dora_scale [out, 1]        DoRA's magnitudes (LyCORIS' wd_on_out)

The names are resolved against a base when they are bound to it (composer.flattened).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from composer.files import FileSet
from composer.formats import View, adapter_format, damaged, is_number, refuse, renamed, view_header, weight_files
from composer.tensors import FLOAT_DTYPES, SafetensorsHeader, TensorSpec, read_adapter_header

__all__ = ["Kohya"]

PREFIX = "base_model.model."
NAME = re.compile(r"(?P<flat>(?P<prefix>lora_te\d?|lora_unet|lycoris)_[^.]+)\.(?P<part>.+)")
KINDS = {
    "LORA": {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"},
    "LOHA": {part: part for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    "LOKR": {
        part: part for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    },
}
ALPHA, DORA = "alpha", "dora_scale"
RANKS = {  # the tensors that tell a module's rank, and in which dimension
    "LORA": (("lora_down.weight", 0),),
    "LOHA": (("hada_w1_b", 0),),
    "LOKR": (("lokr_w1_a", 1), ("lokr_w2_a", 1)),
}
Modules = dict[str, dict[str, TensorSpec]]


@adapter_format
class Kohya:
    """One file of flattened names."""

    name = "kohya-ss / LyCORIS"
    layout = "one .safetensors file with tensors lora_te_… or lycoris_…, no adapter_config.json"

    def recognises(self, files: FileSet, config: Mapping[str, Any] | None) -> bool:
        """By the names in the only safetensors file of a folder without configs."""
        weights = weight_files(files)
        if config is not None or "config.json" in files or len(weights) != 1:
            return False
        return any(NAME.fullmatch(name) for name in read_adapter_header(files[weights[0]]).tensors)

    def read(self, files: FileSet, config: Mapping[str, Any] | None) -> View:
        """The config of LoRA, LoHa or LoKr with each module's rank and alpha; the alphas are read, a number each.

        Raises UnsupportedAdapterError for image models, several text models or kinds in one file, and magnitudes of
        inputs; CorruptFileError for tensors that are not this format's.
        """
        name = weight_files(files)[0]
        header = read_adapter_header(files[name])
        modules = _modules(header)
        kind = _kind(modules)
        ranks = {flat: _rank(flat, parts, kind) for flat, parts in modules.items()}
        alphas = {flat: _alpha(flat, parts, kind, ranks[flat]) for flat, parts in modules.items()}
        rank, rank_pattern = _default(ranks)
        alpha, alpha_pattern = _default(alphas)
        peft = {
            "peft_type": kind,
            "r": rank,
            "lora_alpha" if kind == "LORA" else "alpha": alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "use_dora": any(DORA in parts for parts in modules.values()),
        }
        specs = [spec for flat, parts in modules.items() for spec in _specs(flat, parts, kind)]
        return View(peft, view_header(header, specs), (name,))


def _modules(header: SafetensorsHeader) -> Modules:
    """The tensors by flattened module and part, all of one text model."""
    modules: Modules = {}
    prefixes = set()
    for name, spec in header.tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise damaged(f"{name} does not belong to a module", "lora_te_<module>.<part>", name)
        modules.setdefault(match["flat"], {})[match["part"]] = spec
        prefixes.add(match["prefix"])
    if prefixes == {"lora_unet"} or len(prefixes) > 1:
        raise refuse(
            "the adapter changes an image model" if "lora_unet" in prefixes else "the adapter changes several models",
            "tensors of one text model",
            sorted(prefixes),
            "keep only the tensors of one text encoder (lora_te_…) in the file",
        )
    return modules


def _kind(modules: Modules) -> str:
    """The one PEFT kind that all parts belong to."""
    found: dict[str, str] = {}
    for flat, parts in modules.items():
        for part in parts:
            kinds = [kind for kind, names in KINDS.items() if part in names]
            if part not in (ALPHA, DORA):
                found[kinds[0] if kinds else part] = f"{flat}.{part}"
    unknown = sorted(set(found) - set(KINDS))
    if unknown or len(found) != 1:
        raise refuse(
            f"{found[unknown[0]]} is not supported yet" if unknown else "the file is not of one kind of adapter",
            "lora_down and lora_up, hada_… or lokr_… of linear layers, one of the three in a file",
            sorted(found.values())[:5],
            "train one kind of adapter, on linear layers only",
        )
    return next(iter(found))


def _rank(flat: str, parts: dict[str, TensorSpec], kind: str) -> int:
    for part, axis in RANKS[kind]:
        if part in parts and len(parts[part].shape) > axis:
            return parts[part].shape[axis]
    if {"lokr_w1", "lokr_w2"} <= set(parts):
        return 1
    raise damaged(f"{flat} has no {RANKS[kind][0][0]}", sorted(KINDS[kind]), sorted(parts))


def _alpha(flat: str, parts: dict[str, TensorSpec], kind: str, rank: int) -> float:
    """The module's alpha; its rank where it has none, and where LyCORIS does not scale."""
    if ALPHA not in parts:
        return float(rank)
    spec = parts[ALPHA]
    if spec.shape not in ((), (1,)) or spec.dtype not in FLOAT_DTYPES | {"I32", "I64"}:
        raise damaged(f"{spec.name} is {spec.dtype} {list(spec.shape)}", "one number", list(spec.shape))
    alpha = float(spec.read().reshape(()))
    if not is_number(alpha) or alpha == 0:
        raise damaged(f"{spec.name} is {alpha}", "a finite number other than 0", alpha)
    return float(rank) if kind == "LOKR" and {"lokr_w1", "lokr_w2"} <= set(parts) else alpha


def _default(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and the modules that have another."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {re.escape(flat): value for flat, value in values.items() if value != common}


def _specs(flat: str, parts: dict[str, TensorSpec], kind: str) -> list[TensorSpec]:
    specs = [
        renamed(spec, f"{PREFIX}{flat}.{KINDS[kind][part]}")
        for part, spec in parts.items()
        if part not in (ALPHA, DORA)
    ]
    if DORA in parts:
        magnitude = parts[DORA]
        rows = parts["lora_up.weight"].shape[:1] if kind == "LORA" and "lora_up.weight" in parts else None
        if magnitude.shape != (*(rows or ()), 1):
            raise refuse(
                f"{magnitude.name} {list(magnitude.shape)}: only LoRA with one magnitude an output is supported",
                "[out, 1], as LyCORIS saves it with wd_on_out",
                list(magnitude.shape),
                "train with wd_on_out=True, or without weight decomposition",
            )
        specs.append(replace(magnitude, name=f"{PREFIX}{flat}.lora_magnitude_vector", shape=rows))
    return specs
