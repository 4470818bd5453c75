"""``hf://org/name[@revision]``: an adapter or a base of a hub becomes one of this registry.

    describe the revision -> choose files, check names and sizes -> download, going on where one ended -> check sha256
    -> publish the adapter, or keep the files and register the base

The hub is HF_ENDPOINT, its token HF_TOKEN. Nothing that is no weight, config, card, licence or tokenizer is fetched,
and no pickle. What was fetched waits under REGISTRY_HOME/imports until it is whole.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from composer.admission import left_out, refuse_pickles, unsafe_kind
from composer.errors import CorruptFileError, NotFoundError, PolicyError, StorageError, UsageError
from composer.files import FileSet, git_oid, sha256_file
from composer.sinks import fsync_tree, storage_errors
from registry.errors import ForbiddenError, HubUnreachableError
from registry.interface import DEFAULT_MAX_BYTES, Progress
from registry.pushes import CONFIG
from registry.schemas import ImportInfo
from registry.services.publishing import Publishing
from registry.store.layout import Layout

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["HubReference", "ImportRules", "Importing", "hub_reference"]

ATTEMPTS = 5
CHUNK = 1 << 20
PART = ".part"
SLACK = 64 << 20  # for what describes the files
MAX_FILES = 1000
REFERENCE = re.compile(r"hf://((?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(?:@([^@\s]+))?")
WANTED = re.compile(r"[^/]+\.(safetensors|json|jinja|model|tiktoken)|(README|LICENSE|NOTICE)[^/]*|(vocab|merges)\.txt")


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository of a hub, and a revision of it."""

    repository: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class _Remote:
    """One file to fetch, known by its sha256 where it is large and by git's id of it where it is not."""

    name: str
    size: int
    digest: str

    def digest_of(self, path: Path) -> str:
        """The same digest of a file that arrived."""
        return sha256_file(path) if len(self.digest) == 64 else git_oid(path.read_bytes())


@dataclass(frozen=True, slots=True)
class ImportRules:
    """What a service fetches when somebody asks it to.

    token: with the service's own HF_TOKEN, so that whoever may publish here can read what it reads there.
    private: from private addresses too. max_bytes: of one import.
    """

    allowed: bool = True
    token: bool = False
    private: bool = False
    max_bytes: int = DEFAULT_MAX_BYTES

    def check(self, max_bytes: int, allow_private: bool) -> None:
        """Raise PolicyError for an import that is not to be."""
        for fine, what, remedy in (
            (self.allowed, "this service imports nothing", "start it with another --imports than off"),
            (self.private or not allow_private, "this service imports from public addresses only",
             "leave --allow-private out, or start it with --imports-from-private"),
            (max_bytes <= self.max_bytes, f"this service imports at most {self.max_bytes} bytes", "lower --max-bytes"),
        ):  # fmt: skip
            if not fine:
                raise PolicyError(what, found=max_bytes if "bytes" in remedy else None, remedy=remedy)


def hub_reference(text: str) -> HubReference:
    """Parse ``hf://org/name[@revision]``. Raises UsageError."""
    match = REFERENCE.fullmatch(text)
    if match is None or ".." in match[1]:
        raise UsageError(
            f"{text!r} is not a place on a hub",
            expected="hf://ORG/NAME or hf://ORG/NAME@REVISION",
            found=text,
            remedy="set HF_ENDPOINT for a hub other than huggingface.co",
        )
    return HubReference(match[1], match[2])


