"""Run an exported model: open a session that really uses the provider asked for, and generate text with a KV cache.

    open_session(folder / "model.onnx") → session
    generate(session, input_ids, attention_mask, max_new_tokens=32, eos_ids=(2,)) → new tokens
       └─► stream                   the same, token by token
             └─► Decoder            the cache is bound: it stays where the session computes
    forward                         one pass by itself, with the cache as numpy arrays

Inputs and outputs are numpy arrays; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from composer.errors import MissingDependencyError, OnnxExportError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

__all__ = [
    "Decoder",
    "decode",
    "forward",
    "generate",
    "most_likely",
    "open_session",
    "require_runtime",
    "stacked",
    "stream",
]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DEVICES = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
PAST, PRESENT = "past_key_values.", "present."
PADDING = "composer.padding"
"""Metadata of a graph that takes padding on one side only: ``right``."""
# onnx.TensorProto's numbers and numpy's names for what a cache is made of; numpy has no bfloat16.
CACHE_TYPES = {"tensor(float)": (1, "float32"), "tensor(float16)": (10, "float16"), "tensor(bfloat16)": (16, None)}


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

    input_ids: int64 [batch, new]; attention_mask: int64 [batch, past + new], 0 for padding, on the left
        or, where that is refused, on the right.
    past: what the previous pass returned; None starts an empty cache.
    Returns logits float32 [batch, new, vocabulary] and the cache, [batch, heads, past + new, head size] each, in the
    dtype that the graph computes in.
    """
    import numpy as np

    batch, new = input_ids.shape
    if past is None:
        past = {
            item.name: np.zeros((batch, item.shape[1], 0, item.shape[3]), CACHE_TYPES[item.type][1])
            for item in session.get_inputs()
            if item.name.startswith(PAST)
        }
    refuse_left_padding(session, attention_mask)
    feeds = {"input_ids": input_ids, "attention_mask": attention_mask, **past}
    if any(item.name == "position_ids" for item in session.get_inputs()):
        feeds["position_ids"] = _positions(attention_mask, new)
    feeds = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
    outputs = dict(zip([item.name for item in session.get_outputs()], session.run(None, feeds), strict=True))
    return outputs["logits"], {name: outputs[name.replace(PAST, PRESENT, 1)] for name in past}


