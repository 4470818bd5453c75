"""Text from a model that writes: the prompt through the chat template, then tokens chosen and spelled out as they come.

"What is …?" ─ chat template ─► ids ─► stream ─ Sampling ─► id ─ Speller ─► Piece("Paris"), …, Answer
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from composer.errors import UnsupportedArchitectureError, UsageError
from composer.exporters.onnx.seq2seq_session import Seq2SeqSession, stream_seq2seq
from composer.exporters.onnx.session import most_likely, stream
from composer.running.runnable import Runnable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "Piece", "Sampling", "Speller", "answer"]

UNFINISHED = "\ufffd"  # what bytes that are not yet a whole character decode to
LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens that may be held back


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: the most likely one at temperature 0, else a draw.

    temperature: what logits are divided by. top_p: draw from the fewest tokens whose probabilities add up to it
        (nucleus sampling, arXiv:1904.09751 §3.1). seed: of numpy's PCG64; None draws differently each time.
    Raises UsageError for a temperature below 0 or a top_p outside (0, 1].
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < np.inf and 0 < self.top_p <= 1):
            raise UsageError(
                "no token can be drawn so",
                expected="a temperature of 0 or more, and a top-p above 0 and at most 1",
                found={"temperature": self.temperature, "top_p": self.top_p},
                remedy="leave both out to take the most likely token",
            )

    def chooser(self) -> Chooser:
        """What draws for one text."""
        return Chooser(self)


class Chooser:
    """Draws tokens one after the other, from one seed."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling, self._random = sampling, np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """int64 [batch] of float32 [batch, vocabulary]."""
        if self._sampling.temperature == 0:
            return most_likely(logits)
        scaled = logits.astype(np.float64) / self._sampling.temperature
        weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
        return np.array([self._draw(row) for row in weights / weights.sum(axis=-1, keepdims=True)])

    def _draw(self, probabilities: np.ndarray) -> int:
        order = np.argsort(-probabilities, kind="stable")
        reached = np.cumsum(probabilities[order])
        kept = order[: int(np.searchsorted(reached, self._sampling.top_p)) + 1]
        share = probabilities[kept]
        return int(self._random.choice(kept, p=share / share.sum()))


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is certain now; it never changes as more tokens come."""

    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated.

    tokens: the ids, the one that ended the text included. finish: ``stop`` after such a one, else ``length``.
    prefill_s: seconds until the first token. tokens_per_s: of the others; None where there was one.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish: str
    prefill_s: float
    tokens_per_s: float | None


class Speller:
    """Spells tokens out as they come: a character whose bytes are spread over tokens waits for the last of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._said = 0  # where the words begin that are decoded again, and up to where they were said

    def add(self, token: int) -> str:
        """The text that is certain with this token."""
        self._ids.append(token)
        return self._next(final=False)

    def end(self) -> str:
        """What was held back."""
        return self._next(final=True)

    def _next(self, *, final: bool) -> str:
        # Decoded with the tokens before it, because a token's spelling may depend on what it stands after.
        before = self._decode(self._ids[self._start : self._said])
        text = self._decode(self._ids[self._start :])
        waiting = text.endswith(UNFINISHED) and len(self._ids) - self._said < LONGEST_CHARACTER
        if not final and (waiting or len(text) <= len(before)):
            return ""
        self._start, self._said = self._said, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def answer(
    runnable: Runnable,
    prompt: str,
    *,
    raw: bool = False,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
) -> Iterator[Piece | Answer]:
    """Generate: pieces of text as they come, and the whole Answer last.

    raw: the prompt as it is, with the tokens that the tokenizer puts around a text; else through the chat template
        where the model has one.
    Raises UnsupportedArchitectureError for an encoder, UsageError for an empty prompt or one that is too long; before
    the first piece.
    """
    if not runnable.architecture.generates:
        raise UnsupportedArchitectureError(
            f"{runnable.folder}: {runnable.architecture.name} does not generate text",
            expected="a causal language model, or an encoder-decoder",
            found=runnable.architecture.task,
            remedy="run it without options of generation",
        )
    ids = _prompt_ids(runnable, prompt, raw=raw)
    # An encoder-decoder has places of its own for what it writes.
    taken = len(runnable.start_ids) if runnable.start_ids else len(ids)
    room = max_new_tokens if runnable.longest is None else min(max_new_tokens, runnable.longest - taken)
    if not ids or room < 1 or len(ids) > (runnable.longest or len(ids)):
        raise UsageError(
            f"the prompt has {len(ids)} tokens",
            expected="at least one" if not ids else f"fewer than {runnable.longest}, which the model has places for",
            found=len(ids),
            remedy="give another prompt",
        )
    started = time.perf_counter()
    prefill, tokens, texts, speller = 0.0, [], [], Speller(runnable.tokenizer)
    choose = (sampling or Sampling()).chooser()
    batch = np.array([ids], dtype=np.int64)
    if isinstance(runnable.session, Seq2SeqSession):
        chosen_tokens = stream_seq2seq(
            runnable.session, batch, start_ids=runnable.start_ids, max_new_tokens=room, eos_ids=runnable.eos_ids,
            choose=choose,
        )  # fmt: skip
    else:
        chosen_tokens = stream(runnable.session, batch, None, room, runnable.eos_ids, choose=choose)
    for chosen in chosen_tokens:
        prefill = prefill or time.perf_counter() - started
        tokens.append(int(chosen[0]))
        if text := speller.add(tokens[-1]):
            texts.append(text)
            yield Piece(text)
    seconds = time.perf_counter() - started - prefill
    if text := speller.end():
        texts.append(text)
        yield Piece(text)
    yield Answer(
        text="".join(texts),
        tokens=tuple(tokens),
        prompt_tokens=len(ids),
        finish="stop" if tokens[-1] in runnable.eos_ids else "length",
        prefill_s=round(prefill, 4),
        tokens_per_s=round((len(tokens) - 1) / seconds, 2) if len(tokens) > 1 else None,
    )


def _prompt_ids(runnable: Runnable, prompt: str, *, raw: bool) -> list[int]:
    tokenizer = runnable.tokenizer
    chat = not raw and bool(tokenizer.chat_template)
    if chat:
        message = {"role": "user", "content": prompt}
        prompt = str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
    ids: list[int] = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    return ids
