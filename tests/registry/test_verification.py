"""Signatures and proofs: what is signed, changed behind a signature, or claimed of a composition that was not made so.

Oracles: model-signing's own verifier over the files, the DSSE formula with `cryptography`, and a second composition.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from fastapi.testclient import TestClient

from composer.errors import IntegrityError, MissingDependencyError, NotFoundError, UsageError
from composer.files import sha256_file
from composer.provenance import manifest_digest, record_file, sealed
from composer.recipe import Export, parse_recipe
from registry.access import Principal, Scope
from registry.api.app import create_app
from registry.client import RemoteRegistry
from registry.errors import CompositionChangedError, ForbiddenError, SignatureError
from registry.services.jobs import JobService
from registry.services.local import LocalRegistry, open_registry
from registry.signing import sign_files, verify_files
from registry.verification import sign_folder, sign_version, signed_publish, verify_folder, verify_version
from tests.support import edit_json, write_base, write_lora

MODULE = "model.layers.0.self_attn.q_proj"
WEIGHTS = "model.safetensors"
RECIPE = "base+team/shout:0.5+team/json:0.5"


class Keys(NamedTuple):
    """A private key, and its public half."""

    private: Path
    public: Path


def make_keys(folder: Path, name: str, curve: ec.EllipticCurve, password: bytes | None = None) -> Keys:
    """A new pair in PEM."""
    key = ec.generate_private_key(curve)
    how = BestAvailableEncryption(password) if password else NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return Keys(private, public)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """The signer's."""
    return make_keys(tmp_path_factory.mktemp("keys"), "signer", ec.SECP256R1())


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Somebody else's."""
    return make_keys(tmp_path_factory.mktemp("keys"), "other", ec.SECP384R1())


def fill(registry: LocalRegistry, folder: Path) -> LocalRegistry:
    """A base and two adapters, whose folders lie in `folder`."""
    random = np.random.default_rng(0)
    base = write_base(folder / "base", {f"{MODULE}.weight": random.normal(0, 1, (6, 4)).astype(np.float32)})
    registry.add_base(base, name="base", license="apache-2.0")
    for seed, name in enumerate(("shout", "json")):
        adapter = write_lora(folder / name, {MODULE: (6, 4)}, seed=seed)
        registry.publish(adapter, name=f"team/{name}", version="1.0.0", base="base", license="mit")
    return registry


@pytest.fixture
def filled(registry: LocalRegistry, tmp_path: Path) -> LocalRegistry:
    """A registry with a base and two adapters."""
    return fill(registry, tmp_path)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRegistry]:
    """One that no test changes."""
    folder = tmp_path_factory.mktemp("catalogue")
    opened = fill(open_registry(folder / "home"), folder)
    opened.compose(parse_recipe(RECIPE), folder / "home" / "both")
    yield opened
    opened.close()


@pytest.fixture
def composed(catalogue: LocalRegistry, tmp_path: Path) -> Path:
    """A composition of both, to be tampered with."""
    return shutil.copytree(catalogue.home / "both", tmp_path / "both")


def remote_of(service: TestClient) -> RemoteRegistry:
    """A client of a service in this process."""

    def ask(request: httpx.Request) -> httpx.Response:
        answer = service.request(
            request.method, str(request.url), headers=dict(request.headers), content=request.read()
        )
        return httpx.Response(answer.status_code, content=answer.content, headers=answer.headers)

    return RemoteRegistry("http://testserver", httpx.MockTransport(ask))


def tamper(folder: Path, name: str) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_each_curve_of_the_format_signs(tmp_path: Path, curve: ec.EllipticCurve, monkeypatch: Any) -> None:
    """With an encrypted key, which needs its password."""
    pair = make_keys(tmp_path, "own", curve, b"secret")
    files = {"a.safetensors": "0" * 64, "sub/b.json": "f" * 64}
    with pytest.raises(UsageError, match="cannot be used as a key"):
        sign_files("model", files, pair.private)
    monkeypatch.setenv("REGISTRY_KEY_PASSWORD", "secret")
    assert verify_files(sign_files("model", files, pair.private), files, pair.public) == sha256_file(pair.public)


