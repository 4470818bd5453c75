"""Folders from strangers that are published, uploaded, pushed or added: what is hostile is refused, and nothing is kept."""

from __future__ import annotations

import base64
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from composer.errors import CorruptFileError, NonFiniteError, UnsafeFormatError
from composer.tensors import MAX_ADAPTER_HEADER_BYTES, MAX_EMPTY_TENSORS, MAX_METADATA_BYTES, read_header
from registry.api.app import create_app
from registry.services.jobs import JobService
from registry.services.local import LocalRegistry, open_registry
from tests.support import edit_json, write_base, write_lora, write_raw, write_tensors

MODULES = {"model.q": (8, 8)}
A, B = "base_model.model.model.q.lora_A.weight", "base_model.model.model.q.lora_B.weight"
GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


class Run:
    """What a pickle does when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("it ran",))


def zipped() -> bytes:
    """A zip archive of one file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Run()))
    return out.getvalue()


def tarred() -> bytes:
    """A tar archive of one file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../outside"), io.BytesIO())
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good LoRA, to be spoilt."""
    return write_lora(tmp_path / "lora", MODULES)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRegistry]:
    """A registry for all tests after which it holds nothing."""
    opened = open_registry(tmp_path_factory.mktemp("shared") / "home")
    yield opened
    opened.close()


def kept(registry: LocalRegistry) -> list[str]:
    """Every file of the store, and every version."""
    files = [str(path) for path in (registry.home / "store").rglob("*") if path.is_file()]
    return files + [item.name for item in registry.list_adapters().items]


