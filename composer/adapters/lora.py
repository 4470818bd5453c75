"""LoRA as PEFT saves it (arXiv:2106.09685), with rsLoRA (arXiv:2312.03732) and DoRA (arXiv:2402.09353).

base_model.model.<module>.lora_A.weight [r, in]      base_model.model.<module>.lora_B.weight [out, r]
base_model.model.<module>.lora_B.bias [out]            with lora_bias
base_model.model.<module>.lora_magnitude_vector [out]  with use_dora; older files add .weight
base_model.model.<module>.lora_embedding_A [r, V]    base_model.model.<module>.lora_embedding_B [d, r]
base_model.model.<module>.base_layer.weight          the base's own W, which PEFT saves along with a LoRA on either end
base_model.model.<parameter>                         a trained bias or a module of modules_to_save, whole

W += s·B·A     b += s·b_B     W = m/‖V‖·V with V = W + s·B·A (DoRA)     W += s·(B·A)ᵀ (embedding, W [V, d])
s = alpha / r, or alpha / √r with use_rslora; rank_pattern and alpha_pattern override per module
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from composer.adapters import Signature, Target, adapter_kind, parameter_count, refuse
from composer.deltas import Delta, LowRank, Replace
from composer.deltas_dora import Dora, ScaledVector
from composer.errors import CorruptFileError, TargetMismatchError
from composer.tensors import FLOAT_DTYPES, SafetensorsHeader, TensorSpec

__all__ = ["Lora", "pattern_value"]

PREFIX = "base_model.model."
FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.default)?(?(embedding)|\.weight)"
)
EXTRA = {
    "lora_bias": re.compile(r"(?P<module>.+)\.lora_B(?:\.default)?\.bias"),
    "use_dora": re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?"),
}
COPY = re.compile(r"(?P<module>.+)\.base_layer\.weight")
WRAPPED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer|original_module)(?=\.)")
UNMERGEABLE_TENSORS = {
    "token_adapter": "trainable_token_indices",
    "trainable_tokens_delta": "trainable_token_indices",
}
SWITCHES = ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias")
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica", None)


@adapter_kind
class Lora:
    """Low-rank deltas on linear (and Conv1D) weights and on embeddings."""

    name = "lora"
    peft_types = ("LORA",)

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Refuse the variants of LoRA whose delta is not s·B·A, and files that do not pair up."""
        for key, what in UNMERGEABLE_TENSORS.items():
            if any(key in name for name in header.tensors):
                raise refuse(
                    f"{what} is not supported yet",
                    expected="plain LoRA on linear layers",
                    found=key,
                    remedy="merge it with PEFT, or retrain without it",
                )
        unsupported = {
            "layer_replication": "layer replication",
            "trainable_token_indices": "trainable tokens",
            "target_parameters": "LoRA on bare parameters (MoE experts)",
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
        if config.get("init_lora_weights", True) not in PLAIN_INITS:
            raise refuse(
                f"init_lora_weights={config['init_lora_weights']!r} changes the base's own weights",
                expected="an initialisation that leaves the base as it is",
                found=config["init_lora_weights"],
                remedy="convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)",
            )
        _check_numbers(config)
        factors = _factors(header)
        if not factors:
            raise CorruptFileError(
                "the adapter holds no lora_A and lora_B tensors",
                expected=f"{PREFIX}<module>.lora_A.weight",
                found=list(header.tensors)[:5],
                remedy="save the adapter with PEFT's save_pretrained",
            )
        for module, sides in factors.items():
            _check_pair(module, sides)
        _check_extras(config, header)
        for module, copy in _copies(header).items():
            shape = _shape(factors[module], config)
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
        """[out, in] for each LoRA module ([in, out] with fan_in_fan_out), the own shape of each whole tensor."""
        targets = []
        for module, sides in _factors(header).items():
            targets.append(Target(f"{module}.weight", _shape(sides, config)))
        targets += [Target(f"{module}.bias", spec.shape) for module, spec in _extras(header, "lora_bias").items()]
        targets += [Target(parameter, spec.shape) for parameter, spec in _whole(header).items()]
        modules = sorted({module.rpartition(".")[2] for module in _factors(header)})
        return Signature(
            kind=self.name,
            targets=tuple(targets),
            parameters=parameter_count(header),
            rank=config["r"],
            alpha=config["lora_alpha"],
            target_modules=tuple(modules),
        )

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """One LowRank or Dora a module, one ScaledVector a bias on lora_B, one Replace a whole tensor."""
        deltas: list[Delta] = []
        biases, magnitudes = _extras(header, "lora_bias"), _extras(header, "use_dora")
        copies = _copies(header)
        for module, sides in _factors(header).items():
            scale = lora_scale(config, module, sides["A"].shape[0])
            target = names[f"{module}.weight"]
            low_rank = LowRank(
                target,
                sides["A"],
                sides["B"],
                scale,
                transposed=_transposed(sides, config),
                copy=copies.get(module),
                embedding=_on_embedding(sides),
            )
            deltas.append(Dora(low_rank, magnitudes[module]) if module in magnitudes else low_rank)
            if module in biases:
                deltas.append(ScaledVector(names[f"{module}.bias"], biases[module], scale))
        deltas += [Replace(names[parameter], spec) for parameter, spec in _whole(header).items()]
        return deltas


def lora_scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r or alpha / √r, after rank_pattern and alpha_pattern.

    A pattern is a regular expression for the whole module name or its end after a dot; the first that matches wins, as
    in PEFT's get_pattern_key.
    Raises TargetMismatchError when the configured rank is not that of the tensors.
    """
    configured = pattern_value(config.get("rank_pattern"), module, config["r"])
    if configured != rank:
        raise TargetMismatchError(
            f"{module}: adapter_config.json says rank {configured}, the tensors have {rank}",
            expected=configured,
            found=rank,
            remedy="the config belongs to another adapter, or rank_pattern is missing: restore the right one",
            keys=[module],
        )
    alpha = float(pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def pattern_value(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that fits the module's name or its end, or `default`, as in PEFT.

    Raises CorruptFileError for a pattern that is not a regular expression.
    """
    for pattern, value in (patterns or {}).items():
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise CorruptFileError(
                f"adapter_config.json: the pattern {pattern!r} is not a regular expression: {error}",
                expected="a module name or a regular expression",
                found=pattern,
                remedy="correct the pattern",
            ) from None
        if matched:
            return value
    return default


def _check_numbers(config: dict[str, Any]) -> None:
    """Ranks are positive integers, alphas finite numbers, patterns map to them, switches are booleans."""
    wrong = [
        field for field, is_valid in (("r", _is_rank), ("lora_alpha", _is_number)) if not is_valid(config.get(field))
    ]
    for field, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict) or not all(map(is_valid, patterns.values())):
            wrong.append(field)
    wrong += [field for field in SWITCHES if config.get(field) not in (True, False, None)]
    if wrong:
        raise CorruptFileError(
            f"adapter_config.json: {wrong[0]}={config.get(wrong[0])!r} is not what PEFT writes",
            expected="a positive integer as rank, a finite number as alpha, true or false as switch",
            found={field: config.get(field) for field in wrong},
            remedy="restore the file that PEFT's save_pretrained wrote",
        )


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**53


