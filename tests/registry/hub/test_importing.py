"""`registry import hf://…` with our own service as the hub: what comes, what is refused, and going on where it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from composer.errors import PolicyError, TypedError, UsageError
from registry.access import Principal, Role, Scope
from registry.client import RemoteRegistry
from registry.errors import ForbiddenError
from registry.outbound import GuardedTransport, public_address
from registry.services.importing import HubReference, ImportRules, hub_reference
from registry.services.jobs import JobService
from registry.services.local import open_registry
from tests.registry.hub.conftest import ROOT, Hub, serve


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_lora: Path) -> Iterator[Hub]:
    """A hub with org/tiny and, on it, org/shout."""
    folder = tmp_path_factory.mktemp("source")
    registry = open_registry(folder / "home")
    registry.add_base(tiny_llama, name="org/tiny")
    registry.publish(tiny_lora, name="org/shout", version="1.0.0", base="org/tiny")
    registry.close()
    yield from serve(folder / "home", folder / "clients")


def run_import(hub: Hub, home: Path, *words: Any, code: int = 0) -> dict[str, Any]:
    """`registry import … --format json` as a program; its answer, or its error."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "REGISTRY_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cli", "import", *map(str, words), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout) if code == 0 else json.loads(done.stderr.splitlines()[-1])["error"]
    return found


def test_a_base_and_an_adapter_are_imported_and_compose(source: Hub, tmp_path: Path) -> None:
    """They have the fingerprint and the files that they have on the hub; a repeat is no news."""
    home = tmp_path / "home"
    base = run_import(source, home, "hf://org/tiny", "--allow-private")["base"]
    there = open_registry(source.home)
    assert base["fingerprint"] == there.get_base("org/tiny").fingerprint
    result = run_import(
        source, home, "hf://org/shout@1.0.0", "--allow-private", "--base", "org/tiny", "--name", "my/shout"
    )
    version, origin = result["version"], there.get_version("org/shout")
    assert (version["name"], version["digest"], version["base_status"]) == ("my/shout", origin.digest, "verified")
    assert result["source"] == f"hf://org/shout@{origin.digest[7:47]}"
    there.close()
    again = run_import(source, home, "hf://org/tiny", "--allow-private")
    assert (again["created"], again["base"]["fingerprint"]) == (False, base["fingerprint"])
    assert not any((home / "imports").iterdir())
    here = open_registry(home)
    assert here.check("my/shout", "org/tiny").level == "exact"
    assert here.doctor()
    here.close()


def test_what_an_import_refuses(source: Hub, tmp_path: Path) -> None:
    """A private address unless allowed, more bytes than allowed, what is not there; each with its exit code."""
    refused = run_import(source, tmp_path, "hf://org/tiny", code=6)
    assert "127.0.0.1" in refused["message"]
    assert "--allow-private" in refused["remedy"]
    large = run_import(source, tmp_path, "hf://org/tiny", "--allow-private", "--max-bytes", 1000, code=6)
    assert large["remedy"] == "raise --max-bytes"
    run_import(source, tmp_path, "hf://org/nobody", "--allow-private", code=3)
    run_import(source, tmp_path, "hf://org/tiny@nowhere", "--allow-private", code=3)
    run_import(source, tmp_path, "org/tiny", code=2)
    assert not (tmp_path / "imports").exists() or not any((tmp_path / "imports").rglob("*.safetensors"))


def test_an_import_goes_on_where_it_ended(source: Hub, tmp_path: Path, tiny_llama: Path) -> None:
    """Bytes that lie there from before are not fetched again, and the whole is still checked."""
    there = open_registry(source.home)
    commit = there.repositories.snapshot("org/tiny").commit
    there.close()
    weights = (tiny_llama / "model.safetensors").read_bytes()
    folder = tmp_path / "imports" / f"org--tiny@{commit}"
    folder.mkdir(parents=True)
    part = folder / "model.safetensors.part"
    part.write_bytes(b"other" + weights[5:-1000])
    assert "damaged" in run_import(source, tmp_path, "hf://org/tiny", "--allow-private", code=5)["message"]
    part.write_bytes(weights[:-1000])
    run_import(source, tmp_path, "hf://org/tiny", "--allow-private")
    assert not folder.exists()
    fetched = [
        line for line in (source.scratch / "service.log").read_text().splitlines() if "model.safetensors" in line
    ]
    assert all("' 206, " in line for line in fetched[-2:])


