"""A composition as one PEFT LoRA, without the base's weights: any engine that loads LoRAs loads it.

Σ wᵢ·sᵢ·Bᵢ·Aᵢ  =  [w₁s₁B₁ | w₂s₂B₂ | …] · [A₁; A₂; …]       exact: the ranks add up
                ≈  U√S · √S·Vᵀ at the rank of the recipe      the best of that rank, from QR cores (Eckart, Young 1936)

A method on factors (svd, knots, core_space …) gives its own pair. A trained bias and a module of modules_to_save go
along as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from composer.adapters import CONFIG, WEIGHTS, Adapter
from composer.adapters.adalora import SingularFactors
from composer.deltas import LoadedLowRank, LowRank, Replace
from composer.errors import IncompatibleError, RecipeError, UnsupportedAdapterError
from composer.factors import stacked, truncate
from composer.kernels import Survival, cast_block
from composer.methods import find_method
from composer.peft_format import (
    FACTOR_NAMES,
    PREFIX,
    lora_config,
    model_card,
    most_common,
    share,
    write_json,
    write_tensors,
)
from composer.places import places
from composer.plan import SAFETENSORS_DTYPE, Plan, TensorJob, WeightedDelta
from composer.recipe import Dtype
from composer.sinks import FolderSink
from composer.tensors import DTYPES, encode_header

__all__ = ["PeftExporter", "is_low_rank"]

SUMS = ("linear", "cat", "task_arithmetic")
Pair = tuple[np.ndarray, np.ndarray]


class PeftExporter:
    """adapter_config.json, adapter_model.safetensors and README.md."""

    def check_plan(self, plan: Plan) -> None:
        """Raise unless the result is a LoRA.

        Raises RecipeError (no adapters, a method that gives no factors), UnsupportedAdapterError (a delta that is not
        low-rank) or IncompatibleError (adapters of modules that no one model class names).
        """
        beyond = {
            "untie the ends of its base": plan.untied,
            "be one for all copies of a layer": plan.layers,
            "resize the vocabulary of its base": plan.vocabulary,
        }
        if what := next((what for what, asked in beyond.items() if asked), None):
            raise IncompatibleError(
                f"a LoRA cannot {what}",
                expected="adapters that leave the base's tensors as they are named, sized and tied",
                found=plan.config_changes,
                remedy="compose to safetensors, or leave out the adapter that asks for it",
            )
        method = find_method(plan.recipe.method)
        if method.name not in SUMS and not method.factors:
            raise RecipeError(
                f"method {method.name!r} gives whole weights, not low-rank factors: they are no LoRA",
                expected=f"{', '.join(SUMS)} or a method on factors, such as svd",
                found=method.name,
                remedy="choose one of these, or compose to safetensors and extract a LoRA from it",
            )
        for item in plan.additions:
            raise UnsupportedAdapterError(
                f"{plan.terms[item.term].label} adds to the model ({item.addition.summary}): that is no LoRA",
                expected="adapters of low-rank deltas",
                found=plan.terms[item.term].adapter.signature.kind,
                remedy="leave it out, or export bundle, onnx or safetensors",
            )
        jobs = [job for job in plan.jobs if job.deltas]
        if not any(not job.deltas[0].delta.replaces for job in jobs):
            raise RecipeError(
                "nothing is left to write as a LoRA",
                expected="an adapter with low-rank deltas and a weight other than 0",
                found=str(plan.recipe),
                remedy="add one",
            )
        names = _peft_names(plan)
        for job in jobs:
            for item in job.deltas:
                _check_delta(plan, job, item, names)
        if len({item.delta.transposed for job in jobs for item in job.deltas if is_low_rank(item.delta)}) > 1:
            raise IncompatibleError(
                "some of the modules are [in, out] in this base and others [out, in]: one config cannot say both",
                expected="only Conv1D modules, or none of them",
                found="both",
                remedy="compose to safetensors",
            )

    def plan_files(self, plan: Plan) -> dict[str, int]:
        """Bytes of the weights file, which a method on factors may stay below."""
        itemsize = DTYPES[_dtype(plan)].itemsize
        layout, saved = [], 0
        names = _peft_names(plan)
        for job in (job for job in plan.jobs if job.deltas):
            module = names[job.name].removesuffix(".weight")
            if job.deltas[0].delta.replaces:
                layout.append((PREFIX + names[job.name], job.dtype, job.source.shape))
                saved += sum(source.nbytes for source in job.deltas[0].delta.sources)
                continue
            rank = _bound(plan, job)
            for name, shape in zip(FACTOR_NAMES, ((rank, job.matrix[1]), (job.matrix[0], rank)), strict=True):
                layout.append((name.format(module), _dtype(plan), shape))
                saved += itemsize * shape[0] * shape[1]
        return {WEIGHTS: len(encode_header(layout, {"format": "pt"})) + saved}

    def export_plan(
        self, plan: Plan, sink: FolderSink, inputs: Mapping[str, Any], progress: Callable[[str, int, int], None]
    ) -> tuple[dict[str, Any], Survival]:
        """Write the three files, one module in memory at a time.

        inputs: what `compose` was told of the base and the adapters. Returns the facts for composition.json and how
        much of each adapter is left.
        """
        names = _peft_names(plan)
        run = _Run(plan, names, Survival(len(plan.terms)))
        write_tensors(sink, WEIGHTS, run.tensors(progress))
        write_json(sink, CONFIG, _config(plan, names, run.ranks))
        sink.write("README.md", _card(plan, inputs))
        facts: dict[str, Any] = {
            "format": "peft",
            "rank": max(run.ranks.values(), default=0),
            "dtype": _dtype(plan),
            "modules": len(run.ranks),
        }
        if plan.recipe.rank is not None:
            total = sum(total for _, total in run.energy.values())
            lost = sum(lost for lost, _ in run.energy.values())
            facts["discarded_energy"] = share(lost, total)
            facts["discarded_energy_by_module"] = {
                name: share(lost, total) for name, (lost, total) in sorted(run.energy.items())
            }
        return facts, run.survival


@dataclass(slots=True)
class _Run:
    """The tensors of the file, and what is learnt while they are made."""

    plan: Plan
    names: Mapping[str, str]
    survival: Survival
    ranks: dict[str, int] = field(default_factory=dict)
    energy: dict[str, tuple[float, float]] = field(default_factory=dict)

    def tensors(self, progress: Callable[[str, int, int], None]) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor of the file by name, in the order of the base's tensors."""
        jobs = [job for job in self.plan.jobs if job.deltas]
        owners = {self.names[job.name].removesuffix(".weight") for job in jobs if is_low_rank(job.deltas[0].delta)}
        for done, job in enumerate(jobs):
            progress("writing the adapter", done, len(jobs))
            parameter = self.names[job.name]
            delta = job.deltas[0].delta
            if isinstance(delta, Replace):
                yield PREFIX + _wrapped(parameter, owners), delta.tensor.read()
                continue
            module = parameter.removesuffix(".weight")
            left, right = self._factors(job, module)
            self.ranks[module] = len(right)
            a, b = (left.T, right.T) if delta.transposed else (right, left)
            for name, factor in zip(FACTOR_NAMES, (a, b), strict=True):
                yield name.format(module), np.ascontiguousarray(factor)

    def _factors(self, job: TensorJob, module: str) -> Pair:
        """left [rows, r] and right [r, columns] of one module in the output's dtype; their product is what is added."""
        deltas = [item.delta.load() for item in job.deltas]
        _check_copies(job, deltas)
        weights = [item.weight for item in job.deltas]
        method = find_method(self.plan.recipe.method).bind(self.plan.recipe.parameters, job.name)
        if method.method.factors:
            left, right = (side.astype(np.float64) for side in method.pair(deltas, weights))
        else:
            scaling = float(method.values.get("scaling", 1.0))
            left, right = stacked(deltas, [weight * scaling for weight in weights])
        exact = left, right
        if self.plan.recipe.rank is not None:
            left, right, *self.energy[module] = truncate(left, right, rank=_bound(self.plan, job))
        written = tuple(cast_block(side, _dtype(self.plan), job.name) for side in (left, right))
        parts = {
            item.term: (delta.left.astype(np.float64) * float(delta.scale), delta.right.astype(np.float64))
            for item, delta in zip(job.deltas, deltas, strict=True)
        }
        self.survival.add_products(written, exact, parts)
        return written


