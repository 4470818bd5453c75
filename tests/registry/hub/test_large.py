"""Files of 10 MiB and more: by Xet where clients have it, by LFS where they opted out, in bounded memory."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from registry.access import Scope
from registry.api.app import create_app
from registry.services.jobs import JobService
from registry.services.local import open_registry
from registry.store.xorbs import xorb_hash
from tests.registry.hub.conftest import Hub, serve
from tests.support import write_base

MIB = 1 << 20


def model(folder: Path, seed: int) -> Path:
    """A base of 64 MiB: random halves, float32 of few digits, zeros, so that every way to compress is used."""
    random = np.random.default_rng(seed)
    tensors = {
        "random": random.integers(0, 1 << 15, (12 * MIB,), np.uint16).view(np.float16),
        "coarse": (random.integers(-128, 128, (6 * MIB,)) / 64).astype(np.float32),
        "zero": np.zeros(4 * MIB, np.float32),
    }
    return write_base(folder, {name: np.nan_to_num(array) for name, array in tensors.items()})


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Hub]:
    """A service over an empty registry."""
    yield from serve(tmp_path / "home", tmp_path / "clients")


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_a_large_file_arrives_whole_and_memory_is_bounded(fresh: Hub, tmp_path: Path, xet: bool) -> None:
    """What is downloaded is what was pushed, a second push sends nothing, and no file is ever whole in memory."""
    folder = model(tmp_path / "model", 1)
    found = fresh.client("push_large", "lab/large", folder, **({} if xet else {"HF_HUB_DISABLE_XET": "1"}))
    assert (found["same"], found["large"]) == (True, ["model.safetensors"])
    assert len(set(found["oid"])) == 1
    assert (fresh.home / "store" / "xorbs").is_dir() == xet
    assert fresh.peak_bytes() < 200 * MIB
    registry = open_registry(fresh.home)
    assert registry.get_base("lab/large").nbytes == 64 * MIB
    registry.close()


@pytest.fixture
def api(registry: Any) -> Iterator[TestClient]:
    """The service in process, with the repository lab/model."""
    with TestClient(create_app(registry, JobService(registry)), raise_server_exceptions=False) as opened:
        assert opened.post("/api/repos/create", json={"organization": "lab", "name": "model"}).status_code == 200
        yield opened


def refused(response: Any, status: int) -> str:
    """The message of a refusal, the same in header and body."""
    assert response.status_code == status, response.text
    assert response.json()["error"] == response.headers["x-error-message"]
    return str(response.headers["x-error-message"])


def stored(registry: Any) -> list[Path]:
    """What lies in the store, half-written files included."""
    return [path for path in (registry.home / "store").rglob("*") if path.is_file()]


def lfs_url(api: TestClient, data: bytes, size: int | None = None) -> str:
    """Where an object may be put."""
    body = {"operation": "upload", "objects": [{"oid": hashlib.sha256(data).hexdigest(), "size": size or len(data)}]}
    [item] = api.post("/lab/model.git/info/lfs/objects/batch", json=body).json()["objects"]
    return str(item["actions"]["upload"]["href"])


def test_an_upload_needs_its_own_signed_url_and_its_own_bytes(api: TestClient, registry: Any) -> None:
    """A URL is good for one object; other bytes, fewer, more, or another object's address leave nothing behind."""
    data = b"the bytes"
    url = lfs_url(api, data)
    refused(api.put(url.replace("signature=", "signature=0"), content=data), 403)
    refused(api.put(url.replace("size=9", "size=10"), content=data + b"!"), 403)
    refused(api.put(url.replace(hashlib.sha256(data).hexdigest(), "0" * 64), content=data), 403)
    refused(api.put(url.replace("expires=", "expires=1"), content=data), 403)
    refused(api.put(url, content=b"the bytez"), 422)
    refused(api.put(url, content=b"the"), 422)
    refused(api.put(url, content=data * 2), 413)
    assert stored(registry) == []
    assert api.put(url, content=data).status_code == 200
    assert [path.read_bytes() for path in stored(registry)] == [data]


