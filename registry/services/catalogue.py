"""Names, versions, aliases and bases: looking up, listing and pointing."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from sqlalchemy import Engine, func, select, tuple_, update
from sqlalchemy.orm import Session, selectinload

from composer.places import with_module_places
from registry.access import Role
from registry.compat import BaseClaim, BaseFacts
from registry.db import session_scope
from registry.errors import AdapterNotFoundError, BaseNotFoundError, VersionNotFoundError
from registry.models import (
    AdapterRow,
    AliasRow,
    AttestationRow,
    BaseClosureRow,
    BaseModelRow,
    BaseTensorRow,
    RepositoryRow,
    VersionDownloadsRow,
    VersionRow,
    now,
)
from registry.names import Version, adapter_name, alias_name
from registry.schemas import (
    BaseInfo,
    BaseStatus,
    FileInfo,
    Page,
    Relation,
    SignatureInfo,
    VersionInfo,
    VersionState,
)
from registry.services.audit import record
from registry.services.namespaces import require_role
from registry.services.screening import screen_version

__all__ = [
    "Catalogue",
    "base_facts",
    "base_info",
    "find_base",
    "find_version",
    "refresh_latest",
    "tensor_count",
    "version_claim",
    "version_info",
    "version_infos",
]

MAX_PAGE = 1000
REMEMBERED_BASES = 64
_SHAPES: OrderedDict[str, dict[str, tuple[int, ...]]] = OrderedDict()
_SHAPES_LOCK = threading.Lock()


def base_info(row: BaseModelRow, tensors: int, *, created: bool = False) -> BaseInfo:
    """A row as a schema."""
    return BaseInfo(
        name=row.name,
        fingerprint=row.fingerprint,
        tensor_root=row.tensor_root,
        value_root=row.value_root,
        layout_digest=row.layout_digest,
        config_digest=row.config_digest,
        tokenizer_digest=row.tokenizer_digest,
        chat_template_digest=row.chat_template_digest,
        architecture=row.architecture,
        dtype=row.dtype,
        parameters=row.parameters,
        tensors=tensors,
        nbytes=row.nbytes,
        license=row.license,
        location=row.location,
        parent=row.parent.name if row.parent else None,
        relation=Relation(row.relation) if row.relation else None,
        created_at=row.created_at,
        created=created,
    )


def version_info(session: Session, row: VersionRow) -> VersionInfo:
    """A row as a schema; the state of its base is looked up anew, so it follows what is registered."""
    return version_infos(session, [row])[0]


def version_infos(session: Session, rows: Sequence[VersionRow]) -> list[VersionInfo]:
    """Rows as schemas, with one query for each kind of thing that belongs to them."""
    ids = [row.id for row in rows]
    fingerprints = {row.base_fingerprint for row in rows if row.base_fingerprint}
    named = select(BaseModelRow.fingerprint, BaseModelRow.name).where(BaseModelRow.fingerprint.in_(fingerprints))
    bases = dict(session.execute(named).tuples().all()) if fingerprints else {}
    aliases: dict[int, list[str]] = {}
    pointers = select(AliasRow.version_id, AliasRow.alias).where(AliasRow.version_id.in_(ids)).order_by(AliasRow.alias)
    for version_id, alias in session.execute(pointers).tuples():
        aliases.setdefault(version_id, []).append(alias)
    counted = select(VersionDownloadsRow.version_id, VersionDownloadsRow.count)
    downloads = dict(session.execute(counted.where(VersionDownloadsRow.version_id.in_(ids))).tuples().all())
    signatures: dict[int, list[SignatureInfo]] = {}
    table = AttestationRow.__table__.c
    signed = select(table.version_id, table.key, table.subject, table.created_at).where(table.version_id.in_(ids))
    for version_id, key, subject, at in session.execute(signed.order_by(table.created_at, table.key)).tuples():
        signatures.setdefault(version_id, []).append(SignatureInfo(key=key, subject=subject, created_at=at))
    return [
        _version_info(
            row,
            bases.get(row.base_fingerprint or ""),
            aliases.get(row.id, []),
            downloads.get(row.id, 0),
            signatures.get(row.id, []),
        )
        for row in rows
    ]


def _version_info(
    row: VersionRow, base: str | None, aliases: list[str], downloads: int, signatures: list[SignatureInfo]
) -> VersionInfo:
    return VersionInfo(
        name=row.adapter.full_name,
        version=row.version,
        digest=row.digest,
        kind=row.kind,
        rank=row.rank,
        alpha=row.alpha,
        target_modules=tuple(row.target_modules),
        parameters=row.parameters,
        nbytes=row.nbytes,
        base_status=_status(row.base_fingerprint, base),
        base_fingerprint=row.base_fingerprint,
        base_name=row.base_name,
        base=base,
        license=row.license,
        task=row.task,
        downloads=downloads,
        tags=tuple(row.tags),
        description=row.description,
        private=row.adapter.private,
        state=VersionState(row.state),
        state_reason=row.state_reason,
        deprecated=row.deprecated,
        successor=row.successor,
        aliases=("latest", *aliases) if row.latest else tuple(aliases),
        files=tuple(FileInfo(name=file.name, size=file.size, sha256=file.sha256) for file in row.files),
        signatures=tuple(signatures),
        created_at=row.created_at,
    )


def _status(fingerprint: str | None, base: str | None) -> BaseStatus:
    if fingerprint is None:
        return BaseStatus.UNVERIFIED
    return BaseStatus.VERIFIED if base else BaseStatus.PENDING


# The highest release; a pre-release only where there is nothing else.
LATEST = (VersionRow.prerelease, VersionRow.sort_key.desc())


def refresh_latest(session: Session, adapter_id: int) -> None:
    """Mark the highest published version of an adapter, after one was added or its state changed."""
    best = select(VersionRow.id).where(VersionRow.adapter_id == adapter_id, VersionRow.state == "published")
    session.flush()
    chosen = session.scalar(best.order_by(*LATEST).limit(1))
    of_adapter = update(VersionRow).where(VersionRow.adapter_id == adapter_id)
    session.execute(of_adapter.where(VersionRow.latest, VersionRow.id != chosen).values(latest=False))
    if chosen is not None:
        session.execute(of_adapter.where(VersionRow.id == chosen).values(latest=True))


def find_base(session: Session, ref: str) -> BaseModelRow:
    """A base by name or fingerprint. Raises BaseNotFoundError."""
    column = BaseModelRow.fingerprint if ref.startswith("wf1:") else BaseModelRow.name
    row = session.scalar(select(BaseModelRow).where(column == ref))
    if row is None:
        known = list(session.scalars(select(BaseModelRow.name).order_by(BaseModelRow.name).limit(10)))
        raise BaseNotFoundError(
            f"no base is registered as {ref!r}",
            expected=known or "a registered base",
            found=ref,
            remedy="register it with 'registry base add PATH --name NAME', or give a folder as ./PATH",
        )
    return row


def find_version(session: Session, ref: str, version: str | None) -> VersionRow:
    """A version of `ref` by semantic version, alias, digest (or a prefix of it) or, with None, the latest.

    Raises AdapterNotFoundError or VersionNotFoundError with what there is.
    """
    namespace, name = adapter_name(ref)
    adapter = session.scalar(select(AdapterRow).where(AdapterRow.namespace == namespace, AdapterRow.name == name))
    if adapter is None:
        near = session.execute(
            select(AdapterRow.namespace, AdapterRow.name)
            .where((AdapterRow.name == name) | (AdapterRow.namespace == namespace))
            .limit(5)
        )
        listed = [f"{row.namespace}/{row.name}" for row in near]
        raise AdapterNotFoundError(
            f"no adapter is named {namespace}/{name}",
            expected=listed or "a published adapter",
            found=f"{namespace}/{name}",
            remedy=f"did you mean {' or '.join(listed)}?"
            if listed
            else "see 'registry list', or give a folder as ./PATH",
        )
    query = select(VersionRow).where(VersionRow.adapter_id == adapter.id)
    if version is None or version == "latest":
        # Where all are yanked there is no latest; the highest is named, and refused when it is to be used.
        row = session.scalar(query.order_by(VersionRow.latest.desc(), *LATEST).limit(1))
    elif version.startswith("sha256:"):
        rows = session.scalars(query.where(VersionRow.digest.startswith(version, autoescape=True)).order_by(*LATEST))
        found = list(rows)
        row = found[0] if len({item.digest for item in found}) == 1 else None
    else:
        alias = select(AliasRow.version_id).where(AliasRow.adapter_id == adapter.id, AliasRow.alias == version)
        row = session.scalar(query.where((VersionRow.version == version) | (VersionRow.id == alias.scalar_subquery())))
    if row is None:
        known = list(session.scalars(select(VersionRow.version).where(VersionRow.adapter_id == adapter.id).limit(20)))
        aliases = list(session.scalars(select(AliasRow.alias).where(AliasRow.adapter_id == adapter.id).limit(20)))
        raise VersionNotFoundError(
            f"{adapter.full_name} has no version {version!r}",
            expected=["latest", *aliases, *known],
            found=version,
            remedy=f"see 'registry versions {adapter.full_name}'",
        )
    return row


def base_facts(session: Session, row: BaseModelRow, *, lazy: bool = False) -> BaseFacts:
    """All that a verdict needs of a base: its shapes and its declared relatives.

    lazy: the relatives, of which there may be thousands, are read when they are first asked for, within the session.
    """
    return BaseFacts(
        name=row.name,
        fingerprint=row.fingerprint,
        value_root=row.value_root,
        config_digest=row.config_digest,
        shapes=_shapes(session, row),
        relatives=_Relatives(session, row) if lazy else _relatives(session, row),
    )


class _Relatives(Mapping[str, str]):
    """The relatives of a base, read when one is asked for."""

    def __init__(self, session: Session, row: BaseModelRow) -> None:
        self._read = cache(lambda: _relatives(session, row))

    def __getitem__(self, fingerprint: str) -> str:
        return self._read()[fingerprint]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def _shapes(session: Session, row: BaseModelRow) -> dict[str, tuple[int, ...]]:
    """The places of a base, which are the same for ever: remembered for the bases that were asked for last."""
    with _SHAPES_LOCK:
        found = _SHAPES.get(row.fingerprint)
    if found is None:
        query = select(BaseTensorRow.name, BaseTensorRow.shape).where(BaseTensorRow.base_id == row.id)
        found = with_module_places({name: tuple(shape) for name, shape in session.execute(query)}, row.architecture)
        with _SHAPES_LOCK:
            _SHAPES[row.fingerprint] = found
            while len(_SHAPES) > REMEMBERED_BASES:
                _SHAPES.popitem(last=False)
    return found


def _relatives(session: Session, row: BaseModelRow) -> dict[str, str]:
    """Ancestors and descendants of a base, by fingerprint, with a phrase; siblings are not relatives."""
    found: dict[str, str] = {}
    for theirs, own, up in (
        (BaseClosureRow.ancestor_id, BaseClosureRow.descendant_id, True),
        (BaseClosureRow.descendant_id, BaseClosureRow.ancestor_id, False),
    ):
        columns = (BaseModelRow.fingerprint, BaseModelRow.name, BaseModelRow.relation, BaseClosureRow.depth)
        query = select(*columns).join(BaseClosureRow, theirs == BaseModelRow.id).where(own == row.id)
        for fingerprint, name, relation, depth in session.execute(query.order_by(BaseClosureRow.depth)).tuples():
            child, how, parent = (row.name, row.relation, name) if up else (name, relation, row.name)
            found[fingerprint] = (
                f"{child} is declared as {how} from {parent}"
                if depth == 1
                else f"{child} is declared to descend from {parent}, in {depth} steps"
            )
    return found


def version_claim(session: Session, version: VersionRow) -> BaseClaim:
    """What a version says of its base, completed from the catalogue when that base is registered."""
    base = None
    if version.base_fingerprint and not version.base_value_root:
        base = session.scalar(select(BaseModelRow).where(BaseModelRow.fingerprint == version.base_fingerprint))
    return BaseClaim(
        fingerprint=version.base_fingerprint,
        value_root=base.value_root if base else version.base_value_root,
        config_digest=base.config_digest if base else version.base_config_digest,
        name=version.base_name,
    )


def tensor_count(session: Session, row: BaseModelRow) -> int:
    """How many tensors a base has."""
    return session.scalar(select(func.count()).where(BaseTensorRow.base_id == row.id)) or 0


class Catalogue:
    """Reads, and the two writes that only point: aliases."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def list_bases(self, limit: int, cursor: str | None) -> Page[BaseInfo]:
        """Bases by name; the cursor is the last name seen."""
        limit = max(1, min(limit, MAX_PAGE))
        with session_scope(self._engine) as session:
            query = select(BaseModelRow).order_by(BaseModelRow.name).limit(limit + 1)
            if cursor:
                query = query.where(BaseModelRow.name > cursor)
            rows = list(session.scalars(query))
            items = tuple(base_info(row, tensor_count(session, row)) for row in rows[:limit])
        return Page(items=items, next=rows[limit - 1].name if len(rows) > limit else None)

    def get_base(self, ref: str) -> BaseInfo:
        """One base."""
        with session_scope(self._engine) as session:
            row = find_base(session, ref)
            return base_info(row, tensor_count(session, row))

    def list_adapters(
        self,
        limit: int,
        cursor: str | None,
        *,
        namespace: str | None = None,
        kind: str | None = None,
        base: str | None = None,
    ) -> Page[VersionInfo]:
        """The latest version of each adapter that passes the filters; the cursor is the last full name seen.

        base: a registered name or a fingerprint.
        """
        limit = max(1, min(limit, MAX_PAGE))
        query = (
            select(VersionRow)
            .where(VersionRow.latest)
            .join(AdapterRow, AdapterRow.id == VersionRow.adapter_id)
            .options(selectinload(VersionRow.files))
            .order_by(AdapterRow.namespace, AdapterRow.name)
            .limit(limit + 1)
        )
        with session_scope(self._engine) as session:
            if namespace:
                query = query.where(AdapterRow.namespace == namespace)
            if kind:
                query = query.where(VersionRow.kind == kind)
            if base:
                query = query.where(VersionRow.base_fingerprint == find_base(session, base).fingerprint)
            if cursor:
                query = query.where(tuple_(AdapterRow.namespace, AdapterRow.name) > tuple_(*adapter_name(cursor)))
            rows = list(session.scalars(query))
            items = tuple(version_infos(session, rows[:limit]))
        return Page(items=items, next=items[-1].name if len(rows) > limit else None)

    def version_id(self, ref: str, version: str) -> int:
        """The number of a version."""
        with session_scope(self._engine) as session:
            return find_version(session, ref, version).id

    def get_version(self, ref: str, version: str | None) -> VersionInfo:
        """One version."""
        with session_scope(self._engine) as session:
            return version_info(session, find_version(session, ref, version))

    def screened_version(self, ref: str, version: str | None) -> VersionInfo:
        """One version with the scores of its screening, against what is published by now."""
        with session_scope(self._engine) as session:
            row = find_version(session, ref, version)
            return version_info(session, row).model_copy(update={"screening": screen_version(session, row)})

    def list_versions(self, name: str, limit: int, cursor: str | None) -> Page[VersionInfo]:
        """All versions, the highest first; the cursor is the last version seen."""
        limit = max(1, min(limit, MAX_PAGE))
        with session_scope(self._engine) as session:
            adapter_id = find_version(session, name, None).adapter_id
            query = select(VersionRow).where(VersionRow.adapter_id == adapter_id)
            if cursor is not None:
                query = query.where(VersionRow.sort_key < Version(cursor).sort_key)
            query = query.order_by(VersionRow.sort_key.desc()).limit(limit + 1)
            rows = session.scalars(query.options(selectinload(VersionRow.files))).all()
            items = tuple(version_infos(session, rows[:limit]))
        return Page(items=items, next=items[-1].version if len(rows) > limit else None)

    def set_alias(self, ref: str, version: str | None, alias: str) -> VersionInfo:
        """Create or move an alias."""
        alias_name(alias)
        with session_scope(self._engine, writes=True) as session:
            row = find_version(session, ref, version)
            require_role(session, row.adapter.namespace, Role.PUBLISHER)
            pointer = session.get(AliasRow, (row.adapter_id, alias))
            record(session, "alias.set", f"{row.adapter.full_name}@{alias}", version=row.version)
            if pointer is None:
                session.add(AliasRow(adapter_id=row.adapter_id, alias=alias, version_id=row.id))
            else:
                pointer.version_id, pointer.updated_at = row.id, now()
            session.flush()
            return version_info(session, row)

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias. Raises VersionNotFoundError when there is none."""
        alias_name(alias)
        with session_scope(self._engine, writes=True) as session:
            row = find_version(session, name, None)
            require_role(session, row.adapter.namespace, Role.PUBLISHER)
            pointer = session.get(AliasRow, (row.adapter_id, alias))
            if pointer is None:
                raise VersionNotFoundError(
                    f"{row.adapter.full_name} has no alias {alias!r}",
                    expected="an alias",
                    found=alias,
                    remedy=f"see 'registry versions {row.adapter.full_name}'",
                )
            session.delete(pointer)
            record(session, "alias.delete", f"{row.adapter.full_name}@{alias}")

    def set_private(self, name: str, private: bool) -> VersionInfo:
        """Hide an adapter from all but the members of its namespace, or show it to everybody."""
        with session_scope(self._engine, writes=True) as session:
            row = find_version(session, name, None)
            require_role(session, row.adapter.namespace, Role.OWNER)
            if row.adapter.private != private:
                row.adapter.private = private
                own = (RepositoryRow.namespace == row.adapter.namespace, RepositoryRow.name == row.adapter.name)
                session.execute(update(RepositoryRow).where(*own).values(private=private))
                record(session, "visibility", row.adapter.full_name, private=private)
                session.flush()
            return version_info(session, row)
