"""Run the exported graph in ONNX Runtime against the torch model loaded from the same folder, both in float32.

    causal LM   one prompt, prompts as a batch with left padding, the same with random ids, a prefill in two parts;
                each is prefilled, then decoded greedily with the KV cache; the oracle is one torch pass without a cache
    encoder     one prompt, prompts and random ids as batches with right padding
    seq2seq     the same for the encoder, and greedy decoding with the cache against one torch pass

The torch model comes from `from_pretrained`, which finds the weights by its own rules: it shares nothing with `bind`.
Bottlenecks are hooked into it by composer.runtime, and virtual tokens put before its input by `live`; neither shares
anything with the nodes that the graph has for them.
Only positions that are not padding are compared.

Some inputs are ill-conditioned: an untrained prefix moves SmolLM2's logits by 2e-3 when torch itself computes the same
in float64. What exceeds the tolerance is therefore computed once more in float64, and torch's own rounding measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.errors import OnnxExportError, OnnxVerificationError
from composer.exporters.onnx.architectures import Architecture
from composer.exporters.onnx.live import LiveModel
from composer.exporters.onnx.seq2seq_session import Seq2SeqSession
from composer.exporters.onnx.session import forward, open_session
from composer.exporters.onnx.skeleton import quiet

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "NEW_TOKENS",
    "PROMPTS",
    "RELATIVE_TOLERANCE",
    "SMALLEST_TOLERANCE",
    "TOKENIZER_FILES",
    "Verification",
    "live_model",
    "pad",
    "prompts",
    "verify",
]

RELATIVE_TOLERANCE = 2e-5
"""Largest difference allowed, as a share of the largest value the torch model gives on the same prompts.

Both sides compute in float32 whatever the weights are stored in (widening bfloat16 and float16 is exact), so one value
serves all dtypes; only the order of summation differs. Measured, as
that share: 3e-6 for SmolLM2-135M in bfloat16 (1.3e-4 of 39), 6e-7 for MiniLM, up to 2e-6 for tiny random models.
"""
ROUNDING = 8
"""Largest difference allowed, as a multiple of torch's own distance in float32 from the same model in float64.

Two sums of the same terms in different order are each about that far from the exact one; a graph that is wrong is off
by the size of the logits. Measured with ten untrained prefixes on SmolLM2: at most 3 times.
"""
DRAWS = 5
LARGEST_TOLERANCE = 5e-3
"""What `ROUNDING` may allow at most, as a share of the largest value: beyond it, nothing shows a graph to be right."""
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
    """What was compared: the largest difference, what was allowed, and one entry for each check.

    agreement, kl_divergence: of a graph that rounds: the share of positions at which the largest value is torch's, and
        the mean divergence of its distributions from torch's, in nats.
    """

    max_abs_diff: float
    tolerance: float
    checks: tuple[dict[str, Any], ...]
    agreement: float | None = None
    kl_divergence: float | None = None

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
        compared, live = _run_checks(folder, paths, architecture)
        scale = max((item.scale for item in compared if math.isfinite(item.scale)), default=0.0)
        tolerance = max(SMALLEST_TOLERANCE, RELATIVE_TOLERANCE * scale)
        failed = [item for item in compared if not item.within(tolerance)]
        if failed:
            _measure_rounding(failed, live)
            rounding = max((item.facts["float32_rounding"] for item in failed), default=0.0)
            tolerance = max(tolerance, min(ROUNDING * rounding, LARGEST_TOLERANCE * scale))
            failed = [item for item in failed if not item.within(tolerance)]
    checks = [item.facts for item in compared]
    largest = _largest(check["max_abs_diff"] for check in checks)
    if failed:
        raise OnnxVerificationError(
            f"onnx: the exported graph differs from the torch model by {largest:.3g} in: "
            f"{', '.join(item.facts['check'] for item in failed)}",
            expected=f"at most {tolerance:.3g}",
            found=largest,
            remedy="export safetensors instead; the weights themselves are not concerned",
            max_abs_diff=largest,
            tolerance=tolerance,
            checks=checks,
        )
    return Verification(largest, tolerance, tuple(checks))


@dataclass(frozen=True, slots=True)
class _Compared:
    """One check: its facts for the record, the largest value expected, and how to ask torch for the same again.

    again: gives the values float [positions, …] without the padding, of the model that it is handed.
    """

    facts: dict[str, Any]
    scale: float
    expected: np.ndarray
    again: Callable[[LiveModel], np.ndarray]

    def within(self, tolerance: float) -> bool:
        """True when no value is further off, nor a number that is none; another token only where torch is undecided."""
        return self.facts["max_abs_diff"] <= tolerance and self.facts.get("greedy_gap", 0.0) <= 2 * tolerance


def _measure_rounding(doubtful: list[_Compared], live: LiveModel) -> None:
    """Add to each check how far torch in float32 is from the same module in float64, to which `live` is turned.

    The largest of `DRAWS` passes, between which the embeddings are rounded differently: where a position is
    ill-conditioned one pass may come out close by chance.
    """
    import numpy as np

    found = []
    for seed in range(DRAWS):
        with live.rounded(seed):
            found.append([item.again(live) for item in doubtful])
    live.double()
    for item, passes in zip(doubtful, zip(*found, strict=True), strict=True):
        exact = item.again(live)
        item.facts["float32_rounding"] = float(np.max([np.abs(one - exact).max() for one in passes]))


def _run_checks(folder: Path, paths: Sequence[Path], architecture: Architecture) -> tuple[list[_Compared], LiveModel]:
    live = live_model(folder, architecture)
    sessions = [open_session(path) for path in paths]
    texts, randoms = prompts(folder, live)
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
    compared = []
    for name, rows, options in batches:
        try:
            item = run(session, live, architecture, rows, **options)
        except Exception as error:
            raise OnnxVerificationError(
                f"onnx: {name}: the exported graph cannot be compared: {type(error).__name__}: {error}",
                expected="a pass of torch and one of ONNX Runtime over the same ids",
                found=type(error).__name__,
                remedy="export safetensors instead, or report the configuration that failed",
                checks=[item.facts for item in compared],
            ) from error
        compared.append(replace(item, facts={"check": name, "rows": len(rows), **item.facts}))
    return compared, live


def live_model(folder: Path, architecture: Architecture) -> LiveModel:
    """The torch model in `folder`, in float32, with what lies beside its weights."""
    import transformers

    from composer.loading import load_as  # which is built on this package

    return LiveModel(load_as(getattr(transformers, architecture.name), folder), folder, architecture.output)


def prompts(folder: Path, live: LiveModel) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of texts, none where the folder has no tokenizer, and random ones."""
    longest = _longest(live.config) - live.tokens
    tokenizer = _tokenizer(folder)
    return _text_prompts(tokenizer, live.config, longest), _random_prompts(tokenizer, live.config, longest)


