"""Signing and verifying what lies here: composed models, adapters in folders, and versions of a registry.

sign     the key stays on this machine; a version's signature is made from its digests and sent to its registry
verify   OUT: every file against composition.json, then the signature and the attestation, then a second composition
         REF: its files as the registry gives them, then one of its signatures

A composed model is signed as a whole, composition.json and attestation.json included.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer.adapters import CONFIG, open_adapter
from composer.attestation import provenance_statement
from composer.errors import CorruptFileError, NotFoundError, TypedError, UsageError
from composer.files import folder_files, read_json, sha256_file
from composer.formats import find_format
from composer.provenance import installed_version, manifest_digest, read_record
from composer.recipe import Recipe, is_path
from composer.sinks import write_file
from registry.claims import fingerprint_folder
from registry.errors import CompositionChangedError, SignatureError
from registry.interface import Progress, Registry
from registry.schemas import PublishResult, Signed, Verification
from registry.services.publishing import publishable_files
from registry.signing import (
    ATTESTATION,
    MODEL_SIG,
    read_claim,
    sign_files,
    sign_statement,
    verify_files,
    verify_statement,
)
from registry.undo import recorded_recipe

__all__ = ["sign_folder", "sign_version", "signed_publish", "verify_folder", "verify_version"]

RECORD = "composition.json"
BESIDE = (RECORD, MODEL_SIG, ATTESTATION)
SIGNATURE = re.compile(r"model(-[0-9a-f]{8})?\.sig")


def sign_folder(folder: Path, key: Path, bundle: Path | None = None) -> Signed:
    """Sign a composed model, an adapter's publishable files or any other folder; writes `bundle`, or model.sig in it.

    A composed model must be what its record says, and gets attestation.json as well.
    Raises CompositionChangedError, UsageError for the key, MissingDependencyError, and StorageError.
    """
    folder = folder.expanduser().resolve()
    files = folder_files(folder)
    out = bundle.expanduser().resolve() if bundle else folder / MODEL_SIG
    if RECORD in files:
        record = _checked(folder, files, out)
        write_file(folder / ATTESTATION, sign_statement(_statement(record, files), key))
        files = folder_files(folder)
    digests = _digests(_own(files), out)
    if not digests:
        raise UsageError(f"{folder} holds nothing to sign", expected="a model or an adapter", found="no files")
    data = sign_files(folder.name, digests, key)
    write_file(out, data)
    return Signed(ref=str(folder), key=read_claim(data).key, files=tuple(sorted(digests)), bundle=str(out))


def sign_version(registry: Registry, ref: str, key: Path, bundle: Path | None = None) -> Signed:
    """Sign the files of a version by their digests, and give the signature to its registry."""
    info = registry.get_version(ref)
    label = f"{info.name}@{info.version}"
    digests = {file.name: file.sha256 for file in info.files}
    data = sign_files(label, digests, key)
    kept = registry.add_signature(f"{info.name}@{info.digest}", json.loads(data))
    if bundle:
        write_file(bundle.expanduser().resolve(), data)
    return Signed(ref=label, key=kept.key, files=tuple(sorted(digests)), bundle=bundle and str(bundle))


def signed_publish(registry: Registry, folder: Path, key: Path | None, **words: Any) -> PublishResult:
    """Publish as the registry does and sign the version with `key`; without one, a model.sig in the folder goes along.

    A key that cannot be used is refused before anything is published; a model.sig of other files is a warning.
    """
    if key is not None:
        sign_files("a key that works", {}, key)
    result = registry.publish(folder, **words)
    ref = f"{result.version.name}@{result.version.version}"
    path = folder.expanduser() / MODEL_SIG
    try:
        if key is not None:
            sign_version(registry, ref, key)
        elif path.is_file():
            registry.add_signature(ref, read_json(path))
        else:
            return result
    except (SignatureError, CorruptFileError) as error:
        warning = f"{MODEL_SIG} does not go along: {error.message}"
        return result.model_copy(update={"warnings": (*result.warnings, warning)})
    return result.model_copy(update={"version": registry.get_version(ref)})


def verify_folder(
    registry: Registry | None,
    folder: Path,
    *,
    public_key: Path | None = None,
    bundle: Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check the files of a composed model against its record, and what `public_key` signed; see the module.

    registry: where to compose it a second time, None for not doing that.
    Raises CompositionChangedError, SignatureError, NotFoundError (no signature), UsageError where nothing is asked of a
    folder that says nothing of itself, and what `compose` raises.
    """
    folder = folder.expanduser().resolve()
    files = folder_files(folder)
    path = bundle.expanduser().resolve() if bundle else folder / MODEL_SIG
    record = _checked(folder, files, path) if RECORD in files else None
    if record is None and (registry is not None or public_key is None):
        raise UsageError(
            f"{folder} is not a composed model: it does not say what it should hold",
            expected="a folder with composition.json, or a signature and its --public-key",
            found="no composition.json",
            remedy="give --public-key, without --rebuild",
        )
    signed_by, unsigned = None, ()
    if public_key is not None:
        signed_by, unsigned = _verify_signature(files, path, public_key)
    attested = record is not None and signed_by is not None and ATTESTATION in files
    if attested and public_key is not None and record is not None:
        verify_statement(files[ATTESTATION].read_bytes(), _statement(record, files), public_key)
    if registry is not None and record is not None:
        _rebuild(registry, folder, record, progress)
    return Verification(
        ref=str(folder),
        digest=record["output_digest"] if record else None,
        files=len(files),
        signed_by=signed_by,
        unsigned=tuple(unsigned),
        attested=attested,
        rebuilt=registry is not None,
    )


