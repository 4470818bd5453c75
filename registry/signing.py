"""Signatures over files, made and checked offline with an elliptic-curve key of one's own.

model.sig          a bundle of OpenSSF's model signing: a DSSE envelope around an in-toto statement that lists every
                   file with its sha256; `model_signing verify key` reads it too
attestation.json   a DSSE envelope around the in-toto provenance of a composed model (composer.attestation)

A key is known by the sha256 of its public half as PEM, which is what such bundles call it. Source: the bundle format of
sigstore, github.com/secure-systems-lab/dsse, in-toto.io/Statement/v1
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from composer.errors import MissingDependencyError, UsageError
from registry.errors import SignatureError

__all__ = [
    "ATTESTATION",
    "MODEL_SIG",
    "Claim",
    "read_claim",
    "sign_files",
    "sign_statement",
    "verify_files",
    "verify_statement",
]

MODEL_SIG, ATTESTATION = "model.sig", "attestation.json"
PREDICATE = "https://model_signing/signature/v1.0"
IN_TOTO = "application/vnd.in-toto+json"
SERIALISATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [MODEL_SIG]}
MAX_BUNDLE_BYTES = 16 << 20
PASSWORD = "REGISTRY_KEY_PASSWORD"


@dataclass(frozen=True, slots=True)
class Claim:
    """What a bundle says, before its signature is checked: which key, and the sha256 of each file."""

    key: str
    files: Mapping[str, str]


def sign_files(name: str, files: Mapping[str, str], key: Path) -> bytes:
    """The bundle that signs `files` (name to sha256) as the model `name`.

    key: an EC private key in PEM (P-256, P-384 or P-521); REGISTRY_KEY_PASSWORD opens an encrypted one.
    Raises MissingDependencyError and UsageError (a key that cannot be used).
    """
    signing, _, manifests = _library()
    found = _manifest(manifests, name, files)
    with _key_errors(key), tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / MODEL_SIG
        config = signing.Config().use_elliptic_key_signer(private_key=key, password=_password())
        config.set_hashing_config(_Known(found)).sign(out, out)
        return out.read_bytes()


def read_claim(bundle: bytes) -> Claim:
    """What a bundle says, unchecked. Raises SignatureError for one that is not a bundle over sha256 of whole files."""
    try:
        if len(bundle) > MAX_BUNDLE_BYTES:
            raise ValueError(f"{len(bundle)} bytes")
        fields = json.loads(bundle)
        statement = json.loads(base64.b64decode(fields["dsseEnvelope"]["payload"], validate=True))
        predicate = statement["predicate"]
        if statement["predicateType"] != PREDICATE or predicate["serialization"]["method"] != "files":
            raise ValueError(f"{statement['predicateType']} over {predicate['serialization']['method']}")
        files: dict[str, str] = {}
        for item in predicate["resources"]:
            if item["algorithm"] != "sha256" or item["name"] in files:
                raise ValueError(f"{item['name']}, by {item['algorithm']}")
            files[str(item["name"])] = str(item["digest"])
        key = fields["verificationMaterial"]["publicKey"]["hint"]
        if not (isinstance(key, str) and len(key) == 64 and set(key) <= set("0123456789abcdef")):
            raise ValueError(f"the key {key!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
        raise SignatureError(
            "the signature cannot be read",
            expected="a bundle of model-signing 1.x, signed with a key, over the sha256 of whole files",
            found=f"{type(error).__name__}: {error}"[:200],
            remedy="sign again with 'registry sign'",
        ) from None
    return Claim(key, files)


def verify_files(bundle: bytes, files: Mapping[str, str], public_key: Path) -> str:
    """Check that `public_key` signed exactly these files (name to sha256); returns the key's id.

    Raises SignatureError, which names what was signed and differs, MissingDependencyError, and UsageError (no key).
    """
    claim = read_claim(bundle)
    _, verifying, manifests = _library()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / MODEL_SIG
        path.write_bytes(bundle)
        with _key_errors(public_key):
            config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        config.set_hashing_config(_Known(_manifest(manifests, "model", claim.files)))
        with _signature_errors(claim.key, public_key):
            config.verify(path, path)
    different = sorted(name for name in claim.files if name in files and files[name] != claim.files[name])
    missing, more = sorted(set(claim.files) - set(files)), sorted(set(files) - set(claim.files))
    if different or missing or more:
        parts = [("changed", different), ("missing", missing), ("not signed", more)]
        raise SignatureError(
            "what was signed is something else: "
            + "; ".join(f"{word}: {', '.join(names)}" for word, names in parts if names),
            expected="the files that were signed",
            found=[*different, *missing, *more],
            remedy="get the files again from where they were signed",
            changed=different,
            missing=missing,
            unsigned=more,
        )
    return claim.key


def sign_statement(statement: Mapping[str, Any], key: Path) -> bytes:
    """A DSSE envelope around an in-toto statement. Raises as `sign_files`."""
    _library()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner, SSlibKey

    with _key_errors(key):
        private = load_pem_private_key(key.read_bytes(), _password())
        public = SSlibKey.from_crypto(private.public_key(), _key_id(private.public_key()))  # type: ignore[arg-type]
        envelope = Envelope(json.dumps(statement, sort_keys=True).encode(), IN_TOTO, {})
        envelope.sign(CryptoSigner(private, public))  # type: ignore[arg-type]
    return (json.dumps(envelope.to_dict(), indent=2) + "\n").encode()


def verify_statement(data: bytes, statement: Mapping[str, Any], public_key: Path) -> str:
    """Check that `public_key` signed exactly this statement; returns the key's id. Raises as `verify_files`."""
    _library()
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

    with _key_errors(public_key):
        public = load_pem_public_key(public_key.read_bytes())
        key = SSlibKey.from_crypto(public, _key_id(public))  # type: ignore[arg-type]
    with _signature_errors(f"of {ATTESTATION}", public_key):
        envelope = Envelope.from_dict(json.loads(data))
        envelope.verify([key], 1)
    if envelope.payload_type != IN_TOTO or json.loads(envelope.payload) != statement:
        raise SignatureError(
            f"{ATTESTATION} says something else than composition.json",
            expected="the provenance that composition.json gives",
            found="another statement",
            remedy="compose and sign again",
        )
    return str(key.keyid)


