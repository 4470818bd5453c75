"""`registry verify --all` names the one damaged file among all that is stored; `doctor --repair` restores what it can."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from blake3 import blake3
from fastapi.testclient import TestClient

from cli.main import cli
from composer.errors import CorruptFileError, NotFoundError
from composer.recipe import parse_recipe
from registry.access import Principal, Scope
from registry.api.app import create_app
from registry.errors import ForbiddenError
from registry.schemas import Damage, StoreCheck
from registry.services.integrity import RESENT
from registry.services.jobs import JobService
from registry.services.local import LocalRegistry
from registry.store.chunks import CHUNK
from registry.store.shards import Segment, ShardFile, assemble, release
from registry.store.xorbs import LEAF_KEY, XorbStore, hash_text, xorb_hash
from tests.support import flip, write_base, write_lora

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def stocked(registry: LocalRegistry, tmp_path: Path) -> LocalRegistry:
    """One of each: a base twice on the disk, an adapter, a job's composition, a xorb with its file, a graph, a list."""
    random = np.random.default_rng(0)
    tensors = {f"model.{name}.weight": random.normal(size=(1024, 768)).astype(np.float16) for name in "qk"}
    base = write_base(tmp_path / "base", tensors)
    registry.add_base(base, name="tiny")
    lora = write_lora(tmp_path / "lora", {"model.q": (1024, 768)}, rank=256)
    registry.publish(lora, name="team/x", base="tiny")
    jobs = JobService(registry, slots=1)
    jobs.start()
    job = jobs.submit(parse_recipe("tiny+team/x:0.5"))
    while jobs.get(job.id).state.value in ("queued", "running"):
        pass
    jobs.stop()
    assert jobs.get(job.id).state.value == "succeeded"
    _add_xorb(registry)
    _add_graph(registry)
    return registry


def xorb_chunk(data: bytes) -> bytes:
    """A chunk as it lies in a xorb, uncompressed."""
    length = len(data).to_bytes(3, "little")
    return bytes(1) + length + bytes(1) + length + data


def _add_xorb(registry: LocalRegistry) -> None:
    """A file of three chunks that came by Xet; and a xorb of which no file has all chunks, so that it is kept."""
    xorbs, names = XorbStore(registry.layout), []
    for first in (1, 4):
        chunks = [np.random.default_rng(first + index).bytes(size) for index, size in enumerate((70_000, 1, 90_000))]
        body = b"".join(map(xorb_chunk, chunks))
        names.append(xorb_hash(io.BytesIO(body)))
        with xorbs.receive(names[-1]) as file:
            file.write(body)
        data = b"".join(chunks[: 3 if first == 1 else 2])
        segment = Segment(names[-1], len(data), 0, 3 if first == 1 else 2)
        shard = ShardFile(hashlib.sha256(data).hexdigest(), (segment,))
        assemble(shard, xorbs, registry.store, 1 << 30)
        release([shard], xorbs)


def _add_graph(registry: LocalRegistry) -> None:
    import onnx

    from composer.exporters.onnx import graph_cache

    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    graph_cache.store(registry.layout.graphs, "a" * 64, model)


def one(folder: Path, pattern: str) -> Path:
    """The only file of a folder."""
    (path,) = folder.glob(pattern)
    return path


PLACES: dict[str, Callable[[LocalRegistry, Path], Path]] = {
    "blob": lambda registry, _: registry.store.path(
        {f.name: f.sha256 for f in registry.get_version("team/x").files}[WEIGHTS]
    ),
    "base": lambda _, folder: folder / "base" / "model.safetensors",
    "composition": lambda registry, _: one(registry.layout.compositions, "*/model.safetensors"),
    "record": lambda registry, _: one(registry.layout.compositions, "*/composition.json"),
    "xorb": lambda registry, _: one(registry.layout.xorbs, "*/" + "?" * 64),
    "xorb-places": lambda registry, _: one(registry.layout.xorbs, "*/*.places"),
    "graph": lambda registry, _: one(registry.layout.graphs, "*.onnx"),
    "list": lambda registry, _: next(iter(sorted(registry.layout.chunks.glob("*/*")))),
}
RESTORED = {
    "composition": "its recipe, composed again to the same bytes",
    "record": "the database",
    "xorb": RESENT,
    "xorb-places": RESENT,
    "graph": "dropped: it is made again when it is needed",
    "list": "dropped: it is made again when it is needed",
}


def only(check: StoreCheck) -> Damage:
    """The one damaged file."""
    (damage,) = check.damaged
    return damage


