"""`registry doctor`: is everything in place?"""

from __future__ import annotations

import importlib.util
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sqlalchemy import Engine, select

from registry.db import current_revision, head_revision, session_scope
from registry.models import BaseFileRow, BaseModelRow, VersionFileRow
from registry.schemas import DoctorCheck
from registry.store.layout import Layout

__all__ = ["diagnose"]

LOW_DISK_BYTES = 2 << 30


def diagnose(engine: Engine, layout: Layout) -> tuple[DoctorCheck, ...]:
    """Home, database, stored files (presence and size), bases, libraries."""
    return (_home(layout), _disk(layout), _schema(engine), _blobs(engine, layout), *_bases(engine), *_libraries())


def _home(layout: Layout) -> DoctorCheck:
    writable = os.access(layout.home, os.W_OK)
    return DoctorCheck(
        name="home",
        ok=writable,
        detail=str(layout.home),
        remedy=None if writable else "make it writable, or set REGISTRY_HOME",
    )


def _disk(layout: Layout) -> DoctorCheck:
    free = shutil.disk_usage(layout.home).free
    enough = free > LOW_DISK_BYTES
    return DoctorCheck(
        name="disk", ok=enough, detail=f"{free >> 20} MiB free", remedy=None if enough else "free some space"
    )


def _schema(engine: Engine) -> DoctorCheck:
    found, wanted = current_revision(engine), head_revision(engine)
    return DoctorCheck(
        name="database",
        ok=found == wanted,
        detail=f"{engine.dialect.name}, revision {found}",
        remedy=None if found == wanted else f"this version expects revision {wanted}: install the version that made it",
    )


def _blobs(engine: Engine, layout: Layout) -> DoctorCheck:
    with session_scope(engine) as session:
        files = session.execute(select(VersionFileRow.sha256, VersionFileRow.size).distinct()).all()
    bad = [sha256 for sha256, size in files if not _has_size(layout.blob(sha256), size)]
    return DoctorCheck(
        name="store",
        ok=not bad,
        detail=f"{len(files)} files, {len(bad)} missing or of the wrong size",
        remedy=f"publish again or restore from a backup: {', '.join(bad[:3])}" if bad else None,
    )


def _bases(engine: Engine) -> list[DoctorCheck]:
    checks = []
    with session_scope(engine) as session:
        for row in session.scalars(select(BaseModelRow).order_by(BaseModelRow.name)):
            files = session.scalars(select(BaseFileRow).where(BaseFileRow.base_id == row.id))
            bad = [file.name for file in files if not _has_size(Path(row.location) / file.name, file.size)]
            checks.append(
                DoctorCheck(
                    name=f"base {row.name}",
                    ok=not bad,
                    detail=row.location,
                    remedy=f"missing or changed: {', '.join(bad[:3])}; restore them, or add the base from its new place"
                    if bad
                    else None,
                )
            )
    return checks


def _libraries() -> list[DoctorCheck]:
    checks = [
        DoctorCheck(name=name, ok=True, detail=version(name)) for name in ("torch", "transformers", "safetensors")
    ]
    if importlib.util.find_spec("onnxruntime") is None:
        return [
            *checks,
            DoctorCheck(
                name="onnxruntime",
                ok=False,
                detail="not installed",
                remedy="pip install 'adapter-registry[cpu]' (or [cuda]) to export ONNX",
            ),
        ]
    import onnxruntime

    both = _installed("onnxruntime") and _installed("onnxruntime-gpu")
    return [
        *checks,
        DoctorCheck(
            name="onnxruntime",
            ok=not both,
            detail=f"{onnxruntime.__version__}, {', '.join(onnxruntime.get_available_providers())}",
            remedy="both onnxruntime and onnxruntime-gpu are installed: uninstall both, then install one"
            if both
            else None,
        ),
    ]


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