def test_a_commit_cannot_name_bytes_that_are_not_here(api: TestClient) -> None:
    """An lfsFile is a blob of the store; lines that cannot be read, or odd paths, are refused before anything moves."""
    before = api.get("/api/models/lab/model").json()["sha"]
    for line, status in (
        ({"key": "lfsFile", "value": {"path": "model.safetensors", "oid": "0" * 64}}, 422),
        ({"key": "lfsFile", "value": {"path": "model.safetensors", "oid": "../../etc"}}, 400),
        ({"key": "file", "value": {"path": "../up", "content": "AA=="}}, 400),
        ({"key": "file", "value": {"path": "a", "content": "A", "encoding": "base64"}}, 400),
        ({"key": "file", "value": {"path": "model.pt", "content": "AA=="}}, 403),
        ({"key": "deletedFile", "value": {"path": "a"}}, 404),
        ({"key": "unknown", "value": {}}, 400),
    ):
        refused(api.post("/api/models/lab/model/commit/main", content=json.dumps(line)), status)
    refused(api.post("/api/models/lab/model/commit/main", content=b"{" * (16 << 20)), 413)
    refused(api.post("/api/models/lab/model/commit/nowhere", content=b""), 404)
    assert api.get("/api/models/lab/model").json()["sha"] == before


def xorb(*chunks: bytes) -> bytes:
    """Chunks as they are, in a xorb."""
    return b"".join(b"\0" + len(c).to_bytes(3, "little") + b"\0" + len(c).to_bytes(3, "little") + c for c in chunks)


def shard(data: bytes, name: str, size: int, start: int, stop: int) -> bytes:
    """A shard of one file of one segment."""
    words = struct.pack("<IIII", 0, size, start, stop)
    file = bytes(32) + struct.pack("<II", 1 << 30, 1) + bytes(8)
    digest = hashlib.sha256(data).digest()
    turned = b"".join(digest[i : i + 8][::-1] for i in range(0, 32, 8))
    swapped = b"".join(bytes.fromhex(name)[i : i + 8][::-1] for i in range(0, 32, 8))
    return bytes(48) + file + swapped + words + turned + bytes(16) + b"\xff" * 32 + bytes(16)


def test_xorbs_and_shards_are_checked_before_they_are_kept(api: TestClient, registry: Any) -> None:
    """A xorb must have its hash and a file its sha256; every mutation is a typed refusal, and leaves nothing behind."""
    token = api.get("/api/models/lab/model/xet-write-token/main").json()["accessToken"]
    headers = {"Authorization": f"Bearer {token}"}
    body = xorb(b"hello ", b"world")
    refused(api.post(f"/xet/v1/xorbs/default/{'0' * 64}", content=body), 403)
    refused(api.post("/xet/v1/shards", content=b"", headers={"Authorization": "Bearer 9999999999.0"}), 403)
    found = refused(api.post(f"/xet/v1/xorbs/default/{'0' * 64}", content=body, headers=headers), 422)
    assert "not those of the xorb" in found
    name = xorb_hash(io.BytesIO(body))
    broken = [body[:-1], b"", b"\1" + body[1:], body[:4] + b"\1" + body[5:], body[:4] + b"\7" + body[5:], b"\0" * 8]
    for mutant in broken:
        refused(api.post(f"/xet/v1/xorbs/default/{name}", content=mutant, headers=headers), 422)
    refused(api.post("/xet/v1/xorbs/default/zz", content=body, headers=headers), 400)
    assert stored(registry) == []
    assert api.post(f"/xet/v1/xorbs/default/{name}", content=body, headers=headers).json() == {"was_inserted": True}
    good = shard(b"hello world", name, 11, 0, 2)
    for mutant, status in (
        (shard(b"hello there", name, 11, 0, 2), 422),
        (shard(b"hello world", name, 12, 0, 2), 422),
        (shard(b"hello world", name, 11, 0, 3), 422),
        (shard(b"hello world", name, 11, 2, 1), 422),
        (shard(b"hello world", "1" * 64, 11, 0, 2), 404),
        (good[:100], 422),
        (b"", 422),
    ):
        refused(api.post("/xet/v1/shards", content=mutant, headers=headers), status)
    assert len(stored(registry)) == 1
    assert api.post("/xet/v1/shards", content=good, headers=headers).json() == {"result": 1}
    assert registry.store.path(hashlib.sha256(b"hello world").hexdigest()).read_bytes() == b"hello world"