class Importing:
    """Fetches from hubs."""

    def __init__(self, layout: Layout, publishing: Publishing) -> None:
        self._layout = layout
        self._publishing = publishing

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
        token: bool = True,
        refused: str | None = None,
    ) -> ImportInfo:
        """Fetch `ref` and publish or register it, under its own name unless another is given.

        token: whether HF_TOKEN goes along. refused: "adapter" or "base" where that may not be the outcome.
        Raises NotFoundError, PolicyError (too large, a private address, a pickle), CorruptFileError, StorageError, and
        what publishing raises.
        """
        from registry.outbound import guarded_hub

        place = hub_reference(ref)
        name = name or place.repository
        with guarded_hub(max_bytes + SLACK, allow_private=allow_private), _hub_errors(place):
            from huggingface_hub import HfApi, is_offline_mode
            from huggingface_hub.errors import OfflineModeIsEnabled

            if is_offline_mode():
                raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
            api = HfApi(library_name="adapter-registry", token=None if token else False)
            commit, chosen, unsafe = _describe(api, place, max_bytes)
            folder = self._layout.imports / f"{place.repository.replace('/', '--')}@{commit}"
            _check_room(self._layout.home, sum(file.size for file in chosen))
            adapter = _is_adapter(file.name for file in chosen)
            if refused == ("adapter" if adapter else "base"):
                raise ForbiddenError(
                    f"{place.repository} is {'an adapter' if adapter else 'a base'}, which you may not make {name}",
                    expected="a role in the namespace for an adapter, a token without --namespace for a base",
                    found=refused,
                )
            files = _fetch(place, commit, chosen, folder, progress, token=token)
        source = f"hf://{place.repository}@{commit}"
        if adapter:
            publish = self._publishing.publish
            result = publish(files, name, version, base, None, (), None, None, progress, read_paths=False)
            shutil.rmtree(folder, ignore_errors=True)
            warnings = (*unsafe, *result.warnings)
            return ImportInfo(source=source, version=result.version, created=result.created, warnings=warnings)
        if version or base:
            raise UsageError(
                f"{place.repository} is a base, which has neither a version nor a base",
                expected="--name alone",
                found={"version": version, "base": base},
            )
        kept = self._keep(files)
        try:
            info = self._publishing.add_base(kept, name, None, None, None, progress)
        except BaseException:
            shutil.rmtree(kept.parent, ignore_errors=True)
            raise
        if Path(info.location) != kept:
            shutil.rmtree(kept.parent, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        return ImportInfo(source=source, base=info, created=info.created, warnings=(*unsafe, *info.warnings))

    def _keep(self, files: FileSet) -> Path:
        """The files in a folder of the registry's own, where a base stays."""
        folder = self._layout.uploads / uuid.uuid4().hex / "files"
        with storage_errors("keeping an import"):
            folder.mkdir(parents=True)
            for name, path in files.items():
                path.rename(folder / name)
            fsync_tree(folder.parent)
        return folder


def _is_adapter(names: Iterable[str]) -> bool:
    """What the files of these names make: an adapter, or a base."""
    found = set(names)
    return CONFIG in found or "config.json" not in found


def _describe(api: HfApi, place: HubReference, max_bytes: int) -> tuple[str, list[_Remote], list[str]]:
    """The commit of a revision, the files of it that are wanted, and a warning on those that are never kept."""
    info = api.model_info(place.repository, revision=place.revision, files_metadata=True)
    names = [item.rfilename for item in info.siblings or ()]
    chosen = [
        _Remote(item.rfilename, item.size or 0, item.lfs.sha256 if item.lfs else item.blob_id or "")
        for item in info.siblings or ()
        if WANTED.fullmatch(item.rfilename) and unsafe_kind(item.rfilename) is None
    ]
    if not any(file.name.endswith(".safetensors") for file in chosen):
        refuse_pickles(names, "safetensors")
        raise NotFoundError(
            f"{place.repository} holds no safetensors",
            expected="an adapter or a model in safetensors",
            found=names[:20],
        )
    size = sum(file.size for file in chosen)
    if size > max_bytes or len(chosen) > MAX_FILES:
        raise PolicyError(
            f"{place.repository} is larger than an import may be",
            expected=f"at most {max_bytes} bytes in {MAX_FILES} files",
            found=f"{size} bytes in {len(chosen)} files",
            remedy="raise --max-bytes",
        )
    return str(info.sha), chosen, left_out(names)


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StorageError(
            "the import does not fit on the disk", expected=f"{size} bytes", found=f"{free} bytes", remedy="make room"
        )


def _fetch(
    place: HubReference,
    commit: str,
    chosen: Sequence[_Remote],
    folder: Path,
    progress: Progress | None,
    *,
    token: bool,
) -> dict[str, Path]:
    """Download what is not there yet; a file that was begun goes on. Raises CorruptFileError for other bytes."""
    total = sum(file.size for file in chosen)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("downloading", done, total)

    with storage_errors("making room for an import"):
        folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Path] = {}
    for file in chosen:
        path = found[file.name] = folder / file.name
        if path.is_file():
            advance(file.size)
            continue
        part = folder / f"{file.name}{PART}"
        _download(place, commit, file.name, part, advance, token=token)
        size, digest = part.stat().st_size, file.digest_of(part)
        if (size, digest) != (file.size, file.digest):
            part.unlink()
            raise CorruptFileError(
                f"{file.name} arrived damaged", expected=file.digest, found=digest, remedy="import it again"
            )
        part.rename(path)
    return found


def _download(
    place: HubReference, commit: str, name: str, part: Path, advance: Callable[[int], None], *, token: bool
) -> None:
    """Append what `part` lacks of a file. A connection that breaks is made anew, ATTEMPTS times."""
    import httpx2
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url, own = hf_hub_url(place.repository, name, revision=commit), build_hf_headers(token=None if token else False)
    advance(part.stat().st_size if part.is_file() else 0)
    for attempt in range(ATTEMPTS):
        with storage_errors(f"storing {name}"), part.open("ab") as file:
            headers = {**own, "Accept-Encoding": "identity", "Range": f"bytes={file.tell()}-"}
            try:
                with get_session().stream("GET", url, headers=headers) as response:
                    if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                        return  # nothing is lacking
                    hf_raise_for_status(response)
                    if response.status_code != HTTPStatus.PARTIAL_CONTENT:
                        advance(-file.tell())
                        file.truncate(0)
                    for chunk in response.iter_bytes(CHUNK):
                        file.write(chunk)
                        advance(len(chunk))
                return
            except httpx2.TransportError:
                if attempt == ATTEMPTS - 1:
                    raise


@contextmanager
def _hub_errors(place: HubReference) -> Iterator[None]:
    """Failures of huggingface_hub as ours."""
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"

    def summary(error: Exception) -> str:
        return next(iter(str(error).splitlines()), "") or type(error).__name__

    try:
        yield
    except GatedRepoError as error:
        raise PolicyError(
            f"{place.repository} is gated on {where}",
            expected="access",
            found=str(error),
            remedy="ask its owner for it; a service needs --imports token to use it",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError) as error:
        raise NotFoundError(
            f"{where} has no {place.repository}" + (f" at {place.revision}" if place.revision else ""),
            expected="a repository that HF_TOKEN may read",
            found=error.server_message or type(error).__name__,
            remedy="check the name, HF_ENDPOINT and HF_TOKEN",
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx2.HTTPError) as error:
        raise HubUnreachableError(
            f"{where} did not answer as a hub does: {summary(error)}",
            expected="an answer",
            found=type(error).__name__,
            remedy="check HF_ENDPOINT and HF_HUB_OFFLINE, then import again: it goes on where it ended",
        ) from error
