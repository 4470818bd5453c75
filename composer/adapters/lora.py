"""LoRA as PEFT saves it (arXiv:2106.09685), with rsLoRA (arXiv:2312.03732) and DoRA (arXiv:2402.09353).

base_model.model.<module>.lora_A.weight [r, in]      base_model.model.<module>.lora_B.weight [out, r]
base_model.model.<module>.lora_A.weight [r, in, k…]  base_model.model.<module>.lora_B.weight [out, r, 1…]  (convolution)
base_model.model.<module>.lora_B.bias [out]            with lora_bias
base_model.model.<module>.lora_magnitude_vector [out]  with use_dora; older files add .weight
base_model.model.<module>.lora_embedding_A [r, V]    base_model.model.<module>.lora_embedding_B [d, r]
base_model.model.<module>.base_layer.weight          the base's own W, which PEFT saves along with a LoRA on either end
base_model.model.<module>(.base_layer)*.lora_A.weight [experts·r, x]   with target_parameters; lora_B [y, r·experts]
base_model.model.<module>.token_adapter.trainable_tokens_delta [n, d]   with trainable_token_indices
base_model.model.<parameter>                         a trained bias or a module of modules_to_save, whole

W[i] = the rows of trained tokens
W += s·B·A     b += s·b_B     W = m/‖V‖·V with V = W + s·B·A (DoRA)     W += s·(B·A)ᵀ (embedding, W [V, d])
s = alpha / r, or alpha / √r with use_rslora; rank_pattern and alpha_pattern override per module
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer.adapters import Signature, Target, adapter_kind, parameter_count, refuse
from composer.adapters._common import PREFIX
from composer.adapters._lora_config import check_numbers, lora_scale
from composer.adapters._lora_parameters import check_parameters, parameter_delta, parameter_target, split_parameters
from composer.adapters._lora_start import check_start, start_of
from composer.adapters._lora_tensors import (
    as_matrices,
    as_vector,
    base_shape,
    check_extras,
    check_pair,
    copies_of,
    extras_of,
    factors_of,
    is_transposed,
    on_embedding,
    on_kernel,
    whole_deltas,
    whole_targets,
)
from composer.adapters._tokens import check_tokens, token_deltas, token_targets
from composer.deltas import Delta, LowRank
from composer.deltas_dora import Dora, ScaledVector
from composer.deltas_residual import Residual
from composer.errors import CorruptFileError
from composer.replication import layer_map, original_name
from composer.tensors import FLOAT_DTYPES, SafetensorsHeader

__all__ = ["Lora"]


@adapter_kind
class Lora:
    """Low-rank deltas on linear, Conv1D and convolution weights, on embeddings and on stacked experts."""

    name = "lora"
    peft_types = ("LORA",)

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Refuse the variants of LoRA whose delta is not s·B·A, and files that do not pair up."""
        unsupported = {
            "alora_invocation_tokens": "activated LoRA (it depends on the input)",
            "use_qalora": "QALoRA",
            "megatron_config": "Megatron layers",
        }
        for option, what in unsupported.items():
            if config.get(option):
                raise refuse(
                    f"{what} is not supported yet: {option}={config[option]!r} in adapter_config.json",
                    expected=f"{option} unset",
                    found=config[option],
                    remedy="merge it with PEFT, or retrain without it",
                )
        check_numbers(config)
        layers = layer_map(config)
        factors = factors_of(header)
        if not factors:
            raise CorruptFileError(
                "the adapter holds no lora_A and lora_B tensors",
                expected=f"{PREFIX}<module>.lora_A.weight",
                found=list(header.tensors)[:5],
                remedy="save the adapter with PEFT's save_pretrained",
            )
        for module, sides in factors.items():
            check_pair(module, sides)
        modules, parameters = split_parameters(config, factors)
        check_parameters(config, parameters)
        check_start(config, header, modules, parameters)
        check_extras(config, header, modules)
        check_tokens(config, header)
        for module in modules if layers else ():
            original_name(f"{module}.weight", layers)
        for module, copy in copies_of(header).items():
            shape = base_shape(modules[module], config)
            if copy.shape != shape:
                raise CorruptFileError(
                    f"{copy.name} does not have the shape of its LoRA",
                    expected=list(shape),
                    found=list(copy.shape),
                    remedy="the file is damaged: save the adapter again",
                )
        for spec in header.tensors.values():
            if spec.dtype not in FLOAT_DTYPES:
                raise CorruptFileError(
                    f"{spec.name} is {spec.dtype}",
                    expected=sorted(FLOAT_DTYPES),
                    found=spec.dtype,
                    remedy="save the adapter in bf16, fp16 or fp32",
                )

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """[out, in] for each LoRA module ([in, out] with fan_in_fan_out), the own shape of each whole tensor.

        [experts, y, x] for each stack of experts, whose last two may be the other way round in the base.
        """
        modules, parameters = split_parameters(config, factors_of(header))
        targets = [Target(f"{module}.weight", base_shape(sides, config)) for module, sides in modules.items()]
        targets += [parameter_target(config, parameter, sides) for parameter, sides in parameters.items()]
        targets += [Target(f"{module}.bias", spec.shape) for module, spec in extras_of(header, "lora_bias").items()]
        targets += token_targets(header)
        targets += whole_targets(header)
        named = sorted({name.rpartition(".")[2] for name in (*modules, *parameters)})
        layers = layer_map(config)
        originals = {original_name(t.parameter, layers): t.shape for t in targets} if layers else {}
        return Signature(
            kind=self.name,
            targets=tuple(Target(name, shape) for name, shape in originals.items()) or tuple(targets),
            replicas=tuple(targets) if layers else (),
            parameters=parameter_count(header),
            rank=config["r"],
            alpha=config["lora_alpha"],
            target_modules=tuple(named),
        )

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """One LowRank or Dora a module, one ScaledVector a bias on lora_B, one ExpertLowRank a stack of experts.

        One TokenRows a module with trained tokens, one Replace a whole tensor.
        """
        deltas: list[Delta] = []
        biases, magnitudes = extras_of(header, "lora_bias"), extras_of(header, "use_dora")
        copies, start = copies_of(header), start_of(config)
        modules, parameters = split_parameters(config, factors_of(header))
        for module, sides in modules.items():
            scale = lora_scale(config, module, sides["A"].shape[0])
            target = names[f"{module}.weight"]
            low_rank = LowRank(
                target,
                *as_matrices(sides),
                scale,
                transposed=is_transposed(sides, config),
                copy=copies.get(module),
                embedding=on_embedding(sides),
                plain=not on_kernel(sides),
            )
            trained = Dora(low_rank, as_vector(magnitudes[module])) if module in magnitudes else low_rank
            deltas.append(Residual(trained, start, low_rank.a.shape[0], scale) if start else trained)
            if module in biases:
                deltas.append(ScaledVector(names[f"{module}.bias"], biases[module], scale))
        deltas += [parameter_delta(config, name, sides, names[name]) for name, sides in parameters.items()]
        deltas += token_deltas(config, header, names)
        return [*deltas, *whole_deltas(config, header, names)]
