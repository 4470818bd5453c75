"""One flipped byte in anything that is stored is caught on every path that reads it, whatever the file's times say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from composer.errors import IntegrityError
from composer.recipe import parse_recipe
from registry.api.app import create_app
from registry.errors import BlobCorruptError
from registry.services.jobs import JobService
from registry.services.local import LocalRegistry, open_registry
from registry.store.chunks import CHUNK, ChunkHasher
from registry.undo import undo
from tests.support import flip, write_base, write_lora

ROWS, COLUMNS, RANK = 1024, 768, 384
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Shelf:
    """A registry with a base of 3 MiB and an adapter of 2.6 MiB, a composition in a folder, and one of a job."""

    registry: LocalRegistry
    client: TestClient
    base: Path
    composed: Path
    job: str

    def blob(self, name: str) -> Path:
        """The stored file of the adapter."""
        (file,) = [file for file in self.registry.get_version("team/x").files if file.name == name]
        return self.registry.store.path(file.sha256)

    @property
    def output(self) -> Path:
        """Where the job's files lie."""
        return self.registry.layout.compositions / self.job

    def get(self, url: str, *spans: str) -> tuple[int, bytes, bool]:
        """(status, body, whether all of it came) of a download, or of a range of it."""
        answer = self.client.get(url, headers={"Range": f"bytes={','.join(spans)}"} if spans else {})
        announced = int(answer.headers.get("content-length", len(answer.content)))
        return answer.status_code, answer.content, len(answer.content) == announced


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    """The shelf that every test flips one byte of, and flips back."""
    folder = tmp_path_factory.mktemp("shelf")
    random = np.random.default_rng(0)
    tensors = {f"model.{name}.weight": random.normal(size=(ROWS, COLUMNS)).astype(np.float16) for name in "qk"}
    base = write_base(folder / "base", tensors)
    registry = open_registry(folder / "home")
    registry.add_base(base, name="tiny")
    lora = write_lora(folder / "lora", {"model.q": (ROWS, COLUMNS)}, rank=RANK)
    registry.publish(lora, name="team/x", base="tiny")
    recipe = parse_recipe("tiny+team/x:0.5")
    registry.compose(recipe, folder / "composed")
    jobs = JobService(registry, slots=1)
    client = TestClient(create_app(registry, jobs), base_url="http://127.0.0.1", raise_server_exceptions=False)
    with client:
        job = registry.submit(recipe)
        while (found := registry.get_job(job.id)).state.value in ("queued", "running"):
            pass
        assert found.state.value == "succeeded", found.error
        yield Shelf(registry, client, base, folder / "composed", job.id)
    registry.close()


@pytest.fixture
def flipped(pristine: Shelf) -> Iterator[Callable[[Path, int], None]]:
    """Flips a byte until the test ends."""
    done: list[tuple[Path, int]] = []

    def spoil(path: Path, at: int) -> None:
        flip(path, at)
        done.append((path, at))

    yield spoil
    for path, at in done:
        if path.exists():
            flip(path, at)


def read_paths(shelf: Shelf, out: Path) -> dict[str, Callable[[], Any]]:
    """Every way in which an adapter's weights leave the store."""
    recipe = parse_recipe("tiny+team/x:0.75")
    return {
        "pull": lambda: shelf.registry.pull("team/x", out),
        "compose": lambda: shelf.registry.compose(recipe, out),
        "check": lambda: shelf.registry.check("team/x", "tiny"),
        "plan": lambda: shelf.registry.plan(recipe),
        "resize": lambda: shelf.registry.resize("team/x", out, rank=2),
        "inspect": lambda: shelf.registry.inspect("team/x"),
    }


LOCAL = ("pull", "compose", "check", "plan", "resize", "inspect")
SPANS = [200, CHUNK - 1, CHUNK, CHUNK + 5, 2 * CHUNK + 77, -1]


