"""docs/onnx.md: every architecture in every dtype and flavour, measured: `python -m tests.bench.onnx_table`.

Each cell is one export of the tiny random model that the tests have of the architecture, whole, with its verification:
the largest difference from torch in float32. With names of architectures only these are measured, and the other rows
stay as they are.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from composer.errors import UnsupportedArchitectureError
from composer.exporters.onnx.variants import Variant

__all__ = ["COLUMNS", "INTRODUCTION", "PAGE", "read_table"]

PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"
REFUSED = "refused"
# Column → dtype of the weights, what is made of the graph. Whatever a variant that rounds agrees in is measured.
VARIANTS = {
    "fp32": ("float32", Variant()),
    "fp16": ("float16", Variant()),
    "bf16": ("bfloat16", Variant()),
    "fp16 computed": ("float16", Variant(compute="float16", min_agreement=0.0)),
    "int8": ("float32", Variant(quantise="int8", min_agreement=0.0)),
    "int4": ("float32", Variant(quantise="int4", min_agreement=0.0)),
    "genai": ("float32", Variant(flavour="genai")),
    "genai, fp16 computed": ("float16", Variant(flavour="genai", compute="float16", min_agreement=0.0)),
}
COLUMNS = ["architecture", "task", "opset", *VARIANTS, "allowed"]
INTRODUCTION = """\
# ONNX: architectures, dtypes, flavours

`registry compose … --export onnx` writes `model.onnx` beside the safetensors files and verifies it before anything is
published. The graph is traced once per configuration, without weights, and kept under `REGISTRY_HOME/graphs`; after
that, an export binds it to the new weights in milliseconds and spends its time on the verification. What else is made
of that graph, and by which options, is in [onnx-variants.md](onnx-variants.md).

- **Portable** is the flavour unless another is asked for: standard operators, a KV cache, dynamic batch and sequence,
  padding on the left for models that generate and on the right for encoders. `position_ids` is an input where the model
  takes positions at all; Bloom computes them from the mask.
- **Dtypes** are those that weights are stored in. Inputs, outputs and arithmetic are float32 for all of them: bfloat16
  and float16 weights lie in the safetensors file as they are and are cast inside the graph, which is exact.
- **Encoder-decoders** become two graphs over the same safetensors file. `encoder_model.onnx` gives the hidden states and
  the keys and values of every cross-attention, `present.N.encoder.key|value`; `decoder_with_past_model.onnx` takes them
  as `past_key_values.N.encoder.key|value` at each step, beside its own cache, which is empty at first. The names are
  optimum's. `registry run` and `composer.exporters.onnx.seq2seq_session` run the pair; both are verified together.
- **Mixtures of experts** keep each expert's weights where the checkpoint has them, and only the rows that the router
  sends to an expert are multiplied by its weights.

## Refused by name, before anything is written

An architecture that is not in the table; models with code of their own (`auto_map`); quantised weights (compose from
the base they were made of); rotary embeddings that depend on the length of the sequence (`dynamic`, `longrope`);
other decoders with cross-attention than those of the table, and encoders that are configured as decoders; experts with
another activation than SiLU; an encoder-decoder whose adapters are to be kept apart, or that is to be quantised, computed
in half precision or made for onnxruntime-genai; the flavour genai where the table says so.
Weights that do not fit the graph are refused when they are bound, by the names of their tensors.

## Measured

Written by `python -m tests.bench.onnx_table`. Tiny random models (hidden size 32, one or two layers) on ONNX Runtime's
CPU provider: the largest difference from torch in float32 over one prompt, a padded batch and, for models that
generate, a prefill in two parts (of encoder-decoders: of several tokens) and 8 tokens decoded with the cache.

- `fp32`, `fp16`, `bf16`: the dtype of the weights, portable. *Allowed* is what the export accepts of `bf16`: 2e-5 of the
  largest value that torch gives.
- `fp16 computed`, `int8`, `int4`: `--compute fp16` on float16 weights, `--onnx-quantise` of float32 weights; in brackets,
  the share of positions at which the largest value is torch's. int4 is too coarse for models of this size: it says that
  the operators are right, not what a real model loses. bfloat16 arithmetic is for CUDA.
- `genai`: `--flavour genai` in float32 and in float16. *refused*: its attention is not GroupQueryAttention's (a bias by
  distance, caps inside the softmax), or it does not generate. Encoder-decoders are portable and compute in float32.
- CUDA: not measured, no device was at hand.
"""


def read_table(page: str) -> tuple[list[str], dict[str, list[str]]]:
    """The columns, and the cells of each architecture."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    columns, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return columns, {row[0].strip("`"): [row[0].strip("`"), *row[1:]] for row in rows}


def render(rows: dict[str, list[str]]) -> str:
    """The whole page."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join([f"`{name}`", *cells[1:]]) + " |" for name, cells in sorted(rows.items())]
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"


def measure(name: str) -> list[str]:
    """The row of an architecture: one export for each column, all of them from one graph."""
    import torch

    from composer.exporters.onnx import ARCHITECTURES, export_onnx
    from tests.composer import seq2seq
    from tests.composer.exporters.test_onnx import save_tiny, tiny_names

    cells, allowed = [], 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for dtype, variant in VARIANTS.values():
            folder = Path(scratch) / dtype
            if not folder.exists() and ARCHITECTURES[name].is_seq2seq:
                seq2seq.build(seq2seq.tiny_names()[name]).to(getattr(torch, dtype)).save_pretrained(folder)
            elif not folder.exists():
                save_tiny(tiny_names()[name], getattr(torch, dtype), folder)
            try:
                result = export_onnx(folder, cache_dir=Path(scratch) / "graphs", variant=variant)
            except UnsupportedArchitectureError:
                cells.append(REFUSED)
                continue
            agreement = "" if result.agreement is None else f" ({result.agreement:.0%})"
            cells.append(f"{result.max_abs_diff:.1e}{agreement}")
            if dtype == "bfloat16":
                allowed = result.tolerance
    return [name, result.task, str(result.opset), *cells, f"{allowed:.0e}"]


@click.command()
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    """Measure the architectures NAMES, or all, and write the page."""
    from composer.exporters.onnx import ARCHITECTURES

    rows = read_table(PAGE.read_text(encoding="utf-8"))[1] if names else {}
    for name in names or ARCHITECTURES:
        rows[name] = measure(name)
        print(*rows[name], sep="  ", file=sys.stderr, flush=True)
    PAGE.write_text(render({name: row for name, row in rows.items() if name in ARCHITECTURES}), encoding="utf-8")


if __name__ == "__main__":
    main()
