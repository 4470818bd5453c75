"""Files from strangers: whatever is in them, the answer is a typed error or a correct reading, never a crash."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer.adapters import open_adapter
from composer.checkpoint import open_checkpoint
from composer.errors import CorruptFileError, NonFiniteError, NotFoundError, TypedError, UnsafeFormatError
from composer.files import folder_files, read_json
from composer.tensors import MAX_HEADER_BYTES, encode_header, read_header
from tests.support import compose_folders, reshard, write_base, write_lora, write_raw, write_tensors

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_a_valid_file_is_read_as_the_reference_reader_does(tmp_path: Path) -> None:
    """Oracle: safetensors' own reader, over every dtype it shares with us, an empty tensor and a scalar."""
    from safetensors import safe_open

    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b.c": np.array(3, np.int64),
        "empty": np.zeros((0, 5), np.float16),
        "flags": np.array([True, False]),
    }
    path = write_tensors(tmp_path / "m.safetensors", tensors, {"format": "pt", "note": "x"})
    header = read_header(path)
    with safe_open(path, "np") as reference:
        assert set(reference.keys()) == set(header.tensors)
        assert reference.metadata() == header.metadata == {"format": "pt", "note": "x"}
        for name, spec in header.tensors.items():
            assert np.array_equal(reference.get_tensor(name), spec.read())


