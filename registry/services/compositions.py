"""Recipes into plans and artefacts: names to digests to sources, verdicts, then the composer.

resolve   each reference is a registered name or a folder; both end as an opened checkpoint or adapter,
          with the digests and the verdict that go into composition.json
plan      resolve + make_plan, from headers alone
compose   plan + run, unless the same inputs were composed to the same place before
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select

import registry
from composer.adapters import Adapter, open_adapter
from composer.checkpoint import Checkpoint, open_checkpoint
from composer.companions import companion_files
from composer.errors import TypedError, WeakCompatibilityError
from composer.exporters import find_exporter, find_plan_exporter, prepare_export
from composer.files import copy_names, read_json, sha256_file
from composer.places import places
from composer.plan import Plan, Term, make_plan
from composer.probe import probe_digest
from composer.provenance import manifest_digest
from composer.recipe import AdapterTerm, Allow, Recipe, is_path, split_reference
from composer.run import compose
from registry.claims import claim_from_folder, fingerprint_folder, read_card
from registry.compat import BaseClaim, BaseFacts, accepts, assess
from registry.db import session_scope
from registry.errors import BaseChangedError
from registry.interface import Progress
from registry.models import BaseFileRow, BaseModelRow, CompositionRow, VersionRow
from registry.preflight import plan_advice
from registry.schemas import Advice, CompositionInfo, Level, PlanInfo, PlannedAdapter, Verdict
from registry.services.catalogue import base_facts, find_base, find_version, version_claim, version_verdict
from registry.services.publishing import publishable_files
from registry.store.layout import Layout
from registry.store.local import LocalStore

__all__ = ["Compositions", "Resolved"]


@dataclass(frozen=True, slots=True)
class ResolvedBase:
    """A base at hand: opened, and its facts."""

    checkpoint: Checkpoint
    facts: BaseFacts
    tokenizer: str | None
    chat_template: str | None


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """An adapter at hand: opened, its digest and its verdict on the base of the recipe."""

    term: AdapterTerm
    label: str
    version: str | None
    digest: str
    adapter: Adapter
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe with every reference opened."""

    recipe: Recipe
    base: ResolvedBase
    adapters: tuple[ResolvedAdapter, ...]

    @property
    def inputs(self) -> dict[str, Any]:
        """What composition.json says of the inputs."""
        return {
            "key": self.key,
            "base": {
                "ref": self.recipe.base,
                "fingerprint": self.base.facts.fingerprint,
                "tokenizer": self.base.tokenizer,
                "chat_template": self.base.chat_template,
            },
            "adapters": [
                {
                    "version": item.version,
                    "digest": item.digest,
                    "verdict": item.verdict.model_dump(mode="json"),
                }
                for item in self.adapters
            ],
            "warnings": self.warnings,
        }

    @property
    def key(self) -> str:
        """What determines the output, as 64 hex digits: inputs by content, the recipe's settings, this version."""
        files = self.base.checkpoint.files
        content = {
            "registry": registry.__version__,
            "torch": version("torch"),
            "base": self.base.facts.fingerprint,
            "files": {name: sha256_file(files[name]) for name in copy_names(files)},
            "shards": [[shard.name, list(shard.header.tensors)] for shard in self.base.checkpoint.shards],
            "adapters": [
                [
                    item.digest,
                    item.term.weight,
                    [[each.pattern, each.weight] for each in item.term.modules],
                    *([item.term.task] if item.term.task is not None else []),
                ]
                for item in self.adapters
            ],
            "labels": [self.recipe.base, *(item.label for item in self.adapters)],
            "verdicts": [item.verdict.level for item in self.adapters],
            **self.recipe.model_dump(mode="json", exclude={"base", "adapters"}),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def warnings(self) -> list[str]:
        """One line for each adapter whose verdict is weaker than exact."""
        return [
            f"{item.label}: {item.verdict.level}: {'; '.join(reason.message for reason in item.verdict.reasons)}"
            for item in self.adapters
            if item.verdict.level is not Level.EXACT
        ]


class Compositions:
    """Plans and composes."""

    def __init__(self, engine: Engine, store: LocalStore, layout: Layout) -> None:
        self._engine = engine
        self._store = store
        self._layout = layout

    def plan(self, recipe: Recipe) -> PlanInfo:
        """What compose would do. Raises what compose would, except for a verdict that is too weak: it is reported."""
        resolved = self.resolve(recipe)
        plan = prepare_export(self._plan(resolved))
        in_place = find_plan_exporter(recipe.export)
        per_term = [
            sum(item.term == index for job in plan.jobs for item in job.deltas) for index in range(len(plan.terms))
        ]
        if in_place:
            files, companions = in_place.plan_files(plan), {}
        else:
            added = find_exporter(recipe.export).plan_files(plan)
            files = {**{shard.name: shard.nbytes for shard in plan.shards}, **added}
            companions = {name: len(data) for name, data in companion_files(plan)}
        return PlanInfo(
            recipe=recipe,
            recipe_text=str(recipe),
            base=recipe.base,
            base_fingerprint=resolved.base.facts.fingerprint,
            adapters=tuple(
                PlannedAdapter(
                    ref=item.label,
                    version=item.version,
                    digest=item.digest,
                    weight=item.term.weight,
                    verdict=item.verdict,
                    tensors=count,
                )
                for item, count in zip(resolved.adapters, per_term, strict=True)
            ),
            accepted=all(accepts(recipe.allow, item.verdict.level) for item in resolved.adapters),
            warnings=(*resolved.warnings, *plan.warnings),
            advice=tuple(plan_advice(plan)),
            additions=tuple(f"{plan.terms[item.term].label}: {item.addition.summary}" for item in plan.additions),
            touched=plan.touched,
            total=len(plan.jobs),
            nbytes=sum(files.values()),
            peak_bytes=plan.peak_bytes,
            files={**files, **companions},
        )

    def compose(
        self, recipe: Recipe, out: Path, replace: bool, progress: Progress | None, text: str | None = None
    ) -> CompositionInfo:
        """Compose into `out`, or say that the very same result lies there, probed with the same text."""
        out = out.expanduser().resolve()
        resolved = self.resolve(recipe, progress)
        plan = self._plan(resolved)
        for item in resolved.adapters:
            _require(recipe.allow, item, recipe.base)
        key = resolved.key
        if text is not None:
            key = hashlib.sha256(f"{key} {probe_digest(text)}".encode()).hexdigest()
        if (earlier := _earlier(out, key)) is not None:
            return _info(recipe, out, earlier, cached=True, seconds={})
        advice = [item.model_dump(mode="json") for item in plan_advice(plan)]
        inputs = {**resolved.inputs, "key": key, "advice": advice}
        outcome = compose(
            plan, out, inputs=inputs, cache_dir=self._layout.graphs, progress=progress, replace=replace, text=text
        )
        self._record(resolved, key, outcome.record)
        return _info(recipe, out, outcome.record, cached=False, seconds=outcome.seconds)

    def check(self, adapter: str, base: str) -> Verdict:
        """The verdict for one pair of references."""
        ref, version = split_reference(adapter)
        resolved = self._adapter(AdapterTerm(ref=ref, version=version), self.open_base(base, None), None)
        return resolved.verdict

    def resolve(self, recipe: Recipe, progress: Progress | None = None) -> Resolved:
        """Open every reference of a recipe."""
        base = self.open_base(recipe.base, progress)
        return Resolved(recipe, base, tuple(self._adapter(term, base, progress) for term in recipe.adapters))

    def open_base(self, ref: str, progress: Progress | None) -> ResolvedBase:
        """A registered base, whose files must be what was fingerprinted, or a folder, which is fingerprinted now."""
        with session_scope(self._engine) as session:
            if is_path(ref, base=True):
                row = self._registered_folder(session, Path(ref).expanduser().resolve())
            else:
                row = find_base(session, ref)
            if row is not None:
                facts = base_facts(session, row)
                checkpoint = open_checkpoint(_unchanged(row, session.scalars(
                    select(BaseFileRow).where(BaseFileRow.base_id == row.id)).all()))  # fmt: skip
                return ResolvedBase(checkpoint, facts, row.tokenizer_digest, row.chat_template_digest)
        folder = Path(ref).expanduser().resolve()
        checkpoint = open_checkpoint(folder)
        found = fingerprint_folder(folder, progress)
        facts = BaseFacts(str(folder), found.identity, found.value_root, found.config, places(checkpoint))
        return ResolvedBase(checkpoint, facts, found.tokenizer, found.chat_template)

    @staticmethod
    def _registered_folder(session: Any, folder: Path) -> BaseModelRow | None:
        """The base registered from `folder`, if its files are still the same."""
        row = session.scalar(select(BaseModelRow).where(BaseModelRow.location == str(folder)))
        if row is None:
            return None
        files = session.scalars(select(BaseFileRow).where(BaseFileRow.base_id == row.id)).all()
        return row if all(_same_stat(folder / file.name, file) for file in files) else None

    def _adapter(self, term: AdapterTerm, base: ResolvedBase, progress: Progress | None) -> ResolvedAdapter:
        if is_path(term.ref):
            folder = Path(term.ref).expanduser().resolve()
            adapter = open_adapter(folder)
            files = publishable_files(adapter)
            digest = manifest_digest({name: {"sha256": sha256_file(path)} for name, path in files.items()})
            claim = self._published_claim(digest) or claim_from_folder(
                adapter, read_card(adapter.files.get("README.md")), read_paths=True, progress=progress
            )
            verdict = assess(adapter.signature.targets, claim, base.facts)
            return ResolvedAdapter(term, term.ref, None, digest, adapter, verdict)
        with session_scope(self._engine) as session:
            row = find_version(session, term.ref, term.version)
            files = {file.name: self._store.path(file.sha256, verify=True) for file in row.files}
            verdict = version_verdict(session, row, base.facts)
            label = f"{row.adapter.full_name}@{row.version}"
        return ResolvedAdapter(term, label, row.version, row.digest, open_adapter(files), verdict)

    def _published_claim(self, digest: str) -> BaseClaim | None:
        """What the catalogue knows of a folder's base, where these very bytes were published with one."""
        with session_scope(self._engine) as session:
            known = select(VersionRow).where(VersionRow.digest == digest, VersionRow.base_fingerprint.is_not(None))
            row = session.scalar(known.order_by(VersionRow.created_at.desc()).limit(1))
            return version_claim(session, row) if row else None

    @staticmethod
    def _plan(resolved: Resolved) -> Plan:
        terms = [
            Term(item.label, item.adapter, item.term.weight, item.term.modules, item.term.task)
            for item in resolved.adapters
        ]
        return make_plan(resolved.recipe, resolved.base.checkpoint, terms)

    def _record(self, resolved: Resolved, key: str, record: dict[str, Any]) -> None:
        with session_scope(self._engine, writes=True) as session:
            if session.scalar(select(CompositionRow).where(CompositionRow.key == key)) is None:
                session.add(
                    CompositionRow(
                        key=key,
                        recipe=resolved.recipe.model_dump(mode="json"),
                        inputs=resolved.inputs,
                        output_digest=record["output_digest"],
                    )
                )


def _require(allow: Allow, item: ResolvedAdapter, base: str) -> None:
    if accepts(allow, item.verdict.level):
        return
    flag = None if item.verdict.level is Level.INCOMPATIBLE else f"--allow {item.verdict.level}"
    reasons = "; ".join(reason.message for reason in item.verdict.reasons)
    remedies = [reason.remedy for reason in item.verdict.reasons if reason.remedy]
    raise WeakCompatibilityError(
        f"{item.label} does not belong on {base}: {item.verdict.level}: {reasons}",
        expected=f"{allow.value} or better",
        found=item.verdict.level.value,
        remedy="; ".join([*remedies, *([f"or give {flag}"] if flag and flag not in " ".join(remedies) else [])]),
        verdict=item.verdict.model_dump(mode="json"),
    )


def _same_stat(path: Path, file: BaseFileRow) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (file.size, file.mtime_ns)


def _unchanged(row: BaseModelRow, files: Any) -> dict[str, Path]:
    """The files of a registered base. One whose time moved is hashed again; one that differs is refused."""
    folder = Path(row.location)
    paths = {file.name: folder / file.name for file in files}
    for file in files:
        path = paths[file.name]
        if _same_stat(path, file):
            continue
        found = "a missing file" if not path.is_file() else sha256_file(path)
        if found != file.sha256:
            raise BaseChangedError(
                f"{file.name} of the base {row.name!r} is no longer what was registered",
                expected=f"sha256 {file.sha256}",
                found=found,
                remedy=f"restore {path}, or register the new weights under another name",
                path=path,
            )
    return paths


def _earlier(out: Path, key: str) -> dict[str, Any] | None:
    """The record at `out` when it is this very composition and complete."""
    path = out / "composition.json"
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        same = record.get("key") == key and all(
            (out / name).stat().st_size == entry["size"] for name, entry in record["outputs"].items()
        )
    except (TypedError, OSError, KeyError, TypeError):
        return None
    return record if same else None


def _info(
    recipe: Recipe, out: Path, record: dict[str, Any], *, cached: bool, seconds: dict[str, float]
) -> CompositionInfo:
    return CompositionInfo(
        recipe_text=str(recipe),
        export=recipe.export.value,
        out=str(out),
        output_digest=record["output_digest"],
        nbytes=sum(entry["size"] for entry in record["outputs"].values()),
        cached=cached,
        warnings=tuple(record["warnings"]),
        advice=tuple(Advice(**entry) for entry in record.get("advice", ())),
        record=record,
        seconds=seconds,
    )
