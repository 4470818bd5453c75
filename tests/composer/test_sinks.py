"""A result is visible whole or not at all: errors, Ctrl-C, kill -9, a full disk."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import composer.run
from composer.errors import ConflictError, StorageError
from composer.sinks import FolderSink
from composer.writer import ROOM_BYTES, HashingWriter, Staging
from tests.support import compose_folders, plan_folders, reshard, weight_bytes, write_base, write_lora

ROOT = Path(__file__).resolve().parents[2]


def everything(folder: Path) -> set[str]:
    """All names in a folder, hidden ones too."""
    return set(os.listdir(folder)) if folder.exists() else set()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, OSError(28, "No space left on device")])
def test_a_run_that_stops_in_the_middle_leaves_nothing(
    tiny_llama: Path, tiny_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    """Whatever stops it, neither the output nor a part of it is left; a full disk is a StorageError."""
    calls = 0
    original = composer.run.merge_fused

    def merge(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls >= 5:
            raise failure
        return original(*args)

    monkeypatch.setattr(composer.run, "merge_fused", merge)
    expected = StorageError if isinstance(failure, OSError) else failure
    with pytest.raises(expected):
        compose_folders(tiny_llama, [(tiny_lora, 1.0)], tmp_path / "made" / "out")
    assert calls >= 5
    assert everything(tmp_path / "made") == set()


def test_an_existing_folder_is_not_touched(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """A second compose to the same place is a conflict, and the first result stays."""
    out = tmp_path / "out"
    compose_folders(tiny_llama, [(tiny_lora, 1.0)], out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ConflictError, match="already exists"):
        compose_folders(tiny_llama, [(tiny_lora, 0.5)], out)
    assert (out / "model.safetensors").read_bytes() == before
    assert everything(tmp_path) == {"out"}


def test_only_a_composed_folder_is_replaced(tmp_path: Path) -> None:
    """`replace` does not remove a folder that the composer did not write."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConflictError, match="not a composed model"):
        FolderSink(tmp_path / "home", replace=True)
    assert everything(tmp_path) == {"home"}


def test_replacing_swaps_the_whole_folder(tmp_path: Path) -> None:
    """No file of the old result is left in the new one, and nothing beside it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "composition.json").write_text("{}")
    (out / "old.bin").write_text("old")
    with FolderSink(out, replace=True) as sink:
        sink.write("composition.json", b"{}")
        sink.commit()
    assert everything(out) == {"composition.json"}
    assert everything(tmp_path) == {"out"}


def script(body: str, *args: Path) -> list[str]:
    """A python process that runs `body` with the paths as argv."""
    return [sys.executable, "-c", body, *map(str, args)]


COMPOSE = """
import sys
from pathlib import Path
from tests.support import compose_folders
compose_folders(Path(sys.argv[1]), [(Path(sys.argv[2]), 1.0)], Path(sys.argv[3]))
"""
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from composer.errors import StorageError
try:
    exec(sys.argv.pop(1))
except StorageError as error:
    print(error.code, error.found)
"""
# A shell that starts the suite in the background has its children ignore Ctrl-C.
SLOW = """
import composer.run, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
original = composer.run.merge_fused
composer.run.merge_fused = lambda *args: (time.sleep(0.2), original(*args))[1]
"""


