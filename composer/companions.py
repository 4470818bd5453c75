"""The small files of the output. config.json is the base's own file, byte for byte, unless the weights that are written
need another:

dtype, no quantization_config     a number format was chosen, or the base is quantised and the output is not
tie_word_embeddings false         both ends of a pair that the base ties are written
num_hidden_layers                 layers of the base are used several times
vocab_size                        the vocabulary was resized; the tokenizer is then the adapter's

A plan that an exporter derived may bring files, and fields of config.json, of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer.files import copy_names, read_json
from composer.plan import Plan
from composer.vocabulary import tokenizer_files

__all__ = ["companion_files"]

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def companion_files(plan: Plan) -> Iterator[tuple[str, bytes]]:
    """The files that go along with the weights, by name: configs, tokenizer, chat template."""
    files = {name: plan.checkpoint.files[name] for name in copy_names(plan.checkpoint.files)}
    if plan.vocabulary:
        others = {name: path for name, path in files.items() if name not in tokenizer_files(files)}
        files = {**others, **plan.vocabulary.tokenizer}
    for name, path in files.items():
        if name not in plan.files:
            yield name, _config(plan, path) if name == "config.json" else path.read_bytes()
    if "config.json" not in {*files, *plan.files}:  # a GGUF file alone: its metadata says what the config is
        yield "config.json", _config(plan, None)
    yield from plan.files.items()


def _config(plan: Plan, path: Path | None) -> bytes:
    dtype = plan.config_dtype
    changes: dict[str, Any] = {**plan.config_changes, **({"dtype": DTYPES[dtype]} if dtype else {})}
    if path is not None and not changes:
        return path.read_bytes()
    config = dict(plan.checkpoint.config) if path is None else read_json(path)
    if dtype:
        config.pop("torch_dtype", None)
        config.pop("quantization_config", None)
    config |= changes
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
