"""LoRAs whose training kept more than the factors: what they compute is plain LoRA (peft/tuners/lora/variants.py).

base_model.model.<module>.lora_A.weight [r, in]   lora_B.weight [out, r]     W += s·B·A
VeLoRA (velora_config)            lora_velora_embed                  compresses activations for the backward pass
MonteCLoRA (monteclora_config)    lora_monteclora_sampler.…          noise on A while training, its mean at inference
"""

from __future__ import annotations

from typing import Any

from composer.adapters import adapter_kind
from composer.adapters._common import damaged
from composer.adapters._lora_config import lora_scale
from composer.adapters._lora_parts import A, B, LoraVariant, pair_shape
from composer.adapters._modules import Parts, low_rank
from composer.deltas import BlockDelta, read_array

__all__ = ["LoraTraining"]


@adapter_kind
class LoraTraining(LoraVariant):
    """Low-rank deltas on linear (and Conv1D) weights, beside tensors that only training reads."""

    name = "lora-training"
    switches = ("velora_config", "monteclora_config")
    optional = (
        "lora_velora_embed",
        *(
            f"lora_monteclora_sampler.{name}"
            for name in ("expert_weights", "expert_weights_prior", "gaussian_var_prior", "std_prior")
        ),
    )
    parts = (A, B, *optional)

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        shape = pair_shape(parts)
        if shape is None:
            found = {name: list(spec.shape) for name, spec in parts.items()}
            raise damaged(f"{module}: the factors do not fit", "A [r, in] and B [out, r]", found)
        return shape

    def build_module(self, config: dict[str, Any], module: str, parts: Parts) -> BlockDelta:
        a, b = (read_array(parts[name]) for name in (A, B))
        return low_rank(b, a, lora_scale(config, module, len(a)))
