"""Places of a weight that kinds draw at random and do not keep."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

__all__ = ["random_places"]


@lru_cache(maxsize=16)
def random_places(size: int, count: int, seed: int) -> np.ndarray:
    """The first `count` of a permutation of `size` numbers, int64, as torch's generator for the CPU draws it."""
    import torch

    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].numpy().copy()
