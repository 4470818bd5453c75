"""LoRA, (IA)³ and bottlenecks of the `adapters` library of AdapterHub (adapters/methods/lora.py, bottleneck.py).

adapter_config.json    config {architecture: lora, r, alpha, composition_mode, use_gating, …}, name, model_name
                       config {reduction_factor, non_linearity, mh_adapter, …}, model_type: a bottleneck
adapter.safetensors    <module>.loras.<name>.lora_A [r, in], lora_B [out, r]    add:   W += alpha/r · B·A
                       <module>.loras.<name>.lora_B [out, 1]                    scale: outputs ⊙ alpha·lora_B, (IA)³
                       <holder>.adapters.<name>.adapter_down.0.weight …         see composer.adapters.bottleneck

The library's other methods (prefixes, prompts, ReFT, unions) are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from composer.files import FileSet
from composer.formats import (
    View,
    adapter_format,
    damaged,
    is_number,
    is_rank,
    refuse,
    renamed,
    require_weights,
    view_header,
)
from composer.tensors import SafetensorsHeader, TensorSpec, read_adapter_header

__all__ = ["AdapterHub"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
BOTTLENECK = "BOTTLENECK"  # the peft_type of composer.adapters.bottleneck, which PEFT itself does not have
PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.loras\.(?P<name>[^.]+)\.lora_(?P<side>[AB])")
HEADS = ("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
CONV1D_MODELS = ("gpt2",)
PART = re.compile(r"(?P<holder>.+)\.adapters\.(?P<name>[^.]+)\.(?P<part>.+)")
INVERTIBLE = re.compile(r"(?:.+\.)?invertible_adapters\.")
REASONS = {
    "prefix_tuning": "it puts trained keys and values before those of the input",
    "prompt_tuning": "it puts trained vectors before the input's embeddings",
    "reft": "it edits the hidden states of some positions of the input",
    "union": "it joins several adapters of different methods",
    "mtl_lora": "which of its matrices act depends on the task of the input",
}


@adapter_format
class AdapterHub:
    """One method's config under `config`, the weights under the adapter's name."""

    name = "AdapterHub"
    layout = f"{CONFIG} with config and model_type or model_class, {WEIGHTS}"

    def recognises(self, files: FileSet, config: Mapping[str, Any] | None) -> bool:
        """By the nested config, which only this library writes."""
        return config is not None and "config" in config and ("model_type" in config or "model_class" in config)

    def read(self, files: FileSet, config: Mapping[str, Any] | None) -> View:
        """LoRA's, IA3's or the bottleneck's config, and the tensors without the adapter's name.

        Raises UnsafeFormatError for pytorch_adapter.bin; UnsupportedAdapterError for other methods, gates, VeRA, merged
        attention matrices and prediction heads; CorruptFileError for a config or tensors that are not this library's.
        """
        assert config is not None
        method = _method_config(config["config"])
        bottleneck = "architecture" not in method or method["architecture"] is None
        if not bottleneck:
            _check_lora(method)
        heads = [name for name in HEADS if name in files]
        if heads:
            raise refuse(
                f"the folder holds a prediction head ({heads[0]}), which cannot be composed",
                "an adapter without head",
                heads,
                "save it with save_adapter(with_head=False), or leave the head's files out",
            )
        require_weights(files, WEIGHTS, "save_adapter(use_safetensors=True)")
        header = read_adapter_header(files[WEIGHTS])
        if bottleneck:
            base = {"model_type": config.get("model_type"), "base_model_name_or_path": config.get("model_name")}
            peft = {**method, **base, "peft_type": BOTTLENECK}
            return View(peft, view_header(header, _parts(header)), (CONFIG, WEIGHTS))
        factors = _factors(header)
        peft = {
            "fan_in_fan_out": config.get("model_type") in CONV1D_MODELS,
            "base_model_name_or_path": config.get("model_name"),
        }
        if method.get("composition_mode", "add") == "add":
            peft |= {"peft_type": "LORA", "r": method["r"], "lora_alpha": method["alpha"]}
            specs = [renamed(spec, f"{PREFIX}{module}.lora_{side}.weight") for module, side, spec in factors]
            _check_merged(factors)
        else:
            peft["peft_type"] = "IA3"
            specs = [renamed(spec, f"{PREFIX}{module}.ia3_l") for module, side, spec in factors]
            _check_vectors(factors)
        return View(peft, view_header(header, specs), (CONFIG, WEIGHTS))


def _method_config(method: Any) -> dict[str, Any]:
    """The config of the method, where it is one that can be composed."""
    if not isinstance(method, dict):
        raise refuse(
            f"{CONFIG}: config is {method!r}: the defaults of the version that saved it are not known",
            "the method's whole config",
            method,
            "load the adapter with the adapters library and save it again",
        )
    architecture = method.get("architecture")
    if architecture not in (None, "lora"):
        reason = REASONS.get(str(architecture), "it is not known what it changes")
        raise refuse(
            f"the method {architecture!r} of AdapterHub cannot be composed: {reason}",
            "architecture lora, or none (a bottleneck)",
            architecture,
            "serve the base with this adapter loaded by the adapters library, or train a LoRA on the same data",
        )
    return method


def _check_lora(method: dict[str, Any]) -> None:
    """Raise for a LoRA or (IA)³ that is no change of weights, or that the library would not read."""
    for option, what in {"use_gating": "a gate depends on the input", "vera_d": "VeRA", "vera_b": "VeRA"}.items():
        if method.get(option) not in (None, False):
            raise refuse(
                f"{option} is set: {what}, and is not supported",
                f"{option} unset",
                method[option],
                f"train the adapter without {option}",
            )
    mode, rank, alpha = method.get("composition_mode", "add"), method.get("r"), method.get("alpha")
    if mode not in ("add", "scale") or not is_rank(rank) or not is_number(alpha):
        raise damaged(
            f"{CONFIG}: composition_mode={mode!r}, r={rank!r}, alpha={alpha!r}",
            "add or scale, one positive integer, one number",
            {"composition_mode": mode, "r": rank, "alpha": alpha},
        )
    if mode == "scale" and (rank, alpha) != (1, 1):
        raise refuse(
            f"(IA)³ with r={rank} and alpha={alpha} is not supported",
            "r and alpha 1",
            {"r": rank, "alpha": alpha},
            "set alpha to 1 and multiply every lora_B by the old value",
        )


def _parts(header: SafetensorsHeader) -> list[TensorSpec]:
    """The tensors of a bottleneck under the modules that hold it, without the adapter's name."""
    specs, names = [], set()
    for spec in header.tensors.values():
        if INVERTIBLE.match(spec.name):
            raise refuse(
                f"{spec.name} is of an invertible adapter after the embedding, which cannot be composed",
                "a bottleneck without inv_adapter",
                spec.name,
                "train the bottleneck without inv_adapter",
            )
        match = PART.fullmatch(spec.name)
        if match is None:
            raise damaged(f"{spec.name} is not of a bottleneck", "<holder>.adapters.<name>.<part>", spec.name)
        specs.append(renamed(spec, f"{match['holder']}.{match['part']}"))
        names.add(match["name"])
    _check_one(names)
    return specs


