"""Run an exported encoder-decoder: encode once, then decode with a cache.

    open_seq2seq(folder)                               → session
    generate_seq2seq(session, input_ids, attention_mask) → new tokens
          │
          ├─ encode     once: hidden states, keys and values of every cross-attention
          └─ decode     one pass over new tokens: logits, keys and values of every self-attention

Inputs and outputs are numpy arrays; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from composer.exporters.onnx.seq2seq import DECODER_FILE, ENCODER_FILE
from composer.exporters.onnx.session import PAST, PRESENT, decode, most_likely, open_session, stacked

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

__all__ = ["Encoded", "Seq2SeqSession", "generate_seq2seq", "open_seq2seq", "stream_seq2seq"]

Cache = dict[str, "np.ndarray"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What decoding reads of the input: its mask and the cross-attentions' cache; `hidden` [batch, source, width]."""

    hidden: np.ndarray
    mask: np.ndarray
    cross: Cache


@dataclass(frozen=True, slots=True)
class Seq2SeqSession:
    """The sessions of the two graphs."""

    encoder: onnxruntime.InferenceSession
    decoder: onnxruntime.InferenceSession

    def encode(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Encoded:
        """One pass of the encoder over int64 [batch, source]; padding (mask 0) goes on the right."""
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask}
        names = [item.name for item in self.encoder.get_outputs()]
        outputs = dict(zip(names, self.encoder.run(None, feeds), strict=True))
        hidden = outputs.pop("last_hidden_state")
        cross = {name.replace(PRESENT, PAST, 1): value for name, value in outputs.items()}
        return Encoded(hidden, attention_mask, cross)

    def decode(self, encoded: Encoded, input_ids: np.ndarray, past: Cache | None = None) -> tuple[np.ndarray, Cache]:
        """One pass of the decoder over new tokens, int64 [batch, new], all of them real.

        past: what the previous pass returned; None starts an empty cache.
        Returns logits float32 [batch, new, vocabulary] and the self-attentions' cache [batch, heads, past + new, size].
        """
        import numpy as np

        if past is None:
            past = {
                item.name: np.zeros((len(input_ids), item.shape[1], 0, item.shape[3]), np.float32)
                for item in self.decoder.get_inputs()
                if item.name.startswith(PAST) and item.name not in encoded.cross
            }
        feeds = {"encoder_attention_mask": encoded.mask, "input_ids": input_ids, **encoded.cross, **past}
        names = [item.name for item in self.decoder.get_outputs()]
        outputs = dict(zip(names, self.decoder.run(None, feeds), strict=True))
        return outputs["logits"], {name: outputs[name.replace(PAST, PRESENT, 1)] for name in past}


def open_seq2seq(
    folder: Path, provider: Literal["cpu", "cuda"] = "cpu", *, threads: int | None = None
) -> Seq2SeqSession:
    """Both graphs of `folder` on `provider`; raises what `open_session` raises."""
    files = (ENCODER_FILE, DECODER_FILE)
    return Seq2SeqSession(*(open_session(Path(folder) / file, provider, threads=threads) for file in files))


def generate_seq2seq(
    session: Seq2SeqSession,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    *,
    start_ids: Iterable[int],
    max_new_tokens: int = 32,
    eos_ids: Iterable[int] = (),
) -> np.ndarray:
    """The most likely output, token by token (greedy).

    input_ids: int64 [batch, source]; attention_mask: the same shape, 0 for padding on the right; None means no padding.
    start_ids: what the decoder of every row starts from: the config's decoder_start_token_id, and a token that forces
        the language where a model has one.
    Returns int64 [batch, n], n <= max_new_tokens: the new tokens only. A row that has ended repeats its end token;
    generation stops when every row has ended.
    """
    tokens = stream_seq2seq(
        session, input_ids, attention_mask, start_ids=start_ids, max_new_tokens=max_new_tokens, eos_ids=eos_ids
    )
    return stacked(tokens, len(input_ids))


def stream_seq2seq(
    session: Seq2SeqSession,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    *,
    start_ids: Iterable[int],
    max_new_tokens: int = 32,
    eos_ids: Iterable[int] = (),
    choose: Callable[[np.ndarray], np.ndarray] = most_likely,
) -> Iterator[np.ndarray]:
    """As `generate_seq2seq`, token by token: yields int64 [batch]. choose: as in `session.stream`."""
    import numpy as np

    encoded = session.encode(input_ids, np.ones_like(input_ids) if attention_mask is None else attention_mask)
    start = np.tile(np.array(list(start_ids), dtype=np.int64), (len(input_ids), 1))
    past: Cache | None = None

    def advance(chosen: np.ndarray | None) -> np.ndarray:
        nonlocal past
        logits, past = session.decode(encoded, start if chosen is None else chosen, past)
        return logits[:, -1]

    return decode(advance, len(input_ids), max_new_tokens, eos_ids, choose)
