"""Recipes into plans and artefacts: names to digests to sources, verdicts, then the composer.

resolve   each reference is a registered name or a folder; both end as an opened checkpoint or adapter,
          with the digests and the verdict that go into composition.json
plan      resolve + make_plan, from headers alone
compose   plan + run, unless the same inputs were composed to the same place before
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError as DatabaseIntegrityError

import registry
from composer.adapters import Adapter, open_adapter
from composer.checkpoint import Checkpoint, open_checkpoint
from composer.companions import companion_files
from composer.errors import IntegrityError, TypedError, WeakCompatibilityError
from composer.exporters import find_exporter, find_plan_exporter, prepare_export
from composer.files import copy_names, read_json, sha256_file
from composer.parts import remove_dead_parts
from composer.places import places
from composer.plan import Plan, Term, make_plan
from composer.probe import check_probe, probe_digest
from composer.provenance import manifest_digest, read_record
from composer.recipe import AdapterTerm, Allow, Recipe, is_path, split_reference
from composer.requantise import requantised_companions, requantised_files
from composer.run import compose
from composer.screening import Measurement, measure, measure_sum
from composer.templates import chat_templates, template_diff
from registry.claims import claim_from_folder, fingerprint_folder, read_card
from registry.compat import BaseClaim, BaseFacts, accepts, assess
from registry.db import session_scope
from registry.errors import LicenceConflictError
from registry.interface import Progress
from registry.licences import assess_licences
from registry.lifecycle import deprecation, require_usable
from registry.models import BaseFileRow, BaseModelRow, CompositionInputRow, CompositionRow, VersionRow
from registry.originals import difference_warning, original_error, original_reference
from registry.preflight import SUMS, plan_advice
from registry.schemas import (
    Advice,
    CompositionInfo,
    Level,
    LicenceLevel,
    LicenceVerdict,
    PlanInfo,
    PlannedAdapter,
    Relation,
    Screening,
    Verdict,
)
from registry.screening import alarms, judge
from registry.services.base_files import same_stat, unchanged_files
from registry.services.catalogue import base_facts, find_base, find_version, version_claim
from registry.services.lifecycle import refuse_quarantined, refuse_tainted
from registry.services.matching import version_verdict
from registry.services.publishing import publishable_files
from registry.services.screening import others, population
from registry.store.chunks import ChunkStore
from registry.store.layout import Layout
from registry.store.local import LocalStore

__all__ = ["Compositions", "Prepared", "Resolved"]

MAX_SUMMED = 16  # adapters whose factors are measured together, in memory
RECORD = "composition.json"
SMALL = 16 << 20  # of a file that is no shard, this much is read


@dataclass(frozen=True, slots=True)
class ResolvedBase:
    """A base at hand: opened, and its facts."""

    checkpoint: Checkpoint
    facts: BaseFacts
    tokenizer: str | None
    chat_template: str | None
    licence: str | None
    quantised_from: str | None = None
    digests: Mapping[str, str] = field(default_factory=dict)  # sha256 of the files, of a registered base

    def verify_heads(self, chunks: ChunkStore) -> None:
        """Read what a plan is made of: headers and small files. Raises BlobCorruptError as `verify` does."""
        heads = {shard.header.path: shard.header for shard in self.checkpoint.shards}
        for name, sha256 in self.digests.items():
            path = self.checkpoint.files[name]
            first = next(iter(heads[path].tensors.values()), None) if path in heads else None
            chunks.reader(path, sha256).read_at(0, first.offset if first else SMALL)

    def verify(self, chunks: ChunkStore) -> None:
        """Read every file of a registered base. Raises BlobCorruptError for one that is not what was registered."""
        for name, sha256 in self.digests.items():
            chunks.verify(self.checkpoint.files[name], sha256)


@dataclass(frozen=True, slots=True)
class ResolvedOriginal:
    """The base that a quantised one was made of, and how far the two differ; see composer.precision."""

    ref: str
    base: ResolvedBase
    error: float


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """An adapter at hand: opened, its digest and its verdict on the base of the recipe."""

    term: AdapterTerm
    label: str
    version: str | None
    digest: str
    adapter: Adapter
    verdict: Verdict
    licence: str | None
    deprecated: str | None = None
    adapter_id: int | None = None
    measured: Measurement | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe with every reference opened."""

    recipe: Recipe
    base: ResolvedBase
    adapters: tuple[ResolvedAdapter, ...]
    original: ResolvedOriginal | None = None

    @property
    def target(self) -> ResolvedBase:
        """What is merged into: the base, or its original."""
        return self.original.base if self.original else self.base

    @property
    def written_like(self) -> ResolvedBase:
        """Whose configs and tokenizer go along: a requantised result is the base with other numbers."""
        return self.base if self.recipe.requantise else self.target

    @property
    def inputs(self) -> dict[str, Any]:
        """What composition.json says of the inputs."""
        return {
            "key": self.key,
            "base": {
                "ref": self.recipe.base,
                "fingerprint": self.base.facts.fingerprint,
                "licence": self.base.licence,
                "tokenizer": self.written_like.tokenizer,
                "chat_template": self.written_like.chat_template,
                **({"original": self._original_facts} if self.original else {}),
            },
            "adapters": [
                {
                    "version": item.version,
                    "digest": item.digest,
                    "licence": item.licence,
                    "verdict": item.verdict.model_dump(mode="json"),
                }
                for item in self.adapters
            ],
            "licences": self.licences.model_dump(mode="json"),
            "warnings": self.warnings,
        }

    @property
    def _original_facts(self) -> dict[str, Any] | None:
        if self.original is None:
            return None
        fingerprint = self.original.base.facts.fingerprint
        return {"ref": self.original.ref, "fingerprint": fingerprint, "difference": round(self.original.error, 6)}

    @property
    def key(self) -> str:
        """What determines the output, as 64 hex digits: inputs by content, the recipe's settings, this version."""
        files = self.written_like.checkpoint.files
        content = {
            "registry": registry.__version__,
            "torch": version("torch"),
            "base": self.base.facts.fingerprint,
            "merged into": self._original_facts,
            "files": {name: sha256_file(files[name]) for name in copy_names(files)},
            "shards": [[shard.name, list(shard.header.tensors)] for shard in self.target.checkpoint.shards],
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
            **self.recipe.model_dump(mode="json", exclude={"base", "adapters", "original"}),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def verifying(self, chunks: ChunkStore) -> Iterator[Callable[[], None]]:
        """Hash the registered bases meanwhile; the function that is given waits for the end.

        It raises BlobCorruptError where a file is not what was registered: a byte that a disk has lost changes no time.
        """
        bases = {id(base): base for base in (self.base, self.target)}
        with ThreadPoolExecutor(1) as pool:
            checks = [pool.submit(base.verify, chunks) for base in bases.values()]
            try:
                yield lambda: [check.result() for check in checks] and None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    @property
    def digests(self) -> set[str]:
        """The fingerprints of the base and of its original, and the digests of the adapters."""
        bases = {self.base.facts.fingerprint, self.target.facts.fingerprint}
        return bases | {item.digest for item in self.adapters}

    @property
    def licences(self) -> LicenceVerdict:
        """Whether the licences of base and adapters go together."""
        parts = [(item.label, item.licence) for item in self.adapters]
        return assess_licences([(self.base.facts.name, self.base.licence), *parts])

    @property
    def advice(self) -> list[str]:
        """What to say beside the result and not in its record, because it may change: deprecations, licences."""
        deprecated = [item.deprecated for item in self.adapters if item.deprecated]
        licences = self.licences
        told = any([self.base.licence, *(item.licence for item in self.adapters)])
        said = licences.reasons if self.adapters and told and licences.level is not LicenceLevel.CLEAR else ()
        return [*deprecated, *(f"licences: {licences.level}: {reason}" for reason in said)]

    @property
    def warnings(self) -> list[str]:
        """One line for each adapter whose verdict is weaker than exact, and one where the original is merged into."""
        lines = [
            f"{item.label}: {item.verdict.level}: {'; '.join(reason.message for reason in item.verdict.reasons)}"
            for item in self.adapters
            if item.verdict.level is not Level.EXACT
        ]
        if self.original:
            lines.append(difference_warning(self.recipe.base, self.original.ref, self.original.error))
        return lines


@dataclass(frozen=True, slots=True)
class Screened:
    """Scores of each adapter and of their sum, and the alarms of all."""

    adapters: tuple[Screening, ...]
    whole: Screening | None
    alarms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A composition that may begin: its plan, the key of its inputs, and the versions that its adapters mean now."""

    plan: PlanInfo
    key: str
    pins: tuple[str | None, ...]


class Compositions:
    """Plans and composes."""

    def __init__(self, engine: Engine, store: LocalStore, layout: Layout) -> None:
        self._engine = engine
        self._store = store
        self._layout = layout

    def plan(self, recipe: Recipe) -> PlanInfo:
        """What compose would do. Raises what compose would, except for a verdict that is too weak: it is reported."""
        return self._describe(self.resolve(recipe))

    def prepare(self, recipe: Recipe, accept_licences: bool = False, text: str | None = None) -> Prepared:
        """The plan of a composition that is to run later. Raises what compose would."""
        resolved = self.resolve(recipe)
        for item in resolved.adapters:
            _require(recipe.allow, item, recipe.base)
        _require_licences(resolved, accept_licences)
        if text is not None:
            check_probe(self._plan(resolved))
        key = _probed(resolved.key, text)
        return Prepared(self._describe(resolved), key, tuple(item.version for item in resolved.adapters))

    def _describe(self, resolved: Resolved) -> PlanInfo:
        recipe, asked = resolved.recipe, self._plan(resolved)
        plan = prepare_export(asked)
        in_place = find_plan_exporter(recipe.export)
        changes = [item.term for job in plan.jobs for item in job.deltas]
        changes += [item.term for adapter in plan.apart for _, item in adapter.deltas]
        per_term = Counter(changes)
        added: dict[str, int] = {}
        if recipe.requantise:
            files, along = requantised_files(plan), requantised_companions(plan)
        elif in_place:
            files, along = in_place.plan_files(plan), iter(())
        else:
            added = find_exporter(recipe.export).plan_files(plan)
            files, along = {shard.name: shard.nbytes for shard in plan.shards}, companion_files(plan)
        files = {**files, **added}
        screened = self._screen(resolved, asked)
        companions = {name: len(data) for name, data in along}
        base_templates = chat_templates(resolved.base.checkpoint.files)
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
                    tensors=per_term[index],
                    screening=screened.adapters[index],
                    chat_template_diff=template_diff(base_templates, chat_templates(item.adapter.files)),
                )
                for index, item in enumerate(resolved.adapters)
            ),
            accepted=all(accepts(recipe.allow, item.verdict.level) for item in resolved.adapters),
            licences=resolved.licences,
            warnings=(*resolved.warnings, *plan.warnings, *resolved.advice, *screened.alarms),
            screening=screened.whole,
            advice=tuple(plan_advice(asked)),
            additions=tuple(f"{plan.terms[item.term].label}: {item.addition.summary}" for item in plan.additions),
            touched=plan.touched,
            total=len(plan.jobs),
            nbytes=sum(files.values()),
            peak_bytes=plan.peak_bytes,
            files={**files, **companions},
        )

    def compose(
        self,
        recipe: Recipe,
        out: Path,
        replace: bool,
        progress: Progress | None,
        pins: tuple[str | None, ...] | None = None,
        accept_licences: bool = False,
        text: str | None = None,
    ) -> CompositionInfo:
        """Compose into `out`, or say that the very same result lies there, probed with the same text."""
        out = out.expanduser().resolve()
        resolved = self.resolve(recipe, progress, pins)
        plan = self._plan(resolved)
        for item in resolved.adapters:
            _require(recipe.allow, item, recipe.base)
        _require_licences(resolved, accept_licences)
        screened = self._screen(resolved, plan)
        beside = [*resolved.advice, *screened.alarms]
        key = _probed(resolved.key, text)
        if (earlier := _earlier(out, key)) is not None:
            _require_whole(out, earlier)
            # A process that was killed may have got no further than the files.
            remove_dead_parts(out)
            self._record(resolved, key, earlier)
            return _info(recipe, out, earlier, beside, screened.whole, cached=True, seconds={})
        advice = [item.model_dump(mode="json") for item in plan_advice(plan)]
        inputs = {**resolved.inputs, "key": key, "advice": advice}
        with resolved.verifying(self._store.chunks) as confirm:
            outcome = compose(
                plan, out, inputs=inputs, cache_dir=self._layout.graphs, progress=progress, replace=replace, text=text,
                confirm=confirm,
            )  # fmt: skip
        self._record(resolved, key, outcome.record)
        return _info(recipe, out, outcome.record, beside, screened.whole, cached=False, seconds=outcome.seconds)

    def _screen(self, resolved: Resolved, plan: Plan) -> Screened:
        """Scores of each adapter, against the others of this base, and of their sum where it is one."""
        with session_scope(self._engine) as session:
            known = population(session, resolved.base.facts.fingerprint)
        each = tuple(
            judge(item.measured or measure(item.adapter), others(known, item.adapter_id)) for item in resolved.adapters
        )
        apart = prepare_export(plan).apart  # in a graph that takes one of them at a time
        summed = 1 < len(each) <= MAX_SUMMED and resolved.recipe.method in SUMS and not apart
        whole = judge(measure_sum(plan)) if summed else None
        pairs = [*zip((item.label for item in resolved.adapters), each, strict=True), ("the composition", whole)]
        return Screened(each, whole, tuple(line for label, found in pairs for line in alarms(label, found)))

    def check(self, adapter: str, base: str) -> Verdict:
        """The verdict for one pair of references."""
        ref, version = split_reference(adapter)
        resolved = self._adapter(AdapterTerm(ref=ref, version=version), self.open_base(base, None), None)
        return resolved.verdict

    def resolve(
        self, recipe: Recipe, progress: Progress | None = None, pins: tuple[str | None, ...] | None = None
    ) -> Resolved:
        """Open every reference of a recipe; a pin takes the place of what a term's version means by now.

        Verdicts are on the recipe's base, also where its original is merged into.
        """
        base = self.open_base(recipe.base, progress)
        adapters = tuple(
            self._adapter(term, base, progress, pin)
            for term, pin in zip(recipe.adapters, pins or [None] * len(recipe.adapters), strict=True)
        )
        return Resolved(recipe, base, adapters, self._original(recipe, base, progress))

    def _original(self, recipe: Recipe, base: ResolvedBase, progress: Progress | None) -> ResolvedOriginal | None:
        ref = original_reference(recipe, base.quantised_from)
        if ref is None:
            return None
        original = self.open_base(ref, progress)
        error = original_error(recipe.base, base.checkpoint, ref, original.checkpoint)
        return ResolvedOriginal(ref, original, error)

    def open_base(self, ref: str, progress: Progress | None) -> ResolvedBase:
        """A registered base, whose files must be what was fingerprinted, or a folder, which is fingerprinted now."""
        with session_scope(self._engine) as session:
            if is_path(ref):
                row = self._registered_folder(session, Path(ref).expanduser().resolve())
            else:
                row = find_base(session, ref)
            if row is not None:
                refuse_tainted(session, row)
                facts = base_facts(session, row)
                files = session.scalars(select(BaseFileRow).where(BaseFileRow.base_id == row.id)).all()
                checkpoint = open_checkpoint(unchanged_files(row, files))
                parent = row.parent.name if row.parent and row.relation == Relation.QUANTIZED else None
                base = ResolvedBase(
                    checkpoint, facts, row.tokenizer_digest, row.chat_template_digest, row.license, parent,
                    {file.name: file.sha256 for file in files},
                )  # fmt: skip
                base.verify_heads(self._store.chunks)
                return base
        folder = Path(ref).expanduser().resolve()
        checkpoint = open_checkpoint(folder)
        found = fingerprint_folder(folder, progress)
        facts = BaseFacts(str(folder), found.identity, found.value_root, found.config, places(checkpoint))
        licence = read_card(checkpoint.files.get("README.md")).license
        return ResolvedBase(checkpoint, facts, found.tokenizer, found.chat_template, licence)

    @staticmethod
    def _registered_folder(session: Any, folder: Path) -> BaseModelRow | None:
        """The base registered from `folder`, if its files are still the same."""
        row = session.scalar(select(BaseModelRow).where(BaseModelRow.location == str(folder)))
        if row is None:
            return None
        files = session.scalars(select(BaseFileRow).where(BaseFileRow.base_id == row.id)).all()
        return row if all(same_stat(folder / file.name, file) for file in files) else None

    def _adapter(
        self, term: AdapterTerm, base: ResolvedBase, progress: Progress | None, pin: str | None = None
    ) -> ResolvedAdapter:
        if is_path(term.ref):
            folder = Path(term.ref).expanduser().resolve()
            adapter = open_adapter(folder)
            files = publishable_files(adapter)
            digest = manifest_digest({name: {"sha256": sha256_file(path)} for name, path in files.items()})
            with session_scope(self._engine) as session:
                refuse_quarantined(session, digest, term.ref)
            card = read_card(adapter.files.get("README.md"))
            claim = self._published_claim(digest) or claim_from_folder(
                adapter, card, read_paths=True, progress=progress
            )
            verdict = assess(adapter.signature.targets, claim, base.facts)
            return ResolvedAdapter(term, term.ref, None, digest, adapter, verdict, card.license)
        with session_scope(self._engine) as session:
            row = find_version(session, term.ref, pin or term.version)
            label = f"{row.adapter.full_name}@{row.version}"
            require_usable(row, label, pin if pin and pin.startswith("sha256:") else term.version)
            files = {file.name: self._store.path(file.sha256, verify=True) for file in row.files}
            verdict = version_verdict(session, row, base.facts)
        return ResolvedAdapter(
            term, label, row.version, row.digest, open_adapter(files), verdict, row.license, deprecation(row, label),
            row.adapter_id, Measurement.from_json(row.screening) if row.screening else None,
        )  # fmt: skip

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
        return make_plan(resolved.recipe, resolved.target.checkpoint, terms, resolved.base.checkpoint)

    def _record(self, resolved: Resolved, key: str, record: dict[str, Any]) -> None:
        known = select(CompositionRow.id).where(CompositionRow.key == key)
        with session_scope(self._engine) as session:
            if session.scalar(known) is not None:
                return
        row = CompositionRow(
            key=key,
            recipe=resolved.recipe.model_dump(mode="json"),
            inputs=resolved.inputs,
            output_digest=record["output_digest"],
            parts=[CompositionInputRow(digest=digest) for digest in sorted(resolved.digests)],
        )
        with suppress(DatabaseIntegrityError), session_scope(self._engine, writes=True) as session:
            session.add(row)  # where somebody else composed the same just now, it is there


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


def _require_licences(resolved: Resolved, accepted: bool) -> None:
    verdict = resolved.licences
    if verdict.level is LicenceLevel.CONFLICT and resolved.adapters and not accepted:
        raise LicenceConflictError(
            f"the licences do not go together: {'; '.join(verdict.reasons)}",
            expected="licences that can all be kept",
            found=verdict.level.value,
            remedy="ask who publishes them for other terms, or go on with --accept-licences",
            verdict=verdict.model_dump(mode="json"),
        )


def _probed(key: str, text: str | None) -> str:
    """The key of a composition that is measured on a text."""
    return key if text is None else hashlib.sha256(f"{key} {probe_digest(text)}".encode()).hexdigest()


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


def _require_whole(out: Path, record: dict[str, Any]) -> None:
    """Raise IntegrityError where a file of the result that lies there already is not what was written."""
    read_record(out / RECORD)
    changed = sorted(name for name, entry in record["outputs"].items() if sha256_file(out / name) != entry["sha256"])
    if changed:
        raise IntegrityError(
            f"{out} holds this very composition, but {', '.join(changed)} changed since",
            expected="the bytes that were written",
            found=changed,
            remedy="remove the folder, and compose it again",
            path=out,
        )


def _info(
    recipe: Recipe, out: Path, record: dict[str, Any], beside: list[str], screening: Screening | None, *, cached: bool,
    seconds: dict[str, float],
) -> CompositionInfo:  # fmt: skip
    return CompositionInfo(
        recipe_text=str(recipe),
        export=recipe.export.value,
        out=str(out),
        output_digest=record["output_digest"],
        nbytes=sum(entry["size"] for entry in record["outputs"].values()),
        cached=cached,
        warnings=(*record["warnings"], *beside),
        screening=screening,
        advice=tuple(Advice(**entry) for entry in record.get("advice", ())),
        record=record,
        seconds=seconds,
    )
