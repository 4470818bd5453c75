"""The Hub's protocol under tokens: what is private does not exist, who may not write is refused, states are kept."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from registry.access import Principal, Scope
from registry.api.app import create_app
from registry.services.jobs import JobService
from tests.support import write_base, write_lora

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def service(registry: Any, tmp_path: Path) -> TestClient:
    """alice's namespace with a public and a private adapter, behind tokens."""
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": np.ones((6, 4), np.float32)})
    registry.add_base(base, name="base")
    alice = registry.acting_as(Principal("alice", frozenset({Scope.PUBLISH})))
    for seed, name in enumerate(("open", "secret")):
        folder = write_lora(tmp_path / name, {MODULE: (6, 4)}, seed=seed)
        alice.publish(folder, name=f"team/{name}", base="base", private=name == "secret")
    app = create_app(registry, JobService(registry), authenticators=(registry.authenticator(),))
    return TestClient(app, raise_server_exceptions=False)


def bearer(registry: Any, subject: str, scope: Scope = Scope.PUBLISH) -> dict[str, str]:
    """The header of a new token."""
    return {"Authorization": f"Bearer {registry.create_token('t', subject=subject, scopes=(scope,)).token}"}


def commit(service: TestClient, name: str, headers: dict[str, str], branch: str = "main") -> Any:
    """Push one small file."""
    line = {"key": "file", "value": {"path": "NOTES.md", "content": "aGk=", "encoding": "base64"}}
    return service.post(f"/api/models/{name}/commit/{branch}", content=json.dumps(line), headers=headers)


def test_a_private_repository_does_not_exist_for_others(service: TestClient, registry: Any) -> None:
    """Its drafts, its published commits and its name in listings neither; the answer is that of a name never used."""
    alice, bob = bearer(registry, "alice"), bearer(registry, "bob")
    assert commit(service, "team/secret", alice).status_code == 200
    assert service.get("/api/models/team/secret", headers=alice).status_code == 200
    assert len(service.get("/api/models?filter=peft", headers=alice).json()) == 2
    assert [item["id"] for item in service.get("/api/models?filter=peft", headers=bob).json()] == ["team/open"]
    paths = (
        "/api/models/{}",
        "/api/models/{}/refs",
        "/api/models/{}/tree/main",
        "/{}/resolve/main/adapter_config.json",
    )
    for path in paths:
        hidden, never = (service.get(path.format(name), headers=bob) for name in ("team/secret", "team/sekret"))
        assert hidden.status_code == never.status_code == 404
        assert hidden.headers["x-error-code"] == "RepoNotFound"
        assert hidden.text == never.text.replace("sekret", "secret")
    assert service.get("/api/models/team/open").status_code == 401


def test_only_publishers_of_a_namespace_write_in_it(service: TestClient, registry: Any) -> None:
    """A stranger's push, branch, tag, move and removal are refused; a free namespace belongs to who takes it."""
    bob, reader = bearer(registry, "bob"), bearer(registry, "alice", Scope.READ)
    assert commit(service, "team/open", bob).status_code == 403
    assert commit(service, "team/open", reader).status_code == 403
    for path, body in (
        ("/api/models/team/open/branch/x", {}),
        ("/api/models/team/open/tag/main", {"tag": "x"}),
        ("/api/repos/move", {"fromRepo": "team/open", "toRepo": "bob/open"}),
        ("/api/repos/create", {"organization": "team", "name": "new"}),
    ):
        assert service.post(path, json=body, headers=bob).status_code == 403, path
    refused = service.request("DELETE", "/api/repos/delete", json={"organization": "team", "name": "open"}, headers=bob)
    assert refused.status_code == 403
    assert service.post("/api/repos/create", json={"name": "mine"}, headers=bob).json()["name"] == "bob/mine"
    assert commit(service, "bob/mine", bob).status_code == 200
    assert "POST /api/models/team/open/commit/main" in {entry.target for entry in registry.audit().items}


def push_lora(service: TestClient, name: str, headers: dict[str, str], folder: Path) -> Any:
    """Push an adapter's files to main."""
    lines = [
        {
            "key": "file",
            "value": {"path": path.name, "content": base64.b64encode(path.read_bytes()).decode(), "encoding": "base64"},
        }
        for path in sorted(folder.iterdir())
    ]
    body = "\n".join(map(json.dumps, lines))
    return service.post(f"/api/models/{name}/commit/main", content=body, headers=headers)