def test_the_reference_verifier_accepts_what_is_signed(composed: Path, keys: Keys) -> None:
    """Oracle: model-signing reads the folder by itself, and refuses it after one bit has changed."""
    from model_signing.verifying import Config

    sign_folder(composed, keys.private)
    config = Config().use_elliptic_key_verifier(public_key=keys.public)
    config.verify(composed, composed / "model.sig")
    assert verify_folder(None, composed, public_key=keys.public).attested
    tamper(composed, WEIGHTS)
    with pytest.raises(ValueError, match=WEIGHTS):
        Config().use_elliptic_key_verifier(public_key=keys.public).verify(composed, composed / "model.sig")


@pytest.mark.parametrize("what", ["changed", "missing", "more", "record"])
def test_a_composed_model_that_changed_is_refused_by_name(composed: Path, what: str) -> None:
    """One bit, one file less, one more, or a record that does not agree with itself."""
    name = {"changed": WEIGHTS, "missing": "config.json", "more": "modeling.py", "record": "composition.json"}[what]
    assert verify_folder(None, composed).files == len(list(composed.iterdir()))
    if what == "changed":
        tamper(composed, name)
    elif what == "missing":
        (composed / name).unlink()
    elif what == "more":
        (composed / name).write_text("import os")
    else:
        edit_json(composed / name, output_digest="sha256:" + "0" * 64)
    with pytest.raises(CompositionChangedError, match=name) as caught:
        verify_folder(None, composed)
    assert name in caught.value.found


@pytest.mark.parametrize("name", ["composition.json", "attestation.json", "model.sig"])
def test_what_is_said_of_a_model_cannot_be_changed_behind_the_signature(composed: Path, keys: Keys, name: str) -> None:
    """Its record, its attestation, and the list that was signed."""
    sign_folder(composed, keys.private)
    if name == "composition.json":
        record = {**json.loads((composed / name).read_text()), "warnings": ["all is well"]}
        (composed / name).write_bytes(record_file(sealed(record)))
    elif name == "attestation.json":
        (composed / name).write_text(json.dumps({**json.loads((composed / name).read_text()), "payload": "e30="}))
    else:
        bundle = json.loads((composed / name).read_text())
        said = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        said["subject"][0]["name"] = "another model"
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(said).encode()).decode()
        (composed / name).write_text(json.dumps(bundle))
    with pytest.raises(SignatureError, match=r"signer\.pub" if name == "model.sig" else name):
        verify_folder(None, composed, public_key=keys.public)


def test_another_key_is_refused(composed: Path, keys: Keys, others: Keys) -> None:
    """And so is a folder that nobody signed, one that was changed before it was signed, and a key that is none."""
    with pytest.raises(NotFoundError, match="no signature"):
        verify_folder(None, composed, public_key=keys.public)
    sign_folder(composed, keys.private)
    with pytest.raises(SignatureError, match=r"not by other\.pub"):
        verify_folder(None, composed, public_key=others.public)
    with pytest.raises(UsageError, match="cannot be used as a key"):
        verify_folder(None, composed, public_key=keys.private)
    tamper(composed, WEIGHTS)
    with pytest.raises(CompositionChangedError, match=WEIGHTS):
        sign_folder(composed, keys.private)


