"""A full fine-tune into a LoRA: the best low-rank part of what changed, one tensor in memory at a time.

W_finetune − W_base  ≈  B·A       each linear weight that differs, at a rank or to a share of the energy
norms, biases, embeddings         equal, or carried whole (modules_to_save, bias), or left out where that is asked for
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from composer.adapters import CONFIG, WEIGHTS
from composer.checkpoint import Checkpoint
from composer.ends import is_end, is_shared, tied
from composer.errors import IncompatibleError, NonFiniteError, TargetMismatchError, UsageError
from composer.factors import leading
from composer.peft_format import FACTOR_NAMES, PREFIX, lora_config, model_card, share, write_json, write_tensors
from composer.quantised import QuantisedTensor
from composer.resolve import CONV1D_MODELS, CONV1D_MODULES
from composer.sinks import FolderSink
from composer.tensors import DTYPES, FLOAT_DTYPES, TensorSpec

__all__ = ["RECORD", "Converted", "check_same_tensors", "check_size", "extract_lora"]

RECORD = "provenance.json"
EMBEDDING = re.compile(r"(.*\.)?(wte|wpe|shared|relative_attention_bias|[^.]*embed[^.]*)\.weight")
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
         "ForTokenClassification": "TOKEN_CLS", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Converted:
    """A LoRA that was written: its folder, its record (also in provenance.json), and its files."""

    out: Path
    record: dict[str, Any]
    files: dict[str, dict[str, int | str]]


def check_size(rank: int | None, energy: float | None) -> None:
    """Raise UsageError unless exactly one of a rank from 1 on and an energy in (0, 1] is given."""
    valid = (rank is not None and rank >= 1) if energy is None else (rank is None and 0 < energy <= 1)
    if not valid:
        raise UsageError(
            "the size of the new LoRA is a rank or a share of the energy",
            expected="--rank N from 1 on, or --energy E above 0 and up to 1",
            found={"rank": rank, "energy": energy},
            remedy="give one of them",
        )


def extract_lora(
    finetune: Checkpoint,
    base: Checkpoint,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ignore_rest: bool = False,
    inputs: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Converted:
    """Write the new folder `out`: a PEFT LoRA that turns `base` into nearly `finetune`.

    rank: of every module; energy: the share of ‖W_finetune − W_base‖² to keep, each module at its lowest rank for it.
    ignore_rest: leave out what changed and is no linear weight; it is listed in the record.
    inputs: `base` and `finetune` as the caller knows them (ref, fingerprint); goes into the record and the card.
    Raises UsageError (size), TargetMismatchError (other tensors or shapes), IncompatibleError (nothing changed, or
    something that cannot be carried), NonFiniteError, StorageError; `out` is untouched then.
    """
    check_size(rank, energy)
    check_same_tensors(finetune, base)
    known = inputs or {}
    run = _Run(finetune, base, rank, energy, ignore_rest)
    with FolderSink(out) as sink:
        write_tensors(sink, WEIGHTS, run.tensors(progress or (lambda step, done, total: None)))
        if not run.ranks:
            raise IncompatibleError(
                "no linear weight differs between the two: there is no LoRA to extract",
                expected="a fine-tune of this base",
                found=f"{len(run.saved)} other tensors that differ",
                remedy="check which is the base and which the fine-tune",
            )
        name = base.config.get("_name_or_path") or known.get("base", {}).get("ref")
        write_json(sink, CONFIG, run.config(name))
        record = {"operation": "extract", "rank": rank, "energy": energy, **known, **run.facts()}
        write_json(sink, RECORD, record)
        fields = {"base_model_fingerprint": known.get("base", {}).get("fingerprint"), "tags": ["lora", "extracted"]}
        text = f"What a fine-tune changed in its base, as a LoRA that keeps {record['kept_energy']:.2%} of the energy."
        sink.write("README.md", model_card(fields, "A LoRA extracted from a fine-tune", text))
        sink.commit()
    return Converted(out, record, sink.files)


@dataclass(slots=True)
class _Run:
    """The tensors of the file, and what is learnt while they are made."""

    finetune: Checkpoint
    base: Checkpoint
    rank: int | None
    energy: float | None
    ignore_rest: bool
    ranks: dict[str, int] = field(default_factory=dict)
    energies: dict[str, tuple[float, float]] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def tensors(self, progress: Callable[[str, int, int], None]) -> Iterator[tuple[str, np.ndarray]]:
        """The factors of each linear weight that differs, then the other tensors that do."""
        total = sum(spec.nbytes for spec in self.base.tensors.values())
        done = 0
        rest = []
        for name, spec in self.base.tensors.items():
            progress("extracting", done, total)
            done += spec.nbytes
            change = self._change(name)
            if change is None:
                continue
            if not _is_linear(spec):
                rest.append(name)
                continue
            self._refuse_tied(name)
            module = name.removesuffix(".weight")
            self._refuse_mixed(module)
            left, right, *self.energies[module] = leading(change, rank=self.rank, energy=self.energy)
            self.ranks[module] = len(right)
            a, b = (left.T, right.T) if self._transposed(module) else (right, left)
            for key, factor in zip(FACTOR_NAMES, (a, b), strict=True):
                yield key.format(module), np.ascontiguousarray(factor, np.float32)
        yield from self._whole(rest)

    def _change(self, name: str) -> np.ndarray | None:
        """W_finetune − W_base in float64, None where the two are equal."""
        new, old = (self._read(checkpoint, name) for checkpoint in (self.finetune, self.base))
        if new.dtype == old.dtype and np.array_equal(new, old):
            return None
        change = new.astype(np.float64) - old.astype(np.float64)
        if not change.any():
            return None
        if not np.isfinite(change).all():
            raise NonFiniteError(
                f"{name} holds NaN or infinity",
                expected="finite numbers",
                found=int((~np.isfinite(change)).sum()),
                remedy="the training diverged: take an earlier checkpoint",
                tensor=name,
            )
        return change

    @staticmethod
    def _read(checkpoint: Checkpoint, name: str) -> np.ndarray:
        spec = checkpoint.tensors[name]
        return np.frombuffer(spec.read_bytes(0, spec.nbytes), DTYPES[spec.dtype]).reshape(spec.shape)

    def _whole(self, rest: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Tensors that no LoRA can change: all of a module that has one of them, and biases of modules with a LoRA."""
        if self.ignore_rest:
            self.ignored = rest
            return
        for name in rest:
            module, _, attribute = name.rpartition(".")
            if attribute not in ("weight", "bias") or self.base.tensors[name].dtype not in FLOAT_DTYPES:
                raise IncompatibleError(
                    f"{name} differs, and a LoRA cannot carry it",
                    expected="linear weights, and modules with a weight and a bias",
                    found=list(self.base.tensors[name].shape),
                    remedy="give --ignore-rest to leave it out",
                )
            self._refuse_tied(name)
            self.saved.append(name)
        modules = {name.rpartition(".")[0] for name in self.saved} - set(self.ranks)
        for name in self.base.tensors:
            module = name.rpartition(".")[0]
            if module in modules:
                yield PREFIX + name, self._read(self.finetune, name)
            elif name in self.saved:
                yield f"{PREFIX}{module}.base_layer.{name.rpartition('.')[2]}", self._read(self.finetune, name)

    def _refuse_tied(self, name: str) -> None:
        if is_shared(name, self.base) or (is_end(name) and tied(self.base)):
            raise IncompatibleError(
                f"{name} differs, and this base shares it between embedding and output head, or encoder and decoder",
                expected="a fine-tune that leaves the tied embedding alone, or a base that is not tied",
                found=name,
                remedy="give --ignore-rest to leave it out, or untie both checkpoints first",
            )

    def _refuse_mixed(self, module: str) -> None:
        if self._transposed(module) != self._transposed(next(iter(self.ranks), module)):
            raise IncompatibleError(
                f"{module}: some of the changed modules are [in, out] in this base and others [out, in]",
                expected="only Conv1D modules, or none of them",
                found="both",
                remedy="one adapter_config.json cannot say both: publish the fine-tune as a base of its own",
            )

    def _transposed(self, module: str) -> bool:
        return self.base.config.get("model_type") in CONV1D_MODELS and module.rpartition(".")[2] in CONV1D_MODULES

    def config(self, base_name: str | None) -> dict[str, Any]:
        """adapter_config.json."""
        outside = {name.rpartition(".")[0] for name in self.saved} - set(self.ranks)
        inside = any(name.rpartition(".")[0] in self.ranks for name in self.saved)
        task = next((task for end, task in TASKS.items() if self.base.architecture.endswith(end)), None)
        return lora_config(
            self.ranks,
            {name.rpartition(".")[0] for name in self.base.tensors},
            base_model_name_or_path=base_name,
            task_type=task,
            fan_in_fan_out=any(map(self._transposed, self.ranks)),
            modules_to_save=sorted(outside) or None,
            bias="lora_only" if inside else "none",
        )

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
            "saved_whole": self.saved,
            "left_out": self.ignored,
        }


def _is_linear(spec: TensorSpec | QuantisedTensor) -> bool:
    matrix = len(spec.shape) == 2 and spec.dtype in FLOAT_DTYPES
    return matrix and spec.name.endswith(".weight") and not EMBEDDING.fullmatch(spec.name)


def check_same_tensors(finetune: Checkpoint, base: Checkpoint) -> None:
    """Raise TargetMismatchError unless both have the same tensors in the same shapes."""
    ours, theirs = finetune.shapes, base.shapes
    wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if wrong:
        name = wrong[0]
        raise TargetMismatchError(
            f"the fine-tune and the base differ in the names or shapes of {len(wrong)} tensors: {', '.join(wrong[:3])}",
            expected=list(theirs[name]) if name in theirs else "no such tensor",
            found=list(ours[name]) if name in ours else "no such tensor",
            remedy="give the base that the fine-tune began with",
            keys=wrong,
        )
