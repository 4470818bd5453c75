"""Run a graph with its adapters active against the torch model with the same adapters merged, both in float32.

Each row of a batch is compared with a pass of its own, alone and without padding, through weights into which its
adapter was merged by the composer's own sum: neither the graph's factors nor its batch are shared. A causal model is
prefilled and then decoded with its cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.apart import ApartAdapter
from composer.errors import OnnxVerificationError
from composer.exporters.onnx.adapted import AdaptedSession, activate
from composer.exporters.onnx.architectures import Architecture
from composer.exporters.onnx.bind import _keys
from composer.exporters.onnx.live import LiveModel
from composer.exporters.onnx.session import forward, open_session
from composer.exporters.onnx.skeleton import quiet
from composer.exporters.onnx.verify import (
    NEW_TOKENS,
    RELATIVE_TOLERANCE,
    SMALLEST_TOLERANCE,
    Verification,
    live_model,
    pad,
    prompts,
)
from composer.renames import module_names

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["verify_adapters"]

Say = Callable[[str], None]


def verify_adapters(
    folder: Path,
    model_path: Path,
    architecture: Architecture,
    adapters: Sequence[ApartAdapter],
    batches: Sequence[Sequence[int | None]],
    say: Say,
) -> Verification:
    """Compare every row of every batch; a batch says for each of its rows which of `adapters` acts, or None.

    Raises OnnxVerificationError when a value differs by more than the tolerance, or is not a number.
    """
    with quiet():
        live = live_model(folder, architecture)
        session = open_session(model_path)
        known = [row for rows in prompts(folder, live) for row in rows]
        checks, largest, scale = [], 0.0, 0.0
        for number, batch in enumerate(batches):
            names = [None if index is None else adapters[index].name for index in batch]
            say(f"verify {', '.join(dict.fromkeys(name or 'base' for name in names))}")
            rows = [known[(number + place) % len(known)] for place in range(len(batch))]
            adapted = activate(session, folder, names)
            difference, absmax = _compare(adapted, live, architecture, rows, adapters, batch)
            checks.append({"check": "adapters", "adapters": names, "rows": len(rows), "max_abs_diff": difference})
            largest, scale = max(largest, difference), max(scale, absmax)
    tolerance = max(SMALLEST_TOLERANCE, RELATIVE_TOLERANCE * scale)
    failed = [check["adapters"] for check in checks if not check["max_abs_diff"] <= tolerance]
    if failed:
        raise OnnxVerificationError(
            f"onnx: with an adapter active the graph differs from the merged model by {largest:.3g}: {failed[0]}",
            expected=f"at most {tolerance:.3g}",
            found=largest,
            remedy="merge the adapters: leave --separate and --multi out",
            max_abs_diff=largest,
            tolerance=tolerance,
            checks=checks,
        )
    return Verification(largest, tolerance, tuple(checks))


def _compare(
    session: AdaptedSession,
    live: LiveModel,
    architecture: Architecture,
    rows: Sequence[list[int]],
    adapters: Sequence[ApartAdapter],
    batch: Sequence[int | None],
) -> tuple[float, float]:
    """The largest difference of any row from its own pass, infinite for one that is no number; the largest value."""
    import numpy as np
    import torch

    run = _run_causal if architecture.is_causal else _run_encoder
    texts, found = run(session, live, architecture, rows)
    difference, absmax = 0.0, 0.0
    for index in dict.fromkeys(batch):
        adapter = None if index is None else adapters[index]
        with merged(live.module, adapter, architecture.family), torch.no_grad():
            for text, got, own in zip(texts, found, batch, strict=True):
                if own != index:
                    continue
                expected = live(**_inputs(text, architecture))[architecture.output][0].numpy()
                apart = float(np.abs(got - expected).max()) if got.shape == expected.shape else math.inf
                difference = max(difference, math.inf if math.isnan(apart) else apart)
                absmax = max(absmax, float(np.abs(expected).max()))
    return difference, absmax


def _inputs(text: Sequence[int], architecture: Architecture) -> dict[str, torch.Tensor]:
    import torch

    ids = torch.tensor([list(text)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in architecture.inputs:
        inputs |= {"token_type_ids": torch.zeros_like(ids)}
    return inputs


def _run_causal(
    session: Any, live: LiveModel, _: Architecture, rows: Sequence[list[int]]
) -> tuple[list[list[int]], list[np.ndarray]]:
    """Texts with the tokens that were decoded, and the logits of each text's positions [length, vocabulary]."""
    import numpy as np

    ids, mask = pad(rows, live.config, left=True)
    step, past, logits = ids, None, []
    for _ in range(NEW_TOKENS):
        part, past = forward(session, step, mask, past)
        logits.append(part)
        step = part[:, -1].argmax(axis=-1).astype(np.int64)[:, None]
        ids = np.concatenate([ids, step], axis=1)
        mask = np.concatenate([mask, np.ones_like(step)], axis=1)
    found = np.concatenate(logits, axis=1)
    starts = [max(map(len, rows)) - len(row) for row in rows]
    texts = [ids[number, start:-1].tolist() for number, start in enumerate(starts)]
    return texts, [found[number, start:] for number, start in enumerate(starts)]


def _run_encoder(
    session: Any, live: LiveModel, architecture: Architecture, rows: Sequence[list[int]]
) -> tuple[list[list[int]], list[np.ndarray]]:
    """The texts, and what the graph gives for each: of all its positions, or of the whole."""
    import numpy as np

    ids, mask = pad(rows, live.config, left=False)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    found = session.run([architecture.output], {name: feeds[name] for name in architecture.inputs})[0]
    whole = found.ndim == 2
    parts = [got if whole else got[: len(row)] for got, row in zip(found, rows, strict=True)]
    return [list(row) for row in rows], parts


@contextmanager
def merged(module: torch.nn.Module, adapter: ApartAdapter | None, family: str) -> Iterator[None]:
    """The module with an adapter's deltas added to its weights, which get their own values back."""
    parameters = _parameters(module, adapter, family) if adapter else {}
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for job, item in adapter.deltas if adapter else ():
            parameter = parameters[job.name].data
            kept.append((parameter, parameter.clone()))
            base = parameter.numpy()
            change = item.delta.load().rows(0, len(base), base.copy())
            base += change * base.dtype.type(item.weight)
        yield
    finally:
        for parameter, before in kept:
            parameter.copy_(before)


def _parameters(module: torch.nn.Module, adapter: ApartAdapter, family: str) -> dict[str, torch.nn.Parameter]:
    """The module's parameters by the names that a checkpoint has for them."""
    prefix = getattr(module, "base_model_prefix", "")
    renamed = (module_names(family, tuple(job.name for job, _ in adapter.deltas)) if family else None) or {}
    return {key: value for name, value in module.named_parameters() for key in _keys(name, prefix, renamed)}
