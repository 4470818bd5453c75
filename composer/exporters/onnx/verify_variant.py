"""Compare a variant of a graph with torch in float32: one that rounds by what it chooses, a grouped one as it pads.

    portable   one prompt; prompts padded on the left
    genai      the same padded on the right; one prompt in two parts; and what onnxruntime-genai itself generates
    encoders   prompts padded on the right

Every row is decoded greedily with the cache, and torch runs it alone, without padding, in one pass.
bfloat16 does not run on the CPU: its types are checked, and the same graph in float16 is run in its place.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.errors import OnnxExportError, OnnxVerificationError
from composer.exporters.onnx.architectures import Architecture
from composer.exporters.onnx.genai import encode_by_genai, generate_by_genai
from composer.exporters.onnx.session import forward, open_session
from composer.exporters.onnx.skeleton import quiet
from composer.exporters.onnx.variants import Variant
from composer.exporters.onnx.verify import (
    NEW_TOKENS,
    PROMPTS,
    RELATIVE_TOLERANCE,
    SMALLEST_TOLERANCE,
    TOKENIZER_FILES,
    Verification,
    live_model,
    pad,
    prompts,
)

if TYPE_CHECKING:
    import numpy as np

    from composer.exporters.onnx.live import LiveModel

__all__ = ["TOLERANCES", "verify_variant"]

TOLERANCES = {"float32": RELATIVE_TOLERANCE, "float16": 0.02, "bfloat16": 0.02, "int8": 0.5, "int4": 1.0}
"""Largest difference allowed, as a share of the largest logit; of the coarsest that a variant has.

