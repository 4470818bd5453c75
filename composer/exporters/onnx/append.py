"""Add the adapters of one graph to another of the same base: what is there is neither moved nor changed.

    folder: base + a + b                    other: base + c, verified against torch when it was made
      adapters-<width>.safetensors    1.    c's vectors, behind the end that header and graph know of
      adapters-index-3.safetensors    2.    the index of all three, beside the one of two
      .model.onnx.*.tmp               3.    nodes for all three; run: c as in `other`, a and the base as before
      the headers, model.onnx,        4.    in this order; the old index goes
      composition.json

The files are then those of composing base + a + b + c at once, byte for byte. What fails before step 4 is cut off
again; where a process dies, the next call does that, because the graph says how much of each file counts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from composer.apart import adapter_names
from composer.errors import ConflictError, IncompatibleError, OnnxVerificationError, TypedError
from composer.exporters.onnx import MODEL_FILE, write_aside
from composer.exporters.onnx.adapted import activate, adapters_in
from composer.exporters.onnx.architectures import architecture_of
from composer.exporters.onnx.multi import insert_rows, strip_rows
from composer.exporters.onnx.multi_index import Module, arrange, make_index, note_rows, noted_rows, read_index
from composer.exporters.onnx.session import forward, open_session
from composer.exporters.onnx.vectors import (
    Block,
    append_vectors,
    encode_index,
    index_file,
    index_spec,
    seal,
    vectors_file,
    vectors_spec,
)
from composer.exporters.onnx.verify import RELATIVE_TOLERANCE, SMALLEST_TOLERANCE
from composer.files import read_json, sha256_file
from composer.provenance import manifest_digest, read_record, record_file, sealed
from composer.recipe import Recipe
from composer.sinks import fsync_folder, storage_errors

if TYPE_CHECKING:
    import onnx

__all__ = ["append_adapters"]

RECORD = "composition.json"
ROWS, LENGTH = 8, 6  # of a batch that is run


@dataclass(frozen=True, slots=True)
class Held:
    """What a folder's graph holds: the base's graph alone, and its adapters."""

    folder: Path
    record: dict[str, Any]
    model: onnx.ModelProto
    names: list[str]
    modules: dict[str, Module]
    counts: dict[int, int]
    blocks: list[dict[str, Block]]


def append_adapters(folder: Path, other: Path) -> dict[str, Any]:
    """Add the adapters in `other` to the graph in `folder`; returns the new record, which is in composition.json.

    Both were composed with placement multi, on one base. Raises NotFoundError or CorruptFileError (no record, or one
    that was changed), OnnxExportError (another placement), IncompatibleError (another base), ConflictError (someone
    else is adding), OnnxVerificationError (an adapter computes something else than before) or StorageError; the folder
    is as it was then.
    """
    with _locked(folder):
        here, new = _open(folder), _open(other)
        _check_base(here, new)
        names = adapter_names([entry["ref"] for held in (here, new) for entry in held.record["adapters"]])
        counts = {width: here.counts.get(width, 1) + new.counts.get(width, 1) - 1
                  for width in sorted({*here.counts, *new.counts})}  # fmt: skip
        modules = _joined(here.modules, new.modules)
        blocks = [*here.blocks, *(_moved(each, new.modules, here.counts) for each in new.blocks)]
        grown, made = [width for width in new.counts if width in here.counts], [index_file(len(names))]
        aside: Path | None = None
        try:
            for width in new.counts:
                if width in here.counts:
                    _grow(here, new, width)
                else:
                    made.append(vectors_file(width))
                    _copy(other, folder, vectors_file(width))
            groups = arrange(here.model.graph, modules)
            _write(folder / index_file(len(names)), encode_index(make_index(groups, blocks)))
            insert_rows(here.model, folder, groups, len(names), counts)
            note_rows(here.model, names, modules, counts)
            aside = write_aside(folder, here.model)
            largest, tolerance = _run(here, new, aside)
        except BaseException:
            for name in made:
                (folder / name).unlink(missing_ok=True)
            for width in grown:
                with suppress(TypedError):
                    seal(folder, width, here.counts[width])
            if aside is not None:
                aside.unlink(missing_ok=True)
            raise
        for width in grown:
            seal(folder, width, counts[width])
        os.replace(aside, folder / MODEL_FILE)
        (folder / index_file(len(here.names))).unlink()
        changed = [MODEL_FILE, index_file(len(names)), *map(vectors_file, new.counts)]
        record = sealed(_record(here, new, names, changed, largest, tolerance))
        _write(folder / f".{RECORD}.tmp", record_file(record))
        os.replace(folder / f".{RECORD}.tmp", folder / RECORD)
        fsync_folder(folder)
        return record


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One at a time: the lock is on the folder itself, and goes with this process."""
    read_record(folder / RECORD)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConflictError(
            f"{folder}: someone else is adding adapters to it",
            expected="one at a time",
            found="a lock on the folder",
            remedy="try again when that is done",
            path=folder,
        ) from None
    finally:
        os.close(descriptor)