def test_a_file_of_the_reference_writer_is_read(tmp_path: Path) -> None:
    """Oracle: what safetensors writes, bf16 included."""
    import torch
    from safetensors.torch import save_file

    tensors = {"x": torch.randn(3, 4).bfloat16(), "y": torch.ones(2, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "m.safetensors")
    found = {name: spec.read() for name, spec in read_header(tmp_path / "m.safetensors").tensors.items()}
    assert np.array_equal(found["x"].astype(np.float32), tensors["x"].float().numpy())
    assert found["y"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("header", "data"),
    [
        pytest.param({"a": ENTRY}, b"\0" * 7, id="truncated"),
        pytest.param({"a": ENTRY}, b"\0" * 9, id="trailing-bytes"),
        pytest.param({}, b"x", id="data-without-tensors"),
        pytest.param(b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2), b"\0" * 8, id="duplicate-name"),
        pytest.param(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8, id="duplicate-key"),
        pytest.param({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"\0" * 12, id="overlap"),
        pytest.param({"a": ENTRY, "b": ENTRY}, b"\0" * 8, id="same-range"),
        pytest.param({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, b"\0" * 20, id="hole"),
        pytest.param({"a": {**ENTRY, "data_offsets": [4, 12]}}, b"\0" * 12, id="hole-at-the-start"),
        pytest.param({"a": {**ENTRY, "data_offsets": [8, 0]}}, b"\0" * 8, id="negative-range"),
        pytest.param({"a": {**ENTRY, "data_offsets": [-8, 0]}}, b"\0" * 8, id="negative-offset"),
        pytest.param({"a": {**ENTRY, "data_offsets": [0]}}, b"\0" * 8, id="one-offset"),
        pytest.param({"a": {**ENTRY, "shape": [3]}}, b"\0" * 8, id="shape-and-range-disagree"),
        pytest.param({"a": {**ENTRY, "shape": [-2]}}, b"\0" * 8, id="negative-shape"),
        pytest.param({"a": {**ENTRY, "shape": [2.0]}}, b"\0" * 8, id="float-shape"),
        pytest.param({"a": {**ENTRY, "shape": [True, 2]}}, b"\0" * 8, id="boolean-shape"),
        pytest.param({"a": {**ENTRY, "shape": "2"}}, b"\0" * 8, id="text-shape"),
        pytest.param({"a": {**ENTRY, "shape": [2**62, 2**62, 0]}}, b"\0" * 8, id="product-of-sizes-overflows"),
        pytest.param({"a": {**ENTRY, "dtype": "F4"}}, b"\0" * 8, id="unknown-dtype"),
        pytest.param({"a": {**ENTRY, "dtype": ["F32"]}}, b"\0" * 8, id="dtype-is-a-list"),
        pytest.param({"a": {**ENTRY, "dtype": {}}}, b"\0" * 8, id="dtype-is-an-object"),
        pytest.param({"a": {**ENTRY, "dtype": None}}, b"\0" * 8, id="dtype-is-null"),
        pytest.param({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, id="no-offsets"),
        pytest.param({"a": {**ENTRY, "more": 1}}, b"\0" * 8, id="unknown-field"),
        pytest.param({"a": [1]}, b"", id="entry-is-a-list"),
        pytest.param({"../a": ENTRY}, b"\0" * 8, id="path-traversal"),
        pytest.param({"x/../../a": ENTRY}, b"\0" * 8, id="path-traversal-inside"),
        pytest.param({"": ENTRY}, b"\0" * 8, id="empty-name"),
        pytest.param({"a\x00b": ENTRY}, b"\0" * 8, id="nul-in-name"),
        pytest.param({"a\nb": ENTRY}, b"\0" * 8, id="newline-in-name"),
        pytest.param({"\ud800": ENTRY}, b"\0" * 8, id="lone-surrogate"),
        pytest.param({"a" * 5000: ENTRY}, b"\0" * 8, id="very-long-name"),
        pytest.param({"__metadata__": {"a": 1}}, b"", id="metadata-of-numbers"),
        pytest.param({"__metadata__": []}, b"", id="metadata-is-a-list"),
        pytest.param(b"[1, 2]", b"", id="json-list"),
        pytest.param(b"not json", b"", id="not-json"),
        pytest.param(b"\xff\xfe{}", b"", id="not-utf8"),
        pytest.param(b"[" * 200_000, b"", id="deep-json"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"", id="deep-json-objects"),
        pytest.param(b'{"a":' + b"9" * 5000 + b"}", b"", id="a-number-of-5000-digits"),
        pytest.param(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', b"\0" * 8, id="huge-size"),
        pytest.param({"a": {**ENTRY, "shape": [float("nan")]}}, b"\0" * 8, id="nan-shape"),
        pytest.param(b" {}", b"", id="leading-space"),
    ],
)  # fmt: skip
def test_a_header_that_breaks_the_format_is_refused(tmp_path: Path, header: Any, data: bytes) -> None:
    """CorruptFileError, whatever the reference reader would let pass."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(CorruptFileError, match="not a valid safetensors file"):
        read_header(write_raw(tmp_path / "m.safetensors", body, data))


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, struct.pack("<Q", 0), struct.pack("<Q", 1) + b"{}", struct.pack("<Q", 2**63) + b"{}",
     struct.pack("<Q", 2**64 - 1) + b"{}", struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", struct.pack("<Q", 3) + b"{}"],
    ids=["empty", "short", "zero", "one", "2^63", "2^64-1", "over-the-limit", "past-the-end"],
)  # fmt: skip
def test_a_header_length_that_lies_is_refused_without_reading_it(tmp_path: Path, content: bytes) -> None:
    """No allocation of a claimed size: the length is checked against the file first."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="header length"):
        read_header(path)


def test_a_sparse_file_with_a_giant_header_is_refused(tmp_path: Path) -> None:
    """A file that really has 200 MB of header is over the limit."""
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(200_000_008)
    with pytest.raises(CorruptFileError, match="header length"):
        read_header(path)


def test_many_duplicate_keys_are_refused_in_linear_time(tmp_path: Path) -> None:
    """200,000 times the same key is an error at once, not after minutes."""
    body = b"{" + b",".join(b'"a%d":1' % (index // 2) for index in range(200_000)) + b"}"
    with pytest.raises(CorruptFileError, match="each key once"):
        read_header(write_raw(tmp_path / "m.safetensors", body))


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    """NotFoundError, not an OSError."""
    with pytest.raises(NotFoundError):
        read_header(tmp_path / "none.safetensors")


def test_a_file_cut_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    """Reads past the end raise CorruptFileError instead of giving short data."""
    path = write_tensors(tmp_path / "m.safetensors", {"a": np.ones(1000, np.float32)})
    spec = read_header(path).tensors["a"]
    os.truncate(path, spec.offset + 100)
    with pytest.raises(CorruptFileError, match="bytes early"):
        spec.read()
    with pytest.raises(CorruptFileError, match="bytes early"):
        list(spec.chunks(64))


@pytest.fixture(scope="module")
def valid_header() -> bytes:
    """A small valid file."""
    layout = [("a", "F32", (2, 3)), ("b.c", "BF16", (4,)), ("d", "I64", ())]
    return encode_header(layout, {"format": "pt"}) + bytes(range(40))


def check(path: Path, content: bytes) -> None:
    """Reading gives a typed error, or a header whose every range lies in the file and can be read."""
    path.write_bytes(content)
    try:
        header = read_header(path)
    except TypedError as error:
        json.dumps(error.as_dict())
        return
    assert (
        sum(spec.nbytes for spec in header.tensors.values()) == len(content) - 8 - struct.unpack("<Q", content[:8])[0]
    )
    for spec in header.tensors.values():
        assert spec.read().shape == spec.shape


SETTINGS = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(data=st.data())
@settings(SETTINGS, max_examples=400)
def test_a_header_with_any_bytes_changed_reads_or_fails_typed(tmp_path: Path, valid_header: bytes, data: Any) -> None:
    """400 files with up to 6 bytes replaced, inserted or removed anywhere in header and data."""
    content = bytearray(valid_header.replace(b" " * 3000, b""))
    content[:8] = struct.pack("<Q", len(content) - 48)
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["replace", "insert", "remove"]))
        if kind == "replace":
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            content.insert(place, data.draw(st.sampled_from(b'{}[]",:0123456789-.eE\\u\0\xff')))
        else:
            del content[place]
    check(tmp_path / "m.safetensors", bytes(content))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)


@given(
    entries=st.dictionaries(
        st.text(max_size=8) | st.sampled_from(["a", "b", "__metadata__"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3"]) | JSON,
                "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
                "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | JSON,
            }
        )
        | JSON,
        max_size=3,
    ),
    length=st.integers(0, 64),
)
@settings(SETTINGS, max_examples=400)
def test_a_header_of_any_json_reads_or_fails_typed(tmp_path: Path, entries: dict[str, Any], length: int) -> None:
    """400 headers of the right outline with values of any type."""
    body = json.dumps(entries).encode()
    check(tmp_path / "m.safetensors", struct.pack("<Q", len(body)) + body + b"\0" * length)


@given(content=st.binary(max_size=200))
@settings(SETTINGS, max_examples=200)
def test_random_bytes_read_or_fail_typed(tmp_path: Path, content: bytes) -> None:
    """200 files of noise."""
    check(tmp_path / "m.safetensors", content)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base of two matrices."""
    return write_base(
        tmp_path / "base",
        {"model.q.weight": np.ones((8, 8), np.float32), "model.k.weight": np.ones((4, 8), np.float32)},
    )


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """An adapter for `base`."""
    return write_lora(tmp_path / "lora", {"model.q": (8, 8)})


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickles_are_refused_with_the_way_to_convert(base: Path, lora: Path, suffix: str) -> None:
    """A base and an adapter in pickle are never loaded; the remedy says how to make safetensors of them."""
    for folder, name, reader in ((base, "model", open_checkpoint), (lora, "adapter_model", open_adapter)):
        (folder / f"{name}.safetensors").rename(folder / f"{name}{suffix}")
        with pytest.raises(UnsafeFormatError, match="pickle") as caught:
            reader(folder)
        assert "safetensors" in caught.value.remedy
        assert "weights_only=True" in caught.value.remedy


def test_remote_code_is_refused(base: Path) -> None:
    """A config with auto_map needs a stranger's program."""
    (base / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(UnsafeFormatError, match="remote code"):
        open_checkpoint(base)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_base_without_a_part_says_which(base: Path, missing: str) -> None:
    """NotFoundError names the file."""
    (base / missing).unlink()
    with pytest.raises(NotFoundError, match=r"config\.json" if missing == "config.json" else "no weights"):
        open_checkpoint(base)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_without_a_part_says_which(lora: Path, missing: str) -> None:
    """NotFoundError names the file."""
    (lora / missing).unlink()
    with pytest.raises(NotFoundError, match=missing):
        open_adapter(lora)


def test_base_and_adapter_mistaken_for_each_other_are_told_apart(base: Path, lora: Path) -> None:
    """The remedy points to the right command."""
    with pytest.raises(NotFoundError) as caught:
        open_adapter(base)
    assert "base add" in caught.value.remedy
    with pytest.raises(NotFoundError) as caught:
        open_checkpoint(lora)
    assert "publish" in caught.value.remedy


def test_a_missing_shard_is_named(base: Path, tmp_path: Path) -> None:
    """Of all shards, the missing ones."""
    sharded = reshard(base, tmp_path / "sharded", 2)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NotFoundError, match="1 of 2 shards: model-00002-of-00002"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m | {"model.ghost.weight": m["model.q.weight"]}, id="a-tensor-too-many"),
        pytest.param(lambda m: {"model.q.weight": m["model.q.weight"], "model.k.weight": m["model.q.weight"]}, id="wrong-shard"),
        pytest.param(lambda m: dict.fromkeys(m, 7), id="not-names"),
        pytest.param(lambda m: None, id="no-map"),
        pytest.param(lambda m: list(m), id="a-list"),
    ],
)  # fmt: skip
def test_an_index_that_disagrees_with_the_shards_is_refused(
    base: Path, tmp_path: Path, change: Callable[[dict[str, str]], Any]
) -> None:
    """CorruptFileError, in both directions."""
    sharded = reshard(base, tmp_path / "sharded", 2)
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))
    with pytest.raises(CorruptFileError):
        open_checkpoint(sharded)