def test_every_kind_of_file_is_found_damaged_alone_and_restored_where_a_copy_is_left(
    stocked: LocalRegistry, tmp_path: Path
) -> None:
    """One flipped byte at a time, its times put back; then all is whole again, byte for byte."""
    whole = stocked.verify_store()
    assert whole.damaged == ()
    assert whole.files >= 12
    for name, place in PLACES.items():
        path = place(stocked, tmp_path)
        original, at = path.read_bytes(), path.stat().st_size * 2 // 3
        flip(path, at)
        damage = only(stocked.verify_store())
        kind = "composition" if name == "record" else name.partition("-")[0]
        assert (damage.kind, damage.path) == (kind, str(path))
        if name != "list":
            assert damage.restored is None
            damage = only(stocked.verify_store(repair=True))
        assert damage.restored == RESTORED.get(name), name
        if name in RESTORED:
            assert stocked.verify_store().damaged == ()
            assert damage.restored.startswith("dropped") or path.read_bytes() == original
        else:
            assert damage.remedy
            flip(path, at)
    assert stocked.audit(target=str(stocked.home)).items[0].action == "repair"


def test_the_damaged_bytes_are_told_by_tensor_and_by_user(stocked: LocalRegistry, tmp_path: Path) -> None:
    """A flip in lora_B names that tensor alone, its MiB, and the version that would be wrong."""
    from composer.tensors import read_header

    path = PLACES["blob"](stocked, tmp_path)
    stocked.store.path(path.name, verify=True)
    spec = max(read_header(path).tensors.values(), key=lambda spec: spec.offset)
    at = spec.offset + spec.nbytes - 5
    flip(path, at)
    damage = only(stocked.verify_store())
    assert damage.tensors == (spec.name,)
    assert damage.used_by == (f"team/x@0.1.0: {WEIGHTS}",)
    assert f"{at // CHUNK * CHUNK}-" in damage.found


@pytest.mark.parametrize("loss", ["flipped", "missing"])
def test_a_base_is_restored_from_another_copy_and_a_blob_from_a_base(
    stocked: LocalRegistry, tmp_path: Path, loss: str
) -> None:
    """The same bytes under any name are a copy: what was composed at weight 0 holds the base's own shard."""
    weights = tmp_path / "base" / "model.safetensors"
    original, times = weights.read_bytes(), weights.stat().st_mtime_ns
    stocked.store.put(weights)
    if loss == "missing":
        weights.unlink()
    else:
        flip(weights, 777)
    assert only(stocked.verify_store(repair=True)).restored == f"blob {stocked.store.put(weights)[0]}"
    assert (weights.read_bytes(), weights.stat().st_mtime_ns) == (original, times)
    blob = stocked.store.path(stocked.store.put(weights)[0])
    flip(blob, 1 << 20)
    assert only(stocked.verify_store(repair=True)).restored == "base tiny/model.safetensors"
    assert stocked.verify_store().damaged == ()


def test_a_copy_that_is_damaged_too_is_not_taken_for_one(stocked: LocalRegistry, tmp_path: Path) -> None:
    """Both are reported, and neither is written over the other."""
    weights = tmp_path / "base" / "model.safetensors"
    blob = stocked.store.path(stocked.store.put(weights)[0])
    flip(weights, 777)
    flip(blob, 999)
    found = stocked.verify_store(repair=True)
    assert sorted((item.kind, item.restored) for item in found.damaged) == [("base", None), ("blob", None)]


def test_a_xet_read_of_a_flipped_xorb_is_refused(stocked: LocalRegistry, tmp_path: Path) -> None:
    """A file that is put together of it does not have its sha256, and does not become a blob."""
    xorbs = XorbStore(stocked.layout)
    for place in ("xorb", "xorb-places"):
        path = PLACES[place](stocked, tmp_path)
        whole = b"".join(xorbs.chunks(path.stem, 0, 2))
        shard = ShardFile(hashlib.sha256(whole).hexdigest(), (Segment(path.stem, len(whole), 0, 2),))
        flip(path, path.read_bytes().index(b",70000") + 1 if place == "xorb-places" else 5_000)
        stocked.layout.blob(shard.sha256).unlink(missing_ok=True)
        with pytest.raises((CorruptFileError, NotFoundError)):
            assemble(shard, xorbs, stocked.store, 1 << 30)
        assert not stocked.layout.blob(shard.sha256).exists()