def test_the_attestation_names_what_went_in_and_came_out(composed: Path, catalogue: LocalRegistry, keys: Keys) -> None:
    """Oracle: the envelope's signature by the formula of DSSE, and its statement against the catalogue."""
    sign_folder(composed, keys.private)
    envelope = json.loads((composed / "attestation.json").read_text())
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    public: Any = load_pem_public_key(keys.public.read_bytes())
    public.verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed, ec.ECDSA(hashes.SHA256()))
    statement = json.loads(payload)
    assert (statement["_type"], statement["predicateType"]) == (
        "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1",
    )  # fmt: skip
    subjects = {item["name"]: item["digest"]["sha256"] for item in statement["subject"]}
    assert subjects == {name: sha256_file(composed / name) for name in ("config.json", WEIGHTS)}
    built = statement["predicate"]["buildDefinition"]
    assert built["externalParameters"]["recipe_text"] == RECIPE
    assert built["internalParameters"]["licences"] == {"level": "clear", "reasons": []}
    base, shout, json_ = built["resolvedDependencies"]
    assert f"wf1:{base['digest']['wf1']}" == catalogue.get_base("base").fingerprint
    for entry, name in ((shout, "team/shout"), (json_, "team/json")):
        assert f"sha256:{entry['digest']['manifest-sha256']}" == catalogue.get_version(name).digest
        assert (entry["annotations"]["verdict"]["level"], entry["annotations"]["licence"]) == ("exact", "mit")
    ran = statement["predicate"]["runDetails"]
    assert {"adapter-registry", "torch"} <= set(ran["builder"]["version"])
    assert ran["byproducts"][0]["digest"]["sha256"] == sha256_file(composed / "composition.json")


def forge(folder: Path, name: str = WEIGHTS) -> None:
    """Change a file of a composition and its record with it, so that the two agree."""
    tamper(folder, name)
    record = json.loads((folder / "composition.json").read_text())
    record["outputs"][name]["sha256"] = sha256_file(folder / name)
    record["output_digest"] = manifest_digest(record["outputs"])
    (folder / "composition.json").write_bytes(record_file(sealed(record)))