class Decoder:
    """A causal model in the middle of a text: each pass takes the KV cache that the pass before it returned.

    The cache is bound by reference and lies where the session computes; only ids and logits pass through Python.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._device = DEVICES[session.get_providers()[0]]
        self._inputs = {item.name: item for item in session.get_inputs()}
        self._caches = {name: item for name, item in self._inputs.items() if name.startswith(PAST)}
        self._past: dict[str, onnxruntime.OrtValue] = {}

    def step(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """The logits after the last of each row's new tokens, float32 [batch, vocabulary].

        input_ids: int64 [batch, new]; attention_mask: int64 [batch, past + new], 0 for padding.
        Raises UsageError for padding on the left of a graph that takes none there.
        """
        import numpy as np

        batch, new = input_ids.shape
        refuse_left_padding(self._session, attention_mask)
        feeds = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": _positions(attention_mask, new),
        }
        binding = self._session.io_binding()
        for name, value in feeds.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        past = self._past or {name: self._empty(item, batch) for name, item in self._caches.items()}
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in past:
            binding.bind_output(name.replace(PAST, PRESENT, 1), self._device)
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        self._past = dict(zip(past, present, strict=True))
        # Padding on the right puts a row's last token before the end.
        last = new - 1 - np.argmax(attention_mask[:, : -new - 1 : -1] != 0, axis=1)
        found: np.ndarray = logits.numpy()[np.arange(batch), last]
        return found

    def _empty(self, item: onnxruntime.NodeArg, batch: int) -> onnxruntime.OrtValue:
        shape = [batch, item.shape[1], 0, item.shape[3]]
        return require_runtime().OrtValue.ortvalue_from_shape_and_type(shape, CACHE_TYPES[item.type][0], self._device)


def refuse_left_padding(session: onnxruntime.InferenceSession, attention_mask: np.ndarray) -> None:
    """Raise UsageError where a row begins with padding and the graph attends by the length of rows alone."""
    if (attention_mask[:, 0] == 0).any() and session.get_modelmeta().custom_metadata_map.get(PADDING) == "right":
        raise UsageError(
            "this graph takes no padding on the left: it counts each row's tokens from its beginning",
            expected="rows padded on the right",
            found="a mask that begins with 0",
            remedy="pad on the right, or compose the portable flavour",
        )


def _positions(attention_mask: np.ndarray, new: int) -> np.ndarray:
    """The places of the last `new` tokens, int64 [batch, new]; padding on the left counts for none."""
    import numpy as np

    return np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)[:, -new:]


def most_likely(logits: np.ndarray) -> np.ndarray:
    """Greedy decoding: int64 [batch] of float32 [batch, vocabulary]."""
    tokens: np.ndarray = logits.argmax(axis=-1)
    return tokens


def stream(
    session: onnxruntime.InferenceSession,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    max_new_tokens: int = 32,
    eos_ids: Iterable[int] = (),
    *,
    choose: Callable[[np.ndarray], np.ndarray] = most_likely,
) -> Iterator[np.ndarray]:
    """Continue token by token: yields int64 [batch] as each is decoded.

    choose: the next token of each row, int64 [batch], of its logits float32 [batch, vocabulary].
    The other arguments, and where it ends, are those of `generate` and of Decoder.
    """
    import numpy as np

    mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
    decoder = Decoder(session)

    def advance(chosen: np.ndarray | None) -> np.ndarray:
        nonlocal mask
        if chosen is None:
            return decoder.step(input_ids, mask)
        mask = np.concatenate([mask, np.ones_like(chosen)], axis=1)
        return decoder.step(chosen, mask)

    return decode(advance, len(input_ids), max_new_tokens, eos_ids, choose)


def generate(
    session: onnxruntime.InferenceSession,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    max_new_tokens: int = 32,
    eos_ids: Iterable[int] = (),
) -> np.ndarray:
    """The most likely continuation, token by token (greedy).

    input_ids: int64 [batch, length]; attention_mask: the same shape, 0 for padding; None means no padding.
    Returns int64 [batch, n], n <= max_new_tokens: the new tokens only. A row that has ended repeats its end token;
    generation stops when every row has ended.
    """
    return stacked(stream(session, input_ids, attention_mask, max_new_tokens, eos_ids), len(input_ids))


def decode(
    advance: Callable[[np.ndarray | None], np.ndarray],
    rows: int,
    max_new_tokens: int,
    eos_ids: Iterable[int],
    choose: Callable[[np.ndarray], np.ndarray] = most_likely,
) -> Iterator[np.ndarray]:
    """Token by token: yields int64 [rows]; a row that has ended repeats its end token, and it stops when all have.

    advance: runs a model over the tokens chosen last, int64 [rows, 1], None at first; returns logits [rows, vocabulary]
        of the next ones.
    """
    import numpy as np

    eos = np.array(sorted(set(eos_ids)), dtype=np.int64)
    ended, last = np.zeros(rows, dtype=bool), None
    for _ in range(max_new_tokens):
        chosen = choose(advance(None if last is None else last[:, None])).astype(np.int64)
        last = chosen if last is None else np.where(ended, last, chosen)
        ended |= np.isin(last, eos)
        yield last
        if ended.all():
            return


def stacked(tokens: Iterable[np.ndarray], rows: int) -> np.ndarray:
    """int64 [rows, n] of n times int64 [rows]."""
    import numpy as np

    found = list(tokens)
    return np.stack(found, axis=1) if found else np.empty((rows, 0), np.int64)
