"""What an encoder says of one text: scores of its labels, of the whole or token by token, or an embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.errors import UnsupportedArchitectureError, UsageError
from composer.running.runnable import Runnable

__all__ = ["Encoding", "encode"]


@dataclass(frozen=True, slots=True)
class Encoding:
    """The answer of an encoder; what its task does not give is None.

    labels: label → score, of a text: probabilities, independent ones of a multi-label model, values of a regression.
    token_labels: (token, its most likely label, its probability), special tokens left out.
    embedding: the mean of the last hidden states over all tokens, float32 [hidden size].
    """

    task: str
    tokens: int
    labels: dict[str, float] | None = None
    token_labels: tuple[tuple[str, str, float], ...] | None = None
    embedding: tuple[float, ...] | None = None


def encode(runnable: Runnable, text: str) -> Encoding:
    """Run the encoder over `text`.

    Raises UnsupportedArchitectureError for a model that generates, UsageError for a text that is too long.
    """
    architecture = runnable.architecture
    if architecture.generates:
        raise UnsupportedArchitectureError(
            f"{runnable.folder}: {architecture.name} generates text",
            expected="an encoder",
            found=architecture.task,
            remedy="generate with it",
        )
    ids: list[int] = runnable.tokenizer(text)["input_ids"]
    if not ids or (runnable.longest is not None and len(ids) > runnable.longest):
        raise UsageError(
            f"the text has {len(ids)} tokens",
            expected=f"1 to {runnable.longest or 'any number'}",
            found=len(ids),
            remedy="give another text",
        )
    row = np.array([ids], dtype=np.int64)
    feeds = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
    output = runnable.session.run([architecture.output], {name: feeds[name] for name in architecture.inputs})[0][0]
    if architecture.task == "feature-extraction":
        embedding = tuple(float(value) for value in output.mean(axis=0))
        return Encoding(architecture.task, len(ids), embedding=embedding)
    names = _labels(runnable.config, output.shape[-1])
    if architecture.task == "text-classification":
        scores = _scores(output, runnable.config)
        labels = {name: float(score) for name, score in zip(names, scores, strict=True)}
        return Encoding(architecture.task, len(ids), labels=labels)
    tokens = runnable.tokenizer.convert_ids_to_tokens(ids)
    special = set(runnable.tokenizer.all_special_ids)
    found = [
        (token, names[int(row.argmax())], float(_softmax(row).max()))
        for number, token, row in zip(ids, tokens, output, strict=True)
        if number not in special
    ]
    return Encoding(architecture.task, len(ids), token_labels=tuple(found))


def _labels(config: dict[str, Any], count: int) -> list[str]:
    named = {int(number): str(name) for number, name in (config.get("id2label") or {}).items()}
    return [named.get(number, f"LABEL_{number}") for number in range(count)]


def _scores(logits: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    kind = config.get("problem_type") or ("regression" if len(logits) == 1 else "single_label_classification")
    if kind == "regression":
        return logits
    if kind == "multi_label_classification":
        independent: np.ndarray = 1 / (1 + np.exp(-logits.astype(np.float64)))
        return independent
    return _softmax(logits)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    shares: np.ndarray = weights / weights.sum()
    return shares