def _factors(header: SafetensorsHeader) -> dict[str, dict[str, TensorSpec]]:
    found: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in sorted(header.tensors.items()):
        if match := FACTOR.fullmatch(name.removeprefix(PREFIX)):
            found.setdefault(match["module"], {})[match["side"]] = spec
    return found


def _on_embedding(sides: dict[str, TensorSpec]) -> bool:
    return "lora_embedding_" in sides["A"].name


def _transposed(sides: dict[str, TensorSpec], config: dict[str, Any]) -> bool:
    """Whether the base keeps W as [in, out]: an embedding always does, as [V, d]."""
    return _on_embedding(sides) or bool(config.get("fan_in_fan_out"))


def _shape(sides: dict[str, TensorSpec], config: dict[str, Any]) -> tuple[int, ...]:
    """The shape of W in the base."""
    shape = (sides["B"].shape[0], sides["A"].shape[1])
    return shape[::-1] if _transposed(sides, config) else shape


def _copies(header: SafetensorsHeader) -> dict[str, TensorSpec]:
    """The base's own weights in the file, by the LoRA module they belong to."""
    factors = _factors(header)
    matches = ((COPY.fullmatch(name.removeprefix(PREFIX)), spec) for name, spec in header.tensors.items())
    return {match["module"]: spec for match, spec in matches if match and match["module"] in factors}


