"""Snapshots as the Hub's JSON.

A file is large from 10 MiB on: it is known by its sha256 ("lfs"), a small one by the id that git gives its bytes.
Tags are the card's, and what the catalogue knows: base_model:X, base_model:adapter:X, base_hash:wf1:…, kind:lora.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Any

from composer.errors import CorruptFileError
from composer.files import git_oid
from registry.claims import MAX_CARD_BYTES, split_card
from registry.schemas import BaseInfo, FileInfo, VersionInfo
from registry.services.repositories import Repositories, Snapshot

__all__ = ["LARGE", "describe", "directory", "entry", "entry_oid", "model", "tags_of"]

LARGE = 10 << 20
MAX_OIDS = 1 << 16
SMALL_OIDS: dict[str, str] = {}  # git's id of a file by its sha256: the one follows from the other
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


def time(value: datetime | None) -> str | None:
    """As clients parse it: with milliseconds, in UTC."""
    return value and value.strftime("%Y-%m-%dT%H:%M:%S.") + f"{value.microsecond // 1000:03d}Z"


def describe(repositories: Repositories, snapshot: Snapshot) -> dict[str, Any]:
    """All about a repository at one revision: what clients call ModelInfo."""
    card = _card(repositories, snapshot)
    siblings = [
        {"rfilename": name, **_sizes(repositories, snapshot, file)} for name, file in sorted(snapshot.files.items())
    ]
    noun = snapshot.version or snapshot.base
    info = model(
        snapshot.repository, snapshot.commit, snapshot.created_at, noun,
        private=snapshot.private, downloads=snapshot.downloads,
    )  # fmt: skip
    return {**info, "cardData": card or None, "siblings": siblings}


def model(
    repository: str,
    commit: str | None,
    changed: datetime | None,
    noun: VersionInfo | BaseInfo | None,
    *,
    private: bool,
    downloads: int,
) -> dict[str, Any]:
    """What a listing shows of a repository."""
    library = "peft" if isinstance(noun, VersionInfo) else "transformers" if noun else None
    return {
        "_id": hashlib.sha256(repository.encode()).hexdigest()[:24],
        "id": repository,
        "modelId": repository,
        "author": repository.partition("/")[0] if "/" in repository else None,
        "sha": commit,
        "lastModified": time(changed),
        "createdAt": time(noun.created_at if noun else changed),
        "private": private,
        "gated": False,
        "disabled": False,
        "downloads": downloads,
        "likes": 0,
        "library_name": library,
        "tags": tags_of(noun),
    }


def tags_of(noun: VersionInfo | BaseInfo | None) -> list[str]:
    """What a stock client can filter by."""
    if isinstance(noun, VersionInfo):
        base = noun.base or noun.base_name
        found = [tag for tag in noun.tags if not tag.startswith("base_model:")]
        found += ["peft", "safetensors", f"kind:{noun.kind}"]
        found += [f"base_model:{base}", f"base_model:adapter:{base}"] if base else []
        found += [f"base_hash:{noun.base_fingerprint}"] if noun.base_fingerprint else []
        found += [f"license:{noun.license.lower()}"] if noun.license else []
    elif isinstance(noun, BaseInfo):
        found = ["transformers", "safetensors", f"hash:{noun.fingerprint}"]
        if noun.parent:
            found += [f"base_model:{noun.parent}", f"base_model:{noun.relation}:{noun.parent}"]
    else:
        found = []
    return list(dict.fromkeys(found))


def entry(repositories: Repositories, snapshot: Snapshot, file: FileInfo) -> dict[str, Any]:
    """One file of a tree."""
    sizes = _sizes(repositories, snapshot, file)
    large = {"lfs": {"oid": file.sha256, **sizes["lfs"]}} if "lfs" in sizes else {}
    return {"type": "file", "path": file.name, "size": file.size, "oid": sizes["blobId"], **large}


def directory(path: str) -> dict[str, Any]:
    """One folder of a tree; it has no bytes, so its id is made from its name."""
    return {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())}


def entry_oid(repositories: Repositories, snapshot: Snapshot, file: FileInfo) -> str:
    """What a client compares with its own file, and caches it by: sha256 of a large one, git's id of a small one."""
    if file.size >= LARGE:
        return file.sha256
    if (known := SMALL_OIDS.get(file.sha256)) is None:
        known = SMALL_OIDS[file.sha256] = git_oid(repositories.read(snapshot, file.name))
        if len(SMALL_OIDS) > MAX_OIDS:
            SMALL_OIDS.pop(next(iter(SMALL_OIDS)), None)
    return known


def _sizes(repositories: Repositories, snapshot: Snapshot, file: FileInfo) -> dict[str, Any]:
    if file.size < LARGE:
        return {"size": file.size, "blobId": entry_oid(repositories, snapshot, file)}
    pointer = POINTER.format(file.sha256, file.size).encode()
    lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": len(pointer)}
    return {"size": file.size, "blobId": git_oid(pointer), "lfs": lfs}


def _card(repositories: Repositories, snapshot: Snapshot) -> dict[str, Any]:
    """The front matter of README.md, with the base by the name that it has here; of one that is no YAML, nothing."""
    if "README.md" not in snapshot.files:
        return {}
    text = repositories.read(snapshot, "README.md")[:MAX_CARD_BYTES].decode("utf-8", "replace")
    try:
        fields, _ = split_card(text)
    except CorruptFileError:
        return {}
    if snapshot.version and snapshot.version.base:
        fields["base_model"] = snapshot.version.base
    found: dict[str, Any] = json.loads(json.dumps(fields, default=str))  # YAML has dates
    return found
