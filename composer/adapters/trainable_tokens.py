"""Trained rows of the embedding, the rest of the model as it is (peft/tuners/trainable_tokens/layer.py).

base_model.model.<module>.trainable_tokens_delta [n, d]      W[token_indices] = the rows
base_model.model.<parameter>                                 a module of modules_to_save, whole
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer.adapters import Signature, Target, adapter_kind, parameter_count
from composer.adapters._common import check_floats, damaged, whole_tensors
from composer.adapters._tokens import check_tokens, token_deltas, token_targets, token_tensors
from composer.deltas import Delta, Replace
from composer.tensors import SafetensorsHeader, TensorSpec

__all__ = ["TrainableTokens"]


@adapter_kind
class TrainableTokens:
    """Rows by token, one matrix an embedding or head."""

    name = "trainable-tokens"
    peft_types = ("TRAINABLE_TOKENS",)

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise CorruptFileError for a file without rows, or whose rows and tokens disagree."""
        check_floats(header)
        if not token_tensors(header):
            raise damaged("the adapter holds no trained rows", "<module>.trainable_tokens_delta", "none")
        check_tokens(config, header)

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """[any, d] for each module with trained rows, the own shape of each whole tensor."""
        modules = {module.rpartition(".")[2] for module in token_tensors(header)}
        whole = [Target(parameter, spec.shape) for parameter, spec in _whole(header).items()]
        return Signature(
            kind=self.name,
            targets=(*token_targets(header), *whole),
            parameters=parameter_count(header),
            target_modules=tuple(sorted(modules)),
        )

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """One TokenRows a module, one Replace a whole tensor."""
        whole = [Replace(names[parameter], spec) for parameter, spec in _whole(header).items()]
        return [*token_deltas(config, header, names), *whole]


def _whole(header: SafetensorsHeader) -> dict[str, TensorSpec]:
    return whole_tensors(header, {"": token_tensors(header)})
