"""A registry at a URL: the protocol of registry.interface over REST.

Local folders are read here and sent (publish, add_base) or inspected here; a service never reads a path of ours.
What a service sends is checked: schemas, file names and the sha256 of every file.
"""

from __future__ import annotations

import tempfile
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
from composer.recipe import Recipe, is_path, split_reference
from composer.sinks import FolderSink
from registry import __version__
from registry.api.rules import refuse_path, refuse_paths
from registry.interface import DEFAULT_PAGE, Progress
from registry.names import adapter_name
from registry.schemas import (
    BaseFit,
    BaseInfo,
    CompatibleAdapter,
    CompositionInfo,
    ConversionInfo,
    DeltaInfo,
    DoctorCheck,
    JobInfo,
    JobState,
    Level,
    Page,
    PlanInfo,
    PublishResult,
    Relation,
    Verdict,
    VersionInfo,
)
from registry.transfer import ServiceReplyError, connection_errors, file_parts, read_error, save_file

__all__ = ["JobCancelledError", "RemoteRegistry"]

M = TypeVar("M", bound=BaseModel)

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
    """A service at `url`. `transport` takes the place of the network in tests."""

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        with connection_errors(url):
            self._http = httpx.Client(
                base_url=f"{self.url}/api/v1",
                transport=transport,
                timeout=TIMEOUT,
                headers={"User-Agent": f"adapter-registry/{__version__}", "Accept-Encoding": "identity"},
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
        progress: Progress | None = None,
    ) -> BaseInfo:
        """Upload a checkpoint: its weights and the files that go along."""
        from composer.checkpoint import INDEX, open_checkpoint
        from composer.files import copy_names
        from registry.names import base_name, slug

        folder = folder.expanduser().resolve()
        checkpoint = open_checkpoint(folder)
        names = [*(shard.name for shard in checkpoint.shards), *copy_names(checkpoint.files)]
        names += [INDEX] if checkpoint.sharded else []
        fields = {"name": base_name(name or slug(folder)), "parent": parent, "relation": relation and relation.value}
        return self._upload("/bases", BaseInfo, fields, {item: checkpoint.files[item] for item in names}, progress)

    def list_bases(self, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[BaseInfo]:
        """Registered bases by name."""
        return self._get("/bases", Page[BaseInfo], limit=limit, cursor=cursor)

    def get_base(self, ref: str) -> BaseInfo:
        """One base by name or fingerprint."""
        return self._get(_base(ref), BaseInfo)

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
        progress: Progress | None = None,
    ) -> PublishResult:
        """Upload an adapter; its base, where that is a folder of this machine, is fingerprinted here."""
        from composer.adapters import open_adapter
        from registry.claims import claim_from_folder, fingerprint_folder, read_card
        from registry.services.publishing import publishable_files

        adapter = open_adapter(folder.expanduser())
        if base is not None and is_path(base, base=True):
            base = fingerprint_folder(Path(base).expanduser(), progress).identity
        elif base is None:
            # The service cannot see the trainer's folder; this machine may.
            card = read_card(adapter.files.get("README.md"))
            base = claim_from_folder(adapter, card, read_paths=True, progress=progress).fingerprint
        fields = {"name": "/".join(adapter_name(name)), "version": version, "base": base, "license": license,
                  "tags": tags, "description": description}  # fmt: skip
        return self._upload("/adapters", PublishResult, fields, publishable_files(adapter), progress)

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

    def search(self, text: str, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[VersionInfo]:
        """Adapters that hold every word."""
        return self._get("/search", Page[VersionInfo], q=text, limit=limit, cursor=cursor)

    def get_version(self, ref: str) -> VersionInfo:
        """One version."""
        path, version = _adapter(ref)
        return self._get(path, VersionInfo, version=version)

    def list_versions(self, name: str) -> tuple[VersionInfo, ...]:
        """All versions, newest first."""
        return self._get(f"{_adapter(name)[0]}/versions", Page[VersionInfo]).items

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
        path, _ = _adapter(info.name)
        files = {file.name: (file.sha256, file.size) for file in info.files}
        with FolderSink(out.expanduser().resolve()) as sink:
            self._download(f"{path}/files", files, sink, "pulling", progress, version=info.digest)
            sink.commit()
        return info

    def compatible(self, base: str, *, level: Level = Level.SHAPE) -> tuple[CompatibleAdapter, ...]:
        """Latest versions that fit a base."""
        return self._get(f"{_base(base)}/adapters", Page[CompatibleAdapter], level=level.value).items

    def bases_for(self, ref: str, *, level: Level = Level.SHAPE) -> tuple[BaseFit, ...]:
        """Registered bases that an adapter fits."""
        path, version = _adapter(ref)
        return self._get(f"{path}/bases", Page[BaseFit], version=version, level=level.value).items

    def check(self, adapter: str, base: str) -> Verdict:
        """The verdict for one pair."""
        refuse_path(adapter, "the adapter")
        refuse_path(base, "the base", base=True)
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
        probe: str | None = None,
        progress: Progress | None = None,
    ) -> CompositionInfo:
        """Run a job on the service and download what it made. An interrupt cancels the job.

        Raises UsageError for a text to probe: jobs compose from recipes alone.
        """
        if probe is not None:
            raise self._only_here("a text is probed")
        out = out.expanduser().resolve()
        earlier: dict[str, Any] | None = None
        if not replace and (out / RECORD).is_file():
            with suppress(TypedError):
                earlier = read_json(out / RECORD)
        with ExitStack() as stack:
            # Refuse a taken `out` before any work, unless it may turn out to be this very composition.
            sink = stack.enter_context(FolderSink(out, replace=replace)) if earlier is None else None
            job, result = self._run(refuse_paths(recipe), progress)
            files = _outputs(result)
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
        """Not over REST: the weights of both would have to come here first."""
        raise self._only_here("a LoRA is extracted")

    def make_delta(self, finetune: str, base: str, out: Path, *, progress: Progress | None = None) -> DeltaInfo:
        """Not over REST, as `extract`."""
        raise self._only_here("a delta is made")

    def restore_delta(self, ref: str, base: str, out: Path, *, progress: Progress | None = None) -> DeltaInfo:
        """Not over REST, as `extract`."""
        raise self._only_here("a checkpoint is restored")

    def _only_here(self, what: str) -> UsageError:
        return UsageError(
            f"{what} where the checkpoints lie",
            expected="a registry on this machine",
            found=self.url,
            remedy="leave --url out and give folders; publish and pull adapters with --url",
        )

    def resize(self, ref: str, out: Path, *, rank: int | None = None, energy: float | None = None) -> ConversionInfo:
        """A folder as it is, a name after it was pulled; the work is done here."""
        from registry.services.conversions import resize_folder

        if is_path(ref):
            return resize_folder(Path(ref).expanduser(), out, rank, energy)
        with tempfile.TemporaryDirectory() as folder:
            info = self.pull(ref, Path(folder) / "adapter")
            known = {
                "adapter": {"ref": f"{info.name}@{info.version}", "digest": info.digest},
                "base": {"fingerprint": info.base_fingerprint},
            }
            return resize_folder(Path(folder) / "adapter", out, rank, energy, known)

    def inspect(self, ref: str) -> dict[str, Any]:
        """A folder is inspected here; a name on the service, where bases come first."""
        if is_path(ref):
            from registry.services.inspection import inspect_folder

            return inspect_folder(Path(ref).expanduser())
        if "/" not in ref and "@" not in ref:
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

    def _run(self, recipe: Recipe, progress: Progress | None) -> tuple[JobInfo, CompositionInfo]:
        job = self._read(self._send("POST", "/compositions", json=recipe.model_dump(mode="json")), JobInfo)
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
        if job.result is not None:
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
    return f"/bases/{_segment(refuse_path(ref, 'the base', base=True))}"


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