def test_an_index_that_leaves_a_tensor_out_is_refused(base: Path, tmp_path: Path) -> None:
    """A tensor in a shard that the index does not name would be lost by other readers."""
    sharded = reshard(base, tmp_path / "sharded", 1)
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {"model.q.weight": weight_map["model.q.weight"]}}))
    with pytest.raises(CorruptFileError, match="disagree on 1 tensors"):
        open_checkpoint(sharded)


def test_an_index_cannot_name_files_outside_the_folder(base: Path, tmp_path: Path) -> None:
    """A shard name with .. is a missing file, not a read elsewhere."""
    sharded = reshard(base, tmp_path / "sharded", 1)
    outside = {"model.q.weight": "../base/model.safetensors", "model.k.weight": "../base/model.safetensors"}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(NotFoundError):
        open_checkpoint(sharded)


def test_one_tensor_in_two_shards_is_refused(base: Path, tmp_path: Path) -> None:
    """Which one would count is not guessed."""
    sharded = reshard(base, tmp_path / "sharded", 2)
    both = {"model.q.weight": np.ones((8, 8), np.float32), "model.k.weight": np.ones((4, 8), np.float32)}
    write_tensors(sharded / "model-00001-of-00002.safetensors", both)
    with pytest.raises(CorruptFileError, match="two shards"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["lora_A", "lora_B", "whole"])