def _open(folder: Path) -> Held:
    import onnx

    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    names, modules, counts = noted_rows(model)
    strip_rows(model)
    groups = arrange(model.graph, modules)
    index = index_spec(folder, len(names), 2 * sum(module.rank for module in modules.values())).read()
    record = read_record(folder / RECORD)
    return Held(folder, record, model, names, modules, counts, read_index(groups, index))


def _check_base(here: Held, new: Held) -> None:
    """Raise IncompatibleError unless all weights and the config are the same bytes."""

    def base(held: Held) -> dict[str, str]:
        outputs = held.record["outputs"]
        weights = (name for name in outputs if name.endswith(".safetensors") and not name.startswith("adapters-"))
        return {name: outputs[name]["sha256"] for name in (*weights, "config.json")}

    if base(here) != base(new):
        raise IncompatibleError(
            f"{here.folder}: the adapters to add were composed on another base",
            expected=here.record["base"],
            found=new.record["base"],
            remedy="compose them with the same base and number format",
        )


def _joined(one: dict[str, Module], other: dict[str, Module]) -> dict[str, Module]:
    """All modules, each with the larger of its ranks."""
    return {name: max((side[name] for side in (one, other) if name in side), key=lambda module: module.rank)
            for name in sorted({*one, *other})}  # fmt: skip


def _moved(blocks: dict[str, Block], modules: dict[str, Module], before: dict[int, int]) -> dict[str, Block]:
    """The blocks as they lie behind what the files had `before`; row 0 of each file is not added once more."""
    moved = {}
    for name, block in blocks.items():
        a, b = (before.get(width, 1) - 1 for width in (modules[name].inputs, modules[name].outputs))
        moved[name] = Block(block.rank, block.a + a, block.b + b)
    return moved


