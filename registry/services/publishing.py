"""Folders into blobs and rows: bases by reference, adapters by copy.

    publish   validate -> claim -> check against the base -> blobs -> one transaction
    add_base  open -> fingerprint -> one transaction

Blobs come first and are harmless alone; the row makes a version visible.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError as DatabaseIntegrityError
from sqlalchemy.orm import Session

from composer.adapters import Adapter, Target, open_adapter
from composer.admission import admit, left_out, split_unsafe
from composer.checkpoint import Checkpoint, open_checkpoint
from composer.errors import IncompatibleError, NonFiniteError, UsageError
from composer.files import FileSet
from composer.finite import count_nonfinite
from composer.provenance import manifest_digest
from composer.screening import Measurement, measure
from composer.templates import chat_templates, template_diff
from composer.tensors import DTYPES, TensorSpec
from registry.access import Role, Scope
from registry.claims import FINGERPRINT, Card, claim_from_folder, claim_of, fingerprint_folder, read_card
from registry.compat import BaseClaim, assess
from registry.db import session_scope
from registry.errors import BaseNotFoundError, CollectedError, NameTakenError, VersionTakenError
from registry.fingerprint import Fingerprint, fingerprint_checkpoint, logical_leaves
from registry.interface import Progress
from registry.models import (
    AdapterRow,
    BaseFileRow,
    BaseModelRow,
    BaseTensorRow,
    RepositoryRow,
    SignatureRow,
    SignatureTargetRow,
    TombstoneRow,
    VersionFileRow,
    VersionRow,
    VersionTagRow,
)
from registry.names import Version, adapter_name, base_name, slug
from registry.preflight import adapter_advice
from registry.schemas import BaseCheck, BaseInfo, Level, PublishResult, Relation
from registry.screening import alarms
from registry.services.audit import acting, record
from registry.services.blobs import require_blobs
from registry.services.catalogue import LATEST, base_facts, base_info, find_base, refresh_latest, version_info
from registry.services.lifecycle import refuse_quarantined
from registry.services.lineage import set_parent
from registry.services.name_checks import name_warnings
from registry.services.namespaces import require_role
from registry.services.screening import screen_version
from registry.store.local import LocalStore
from registry.words import index_text

__all__ = ["Publishing", "publishable_files"]

FIRST_VERSION = "0.1.0"
SHOWN = 5
ATTEMPTS = 5
EXTRA_FILES = re.compile(
    r"README\.md|LICENSE(\.txt|\.md)?|.*\.jinja|.*\.model|tokenizer.*\.json|vocab\.(json|txt)|merges\.txt"
    r"|special_tokens_map\.json|added_tokens\.json"
)


def publishable_files(adapter: Adapter) -> dict[str, Path]:
    """The files that make a version: config, weights, card, licence, tokenizer; nothing else of the folder."""
    return {
        name: path
        for name, path in adapter.files.items()
        if name in adapter.stored or ("/" not in name and EXTRA_FILES.fullmatch(name))
    }


class Publishing:
    """Writes to the catalogue and the store."""

    def __init__(self, engine: Engine, store: LocalStore) -> None:
        self._engine = engine
        self._store = store

    def add_base(
        self,
        folder: Path,
        name: str | None,
        parent: str | None,
        relation: Relation | None,
        license: str | None,
        progress: Progress | None,
        *,
        made_of: Sequence[str] | None = None,
    ) -> BaseInfo:
        """Fingerprint a checkpoint and register it where it lies. `made_of`: digests of adapters merged into it.

        The same weights again are a no-op, or move the base to `folder` where its old files are gone.

        Raises NameTakenError when the name holds other weights, or the weights have another name.
        """
        if (parent is None) != (relation is None):
            raise UsageError(
                "a parent needs a relation and a relation a parent",
                expected="--parent NAME --relation finetune|quantized|merged|resized",
                found={"parent": parent, "relation": relation},
                remedy="give both or neither",
            )
        folder = folder.expanduser().resolve()
        name = base_name(name or slug(folder))
        with session_scope(self._engine) as session:
            acting(session).require_everywhere(Scope.PUBLISH)
            if parent:
                find_base(session, parent)
        checkpoint = open_checkpoint(folder)
        fingerprint = fingerprint_checkpoint(
            checkpoint, (lambda done, total: progress("fingerprinting", done, total)) if progress else None
        )
        return self._register(folder, name, checkpoint, fingerprint, parent, relation, license, made_of=made_of)

    def _register(
        self,
        folder: Path,
        name: str,
        checkpoint: Checkpoint,
        fingerprint: Fingerprint,
        parent: str | None,
        relation: Relation | None,
        license: str | None,
        *,
        moves: bool = False,
        made_of: Sequence[str] | None = None,
    ) -> BaseInfo:
        """One transaction. moves: whether a base that is registered already moves to `folder`, wherever it lies."""
        kept, unsafe = split_unsafe(checkpoint.files)
        paths = {file: checkpoint.files[file] for file in kept}
        admit(paths)
        warnings = tuple(left_out(unsafe))
        warnings += tuple(_nonfinite_of(checkpoint.stored.values(), "NaN or infinite values in the weights"))
        files = [(file, path, self._store.chunks.measure(path)[0]) for file, path in paths.items()]
        with session_scope(self._engine, writes=True) as session:
            same = session.scalar(select(BaseModelRow).where(BaseModelRow.fingerprint == fingerprint.identity))
            held = session.scalar(select(BaseModelRow).where(BaseModelRow.name == name))
            _check_no_adapter(session, name)
            for row, found in ((held, held and held.fingerprint), (same, same and same.name)):
                if row is not None and (row.name, row.fingerprint) != (name, fingerprint.identity):
                    raise NameTakenError(
                        f"the name {name!r} holds other weights"
                        if row is held
                        else f"these weights are registered as {found!r}",
                        expected=fingerprint.identity if row is held else f"the name {found}",
                        found=found,
                        remedy="choose another --name" if row is held else f"use {found!r}; a base has one name",
                    )
            stays = (
                parent is None and license is None and same is not None and Path(same.location) != folder and not moves
            )
            if same is not None and stays and _lies_there(same):
                return base_info(same, len(same.tensors)).model_copy(update={"warnings": warnings})
            row = same or BaseModelRow(name=name, fingerprint=fingerprint.identity)
            _fill_base(row, folder, checkpoint, fingerprint)
            row.made_of = list(made_of) if made_of is not None else row.made_of
            row.license = license or read_card(checkpoint.files.get("README.md")).license or row.license
            row.files = (
                [
                    BaseFileRow(name=file, size=path.stat().st_size, mtime_ns=path.stat().st_mtime_ns, sha256=sha256)
                    for file, path, sha256 in files
                ]
                if same is None
                else _merged_files(row, files)
            )
            session.add(row)
            if parent and relation:
                set_parent(session, row, find_base(session, parent), relation)
            record(session, "base.add", row.name, fingerprint=row.fingerprint, parent=parent)
            session.flush()
            info = base_info(row, len(row.tensors), created=same is None)
            return info.model_copy(update={"warnings": warnings})

    def add_pushed_base(self, folder: Path, name: str, progress: Progress | None = None) -> BaseInfo:
        """Register a checkpoint that was pushed under `name`, where no base has these weights.

        Where one of that name has them, it moves to `folder`, with the files beside the weights that lie there. Where
        one of another name has them, it stays as it is. Where `name` holds other weights, the new ones get it with the
        first digits of their fingerprint: a name never changes its weights.
        """
        checkpoint = open_checkpoint(folder)
        fingerprint = fingerprint_checkpoint(checkpoint)
        names = (name, f"{name}-{fingerprint.identity[4:12]}")
        with session_scope(self._engine) as session:
            same = session.scalar(select(BaseModelRow).where(BaseModelRow.fingerprint == fingerprint.identity))
            if same is not None and same.name not in names:
                return base_info(same, len(same.tensors))
            taken = same is None and session.scalar(select(BaseModelRow.id).where(BaseModelRow.name == name))
        wanted = same.name if same else names[1] if taken else name
        return self._register(folder, wanted, checkpoint, fingerprint, None, None, None, moves=True)

    def verify_base(self, ref: str, progress: Progress | None) -> BaseCheck:
        """Hash every tensor of a registered base again and compare. Raises what open_checkpoint raises."""
        with session_scope(self._engine) as session:
            row = find_base(session, ref)
            known = {tensor.name: tensor.digest for tensor in row.tensors}
        checkpoint = open_checkpoint(Path(row.location))
        found = fingerprint_checkpoint(
            checkpoint, (lambda done, total: progress("fingerprinting", done, total)) if progress else None
        )
        now = {leaf.name: leaf.digest for leaf in logical_leaves(checkpoint, found)}
        return BaseCheck(
            name=row.name,
            fingerprint=row.fingerprint,
            found=found.identity,
            intact=found.identity == row.fingerprint,
            changed=tuple(sorted(name for name in known | now if known.get(name) != now.get(name))),
        )

    def publish(
        self,
        source: Path | FileSet,
        name: str,
        version: str | None,
        base: str | None,
        license: str | None,
        tags: tuple[str, ...],
        description: str | None,
        private: bool | None,
        progress: Progress | None,
        *,
        read_paths: bool = True,
        whole: bool = False,
        allow_nonfinite: bool = False,
    ) -> PublishResult:
        """Publish an adapter's files: those that make a version, or all of them (`whole`).

        allow_nonfinite: NaN and infinities in the weights are a warning and no error.
        Raises what open_adapter and admit raise, NonFiniteError, IncompatibleError when it does not fit the base it
        names, and VersionTakenError when other bytes hold the version. Identical bytes are a no-op.
        """
        namespace, short = adapter_name(name)
        wanted = Version(version) if version else None
        with session_scope(self._engine, writes=True) as session:
            require_role(session, namespace, Role.PUBLISHER, claim=True)
        adapter = open_adapter(source.expanduser() if isinstance(source, Path) else source)
        chosen = adapter.files if whole else publishable_files(adapter)
        admit(chosen)
        warnings = left_out(set(adapter.files) - set(chosen))
        warnings += _nonfinite(adapter, allow_nonfinite)
        card = read_card(adapter.files.get("README.md"))
        claim = self._claim(adapter, card, base, warnings, read_paths=read_paths, progress=progress)
        known = self._check_base(adapter, claim, warnings)
        advice = adapter_advice(f"{namespace}/{short}", adapter, **(known or {}))
        measured = measure(adapter)
        template = _template(chosen, known, warnings)
        for attempt in range(ATTEMPTS):  # two publishers at a time, or a collection, may be in each other's way
            files = self._store_files(chosen, progress)
            digest = manifest_digest({entry.name: {"sha256": entry.sha256, "size": entry.size} for entry in files})
            said = list(warnings)
            try:
                with session_scope(self._engine, writes=True) as session:
                    require_blobs(session, self._store, {entry.name: entry.sha256 for entry in files})
                    result = self._insert(
                        session, (namespace, short), wanted, digest, files, adapter, claim, card,
                        license, tags, description, private, said, measured,
                    )  # fmt: skip
                    return result.model_copy(update={"advice": tuple(advice), "chat_template_diff": template})
            except CollectedError:
                if attempt == ATTEMPTS - 1:
                    raise
            except DatabaseIntegrityError as error:
                found = str(error.orig)
        raise VersionTakenError(
            f"{namespace}/{short}: other publishers took its versions at the same moment, {ATTEMPTS} times",
            expected="a free version",
            found=found,
            remedy="publish again",
        )

    def _claim(
        self,
        adapter: Adapter,
        card: Card,
        base: str | None,
        warnings: list[str],
        *,
        read_paths: bool,
        progress: Progress | None,
    ) -> BaseClaim:
        own = claim_from_folder(adapter, card, read_paths=read_paths and base is None, progress=progress)
        if base is None:
            return own
        if FINGERPRINT.fullmatch(base):
            claim = BaseClaim(fingerprint=base, name=own.name)
        else:
            with session_scope(self._engine) as session:
                row = session.scalar(select(BaseModelRow).where(BaseModelRow.name == base))
            if row is not None:
                claim = BaseClaim(row.fingerprint, row.value_root, row.config_digest, own.name or row.name)
            elif read_paths and Path(base).expanduser().is_dir():
                claim = claim_of(fingerprint_folder(Path(base).expanduser(), progress), own.name)
            else:
                raise BaseNotFoundError(
                    f"no base is registered as {base!r}",
                    expected="a registered name, a fingerprint wf1:…, or a checkpoint folder",
                    found=base,
                    remedy="register it with 'registry base add', or leave --base out",
                )
        if own.fingerprint and own.fingerprint != claim.fingerprint:
            warnings.append(
                f"README.md names the base {own.fingerprint[:16]}…, --base {base} is {str(claim.fingerprint)[:16]}…; "
                "--base is taken"
            )
        return claim

    def _check_base(self, adapter: Adapter, claim: BaseClaim, warnings: list[str]) -> dict[str, Any] | None:
        """What advice needs of the base, where it is registered: its size, and itself if it still lies there."""
        if claim.fingerprint is None:
            warnings.append(
                f"the base is known by name only ({claim.name or 'no name'}): the version is unverified; "
                "publish with --base to tie it to weights"
            )
            return None
        with session_scope(self._engine) as session:
            row = session.scalar(select(BaseModelRow).where(BaseModelRow.fingerprint == claim.fingerprint))
            if row is None:
                warnings.append(
                    f"the base {claim.fingerprint[:16]}… is not registered: the version is pending until it is"
                )
                return None
            verdict = assess(adapter.signature.targets, claim, base_facts(session, row))
            lies = _lies_there(row)
        if verdict.level is Level.INCOMPATIBLE:
            raise IncompatibleError(
                f"the adapter does not fit the base it names: {verdict.reasons[0].message}",
                expected=f"tensors of {row.name}",
                found=verdict.reasons[0].message,
                remedy="name the base it was trained on with --base",
            )
        return {"parameters": row.parameters, "base": open_checkpoint(Path(row.location)) if lies else None}

    def _store_files(self, chosen: FileSet, progress: Progress | None) -> list[VersionFileRow]:
        total = sum(path.stat().st_size for path in chosen.values())
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress:
                progress("storing", done, total)

        rows = []
        for name, path in sorted(chosen.items()):
            sha256, size = self._store.put(path, advance)
            rows.append(VersionFileRow(name=name, size=size, sha256=sha256))
        return rows

    def _insert(
        self,
        session: Session,
        name: tuple[str, str],
        wanted: Version | None,
        digest: str,
        files: list[VersionFileRow],
        adapter: Adapter,
        claim: BaseClaim,
        card: Card,
        license: str | None,
        tags: tuple[str, ...],
        description: str | None,
        private: bool | None,
        warnings: list[str],
        measured: Measurement,
    ) -> PublishResult:
        namespace, short = name
        require_role(session, namespace, Role.PUBLISHER)
        refuse_quarantined(session, digest, f"{namespace}/{short}")
        wanted_name = (AdapterRow.namespace == namespace, AdapterRow.name == short)
        owner = session.scalar(select(AdapterRow).where(*wanted_name).with_for_update(of=AdapterRow))
        if owner is None:
            if session.scalar(select(BaseModelRow.id).where(BaseModelRow.name == f"{namespace}/{short}")):
                raise NameTakenError(
                    f"{namespace}/{short} is a base model",
                    expected="a name that no base has",
                    found="a base of that name",
                    remedy="publish under another --name",
                )
            own = (RepositoryRow.namespace == namespace, RepositoryRow.name == short)
            repository = session.scalar(select(RepositoryRow).where(*own))
            if private is None:
                private = repository is not None and repository.private
            elif repository is not None:
                repository.private = private
            warnings.extend(name_warnings(session, namespace, short))
            owner = AdapterRow(namespace=namespace, name=short, private=private)
            session.add(owner)
            session.flush()
        elif private not in (None, owner.private):
            kept = "private" if owner.private else "public"
            warnings.append(f"{owner.full_name} stays {kept}; 'registry visibility' changes that")
        versions = select(VersionRow).where(VersionRow.adapter_id == owner.id)
        if wanted is None:
            # The same bytes tied to another base are a new version: what is known of them has changed.
            same = session.scalar(
                versions.where(
                    VersionRow.digest == digest, VersionRow.base_fingerprint.is_not_distinct_from(claim.fingerprint)
                )
                .order_by(*LATEST)
                .limit(1)
            )
            newest = session.scalar(versions.order_by(VersionRow.sort_key.desc()).limit(1))
            wanted = Version(Version(newest.version).next_patch() if newest else FIRST_VERSION)
            while same is None and _was_deleted(session, name, wanted):
                wanted = Version(wanted.next_patch())
        else:
            same = session.scalar(versions.where(VersionRow.version == wanted.text))
            if same is not None and same.digest != digest:
                raise VersionTakenError(
                    f"{owner.full_name}@{wanted.text} holds other bytes; versions never change",
                    expected=same.digest,
                    found=digest,
                    remedy="publish under a new version",
                )
            if same is None and _was_deleted(session, name, wanted):
                raise VersionTakenError(
                    f"{owner.full_name}@{wanted.text} was deleted; a version is never used again",
                    expected="a new version",
                    found=wanted.text,
                    remedy="publish under a new version",
                )
        if same is not None:
            if claim.fingerprint != same.base_fingerprint:
                warnings.append(f"{owner.full_name}@{same.version} keeps the base it was published with")
            return _published(session, same, warnings, created=False)
        signature = adapter.signature
        text = description if description is not None else card.description
        labels = tuple(dict.fromkeys((*tags, *card.tags)))
        row = VersionRow(
            adapter_id=owner.id,
            version=wanted.text,
            sort_key=wanted.sort_key,
            prerelease=wanted.pre is not None,
            digest=digest,
            kind=signature.kind,
            rank=signature.rank,
            alpha=signature.alpha,
            target_modules=list(signature.target_modules),
            parameters=signature.parameters,
            nbytes=sum(file.size for file in files),
            base_fingerprint=claim.fingerprint,
            base_value_root=claim.value_root,
            base_config_digest=claim.config_digest,
            base_name=claim.name,
            license=license or card.license,
            tags=list(labels),
            description=text,
            search_text=index_text(
                owner.full_name, text, *labels, claim.name or "", signature.kind, *signature.target_modules
            ),
            signature=_signature(session, signature.targets),
            task=_short(adapter.config.get("task_type"), 50),
            screening=measured.as_json(),
            files=files,
            labels=[VersionTagRow(tag=tag) for tag in labels if len(tag) <= 200],
        )
        session.add(row)
        record(session, "publish", f"{owner.full_name}@{row.version}", digest=digest, base=claim.fingerprint)
        refresh_latest(session, owner.id)
        session.refresh(row)
        return _published(session, row, warnings, created=True)


def _published(session: Session, row: VersionRow, warnings: list[str], *, created: bool) -> PublishResult:
    """The version with its screening, whose alarms are warnings too."""
    screening = screen_version(session, row)
    info = version_info(session, row).model_copy(update={"screening": screening})
    told = (*warnings, *alarms(f"{info.name}@{info.version}", screening))
    return PublishResult(version=info, created=created, warnings=told)


def _check_no_adapter(session: Session, name: str) -> None:
    namespace, slash, short = name.partition("/")
    same = (AdapterRow.namespace == namespace, AdapterRow.name == short)
    if slash and session.scalar(select(AdapterRow.id).where(*same)):
        raise NameTakenError(
            f"{name} is an adapter",
            expected="a name that no adapter has",
            found="an adapter of that name",
            remedy="choose another --name",
        )


def _signature(session: Session, targets: tuple[Target, ...]) -> str:
    """The digest of what an adapter touches, stored once for all who touch the same."""
    found = sorted(((target.parameter, list(target.needs)) for target in targets), key=lambda pair: pair[0])
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    if session.get(SignatureRow, digest) is None:
        rows = [SignatureTargetRow(parameter=parameter, shape=shape) for parameter, shape in found]
        session.add(SignatureRow(digest=digest, targets=rows))
    return digest


def _short(value: object, limit: int) -> str | None:
    return value if isinstance(value, str) and len(value) <= limit else None


def _was_deleted(session: Session, name: tuple[str, str], version: Version) -> bool:
    return session.get(TombstoneRow, (*name, version.text)) is not None


def _fill_base(row: BaseModelRow, folder: Path, checkpoint: Checkpoint, fingerprint: Fingerprint) -> None:
    sizes: dict[str, int] = {}
    for spec in checkpoint.stored.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    row.tensor_root = fingerprint.tensor_root
    row.value_root = fingerprint.value_root
    row.layout_digest = fingerprint.layout
    row.config_digest = fingerprint.config
    row.tokenizer_digest = fingerprint.tokenizer
    row.chat_template_digest = fingerprint.chat_template
    row.architecture = checkpoint.architecture
    scheme = checkpoint.scheme
    row.dtype = scheme.name if scheme else max(sizes, key=lambda dtype: sizes[dtype]) if sizes else "none"
    row.parameters = sum(spec.nbytes // DTYPES[spec.dtype].itemsize for spec in checkpoint.tensors.values())
    row.nbytes = checkpoint.nbytes
    row.location = str(folder)
    if not row.tensors:
        row.tensors = [
            BaseTensorRow(
                name=leaf.name,
                dtype=leaf.dtype,
                shape=list(leaf.shape),
                digest=leaf.digest,
                value_digest=leaf.value_digest,
            )
            for leaf in logical_leaves(checkpoint, fingerprint)
        ]


def _lies_there(row: BaseModelRow) -> bool:
    """Whether a base is still where it was registered from; then a second copy does not take its place."""
    return all((Path(row.location) / file.name).is_file() for file in row.files)


def _merged_files(row: BaseModelRow, files: list[tuple[str, Path, str]]) -> list[BaseFileRow]:
    """The file rows after a base was registered again from a new place: known names are updated in place."""
    known = {file.name: file for file in row.files}
    merged = []
    for name, path, sha256 in files:
        file = known.get(name) or BaseFileRow(name=name)
        file.size, file.mtime_ns, file.sha256 = path.stat().st_size, path.stat().st_mtime_ns, sha256
        merged.append(file)
    return merged


def _nonfinite(adapter: Adapter, allowed: bool) -> list[str]:
    """A warning on tensors that hold NaN or infinity. Raises NonFiniteError for the first, unless `allowed`."""
    if allowed:
        return _nonfinite_of(adapter.header.tensors.values(), "NaN or infinite values, so that it cannot be composed")
    for spec in adapter.header.tensors.values():
        if count := count_nonfinite(spec):
            raise NonFiniteError(
                f"{spec.path.name}: {spec.name} holds {count} values that are NaN or infinite",
                expected="finite numbers",
                found=count,
                remedy="the training diverged: publish an earlier step, or keep it with --allow-nonfinite",
                tensor=spec.name,
            )
    return []


def _nonfinite_of(specs: Iterable[TensorSpec], what: str) -> list[str]:
    found = [f"{spec.name} ({count})" for spec in specs if (count := count_nonfinite(spec))]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return [f"{what}: {', '.join(found[:SHOWN])}{more}"] if found else []


def _template(files: FileSet, known: dict[str, Any] | None, warnings: list[str]) -> str | None:
    """How the chat templates differ from those of the base, which is at hand; a warning where they do."""
    base = known.get("base") if known else None
    found = template_diff(chat_templates(base.files), chat_templates(files)) if base is not None else None
    if found:
        warnings.append("the chat template is not the base's: read the difference before you use it")
    return found
