"""A full fine-tune stored as its difference from the base, and restored to the same files.

make_delta     base + fine-tune -> an adapter of kind checkpoint-delta
restore        base + that adapter -> the fine-tune's files; each shard must have the SHA-256 that it had

The config keeps, compressed, the header of each shard and every small file that is not the base's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from composer.adapters import CONFIG, WEIGHTS, Adapter
from composer.adapters.checkpoint_delta import PEFT_TYPE, VERSION
from composer.checkpoint import INDEX, Checkpoint
from composer.deltas_checkpoint import BITS, LoadedCheckpointDelta, pack, row_checksums
from composer.errors import CorruptFileError, IncompatibleError, IntegrityError, UnsupportedAdapterError
from composer.extract import check_same_tensors
from composer.files import MAX_JSON_BYTES, copy_names, sha256_file
from composer.peft_format import model_card, write_json, write_tensors
from composer.sinks import FolderSink
from composer.tensors import COPY_BYTES, TensorSpec

__all__ = ["Made", "make_delta", "restore"]

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Made:
    """A folder that was written: its files, and how many tensors and bytes of the fine-tune it stands for."""

    out: Path
    files: dict[str, dict[str, int | str]]
    tensors: int
    checkpoint_bytes: int


def make_delta(
    finetune: Checkpoint,
    base: Checkpoint,
    out: Path,
    *,
    fingerprint: str | None = None,
    base_name: str | None = None,
    progress: Report | None = None,
) -> Made:
    """Write the new folder `out`: an adapter that turns `base` into `finetune`, bit for bit.

    fingerprint, base_name: of the base, for the card and the config.
    Raises TargetMismatchError (other tensors or shapes), UnsupportedAdapterError (quantised, other number formats),
    IncompatibleError (nothing differs), StorageError; `out` is untouched then.
    """
    check_same_tensors(finetune, base)
    _check_formats(finetune, base)
    run = _Difference(finetune, base, progress or (lambda step, done, total: None))
    with FolderSink(out) as sink:
        write_tensors(sink, WEIGHTS, run.tensors())
        if not run.entries:
            raise IncompatibleError(
                "the two checkpoints hold the same weights",
                expected="a fine-tune of this base",
                found="no tensor that differs",
                remedy="check which is the base and which the fine-tune",
            )
        config = {
            "peft_type": PEFT_TYPE,
            "format_version": VERSION,
            "base_model_name_or_path": base_name,
            "tensors": run.entries,
            "shards": [_shard(finetune, shard.name) for shard in finetune.shards],
            "files": _companions(finetune, base),
        }
        write_json(sink, CONFIG, config)
        if (size := int(sink.files[CONFIG]["size"])) > MAX_JSON_BYTES:
            raise UnsupportedAdapterError(
                "the fine-tune's own small files (tokenizer, chat template) are too large for a delta",
                expected=f"at most {MAX_JSON_BYTES} bytes",
                found=size,
                remedy="keep the fine-tune as a checkpoint",
            )
        fields = {"base_model_fingerprint": fingerprint, "tags": ["full-finetune", "delta"]}
        text = f"A full fine-tune as its difference from the base: {len(run.entries)} of {len(base.tensors)} tensors."
        sink.write("README.md", model_card(fields, "A fine-tune as a delta", text))
        sink.commit()
    return Made(out, sink.files, len(run.entries), finetune.nbytes)


@dataclass(slots=True)
class _Difference:
    """The tensors of the file, and what the config says of them."""

    finetune: Checkpoint
    base: Checkpoint
    progress: Report
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """bits and rows of every tensor that differs."""
        total, done = self.base.nbytes, 0
        for name, spec in self.base.stored.items():
            self.progress("comparing", done, total)
            done += spec.nbytes
            old, new = (_bits(checkpoint.stored[name]) for checkpoint in (self.base, self.finetune))
            if np.array_equal(old, new):
                continue
            if spec.dtype not in BITS:
                raise UnsupportedAdapterError(
                    f"{name} differs and is {spec.dtype}",
                    expected=sorted(BITS),
                    found=spec.dtype,
                    remedy="keep the fine-tune as a checkpoint",
                )
            self.entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape)}
            yield f"{name}.bits", pack(old ^ new)
            yield f"{name}.rows", row_checksums(old)


def _bits(spec: TensorSpec) -> np.ndarray:
    """A tensor's bits as unsigned integers [rows, columns]; bytes where the format is not one of BITS."""
    rows = spec.shape[0] if spec.shape else 1
    flat = np.frombuffer(spec.read_bytes(0, spec.nbytes), BITS.get(spec.dtype, np.uint8))
    return flat.reshape(rows, -1) if flat.size else flat


def _check_formats(finetune: Checkpoint, base: Checkpoint) -> None:
    if finetune.scheme or base.scheme:
        raise UnsupportedAdapterError(
            "a quantised checkpoint has no delta",
            expected="weights in bf16, fp16 or fp32",
            found="quantization_config in config.json",
            remedy="keep the fine-tune as a checkpoint",
        )
    theirs = {name: spec.dtype for name, spec in base.stored.items()}
    wrong = [name for name, spec in finetune.stored.items() if spec.dtype != theirs[name]]
    if wrong:
        raise UnsupportedAdapterError(
            f"the fine-tune stores {len(wrong)} tensors in another number format than its base: {wrong[0]}",
            expected=theirs[wrong[0]],
            found=finetune.stored[wrong[0]].dtype,
            remedy="convert one of them first, or keep the fine-tune as a checkpoint",
        )