def test_a_repository_that_is_created_private_stays_so_with_all_that_is_pushed(
    service: TestClient, registry: Any, tmp_path: Path
) -> None:
    """Its name, its draft, the version that a push makes; its owner shows and hides it; a whole model is refused."""
    alice, bob = bearer(registry, "alice"), bearer(registry, "bob")
    body = {"organization": "team", "name": "quiet", "visibility": "private"}
    assert service.post("/api/repos/create", json=body, headers=alice).status_code == 200
    assert commit(service, "team/quiet", alice).status_code == 200
    url = "/api/models/team/quiet"
    assert service.get(url, headers=alice).json()["private"] is True

    def stranger() -> tuple[int, str | None, bool]:
        found = service.get(url, headers=bob)
        names = [item["id"] for item in service.get("/api/models", headers=bob).json()]
        return found.status_code, found.headers.get("x-error-code"), "team/quiet" in names

    assert stranger() == (404, "RepoNotFound", False)
    lora = write_lora(tmp_path / "quiet", {MODULE: (6, 4)}, seed=9)
    pushed = push_lora(service, "team/quiet", alice, lora)
    assert pushed.status_code == 200, pushed.text
    assert registry.get_version("team/quiet").private is True
    assert stranger() == (404, "RepoNotFound", False)
    assert service.put(f"{url}/settings", json={"private": False}, headers=bob).status_code == 404
    assert service.put(f"{url}/settings", json={"visibility": "public"}, headers=alice).json()["private"] is False
    assert stranger() == (200, None, True)
    assert service.put(f"{url}/settings", json={"private": False}, headers=bob).status_code == 403
    assert service.put(f"{url}/settings", json={"private": True}, headers=alice).json()["private"] is True
    assert stranger() == (404, "RepoNotFound", False)
    assert service.put(f"{url}/settings", json={"gated": "auto"}, headers=alice).status_code == 403
    body = {"organization": "team", "name": "whole", "private": True}
    service.post("/api/repos/create", json=body, headers=alice)
    refused = push_lora(service, "team/whole", alice, tmp_path / "base")
    assert refused.status_code == 403
    assert "only adapters can be private" in refused.headers["x-error-message"]


def test_downloads_through_the_hub_are_counted(service: TestClient, registry: Any) -> None:
    """A GET of the weights is one; a HEAD, a range and the config are none."""
    alice, url = bearer(registry, "alice"), "/team/open/resolve/main/adapter_model.safetensors"
    for _ in range(2):
        service.get(url, headers=alice)
    service.head(url, headers=alice)
    service.get(url, headers={**alice, "Range": "bytes=0-7"})
    service.get("/team/open/resolve/main/adapter_config.json", headers=alice)
    registry.downloads.write()
    assert registry.get_version("team/open").downloads == 2
    assert service.get("/api/models/team/open", headers=alice).json()["downloads"] == 2
    assert service.get("/api/models?sort=downloads", headers=alice).json()[0]["id"] == "team/open"


def test_yanked_and_quarantined_versions_are_not_served(service: TestClient, registry: Any) -> None:
    """Yanked: by its digest and commit only. Quarantined: by nothing."""
    alice = bearer(registry, "alice")
    version = registry.get_version("team/open")
    url = "/team/open/resolve/{}/adapter_config.json"
    by = {key: url.format(key) for key in ("0.1.0", version.digest, version.digest[7:47])}
    registry.yank("team/open@0.1.0", "wrong data")
    status = {key: service.get(path, headers=alice).status_code for key, path in by.items()}
    assert status == {"0.1.0": 403, version.digest: 200, version.digest[7:47]: 200}
    registry.quarantine("team/open@0.1.0", "malicious")
    assert {service.get(path, headers=alice).status_code for path in by.values()} == {403}


def test_collection_keeps_what_drafts_hold(service: TestClient, registry: Any) -> None:
    """Files of a draft are named by its commit alone, and stay."""
    alice = bearer(registry, "alice")
    service.post("/api/repos/create", json={"organization": "team", "name": "draft"}, headers=alice)
    assert commit(service, "team/draft", alice).status_code == 200
    registry.collect(grace_days=0)
    assert service.get("/team/draft/resolve/main/NOTES.md", headers=alice).content == b"hi"