def test_an_adapter_with_nan_or_infinity_is_refused_at_compose(
    base: Path, lora: Path, tmp_path: Path, bad: float, side: str
) -> None:
    """NonFiniteError names the tensor; nothing appears."""
    path = lora / "adapter_model.safetensors"
    tensors = {name: spec.read().copy() for name, spec in read_header(path).tensors.items()}
    tensors["base_model.model.model.k.weight"] = np.ones((4, 8), np.float32)
    name = next(name for name in tensors if side in name or (side == "whole" and "lora" not in name))
    tensors[name][0, 0] = bad
    write_tensors(path, tensors)
    with pytest.raises(NonFiniteError) as caught:
        compose_folders(base, [(lora, 1.0)], tmp_path / "out")
    assert caught.value.fields["tensor"] == name
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"[", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000])
def test_json_that_is_not_an_object_is_refused(tmp_path: Path, content: bytes) -> None:
    """CorruptFileError for config files, deep nesting and giant numbers included."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError):
        read_json(path)


def test_json_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """More than 16 MiB of config is not read."""
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(CorruptFileError, match="too large"):
        read_json(path)


@pytest.mark.parametrize("architectures", ["LlamaForCausalLM", [], [7], {"a": 1}, 7, [None]])
def test_a_config_of_wrong_types_is_read_or_refused(base: Path, lora: Path, architectures: Any) -> None:
    """No AttributeError from a stranger's config.json."""
    (base / "config.json").write_text(json.dumps({"architectures": architectures, "model_type": 3}))
    try:
        assert isinstance(open_checkpoint(base).architecture, str)
    except CorruptFileError:
        return
    compose_folders(base, [(lora, 1.0)], base.parent / "out")