def is_low_rank(delta: Any) -> bool:
    """Whether it is B·A on a matrix, as lora_A and lora_B of a linear layer say it."""
    return isinstance(delta, LowRank | SingularFactors) and ".lora_A" in delta.a.name and getattr(delta, "plain", True)


def _bound(plan: Plan, job: TensorJob) -> int:
    """The rank that is written; a method on factors may give a lower one."""
    bound = sum(max(1, item.delta.a.shape[0]) for item in job.deltas)
    return bound if plan.recipe.rank is None else min(bound, plan.recipe.rank, *job.matrix)


def _dtype(plan: Plan) -> str:
    """float32 unless the recipe says otherwise: factors are small, and what the base's dtype drops of them is lost."""
    return "F32" if plan.recipe.dtype is Dtype.KEEP else SAFETENSORS_DTYPE[plan.recipe.dtype]


def _check_delta(plan: Plan, job: TensorJob, item: WeightedDelta, names: Mapping[str, str]) -> None:
    delta, term = item.delta, plan.terms[item.term]
    if is_low_rank(delta) and job.name.endswith(".weight") and len(job.source.shape) == 2:
        return
    if isinstance(delta, Replace) and delta.rows is None and _keeps(term.adapter, names[job.name]):
        return
    kind = term.adapter.signature.kind
    raise UnsupportedAdapterError(
        f"{term.label}: its change of {job.name} ({kind}, {type(delta).__name__}) cannot be written as a LoRA",
        expected="low-rank deltas of linear weights, trained biases and modules_to_save",
        found=f"{kind}: {type(delta).__name__}",
        remedy="compose to safetensors, or leave the adapter out",
    )


