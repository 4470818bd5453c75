"""Prefix tuning, P-Tuning v2, cartridges: trained keys and values before those of the input, in every layer.

prompt_embeddings [k, 2 · layers · width]     of each virtual token, key and value of layer after layer; width is what
                                              one layer caches of a key: with grouped queries, less than the hidden size

A projection (prefix_projection) is evaluated by PEFT on saving. A cartridge lies the same way.
Source: arXiv:2101.00190, arXiv:2110.07602, arXiv:2506.06266; peft/tuners/prefix_tuning, peft/tuners/cartridge
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer.adapters import Signature, Target, adapter_kind, parameter_count
from composer.adapters._common import damaged
from composer.adapters._prompts import PROMPT, check_prompt, prompt_shape, replaced, whole_targets
from composer.additions import Addition, Prefix
from composer.deltas import Delta
from composer.sizes import KEY_VALUE_WIDTH, LAYERS
from composer.tensors import SafetensorsHeader

__all__ = ["PrefixTuning"]


@adapter_kind
class PrefixTuning:
    """No weight: keys and values of k tokens come before those of every input; a trained classifier is replaced."""

    name = "prefix-tuning"
    peft_types = ("PREFIX_TUNING", "CARTRIDGE")
    exports = ("onnx", "bundle")

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise CorruptFileError where config and tensors disagree, UnsupportedAdapterError for an encoder-decoder."""
        check_prompt(config, header)
        sizes = [config.get(name) for name in ("num_layers", "token_dim", "num_attention_heads")]
        if not all(type(size) is int and size > 0 for size in sizes) or sizes[1] % sizes[2]:
            raise damaged(
                "adapter_config.json: num_layers, token_dim, num_attention_heads", "layers, width, heads", sizes
            )
        if prompt_shape(header)[1] != 2 * sizes[0] * sizes[1]:
            raise damaged(
                f"{PROMPT} has {prompt_shape(header)[1]} numbers a token",
                f"2 x {sizes[0]} layers x {sizes[1]}",
                prompt_shape(header)[1],
            )

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """The number of layers, what each caches of a key, and the modules trained whole."""
        sizes = (Target(LAYERS, (config["num_layers"],)), Target(KEY_VALUE_WIDTH, (config["token_dim"],)))
        return Signature(
            kind=self.name,
            targets=(*sizes, *whole_targets(header)),
            parameters=parameter_count(header),
            virtual_tokens=prompt_shape(header)[0],
        )

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """Of the modules trained whole only."""
        return replaced(header, names)

    def additions(self, config: dict[str, Any], header: SafetensorsHeader) -> list[Addition]:
        """The prefix."""
        return [Prefix(header.tensors[PROMPT], config["num_layers"], config["num_attention_heads"])]