def test_a_file_size_limit_is_a_storage_error_and_leaves_nothing(
    tiny_llama: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    """The disk refuses at 100 kB (RLIMIT_FSIZE): a typed error, and no folder."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, COMPOSE, tiny_llama, tiny_lora, tmp_path / "made" / "out"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["storage", "EFBIG"], done.stderr
    assert everything(tmp_path / "made") == set()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_compose_shows_no_result(
    tiny_llama: Path, tiny_lora: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """Killed while it writes, the output does not exist; after Ctrl-C not even the part does."""
    made = tmp_path / "made"
    process = subprocess.Popen(
        script(SLOW + COMPOSE, tiny_llama, tiny_lora, made / "out"), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(made.glob(".out.*.part/model.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    process.wait(30)
    assert not (made / "out").exists()
    if how == signal.SIGINT:
        assert everything(made) == set()
    compose_folders(tiny_llama, [(tiny_lora, 1.0)], made / "out")
    assert (made / "out" / "composition.json").is_file()


def test_memory_stays_within_the_plan(tmp_path: Path) -> None:
    """A 256 MiB tensor is merged in blocks: the process grows by no more than the plan says, and some slack."""
    import numpy as np

    base = write_base(tmp_path / "base", {"layer.weight": np.zeros((16384, 8192), np.float16)})
    lora = write_lora(tmp_path / "lora", {"layer": (16384, 8192)})
    body = """
import resource, sys
from pathlib import Path
import composer.run, composer.plan
from tests.support import compose_folders, plan_folders

import ml_dtypes, numpy as np
from composer.product import Factors, add_product
one = np.ones((64, 64), np.float32)
add_product(one.astype(ml_dtypes.bfloat16).view(np.uint16), [Factors(one, one, one[0, 0], one[0, 0])])
peak = plan_folders(Path(sys.argv[1]), [(Path(sys.argv[2]), 1.0)]).peak_bytes
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
compose_folders(Path(sys.argv[1]), [(Path(sys.argv[2]), 1.0)], Path(sys.argv[3]))
print(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""
    done = subprocess.run(
        script(body, base, lora, tmp_path / "out"), cwd=ROOT, capture_output=True, text=True, check=True
    )
    peak, grown = map(int, done.stdout.split())
    assert peak < 160 << 20
    assert grown < peak + (48 << 20)


@pytest.mark.parametrize(("rows", "adapters"), [(1024, 6), (2048, 12)])
def test_many_adapters_of_a_high_rank_are_loaded_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, adapters: int
) -> None:
    """With a budget of 1 MiB of factors the bytes are those of all at once, and what is held does not grow with them."""
    import tracemalloc

    import ml_dtypes
    import numpy as np

    import composer.plan

    random = np.random.default_rng(0)
    base = write_base(tmp_path / "base", {"x.weight": random.normal(size=(rows, 256)).astype(ml_dtypes.bfloat16)})
    terms = [
        (write_lora(tmp_path / f"a{index}", {"x": (rows, 256)}, rank=128, seed=index), (0.3, -0.2, 0.25)[index % 3])
        for index in range(adapters)
    ]
    whole = compose_folders(base, terms, tmp_path / "whole")
    monkeypatch.setattr(composer.plan, "FACTOR_BYTES", 1 << 20)
    monkeypatch.setattr(composer.plan, "STREAM_BYTES", 1 << 18)
    plan = plan_folders(base, terms)
    assert all(job.streamed for job in plan.jobs)
    tracemalloc.start()
    streamed = composer.run.compose(plan, tmp_path / "streamed")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert weight_bytes(tmp_path / "whole") == weight_bytes(tmp_path / "streamed")
    assert peak < plan.peak_bytes + (4 << 20)
    for one, other in zip(whole.record["adapters"], streamed.record["adapters"], strict=True):
        assert other["survival"] == pytest.approx(one["survival"], abs=2e-2)


def refuse_direct_writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A disk whose blocks are larger than a page; returns the offsets that it refuses."""
    write, refusals = os.pwrite, []

    def pwrite(descriptor: int, view: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refusals.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return refusals


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, ROOM_BYTES - 1, ROOM_BYTES, ROOM_BYTES + 1, 3 * ROOM_BYTES + 7])
@pytest.mark.parametrize("refused", [False, True], ids=["direct", "a-disk-that-refuses-direct-writes"])
def test_a_file_holds_and_hashes_what_was_written_in_any_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, refused: bool
) -> None:
    """Pieces of many sizes, from one byte to more than a room."""
    data = np.random.default_rng(size).bytes(size)
    refusals = refuse_direct_writes(monkeypatch) if refused else []
    with HashingWriter(tmp_path / "file") as writer:
        begin = 0
        for length in (1000, 1, 0, 70_000, ROOM_BYTES + 5, size):
            writer.write(data[begin : begin + length])
            begin += length
    assert (tmp_path / "file").read_bytes() == data
    assert (writer.sha256, writer.size) == (hashlib.sha256(data).hexdigest(), len(data))
    assert refusals or not refused or size < 4096


@pytest.mark.parametrize("refused", [False, True], ids=["direct", "a-disk-that-refuses-direct-writes"])
def test_rooms_are_filled_in_any_order_and_written_in_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """Rooms that begin and end within pages, held places between them, and more bytes than the buffers hold."""
    if refused:
        refuse_direct_writes(monkeypatch)
    random = np.random.default_rng(3)
    data = memoryview(random.bytes(9 * ROOM_BYTES + 1234))
    with Staging(4) as staging, HashingWriter(tmp_path / "file", staging) as writer:
        writer.write(data[:77])
        begin = 77
        while begin < len(data):
            sizes = random.integers(1, ROOM_BYTES, 3)
            parts = []
            for index, size in enumerate(sizes):
                end = min(len(data), begin + int(size))
                if begin < end:
                    parts.append((begin, end, writer.hold(end - begin) if index == 1 else writer.reserve(end - begin)))
                begin = end
            for first, last, place in reversed(parts):
                if not isinstance(place, int):
                    place.view[:] = data[first:last]
            for first, last, place in parts:
                if isinstance(place, int):
                    writer.write(data[first:last], place)
                else:
                    writer.append(place)
    assert (tmp_path / "file").read_bytes() == data
    assert writer.sha256 == hashlib.sha256(data).hexdigest()


def test_rooms_are_appended_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Another order is an error of the program and never another file."""
    with HashingWriter(tmp_path / "file") as writer:
        first, second = writer.reserve(10), writer.reserve(10)
        with pytest.raises(RuntimeError, match="appended at 0"):
            writer.append(second)
        writer.append(first)


def test_an_error_of_the_writing_thread_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="No space left"), FolderSink(tmp_path / "out") as sink:
        sink.write("file", b"x")
    assert not list(tmp_path.iterdir())