@pytest.mark.parametrize("at", [9, CHUNK + 5, -1], ids=["header", "middle", "last"])
@pytest.mark.parametrize("path", LOCAL)
def test_a_flipped_byte_of_an_adapter_is_caught_by_every_reader(
    pristine: Shelf, flipped: Callable[[Path, int], None], tmp_path: Path, path: str, at: int
) -> None:
    """BlobCorruptError, and nothing is written."""
    blob = pristine.blob(WEIGHTS)
    flipped(blob, at % blob.stat().st_size)
    with pytest.raises(BlobCorruptError):
        read_paths(pristine, tmp_path / "out")[path]()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", LOCAL)
def test_the_same_readers_read_what_is_whole(pristine: Shelf, tmp_path: Path, path: str) -> None:
    """Or the test above would prove nothing."""
    read_paths(pristine, tmp_path / "out")[path]()


@pytest.mark.parametrize("at", [9, CHUNK + 5, -1], ids=["header", "middle", "last"])
@pytest.mark.parametrize("path", ["compose", "extract", "download"])
def test_a_flipped_byte_of_a_base_is_caught(
    pristine: Shelf, flipped: Callable[[Path, int], None], tmp_path: Path, path: str, at: int
) -> None:
    """Its size and times are as they were: only its bytes tell. What was composed of it does not appear."""
    weights = pristine.base / "model.safetensors"
    flipped(weights, at % weights.stat().st_size)
    out = tmp_path / "out"
    if path == "download":
        status, _, whole = pristine.get("/tiny/resolve/main/model.safetensors")
        assert status != 200 or not whole
        return
    readers = {
        "compose": lambda: pristine.registry.compose(parse_recipe("tiny+team/x:0.25"), out),
        "extract": lambda: pristine.registry.extract(str(pristine.composed), "tiny", out, rank=2),
    }
    with pytest.raises(IntegrityError):
        readers[path]()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["plan", "check"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_plan_is_made_of_headers_and_configs_that_are_whole(
    pristine: Shelf, flipped: Callable[[Path, int], None], tmp_path: Path, path: str, name: str
) -> None:
    """A flip in the name of a tensor, or in a number of the config, would be another model to a plan."""
    file = pristine.base / name
    flipped(file, file.read_bytes().index(b"model"))
    with pytest.raises(IntegrityError):
        read_paths(pristine, tmp_path / "out")[path]()


URLS = ("/team/x/resolve/main/" + WEIGHTS, "/api/v1/adapters/team/x/files/" + WEIGHTS)


@pytest.mark.parametrize("at", SPANS)
@pytest.mark.parametrize("url", URLS, ids=["hub", "rest"])
def test_a_download_never_carries_a_flipped_byte(
    pristine: Shelf, flipped: Callable[[Path, int], None], url: str, at: int
) -> None:
    """Whole: it ends before the damaged MiB. Ranges: one that touches it is refused, one that does not is right."""
    blob = pristine.blob(WEIGHTS)
    original, at = blob.read_bytes(), at % blob.stat().st_size
    assert pristine.get(url) == (200, original, True)
    flipped(blob, at)
    status, body, whole = pristine.get(url)
    assert (status >= 400) or (not whole and original.startswith(body) and len(body) <= at)
    status, body, _ = pristine.get(url, f"{max(at - 3, 0)}-{at + 3}")
    assert status == 422, body
    assert pristine.client.get(url, headers={"Range": f"bytes={at}-{at}"}).json()["error"]["code"] == "blob-corrupt"
    far = (at // CHUNK + 1) % 3 * CHUNK
    stop = min(far + CHUNK, len(original)) - 1
    assert pristine.get(url, f"{far}-{stop}") == (206, original[far : stop + 1], True)


@pytest.mark.parametrize(
    "spans", [("0-0",), ("5-1048580",), ("1048570-2097160",), ("-7",), ("2097152-",), ("1-2", "1048577-1048580")]
)
def test_ranges_of_a_whole_file_are_its_bytes(pristine: Shelf, spans: tuple[str, ...]) -> None:
    """Within a MiB, across its ends, from the end, and several at once."""
    original = pristine.blob(WEIGHTS).read_bytes()
    status, body, whole = pristine.get(URLS[0], *spans)
    assert (status, whole) == (206, True)
    for span in spans:
        first, last = span.split("-")
        part = original[int(first) : int(last) + 1 if last else None] if first else original[-int(last) :]
        assert part in body if len(spans) > 1 else part == body


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "composition.json"])
def test_a_flipped_byte_of_a_composition_is_caught_on_download(
    pristine: Shelf, flipped: Callable[[Path, int], None], name: str
) -> None:
    """The weights, what goes along with them, and the record itself, which no record lists."""
    url = f"/api/v1/jobs/{pristine.job}/files/{name}"
    path = pristine.output / name
    assert pristine.get(url) == (200, path.read_bytes(), True)
    flipped(path, path.stat().st_size // 2)
    status, body, whole = pristine.get(url)
    assert status == 422 or not whole, body


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "composition.json"])
def test_a_flipped_byte_of_a_composition_is_not_taken_for_the_result(
    pristine: Shelf, flipped: Callable[[Path, int], None], name: str
) -> None:
    """The same recipe to the same folder is cached only where every byte is still there; inspect names the file."""
    recipe = parse_recipe("tiny+team/x:0.5")
    assert pristine.registry.compose(recipe, pristine.composed).cached
    path = pristine.composed / name
    flipped(path, path.read_bytes().index(b"0.5") + 2 if name == "composition.json" else path.stat().st_size - 3)
    with pytest.raises(IntegrityError):
        pristine.registry.compose(recipe, pristine.composed)
    if name != "config.json":  # which is no JSON any more
        found = pristine.registry.inspect(str(pristine.composed))
        assert (found["intact"], found["changed"]) == (False, [name])