def test_a_composition_that_was_not_made_so_is_found_by_making_it(filled: LocalRegistry, tmp_path: Path) -> None:
    """A record that agrees with its files is no proof; composing again is, also after names have moved on."""
    composed = tmp_path / "both"
    filled.compose(parse_recipe(RECIPE), composed)
    folder = write_lora(composed.parent / "newer", {MODULE: (6, 4)}, seed=9)
    filled.publish(folder, name="team/json", version="2.0.0", base="base")
    filled.yank("team/shout@1.0.0", "a reason")
    assert verify_folder(filled, composed).rebuilt
    forge(composed)
    assert not verify_folder(None, composed).rebuilt
    with pytest.raises(CompositionChangedError, match=rf"other bytes: {WEIGHTS}"):
        verify_folder(filled, composed)
    assert sorted(path.name for path in composed.parent.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("export", [Export.SAFETENSORS, Export.PEFT])
def test_it_is_composed_again_by_a_service_and_from_folders(
    filled: LocalRegistry, tmp_path: Path, export: Export
) -> None:
    """Over REST from what is registered there, here from folders that still hold what was composed."""
    filled.compose(parse_recipe("base+team/json", export=export), tmp_path / "named")
    with TestClient(create_app(filled, JobService(filled))) as service:
        assert verify_folder(remote_of(service), tmp_path / "named").rebuilt
    filled.compose(parse_recipe(f"{tmp_path / 'base'}+{tmp_path / 'json'}", export=export), tmp_path / "folders")
    assert verify_folder(filled, tmp_path / "folders").rebuilt
    edit_json(tmp_path / "json" / "adapter_config.json", lora_alpha=3)
    with pytest.raises(IntegrityError, match="no longer holds the adapter"):
        verify_folder(filled, tmp_path / "folders")


@pytest.mark.slow
def test_the_graph_is_rebuilt_to_the_same_bytes(
    registry: LocalRegistry, tiny_llama: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    """The weights and the nodes that are bound to them; that two traces give one graph, the exporter's tests say."""
    registry.add_base(tiny_llama, name="tiny")
    registry.publish(tiny_lora, name="team/shout", base="tiny")
    registry.compose(parse_recipe("tiny+team/shout", export=Export.ONNX), tmp_path / "graph")
    assert verify_folder(registry, tmp_path / "graph").rebuilt


@pytest.mark.parametrize("over", ["here", "rest"])
def test_a_signature_stays_with_its_version(filled: LocalRegistry, tmp_path: Path, keys: Keys, over: str) -> None:
    """Published with it, shown, pulled along as model.sig, and verified by its key; also over REST."""
    registry: Any = filled if over == "here" else remote_of(TestClient(create_app(filled, JobService(filled))))
    folder = write_lora(tmp_path / "mine", {MODULE: (6, 4)}, seed=5)
    result = signed_publish(registry, folder, keys.private, name="team/mine", base="base")
    assert [item.key for item in result.version.signatures] == [sha256_file(keys.public)]
    assert registry.list_adapters(namespace="team").items[1].signatures == result.version.signatures
    assert verify_version(registry, "team/mine", public_key=keys.public).signed_by == sha256_file(keys.public)
    registry.pull("team/mine", tmp_path / "pulled")
    assert verify_folder(None, tmp_path / "pulled", public_key=keys.public).unsigned == ()
    (tmp_path / "pulled" / "notes.txt").write_text("no part of an adapter")
    assert verify_folder(None, tmp_path / "pulled", public_key=keys.public).unsigned == ("notes.txt",)
    tamper(tmp_path / "pulled", "adapter_config.json")
    with pytest.raises(SignatureError, match=r"adapter_config\.json"):
        verify_folder(None, tmp_path / "pulled", public_key=keys.public)


def test_a_second_signature_stands_beside_the_first(
    filled: LocalRegistry, tmp_path: Path, keys: Keys, others: Keys
) -> None:
    """Each key has one; signing again takes the place of its own last one alone."""
    for pair in (keys, others, keys):
        sign_version(filled, "team/shout", pair.private)
    assert {item.key for item in filled.get_version("team/shout").signatures} == {
        sha256_file(keys.public), sha256_file(others.public),
    }  # fmt: skip
    for pair in (keys, others):
        assert verify_version(filled, "team/shout", public_key=pair.public).signed_by == sha256_file(pair.public)
    filled.pull("team/shout", tmp_path / "pulled")
    second = tmp_path / "pulled" / f"model-{sha256_file(keys.public)[:8]}.sig"
    assert verify_folder(None, tmp_path / "pulled", public_key=others.public).signed_by == sha256_file(others.public)
    assert verify_folder(None, tmp_path / "pulled", public_key=keys.public, bundle=second).unsigned == ()


def test_a_signature_of_other_files_or_by_strangers_is_not_kept(
    filled: LocalRegistry, tmp_path: Path, keys: Keys
) -> None:
    """Only who may publish attaches one, and only of exactly these files; one in a folder goes along or is told."""
    other = json.loads(sign_files("x", {"adapter_config.json": "0" * 64}, keys.private))
    with pytest.raises(SignatureError, match=r"not of the files of team/shout@1.0.0: adapter_config\.json"):
        filled.add_signature("team/shout", other)
    with pytest.raises(SignatureError, match="cannot be read"):
        filled.add_signature("team/shout", {"mediaType": "something else"})
    stranger = filled.acting_as(Principal("mallory", frozenset({Scope.PUBLISH})))
    with pytest.raises(ForbiddenError):
        sign_version(stranger, "team/shout", keys.private)
    assert filled.get_version("team/shout").signatures == ()
    folder = write_lora(tmp_path / "mine", {MODULE: (6, 4)}, seed=5)
    sign_folder(folder, keys.private)
    assert signed_publish(filled, folder, None, name="team/mine", base="base").version.signatures
    edit_json(folder / "adapter_config.json", lora_alpha=1)
    again = signed_publish(filled, folder, None, name="team/mine", base="base")
    assert not again.version.signatures
    assert "model.sig does not go along" in again.warnings[-1]


def test_without_the_extra_it_says_which_one(composed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signing and checking signatures need it; checking against the record does not."""
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingDependencyError, match="model-signing") as caught:
        sign_folder(composed, keys.private)
    assert "adapter-registry[sign]" in (caught.value.remedy or "")
    assert verify_folder(None, composed).signed_by is None
