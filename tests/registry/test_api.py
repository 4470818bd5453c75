"""The REST API over a real registry: statuses, shapes, uploads, downloads, and what is refused."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from composer import errors
from registry.api.app import create_app
from registry.api.rules import check_file_name
from registry.services.jobs import JobService

API = "/api/v1"
Parts = list[tuple[str, tuple[str, bytes, str]]]


@pytest.fixture
def client(registry: Any) -> Iterator[TestClient]:
    """The application with its job worker, over an empty registry."""
    with TestClient(create_app(registry, JobService(registry)), raise_server_exceptions=False) as opened:
        yield opened


def parts(folder: Path) -> Parts:
    """A folder's files as multipart parts."""
    return [
        ("files", (path.relative_to(folder).as_posix(), path.read_bytes(), "application/octet-stream"))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


@pytest.fixture
def filled(client: TestClient, tiny_llama: Path, tiny_lora: Path) -> TestClient:
    """A base and an adapter, uploaded."""
    base = client.post(f"{API}/bases", data={"name": "tiny"}, files=parts(tiny_llama))
    assert base.status_code == 201, base.text
    adapter = client.post(f"{API}/adapters", data={"name": "team/shout", "base": "tiny"}, files=parts(tiny_lora))
    assert adapter.status_code == 201, adapter.text
    return client


def error(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, which must have that status and the one shape of failures."""
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert {"code", "category", "message"} <= set(found)
    return found


def uploads(registry: Any) -> list[Path]:
    """What lies under home/uploads."""
    return [path for path in (registry.home / "uploads").rglob("*") if path.is_file()]


def test_an_uploaded_base_stays_where_it_is_registered(filled: TestClient, registry: Any, tiny_llama: Path) -> None:
    """A base is registered by reference: the folder of its upload is its location, and it works after a repeat."""
    base = registry.get_base("tiny")
    assert (Path(base.location) / "model.safetensors").read_bytes() == (tiny_llama / "model.safetensors").read_bytes()
    again = filled.post(f"{API}/bases", data={"name": "tiny"}, files=parts(tiny_llama))
    assert (again.status_code, again.json()["created"]) == (200, False)
    location = Path(registry.get_base("tiny").location)
    assert (location / "model.safetensors").is_file()
    assert filled.get(f"{API}/bases/tiny").json()["fingerprint"] == base.fingerprint
    assert filled.get(f"{API}/bases/{base.fingerprint}").json()["name"] == "tiny"
    assert [item["name"] for item in filled.get(f"{API}/bases").json()["items"]] == ["tiny"]
    assert filled.get(f"{API}/bases/tiny/inspect").json()["type"] == "base"


def test_a_refused_upload_leaves_nothing(client: TestClient, registry: Any, tiny_lora: Path) -> None:
    """An adapter is no base: the failure is typed, and its files are gone."""
    error(client.post(f"{API}/bases", data={"name": "x"}, files=parts(tiny_lora)), 404)
    error(client.post(f"{API}/adapters", data={"name": "a/b", "colour": "red"}, files=parts(tiny_lora)), 400)
    error(client.post(f"{API}/adapters", files=parts(tiny_lora)), 400)
    error(client.post(f"{API}/adapters", data={"name": "a/b"}), 400)
    error(client.post(f"{API}/adapters", json={"name": "a/b"}), 400)
    assert uploads(registry) == []


def test_publishing_again_is_200_and_other_bytes_are_409(filled: TestClient, tiny_lora: Path, other_lora: Path) -> None:
    """201 for a new version, 200 for the same bytes, 409 for others under that version."""
    form = {"name": "team/shout", "version": "0.1.0", "base": "tiny"}
    again = filled.post(f"{API}/adapters", data=form, files=parts(tiny_lora))
    assert (again.status_code, again.json()["created"]) == (200, False)
    assert error(filled.post(f"{API}/adapters", data=form, files=parts(other_lora)), 409)["category"] == "conflict"
    fresh = filled.post(
        f"{API}/adapters", data={**form, "version": "2.0.0", "tags": ["a", "b"]}, files=parts(other_lora)
    )
    assert fresh.status_code == 201
    assert {"a", "b"} <= set(fresh.json()["version"]["tags"])
    assert filled.get(fresh.headers["Location"]).json() == fresh.json()["version"]


def test_adapters_are_found_listed_and_pointed_at(filled: TestClient) -> None:
    """Listing with filters and pages, search, versions, aliases."""
    assert [v["name"] for v in filled.get(f"{API}/adapters", params={"base": "tiny"}).json()["items"]] == ["team/shout"]
    assert filled.get(f"{API}/adapters", params={"namespace": "none"}).json() == {"items": [], "next": None}
    assert len(filled.get(f"{API}/search", params={"q": "shout"}).json()["items"]) == 1
    assert len(filled.get(f"{API}/adapters/team/shout/versions").json()["items"]) == 1
    moved = filled.put(f"{API}/adapters/team/shout/aliases/prod", json={"version": "0.1.0"})
    assert "prod" in moved.json()["aliases"]
    shown = filled.get(f"{API}/adapters/team/shout", params={"version": "prod"}).json()
    assert shown.pop("screening")["population"] == 0
    assert shown.items() <= moved.json().items()
    assert filled.delete(f"{API}/adapters/team/shout/aliases/prod").status_code == 204
    error(filled.get(f"{API}/adapters/team/shout", params={"version": "prod"}), 404)


def test_compatibility_over_rest(filled: TestClient) -> None:
    """From the base, from the adapter, and for the pair."""
    fits = filled.get(f"{API}/bases/tiny/adapters", params={"level": "exact"}).json()["items"]
    assert [(fit["adapter"]["name"], fit["verdict"]["level"]) for fit in fits] == [("team/shout", "exact")]
    assert filled.get(f"{API}/adapters/team/shout/bases").json()["items"][0]["base"]["name"] == "tiny"
    assert filled.get(f"{API}/check", params={"adapter": "team/shout", "base": "tiny"}).json()["level"] == "exact"
    assert filled.get(f"{API}/adapters/team/shout/inspect").json()["kind"] == "lora"


def test_a_download_names_its_digest(filled: TestClient, tiny_lora: Path) -> None:
    """Length and ETag are those of the bytes; an unchanged file is 304; a part can be asked for."""
    url = f"{API}/adapters/team/shout/files/adapter_model.safetensors"
    data = (tiny_lora / "adapter_model.safetensors").read_bytes()
    answer = filled.get(url)
    assert answer.content == data
    assert answer.headers["ETag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    assert int(answer.headers["Content-Length"]) == len(data)
    assert filled.get(url, headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304
    assert filled.get(url, headers={"Range": "bytes=8-15"}).content == data[8:16]
    for name in ("nothing", "../registry.db", "%2e%2e/%2e%2e/registry.db", "/etc/passwd"):
        assert filled.get(f"{API}/adapters/team/shout/files/{name}").status_code in (404, 405)


def test_a_composition_is_a_job_with_files(filled: TestClient, registry: Any, tmp_path: Path) -> None:
    """202 with a Location; its files are those that the local registry composes, byte for byte."""
    plan = filled.post(f"{API}/plans", json={"recipe": "tiny+team/shout:0.5"})
    assert plan.json()["accepted"]
    started = filled.post(f"{API}/compositions", json=plan.json()["recipe"])
    assert started.status_code == 202
    job = wait(filled, started.headers["Location"])
    assert job["state"] == "succeeded", job
    registry.compose(_recipe("tiny+team/shout:0.5"), tmp_path / "local")
    files = filled.get(f"{API}/jobs/{job['id']}/files").json()["items"]
    assert {file["name"] for file in files} >= {"model.safetensors", "config.json", "composition.json"}
    for file in files:
        answer = filled.get(f"{API}/jobs/{job['id']}/files/{file['name']}")
        assert answer.content == (tmp_path / "local" / file["name"]).read_bytes()
        assert answer.headers["ETag"] == f'"{file["sha256"]}"'
        assert hashlib.sha256(answer.content).hexdigest() == file["sha256"]
    error(filled.get(f"{API}/jobs/{job['id']}/files/nothing"), 404)
    error(filled.delete(f"{API}/jobs/{job['id']}"), 409)
    assert filled.get(f"{API}/jobs").json()["items"][0]["id"] == job["id"]


def _recipe(text: str) -> Any:
    from composer.recipe import parse_recipe

    return parse_recipe(text)


def wait(client: TestClient, location: str) -> dict[str, Any]:
    """The job once it is finished."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        job: dict[str, Any] = client.get(location).json()
        if job["state"] not in ("queued", "running"):
            return job
        time.sleep(0.05)
    raise AssertionError("the job did not end")


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and data of each server-sent event."""
    blocks = [block.split("\n") for block in text.strip().split("\n\n") if not block.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_a_job_is_followed_by_events(filled: TestClient) -> None:
    """Its states in order, then the end with the result; a job that is over has the end only."""
    job = filled.post(f"{API}/compositions", json={"recipe": "tiny+team/shout:0.75"}).json()
    answer = filled.get(f"{API}/jobs/{job['id']}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    seen = events(answer.text)
    assert [name for name, _ in seen] == ["job"] * (len(seen) - 1) + ["end"]
    assert seen[-1][1] == filled.get(f"{API}/jobs/{job['id']}").json()
    assert seen[-1][1]["state"] == "succeeded"
    assert [name for name, _ in events(filled.get(f"{API}/jobs/{job['id']}/events").text)] == ["end"]
    error(filled.get(f"{API}/jobs/nothing/events"), 404)


def test_a_base_is_added_and_verified_in_the_background(client: TestClient, tiny_llama: Path) -> None:
    """202 and a job; what is no checkpoint is refused at once."""
    answer = client.post(f"{API}/bases?background=true", data={"name": "tiny"}, files=parts(tiny_llama))
    assert answer.status_code == 202, answer.text
    job = wait(client, answer.headers["Location"])
    assert (job["kind"], job["result"]) == ("base", {**client.get(f"{API}/bases/tiny").json(), "created": True})
    check = client.post(f"{API}/bases/tiny/verifications")
    assert wait(client, check.headers["Location"])["result"]["intact"]
    nothing = [("files", ("config.json", b"{}", "a/b"))]
    error(client.post(f"{API}/bases?background=true", files=nothing), 404)
    error(client.post(f"{API}/jobs/{job['id']}/retry"), 409)
    assert [item["id"] for item in client.get(f"{API}/jobs", params={"state": "failed"}).json()["items"]] == []


def test_a_queued_job_can_be_cancelled(registry: Any, client: TestClient, filled: TestClient) -> None:
    """Without a worker a job stays queued; DELETE makes it cancelled, and its files are a conflict."""
    idle = TestClient(create_app(registry, JobService(registry)))  # not entered: its worker does not run
    client.app.state.jobs.stop()  # type: ignore[attr-defined]
    job = idle.post(f"{API}/compositions", json={"recipe": "tiny+team/shout"}).json()
    assert idle.delete(f"{API}/jobs/{job['id']}").json()["state"] == "cancelled"
    error(idle.get(f"{API}/jobs/{job['id']}/files"), 409)
    client.app.state.jobs.start()  # type: ignore[attr-defined]


def test_a_job_that_does_not_stop_does_not_hold_the_service(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shutdown waits for the worker, but not for ever: a long step has no place to stop at."""
    jobs, asked = JobService(registry), []
    monkeypatch.setattr("registry.api.app.STOP_S", 0.2)
    monkeypatch.setattr(jobs, "stop", lambda seconds: asked.append(seconds))
    app = create_app(registry, jobs)
    with TestClient(app) as client:
        assert client.get("/healthz").status_code == 200
        assert not app.state.left_behind
    assert (asked, app.state.left_behind) == ([0.2], True)
    JobService.stop(jobs)


@pytest.mark.parametrize("path", ["./tiny", "/etc", "~/x", "../up", "a/b/c"])
def test_local_paths_are_refused_everywhere(client: TestClient, path: str) -> None:
    """A service reads no folder that a request names: 403, whichever field it stands in."""
    term = {"ref": path}
    body = {"base": path, "adapters": []}
    for answer in (
        client.post(f"{API}/plans", json={"recipe": f"{path}+team/shout"}),
        client.post(f"{API}/plans", json={"recipe": f"tiny+{path}"}),
        client.post(f"{API}/plans", json=body),
        client.post(f"{API}/compositions", json={"base": "tiny", "adapters": [term]}),
        client.post(f"{API}/compositions", json=body),
        client.get(f"{API}/check", params={"adapter": path, "base": "tiny"}),
        client.get(f"{API}/check", params={"adapter": "team/shout", "base": path}),
        client.get(f"{API}/adapters", params={"base": path}),
        client.post(f"{API}/adapters", data={"name": "a/b", "base": path}, files=[("files", ("x", b"", "a/b"))]),
        client.post(f"{API}/bases", data={"parent": path}, files=[("files", ("x", b"", "a/b"))]),
    ):
        assert error(answer, 403)["category"] == "policy"


def test_an_upload_does_not_make_the_service_hash_its_own_folders(
    client: TestClient, tiny_llama: Path, tiny_lora: Path
) -> None:
    """The adapter's config names a folder of this very machine; over REST it stays a name without proof."""
    answer = client.post(f"{API}/adapters", data={"name": "team/shout"}, files=parts(tiny_lora))
    assert answer.json()["version"]["base_status"] == "unverified"


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        ".hidden",
        "a/../b",
        "a//b",
        "a/.git/b",
        "a\\b",
        "c:x",
        "",
        "a\x00b",
        "a\nb",
        "~x",
        "x" * 300,
        "a ",
    ],
)
def test_file_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    """Relative, visible, printable, on every system."""
    with pytest.raises(errors.UsageError):
        check_file_name(name)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", ".hidden", "a/../../b", "x\\y"])