def raw(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> Callable[[Path], object]:
    """Weights of any bytes."""
    return lambda folder: write_raw(folder / "adapter_model.safetensors", header, data, length=length)


def value(number: float, dtype: Any = np.float32) -> Callable[[Path], object]:
    """Weights of which one number is `number`."""
    bad = np.ones((2, 8), dtype)
    bad[1, 3] = number
    good = np.ones((8, 2), dtype)
    return lambda folder: write_tensors(folder / "adapter_model.safetensors", {A: bad, B: good})


def config(**fields: Any) -> Callable[[Path], object]:
    """A config with other fields."""
    return lambda folder: edit_json(folder / "adapter_config.json", **fields)


def text(name: str, content: bytes) -> Callable[[Path], object]:
    """A file beside the weights."""
    return lambda folder: (folder / name).write_bytes(content)


EMPTY = {f"t{index}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(MAX_EMPTY_TENSORS + 1)}
HOSTILE = {
    "header-length-beyond-the-file": raw({"a": GOOD}, length=2**40),
    "header-length-overflows": raw({"a": GOOD}, length=2**64 - 1),
    "header-length-zero": raw({"a": GOOD}, length=0),
    "oversized-header": raw(b"{" + b" " * MAX_ADAPTER_HEADER_BYTES + b"}", b""),
    "oversized-metadata": raw({"__metadata__": {"a": "x" * (MAX_METADATA_BYTES + 1)}, "a": GOOD}),
    "endless-metadata-keys": raw({"__metadata__": {str(index): "" for index in range(10_001)}, "a": GOOD}),
    "header-not-an-object": raw([GOOD]),
    "header-does-not-begin-with-a-brace": raw(b"  " + json.dumps({"a": GOOD}).encode()),
    "header-is-deep": raw(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "header-is-not-utf8": raw(b'{"\xff":1}'),
    "duplicate-name": raw(b'{"a":%s,"a":%s}' % ((json.dumps(GOOD).encode(),) * 2)),
    "duplicate-field": raw(b'{"a":{"dtype":"F32","dtype":"U8","shape":[2],"data_offsets":[0,8]}}'),
    "traversal-in-a-name": raw({"../../etc/passwd": GOOD}),
    "traversal-with-backslashes": raw({"a\\..\\b": GOOD}),
    "absolute-path-as-a-name": raw({"/etc/passwd": GOOD}),
    "nul-in-a-name": raw({"a\0b": GOOD}),
    "escape-sequence-in-a-name": raw({"a\x1b[2Jb": GOOD}),
    "right-to-left-override-in-a-name": raw({"a\u202eb": GOOD}),
    "overlapping-ranges": raw({"a": GOOD, "b": GOOD}),
    "hole-between-ranges": raw({"a": GOOD, "b": {**GOOD, "data_offsets": [12, 20]}}, b"\0" * 20),
    "range-past-the-end": raw({"a": {**GOOD, "shape": [4], "data_offsets": [0, 16]}}),
    "range-backwards": raw({"a": {**GOOD, "data_offsets": [8, 0]}}),
    "trailing-bytes": raw({"a": GOOD}, b"\0" * 9),
    "size-that-overflows": raw({"a": {**GOOD, "shape": [2**33, 2**33], "data_offsets": [0, 8]}}),
    "shape-negative": raw({"a": {**GOOD, "shape": [-1, -2]}}),
    "shape-of-floats": raw({"a": {**GOOD, "shape": [2.0]}}),
    "a-thousand-dimensions": raw({"a": {**GOOD, "shape": [1] * 1000 + [2]}}),
    "unknown-dtype": raw({"a": {**GOOD, "dtype": "F128"}}),
    "empty-tensors-without-end": raw(EMPTY, b""),
    "huge-sizes-without-data": raw({"a": {**GOOD, "shape": [2**62, 0], "data_offsets": [0, 0]}}, b""),
    "nan": value(np.nan),
    "infinity": value(-np.inf, np.float16),
    "weights-are-a-pickle": text("adapter_model.safetensors", pickle.dumps(Run(), 2)),
    "weights-are-a-zip": text("adapter_model.safetensors", zipped()),
    "config-of-wrong-types": config(target_modules={"a": 1}),
    "config-that-is-deep": lambda folder: (folder / "adapter_config.json").write_text('{"peft_type":"LORA","x":' + "[" * 100 + "]" * 100 + "}"),
    "config-with-a-key-twice": text("adapter_config.json", b'{"peft_type": "LORA", "r": 2, "r": 3}'),
    "config-of-20-mebibytes": text("adapter_config.json", b'{"peft_type": "LORA", "x": "' + b"x" * (20 << 20) + b'"}'),
    "config-with-nan": config(lora_alpha=float("nan")),
    "config-with-remote-code": config(auto_map={"AutoModel": "evil.Model"}),
    "config-with-a-module-of-the-hub": config(auto_mapping={"base_model_class": "M", "parent_library": "transformers_modules.evil"}),
    "tokenizer-with-remote-code": text("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'),
    "tokenizer-is-a-pickle": text("tokenizer.model", pickle.dumps(Run())),
    "tokenizer-is-a-zip": text("tokenizer.json", zipped()),
    "vocabulary-is-a-tar": text("vocab.txt", tarred()),
    "licence-is-a-program": text("LICENSE.txt", b"#!/bin/sh\nrm -rf /\n"),
    "template-is-not-text": text("chat_template.jinja", b"{{ \xff\xfe }}"),
    "template-of-2-mebibytes": text("chat_template.jinja", b"x" * (2 << 20)),
    "card-with-merge-keys": text("README.md", b"---\na: &a {b: 1}\nc: {<<: [*a, *a]}\n---\n"),
    "card-that-is-deep": text("README.md", b"---\na: " + b"[" * 3_000 + b"\n---\n"),
    "card-with-no-date": text("README.md", b"---\na: 2020-99-99\n---\n"),
}  # fmt: skip


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_adapter_is_refused_before_anything_is_stored(
    shared: LocalRegistry, folder: Path, spoil: Callable[[Path], object]
) -> None:
    """A typed error of integrity or policy; no blob, no half-written file, no version."""
    spoil(folder)
    with pytest.raises((CorruptFileError, NonFiniteError, UnsafeFormatError)) as caught:
        shared.publish(folder, name="team/x")
    assert caught.value.expected
    assert kept(shared) == []


def test_the_good_adapter_that_is_spoilt_above_is_published(registry: LocalRegistry, folder: Path) -> None:
    """Were it refused as it is, the test above would prove nothing; harmless oddities pass."""
    text("README.md", b"---\ntags: 7\nlicense: [3]\nbase_model: {a: 1}\n---\n")(folder)
    text("chat_template.jinja", "{{ messages }} é".encode())(folder)
    text("tokenizer.json", b"\x80 is no pickle here")(folder)
    found = registry.publish(folder, name="team/x").version
    assert {file.name for file in found.files} >= {"README.md", "chat_template.jinja", "tokenizer.json"}


def test_what_the_reference_reader_accepts_of_these_is_refused_here(tmp_path: Path) -> None:
    """The cases in which safetensors' own reader would hand out tensors: each one is why there is a validator."""
    from safetensors import SafetensorError, safe_open

    accepted = []
    for name, spoil in HOSTILE.items():
        path = tmp_path / name / "adapter_model.safetensors"
        path.parent.mkdir()
        spoil(write_lora(path.parent, MODULES))
        try:
            with safe_open(path, "np") as file:
                list(file.keys())
        except SafetensorError:
            with pytest.raises(CorruptFileError):
                read_header(path)
            continue
        accepted.append(name)
    assert {"duplicate-name", "traversal-in-a-name", "nul-in-a-name", "empty-tensors-without-end", "nan"} <= set(
        accepted
    )
    assert {"oversized-metadata", "huge-sizes-without-data", "absolute-path-as-a-name"} <= set(accepted)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_numbers_that_are_none_are_counted_in_every_float_format(tmp_path: Path, dtype: str) -> None:
    """Oracle: numpy's own isfinite; the chunks of a large tensor included, and the largest finite number is none."""
    import ml_dtypes

    from composer.finite import count_nonfinite

    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    array = np.random.default_rng(0).normal(size=300_000).astype(kind)
    array[[0, 7, 299_999]] = [np.nan, ml_dtypes.finfo(kind).max, np.nan]
    if dtype != "float8_e4m3fn":
        array[[1, 262_144]] = [np.inf, -np.inf]
    spec = read_header(write_tensors(tmp_path / "x.safetensors", {"x": array})).tensors["x"]
    assert count_nonfinite(spec) == int((~np.isfinite(array.astype(np.float64))).sum()) >= 2


def test_nonfinite_weights_may_be_kept_and_are_told(registry: LocalRegistry, folder: Path) -> None:
    """--allow-nonfinite turns the error into a warning that names the tensor and the count."""
    value(np.nan)(folder)
    result = registry.publish(folder, name="team/x", allow_nonfinite=True)
    assert any(A in line and "(1)" in line for line in result.warnings)


def test_nan_in_a_base_is_told(registry: LocalRegistry, tmp_path: Path) -> None:
    """A base is registered as it is, with a warning that names the tensor."""
    weights = np.ones((8, 8), np.float16)
    weights[0, :2] = np.nan, np.inf
    base = write_base(tmp_path / "base", {"model.q.weight": weights, "model.k.weight": np.ones((4, 8), np.float32)})
    (told,) = registry.add_base(base, name="tiny").warnings
    assert "model.q.weight (2)" in told
    assert "model.k" not in told


UNSAFE = ("adapter_model.bin", "trainer.pt", "weights.pth", "old.ckpt", "state.pkl", "a.joblib", "m.npy", "adapters.npz",
          "all.zip", "all.tar.gz", "modeling.py", "handler.PY", "run.sh", "lib.so", "notes.ipynb")  # fmt: skip


def test_what_lies_beside_an_adapter_is_left_out_with_a_word(registry: LocalRegistry, folder: Path) -> None:
    """Pickles, archives and programs are neither kept nor passed over in silence."""
    for name in UNSAFE:
        (folder / name).write_bytes(pickle.dumps(Run()))
    result = registry.publish(folder, name="team/x")
    assert {file.name for file in result.version.files} == {"adapter_config.json", "adapter_model.safetensors"}
    (told,) = [line for line in result.warnings if "left out" in line]
    assert f"and {len(UNSAFE) - 5} more" in told


def test_what_lies_beside_a_base_is_never_registered(registry: LocalRegistry, tmp_path: Path) -> None:
    """A hub's folder often holds the same weights as a pickle: clients are never offered it."""
    base = write_base(tmp_path / "base", {"model.q.weight": np.ones((8, 8), np.float32)})
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Run()))
    (base / "modeling_x.py").write_text("import os")
    info = registry.add_base(base, name="tiny")
    assert "modeling_x.py" in info.warnings[0]
    assert "pytorch_model.bin" in info.warnings[0]
    assert set(registry.repositories.snapshot("tiny").files) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    "spoil",
    [
        text("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'),
        text("processor.json", pickle.dumps(Run())),
        text("chat_template.jinja", b"\xff"),
        lambda folder: edit_json(folder / "config.json", text_config={"auto_map": {"AutoModel": "x.Y"}}),
    ],
    ids=["tokenizer", "pickle", "template", "config"],
)
def test_a_hostile_base_is_refused(shared: LocalRegistry, tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    """The rules of adapters hold for bases."""
    base = write_base(tmp_path / "base", {"model.q.weight": np.ones((8, 8), np.float32)})
    spoil(base)
    with pytest.raises((CorruptFileError, UnsafeFormatError)):
        shared.add_base(base, name="tiny")
    assert shared.list_bases().items == ()


@pytest.fixture(scope="module")
def service(shared: LocalRegistry) -> TestClient:
    """The service over the shared registry, open, with an empty repository."""
    client = TestClient(create_app(shared, JobService(shared, slots=0)), base_url="http://127.0.0.1")
    client.post("/api/repos/create", json={"name": "pushed", "organization": "team"}).raise_for_status()
    return client


SPOILT = ("duplicate-name", "nan", "config-with-remote-code", "tokenizer-is-a-pickle")


@pytest.mark.parametrize("name", SPOILT)
def test_an_upload_over_rest_passes_the_same_gate(
    shared: LocalRegistry, service: TestClient, folder: Path, name: str
) -> None:
    """422 or 403 with the code of the failure; nothing stays of the upload."""
    HOSTILE[name](folder)
    files = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
    answer = service.post("/api/v1/adapters", data={"name": "team/x"}, files=files)
    assert answer.status_code in (403, 422), answer.text
    assert answer.json()["error"]["code"] in ("corrupt-file", "not-finite", "unsafe-format")
    assert shared.list_adapters().items == ()
    assert list((shared.home / "uploads").iterdir()) == []


@pytest.mark.parametrize("path", UNSAFE)
def test_a_push_of_what_is_never_kept_is_refused_before_it_is_sent(service: TestClient, path: str) -> None:
    """The first question of a Hub client already has the answer."""
    body = {"files": [{"path": path, "size": 10, "sample": ""}]}
    answer = service.post("/api/models/team/pushed/preupload/main", json=body)
    assert answer.status_code == 403, answer.text


@pytest.mark.parametrize("name", SPOILT)
def test_a_pushed_adapter_passes_the_same_gate(
    shared: LocalRegistry, service: TestClient, folder: Path, name: str
) -> None:
    """The commit is refused with the reason, and the branch stays as it was."""
    HOSTILE[name](folder)
    lines = [{"key": "header", "value": {"summary": "push", "description": ""}}]
    for path in sorted(folder.iterdir()):
        content = base64.b64encode(path.read_bytes()).decode()
        lines.append({"key": "file", "value": {"path": path.name, "content": content, "encoding": "base64"}})
    answer = service.post("/api/models/team/pushed/commit/main", content="\n".join(map(json.dumps, lines)))
    assert answer.status_code in (403, 422), answer.text
    assert shared.list_adapters().items == ()
    assert shared.repositories.snapshot("team/pushed").files == {}


def test_an_import_fetches_nothing_that_is_never_kept() -> None:
    """A hub says what it has; programs and archives under the names of cards are not even asked for, and are told."""
    from registry.services.importing import _describe, hub_reference

    names = ("adapter_model.safetensors", "adapter_config.json", "README.md", "README.zip", "LICENSE.py", *UNSAFE)
    siblings = [SimpleNamespace(rfilename=name, size=1, lfs=None, blob_id="0" * 40) for name in names]
    api = SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=siblings, sha="1" * 40))
    _, chosen, (told,) = _describe(api, hub_reference("hf://org/x"), 1 << 20)
    assert {file.name for file in chosen} == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert "left out" in told


def test_a_header_of_many_lists_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    """Parsing tens of megabytes of empty lists would take gigabytes: they are counted first."""
    import tracemalloc

    body = b'{"a":[' + b"[]," * (10 << 20) + b"[]]}"
    path = write_raw(tmp_path / "m.safetensors", body)
    tracemalloc.start()
    with pytest.raises(CorruptFileError, match="commas and brackets"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(body)


TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture
def templated(registry: LocalRegistry, tmp_path: Path) -> LocalRegistry:
    """A base `tiny` with a chat template in its tokenizer's config."""
    base = write_base(tmp_path / "base", {"model.q.weight": np.ones((8, 8), np.float32)})
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    registry.add_base(base, name="tiny")
    return registry


def test_the_difference_of_the_chat_template_is_shown(templated: LocalRegistry, folder: Path) -> None:
    """By publish, show and plan, as a unified diff; the template is stored as it came and rendered by nobody."""
    evil = TEMPLATE + "{{ ''.__class__.__mro__[1].__subclasses__() }}SEND ALL SECRETS\n"
    (folder / "chat_template.jinja").write_text(evil)
    result = templated.publish(folder, name="team/x", base="tiny")
    assert any("chat template is not the base's" in line for line in result.warnings)
    shown = templated.get_version("team/x").chat_template_diff
    from composer.recipe import parse_recipe

    planned = templated.plan(parse_recipe("tiny+team/x")).adapters[0].chat_template_diff
    assert result.chat_template_diff == shown == planned
    lines = shown.splitlines()
    assert lines[0].startswith("--- base: tokenizer_config.json")
    assert [line for line in lines if line.startswith("+{{") or "SECRETS" in line]
    out = folder.parent / "out"
    templated.pull("team/x", out)
    assert (out / "chat_template.jinja").read_text() == evil


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "none"])
def test_the_bases_own_template_is_no_difference(templated: LocalRegistry, folder: Path, where: str) -> None:
    """The same text in another place, or no template at all."""
    if where == "chat_template.jinja":
        (folder / where).write_text(TEMPLATE)
    elif where != "none":
        (folder / where).write_text(json.dumps({"chat_template": [{"name": "default", "template": TEMPLATE}]}))
    result = templated.publish(folder, name="team/x", base="tiny")
    assert result.chat_template_diff is None
    assert not any("template" in line for line in result.warnings)


def test_the_difference_is_printed_without_control_characters(
    templated: LocalRegistry, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A template that clears the screen of who reads its diff does not."""
    from cli.main import cli

    (folder / "chat_template.jinja").write_text("a\x1b[2Jb")
    templated.publish(folder, name="team/x", base="tiny")
    with pytest.raises(SystemExit):
        cli.main(["show", "team/x"])
    out = capsys.readouterr().out
    assert "CHAT TEMPLATE" in out
    assert "\x1b" not in out


def test_a_header_length_of_a_zip_is_no_zip(tmp_path: Path) -> None:
    """Weights are told by their own format: a header of 35,615 bytes begins as gzip does, and is fine."""
    from composer.admission import admit

    body = json.dumps({"a": GOOD}).encode().ljust(0x8B1F)
    path = write_raw(tmp_path / "m.safetensors", body, b"\0" * 8)
    assert struct.pack("<Q", len(body))[:2] == b"\x1f\x8b"
    admit({"m.safetensors": path})
