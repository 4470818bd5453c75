"""LayerNorm tuning: the norms are trained whole (arXiv:2312.11420; peft/tuners/ln_tuning/layer.py).

base_model.model.<module>.ln_tuning_layers.weight (and .bias)     W' = the saved weight, b' = the saved bias
base_model.model.<parameter>                                      a module of modules_to_save, whole
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from composer.adapters import Signature, Target, adapter_kind, parameter_count
from composer.adapters._common import check_floats, damaged, whole_tensors
from composer.deltas import Delta, Replace
from composer.tensors import SafetensorsHeader, TensorSpec

__all__ = ["LnTuning"]

LAYERS = re.compile(r"\.ln_tuning_layers\.(?:default\.)?")


@adapter_kind
class LnTuning:
    """Weights and biases of norms, whole."""

    name = "ln-tuning"
    peft_types = ("LN_TUNING",)

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise CorruptFileError for a file without trained norms, or with one parameter under two names."""
        check_floats(header)
        if not any(LAYERS.search(name) for name in header.tensors):
            raise damaged("the adapter holds no ln_tuning_layers", "<module>.ln_tuning_layers.weight", "none")
        if len(_parameters(header)) != len(header.tensors):
            raise damaged("two tensors of the adapter stand for one parameter", "one each", list(header.tensors)[:20])

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """Each tensor in its own shape."""
        parameters = _parameters(header)
        return Signature(
            kind=self.name,
            targets=tuple(Target(parameter, spec.shape) for parameter, spec in parameters.items()),
            parameters=parameter_count(header),
            target_modules=tuple(sorted({parameter.split(".")[-2] for parameter in parameters if "." in parameter})),
        )

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """One Replace a tensor."""
        return [Replace(names[parameter], spec) for parameter, spec in _parameters(header).items()]


def _parameters(header: SafetensorsHeader) -> dict[str, TensorSpec]:
    return {LAYERS.sub(".", parameter): spec for parameter, spec in whole_tensors(header, {}).items()}