def test_undo_reads_no_record_of_which_a_byte_is_another(
    pristine: Shelf, flipped: Callable[[Path, int], None], tmp_path: Path
) -> None:
    """Any byte of it: one in every hundred is tried. Most would still be JSON, and a weight would be another."""
    path = pristine.composed / "composition.json"
    for at in range(1, path.stat().st_size, 97):
        flip(path, at)
        with pytest.raises(IntegrityError):
            undo(pristine.registry, pristine.composed, tmp_path / "out", adapters=["team/x"])
        flip(path, at)
    assert undo(pristine.registry, pristine.composed, tmp_path / "out").record


def test_a_damaged_or_lost_list_of_chunks_is_made_anew(pristine: Shelf, flipped: Callable[[Path, int], None]) -> None:
    """A flipped byte in the digests neither refuses what is whole nor lets pass what is not."""
    blob = pristine.blob(WEIGHTS)
    place = pristine.registry.layout.chunk_list(blob.name)
    reader = pristine.registry.store.chunks.reader(blob, blob.name)
    kept = place.read_bytes()
    for at in (3, 20, 40, len(kept) - 1):
        flip(place, at)
        assert pristine.registry.store.chunks.reader(blob, blob.name).digests == reader.digests
        assert place.read_bytes() == kept
    place.unlink()
    flipped(blob, CHUNK + 9)
    with pytest.raises(BlobCorruptError):
        pristine.registry.store.chunks.reader(blob, blob.name)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_chunks_and_whole_are_hashed_in_one_pass_over_any_pieces(size: int) -> None:
    """Oracle: hashlib and blake3 over slices, whatever the pieces were."""
    from blake3 import blake3

    data = np.random.default_rng(size).bytes(size)
    for step in (CHUNK, 4 * CHUNK, 777_777):
        hasher = ChunkHasher()
        for at in range(0, size, step):
            hasher.update(data[at : at + step])
        assert hasher.sha256 == hashlib.sha256(data).hexdigest()
        assert hasher.digests() == tuple(blake3(data[at : at + CHUNK]).digest() for at in range(0, size, CHUNK))


def test_a_damaged_blob_is_healed_by_publishing_its_bytes_again(
    pristine: Shelf, flipped: Callable[[Path, int], None], tmp_path: Path
) -> None:
    """A copy that is there already is looked at before it is taken for one."""
    blob = pristine.blob(WEIGHTS)
    source = tmp_path / "source"
    source.write_bytes(blob.read_bytes())
    flip(blob, CHUNK + 9)
    assert pristine.registry.store.put(source)[0] == blob.name
    assert blob.read_bytes() == source.read_bytes()