def _extras(header: SafetensorsHeader, option: str) -> dict[str, TensorSpec]:
    """The tensors [out] that belong to `option`, by their LoRA module."""
    matches = ((EXTRA[option].fullmatch(name.removeprefix(PREFIX)), spec) for name, spec in header.tensors.items())
    return {match["module"]: spec for match, spec in matches if match}


def _whole(header: SafetensorsHeader) -> dict[str, TensorSpec]:
    used = {spec.name for spec in _copies(header).values()}
    used |= {spec.name for option in EXTRA for spec in _extras(header, option).values()}
    return {
        WRAPPED.sub("", name.removeprefix(PREFIX)): spec
        for name, spec in sorted(header.tensors.items())
        if name not in used and not FACTOR.fullmatch(name.removeprefix(PREFIX))
    }


def _check_extras(config: dict[str, Any], header: SafetensorsHeader) -> None:
    """Every LoRA module has its bias or magnitude where the config says so, and none where it does not."""
    if config.get("use_dora") and config.get("lora_bias"):
        raise refuse(
            "DoRA with a bias on lora_B has no defined merge",
            expected="use_dora or lora_bias, not both",
            found={"use_dora": True, "lora_bias": True},
            remedy="retrain with one of them, as PEFT demands",
        )
    factors = _factors(header)
    for option in EXTRA:
        extras = _extras(header, option)
        if extras and not config.get(option):
            raise refuse(
                f"the file holds {next(iter(extras.values())).name}, but adapter_config.json does not set {option}",
                expected=f"{option}: true",
                found=config.get(option),
                remedy="restore the config that was saved with these tensors",
            )
        unpaired = sorted(set(extras) ^ set(factors)) if config.get(option) else []
        wrong = [m for m, spec in extras.items() if m in factors and spec.shape != (factors[m]["B"].shape[0],)]
        if unpaired or wrong:
            module = (unpaired or wrong)[0]
            raise CorruptFileError(
                f"{module}: {option} is set, and its tensor or its LoRA is missing or of another size",
                expected="one tensor [out] for each LoRA module",
                found=list(extras[module].shape) if module in extras else "none",
                remedy="the file is damaged: save the adapter again",
            )


def _check_pair(module: str, sides: dict[str, TensorSpec]) -> None:
    missing = {"A", "B"} - set(sides)
    if missing:
        raise CorruptFileError(
            f"{module} has no lora_{missing.pop()}",
            expected="lora_A and lora_B",
            found=[s.name for s in sides.values()],
            remedy="the file is incomplete: save the adapter again",
        )
    a, b = sides["A"], sides["B"]
    if _on_embedding(sides) != ("lora_embedding_" in b.name):
        raise CorruptFileError(
            f"{module} has one factor of an embedding and one of a linear layer",
            expected="lora_embedding_A and lora_embedding_B, or lora_A and lora_B",
            found=[a.name, b.name],
            remedy="the file is damaged: save the adapter again",
        )
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise refuse(
            f"{module}: LoRA on a convolution is not supported yet",
            expected="matrices",
            found=[list(a.shape), list(b.shape)],
            remedy="merge it with PEFT",
        )
    if a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise CorruptFileError(
            f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} have no common rank",
            expected="A [r, in] and B [out, r]",
            found=[list(a.shape), list(b.shape)],
            remedy="the file is damaged: save the adapter again",
        )
