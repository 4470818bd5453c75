"""What init_lora_weights says of the weights beside which a LoRA was trained: the base's own, or what is left of them.

gaussian, orthogonal, eva, mica     the base's own
pissa, olora                        a residual that PEFT recomputes from the base on loading (composer.deltas_residual)
pissa_niter_N                       the same by a randomised SVD, which no two loadings compute alike
corda, loftq, lora_ga               a residual that depends on data or on a quantisation
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from composer.adapters import refuse
from composer.adapters._lora_tensors import copies_of, on_embedding, on_kernel
from composer.deltas_residual import Start
from composer.ends import is_end
from composer.tensors import SafetensorsHeader, TensorSpec

__all__ = ["check_start", "start_of"]

PLAIN = (True, False, "gaussian", "orthogonal", "eva", "mica", None)
RECOMPUTED = ("pissa", "olora")
CONVERT = (
    "convert it where it was trained, with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…): the "
    "result is a plain LoRA of twice the rank"
)


def start_of(config: Mapping[str, Any]) -> Start | None:
    """How the start is recomputed; None where the LoRA was trained beside the base's own weights."""
    init = config.get("init_lora_weights", True)
    found = init.lower() if isinstance(init, str) else init
    return cast("Start", found) if found in RECOMPUTED else None


def check_start(
    config: Mapping[str, Any],
    header: SafetensorsHeader,
    modules: Mapping[str, dict[str, TensorSpec]],
    parameters: Mapping[str, Any],
) -> None:
    """Raise UnsupportedAdapterError where the weights that the LoRA was trained beside cannot be computed."""
    init = config.get("init_lora_weights", True)
    start = start_of(config)
    if start is None and init not in PLAIN:
        drawn = isinstance(init, str) and init.lower().startswith("pissa")
        raise refuse(
            f"init_lora_weights={init!r} changes the base's own weights, "
            + ("by random numbers that are not saved" if drawn else "by what the adapter does not hold"),
            expected=f"one of {', '.join(map(str, (*PLAIN[2:-1], *RECOMPUTED)))}",
            found=init,
            remedy=CONVERT,
        )
    if start is None:
        return
    others = [name for name, sides in modules.items() if on_embedding(sides) or on_kernel(sides)]
    others += [*parameters, *copies_of(header), *(name for name in modules if is_end(f"{name}.weight"))]
    if others or (start == "olora" and config.get("fan_in_fan_out")):
        raise refuse(
            f"init_lora_weights={init!r} is composed on linear layers inside the model only",
            expected="linear modules that are neither end of the model",
            found=others[0] if others else "fan_in_fan_out",
            remedy=CONVERT,
        )
