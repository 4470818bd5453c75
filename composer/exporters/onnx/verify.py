"""Run the exported graph in ONNX Runtime against the torch model loaded from the same folder, both in float32.

    causal LM   one prompt, prompts as a batch with left padding, the same with random ids, a prefill in two parts;
                each is prefilled, then decoded greedily with the KV cache; the oracle is one torch pass without a cache
    encoder     one prompt, prompts and random ids as batches with right padding
    seq2seq     the same for the encoder, and greedy decoding with the cache against one torch pass

The torch model comes from `from_pretrained`, which finds the weights by its own rules: it shares nothing with `bind`.
Bottlenecks are hooked into it by composer.runtime, and virtual tokens put before its input by `live`; neither shares
anything with the nodes that the graph has for them.
Only positions that are not padding are compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.bottlenecks import BUNDLE
from composer.errors import OnnxExportError, OnnxVerificationError
from composer.exporters.onnx.architectures import Architecture
from composer.exporters.onnx.live import LiveModel
from composer.exporters.onnx.seq2seq_session import Seq2SeqSession
from composer.exporters.onnx.session import forward, open_session
from composer.exporters.onnx.skeleton import quiet

if TYPE_CHECKING:
    import numpy as np

__all__ = ["RELATIVE_TOLERANCE", "SMALLEST_TOLERANCE", "Verification", "prompt_rows", "verify"]

RELATIVE_TOLERANCE = 2e-5
"""Largest difference allowed, as a share of the largest value the torch model gives on the same prompts.

Both sides compute in float32 whatever the weights are stored in (widening bfloat16 and float16 is exact), so one value
serves all dtypes; only the order of summation differs. Measured, as
that share: 3e-6 for SmolLM2-135M in bfloat16 (1.3e-4 of 39), 6e-7 for MiniLM, up to 2e-6 for tiny random models.
"""
SMALLEST_TOLERANCE = 1e-5
"""Floor for models whose outputs are all near zero, where float32 rounding inside the model decides."""

PROMPTS = (
    "The capital of France is",
    "Adapters are small: merged into a base model's weights, they cost nothing at inference time, because",
    "def fibonacci(n):",
)
NEW_TOKENS = 8
LONGEST_PROMPT = 64
# A sliding window is crossed by a random prompt only when that is cheap.
LONGEST_WINDOW = 512
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared: the largest difference, what was allowed, and one entry for each check."""

    max_abs_diff: float
    tolerance: float
    checks: tuple[dict[str, Any], ...]

    def joined(self, other: Verification) -> Verification:
        """Both as one; each has passed by its own tolerance."""
        largest, tolerance = max((self.max_abs_diff, self.tolerance), (other.max_abs_diff, other.tolerance))
        return Verification(largest, tolerance, (*self.checks, *other.checks))


def verify(folder: Path, paths: Sequence[Path], architecture: Architecture) -> Verification:
    """Compare the graph in `paths`, or the two of an encoder-decoder, with the torch model in `folder`.

    Raises OnnxVerificationError, with the numbers of every check, when a value differs by more than the tolerance, is
    not a number, or leads greedy decoding to another token.
    """
    with quiet():
        checks, largest, scale = _run_checks(folder, paths, architecture)
    tolerance = max(SMALLEST_TOLERANCE, RELATIVE_TOLERANCE * scale)
    failed = [
        check["check"]
        for check in checks
        # Written so that NaN fails. Another token is fine only where torch itself is undecided.
        if not (check["max_abs_diff"] <= tolerance and check.get("greedy_gap", 0.0) <= 2 * tolerance)
    ]
    if failed:
        raise OnnxVerificationError(
            f"onnx: the exported graph differs from the torch model by {largest:.3g} in: {', '.join(failed)}",
            expected=f"at most {tolerance:.3g}",
            found=largest,
            remedy="export safetensors instead; the weights themselves are not concerned",
            max_abs_diff=largest,
            tolerance=tolerance,
            checks=checks,
        )
    return Verification(largest, tolerance, tuple(checks))