PEAK = """
import sys
from pathlib import Path
from tests.support import compose_folders
base, out, *adapters = map(Path, sys.argv[1:])
compose_folders(base, [(adapter, 0.5) for adapter in adapters], out)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) >> 10)  # getrusage would count what the parent held before exec
"""


def peak_mib(base: Path, out: Path, adapters: list[Path]) -> int:
    """The largest resident set of a process that composes, in MiB."""
    done = subprocess.run(script(PEAK, base, out, *adapters), cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
def test_a_merge_stays_under_300_mib_whatever_the_size_of_the_model(tmp_path: Path) -> None:
    """A model four times as large takes no more memory: 256 MiB and 1 GiB of bf16, a LoRA on every tensor."""
    from composer.tensors import encode_header

    peaks = []
    for count in (8, 32):
        names = [f"layer{index}.weight" for index in range(count)]
        base = write_base(tmp_path / f"base{count}", {"x": np.zeros(1, np.float32)})
        header = encode_header([(name, "BF16", (4096, 4096)) for name in names], {})
        with (base / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + count * (32 << 20))
        modules = {name.removesuffix(".weight"): (4096, 4096) for name in names}
        lora = write_lora(tmp_path / f"lora{count}", modules, rank=16)
        peaks.append(peak_mib(base, tmp_path / "out", [lora]))
        shutil.rmtree(tmp_path / "out")
    assert max(peaks) < 300
    assert peaks[1] - peaks[0] < 24


@pytest.mark.slow
def test_64_adapters_of_rank_512_stay_under_300_mib(tmp_path: Path) -> None:
    """256 MiB of factors on one tensor: one adapter is held at a time."""
    import ml_dtypes

    base = write_base(tmp_path / "base", {"x.weight": np.ones((1024, 1024), ml_dtypes.bfloat16)})
    adapters = [write_lora(tmp_path / f"a{index}", {"x": (1024, 1024)}, rank=512, seed=index) for index in range(64)]
    assert peak_mib(base, tmp_path / "out", adapters) < 300


def test_a_shard_that_fails_stops_the_others(tmp_path: Path, tiny_llama: Path, tiny_lora: Path) -> None:
    """An error in the report of progress ends every file that is being written; nothing is left."""
    base = reshard(tiny_llama, tmp_path / "base", shards=5)
    seen: list[int] = []

    def report(step: str, done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 4:
            raise InterruptedError("enough")

    with pytest.raises(StorageError, match="enough"):
        composer.run.compose(plan_folders(base, [(tiny_lora, 1.0)]), tmp_path / "made" / "out", progress=report)
    assert len(seen) == 4
    assert everything(tmp_path / "made") == set()