def test_an_upload_with_such_a_name_writes_nothing(
    client: TestClient, registry: Any, tmp_path: Path, name: str
) -> None:
    """400, and nothing appears in or around the folder of uploads."""
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file() and "registry.db" not in path.name)
    error(client.post(f"{API}/bases", files=[("files", (name, b"evil", "a/b"))]), 400)
    after = sorted(path for path in tmp_path.rglob("*") if path.is_file() and "registry.db" not in path.name)
    assert before == after


def test_uploads_are_limited_in_bytes_and_files(registry: Any) -> None:
    """413 by the declared length, by the bytes that come without one, and by the number of files."""
    client = TestClient(create_app(registry, JobService(registry), max_upload_bytes=1 << 20))
    large = [("files", ("x", b"0" * (2 << 20), "a/b"))]
    assert error(client.post(f"{API}/bases", files=large), 413)["code"] == "upload-too-large"
    request = client.build_request("POST", f"{API}/bases", files=large)
    body = request.read()
    chunks = (body[start : start + 65536] for start in range(0, len(body), 65536))
    kind = {"Content-Type": request.headers["Content-Type"]}
    error(client.post(f"{API}/bases", content=chunks, headers=kind), 413)
    many = [("files", (f"f{index}", b"", "a/b")) for index in range(1001)]
    error(client.post(f"{API}/bases", files=many), 413)
    error(client.post(f"{API}/bases", files=[("files", ("x", b"1", "a/b")), ("files", ("x", b"2", "a/b"))]), 400)
    error(client.post(f"{API}/bases", content=body[:1000], headers=kind), 400)
    assert uploads(registry) == []


