"""A LoRA written as PEFT's save_pretrained writes one.

adapter_config.json         r = lora_alpha, so every scale is 1; rank_pattern and alpha_pattern where ranks differ
adapter_model.safetensors   base_model.model.<module>.lora_A.weight [r, in] and lora_B.weight [out, r]
README.md                   front matter that names the base and its fingerprint, and the inputs
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from composer.sinks import FolderSink
from composer.tensors import COPY_BYTES, DTYPES, encode_header

__all__ = ["FACTOR_NAMES", "PREFIX", "lora_config", "model_card", "most_common", "share", "write_json", "write_tensors"]

PREFIX = "base_model.model."
FACTOR_NAMES = (f"{PREFIX}{{}}.lora_A.weight", f"{PREFIX}{{}}.lora_B.weight")
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def lora_config(ranks: Mapping[str, int], modules: Iterable[str], **fields: Any) -> dict[str, Any]:
    """adapter_config.json for modules of the given ranks, each with a scale of 1.

    modules: all modules of the model, by which short target_modules are told from ambiguous ones. fields: base name,
    fan_in_fan_out, modules_to_save and what else is not the default.
    A pattern is a regular expression, matched as in PEFT's get_pattern_key; the longest comes first, so that no
    module is taken for one whose name ends alike.
    """
    top = max(ranks.values(), default=1)
    others = {name for name, rank in ranks.items() if rank != top}
    named = others | {name for name in ranks if not others.isdisjoint(_ends(name))}
    patterns = {re.escape(name): ranks[name] for name in sorted(named, key=lambda name: (-len(name), name))}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": top,
        "lora_alpha": top,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "target_modules": _target_modules(set(ranks), set(modules)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "modules_to_save": None,
        **fields,
    }


def _ends(name: str) -> Iterator[str]:
    """What is left of a module's name without its first parts."""
    while name:
        name = name.partition(".")[2]
        yield name


def _target_modules(chosen: set[str], modules: set[str]) -> list[str]:
    """The last parts of the names where these fit no other module, else the whole names."""
    ends = {name.rpartition(".")[2] for name in chosen}
    fitting = {name for name in modules if name.rpartition(".")[2] in ends}
    return sorted(ends if fitting == chosen else chosen)


def write_tensors(sink: FolderSink, name: str, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """A safetensors file of arrays that are made one at a time: only one of them is held."""
    layout = []
    with tempfile.TemporaryFile(dir=sink.folder) as spool:
        for key, array in tensors:
            layout.append((key, NAMES[array.dtype], array.shape))
            spool.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        spool.seek(0)
        with sink.open(name) as writer:
            writer.write(encode_header(layout, {"format": "pt"}))
            while chunk := spool.read(COPY_BYTES):
                writer.write(chunk)


def write_json(sink: FolderSink, name: str, fields: Mapping[str, Any]) -> None:
    """One JSON file; the order of its keys stays, because that of patterns decides."""
    sink.write(name, (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode())


def model_card(fields: Mapping[str, Any], title: str, text: str, table: Sequence[Sequence[object]] = ()) -> bytes:
    """README.md: front matter (empty fields are left out), a title, a paragraph, a table whose first row is its head.

    JSON is YAML, so quoting is json's.
    """
    given = {"library_name": "peft", **{key: value for key, value in fields.items() if value}}
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in given.items()), "---"]
    lines += ["", f"# {title}", "", text, ""]
    for index, row in enumerate(table):
        lines.append(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |")
        if index == 0:
            lines.append("|" + "---|" * len(row))
    return ("\n".join(lines).rstrip() + "\n").encode()


def share(part: float, total: float) -> float:
    """part / total to 6 digits; 0 where there is nothing."""
    return float(f"{part / total:.6g}") if total else 0.0


def most_common(values: Iterable[Any]) -> Any:
    """The value that occurs most, the first of equals; None where there is none."""
    counts = Counter(value for value in values if value)
    return counts.most_common(1)[0][0] if counts else None