def _factors(header: SafetensorsHeader) -> list[tuple[str, str, TensorSpec]]:
    """(module, A or B, tensor), all of one adapter."""
    factors, names = [], set()
    for spec in header.tensors.values():
        match = FACTOR.fullmatch(spec.name)
        if match is None:
            raise refuse(
                f"{spec.name} is not a factor of a LoRA",
                "<module>.loras.<name>.lora_A or .lora_B",
                spec.name,
                "train a LoRA on the linear layers alone",
            )
        factors.append((match["module"], match["side"], spec))
        names.add(match["name"])
    _check_one(names)
    return factors


def _check_one(names: set[str]) -> None:
    if len(names) > 1:
        raise damaged(f"{WEIGHTS} holds {len(names)} adapters", "one adapter", sorted(names))


def _check_merged(factors: list[tuple[str, str, TensorSpec]]) -> None:
    """Refuse LoRA on a matrix of query, key and value together: the factors there are several pairs, stacked."""
    ranks: dict[str, set[int]] = {}
    for module, side, spec in factors:
        if len(spec.shape) == 2:
            ranks.setdefault(module, set()).add(spec.shape[0 if side == "A" else 1])
    for module, found in ranks.items():
        if len(found) > 1:
            raise refuse(
                f"{module}: LoRA on parts of a merged attention matrix is not supported yet",
                "A [r, in] and B [out, r]",
                sorted(found),
                "train a LoRA on the other layers, or with PEFT",
            )


def _check_vectors(factors: list[tuple[str, str, TensorSpec]]) -> None:
    """(IA)³ has lora_B [out, 1] alone, and it is always the outputs that are scaled."""
    for module, side, spec in factors:
        if side != "B" or len(spec.shape) != 2 or spec.shape[1] != 1:
            raise damaged(f"{module}: lora_{side} {list(spec.shape)} in an (IA)³", "lora_B [out, 1]", list(spec.shape))
