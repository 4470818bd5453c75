"""How fast models run on this machine: prefill and decoding, by torch and by ONNX Runtime, side by side.

    load every (folder, runtime) ──► round 1: each once ──► round 2 … ──► the median of each

Rounds go through all of them in turn, so that a machine that slows down slows all alike. Both runtimes compute in
float32 with the same number of threads, on the same random ids. Bottlenecks beside the weights are attached by
composer.loading; other additions that torch would not see are refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from composer.errors import UnsupportedArchitectureError, UsageError
from composer.exporters.onnx import MODEL_FILE, find_graph, open_session
from composer.exporters.onnx.session import PAST, forward
from composer.files import read_json

__all__ = ["RUNTIMES", "Latency", "Workload", "measure_latency"]

RUNTIMES = ("torch", "onnx")
Times = tuple[float, float | None]  # seconds of the prefill, decoded tokens a second


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured: `batch` rows of `prompt` random tokens, then `new` tokens one by one; `rounds` times."""

    prompt: int = 128
    new: int = 32
    batch: int = 1
    rounds: int = 5
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Latency:
    """Medians of one model in one runtime.

    prefill_s: seconds for all prompts of the batch. tokens_per_s: decoded tokens of all rows; None for an encoder.
    against: prefill_s and the time of a token as multiples of those of the first model in the same runtime.
    """

    model: str
    runtime: str
    prefill_s: float
    tokens_per_s: float | None
    prefill_against: float | None = None
    token_against: float | None = None


class _Runner(Protocol):
    """A loaded model: one pass over ids [batch, n], with what the pass before it returned."""

    vocabulary: int
    decodes: bool

    def step(self, ids: np.ndarray, mask: np.ndarray, past: Any) -> tuple[np.ndarray, Any]:
        """The logits (or hidden states), and the cache."""
        ...


def measure_latency(
    folders: Sequence[Path],
    workload: Workload,
    runtimes: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> list[Latency]:
    """Measure every folder in every runtime that it has: torch always, ONNX Runtime where there is a model.onnx.

    runtimes: only these, which each folder must have then.
    Raises NotFoundError (no checkpoint, no model.onnx), UsageError (a prompt that is too long),
    UnsupportedArchitectureError (a class that is not of transformers, or with encoder and decoder),
    UnsupportedAdapterError (additions that torch would not see) and what opening a session raises.
    """
    say = progress or (lambda _: None)
    pairs = [
        (folder, runtime)
        for runtime in runtimes or RUNTIMES
        for folder in folders
        if runtimes or runtime == "torch" or (folder / MODEL_FILE).is_file()
    ]
    times: list[list[Times]] = [[] for _ in pairs]
    with _torch_threads(workload.threads):
        runners = []
        for folder, runtime in pairs:
            say(f"loading {folder.name} ({runtime})")
            runners.append(_load(folder, runtime, workload))
        for number in range(workload.rounds + 1):
            for (folder, runtime), runner, found in zip(pairs, runners, times, strict=True):
                say(f"round {number} of {workload.rounds}: {folder.name} ({runtime})")
                measured = _run(runner, workload)
                if number:  # the first round warms up
                    found.append(measured)
    return _table(pairs, times)


def _table(pairs: Sequence[tuple[Path, str]], times: Sequence[Sequence[Times]]) -> list[Latency]:
    rows: list[Latency] = []
    first: dict[str, Times] = {}
    for (folder, runtime), found in zip(pairs, times, strict=True):
        prefill = median(seconds for seconds, _ in found)
        decoded = [rate for _, rate in found if rate is not None]
        rate = median(decoded) if decoded else None
        base_prefill, base_rate = first.setdefault(runtime, (prefill, rate))
        token = base_rate / rate if rate and base_rate else None
        rows.append(Latency(str(folder), runtime, prefill, rate, prefill / base_prefill, token))
    return rows


def _run(runner: _Runner, workload: Workload) -> Times:
    ids = np.random.default_rng(0).integers(0, runner.vocabulary, (workload.batch, workload.prompt))
    mask = np.ones_like(ids)
    started = time.perf_counter()
    logits, past = runner.step(ids, mask, None)
    prefill = time.perf_counter() - started
    if not runner.decodes or not workload.new:
        return prefill, None
    started = time.perf_counter()
    for _ in range(workload.new):
        token = logits[:, -1:].argmax(axis=-1).astype(np.int64)
        mask = np.concatenate([mask, np.ones_like(token)], axis=1)
        logits, past = runner.step(token, mask, past)
    return prefill, workload.new * workload.batch / (time.perf_counter() - started)


def _load(folder: Path, runtime: str, workload: Workload) -> _Runner:
    config = read_json(folder / "config.json")
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(longest, int) and workload.prompt + workload.new > longest:
        raise UsageError(
            f"{folder.name} has {longest} positions",
            expected=f"at most {longest} tokens in prompt and answer",
            found=workload.prompt + workload.new,
            remedy="give a shorter --prompt or fewer --new",
        )
    return _OnnxRunner(folder, config, workload.threads) if runtime == "onnx" else _TorchRunner(folder, config)


class _OnnxRunner:
    def __init__(self, folder: Path, config: dict[str, Any], threads: int | None) -> None:
        self.session = open_session(find_graph(folder), threads=threads)
        self.inputs = {item.name for item in self.session.get_inputs()}
        self.decodes = any(name.startswith(PAST) for name in self.inputs)
        self.vocabulary = int(config["vocab_size"])

    def step(self, ids: np.ndarray, mask: np.ndarray, past: Any) -> tuple[np.ndarray, Any]:
        if self.decodes:
            return forward(self.session, ids, mask, past)
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return self.session.run(None, {name: feeds[name] for name in self.inputs})[0], None


class _TorchRunner:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from composer.loading import load_model

        if config.get("is_encoder_decoder"):
            raise UnsupportedArchitectureError(
                f"{folder.name}: models with encoder and decoder are not measured",
                expected="a decoder or an encoder",
                found=(config.get("architectures") or ["none"])[0],
                remedy="measure it in the engine that serves it",
            )
        self.model = load_model(folder)
        self.decodes = bool(self.model.can_generate())
        self.vocabulary = int(config["vocab_size"])

    def step(self, ids: np.ndarray, mask: np.ndarray, past: Any) -> tuple[np.ndarray, Any]:
        import torch

        options: dict[str, Any] = {"past_key_values": past, "use_cache": True} if self.decodes else {}
        with torch.inference_mode():
            out = self.model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **options)
        return out[0].numpy(), out.get("past_key_values")


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