def _check_causal(
    session: Any, live: LiveModel, architecture: Architecture, rows: list[list[int]], parts: int = 1
) -> _Compared:
    """Prefill and decode NEW_TOKENS greedily in ONNX Runtime; compare every logit with one torch pass."""
    import numpy as np
    import torch

    ids, mask = pad(rows, live.config, left=True)
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

    def whole(model: LiveModel) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(ids), torch.from_numpy(mask), **inputs)["logits"].numpy()

    expected = whole(live)
    tokens = np.concatenate([ids[:, length:], token], axis=1)
    kept = mask.astype(bool)
    facts = {
        "max_abs_diff": _difference(got, expected, kept),
        "prefill": [len(row) for row in rows],
        "padding": "left" if int(mask.min()) == 0 else "none",
        **_greedy(expected[:, length - 1 :], tokens),
    }
    return _Compared(facts, float(np.abs(expected[kept]).max()), expected[kept], lambda model: whole(model)[kept])


def _check_seq2seq(
    session: Seq2SeqSession, live: LiveModel, _architecture: Architecture, rows: list[list[int]], prefix: int = 0
) -> _Compared:
    """Encode, and decode NEW_TOKENS greedily from the start token and `prefix` tokens of the input."""
    import numpy as np
    import torch

    config = live.config
    ids, mask = pad(rows, config, left=False)
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
    tokens = np.concatenate([decoded[:, first:], token], axis=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoded}
    kept = mask.astype(bool)

    def whole(model: LiveModel) -> tuple[np.ndarray, np.ndarray]:
        """Logits [rows, decoded, vocabulary], and the hidden states of the real tokens of the input."""
        with torch.no_grad():
            found = model.module(**{name: torch.from_numpy(value) for name, value in inputs.items()}, use_cache=False)
        return found.logits.numpy(), found.encoder_last_hidden_state.numpy()[kept]

    expected, hidden = whole(live)
    every = np.ones(expected.shape[:2], bool)
    differences = [
        _difference(np.concatenate(logits, axis=1), expected, every),
        _difference(encoded.hidden[kept], hidden, np.ones(len(hidden), bool)),
    ]
    facts = {
        "max_abs_diff": _largest(differences),
        "encoded": [len(row) for row in rows],
        "padding": "right" if int(mask.min()) == 0 else "none",
        "prefill": first,
        **_greedy(expected[:, first - 1 :], tokens),
    }
    return _Compared(
        facts,
        float(max(np.abs(expected).max(), np.abs(hidden).max())),
        _flat(expected, hidden),
        lambda model: _flat(*whole(model)),
    )


def _flat(*arrays: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.concatenate([array.ravel() for array in arrays])


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


def _check_encoder(session: Any, live: LiveModel, architecture: Architecture, rows: list[list[int]]) -> _Compared:
    import numpy as np
    import torch

    ids, mask = pad(rows, live.config, left=False)
    feeds = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in architecture.inputs:
        # The second half of each row as a second segment, so that both kinds of row are read.
        kinds = getattr(live.config, "type_vocab_size", 1)
        feeds["token_type_ids"] = (np.cumsum(np.ones_like(ids), axis=1) > ids.shape[1] // 2).astype(np.int64)
        feeds["token_type_ids"] *= int(kinds > 1)
    got = session.run([architecture.output], feeds)[0]

    def whole(model: LiveModel) -> np.ndarray:
        with torch.no_grad():
            found = model(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        return found[architecture.output].numpy()

    expected = whole(live)
    kept = mask.astype(bool) if got.ndim == 3 else np.ones(len(got), bool)
    facts = {
        "max_abs_diff": _difference(got, expected, kept),
        "tokens": [len(row) for row in rows],
        "padding": "right" if int(mask.min()) == 0 else "none",
    }
    return _Compared(facts, float(np.abs(expected[kept]).max()), expected[kept], lambda model: whole(model)[kept])


def _difference(got: np.ndarray, expected: np.ndarray, kept: np.ndarray) -> float:
    """The largest difference where `kept`, bool of the leading axes, is true; NaN where there is one."""
    import numpy as np

    return float(np.abs(got[kept] - expected[kept]).max()) if got.shape == expected.shape else math.inf


def _largest(values: Iterable[float]) -> float:
    """Their largest; NaN where there is one."""
    return max(values, key=lambda value: (math.isnan(value), value))


def pad(rows: list[list[int]], config: Any, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
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
