"""What an adapter, a base or a composed model holds, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select

from composer.adapters import CONFIG, Adapter, open_adapter
from composer.checkpoint import Checkpoint, open_checkpoint
from composer.files import folder_files, read_json
from composer.formats import find_format
from composer.provenance import changed_outputs
from composer.recipe import is_path, split_reference
from composer.tensors import TensorSpec
from registry.db import session_scope
from registry.lifecycle import require_usable
from registry.models import BaseModelRow
from registry.services.catalogue import find_version, version_info
from registry.store.local import LocalStore

__all__ = ["Inspection", "inspect_folder"]


class Inspection:
    """Reads headers and records; changes nothing."""

    def __init__(self, engine: Engine, store: LocalStore) -> None:
        self._engine = engine
        self._store = store

    def inspect(self, ref: str) -> dict[str, Any]:
        """A folder, the name of a base, or the name of an adapter."""
        if is_path(ref):
            return inspect_folder(Path(ref).expanduser())
        with session_scope(self._engine) as session:
            base = session.scalar(
                select(BaseModelRow).where((BaseModelRow.name == ref) | (BaseModelRow.fingerprint == ref))
            )
            if base is not None:
                return {"type": "base", "name": base.name, "fingerprint": base.fingerprint,
                        **_checkpoint(open_checkpoint(Path(base.location)))}  # fmt: skip
            name, version = split_reference(ref)
            info = version_info(session, find_version(session, name, version))
            require_usable(info, f"{info.name}@{info.version}", version)
        adapter = open_adapter({file.name: self._store.path(file.sha256, verify=True) for file in info.files})
        return {
            "type": "adapter",
            "name": info.name,
            "version": info.version,
            "digest": info.digest,
            **_adapter(adapter),
        }


def inspect_folder(folder: Path) -> dict[str, Any]:
    """An adapter, a composed model (its outputs are hashed and compared) or a checkpoint."""
    files = folder_files(folder)
    if CONFIG in files or find_format(files, None) is not None:
        return {"type": "adapter", "path": str(folder), **_adapter(open_adapter(files))}
    facts = _checkpoint(open_checkpoint(files))
    if "composition.json" not in files:
        return {"type": "checkpoint", "path": str(folder), **facts}
    record = read_json(files["composition.json"])
    changed = changed_outputs(folder)
    return {
        "type": "composition",
        "path": str(folder),
        "intact": not changed,
        "changed": changed,
        "record": record,
        **facts,
    }


def _adapter(adapter: Adapter) -> dict[str, Any]:
    signature = adapter.signature
    return {
        "kind": signature.kind,
        "format": adapter.format,
        "rank": signature.rank,
        "alpha": signature.alpha,
        "target_modules": list(signature.target_modules),
        "parameters": signature.parameters,
        **({"virtual_tokens": signature.virtual_tokens} if signature.virtual_tokens else {}),
        **({"adds": [addition.summary for addition in adapter.additions()]} if adapter.adds else {}),
        "base_model": adapter.base_name,
        "tensors": _tensors(adapter.header.tensors.values()),
    }


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "architecture": checkpoint.architecture,
        "nbytes": checkpoint.nbytes,
        "files": [shard.name for shard in checkpoint.shards],
        "tensors": _tensors(checkpoint.stored.values()),
    }


def _tensors(specs: Any) -> list[dict[str, Any]]:
    return [_tensor(spec) for spec in sorted(specs, key=lambda spec: spec.name)]


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}