def test_links_out_of_the_folder_and_hidden_files_are_not_seen(base: Path, tmp_path: Path) -> None:
    """An upload cannot make the registry read a file elsewhere; a hub cache's own links work."""
    secret = tmp_path / "secret.txt"
    secret.write_text("x")
    (base / "notes.txt").symlink_to(secret)
    (base / ".hidden.json").write_text("{}")
    assert set(folder_files(base)) == {"config.json", "model.safetensors"}
    hub = tmp_path / "hub" / "models--x"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "abc").mkdir(parents=True)
    for path in base.glob("*.*"):
        if not path.is_symlink() and not path.name.startswith("."):
            (hub / "blobs" / path.name).write_bytes(path.read_bytes())
            (hub / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{path.name}")
    assert set(open_checkpoint(hub / "snapshots" / "abc").tensors) == {"model.q.weight", "model.k.weight"}


@pytest.mark.parametrize("where", ["missing", "a-file"])
def test_a_path_that_is_no_folder_is_not_found(tmp_path: Path, where: str) -> None:
    """NotFoundError that says what is there."""
    (tmp_path / "a-file").write_text("")
    with pytest.raises(NotFoundError, match="not a folder"):
        open_checkpoint(tmp_path / where)


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param({}, id="none"),
        pytest.param({"base_model.model.model.q.lora_A.weight": np.ones((2, 8), np.float32)}, id="no-B"),
        pytest.param({"base_model.model.model.q.lora_A.weight": np.ones((2, 8), np.float32),
                      "base_model.model.model.q.lora_B.weight": np.ones((8, 3), np.float32)}, id="ranks-differ"),
        pytest.param({"base_model.model.model.q.lora_A.weight": np.ones((0, 8), np.float32),
                      "base_model.model.model.q.lora_B.weight": np.ones((8, 0), np.float32)}, id="rank-0"),
        pytest.param({"base_model.model.model.q.lora_A.weight": np.ones((2, 8), np.int8),
                      "base_model.model.model.q.lora_B.weight": np.ones((8, 2), np.int8)}, id="integers"),
        pytest.param({"base_model.model.model.q.weight": np.ones((8, 8), np.float32)}, id="no-lora-at-all"),
        pytest.param({"base_model.model.model.q.lora_A.weight": np.ones((2, 8), np.float32),
                      "base_model.model.model.q.lora_B.weight": np.ones((8, 2), np.float32),
                      "base_model.model.model.q.base_layer.weight": np.ones((8, 7), np.float32)}, id="copy-of-wrong-shape"),
    ],
)  # fmt: skip
def test_an_incomplete_adapter_is_refused(lora: Path, tensors: dict[str, np.ndarray]) -> None:
    """CorruptFileError on opening."""
    write_tensors(lora / "adapter_model.safetensors", tensors)
    with pytest.raises(CorruptFileError):
        open_adapter(lora)
