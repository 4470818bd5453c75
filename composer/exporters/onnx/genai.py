"""What onnxruntime-genai reads beside a grouped graph: genai_config.json, which names inputs, sizes and end tokens.

The tokenizer's files are those of the checkpoint. `generate_by_genai` runs the folder as its users do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer.errors import MissingDependencyError
from composer.exporters.onnx.session import PAST, PRESENT
from composer.files import read_json

__all__ = ["GENAI_CONFIG", "encode_by_genai", "genai_config", "generate_by_genai", "require_genai"]

GENAI_CONFIG = "genai_config.json"
CONTEXT = 2048  # where the config does not say how far positions go


def require_genai() -> Any:
    """The module onnxruntime_genai, or MissingDependencyError naming the extra that brings it."""
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise MissingDependencyError(
            "onnx: onnxruntime-genai is not installed, so a graph for it cannot be checked",
            expected="onnxruntime-genai (extra 'genai')",
            remedy="install the extra 'genai', or export the portable flavour",
            package="onnxruntime-genai",
            extras=["genai"],
        ) from error
    return onnxruntime_genai


def genai_config(folder: Path, config: dict[str, Any], file: str, inputs: Sequence[str]) -> dict[str, Any]:
    """The content of genai_config.json for the model in `folder`.

    config: config.json. file: the graph's name. inputs: those of the graph; onnxruntime-genai makes only known ones.
    """
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    ids = {name: generation.get(f"{name}_token_id", config.get(f"{name}_token_id")) for name in ("bos", "eos", "pad")}
    ends = ids["eos"] if isinstance(ids["eos"], list) else [ids["eos"]]
    ends = [end for end in ends if end is not None] or [config["vocab_size"]]  # one that no model chooses: none
    heads = config.get("num_attention_heads") or config["n_head"]
    hidden = config.get("hidden_size") or config["n_embd"]
    parts = {"key": "names", "value": "names"}
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config["vocab_size"],
            "context_length": config.get("max_position_embeddings") or config.get("n_positions") or CONTEXT,
            "bos_token_id": ends[0] if ids["bos"] is None else ids["bos"],
            "eos_token_id": ends,
            "pad_token_id": ends[0] if ids["pad"] is None else ids["pad"],
            "decoder": {
                "filename": file,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": hidden,
                "head_size": config.get("head_dim") or hidden // heads,
                "num_attention_heads": heads,
                "num_key_value_heads": config.get("num_key_value_heads") or heads,
                "num_hidden_layers": config.get("num_hidden_layers") or config["n_layer"],
                "inputs": {
                    **{name: name for name in inputs},
                    **{f"past_{part}_{plural}": f"{PAST}%d.{part}" for part, plural in parts.items()},
                },
                "outputs": {
                    "logits": "logits",
                    **{f"present_{part}_{plural}": f"{PRESENT}%d.{part}" for part, plural in parts.items()},
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.get("max_position_embeddings") or config.get("n_positions") or CONTEXT,
            "past_present_share_buffer": True,
        },
    }


def generate_by_genai(folder: Path, file: str, ids: Sequence[int], count: int) -> list[int]:
    """The most likely tokens after `ids`, at most `count`, that onnxruntime-genai gives of the folder.

    file: the graph to run in place of the one that genai_config.json names.
    """
    genai = require_genai()
    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"filename": file}}}))
    model = genai.Model(config)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + count, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens([list(ids)])
    tokens: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


def encode_by_genai(folder: Path, file: str, text: str) -> list[int] | None:
    """The ids that onnxruntime-genai's own tokenizer gives; None where it cannot read the folder's tokenizer."""
    genai = require_genai()
    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"filename": file}}}))
    try:
        tokenizer = genai.Tokenizer(genai.Model(config))
        return [int(number) for number in tokenizer.encode(text)]
    except RuntimeError:  # its only exception
        return None