Measured on SmolLM2-135M: 0.0028 in float16, 0.06 in int8, 0.43 in int4. These bounds find graphs that are wrong;
whether a coarse one is good enough is said by the share of tokens on which it agrees.
"""


@dataclass(frozen=True, slots=True)
class _Compared:
    """One check: its entry for the record, logits of torch and of the graph at real positions, [positions, values]."""

    entry: dict[str, Any]
    expected: np.ndarray
    found: np.ndarray


def verify_variant(folder: Path, model_path: Path, architecture: Architecture, variant: Variant) -> Verification:
    """Compare the graph in `model_path` with the torch model in `folder`, which computes in float32.

    model_path: for bfloat16, its twin in float16.
    Raises OnnxVerificationError when a value is not finite or too far off, when too few positions choose torch's
    token, or when onnxruntime-genai generates other tokens.
    """
    with quiet():
        live = live_model(folder, architecture)
        texts, randoms = prompts(folder, live)
        session = open_session(model_path)
        run = _check_causal if architecture.is_causal else _check_encoder
        batches = [("prompt" if texts else "random ids, one row", (texts or randoms)[:1], {})]
        batches += [("prompts, padded batch", texts, {})] if texts else []
        batches.append(("random ids, padded batch", randoms, {}))
        if variant.flavour == "genai":
            batches.append(("random ids, prefill in two parts", randoms[-1:], {"parts": 2}))
        try:
            compared = [
                run(session, live, architecture, variant, name, rows, **options) for name, rows, options in batches
            ]
        except Exception as error:
            raise OnnxExportError(
                f"onnx: ONNX Runtime cannot run the {variant.flavour} graph in {variant.quantise or variant.compute}"
                f" here: {error}",
                expected="operators that the CPU provider has in this dtype",
                remedy="compute in float32, and report the configuration",
            ) from error
        result = _judge(compared, variant)
        if variant.flavour == "genai":
            ids = (texts or randoms)[0]
            check = _check_genai(folder, model_path.name, live, architecture, ids, result.tolerance)
            result = replace(result, checks=(*result.checks, check))
    return result


def _judge(compared: list[_Compared], variant: Variant) -> Verification:
    import numpy as np

    expected = np.concatenate([item.expected for item in compared])
    found = np.concatenate([item.found for item in compared])
    agree = expected.argmax(axis=-1) == found.argmax(axis=-1)
    difference, scale = float(np.abs(found - expected).max()), float(np.abs(expected).max())
    tolerance = max(SMALLEST_TOLERANCE, TOLERANCES[variant.quantise or variant.compute] * scale)
    agreement = round(float(agree.mean()), 4)
    checks = tuple(item.entry for item in compared)
    enough = agreement >= variant.min_agreement or not variant.rounds
    if not (difference <= tolerance and enough):  # written so that NaN fails
        coarse = variant.quantise or variant.compute
        raise OnnxVerificationError(
            f"onnx: the {variant.flavour} graph in {coarse} differs from torch by {difference:.3g}"
            f" and chooses its token at {agreement:.0%} of the positions",
            expected=f"at most {tolerance:.3g}, and {variant.min_agreement:.0%}",
            found={"difference": difference, "agreement": agreement},
            remedy="choose a finer dtype" + ("" if enough else f", or allow --min-agreement {agreement}"),
            max_abs_diff=difference,
            tolerance=tolerance,
            agreement=agreement,
            checks=list(checks),
        )
    if not variant.rounds:
        return Verification(difference, tolerance, checks)
    return Verification(difference, tolerance, checks, agreement, float(f"{_divergence(expected, found):.4g}"))


def _divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """The mean Kullback–Leibler divergence of the graph's distributions from torch's, in nats."""
    import numpy as np

    def log_softmax(values: np.ndarray) -> np.ndarray:
        shifted = values.astype(np.float64) - values.max(axis=-1, keepdims=True)
        result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        return result

    one, other = log_softmax(expected), log_softmax(found)
    return float((np.exp(one) * (one - other)).sum(axis=-1).mean())


def _check_causal(
    session: Any,
    live: LiveModel,
    architecture: Architecture,
    variant: Variant,
    name: str,
    rows: list[list[int]],
    parts: int = 1,
) -> _Compared:
    """Prefill and decode NEW_TOKENS greedily; torch runs each row with its tokens alone."""
    import numpy as np

    left = variant.flavour == "portable"
    ids, mask = pad(rows, live.config, left=left)
    length = ids.shape[1]
    bounds = [length * part // parts for part in range(parts + 1)]
    past, pieces = None, []
    for start, stop in itertools.pairwise(bounds):
        piece, past = forward(session, ids[:, start:stop], mask[:, :stop], past)
        pieces.append(piece)
    prefill = np.concatenate(pieces, axis=1)
    real = mask.astype(bool)
    logits = [[prefill[number][real[number]]] for number in range(len(rows))]
    tokens = [list(row) for row in rows]
    for step in range(NEW_TOKENS):
        chosen = np.array([[int(found[-1][-1].argmax())] for found in logits])
        for number, token in enumerate(chosen[:, 0]):
            tokens[number].append(int(token))
        if step == NEW_TOKENS - 1:
            break
        mask = np.concatenate([mask, np.ones_like(chosen)], axis=1)
        decoded, past = forward(session, chosen, mask, past)
        for number, found in enumerate(logits):
            found.append(decoded[number])
    found = np.concatenate([item for row in logits for item in row])
    torch_logits = [_torch_logits(live, architecture, row[:-1]) for row in tokens]
    expected = np.concatenate(torch_logits)
    equal = all(
        best[len(given) - 1 :].argmax(axis=-1).tolist() == row[len(given) :]
        for best, row, given in zip(torch_logits, tokens, rows, strict=True)
    )
    entry = {
        "check": name,
        "rows": len(rows),
        "max_abs_diff": _difference(expected, found),
        "prefill": [len(row) for row in rows],
        "padding": ("left" if left else "right") if not real.all() else "none",
        "decoded": NEW_TOKENS,
        "greedy_equal": equal,
        "tokens": tokens[0][len(rows[0]) :],
    }
    return _Compared(entry, expected, found)


def _torch_logits(live: LiveModel, architecture: Architecture, row: list[int]) -> np.ndarray:
    """float32 [length, vocabulary] of one row."""
    import torch

    ids = torch.tensor([row])
    inputs: dict[str, Any] = {"use_cache": False}
    if "position_ids" in architecture.inputs:
        inputs["position_ids"] = torch.arange(len(row))[None]
    with torch.no_grad():
        found: np.ndarray = live(ids, torch.ones_like(ids), **inputs)["logits"][0].numpy()
    return found


def _check_encoder(
    session: Any, live: LiveModel, architecture: Architecture, variant: Variant, name: str, rows: list[list[int]]
) -> _Compared:
    import numpy as np
    import torch

    del variant
    ids, mask = pad(rows, live.config, left=False)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    feeds = {item: feeds[item] for item in architecture.inputs}
    found = session.run([architecture.output], feeds)[0]
    with torch.no_grad():
        expected = live(**{item: torch.from_numpy(value) for item, value in feeds.items()})
    expected = expected[architecture.output].numpy()
    if found.ndim == 3:
        found, expected = found[mask.astype(bool)], expected[mask.astype(bool)]
    entry = {
        "check": name,
        "rows": len(rows),
        "max_abs_diff": _difference(expected, found),
        "tokens": [len(row) for row in rows],
        "padding": "none" if mask.all() else "right",
    }
    return _Compared(entry, expected, found)


def _difference(expected: np.ndarray, found: np.ndarray) -> float:
    import numpy as np

    return float(np.abs(found - expected).max()) if found.shape == expected.shape else math.inf


def _check_genai(
    folder: Path, file: str, live: LiveModel, architecture: Architecture, ids: list[int], tolerance: float
) -> dict[str, Any]:
    """Generate by onnxruntime-genai: every token must be torch's choice, or as good as it within the tolerance."""
    tokens = generate_by_genai(folder, file, ids, NEW_TOKENS)
    logits = _torch_logits(live, architecture, [*ids, *tokens[:-1]])[len(ids) - 1 :]
    gaps = logits.max(axis=-1) - logits[range(len(tokens)), tokens]
    entry = {
        "check": "onnxruntime-genai, greedy",
        "rows": 1,
        "prefill": [len(ids)],
        "decoded": len(tokens),
        "greedy_equal": bool((logits.argmax(axis=-1) == tokens).all()),
        "greedy_gap": float(gaps.max()),
        "tokens": tokens,
        "tokenizer": _compare_tokenizers(folder, file),
    }
    if not gaps.max() <= 2 * tolerance:
        raise OnnxVerificationError(
            f"onnx: onnxruntime-genai generates other tokens than torch, {gaps.max():.3g} below its best",
            expected=f"at most {2 * tolerance:.3g}",
            found=float(gaps.max()),
            remedy="export the portable flavour",
            checks=[entry],
        )
    return entry


def _compare_tokenizers(folder: Path, file: str) -> str:
    """Whether onnxruntime-genai reads the folder's tokenizer, and gives its ids for a text without special tokens."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return "none"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found = [encode_by_genai(folder, file, text) for text in PROMPTS]
    if None in found:
        return "unreadable"
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    return "equal" if found == expected else "different"