def verify_version(
    registry: Registry, ref: str, *, public_key: Path | None = None, progress: Progress | None = None
) -> Verification:
    """Fetch a version's files, each checked against its digest, and find one of its signatures that is by the key.

    Raises SignatureError, NotFoundError (no signature), and what `pull` raises.
    """
    info = registry.get_version(ref)
    label, digests = f"{info.name}@{info.version}", {file.name: file.sha256 for file in info.files}
    with tempfile.TemporaryDirectory() as scratch:
        registry.pull(f"{info.name}@{info.digest}", Path(scratch) / "files", progress=progress)
    signed_by = None
    if public_key is not None:
        bundles = registry.signatures(f"{info.name}@{info.digest}")
        if not bundles:
            raise _unsigned(label, f"registry sign {label} --key KEY")
        for index, item in enumerate(bundles):
            try:
                signed_by = verify_files(json.dumps(item.bundle).encode(), digests, public_key)
                break
            except SignatureError:
                if index == len(bundles) - 1:
                    raise
    return Verification(ref=label, digest=info.digest, files=len(digests), signed_by=signed_by)


def _verify_signature(files: Mapping[str, Path], path: Path, public_key: Path) -> tuple[str, list[str]]:
    """The key's id, and what of an adapter's folder is no part of it and was not signed."""
    if not path.is_file():
        raise _unsigned(str(path.parent), f"registry sign {path.parent} --key KEY")
    data = path.read_bytes()
    claimed = read_claim(data).files
    key = verify_files(data, _digests({name: files[name] for name in claimed if name in files}, path), public_key)
    beside = {name for name, file in files.items() if name not in claimed and not _is_signature(name, file, path)}
    if more := sorted(beside & set(_own(files))):
        raise SignatureError(
            f"what was signed is something else: not signed: {', '.join(more)}",
            expected="the files that were signed",
            found=more,
            remedy="take away what was added, or sign again what you know",
            unsigned=more,
        )
    return key, sorted(beside)


def _own(files: Mapping[str, Path]) -> Mapping[str, Path]:
    """What is signed of a folder: an adapter's publishable files, everything of others."""
    if CONFIG in files or find_format(files, None) is not None:
        return publishable_files(open_adapter(files))
    return files


def _digests(files: Mapping[str, Path], signature: Path) -> dict[str, str]:
    return {name: sha256_file(path) for name, path in files.items() if not _is_signature(name, path, signature)}