@pytest.mark.parametrize(
    "content", [b"", b"[", b"7", b"[7]", b'[["a", 1, 2]]', b"[[1, 2]]", b'[["' + b"a" * 64 + b'", -1, 2]]']
)
def test_places_that_are_none_are_no_xorb(stocked: LocalRegistry, tmp_path: Path, content: bytes) -> None:
    """Whoever reads them is told that the xorb is not here, and gc removes them."""
    path = PLACES["xorb-places"](stocked, tmp_path)
    path.write_bytes(content)
    with pytest.raises(NotFoundError):
        list(XorbStore(stocked.layout).chunks(path.stem, 0, 1))
    stocked.collect(grace_days=0)
    assert not path.exists()


def test_verify_and_repair_on_the_command_line_and_over_rest(
    stocked: LocalRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit codes 0 and 5, JSON as the schema says; a service does the same for an admin only."""

    def run(*words: str) -> tuple[int, Any]:
        with pytest.raises(SystemExit) as caught:
            cli.main([*words, "--format", "json"])
        return int(caught.value.code or 0), json.loads(capsys.readouterr().out)

    assert run("verify", "--all")[0] == 0
    path = PLACES["composition"](stocked, tmp_path)
    flip(path, 3_000)
    code, found = run("verify", "--all")
    assert (code, [item["path"] for item in found["damaged"]]) == (5, [str(path)])
    code, found = run("doctor", "--repair")
    assert (code, found["damaged"][0]["restored"]) == (0, RESTORED["composition"])
    with pytest.raises(SystemExit):
        cli.main(["verify", "--all"])
    assert "all as they were stored" in capsys.readouterr().out
    flip(path, 3_000)
    client = TestClient(create_app(stocked, JobService(stocked)), base_url="http://127.0.0.1")
    answer = client.post("/api/v1/store/checks", params={"repair": True})
    assert answer.json()["damaged"][0]["restored"] == RESTORED["composition"]
    reader = stocked.acting_as(Principal(subject="eve", scopes=frozenset({Scope.READ})))
    with pytest.raises(ForbiddenError):
        reader.verify_store()


def test_the_hash_of_one_chunk_is_the_formats(stocked: LocalRegistry) -> None:
    """Of a xorb with a single chunk the hash is that chunk's own: the writer of the fixture is right."""

    assert xorb_hash(io.BytesIO(xorb_chunk(b"hello"))) == hash_text(blake3(b"hello", key=LEAF_KEY).digest())


CHANGES = {
    "team/x@1.0.0": "UPDATE version_files SET sha256 = replace(sha256, substr(sha256, 1, 1), 'g') WHERE name LIKE '%.json'",
    "tiny": "UPDATE base_models SET tensor_root = replace(tensor_root, substr(tensor_root, 1, 1), 'g')",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_entry_of_the_catalogue_is_named(registry: LocalRegistry, tmp_path: Path, name: str) -> None:
    """What the database says of a version's files and of a base is held against their own digests."""
    base = write_base(tmp_path / "base", {"model.q.weight": np.ones((8, 8), np.float32)})
    registry.add_base(base, name="tiny")
    lora = write_lora(tmp_path / "lora", {"model.q": (8, 8)}, rank=2)
    registry.publish(lora, name="team/x", version="1.0.0", base="tiny")
    assert registry.verify_store().damaged == ()
    with registry.engine.execution_options(writes=True).begin() as connection:
        assert connection.execute(sa.text(CHANGES[name])).rowcount == 1
    found = [item for item in registry.verify_store(repair=True).damaged if item.kind == "entry"]
    assert [item.name for item in found] == [name]
    assert found[0].restored is None
    assert found[0].remedy


def test_a_damaged_page_of_the_database_is_named(registry: LocalRegistry, tmp_path: Path) -> None:
    """An index that lacks what its table has, as after a lost page."""
    base = write_base(tmp_path / "base", {"model.q.weight": np.ones((8, 8), np.float32)})
    registry.add_base(base, name="tiny")
    if registry.engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL has checksums of its own")
    with registry.engine.execution_options(writes=True).begin() as connection:
        connection.exec_driver_sql("PRAGMA writable_schema = ON")
        wider = "UPDATE sqlite_schema SET sql = replace(sql, '(digest)', '(digest, name)') WHERE name = ?"
        assert connection.exec_driver_sql(wider, ("ix_base_tensors_digest",)).rowcount == 1
        connection.exec_driver_sql("PRAGMA writable_schema = RESET")
    registry.engine.dispose()
    assert {item.kind for item in registry.verify_store().damaged} == {"database"}