def _check_copies(job: TensorJob, deltas: Sequence[LoadedLowRank]) -> None:
    """A copy of the base's weight is not written, PEFT reads the base's own; but it must be this base's."""
    width = job.source.nbytes // job.matrix[0]
    for delta in (delta for delta in deltas if delta.copy is not None):
        for start, stop in job.blocks:
            raw = job.source.read_bytes(start * width, stop * width)
            base = np.frombuffer(raw, DTYPES[job.source.dtype]).reshape(stop - start, -1)
            delta.check_base(start, stop, base.astype(np.float32))


def _keeps(adapter: Adapter, parameter: str) -> bool:
    """Whether a LoRA's config accounts for a tensor that it carries whole."""
    module, _, attribute = parameter.rpartition(".")
    saved = adapter.config.get("modules_to_save") or []
    if any(module == name or module.endswith(f".{name}") or f".{name}." in f".{module}." for name in saved):
        return True
    return attribute == "bias" and adapter.config.get("bias", "none") != "none"


def _wrapped(parameter: str, owners: set[str]) -> str:
    """A parameter as PEFT names it: inside a LoRA layer it is the base layer's."""
    module, _, attribute = parameter.rpartition(".")
    return f"{module}.base_layer.{attribute}" if module in owners else parameter


def _peft_names(plan: Plan) -> dict[str, str]:
    """Base tensor name to the name that the trainer's model class has for it, for all that any adapter changes.

    An adapter of a class without the head lacks a prefix that the checkpoint has; one rule must name every target.
    Raises IncompatibleError where none does.
    """
    targets = [job.name for job in plan.jobs if job.deltas]
    counted = {item.term for job in plan.jobs for item in job.deltas}
    for index in sorted(counted):
        binding = plan.terms[index].adapter.bind(places(plan.checkpoint))
        parameter, target = next(iter(binding.names.items()))
        added = target.removesuffix(parameter) if target.endswith(parameter) else ""
        removed = parameter.removesuffix(target) if parameter.endswith(target) else ""
        prefixed = all(removed + stored.removeprefix(added) == module for module, stored in binding.names.items())
        if prefixed and all(name.startswith(added) for name in targets):
            return {
                name: removed + name.removeprefix(added) for name in plan.checkpoint.tensors if name.startswith(added)
            }
    raise IncompatibleError(
        "the adapters were trained through model classes that name modules differently, and no one of them has all",
        expected="adapters of one model class",
        found=[plan.terms[index].label for index in sorted(counted)],
        remedy="compose to safetensors, or leave one of them out",
    )


def _config(plan: Plan, names: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, Any]:
    used = {item.term: plan.terms[item.term].adapter for job in plan.jobs for item in job.deltas}
    carrying = {item.term for job in plan.jobs for item in job.deltas if item.delta.replaces}
    configs = {index: adapter.config for index, adapter in sorted(used.items())}
    saved = {name for index in carrying for name in configs[index].get("modules_to_save") or []}
    tasks = {config.get("task_type") for config in configs.values()}
    transposed = any(getattr(item.delta, "transposed", False) for job in plan.jobs for item in job.deltas)
    return lora_config(
        ranks,
        {name.rpartition(".")[0] for name in names.values()},
        base_model_name_or_path=most_common(config.get("base_model_name_or_path") for config in configs.values()),
        task_type=tasks.pop() if len(tasks) == 1 else None,
        fan_in_fan_out=transposed,
        modules_to_save=sorted(saved) or None,
        bias=next((configs[index]["bias"] for index in sorted(carrying) if configs[index].get("bias")), "none"),
    )


def _card(plan: Plan, inputs: Mapping[str, Any]) -> bytes:
    """The base's fingerprint is claimed only where every input was trained on these very weights."""
    known = inputs.get("adapters") or [{} for _ in plan.terms]
    levels = {(entry.get("verdict") or {}).get("level") for entry in known}
    named = most_common(term.adapter.base_name for term in plan.terms)
    rows = [("adapter", "weight", "digest")]
    rows += [
        (term.label, f"{term.weight:g}", entry.get("digest") or "")
        for term, entry in zip(plan.terms, known, strict=True)
    ]
    rank = f" at rank {plan.recipe.rank}" if plan.recipe.rank else ""
    fields = {
        "base_model": None if named is None or Path(named).is_absolute() else named,
        "base_model_fingerprint": inputs.get("base", {}).get("fingerprint") if levels == {"exact"} else None,
        "tags": ["lora", "merge"],
    }
    text = f"One LoRA that stands for {len(rows) - 1} on the same base, combined by {plan.recipe.method}{rank}."
    return model_card(fields, str(plan.recipe), text, rows)
