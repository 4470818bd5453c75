"""P-tuning: a soft prompt that an MLP or LSTM made (arXiv:2103.10385; peft/tuners/p_tuning).

prompt_embeddings [k, d]     what the encoder gives: PEFT evaluates it on saving, and only this is used afterwards
"""

from __future__ import annotations

from composer.adapters import adapter_kind
from composer.adapters.prompt_tuning import PromptTuning

__all__ = ["PTuning"]


@adapter_kind
class PTuning(PromptTuning):
    """No weight: the vectors that its encoder gave come before the embeddings of every input."""

    name = "p-tuning"
    peft_types = ("P_TUNING",)