def test_a_method_takes_parameters_and_weights_by_module(filled: TestClient) -> None:
    """In both forms of a request; a wrong one is refused with the valid ones."""
    text = {"recipe": "tiny+team/shout", "method": "ties", "parameters": {"density": 0.5}}
    assert filled.post(f"{API}/plans", json=text).json()["recipe"]["parameters"] == {"density": 0.5}
    whole = filled.post(f"{API}/plans", json={"recipe": "tiny+team/shout"}).json()["touched"]
    term = {"ref": "team/shout", "modules": {"model.layers.0.*": 0}}
    some = filled.post(f"{API}/plans", json={"base": "tiny", "adapters": [term]}).json()
    assert 0 < some["touched"] < whole
    assert some["recipe"]["adapters"][0]["modules"] == [{"pattern": "model.layers.0.*", "weight": 0.0}]
    wrong = error(filled.post(f"{API}/plans", json={**text, "parameters": {"density": 2}}), 400)
    assert (wrong["code"], "density: float in (0, 1]" in wrong["remedy"]) == ("bad-recipe", True)


def test_the_framework_fails_in_the_same_shape(client: TestClient) -> None:
    """Unknown routes, methods, parameters and bodies: code, category, message."""
    assert error(client.get("/nowhere"), 404)["code"] == "not-found"
    assert error(client.put(f"{API}/adapters"), 405)["code"] == "method-not-allowed"
    assert error(client.get(f"{API}/adapters", params={"limit": 0}), 400)["code"] == "bad-request"
    assert error(client.post(f"{API}/plans", json={"recipe": "a", "dtype": "int3"}), 400)["category"] == "usage"
    assert error(client.post(f"{API}/plans", content=b"{"), 400)["code"] == "bad-request"
    assert error(client.post(f"{API}/plans", json={"recipe": "+"}), 400)["code"] == "bad-recipe"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.UsageError, 400),
        (errors.PolicyError, 403),
        (errors.NotFoundError, 404),
        (errors.ConflictError, 409),
        (errors.IncompatibleError, 422),
        (errors.IntegrityError, 422),
        (errors.TypedError, 500),
        (errors.StorageError, 507),
    ],
)
def test_each_category_has_one_status(
    client: TestClient, registry: Any, monkeypatch: pytest.MonkeyPatch, kind: type[errors.TypedError], status: int
) -> None:
    """The body is the error's own dictionary."""
    failure = kind("it broke", expected=[1], found="x", remedy="mend it", key="value")
    monkeypatch.setattr(registry, "doctor", lambda: (_ for _ in ()).throw(failure))
    assert error(client.get(f"{API}/doctor"), status) == failure.as_dict()