def _grow(here: Held, new: Held, width: int) -> None:
    spec = vectors_spec(new.folder, width, new.counts[width])
    zero = 4 * width
    step = max(1, (1 << 22) // zero) * zero
    chunks = (memoryview(spec.read_bytes(at, min(at + step, spec.nbytes))) for at in range(zero, spec.nbytes, step))
    append_vectors(here.folder, width, here.counts[width], chunks)


def _copy(source: Path, target: Path, name: str) -> None:
    with storage_errors(f"writing {name}"):
        shutil.copyfile(source / name, target / name)
        with (target / name).open("rb") as file:
            os.fsync(file.fileno())


def _write(path: Path, data: bytes) -> None:
    with storage_errors(f"writing {path.name}"), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _run(here: Held, new: Held, path: Path) -> tuple[float, float]:
    """The largest difference of a new adapter from its own graph, and of the base and an old one from the old graph."""
    joined = open_session(path)
    names = [entry["name"] for entry in adapters_in(joined)[1]]
    before, others = ((open_session(held.folder / MODEL_FILE), held) for held in (here, new))
    largest, scale = 0.0, 0.0
    known = len(here.names)
    batches = [(before, [(names[0], here.names[0]), (None, None)])]
    pairs = list(zip(names[known:], new.names, strict=True))
    batches += [(others, pairs[at : at + ROWS]) for at in range(0, len(pairs), ROWS)]
    for (session, held), rows in batches:
        found = _logits(activate(joined, here.folder, [name for name, _ in rows]), held, len(rows))
        wanted = _logits(activate(session, held.folder, [name for _, name in rows]), held, len(rows))
        largest = float(np.maximum(largest, np.abs(found - wanted).max()))  # unlike max, it keeps NaN
        scale = max(scale, float(np.abs(wanted).max()))
    tolerance = max(SMALLEST_TOLERANCE, RELATIVE_TOLERANCE * scale)
    if not largest <= tolerance:
        raise OnnxVerificationError(
            f"{here.folder}: with the new adapters the graph differs from what it was made of by {largest:.3g}",
            expected=f"at most {tolerance:.3g}",
            found=largest,
            remedy="nothing was changed; compose all adapters anew",
            max_abs_diff=largest,
            tolerance=tolerance,
        )
    return largest, tolerance


def _logits(session: Any, held: Held, rows: int) -> np.ndarray:
    """What the graph gives for seeded ids, another text in each row."""
    config = read_json(held.folder / "config.json")
    architecture = architecture_of(config)
    ids = np.random.default_rng(0).integers(1, config["vocab_size"], (rows, LENGTH))
    if architecture.is_causal:
        return forward(session, ids, np.ones_like(ids))[0]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    found: np.ndarray = session.run([architecture.output], {name: feeds[name] for name in architecture.inputs})[0]
    return found


def _record(
    here: Held, new: Held, names: list[str], changed: list[str], largest: float, tolerance: float
) -> dict[str, Any]:
    """The record of the whole: inputs and checks of both, and the digests of the files as they are now."""
    record, added = here.record, new.record
    recipe = {**record["recipe"], "adapters": [*record["recipe"]["adapters"], *added["recipe"]["adapters"]]}
    export, others = dict(record["export"]), added["export"]
    entries = [*export["adapters"], *others["adapters"]]
    export["adapters"] = [
        {**entry, "name": name, "id": number}
        for number, (entry, name) in enumerate(zip(entries, names, strict=True), 1)
    ]
    run = {"check": "appended", "adapters": names[len(here.names) :], "max_abs_diff": largest, "tolerance": tolerance}
    export["checks"] = [*export["checks"], *others["checks"], run]
    worst = max((export, others), key=lambda each: each["max_abs_diff"] / each["tolerance"])
    export |= {"max_abs_diff": worst["max_abs_diff"], "tolerance": worst["tolerance"]}
    outputs = {name: entry for name, entry in record["outputs"].items() if name != index_file(len(here.names))}
    for name in changed:
        path = here.folder / name
        outputs[name] = {"sha256": sha256_file(path), "size": path.stat().st_size}
    return {
        **record,
        **({"key": _key(record, added)} if "key" in record else {}),
        "recipe": recipe,
        "recipe_text": str(Recipe.model_validate(recipe)),
        "adapters": [*record["adapters"], *added["adapters"]],
        "warnings": list(dict.fromkeys([*record["warnings"], *added["warnings"]])),
        **({"advice": [*record.get("advice", []), *added["advice"]]} if "advice" in added else {}),
        "export": export,
        "outputs": dict(sorted(outputs.items())),
        "output_digest": manifest_digest(outputs),
    }


def _key(record: dict[str, Any], added: dict[str, Any]) -> str:
    return hashlib.sha256(f"{record['key']} {added['key']}".encode()).hexdigest()