def _is_signature(name: str, path: Path, signature: Path) -> bool:
    """model.sig, those of further keys, and the one that was asked for by its path."""
    return SIGNATURE.fullmatch(name) is not None or path.resolve() == signature


def _checked(folder: Path, files: Mapping[str, Path], signature: Path) -> dict[str, Any]:
    """The record of a composed model whose files are all that it names and no others, itself as it was written."""
    record = read_json(files[RECORD])
    try:
        outputs = {str(name): (str(entry["sha256"]), int(entry["size"])) for name, entry in record["outputs"].items()}
        consistent = manifest_digest(record["outputs"]) == record["output_digest"] and bool(dict(record["tool"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(
            f"{RECORD} does not list what was written",
            expected="the record that 'registry compose' wrote",
            found=f"{type(error).__name__}: {error}",
            remedy="compose it again",
        ) from None
    missing = sorted(set(outputs) - set(files))
    more = sorted(name for name in set(files) - set(outputs) - set(BESIDE) if files[name].resolve() != signature)
    changed = sorted(
        name
        for name, (sha256, size) in outputs.items()
        if name in files and (files[name].stat().st_size != size or sha256_file(files[name]) != sha256)
    )
    if not (consistent and _as_written(files[RECORD])):
        changed.append(RECORD)
    if changed or missing or more:
        parts = [("changed", changed), ("missing", missing), ("not of it", more)]
        raise CompositionChangedError(
            f"{folder.name} is not what was composed: "
            + "; ".join(f"{word}: {', '.join(names)}" for word, names in parts if names),
            expected=record["output_digest"],
            found=[*changed, *missing, *more],
            remedy="compose it again, or take away what was added",
            changed=changed,
            missing=missing,
            more=more,
        )
    return record


def _as_written(path: Path) -> bool:
    try:
        read_record(path)
    except CorruptFileError:
        return False
    return True


def _statement(record: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    return provenance_statement(record, sha256_file(files[RECORD]))


def _rebuild(registry: Registry, folder: Path, record: dict[str, Any], progress: Progress | None) -> None:
    """Compose a second time, from inputs that have the recorded digests, and compare every file."""
    recipe, pins = recorded_recipe(record)
    recipe = _with_bases(registry, record, recipe, progress)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".rebuild", dir=folder.parent) as scratch:
        out = Path(scratch) / "again"
        result = registry.compose(recipe, out, accept_licences=True, progress=progress, pins=pins)
        found = {name: entry["sha256"] for name, entry in result.record["outputs"].items()}
    recorded = {name: entry["sha256"] for name, entry in record["outputs"].items()}
    if different := sorted({name for name, _ in found.items() ^ recorded.items()}):
        then, now = record["tool"], {name: installed_version(name) for name in record["tool"]}
        raise CompositionChangedError(
            f"composing {folder.name} again gives other bytes: {', '.join(different)}",
            expected=record["output_digest"],
            found=result.output_digest,
            remedy=f"it was composed by {_versions(then)}, now by {_versions(now)}; where these are the same, do not "
            "trust the folder",
            changed=different,
        )


def _with_bases(registry: Registry, record: Mapping[str, Any], recipe: Recipe, progress: Progress | None) -> Recipe:
    """The recipe with its own names for bases where they still mean the recorded weights; else with fingerprints."""
    base = record["base"]
    changes = {"base": _base(registry, recipe.base, base["fingerprint"], progress)}
    if "original" in base:
        original = base["original"]
        changes["original"] = _base(registry, recipe.original or original["ref"], original["fingerprint"], progress)
    return recipe.model_copy(update=changes)


def _base(registry: Registry, ref: str, fingerprint: str, progress: Progress | None) -> str:
    try:
        if is_path(ref):
            found = fingerprint_folder(Path(ref).expanduser().resolve(), progress).identity
        else:
            found = registry.get_base(ref).fingerprint
        return ref if found == fingerprint else fingerprint
    except TypedError:
        return fingerprint


def _unsigned(label: str, remedy: str) -> NotFoundError:
    return NotFoundError(f"{label} has no signature", expected=MODEL_SIG, found="none", remedy=f"'{remedy}'")


def _versions(tool: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in tool.items())
