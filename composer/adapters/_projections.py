"""Random projections that an adapter shares and did not save, drawn again as PEFT draws them: torch's generator, CPU.

    vera_projections      A [r, largest in], B [largest out, r]               peft/tuners/vera, peft/tuners/pvera
    randlora_projections  A [r, 1, min], B [max, n, r] of the largest sizes   peft/tuners/randlora

The largest sizes are those of the modules that the adapter touches: only the base tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from composer.adapters import BaseTensor
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind
from composer.deltas import Delta
from composer.tensors import SafetensorsHeader

__all__ = ["DrawnKind", "check_key", "randlora_projections", "vera_projections"]

KEY = "projection_prng_key"


def check_key(config: dict[str, Any]) -> None:
    """Raise CorruptFileError unless the config holds the seed of the projections."""
    if type(config.get(KEY)) is not int or not 0 <= config[KEY] < 2**63:
        raise damaged(f"adapter_config.json: {KEY}={config.get(KEY)!r} is not a seed", "an integer", config.get(KEY))


class DrawnKind(ModuleKind):
    """A kind with such projections; `build` finds the base's (largest out, largest in) in config["sizes"]."""

    def deltas_on(
        self,
        config: dict[str, Any],
        header: SafetensorsHeader,
        names: Mapping[str, str],
        base: Mapping[str, BaseTensor],
    ) -> list[Delta]:
        """As every kind, with the largest sizes among the weights of the adapter's modules."""
        shapes = [base[f"{module}.weight"].shape for module in self._own(header)]
        outputs, inputs = map(max, zip(*shapes, strict=True))
        sizes = (inputs, outputs) if config.get("fan_in_fan_out") else (outputs, inputs)
        return self.deltas({**config, "sizes": sizes}, header, names)


@lru_cache(maxsize=1)
def vera_projections(rank: int, halves: int, sizes: tuple[int, int], key: int) -> tuple[np.ndarray, np.ndarray]:
    """(A [halves · r, in], B [out, r]), float32: uniform within √(6 / columns), A first."""
    import torch

    generator = torch.Generator().manual_seed(key)
    outputs, inputs = sizes
    drawn = []
    for shape in ((halves * rank, inputs), (outputs, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        drawn.append(torch.empty(shape).uniform_(-bound, bound, generator=generator).numpy())
    return drawn[0], drawn[1]


@lru_cache(maxsize=1)
def randlora_projections(
    rank: int, sizes: tuple[int, int], key: int, sparse: bool, very_sparse: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(A [r, 1, min], B [max, n, r]) with n = ⌈min / r⌉, float32, each divided by its standard deviation.

    Dense ones are drawn in bf16, which PEFT takes wherever the device has it (every CPU does). Sparse ones are −1, 0
    or 1, two thirds of them 0; very sparse ones are 0 but for one in √min.
    """
    import torch

    generator = torch.Generator().manual_seed(key)
    least, most = min(sizes), max(sizes)
    count = -(-least // rank)
    if sparse or very_sparse:
        edge = 1 / (2 * (math.sqrt(least) if very_sparse else 3))
        drawn = [torch.rand(shape, generator=generator) for shape in ((rank, 1, least), (most, count, rank))]
        pair = [(uniform > 1 - edge).float() - (uniform < edge).float() for uniform in drawn]
    else:
        small = _kaiming((rank, 1, least), generator)
        pair = [small, torch.cat([_kaiming((most, 1, rank), generator) for _ in range(count)], dim=1)]
    small, large = (drawn / drawn.std() for drawn in pair)
    return small.float().numpy(), large.float().numpy()


def _kaiming(shape: tuple[int, ...], generator: Any) -> Any:
    import torch

    return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)
