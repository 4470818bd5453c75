"""LoRAs made of other things: extracted from a fine-tune, or brought to another rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from composer.adapters import open_adapter
from composer.checkpoint_delta import Made, make_delta, restore
from composer.extract import RECORD, Converted, extract_lora
from composer.provenance import manifest_digest
from composer.recipe import is_path, split_reference
from composer.resize import resize_lora
from registry.claims import claim_from_folder, read_card
from registry.db import session_scope
from registry.interface import Progress
from registry.lifecycle import require_usable
from registry.schemas import ConversionInfo, DeltaInfo, FileInfo
from registry.services.catalogue import find_version
from registry.services.compositions import Compositions, ResolvedBase
from registry.store.local import LocalStore

__all__ = ["Conversions", "conversion_info", "resize_folder"]


class Conversions:
    """Reads bases and adapters by name or from folders; writes folders."""

    def __init__(self, engine: Engine, store: LocalStore, compositions: Compositions) -> None:
        self._engine = engine
        self._store = store
        self._compositions = compositions

    def extract(
        self, finetune: str, base: str, out: Path, rank: int | None, energy: float | None, ignore_rest: bool,
        progress: Progress | None,
    ) -> ConversionInfo:  # fmt: skip
        """A LoRA of what `finetune` changed in `base`; each is a registered base or a folder."""
        origin, tuned = (self._open(ref, progress) for ref in (base, finetune))
        converted = extract_lora(
            tuned.checkpoint,
            origin.checkpoint,
            out.expanduser().resolve(),
            rank=rank,
            energy=energy,
            ignore_rest=ignore_rest,
            inputs={"base": _facts(base, origin), "finetune": _facts(finetune, tuned)},
            progress=progress,
        )
        return conversion_info(converted)

    def make_delta(self, finetune: str, base: str, out: Path, progress: Progress | None) -> DeltaInfo:
        """The exact difference of two checkpoints; each is a registered base or a folder."""
        origin, tuned = (self._open(ref, progress) for ref in (base, finetune))
        made = make_delta(
            tuned.checkpoint,
            origin.checkpoint,
            out.expanduser().resolve(),
            fingerprint=origin.facts.fingerprint,
            base_name=Path(base).name,
            progress=progress,
        )
        return _delta_info(made)

    def restore_delta(self, ref: str, base: str, out: Path, progress: Progress | None) -> DeltaInfo:
        """The checkpoint that such a delta was made of."""
        adapter = open_adapter(Path(ref).expanduser()) if is_path(ref) else open_adapter(self._files(ref))
        origin = self._open(base, progress)
        return _delta_info(restore(adapter, origin.checkpoint, out.expanduser().resolve(), progress=progress))

    def _open(self, ref: str, progress: Progress | None) -> ResolvedBase:
        """A base of which every byte was read and is what was registered."""
        base = self._compositions.open_base(ref, progress)
        base.verify(self._store.chunks)
        return base

    def _files(self, ref: str) -> dict[str, Path]:
        with session_scope(self._engine) as session:
            name, version = split_reference(ref)
            row = find_version(session, name, version)
            require_usable(row, f"{row.adapter.full_name}@{row.version}", version)
            return {file.name: self._store.path(file.sha256, verify=True) for file in row.files}

    def resize(self, ref: str, out: Path, rank: int | None, energy: float | None) -> ConversionInfo:
        """An adapter, registered or in a folder, at another rank."""
        if is_path(ref):
            return resize_folder(Path(ref).expanduser(), out, rank, energy)
        with session_scope(self._engine) as session:
            row = find_version(session, *split_reference(ref))
            known = {
                "adapter": {"ref": f"{row.adapter.full_name}@{row.version}", "digest": row.digest},
                "base": {"fingerprint": row.base_fingerprint},
            }
        converted = resize_lora(
            open_adapter(self._files(ref)), out.expanduser().resolve(), rank=rank, energy=energy, inputs=known
        )
        return conversion_info(converted)


def _delta_info(made: Made) -> DeltaInfo:
    return DeltaInfo(
        out=str(made.out),
        output_digest=manifest_digest(made.files),
        nbytes=sum(int(entry["size"]) for entry in made.files.values()),
        files=_files_of(made.files),
        checkpoint_nbytes=made.checkpoint_bytes,
        tensors=made.tensors,
    )


def _files_of(files: Mapping[str, Mapping[str, int | str]]) -> tuple[FileInfo, ...]:
    return tuple(
        FileInfo(name=name, size=int(entry["size"]), sha256=str(entry["sha256"]))
        for name, entry in sorted(files.items())
    )


def _facts(ref: str, base: ResolvedBase) -> dict[str, Any]:
    return {"ref": Path(ref).name, "fingerprint": base.facts.fingerprint}


def resize_folder(
    folder: Path, out: Path, rank: int | None, energy: float | None, known: dict[str, Any] | None = None
) -> ConversionInfo:
    """An adapter in a folder, which needs no registry, at another rank; `known` is what a catalogue says of it."""
    adapter = open_adapter(folder)
    if known is None:
        claim = claim_from_folder(adapter, read_card(adapter.files.get("README.md")), read_paths=True)
        known = {"adapter": {"ref": folder.name}, "base": {"fingerprint": claim.fingerprint}}
    return conversion_info(resize_lora(adapter, out.expanduser().resolve(), rank=rank, energy=energy, inputs=known))


def conversion_info(converted: Converted) -> ConversionInfo:
    """What is said of a LoRA that was written."""
    files = {name: entry for name, entry in converted.files.items() if name != RECORD}
    return ConversionInfo(
        out=str(converted.out),
        output_digest=manifest_digest(files),
        nbytes=sum(int(entry["size"]) for entry in files.values()),
        files=_files_of(converted.files),
        kept_energy=converted.record["kept_energy"],
        record=converted.record,
    )
