"""Where the sublayers of a transformer end: what a bottleneck adapter reads, changes and is followed by.

    x ──► [norm] ──► attention or feed-forward ──► h ──► h + x ──► [norm] ──► next
    │     pre-norm     the last linear layer of it │      ▲         post-norm (BERT)
    └──────────────────────────────────────────────│──────┘
                                                   a bottleneck changes h

A row of `SUBLAYERS` names, for one model type, the module under which AdapterHub's library keeps the bottleneck, and
the modules of transformers that it belongs to. Adding a model type is adding a row, once a fixture covers it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from composer.errors import UnsupportedArchitectureError

__all__ = ["SUBLAYERS", "Sublayer", "find_sublayer", "model_types"]


@dataclass(frozen=True, slots=True)
class Sublayer:
    """One end of a sublayer, by names of modules.

    module: the linear layer that gives h. stream: the module whose first argument is x, the residual stream.
    norm: the LayerNorm that is applied to h + x; None where the model normalises before its sublayers.
    transposed: the linear layer keeps its weight as [in, out].
    """

    module: str
    stream: str
    norm: str | None = None
    transposed: bool = False

    @property
    def weight(self) -> str:
        """The parameter by which the sublayer is found in a checkpoint."""
        return f"{self.module}.weight"


@dataclass(frozen=True, slots=True)
class _Row:
    """Names relative to the layer that `holder` ends in."""

    holder: re.Pattern[str]
    sublayer: Sublayer


def _row(holder: str, module: str, stream: str, norm: str | None = None, *, transposed: bool = False) -> _Row:
    return _Row(re.compile(rf"(?P<prefix>(?:.+\.)?){holder}"), Sublayer(module, stream, norm, transposed))


_BERT = (
    _row(r"(?P<layer>layer\.\d+)\.attention\.output", "attention.output.dense", "attention.self.query",
         "attention.output.LayerNorm"),
    _row(r"(?P<layer>layer\.\d+)\.output", "output.dense", "intermediate.dense", "output.LayerNorm"),
)  # fmt: skip
_LLAMA = (
    _row(r"(?P<layer>layers\.\d+)\.attention_adapters", "self_attn.o_proj", "input_layernorm"),
    _row(r"(?P<layer>layers\.\d+)\.output_adapters", "mlp.down_proj", "post_attention_layernorm"),
)
_T5 = (
    _row(r"(?P<layer>(?:encoder|decoder)\.block\.\d+\.layer\.0)", "SelfAttention.o", "layer_norm"),
    _row(r"(?P<layer>decoder\.block\.\d+\.layer\.1)", "EncDecAttention.o", "layer_norm"),
    _row(r"(?P<layer>encoder\.block\.\d+\.layer\.1|decoder\.block\.\d+\.layer\.2)", "DenseReluDense.wo", "layer_norm"),
)
SUBLAYERS: dict[str, tuple[_Row, ...]] = {
    "bert": _BERT,
    "distilbert": (
        _row(r"(?P<layer>layer\.\d+)\.attention_adapters", "attention.out_lin", "attention.q_lin", "sa_layer_norm"),
        _row(r"(?P<layer>layer\.\d+)\.output_adapters", "ffn.lin2", "ffn.lin1", "output_layer_norm"),
    ),
    "gpt2": (
        _row(r"(?P<layer>h\.\d+)\.attention_adapters", "attn.c_proj", "ln_1", transposed=True),
        _row(r"(?P<layer>h\.\d+)\.output_adapters", "mlp.c_proj", "ln_2", transposed=True),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mt5": _T5,
    "roberta": _BERT,
    "t5": _T5,
    "xlm-roberta": _BERT,
}


def model_types() -> tuple[str, ...]:
    """The model types whose sublayers are known, sorted."""
    return tuple(sorted(SUBLAYERS))


def find_sublayer(model_type: str, holder: str) -> Sublayer | None:
    """The sublayer to which the bottleneck under the module `holder` belongs; None where it is at no sublayer's end.

    Raises UnsupportedArchitectureError for a model type that is not in the table.
    """
    if model_type not in SUBLAYERS:
        raise UnsupportedArchitectureError(
            f"bottlenecks of {model_type!r} models cannot be placed: it is not known where their sublayers end",
            expected=list(model_types()),
            found=model_type,
            remedy="train a LoRA on the same data, or serve the base with the adapters library",
        )
    for row in SUBLAYERS[model_type]:
        if match := row.holder.fullmatch(holder):
            layer = f"{match['prefix']}{match['layer']}."
            found = row.sublayer
            norm = found.norm and layer + found.norm
            return Sublayer(layer + found.module, layer + found.stream, norm, found.transposed)
    return None
