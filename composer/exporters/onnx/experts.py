"""A mixture of experts in a graph: only the rows that the router sends to an expert are multiplied by its weights.

    rows [t, h] ─┬────────────► GatherND ─► Gemm gate ─► SiLU ─┐
    table [t, E] ┤ Split ─► NonZero ──┤     Gemm up ───────── Mul ─► Gemm down ─► × weight ─► ScatterND (add) ─► [t, h]
                 │  E columns         │                                              ▲
                 └────────────────────┴───────────── GatherND ───────────────────────┘

There is no control flow: an expert without rows multiplies an array of none, and its weights are not read. transformers
stacks all experts of a layer into one parameter and loops over those that were hit, which a trace cannot follow; here
they are parameters of their own under the names that checkpoints give them, so that each is bound where it is stored.
One operator stands for a layer's experts while torch traces, so that a trace takes as long as that of a dense model.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["EXPERT_ACTIVATION", "separate_experts", "translations"]

EXPERT_ACTIVATION = "silu"
"""`hidden_act` of the experts that the operator computes: down(silu(gate x) · up x)."""

Translation = dict[Any, Any]


def separate_experts(module: torch.nn.Module, parts: tuple[str, str, str]) -> None:
    """Replace every stack of experts in `module` by experts with weights of their own; `module` is changed.

    parts: what checkpoints call the gate [i, h], up [i, h] and down [h, i] projection of an expert.
    The new parameters are allocated by torch.empty and not initialised.
    """
    for parent in list(module.modules()):
        stacked = getattr(parent, "experts", None)
        if stacked is not None and hasattr(stacked, "gate_up_proj"):
            experts, width, hidden = stacked.gate_up_proj.shape
            parent.experts = _separated(parts, experts, width // 2, hidden)


def _separated(parts: tuple[str, str, str], experts: int, inner: int, hidden: int) -> torch.nn.Module:
    import torch

    operator = _operator()

    class Projection(torch.nn.Module):
        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(rows, columns), requires_grad=False)

    class Experts(torch.nn.ModuleList):
        def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            table = hidden_states.new_zeros(hidden_states.shape[0], experts).scatter(1, top_k_index, top_k_weights)
            weights = [[expert[part].weight for expert in self] for part in parts]
            return operator(hidden_states, table, *weights)

    shapes = dict(zip(parts, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True))
    return Experts(
        torch.nn.ModuleDict({part: Projection(*shape) for part, shape in shapes.items()}) for _ in range(experts)
    )


@lru_cache(maxsize=1)  # an operator is registered once a process
def _operator() -> Any:
    """`composer::experts`: rows float32 [t, h], table float32 [t, E], 3 · E weights → float32 [t, h]."""
    import torch

    def experts(
        rows: torch.Tensor,
        table: torch.Tensor,
        gate: list[torch.Tensor],
        up: list[torch.Tensor],
        down: list[torch.Tensor],
    ) -> torch.Tensor:
        raise NotImplementedError("composer::experts is traced, not run")

    schema = "(Tensor rows, Tensor table, Tensor[] gate, Tensor[] up, Tensor[] down) -> Tensor"
    operator = torch.library.custom_op("composer::experts", experts, mutates_args=(), schema=schema)
    operator.register_fake(lambda rows, table, gate, up, down: torch.empty_like(rows))
    return operator


def translations() -> Translation:
    """What torch.onnx.export writes for the operator."""
    import torch
    from onnxscript import opset18 as op

    def experts(rows: Any, table: Any, gate: Any, up: Any, down: Any) -> Any:
        first, flat = op.Constant(value_ints=[1]), op.Constant(value_ints=[-1])
        columns = op.Split(table, axis=1, num_outputs=len(gate))
        total = op.Mul(rows, op.Constant(value_float=0.0))
        for column, *weights in zip(columns, gate, up, down, strict=True):
            weight = op.Reshape(column, flat)
            where = op.Transpose(op.NonZero(weight), perm=[1, 0])
            mine = op.GatherND(rows, where)
            gated, raised = (op.Gemm(mine, matrix, transB=1) for matrix in weights[:2])
            product = op.Mul(op.Mul(gated, op.Sigmoid(gated)), raised)
            out = op.Gemm(product, weights[2], transB=1)
            share = op.Unsqueeze(op.GatherND(weight, where), first)
            total = op.ScatterND(total, where, op.Mul(out, share), reduction="add")
        return total

    _operator()
    return {torch.ops.composer.experts.default: experts}
