"""Soft prompts: trained vectors before the input's embeddings (arXiv:2104.08691; peft/tuners/prompt_tuning).

prompt_embeddings [k, d]     k virtual tokens; no weight of the base changes
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer.adapters import Signature, Target, adapter_kind, parameter_count
from composer.adapters._prompts import PROMPT, check_prompt, prompt_shape, replaced, whole_targets
from composer.additions import Addition, SoftPrompt
from composer.deltas import Delta
from composer.sizes import HIDDEN_SIZE
from composer.tensors import SafetensorsHeader

__all__ = ["PromptTuning"]


@adapter_kind
class PromptTuning:
    """No weight: k vectors come before the embeddings of every input; a classifier trained along is replaced."""

    name = "prompt-tuning"
    peft_types = ("PROMPT_TUNING",)
    parts: tuple[str, ...] = (PROMPT,)
    exports: tuple[str, ...] = ("safetensors", "onnx", "bundle")

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise CorruptFileError where config and tensors disagree, UnsupportedAdapterError for an encoder-decoder."""
        check_prompt(config, header, self.parts)

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """The size of an embedding, and the modules trained whole."""
        tokens, numbers = prompt_shape(header)
        return Signature(
            kind=self.name,
            targets=(Target(HIDDEN_SIZE, (numbers,)), *whole_targets(header)),
            parameters=parameter_count(header),
            virtual_tokens=tokens,
        )

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """Of the modules trained whole only."""
        return replaced(header, names)

    def additions(self, config: dict[str, Any], header: SafetensorsHeader) -> list[Addition]:
        """The prompt."""
        return [SoftPrompt(header.tensors[PROMPT])]
