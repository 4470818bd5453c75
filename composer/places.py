"""What an adapter may bind to in a checkpoint: the tensors that it stores, and those that only its modules have.

    stored        model.layers.0.self_attn.q_proj.weight …
    tied head     lm_head.weight, where a decoder takes it from its embedding
    stacks        model.layers.0.mlp.experts.gate_up_proj, where the experts are stored one by one

The plan brings a change of one of the latter two to the stored tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

from composer.checkpoint import Checkpoint
from composer.ends import with_tied_head
from composer.experts import expert_stacks

__all__ = ["places", "with_module_places"]


def with_module_places(shapes: Mapping[str, tuple[int, ...]], architecture: str) -> dict[str, tuple[int, ...]]:
    """Tensor name to shape, stored ones first. shapes: of the stored tensors; architecture: the class of the model."""
    stacks = {name: stack.shape for name, stack in expert_stacks(shapes).items()}
    return {**with_tied_head(shapes, architecture), **stacks}


def places(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The same of an opened checkpoint."""
    return with_module_places(checkpoint.shapes, checkpoint.architecture)