def _run_checks(folder: Path, paths: Sequence[Path], architecture: Architecture) -> tuple[list[dict], float, float]:
    import numpy as np
    import torch
    import transformers

    cls = getattr(transformers, architecture.name)
    module = cls.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True).eval()
    if (folder / BUNDLE).is_file():
        from composer.runtime.bottlenecks import attach

        attach(module, folder)
    live = LiveModel(module, folder, architecture)
    sessions = [open_session(path) for path in paths]
    longest = _longest(module.config) - live.tokens
    tokenizer = _tokenizer(folder)
    texts = _text_prompts(tokenizer, module.config, longest)
    randoms = _random_prompts(tokenizer, module.config, longest)
    run = _check_causal if architecture.is_causal else _check_encoder
    session: Any = sessions[0]
    if architecture.is_seq2seq:
        run, session = _check_seq2seq, Seq2SeqSession(*sessions)
    batches: list[tuple[str, list[list[int]], dict[str, Any]]] = []
    if texts:
        batches.append(("prompt", texts[:1], {}))
        batches.append(("prompts, padded batch", texts, {}))
    else:
        batches.append(("random ids, one row", randoms[-1:], {}))
    batches.append(("random ids, padded batch", randoms, {}))
    if architecture.is_causal:
        batches.append(("random ids, prefill in two parts", randoms, {"parts": 2}))
    if architecture.is_seq2seq:
        batches.append(("random ids, decoding from a prefix", randoms, {"prefix": 3}))
    checks, largest, scale = [], 0.0, 0.0
    for name, rows, options in batches:
        try:
            check, absmax = run(session, live, architecture, rows, **options)
        except Exception as error:
            raise OnnxVerificationError(
                f"onnx: {name}: the exported graph cannot be compared: {type(error).__name__}: {error}",
                expected="a pass of torch and one of ONNX Runtime over the same ids",
                found=type(error).__name__,
                remedy="export safetensors instead, or report the configuration that failed",
                checks=checks,
            ) from error
        checks.append({"check": name, "rows": len(rows), **check})
        # np.maximum, unlike max, keeps NaN.
        largest, scale = (float(np.maximum(largest, check["max_abs_diff"])), max(scale, absmax))
    return checks, largest, scale if math.isfinite(scale) else 0.0


def _check_causal(
    session: Any, live: LiveModel, architecture: Architecture, rows: list[list[int]], parts: int = 1
) -> tuple[dict[str, Any], float]:
    """Prefill and decode NEW_TOKENS greedily in ONNX Runtime; compare every logit with one torch pass."""
    import numpy as np
    import torch

    ids, mask = _pad(rows, live.config, left=True)
    length = ids.shape[1]
    past, logits = None, []
    bounds = [length * part // parts for part in range(parts + 1)]
    for start, stop in itertools.pairwise(bounds):
        part, past = forward(session, ids[:, start:stop], mask[:, :stop], past)
        logits.append(part)
    while True:
        token = logits[-1][:, -1].argmax(axis=-1).astype(np.int64)[:, None]
        if ids.shape[1] == length + NEW_TOKENS - 1:
            break
        ids = np.concatenate([ids, token], axis=1)
        mask = np.concatenate([mask, np.ones_like(token)], axis=1)
        part, past = forward(session, token, mask, past)
        logits.append(part)
    got = np.concatenate(logits, axis=1)
    inputs: dict[str, Any] = {"use_cache": False}
    if "position_ids" in architecture.inputs:
        inputs["position_ids"] = torch.from_numpy(np.maximum(np.cumsum(mask, axis=1) - 1, 0))
    with torch.no_grad():
        expected = live(torch.from_numpy(ids), torch.from_numpy(mask), **inputs)["logits"].numpy()
    tokens = np.concatenate([ids[:, length:], token], axis=1)
    difference, absmax = _difference(got, expected, mask)
    check = {
        "max_abs_diff": difference,
        "prefill": [len(row) for row in rows],
        "padding": "left" if int(mask.min()) == 0 else "none",
        **_greedy(expected[:, length - 1 :], tokens),
    }
    return check, absmax


def _check_seq2seq(
    session: Seq2SeqSession, live: LiveModel, _architecture: Architecture, rows: list[list[int]], prefix: int = 0
) -> tuple[dict[str, Any], float]:
    """Encode, and decode NEW_TOKENS greedily from the start token and `prefix` tokens of the input."""
    import numpy as np
    import torch

    config = live.config
    ids, mask = _pad(rows, config, left=False)
    ends = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    start = next((number for number in ends if number is not None), 0)
    decoded = np.concatenate([np.full((len(rows), 1), start, np.int64), ids[:, :prefix]], axis=1)
    encoded = session.encode(ids, mask)
    first, token, past, logits = decoded.shape[1], decoded, None, []
    while True:
        part, past = session.decode(encoded, token, past)
        logits.append(part)
        token = part[:, -1].argmax(axis=-1).astype(np.int64)[:, None]
        if len(logits) == NEW_TOKENS:
            break
        decoded = np.concatenate([decoded, token], axis=1)
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoded}
        expected = live.module(**{name: torch.from_numpy(value) for name, value in inputs.items()}, use_cache=False)
    tokens = np.concatenate([decoded[:, first:], token], axis=1)
    found = expected.logits.numpy()
    pairs = [
        _difference(np.concatenate(logits, axis=1), found, None),
        _difference(encoded.hidden, expected.encoder_last_hidden_state.numpy(), mask),
    ]
    check = {
        "max_abs_diff": float(np.max([difference for difference, _ in pairs])),
        "encoded": [len(row) for row in rows],
        "padding": "right" if int(mask.min()) == 0 else "none",
        "prefill": first,
        **_greedy(found[:, first - 1 :], tokens),
    }
    return check, max(absmax for _, absmax in pairs)