class _Known:
    """In the place of model-signing's own hashing: digests that are known already, such as those of stored files."""

    def __init__(self, manifest: Any) -> None:
        self._manifest = manifest

    def hash(self, path: Path, *, files_to_hash: object = None) -> Any:
        return self._manifest

    def add_ignored_paths(self, *, model_path: Path, paths: object) -> None:
        """Nothing is looked for, so nothing is left out."""


def _manifest(manifests: Any, name: str, files: Mapping[str, str]) -> Any:
    kind = manifests.SerializationType.from_args(SERIALISATION)
    digest = manifests.hashing.Digest
    items = [
        kind.new_item(str(PurePosixPath(file)), digest("sha256", bytes.fromhex(sha))) for file, sha in files.items()
    ]
    return manifests.Manifest(name, items, kind)


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import manifest, signing, verifying
    except ImportError as error:
        raise MissingDependencyError(
            "signatures need model-signing, which is not installed",
            expected="the extra 'sign'",
            found=str(error),
            remedy="pip install 'adapter-registry[sign]'",
            package="model-signing",
            extras=["sign"],
        ) from error
    return signing, verifying, manifest


def _password() -> bytes | None:
    text = os.environ.get(PASSWORD)
    return text.encode() if text else None


def _key_id(public: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem: bytes = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


@contextmanager
def _key_errors(key: Path) -> Iterator[None]:
    """What reading a key may raise, as a UsageError that says how to make one."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError, KeyError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"{key} cannot be used as a key",
            expected="an elliptic-curve key in PEM (P-256, P-384 or P-521)",
            found=str(error) or type(error).__name__,
            remedy="openssl ecparam -name prime256v1 -genkey -noout -out key.pem; openssl ec -in key.pem -pubout -out "
            f"key.pub; {PASSWORD} opens an encrypted one",
        ) from None


@contextmanager
def _signature_errors(signed: str, public_key: Path) -> Iterator[None]:
    """What a bad signature may raise, as a SignatureError."""
    from cryptography.exceptions import InvalidSignature
    from securesystemslib.exceptions import Error

    try:
        yield
    except (InvalidSignature, Error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SignatureError(
            f"the signature is not by {public_key.name}",
            expected=f"a signature by the key in {public_key.name}",
            found=f"{signed[:16]}: {error or type(error).__name__}",
            remedy="ask the signer for the public key, and do not use the files",
        ) from None
