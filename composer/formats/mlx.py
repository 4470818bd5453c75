"""MLX LoRA and DoRA, as mlx-lm saves them (mlx_lm/tuner/lora.py, dora.py).

adapter_config.json      fine_tune_type lora|dora, lora_parameters {rank, scale}, model (the base's name)
adapters.safetensors     <module>.lora_a [in, r]      <module>.lora_b [r, out]     W += scale·(a·b)ᵀ
                         an embedding: [V, r]                        [r, d]       W += scale·a·b
                         <module>.m [out]             the magnitudes of DoRA

The scale is direct, not alpha / r.
"""

from __future__ import annotations

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
    transposed,
    view_header,
)
from composer.tensors import SafetensorsHeader, TensorSpec, read_adapter_header

__all__ = ["Mlx"]

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


@adapter_format
class Mlx:
    """Low-rank factors stored transposed."""

    name = "MLX"
    layout = f"{CONFIG} with fine_tune_type or lora_parameters, {WEIGHTS}"

    def recognises(self, files: FileSet, config: Mapping[str, Any] | None) -> bool:
        """By what only mlx-lm's config has."""
        return config is not None and ("fine_tune_type" in config or "lora_parameters" in config)

    def read(self, files: FileSet, config: Mapping[str, Any] | None) -> View:
        """LoRA's config with alpha = scale · rank, and every factor turned.

        Raises UnsupportedAdapterError for full fine-tuning, experts, quantised factors and a scale that mlx-lm has
        read in two ways; CorruptFileError for a config or tensors that are not mlx-lm's.
        """
        assert config is not None
        kind = config.get("fine_tune_type", "lora")
        if kind == "full":
            raise refuse(
                "fine_tune_type 'full' is not an adapter: the file holds whole weights of the model",
                "fine_tune_type lora or dora",
                kind,
                "write the whole model with 'mlx_lm.fuse' and give it to 'registry base add'",
            )
        if kind not in ("lora", "dora"):
            raise refuse(f"fine_tune_type {kind!r} is not known", "lora or dora", kind, "train a LoRA or a DoRA")
        require_weights(files, WEIGHTS, "a version of mlx-lm that writes it (earlier ones wrote adapters.npz)")
        rank, scale = _numbers(config.get("lora_parameters"))
        header = read_adapter_header(files[WEIGHTS])
        peft = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": scale * rank,
            "use_dora": kind == "dora" or config.get("use_dora") is True,
            "base_model_name_or_path": config.get("model"),
        }
        return View(peft, view_header(header, _specs(header)), (CONFIG, WEIGHTS))


def _numbers(parameters: Any) -> tuple[int, float]:
    """(rank, scale) of lora_parameters.

    Earlier versions of mlx-lm took scale · alpha / rank where both are given, later ones ignore alpha; all need scale.
    """
    if not isinstance(parameters, dict):
        raise damaged(f"{CONFIG}: lora_parameters is not an object", "rank and scale", parameters)
    rank, scale, alpha = (parameters.get(field) for field in ("rank", "scale", "alpha"))
    if not is_rank(rank) or not is_number(scale) or not (alpha is None or is_number(alpha)):
        raise damaged(f"{CONFIG}: lora_parameters has no usable rank and scale", "rank and scale", parameters)
    if alpha is not None and alpha != rank:
        raise refuse(
            f"{CONFIG}: lora_parameters has a scale and an alpha, which versions of mlx-lm read as {scale} or as "
            f"{scale * alpha / rank:g}",
            "scale only",
            {"scale": scale, "alpha": alpha, "rank": rank},
            "remove alpha; where the version that trained it used alpha, multiply scale by alpha / rank first",
        )
    return rank, scale


def _specs(header: SafetensorsHeader) -> list[TensorSpec]:
    specs = []
    for spec in header.tensors.values():
        module, _, part = spec.name.rpartition(".")
        if not module or part not in PARTS:
            raise refuse(
                f"{spec.name} is not a tensor of an MLX LoRA (a quantised one, perhaps)",
                "<module>.lora_a, .lora_b or .m",
                spec.name,
                "save the adapter unquantised, as mlx_lm.lora trains it",
            )
        if part != "m" and len(spec.shape) != 2:
            raise refuse(
                f"{module}: LoRA on the experts of a mixture is not supported yet",
                "matrices",
                list(spec.shape),
                "train the linear layers outside the experts",
            )
        specs.append(_spec(spec, f"{PREFIX}{module}", module.rpartition(".")[2] in EMBEDDINGS, part))
    return specs


def _spec(spec: TensorSpec, module: str, embedding: bool, part: str) -> TensorSpec:
    if part == "m":
        return renamed(spec, f"{module}.{PARTS[part]}")
    if embedding:  # W [V, d] is a·b itself, so a takes B's place
        return renamed(spec, f"{module}.{PARTS['lora_b' if part == 'lora_a' else 'lora_a']}")
    return transposed(spec, f"{module}.{PARTS[part]}")