def test_the_unforeseen_leaks_nothing(client: TestClient, registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 in the same shape, without the exception's text."""
    monkeypatch.setattr(registry, "doctor", lambda: (_ for _ in ()).throw(RuntimeError("secret")))
    answer = client.get(f"{API}/doctor")
    assert error(answer, 500)["code"] == "internal-error"
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


def test_other_pages_are_refused(registry: Any, client: TestClient) -> None:
    """A request with another Origin is 403; so is one for another host where hosts are given."""
    error(client.get("/healthz", headers={"Origin": "https://evil.example"}), 403)
    error(client.get("/healthz", headers={"Origin": "null"}), 403)
    assert client.get("/healthz", headers={"Origin": "http://testserver"}).status_code == 200
    strict = TestClient(create_app(registry, JobService(registry), hosts=frozenset({"localhost"})))
    error(strict.get("/healthz"), 403)
    assert strict.get("/healthz", headers={"Host": "localhost:8000"}).json()["status"] == "ok"


def test_the_service_describes_itself(client: TestClient) -> None:
    """Every operation has a summary, a tag and the shape of failures; health and doctor answer."""
    description = client.get(f"{API}/openapi.json").json()
    operations = [operation for path in description["paths"].values() for operation in path.values()]
    assert len(operations) > 20
    assert all(operation["summary"] and operation["tags"] for operation in operations)
    assert all("4XX" in operation["responses"] and "422" not in operation["responses"] for operation in operations)
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get(f"{API}/doctor").json()["ok"]
