"""A registry at a URL: the protocol of registry.interface over REST.

Local folders are read here and sent (publish, add_base) or inspected here; a service never reads a path of ours.
What a service sends is checked: schemas, file names and the sha256 of every file.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from composer.errors import CorruptFileError, NotFoundError, TypedError, UsageError
from composer.files import read_json
from composer.provenance import manifest_digest
from composer.recipe import AdapterTerm, Recipe, is_path, split_reference
from composer.sinks import FolderSink
from registry import __version__
from registry.access import Role, Scope
from registry.api.rules import refuse_path, refuse_paths
from registry.interface import DEFAULT_DAYS, DEFAULT_MAX_BYTES, DEFAULT_PAGE, GRACE_DAYS, KEEP_JOBS_DAYS, Progress
from registry.lifecycle import require_usable
from registry.names import adapter_name
from registry.schemas import (
    AuditEntry,
    BaseCheck,
    BaseFit,
    BaseInfo,
    Collected,
    CompatibleAdapter,
    CompositionInfo,
    ConversionInfo,
    DeltaInfo,
    DoctorCheck,
    ImportInfo,
    JobInfo,
    JobState,
    Level,
    LineageInfo,
    NamespaceInfo,
    NewToken,
    Page,
    PlanInfo,
    PublishResult,
    Relation,
    SignatureInfo,
    SignedBundle,
    StoreCheck,
    TokenInfo,
    Verdict,
    VersionInfo,
)
from registry.store.pulling import signature_files
from registry.transfer import ServiceReplyError, connection_errors, file_parts, read_error, save_file

__all__ = ["JobCancelledError", "RemoteRegistry"]

M = TypeVar("M", bound=BaseModel)
C = TypeVar("C", ConversionInfo, DeltaInfo)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
UPLOAD_TIMEOUT = httpx.Timeout(3600.0, connect=10.0)  # a service hashes a base before it answers
FIRST_POLL_S, LAST_POLL_S, BACK_OFF = 0.05, 2.0, 1.5
RECORD = "composition.json"


class JobCancelledError(TypedError):
    """Somebody cancelled the job that we waited for."""

    code = "job-cancelled"
    category = "conflict"


class RemoteRegistry:
    """A service at `url`, asked with an API token where it wants one. `transport` replaces the network in tests."""

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None, *, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {"User-Agent": f"adapter-registry/{__version__}", "Accept-Encoding": "identity"}
        if token is not None:
            if not (token.isascii() and token.isprintable() and " " not in token):
                raise UsageError("REGISTRY_TOKEN holds something else than a token", expected="ar_…")
            headers["Authorization"] = f"Bearer {token}"
        with connection_errors(url):
            self._http = httpx.Client(
                base_url=f"{self.url}/api/v1",
                transport=transport,
                timeout=TIMEOUT,
                headers=headers,
                trust_env=httpx.URL(url).host not in LOOPBACK,  # no proxy reaches our own machine
            )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def add_base(
        self,
        folder: Path,
        *,
        name: str | None = None,
        parent: str | None = None,
        relation: Relation | None = None,
        license: str | None = None,
        progress: Progress | None = None,
    ) -> BaseInfo:
        """Upload a checkpoint (its weights and the files that go along), which a job on the service fingerprints."""
        from composer.admission import left_out
        from composer.checkpoint import INDEX, open_checkpoint
        from composer.files import copy_names
        from registry.names import base_name, slug

        folder = folder.expanduser().resolve()
        checkpoint = open_checkpoint(folder)
        names = [*(shard.header.path.name for shard in checkpoint.shards), *copy_names(checkpoint.files)]
        names += [INDEX] if checkpoint.sharded else []
        fields = {"name": base_name(name or slug(folder)), "parent": parent, "relation": relation and relation.value,
                  "license": license}  # fmt: skip
        files = {item: checkpoint.files[item] for item in names}
        job = self._upload("/bases?background=true", JobInfo, fields, files, progress)
        info = self._wait(job, BaseInfo, progress)[1]
        return info.model_copy(update={"warnings": (*left_out(checkpoint.files), *info.warnings)})

    def list_bases(self, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[BaseInfo]:
        """Registered bases by name."""
        return self._get("/bases", Page[BaseInfo], limit=limit, cursor=cursor)

    def get_base(self, ref: str) -> BaseInfo:
        """One base by name or fingerprint."""
        return self._get(_base(ref), BaseInfo)

    def verify_base(self, ref: str, *, progress: Progress | None = None) -> BaseCheck:
        """A job on the service."""
        job = self._read(self._send("POST", f"{_base(ref)}/verifications"), JobInfo)
        return self._wait(job, BaseCheck, progress)[1]

    def remove_base(self, ref: str) -> None:
        """Forget a base."""
        self._send("DELETE", _base(ref))

    def yank(self, ref: str, reason: str | None) -> VersionInfo:
        """Withdraw a version, or publish it again."""
        return self._read(self._change(ref, "yank", reason and {"reason": reason}), VersionInfo)

    def deprecate(self, ref: str, reason: str | None, *, successor: str | None = None) -> VersionInfo:
        """Warn all who use a version, or no longer."""
        body = reason and {"reason": reason, "successor": successor}
        return self._read(self._change(ref, "deprecation", body), VersionInfo)

    def quarantine(self, ref: str, reason: str | None) -> tuple[VersionInfo, ...]:
        """Block the bytes of a version, or lift that."""
        return self._read(self._change(ref, "quarantine", reason and {"reason": reason}), Page[VersionInfo]).items

    def _change(self, ref: str, what: str, body: Any) -> httpx.Response:
        path, version = _adapter(ref)
        path = f"{path}/versions/{_segment(version or 'latest')}/{what}"
        return self._send("PUT", path, json=body) if body else self._send("DELETE", path)

    def delete_version(self, ref: str) -> None:
        """Remove a version."""
        path, version = _adapter(ref)
        self._send("DELETE", f"{path}/versions/{_segment(version or 'latest')}")

    def collect(
        self,
        *,
        grace_days: float = GRACE_DAYS,
        keep_jobs_days: float = KEEP_JOBS_DAYS,
        keep_records_days: float | None = None,
        dry_run: bool = False,
    ) -> Collected:
        """Remove what nothing names any more, on the service."""
        body = {"grace_days": grace_days, "keep_jobs_days": keep_jobs_days, "keep_records_days": keep_records_days,
                "dry_run": dry_run}  # fmt: skip
        return self._read(self._send("POST", "/collections", json=body), Collected)

    def publish(
        self,
        folder: Path,
        *,
        name: str,
        version: str | None = None,
        base: str | None = None,
        license: str | None = None,
        tags: tuple[str, ...] = (),
        description: str | None = None,
        private: bool | None = None,
        allow_nonfinite: bool = False,
        progress: Progress | None = None,
    ) -> PublishResult:
        """Upload an adapter; its base, where that is a folder of this machine, is fingerprinted here."""
        from composer.adapters import open_adapter
        from composer.admission import admit, left_out
        from registry.claims import claim_from_folder, fingerprint_folder, read_card
        from registry.services.publishing import publishable_files

        adapter = open_adapter(folder.expanduser())
        if base is not None and is_path(base):
            base = fingerprint_folder(Path(base).expanduser(), progress).identity
        elif base is None:
            # The service cannot see the trainer's folder; this machine may.
            card = read_card(adapter.files.get("README.md"))
            base = claim_from_folder(adapter, card, read_paths=True, progress=progress).fingerprint
        fields = {"name": "/".join(adapter_name(name)), "version": version, "base": base, "license": license,
                  "tags": tags, "description": description,
                  "private": None if private is None else str(private).lower(),
                  "allow_nonfinite": "true" if allow_nonfinite else None}  # fmt: skip
        chosen = publishable_files(adapter)
        admit(chosen)
        result = self._upload("/adapters", PublishResult, fields, chosen, progress)
        unsafe = left_out(set(adapter.files) - set(chosen))
        return result.model_copy(update={"warnings": (*unsafe, *result.warnings)})

    def import_model(
        self,
        ref: str,
        *,
        name: str | None = None,
        version: str | None = None,
        base: str | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        allow_private: bool = False,
        progress: Progress | None = None,
    ) -> ImportInfo:
        """A job on the service, from the hub that it knows and under its rules. An interrupt cancels it."""
        words = {"name": name, "version": version, "base": base, "max_bytes": max_bytes, "allow_private": allow_private}
        return self._wait(self.submit_import(ref, **words), ImportInfo, progress)[1]

    def submit_import(
        self,
        ref: str,
        *,
        name: str | None = None,
        version: str | None = None,
        base: str | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        allow_private: bool = False,
    ) -> JobInfo:
        """Queue an import."""
        limit = None if max_bytes == DEFAULT_MAX_BYTES else max_bytes  # the service has its own
        body = {"ref": ref, "name": name, "version": version, "base": base, "max_bytes": limit,
                "allow_private": allow_private}  # fmt: skip
        return self._read(self._send("POST", "/imports", json=body), JobInfo)

    def list_adapters(
        self,
        *,
        namespace: str | None = None,
        kind: str | None = None,
        base: str | None = None,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
    ) -> Page[VersionInfo]:
        """The latest version of each adapter."""
        return self._get(
            "/adapters", Page[VersionInfo], namespace=namespace, kind=kind, base=base, limit=limit, cursor=cursor
        )

    def search(
        self,
        text: str = "",
        *,
        namespace: str | None = None,
        kind: str | None = None,
        rank: int | None = None,
        task: str | None = None,
        license: str | None = None,
        base: str | None = None,
        tag: str | None = None,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
    ) -> Page[VersionInfo]:
        """Latest versions with these properties."""
        wanted = {"q": text, "namespace": namespace, "kind": kind, "rank": rank, "task": task, "license": license,
                  "base": base, "tag": tag}  # fmt: skip
        return self._get("/search", Page[VersionInfo], **wanted, limit=limit, cursor=cursor)

    def lineage(self, base: str) -> LineageInfo:
        """The line of a base."""
        return self._get(f"{_base(base)}/lineage", LineageInfo)

    def get_version(self, ref: str) -> VersionInfo:
        """One version."""
        path, version = _adapter(ref)
        return self._get(path, VersionInfo, version=version)

    def list_versions(self, name: str, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[VersionInfo]:
        """All versions, the highest first."""
        return self._get(f"{_adapter(name)[0]}/versions", Page[VersionInfo], limit=limit, cursor=cursor)

    def set_alias(self, ref: str, alias: str) -> VersionInfo:
        """Create or move an alias."""
        path, version = _adapter(ref)
        body = {"version": version or "latest"}
        return self._read(self._send("PUT", f"{path}/aliases/{_segment(alias)}", json=body), VersionInfo)

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias."""
        self._send("DELETE", f"{_adapter(name)[0]}/aliases/{_segment(alias)}")

    def pull(self, ref: str, out: Path, *, progress: Progress | None = None) -> VersionInfo:
        """Download a version's files, each checked against its digest."""
        info = self.get_version(ref)
        require_usable(info, f"{info.name}@{info.version}", split_reference(ref)[1])
        path, _ = _adapter(info.name)
        files = {file.name: (file.sha256, file.size) for file in info.files}
        with FolderSink(out.expanduser().resolve()) as sink:
            self._download(f"{path}/files", files, sink, "pulling", progress, version=info.digest)
            for name, data in signature_files(info, self.signatures(ref) if info.signatures else ()).items():
                sink.write(name, data)
            sink.commit()
        return info

    def signatures(self, ref: str) -> tuple[SignedBundle, ...]:
        """The signatures of a version."""
        return self._get(self._signatures(ref), Page[SignedBundle]).items

    def add_signature(self, ref: str, bundle: dict[str, Any]) -> SignatureInfo:
        """Send a signature that was made here."""
        return self._read(self._send("POST", self._signatures(ref), json={"bundle": bundle}), SignatureInfo)

    @staticmethod
    def _signatures(ref: str) -> str:
        path, version = _adapter(ref)
        return f"{path}/versions/{_segment(version or 'latest')}/signatures"

    def compatible(
        self, base: str, *, level: Level = Level.SHAPE, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> Page[CompatibleAdapter]:
        """Latest versions that fit a base."""
        path = f"{_base(base)}/adapters"
        return self._get(path, Page[CompatibleAdapter], level=level.value, limit=limit, cursor=cursor)

    def bases_for(
        self, ref: str, *, level: Level = Level.SHAPE, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> Page[BaseFit]:
        """Registered bases that an adapter fits."""
        path, version = _adapter(ref)
        wanted = {"version": version, "level": level.value, "limit": limit, "cursor": cursor}
        return self._get(f"{path}/bases", Page[BaseFit], **wanted)

    def check(self, adapter: str, base: str) -> Verdict:
        """The verdict for one pair."""
        refuse_path(adapter, "the adapter")
        refuse_path(base, "the base")
        return self._get("/check", Verdict, adapter=adapter, base=base)

    def plan(self, recipe: Recipe) -> PlanInfo:
        """What compose would do."""
        body = refuse_paths(recipe).model_dump(mode="json")
        return self._read(self._send("POST", "/plans", json=body), PlanInfo)

    def compose(
        self,
        recipe: Recipe,
        out: Path,
        *,
        replace: bool = False,
        accept_licences: bool = False,
        probe: str | None = None,
        publish: str | None = None,
        progress: Progress | None = None,
        pins: tuple[str | None, ...] | None = None,
    ) -> CompositionInfo:
        """Run a job on the service and download what it made. An interrupt cancels the job."""
        if pins:
            recipe = recipe.model_copy(update={"adapters": tuple(map(self._pin, recipe.adapters, pins))})
        out = out.expanduser().resolve()
        earlier: dict[str, Any] | None = None
        if not replace and (out / RECORD).is_file():
            with suppress(TypedError):
                earlier = read_json(out / RECORD)
        with ExitStack() as stack:
            # Refuse a taken `out` before any work, unless it may turn out to be this very composition.
            sink = stack.enter_context(FolderSink(out, replace=replace)) if earlier is None else None
            job, result = self._wait(
                self.submit(recipe, accept_licences=accept_licences, probe=probe), CompositionInfo, progress
            )
            files = _outputs(result)
            if publish is not None:
                result = result.model_copy(update={"published": self._publish_job(job.id, publish, progress)})
            if earlier == result.record and all(_has_size(out / name, size) for name, (_, size) in files.items()):
                return result.model_copy(update={"out": str(out), "cached": True, "seconds": {}})
            sink = sink or stack.enter_context(FolderSink(out))
            started = time.perf_counter()
            self._download(f"/jobs/{job.id}/files", files, sink, "downloading", progress)
            response = self._send("GET", f"/jobs/{job.id}/files/{RECORD}")
            sink.write(RECORD, response.content)
            if read_json(sink.folder / RECORD) != result.record:
                raise CorruptFileError(f"{RECORD} is not the job's record", remedy="compose it again")
            sink.commit()
        seconds = {**result.seconds, "download": time.perf_counter() - started}
        return result.model_copy(update={"out": str(out), "seconds": seconds})

    def _pin(self, term: AdapterTerm, pin: str | None) -> AdapterTerm:
        """The term as it is where it still means the pinned digest, else by that digest: a label is part of a card."""
        if pin is None or is_path(term.ref):
            return term
        with suppress(TypedError):
            ref = f"{term.ref}@{term.version}" if term.version else term.ref
            if pin in ((info := self.get_version(ref)).digest, info.version):
                return term
        return term.model_copy(update={"version": pin})

    def submit(self, recipe: Recipe, *, accept_licences: bool = False, probe: str | None = None) -> JobInfo:
        """Queue a compose."""
        body, params = refuse_paths(recipe).model_dump(mode="json"), {"accept_licences": accept_licences}
        if probe is not None:
            body = {"recipe": body, "probe": probe}
        return self._read(self._send("POST", "/compositions", json=body, params=params), JobInfo)

    def submit_publication(self, job_id: str, name: str) -> JobInfo:
        """Queue the publication of a composition."""
        body = {"name": refuse_path(name, "the name")}
        return self._read(self._send("POST", f"/jobs/{_segment(job_id)}/publication", json=body), JobInfo)

    def _publish_job(self, job_id: str, name: str, progress: Progress | None) -> str:
        job = self.submit_publication(job_id, name)
        found: BaseInfo | PublishResult = self._wait(job, (BaseInfo, PublishResult), progress)[1]
        return found.name if isinstance(found, BaseInfo) else f"{found.version.name}@{found.version.version}"

    def list_jobs(
        self, *, state: JobState | None = None, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> Page[JobInfo]:
        """Jobs, newest first."""
        return self._get("/jobs", Page[JobInfo], state=state and state.value, limit=limit, cursor=cursor)

    def get_job(self, job_id: str) -> JobInfo:
        """One job."""
        return self._get(f"/jobs/{_segment(job_id)}", JobInfo)

    def cancel_job(self, job_id: str) -> JobInfo:
        """Stop a job that waits or runs."""
        return self._read(self._send("DELETE", f"/jobs/{_segment(job_id)}"), JobInfo)

    def retry_job(self, job_id: str) -> JobInfo:
        """Queue a failed or cancelled job again."""
        return self._read(self._send("POST", f"/jobs/{_segment(job_id)}/retry"), JobInfo)

    def extract(
        self,
        finetune: str,
        base: str,
        out: Path,
        *,
        rank: int | None = None,
        energy: float | None = None,
        ignore_rest: bool = False,
        progress: Progress | None = None,
    ) -> ConversionInfo:
        """A job on the service, between registered bases, whose files are fetched."""
        body = {"finetune": finetune, "base": base, "rank": rank, "energy": energy, "ignore_rest": ignore_rest}
        return self._convert("extract", body, out, ConversionInfo, progress)

    def make_delta(self, finetune: str, base: str, out: Path, *, progress: Progress | None = None) -> DeltaInfo:
        """As `extract`."""
        return self._convert("delta", {"finetune": finetune, "base": base}, out, DeltaInfo, progress)

    def restore_delta(self, ref: str, base: str, out: Path, *, progress: Progress | None = None) -> DeltaInfo:
        """As `extract`, with a registered adapter."""
        return self._convert("restore", {"ref": ref, "base": base}, out, DeltaInfo, progress)

    def resize(self, ref: str, out: Path, *, rank: int | None = None, energy: float | None = None) -> ConversionInfo:
        """A folder is resized here, a name on the service."""
        if is_path(ref):
            from registry.services.conversions import resize_folder

            return resize_folder(Path(ref).expanduser(), out, rank, energy)
        return self._convert("resize", {"ref": ref, "rank": rank, "energy": energy}, out, ConversionInfo, None)

    def _convert(self, kind: str, body: dict[str, Any], out: Path, model: type[C], progress: Progress | None) -> C:
        """Run the job and fetch its files, each checked against its digest, into the new folder `out`."""
        for field in ("finetune", "base"):
            if field in body:
                refuse_path(body[field], f"the {field}")
        if "ref" in body:
            refuse_path(body["ref"], "the adapter")
        out = out.expanduser().resolve()
        with FolderSink(out) as sink:
            submitted = self._read(self._send("POST", f"/conversions/{kind}", json=body), JobInfo)
            job, result = self._wait(submitted, model, progress)
            files = {file.name: (file.sha256, file.size) for file in result.files}
            self._download(f"/jobs/{job.id}/files", files, sink, "downloading", progress)
            sink.commit()
        return result.model_copy(update={"out": str(out)})

    def set_private(self, name: str, private: bool) -> VersionInfo:
        """Hide or show an adapter."""
        body = {"private": private}
        return self._read(self._send("PUT", f"{_adapter(name)[0]}/visibility", json=body), VersionInfo)

    def create_token(
        self,
        name: str,
        *,
        subject: str,
        scopes: tuple[Scope, ...],
        namespaces: tuple[str, ...] | None = None,
        days: int = DEFAULT_DAYS,
    ) -> NewToken:
        """A new token."""
        body = {"name": name, "subject": subject, "scopes": scopes, "namespaces": namespaces, "days": days}
        return self._read(self._send("POST", "/tokens", json=body), NewToken)

    def list_tokens(self, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[TokenInfo]:
        """All tokens."""
        return self._get("/tokens", Page[TokenInfo], limit=limit, cursor=cursor)

    def revoke_token(self, token_id: str) -> TokenInfo:
        """End a token."""
        return self._read(self._send("DELETE", f"/tokens/{_segment(token_id)}"), TokenInfo)

    def list_namespaces(self, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[NamespaceInfo]:
        """Namespaces with members."""
        return self._get("/namespaces", Page[NamespaceInfo], limit=limit, cursor=cursor)

    def grant(self, namespace: str, subject: str, role: Role) -> NamespaceInfo:
        """Make a subject a member."""
        path = f"/namespaces/{_segment(namespace)}/members/{_segment(subject)}"
        return self._read(self._send("PUT", path, json={"role": role.value}), NamespaceInfo)

    def revoke(self, namespace: str, subject: str) -> NamespaceInfo:
        """Take a subject out of a namespace."""
        path = f"/namespaces/{_segment(namespace)}/members/{_segment(subject)}"
        return self._read(self._send("DELETE", path), NamespaceInfo)

    def audit(
        self,
        *,
        subject: str | None = None,
        target: str | None = None,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
    ) -> Page[AuditEntry]:
        """Who changed what."""
        return self._get("/audit", Page[AuditEntry], subject=subject, target=target, limit=limit, cursor=cursor)

    def inspect(self, ref: str) -> dict[str, Any]:
        """A folder is inspected here; a name on the service, where bases come first."""
        if is_path(ref):
            from registry.services.inspection import inspect_folder

            return inspect_folder(Path(ref).expanduser())
        if "@" not in ref:
            with suppress(NotFoundError):
                return self._json(self._send("GET", f"{_base(ref)}/inspect"))
        path, version = _adapter(ref)
        return self._json(self._send("GET", f"{path}/inspect", params=_given(version=version)))

    def doctor(self) -> tuple[DoctorCheck, ...]:
        """The service's own checks, and that it answers."""
        report = self._json(self._send("GET", "/doctor"))
        try:
            checks = tuple(DoctorCheck.model_validate(check) for check in report["checks"])
        except (ValidationError, KeyError, TypeError) as error:
            raise self._odd_reply(error) from error
        return (DoctorCheck(name="service", ok=True, detail=self.url), *checks)

    def verify_store(self, *, repair: bool = False, progress: Progress | None = None) -> StoreCheck:
        """On the service, which answers when all of its files are hashed."""
        answer = self._send("POST", "/store/checks", params={"repair": str(repair).lower()}, timeout=UPLOAD_TIMEOUT)
        return self._read(answer, StoreCheck)

    def _wait(self, job: JobInfo, model: type[M] | tuple[type[M], ...], progress: Progress | None) -> tuple[JobInfo, M]:
        """The job once it is over, and its result. An interrupt cancels it; a failure is raised as the job's own."""
        path, wait = f"/jobs/{_segment(job.id)}", FIRST_POLL_S
        try:
            while job.state in (JobState.QUEUED, JobState.RUNNING):
                if progress:
                    progress(job.step, job.bytes_done, job.bytes_total)
                time.sleep(wait)
                wait = min(wait * BACK_OFF, LAST_POLL_S)
                job = self._get(path, JobInfo)
        except BaseException:
            with suppress(TypedError):
                self._send("DELETE", path, timeout=httpx.Timeout(5.0))
            raise
        if isinstance(job.result, model):
            return job, job.result
        if job.error:
            raise read_error(httpx.Response(500, json={"error": job.error}), self.url)
        raise JobCancelledError(
            f"job {job.id} was cancelled", expected="succeeded", found=job.state.value, remedy="try again"
        )

    def _upload(
        self, path: str, model: type[M], fields: dict[str, Any], files: dict[str, Path], progress: Progress | None
    ) -> M:
        data = {name: value for name, value in fields.items() if value}
        with file_parts(files, progress) as parts:
            return self._read(self._send("POST", path, data=data, files=parts, timeout=UPLOAD_TIMEOUT), model)

    def _download(
        self,
        path: str,
        files: dict[str, tuple[str, int]],
        sink: FolderSink,
        step: str,
        progress: Progress | None,
        **params: str,
    ) -> None:
        total, done = sum(size for _, size in files.values()), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress:
                progress(step, done, total)

        for name, (sha256, _) in sorted(files.items()):
            with (
                connection_errors(self.url),
                self._http.stream("GET", f"{path}/{quote(name)}", params=params) as response,
            ):
                if not response.is_success:
                    raise read_error(response, self.url)
                save_file(response, sink, name, sha256, advance)

    def _get(self, path: str, model: type[M], **params: Any) -> M:
        return self._read(self._send("GET", path, params=_given(**params)), model)

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        with connection_errors(self.url):
            response = self._http.request(method, path, **options)
        if not response.is_success:
            raise read_error(response, self.url)
        return response

    def _read(self, response: httpx.Response, model: type[M]) -> M:
        try:
            return model.model_validate_json(response.content)
        except ValidationError as error:
            raise self._odd_reply(error) from error

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        try:
            value = response.json()
        except ValueError as error:
            raise self._odd_reply(error) from error
        return value if isinstance(value, dict) else {"value": value}

    def _odd_reply(self, error: Exception) -> ServiceReplyError:
        return ServiceReplyError(
            f"{self.url} answered with something else than this version expects",
            expected=f"the answer of a registry {__version__}",
            found=str(error)[:200],
            remedy="check the URL, and that service and client are of the same version",
        )


def _given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def _segment(text: str) -> str:
    """`text` as one segment of a URL's path."""
    if text in ("", ".", ".."):
        raise UsageError(f"{text!r} is not a name", expected="a name", found=text)
    return quote(text, safe=":")


def _base(ref: str) -> str:
    return f"/bases/{_segment(refuse_path(ref, 'the base'))}"


def _adapter(ref: str) -> tuple[str, str | None]:
    """The path of an adapter, and the version that the reference names."""
    name, version = split_reference(refuse_path(ref, "the adapter"))
    return f"/adapters/{'/'.join(adapter_name(name))}", version


def _outputs(result: CompositionInfo) -> dict[str, tuple[str, int]]:
    """The files of a composition: name to sha256 and size, if the record is consistent with its digest."""
    try:
        outputs = result.record["outputs"]
        files = {str(name): (str(entry["sha256"]), int(entry["size"])) for name, entry in outputs.items()}
        digest = manifest_digest(outputs)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServiceReplyError(f"the job's record cannot be read: {error!r}", expected="composition.json") from error
    if digest != result.output_digest:
        raise CorruptFileError("the job's record and its digest differ", expected=result.output_digest, found=digest)
    return files


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
