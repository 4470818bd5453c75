"""A LoRA at another rank: the best of that rank, by an SVD of QR cores; a larger rank is exact.

The tensors that it carries whole (modules_to_save, biases) go along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from composer.adapters import CONFIG, WEIGHTS, Adapter
from composer.deltas import LoadedLowRank, Replace
from composer.errors import UnsupportedAdapterError
from composer.exporters.peft import is_low_rank
from composer.extract import RECORD, Converted, check_size
from composer.factors import stacked, truncate
from composer.peft_format import FACTOR_NAMES, lora_config, model_card, share, write_json, write_tensors
from composer.sinks import FolderSink

__all__ = ["resize_lora"]

KEPT_FIELDS = ("base_model_name_or_path", "task_type", "fan_in_fan_out", "modules_to_save", "bias", "target_modules")


def resize_lora(
    adapter: Adapter,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Converted:
    """Write the new folder `out`: `adapter` at `rank`, or each module at its lowest rank for the share `energy`.

    inputs: `adapter` (ref, digest) and `base` (fingerprint) as the caller knows them, for the record and the card.
    Raises UsageError (size), UnsupportedAdapterError (not low-rank), StorageError; `out` is untouched then.
    """
    check_size(rank, energy)
    known = inputs or {}
    run = _Run(adapter, rank, energy)
    with FolderSink(out) as sink:
        write_tensors(sink, WEIGHTS, run.tensors())
        kept = {name: adapter.config[name] for name in KEPT_FIELDS if adapter.config.get(name) is not None}
        write_json(sink, CONFIG, {**lora_config(run.ranks, run.ranks), **kept})
        record = {"operation": "resize", "rank": rank, "energy": energy, **known, **run.facts()}
        write_json(sink, RECORD, record)
        fields = {
            "base_model": None if Path(adapter.base_name or "/").is_absolute() else adapter.base_name,
            "base_model_fingerprint": known.get("base", {}).get("fingerprint"),
            "tags": ["lora", "resized"],
        }
        text = f"A LoRA of another rank that keeps {record['kept_energy']:.2%} of the energy of the first."
        sink.write("README.md", model_card(fields, "A resized LoRA", text))
        sink.commit()
    return Converted(out, record, sink.files)


@dataclass(slots=True)
class _Run:
    """The tensors of the file, and what is learnt while they are made."""

    adapter: Adapter
    rank: int | None
    energy: float | None
    ranks: dict[str, int] = field(default_factory=dict)
    energies: dict[str, tuple[float, float]] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """New factors of each module, and what is carried whole under its own name."""
        names = {target.parameter: target.parameter for target in self.adapter.signature.targets}
        for delta in self.adapter.deltas(names):
            if isinstance(delta, Replace) and delta.rows is None:
                yield delta.tensor.name, delta.tensor.read()
                continue
            if not is_low_rank(delta):
                kind = self.adapter.signature.kind
                raise UnsupportedAdapterError(
                    f"its change of {delta.target} ({kind}, {type(delta).__name__}) has no rank that could change",
                    expected="a plain LoRA or AdaLoRA on linear weights",
                    found=f"{kind}: {type(delta).__name__}",
                    remedy="resize a plain LoRA; to make one of this, compose it and extract a LoRA from the result",
                )
            module = delta.target.removesuffix(".weight")
            left, right = self._resized(module, delta.load())
            self.ranks[module] = len(right)
            a, b = (left.T, right.T) if delta.transposed else (right, left)
            for key, factor in zip(FACTOR_NAMES, (a, b), strict=True):
                yield key.format(module), np.ascontiguousarray(factor, np.float32)

    def _resized(self, module: str, loaded: LoadedLowRank) -> tuple[np.ndarray, np.ndarray]:
        left, right = stacked([loaded], [1.0])
        spare = (self.rank or 0) - len(right)
        if spare >= 0:
            self.energies[module] = (0.0, truncate(left, right)[3])
            return np.pad(left, ((0, 0), (0, spare))), np.pad(right, ((0, spare), (0, 0)))
        left, right, *self.energies[module] = truncate(left, right, rank=self.rank, energy=self.energy)
        return left, right

    def facts(self) -> dict[str, Any]:
        """What the record says of the result."""
        lost, total = (sum(values) for values in zip(*self.energies.values(), strict=True))
        return {
            "kept_energy": share(total - lost, total),
            "kept_energy_by_module": {
                name: share(total - lost, total) for name, (lost, total) in sorted(self.energies.items())
            },
            "ranks": {"least": min(self.ranks.values()), "most": max(self.ranks.values())},
            "modules": len(self.ranks),
        }
