"""Context-aware prompt tuning: a soft prompt that began as labelled examples (arXiv:2410.17222; peft/tuners/cpt).

prompt_embeddings [k, d]     the examples' embeddings plus their trained, projected change: PEFT adds them on saving
"""

from __future__ import annotations

from composer.adapters import adapter_kind
from composer.adapters.prompt_tuning import PromptTuning

__all__ = ["ContextPromptTuning"]


@adapter_kind
class ContextPromptTuning(PromptTuning):
    """No weight: the changed embeddings of examples come before those of every input."""

    name = "cpt"
    peft_types = ("CPT",)