def test_the_bytes_of_a_xorb_are_kept_once(api: TestClient, registry: Any) -> None:
    """Once its chunks lie in a blob the xorb goes, and still makes other files; without that blob it is not here."""
    token = api.get("/api/models/lab/model/xet-write-token/main").json()["accessToken"]
    headers = {"Authorization": f"Bearer {token}"}
    chunks = (b"hello ", b"world", b"!" * 9)
    body = xorb(*chunks)
    name = xorb_hash(io.BytesIO(body))
    place = registry.layout.xorb(name)

    def send(start: int, stop: int) -> Any:
        data = b"".join(chunks[start:stop])
        return api.post("/xet/v1/shards", content=shard(data, name, len(data), start, stop), headers=headers)

    api.post(f"/xet/v1/xorbs/default/{name}", content=body, headers=headers)
    assert send(0, 2).status_code == 200
    assert place.is_file()  # its last chunk lies nowhere else
    assert send(0, 3).status_code == 200
    assert not place.is_file()
    assert send(1, 3).status_code == 200
    last = registry.store.path(hashlib.sha256(b"".join(chunks[1:])).hexdigest())
    assert last.read_bytes() == b"".join(chunks[1:])
    api.post(f"/xet/v1/xorbs/default/{name}", content=body, headers=headers)
    assert not place.is_file()
    registry.collect(grace_days=0)
    assert stored(registry) == []
    assert "HF_XET_CACHE" in refused(send(0, 1), 404)


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_behind_tokens_large_files_are_pushed_too(registry: Any, tmp_path: Path, xet: bool) -> None:
    """The bytes carry no token of ours, only what was signed for its holder."""
    folder = write_base(tmp_path / "model", {"weight": np.ones((3 * MIB,), np.float32)})
    token = registry.create_token("t", subject="lab", scopes=(Scope.PUBLISH,)).token
    registry.close()
    for served in serve(registry.home, tmp_path / "clients", "--require-tokens"):
        words = {"HF_TOKEN": token, **({} if xet else {"HF_HUB_DISABLE_XET": "1"})}
        found = served.client("push_large", "lab/large", folder, **words)
        assert (found["same"], found["large"]) == (True, ["model.safetensors"])


def test_a_digest_alone_opens_no_file(registry: Any, tmp_path: Path) -> None:
    """Who knows the sha256 of a private file, or the hash of another's xorb, can neither name it nor learn that it is here."""
    app = create_app(registry, JobService(registry), authenticators=(registry.authenticator(),))
    service = TestClient(app, raise_server_exceptions=False)
    alice, bob = (
        {"Authorization": f"Bearer {registry.create_token('t', subject=name, scopes=(Scope.PUBLISH,)).token}"}
        for name in ("alice", "bob")
    )
    data = b"a secret"
    sha256 = hashlib.sha256(data).hexdigest()
    name = xorb_hash(io.BytesIO(xorb(data)))

    def write(who: dict[str, str], repository: str) -> int:
        line = json.dumps({"key": "lfsFile", "value": {"path": "notes.md", "oid": sha256}})
        return service.post(f"/api/models/{repository}/commit/main", content=line, headers=who).status_code

    def actions(who: dict[str, str], repository: str) -> Any:
        body = {"operation": "upload", "objects": [{"oid": sha256, "size": len(data)}]}
        url = f"/{repository}.git/info/lfs/objects/batch"
        return service.post(url, json=body, headers=who).json()["objects"][0].get("actions")

    def xet(who: dict[str, str], repository: str, data: bytes = data) -> int:
        answer = service.get(f"/api/models/{repository}/xet-write-token/main", headers=who).json()
        headers = {"Authorization": f"Bearer {answer['accessToken']}"}
        return service.post("/xet/v1/shards", content=shard(data, name, len(data), 0, 1), headers=headers).status_code

    for who, repository in ((alice, "alice/x"), (bob, "bob/x")):
        namespace, short = repository.split("/")
        body = {"organization": namespace, "name": short, "private": True}
        assert service.post("/api/repos/create", json=body, headers=who).status_code == 200
    answer = service.get("/api/models/alice/x/xet-write-token/main", headers=alice).json()
    headers = {"Authorization": f"Bearer {answer['accessToken']}"}
    service.post(f"/xet/v1/xorbs/default/{name}", content=xorb(data), headers=headers)
    assert xet(alice, "alice/x") == 200
    assert (actions(alice, "alice/x"), write(alice, "alice/x")) == (None, 200)
    assert xet(bob, "bob/x") == 404
    offered = actions(bob, "bob/x")
    assert write(bob, "bob/x") == 422
    assert service.put(offered["upload"]["href"], content=b"no secret").status_code in (413, 422)
    assert write(bob, "bob/x") == 422
    assert service.put(offered["upload"]["href"], content=data).status_code == 200
    assert (actions(bob, "bob/x"), write(bob, "bob/x")) == (None, 200)
    carol = {"Authorization": f"Bearer {registry.create_token('t', subject='carol', scopes=(Scope.PUBLISH,)).token}"}
    service.post("/api/repos/create", json={"name": "x"}, headers=carol)
    assert write(carol, "carol/x") == 422
    service.put("/api/models/alice/x/settings", json={"private": False}, headers=alice)
    assert write(carol, "carol/x") == 200