def _shard(finetune: Checkpoint, name: str) -> dict[str, str]:
    path = finetune.files[name]
    header = next(shard.header for shard in finetune.shards if shard.name == name)
    with path.open("rb") as file:
        head = file.read(min((spec.offset for spec in header.tensors.values()), default=header.size))
    return {"name": name, "header": _encode(head), "sha256": sha256_file(path)}


def _companions(finetune: Checkpoint, base: Checkpoint) -> dict[str, dict[str, str]]:
    """The small files of the fine-tune: by digest where the base has the same, else with their content."""
    files = {}
    for name in [*copy_names(finetune.files), *([INDEX] if finetune.sharded else [])]:
        digest = sha256_file(finetune.files[name])
        same = name in base.files and sha256_file(base.files[name]) == digest
        files[name] = {"sha256": digest, **({} if same else {"data": _encode(finetune.files[name].read_bytes())})}
    return files


def _encode(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def restore(adapter: Adapter, base: Checkpoint, out: Path, *, progress: Report | None = None) -> Made:
    """Write the fine-tune's files into the new folder `out`; every one has the SHA-256 that it had.

    Raises UnsupportedAdapterError (not a delta of this kind), CorruptFileError, TargetMismatchError (another base),
    IntegrityError (other bytes came out), StorageError; `out` is untouched then.
    """
    config = adapter.config
    if config.get("peft_type") != PEFT_TYPE:
        raise UnsupportedAdapterError(
            f"an adapter of kind {adapter.signature.kind} holds no checkpoint",
            expected="a delta made by 'registry delta make'",
            found=adapter.signature.kind,
            remedy="merge it with 'registry compose'",
        )
    report = progress or (lambda step, done, total: None)
    deltas = {delta.target: delta for delta in adapter.deltas({name: name for name in config["tensors"]})}
    done = 0
    with FolderSink(out) as sink:
        for name, data in _files(config, base).items():
            sink.write(name, data)
        for shard in _listed(config):
            head = _decode(shard, "header")
            with sink.open(shard["name"]) as writer:
                writer.write(head)
                for name in _order(head, base):
                    report("restoring", done, base.nbytes)
                    spec = base.stored[name]
                    for chunk in _restored(spec, deltas[name].load()) if name in deltas else spec.chunks():
                        writer.write(chunk)
                    done += spec.nbytes
            _require(shard["name"], shard.get("sha256"), str(sink.files[shard["name"]]["sha256"]))
        sink.commit()
    return Made(out, sink.files, len(deltas), base.nbytes)


def _restored(spec: TensorSpec, delta: LoadedCheckpointDelta) -> Iterator[memoryview]:
    """The fine-tune's bytes of one tensor, some rows at a time."""
    rows = len(delta.bits)
    step = max(1, COPY_BYTES * rows // spec.nbytes)
    width = spec.nbytes // rows
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        own = np.frombuffer(spec.read_bytes(start * width, stop * width), BITS[spec.dtype]).reshape(stop - start, -1)
        yield memoryview(delta.restored_bits(start, stop, own).reshape(-1).view(np.uint8))


def _order(head: bytes, base: Checkpoint) -> list[str]:
    """The tensors of a shard in the order of their data, all of which the base must have in the same sizes."""
    try:
        entries = {name: entry for name, entry in json.loads(head[8:]).items() if name != "__metadata__"}
        names = sorted(entries, key=lambda name: entries[name]["data_offsets"])
        sizes = {name: entries[name]["data_offsets"][1] - entries[name]["data_offsets"][0] for name in names}
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        raise _damaged("header") from None
    wrong = [name for name in names if name not in base.stored or base.stored[name].nbytes != sizes[name]]
    if wrong:
        raise IncompatibleError(
            f"the base lacks {wrong[0]}, or has it in another size",
            expected="the base that the delta was made against",
            found=wrong[:20],
            remedy="give that base",
        )
    return names


def _files(config: Mapping[str, Any], base: Checkpoint) -> dict[str, bytes]:
    files = {}
    entries = config.get("files")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise _damaged("files")
    for name, entry in entries.items():
        _check_name(name)
        if "data" not in entry and name not in base.files:
            raise IncompatibleError(
                f"the base has no {name}", expected="the base's own files beside its weights", found=sorted(base.files)
            )
        files[name] = _decode(entry, "data") if "data" in entry else base.files[name].read_bytes()
        _require(name, entry.get("sha256"), hashlib.sha256(files[name]).hexdigest())
    return files


def _listed(config: Mapping[str, Any]) -> list[dict[str, str]]:
    shards = config.get("shards")
    valid = isinstance(shards, list) and all(
        isinstance(shard, dict) and isinstance(shard.get("name"), str) for shard in shards
    )
    if not valid or not shards:
        raise _damaged("shards")
    for shard in shards:
        _check_name(shard["name"])
    return shards


def _check_name(name: str) -> None:
    """Files lie side by side in the folder that is written, and nowhere else."""
    if not name or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise _damaged(f"the file name {name!r}")


def _decode(entry: Mapping[str, Any], key: str) -> bytes:
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(base64.b64decode(entry[key], validate=True), 1 << 30)
    except (zlib.error, ValueError, KeyError, TypeError):
        raise _damaged(key) from None
    if not stream.eof:
        raise _damaged(key)
    return data


def _damaged(what: str) -> CorruptFileError:
    return CorruptFileError(
        f"{CONFIG}: {what} is not what 'registry delta make' writes",
        expected="the config that was made with the delta",
        found=what,
        remedy="the file is damaged: make the delta again",
    )


def _require(name: str, expected: Any, found: str) -> None:
    if expected != found:
        raise IntegrityError(
            f"{name} is not the file that the delta was made of",
            expected=f"sha256 {expected}",
            found=found,
            remedy="give the base that the delta was made against, unchanged",
        )
