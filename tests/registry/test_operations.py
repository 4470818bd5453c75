"""What operators see of a service: metrics, readiness, logs; and how it ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from registry.access import Scope
from registry.api.app import create_app
from registry.api.limits import MAX_BODY_BYTES
from registry.logs import REQUEST_ID, JsonFormatter
from registry.services.jobs import JobService
from tests.support import write_base, write_lora

API = "/api/v1"
ROOT = Path(__file__).resolve().parents[2]
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def filled(registry: Any, tmp_path: Path) -> Any:
    """A base, an adapter, and a job that waits."""
    registry.add_base(write_base(tmp_path / "base", {f"{MODULE}.weight": np.ones((6, 4), np.float32)}), name="base")
    registry.publish(write_lora(tmp_path / "lora", {MODULE: (6, 4)}), name="team/shout", base="base")
    JobService(registry).submit_verify("base")
    return registry


@pytest.fixture
def client(filled: Any) -> TestClient:
    """An open service whose worker does not run."""
    return TestClient(create_app(filled, JobService(filled)), raise_server_exceptions=False)


def scraped(client: TestClient) -> dict[tuple[str, tuple[str, ...]], float]:
    """What Prometheus reads: (name, sorted label values) to number."""
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_requests_bytes_jobs_and_downloads_are_counted(client: TestClient) -> None:
    """By route template, method and status: no name is a label, neither of what is there nor of what is not."""
    url = f"{API}/adapters/team/shout/files/adapter_model.safetensors"
    size = len(client.get(url).content)
    client.get(f"{API}/adapters/team/hidden")
    client.post(f"{API}/plans", json={"recipe": "base+team/shout"})
    client.get("/team/shout/resolve/main/adapter_model.safetensors")
    found = scraped(client)
    route = f"{API}/adapters/{{namespace}}/{{name}}"
    assert found["registry_http_requests_total", ("GET", f"{route}/files/{{filename:path}}", "200")] == 1
    assert found["registry_http_requests_total", ("GET", route, "404")] == 1
    assert found["registry_http_request_seconds_count", ("POST", f"{API}/plans")] == 1
    assert found["registry_http_received_bytes_total", (f"{API}/plans",)] == len('{"recipe":"base+team/shout"}')
    assert found["registry_http_sent_bytes_total", (f"{route}/files/{{filename:path}}",)] == size
    assert found["registry_jobs", ("queued",)] == 1
    assert found["registry_jobs", ("failed",)] == 0
    assert found["registry_downloads_total", ()] >= 1
    assert found["process_resident_memory_bytes", ()] > 1 << 20
    assert not any("team" in label for _, labels in found for label in labels)


def test_behind_tokens_metrics_need_one_and_probes_do_not(filled: Any) -> None:
    """A balancer has no token; what it learns are three words."""
    app = create_app(filled, JobService(filled), authenticators=(filled.authenticator(),))
    client = TestClient(app)
    assert client.get("/metrics").status_code == 401
    token = filled.create_token("scraper", subject="prometheus", scopes=(Scope.READ,)).token
    assert client.get("/metrics", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    assert client.get(f"{API}/health").json()["status"] == "ok"
    ready = client.get(f"{API}/ready")
    assert (ready.status_code, set(ready.json().values())) == (200, {True})


def test_a_service_is_ready_while_database_migrations_and_store_are(filled: Any) -> None:
    """Each of them alone makes it 503, as shutting down does; it goes on answering that it is there."""
    app = create_app(filled, JobService(filled))
    client = TestClient(app)

    def asked() -> tuple[int, set[str]]:
        filled._readiness._found = None  # what it found a moment ago
        answer = client.get(f"{API}/ready")
        return answer.status_code, {name for name, fine in answer.json().items() if not fine}

    assert asked() == (200, set())
    incoming = filled.layout.incoming
    incoming.rename(incoming.with_name("aside"))
    incoming.write_text("a file where a folder was")
    assert asked() == (503, {"ready", "store"})
    incoming.unlink()
    with filled.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    assert asked() == (503, {"ready", "migrations"})
    with filled.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE alembic_version")
    assert asked() == (503, {"ready", "migrations"})
    app.state.closing.set()
    assert asked()[0] == 503
    assert client.get(f"{API}/health").status_code == 200


def test_each_request_has_one_line_with_its_id_and_no_secret(filled: Any, caplog: pytest.LogCaptureFixture) -> None:
    """JSON with who, what, how long and how much; the query, where signatures are, stays out; probes are quiet."""
    created = filled.create_token("t", subject="alice", scopes=(Scope.READ,))
    app = create_app(filled, JobService(filled), authenticators=(filled.authenticator(),))
    client = TestClient(app)
    headers = {"Authorization": f"Bearer {created.token}"}
    with caplog.at_level(logging.INFO, logger="registry"):
        answer = client.get(f"{API}/search?q=shout&signature=5ecret", headers={**headers, "X-Request-ID": "abc-1"})
        client.get(f"{API}/bases", headers={"X-Request-ID": 'not a word"'})
        client.get(f"{API}/ready")
    assert answer.headers["X-Request-ID"] == "abc-1"
    token = REQUEST_ID.set("abc-1")
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name == "registry.access"]
    REQUEST_ID.reset(token)
    first, second = map(json.loads, lines)
    assert {name: first[name] for name in ("level", "method", "path", "route", "status", "subject", "token")} == {
        "level": "info", "method": "GET", "path": f"{API}/search", "route": f"{API}/search", "status": 200,
        "subject": "alice", "token": created.info.id,
    }  # fmt: skip
    assert first["request_id"] == "abc-1"
    assert first["bytes_out"] == len(answer.content)
    assert first["ms"] >= 0
    assert (second["status"], second["subject"]) == (401, None)
    secret = created.token.rpartition("_")[2]
    assert not any(word in line for line in lines for word in (secret, "5ecret"))


def test_a_traceback_is_one_line_of_json_without_secrets() -> None:
    """Whatever a message or an exception holds."""
    try:
        raise ValueError("postgresql://me:hunter2@db/x\nand more")
    except ValueError:
        record = logging.LogRecord(
            "registry", logging.ERROR, "x.py", 1, "failed: %s", ("Bearer abcdefgh12",), sys.exc_info()
        )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert not any(secret in line for secret in ("hunter2", "abcdefgh12"))
    assert "ValueError" in json.loads(line)["exception"]


@pytest.mark.parametrize(
    "path", [f"{API}/plans", "/api/repos/create", "/api/validate-yaml", "/t/x.git/info/lfs/objects/batch"]
)
def test_no_body_that_is_read_into_memory_may_be_large(client: TestClient, path: str) -> None:
    """On both protocols, whatever content type is claimed, with its length declared or not."""
    body = b"x" * (MAX_BODY_BYTES + 1)
    for kind in ("application/json", "multipart/form-data; boundary=x"):
        assert client.post(path, content=body, headers={"Content-Type": kind}).status_code == 413
        stream = iter([body[:MAX_BODY_BYTES], body[MAX_BODY_BYTES:]])
        assert client.post(path, content=stream, headers={"Content-Type": kind}).status_code == 413


@pytest.fixture
def served(filled: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`registry serve` over it, logging JSON."""
    filled.close()
    command = [sys.executable, "-m", "cli", "serve", "--port", "0", "--log-format", "json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_sigterm_ends_a_service_in_order(served: tuple[Any, str], filled: Any) -> None:
    """What is followed ends, what was counted is written, the exit code is 0, and every line of its log is JSON."""
    process, url = served
    file = f"{url}{API}/adapters/team/shout/files/adapter_model.safetensors"
    with httpx.Client(trust_env=False) as client:
        assert client.get(file).status_code == 200
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    lines = [json.loads(line) for line in errors.splitlines()]
    assert any(line.get("route", "").endswith("/files/{filename:path}") and line["status"] == 200 for line in lines)
    assert filled.get_version("team/shout").downloads == 1
