"""Perplexity of a base and of what was composed from it, on a text that the user gives (`compose --probe FILE`).

    text ─► tokens ─► windows of 512 ─► mean of −log p(token | those before it in its window) ─► exp

Both run in float32 by torch, with the tokenizer of their own folder; the first token of a window is not predicted. It
shows what was forgotten: an adapter does well on its own task and may still ruin everything else. Virtual tokens stand
before every window, and are not predicted: both models are asked for the same tokens, out of the same ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from composer.errors import (
    NonFiniteError,
    NotFoundError,
    UnsupportedArchitectureError,
    UsageError,
)
from composer.loading import load_model
from composer.plan import Plan
from composer.recipe import Export

__all__ = ["MAX_PROBE", "MAX_TOKENS", "check_probe", "perplexity", "probe", "probe_digest"]

WINDOW = 512
MAX_TOKENS = 8192
MAX_PROBE = 1 << 20  # characters of a text, which MAX_TOKENS tokens do not fill
GENERATES = ("ForCausalLM", "LMHeadModel")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def probe_digest(text: str) -> str:
    """sha256 of the text in UTF-8, as 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def check_probe(plan: Plan) -> None:
    """Raise before anything is written when perplexity before and after cannot be compared for this plan.

    UnsupportedArchitectureError (no language model, quantised), NotFoundError (no tokenizer) or UsageError (a LoRA is
    written, and no model).
    """
    checkpoint = plan.checkpoint
    if plan.recipe.export == Export.PEFT:
        raise UsageError(
            "a LoRA alone has no perplexity",
            expected="an export that is a model",
            found="export peft",
            remedy="leave --probe out, or compose to safetensors",
        )
    if not checkpoint.architecture.endswith(GENERATES) or checkpoint.scheme:
        raise UnsupportedArchitectureError(
            f"{checkpoint.architecture}: perplexity is of language models that are not quantised",
            expected=[f"…{name}" for name in GENERATES],
            found=checkpoint.scheme.name if checkpoint.scheme else checkpoint.architecture,
            remedy="leave --probe out; a quantised base can be composed alone first, which writes it unquantised",
        )
    if not any(name in checkpoint.files for name in TOKENIZERS):
        raise NotFoundError(
            "the base has no tokenizer, so a text cannot be probed",
            expected=list(TOKENIZERS),
            found=", ".join(list(checkpoint.files)[:8]),
            remedy="put the tokenizer's files beside the weights and register the base anew",
        )


def probe(
    plan: Plan, composed: Path, text: str, progress: Callable[[str], None], words: Sequence[int] = ()
) -> dict[str, Any]:
    """The facts for composition.json: the text's digest, how many tokens count, and both perplexities.

    words: the ids of virtual tokens that are words of the composed model's vocabulary.

    Raises UsageError (a text of one token or none), NonFiniteError and what loading a model raises.
    """
    base = plan.checkpoint.files["config.json"].parent
    found: dict[str, float] = {}
    for name, folder, before in (("base", base, ()), ("composed", composed, words)):
        progress(f"perplexity of the {name} model")
        value, tokens = perplexity(folder, text, before)
        found[name] = float(f"{value:.6g}")
    return {"text_sha256": probe_digest(text), "tokens": tokens, "perplexity": found}


def perplexity(folder: Path, text: str, words: Sequence[int] = ()) -> tuple[float, int]:
    """The perplexity of the model in `folder` on the first MAX_TOKENS tokens of `text`, and of how many it is.

    words: ids that stand before every window, instead of before the text alone, where the tokenizer puts them. Virtual
    tokens that lie in files beside the weights are found there.
    """
    import torch
    from transformers import AutoTokenizer

    from composer.exporters.onnx.live import LiveModel

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=MAX_TOKENS + len(words))["input_ids"]
    before = torch.tensor([list(words)], dtype=torch.int64)
    if words and ids[0, : len(words)].tolist() == list(words):
        ids = ids[:, len(words) :]
    if ids.shape[1] < 2:
        raise UsageError(
            f"the text to probe has {ids.shape[1]} tokens",
            expected="two or more",
            found=text[:40],
            remedy="give a text of some paragraphs",
        )
    model = LiveModel(load_model(folder), folder, "logits")
    longest = (getattr(model.config, "max_position_embeddings", None) or WINDOW) - len(words) - model.tokens
    total, count = 0.0, 0
    with torch.inference_mode():
        for window in ids.split(max(2, min(WINDOW, longest)), dim=1):
            whole = torch.cat([before, window], dim=1)
            logits = model(whole, torch.ones_like(whole))["logits"][0, len(words) : -1].double()
            logits[:, list(words)] = -math.inf  # they are never generated, and the base does not have them
            total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
            count += window.shape[1] - 1
    mean = total / count
    if not math.isfinite(mean) or mean > 700:
        raise NonFiniteError(
            f"the model in {folder.name} has no finite perplexity on this text",
            expected="finite probabilities",
            found=mean,
            remedy="the weights have overflowed or are damaged: compose with lower weights or --dtype fp32",
        )
    return math.exp(mean), count
