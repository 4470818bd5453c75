"""composition.json: what went in, what came out, and what was promised.

No times and no machine names: the same recipe over the same inputs gives the same record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from composer.errors import CorruptFileError
from composer.files import read_json, sha256_file
from composer.kernels import Survival
from composer.plan import Plan

__all__ = [
    "changed_outputs",
    "composition_record",
    "installed_version",
    "manifest_digest",
    "read_record",
    "record_file",
    "sealed",
]

SCHEMA = "composition/1"
LOW_SURVIVAL = 0.5
SEAL = "record_digest"


def manifest_digest(files: Mapping[str, Mapping[str, int | str]]) -> str:
    """One digest for many files: sha256 over the sorted lines ``<sha256>  <name>``, with the prefix ``sha256:``."""
    lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in sorted(files.items()))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its own digest as the last field: it lists all files of a composition but itself."""
    plain = {name: value for name, value in record.items() if name != SEAL}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return {**plain, SEAL: f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"}


def record_file(record: Mapping[str, Any]) -> bytes:
    """composition.json, byte for byte."""
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def read_record(path: Path) -> dict[str, Any]:
    """composition.json as it was written. Raises NotFoundError, or CorruptFileError where a byte of it is another."""
    record = read_json(path)
    wanted = sealed(record)
    if record.get(SEAL) != wanted[SEAL] or path.read_bytes() != record_file(wanted):
        raise CorruptFileError(
            f"{path} is not the record that was written",
            expected=wanted[SEAL],
            found=record.get(SEAL),
            remedy="restore it, or compose again",
            path=path,
        )
    return record


def changed_outputs(folder: Path) -> list[str]:
    """The files of a composed folder that are not as they were written, and composition.json if it is another."""
    path = folder / "composition.json"
    outputs = read_json(path).get("outputs", {})
    changed = sorted(
        name
        for name, entry in outputs.items()
        if not (folder / name).is_file() or sha256_file(folder / name) != entry["sha256"]
    )
    try:
        read_record(path)
    except CorruptFileError:
        changed.append(path.name)
    return changed


def composition_record(
    plan: Plan,
    files: dict[str, dict[str, int | str]],
    survival: Survival,
    inputs: dict[str, Any],
    exported: dict[str, Any],
) -> dict[str, Any]:
    """The record as JSON-ready fields.

    inputs: what the caller knows: `base`, a list `adapters` with one entry a term, `key`, `licences`, `warnings` and
    `advice`.
    """
    adapters = []
    warnings: list[str] = [*inputs.get("warnings", ()), *plan.warnings]
    known = inputs.get("adapters") or [{} for _ in plan.terms]
    replacing = {item.term for job in plan.jobs for item in job.deltas if item.delta.replaces}
    norms = [entry["norm"] for entry in exported["adapters"]] if plan.apart else survival.norms()
    measured = zip(plan.terms, survival.shares(), norms, known, strict=True)
    for index, (term, share, norm, entry) in enumerate(measured):
        adapters.append(
            {"ref": term.label, "weight": term.weight, **entry, "delta_norm": float(f"{norm:.6g}"), "survival": share}
        )
        if term.weight and norm == 0 and index not in replacing and not term.adapter.adds:
            warnings.append(f"{term.label} changes nothing: its delta is zero")
        elif share is not None and share < LOW_SURVIVAL:
            remedy = "rounding: compose with --dtype fp16 or fp32" if plan.recipe.rank is None else "at this --rank"
            remedy = "the quantisation of the result" if plan.recipe.requantise else remedy
            warnings.append(f"only {share:.0%} of {term.label} survives {remedy}")
    record = {
        "schema": SCHEMA,
        "tool": {name: installed_version(name) for name in ("adapter-registry", "torch", "safetensors")},
        **({"key": inputs["key"]} if "key" in inputs else {}),
        "recipe": plan.recipe.model_dump(mode="json"),
        "recipe_text": str(plan.recipe),
        "base": inputs.get("base", {}),
        "adapters": adapters,
        **({"additions": _additions(plan)} if plan.additions else {}),
        "tensors": {"touched": plan.touched, "total": len(plan.jobs)},
        **({"config": plan.config_changes} if plan.config_changes else {}),
        **({"licences": inputs["licences"]} if inputs.get("licences") else {}),
        "warnings": warnings,
        **({"advice": inputs["advice"]} if inputs.get("advice") else {}),
        "export": exported,
        "outputs": dict(sorted(files.items())),
        "output_digest": manifest_digest(files),
    }
    return json.loads(json.dumps(record))


def _additions(plan: Plan) -> list[dict[str, Any]]:
    """What is added to the model, in order."""
    return [
        {
            "ref": plan.terms[item.term].label,
            "kind": plan.terms[item.term].adapter.signature.kind,
            "family": item.addition.family,
            "adds": item.addition.summary,
        }
        for item in plan.additions
    ]


def installed_version(name: str) -> str:
    """The version of an installed distribution, `unknown` where it runs from a source tree."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