@pytest.fixture
def service(source: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A service behind tokens that imports from `source`; alice publishes in her namespace."""
    monkeypatch.setenv("HF_ENDPOINT", source.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    registry = open_registry(tmp_path / "service")
    registry.grant("alice", "alice", Role.OWNER)
    token = registry.create_token("t", subject="alice", scopes=(Scope.PUBLISH,)).token
    registry.close()
    monkeypatch.setenv("REGISTRY_TOKEN", token)
    yield from serve(tmp_path / "service", tmp_path / "clients", "--require-tokens", "--imports-from-private")


def test_a_service_imports_as_a_job_for_who_may_publish(service: Hub) -> None:
    """With progress in bytes; into a namespace of others it does not, and where it may is for the service to say."""
    remote = RemoteRegistry(service.url, token=os.environ["REGISTRY_TOKEN"])
    seen: list[tuple[str, int, int]] = []
    base = remote.import_model("hf://org/tiny", name="tiny", allow_private=True, progress=lambda *now: seen.append(now))
    assert base.base is not None
    assert base.base.name == "tiny"
    info = remote.import_model("hf://org/shout@1.0.0", name="alice/shout", base="tiny", allow_private=True)
    assert info.version is not None
    assert (info.version.name, info.version.base_status) == ("alice/shout", "verified")
    assert seen
    jobs = remote.list_jobs().items
    assert [(job.kind, job.owner, job.state.value) for job in jobs] == [("import", "alice", "succeeded")] * 2
    with pytest.raises(TypedError, match="which you may not make shout"):
        remote.import_model("hf://org/shout", name="shout", allow_private=True)
    with pytest.raises(TypedError, match="private address"):
        remote.import_model("hf://org/shout", name="alice/shout")
    with pytest.raises(TypedError, match="has no org/nobody"):
        remote.import_model("hf://org/nobody", name="alice/x", allow_private=True)
    remote.close()


def test_rules_of_imports(registry: Any) -> None:
    """What a service does not fetch it refuses before a job is there."""
    cases: tuple[tuple[ImportRules, dict[str, Any]], ...] = (
        (ImportRules(allowed=False), {}),
        (ImportRules(), {"allow_private": True}),
        (ImportRules(max_bytes=10), {"max_bytes": 11}),
    )
    for rules, words in cases:
        with pytest.raises(PolicyError):
            JobService(registry, imports=rules).submit_import("hf://org/tiny", **words)
    registry.grant("org", "alice", Role.OWNER)
    limited = Principal("bob", frozenset({Scope.PUBLISH}), frozenset({"bob"}))
    with pytest.raises(ForbiddenError):
        JobService(registry).acting_as(limited).submit_import("hf://org/tiny")
    assert registry.list_jobs().items == ()


@pytest.mark.parametrize(
    "text", ["hf://", "hf://a/b/c", "hf://../x", "https://huggingface.co/a/b", "hf://a/b@", "hf://a b"]
)
def test_a_place_on_a_hub_is_one_or_two_names_and_a_revision(text: str) -> None:
    """Everything else is a typed error."""
    with pytest.raises(UsageError):
        hub_reference(text)
    assert hub_reference("hf://a/b@v1") == HubReference("a/b", "v1")
    assert hub_reference("hf://gpt2") == HubReference("gpt2")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "192.168.1.1", "0.0.0.0", "100.64.0.1", "::1", "fd00::1",
     "fe80::1", "::ffff:10.0.0.1", "224.0.0.1", "64:ff9b:1::1", "64:ff9b::a00:1", "2002:a00:1::"],
)  # fmt: skip
def test_private_addresses_are_not_reached(host: str) -> None:
    """Loopback, link-local, private, shared, mapped and multicast addresses are refused after the name is resolved."""
    with pytest.raises(PolicyError):
        public_address(host, 80)


def test_the_address_that_was_checked_is_the_one_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is resolved once; the connection goes to that address under that name, and a redirect is checked anew."""
    names = {"hub.example": "93.184.216.34", "inside.example": "10.1.2.3"}
    monkeypatch.setattr("socket.getaddrinfo", lambda host, port, **_: [(2, 1, 6, "", (names[host], port))])
    seen: list[tuple[str, str, Any]] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append((str(request.url), request.headers["host"], request.extensions.get("sni_hostname")))
        return httpx2.Response(302, headers={"location": "http://inside.example/secret"})

    transport = GuardedTransport(1000, allow_private=False, inner=httpx2.MockTransport(answer))
    with httpx2.Client(transport=transport, follow_redirects=True) as client, pytest.raises(PolicyError):
        client.get("https://hub.example/x")
    assert seen == [("https://93.184.216.34/x", "hub.example", "hub.example")]


def test_bytes_are_counted_whatever_was_announced() -> None:
    """A hub that sends more than it said is cut off."""
    inner = httpx2.MockTransport(lambda request: httpx2.Response(200, content=b"0" * 600))
    transport = GuardedTransport(1000, allow_private=True, inner=inner)
    with httpx2.Client(transport=transport) as client:
        client.get("http://hub.example/")
        with pytest.raises(PolicyError):
            client.get("http://hub.example/")