def _greedy(deciding: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Whether torch's logits choose the same tokens; if not, how far the chosen is below its best."""
    import numpy as np

    gap = deciding.max(axis=-1) - np.take_along_axis(deciding, tokens[:, :, None], axis=-1)[:, :, 0]
    return {
        "decoded": tokens.shape[1],
        "greedy_equal": bool((deciding.argmax(axis=-1) == tokens).all()),
        "greedy_gap": float(gap.max()),
        "tokens": tokens[0].tolist(),
    }


def _check_encoder(
    session: Any, live: LiveModel, architecture: Architecture, rows: list[list[int]]
) -> tuple[dict[str, Any], float]:
    import numpy as np
    import torch

    ids, mask = _pad(rows, live.config, left=False)
    feeds = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in architecture.inputs:
        # The second half of each row as a second segment, so that both kinds of row are read.
        kinds = getattr(live.config, "type_vocab_size", 1)
        feeds["token_type_ids"] = (np.cumsum(np.ones_like(ids), axis=1) > ids.shape[1] // 2).astype(np.int64)
        feeds["token_type_ids"] *= int(kinds > 1)
    got = session.run([architecture.output], feeds)[0]
    with torch.no_grad():
        expected = live(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    expected = expected[architecture.output].numpy()
    difference, absmax = _difference(got, expected, mask if got.ndim == 3 else None)
    padding = "right" if int(mask.min()) == 0 else "none"
    return {"max_abs_diff": difference, "tokens": [len(row) for row in rows], "padding": padding}, absmax


def _difference(got: np.ndarray, expected: np.ndarray, mask: np.ndarray | None) -> tuple[float, float]:
    """The largest difference outside the padding, and the largest value expected there."""
    import numpy as np

    if got.shape != expected.shape:
        return math.inf, 0.0
    if mask is not None:
        got, expected = got[mask.astype(bool)], expected[mask.astype(bool)]
    return float(np.abs(got - expected).max()), float(np.abs(expected).max())


def _pad(rows: list[list[int]], config: Any, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """int64 ids and mask [batch, longest row]."""
    import numpy as np

    width = max(map(len, rows))
    ids = np.full((len(rows), width), getattr(config, "pad_token_id", None) or 0, np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, where], mask[number, where] = row, 1
    return ids, mask


def _longest(config: Any) -> int:
    # RoBERTa counts positions from pad_token_id + 1, so two of its positions are never used.
    return (getattr(config, "max_position_embeddings", None) or 512) - NEW_TOKENS - 2


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None when it has none."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def prompt_rows(folder: Path, config: Any, longest: int) -> list[list[int]]:
    """All prompts of a folder: texts, where it has a tokenizer, and seeded ids."""
    tokenizer = _tokenizer(folder)
    return [*_text_prompts(tokenizer, config, longest), *_random_prompts(tokenizer, config, longest)]


def _text_prompts(tokenizer: Any, config: Any, longest: int) -> list[list[int]]:
    """The fixed prompts through the tokenizer and its chat template; none without a tokenizer."""
    if tokenizer is None:
        return []
    rows = []
    for prompt in PROMPTS:
        chat = bool(getattr(tokenizer, "chat_template", None))
        text = prompt
        if chat:
            message = {"role": "user", "content": prompt}
            text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
        if ids and max(ids) >= config.vocab_size:
            raise OnnxExportError(
                f"onnx: the tokenizer gives id {max(ids)}, the model has {config.vocab_size} embeddings",
                expected=f"ids below {config.vocab_size}",
                found=max(ids),
                remedy="the tokenizer files belong to another model",
            )
        rows.append(ids[: min(LONGEST_PROMPT, longest)])
    return [row for row in rows if row]


def _random_prompts(tokenizer: Any, config: Any, longest: int) -> list[list[int]]:
    """Seeded ids that the tokenizer knows, or all without one, but not the padding's.

    The last row crosses a small sliding window.
    """
    import numpy as np

    lengths = [5, 9, 12]
    window = getattr(config, "sliding_window", None)
    if window and window <= LONGEST_WINDOW:
        lengths[-1] = max(12, window + 4)
    generator = np.random.default_rng(0)
    padding = getattr(config, "pad_token_id", None)
    allowed = np.setdiff1d(np.arange(config.vocab_size), [-1 if padding is None else padding])
    if tokenizer is not None:
        allowed = np.intersect1d(allowed, list(tokenizer.get_vocab().values()))
    return [generator.choice(allowed, max(1, min(length, longest))).tolist() for length in lengths]
