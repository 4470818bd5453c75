"""Run an exported model: open a session that really uses the provider asked for, and generate text with a KV cache.

    open_session(folder / "model.onnx") → session
    generate(session, input_ids, attention_mask, max_new_tokens=32, eos_ids=(2,)) → new tokens
                        │ ▲
                        ▼ │ logits, cache
                      forward       one pass: prefill, or one decoded token

Inputs and outputs are numpy arrays; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from composer.errors import MissingDependencyError, OnnxExportError

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

__all__ = ["decode_greedily", "forward", "generate", "open_session", "require_runtime"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
PAST, PRESENT = "past_key_values.", "present."


def require_runtime() -> Any:
    """The module onnxruntime, or MissingDependencyError naming the two extras that bring it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "onnx: onnxruntime is not installed, so an exported graph cannot be checked or run",
            expected="onnxruntime (extra 'cpu') or onnxruntime-gpu (extra 'cuda')",
            remedy="install exactly one of the extras 'cpu' and 'cuda'",
            package="onnxruntime",
            extras=["cpu", "cuda"],
        ) from error
    return onnxruntime


def open_session(
    path: Path, provider: Literal["cpu", "cuda"] = "cpu", *, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on `provider`, never on another one without a word.

    path: a model.onnx beside the safetensors files it points into.
    threads: threads within an operator; None leaves the choice to ONNX Runtime.
    Raises MissingDependencyError when onnxruntime, or the build that has this provider, is not installed, and
    OnnxExportError when the file does not load.
    """
    runtime = require_runtime()
    wanted = PROVIDERS[provider]

    def unavailable(found: list[str]) -> MissingDependencyError:
        return MissingDependencyError(
            f"onnx: ONNX Runtime cannot use {wanted} here",
            expected=wanted,
            found=found,
            remedy=f"install the extra {provider!r} (and only that one) with the libraries and the device it needs",
            package="onnxruntime",
            extras=[provider],
        )

    if wanted not in runtime.get_available_providers():
        raise unavailable(runtime.get_available_providers())
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=[wanted])
    except Exception as error:
        raise OnnxExportError(
            f"onnx: {Path(path).name} does not load in ONNX Runtime: {error}",
            remedy="keep model.onnx and its safetensors files in one folder, as real files, and export again",
        ) from error
    # ONNX Runtime falls back to the CPU when a provider fails to start.
    if session.get_providers()[0] != wanted:
        raise unavailable(session.get_providers())
    return session


def forward(
    session: onnxruntime.InferenceSession,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    past: dict[str, np.ndarray] | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One pass of a causal model over new tokens.

    input_ids: int64 [batch, new]; attention_mask: int64 [batch, past + new], 0 for padding, which goes on the left.
    past: what the previous pass returned; None starts an empty cache.
    Returns logits float32 [batch, new, vocabulary] and the cache, float32 [batch, heads, past + new, head size] each.
    """
    import numpy as np

    batch, new = input_ids.shape
    if past is None:
        past = {
            item.name: np.zeros((batch, item.shape[1], 0, item.shape[3]), np.float32)
            for item in session.get_inputs()
            if item.name.startswith(PAST)
        }
    feeds = {"input_ids": input_ids, "attention_mask": attention_mask, **past}
    if any(item.name == "position_ids" for item in session.get_inputs()):
        feeds["position_ids"] = np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)[:, -new:]
    feeds = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
    outputs = dict(zip([item.name for item in session.get_outputs()], session.run(None, feeds), strict=True))
    return outputs["logits"], {name: outputs[name.replace(PAST, PRESENT, 1)] for name in past}


def generate(
    session: onnxruntime.InferenceSession,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    max_new_tokens: int = 32,
    eos_ids: Iterable[int] = (),
) -> np.ndarray:
    """The most likely continuation, token by token (greedy).

    input_ids: int64 [batch, length]; attention_mask: the same shape, 0 for padding on the left; None means no padding.
    Returns int64 [batch, n], n <= max_new_tokens: the new tokens only. A row that has ended repeats its end token;
    generation stops when every row has ended.
    """
    import numpy as np

    mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
    past: dict[str, np.ndarray] | None = None

    def advance(chosen: np.ndarray | None) -> np.ndarray:
        nonlocal mask, past
        if chosen is not None:
            mask = np.concatenate([mask, np.ones_like(chosen)], axis=1)
        logits, past = forward(session, input_ids if chosen is None else chosen, mask, past)
        return logits[:, -1]

    return decode_greedily(advance, len(input_ids), max_new_tokens, eos_ids)


def decode_greedily(
    advance: Callable[[np.ndarray | None], np.ndarray], rows: int, max_new_tokens: int, eos_ids: Iterable[int]
) -> np.ndarray:
    """The most likely tokens, int64 [rows, n], as `generate` returns them.

    advance: runs a model over the tokens chosen last, int64 [rows, 1], None at first; returns logits [rows, vocabulary]
        of the next ones.
    """
    import numpy as np

    eos = np.array(sorted(set(eos_ids)), dtype=np.int64)
    tokens: list[np.ndarray] = []
    ended = np.zeros(rows, dtype=bool)
    while len(tokens) < max_new_tokens and not ended.all():
        chosen = advance(tokens[-1][:, None] if tokens else None).argmax(axis=-1).astype(np.int64)
        if tokens:
            chosen = np.where(ended, tokens[-1], chosen)
        ended |= np.isin(chosen, eos)
        tokens.append(chosen)
    return np.stack(tokens, axis=1) if tokens else np.empty((rows, 0), np.int64)
