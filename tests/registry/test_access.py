"""Access: tokens, namespaces, private adapters, the audit log; what is hidden is as if it were not there."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from composer.errors import NotFoundError, UsageError
from composer.recipe import parse_recipe
from registry.access import LOCAL, Principal, Role, Scope
from registry.api.app import create_app
from registry.api.limits import MAX_BODY_BYTES, RateLimit
from registry.client import RemoteRegistry
from registry.db import session_scope
from registry.errors import (
    AdapterNotFoundError,
    AuthenticationError,
    ForbiddenError,
    JobNotFoundError,
    RateLimitError,
)
from registry.models import TokenRow, now
from registry.redaction import RedactingFormatter, redact
from registry.services.jobs import JobService
from registry.services.local import LocalRegistry
from registry.services.worker import Worker
from tests.support import write_base, write_lora

API = "/api/v1"
MODULE = "model.layers.0.self_attn.q_proj"
READ, PUBLISH, COMPOSE = (frozenset({scope}) for scope in (Scope.READ, Scope.PUBLISH, Scope.COMPOSE))
ALICE, BOB = Principal("alice", PUBLISH | COMPOSE), Principal("bob", PUBLISH | COMPOSE)


@pytest.fixture
def registry(any_registry: LocalRegistry, tmp_path: Path) -> LocalRegistry:
    """One base; alice's namespace with a public and a private adapter."""
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": np.ones((6, 4), np.float32)})
    any_registry.add_base(base, name="base")
    alice = any_registry.acting_as(ALICE)
    for seed, name in enumerate(("open", "secret")):
        folder = write_lora(tmp_path / name, {MODULE: (6, 4)}, seed=seed)
        alice.publish(folder, name=f"team/{name}", base="base", private=name == "secret")
    return any_registry


def token_of(registry: LocalRegistry, subject: str, *scopes: Scope, **options: Any) -> str:
    """A new token."""
    return registry.create_token("test", subject=subject, scopes=scopes, **options).token


def service(registry: LocalRegistry, **options: Any) -> TestClient:
    """A service that wants tokens; its worker does not run."""
    options = {"authenticators": (registry.authenticator(),), **options}
    return TestClient(create_app(registry, JobService(registry), **options), raise_server_exceptions=False)


def bearer(token: str) -> dict[str, str]:
    """The header of a token."""
    return {"Authorization": f"Bearer {token}"}


def test_a_private_adapter_does_not_exist_for_others(registry: LocalRegistry, tmp_path: Path) -> None:
    """Every read that could name it: the answer is what it would be without it."""
    reader, bob = (registry.acting_as(Principal(name, READ)) for name in ("carol", "bob"))
    registry.grant("team", "carol", Role.READER)
    secret = registry.get_version("team/secret")
    assert reader.get_version("team/secret") == secret
    assert [item.name for item in reader.list_adapters().items] == ["team/open", "team/secret"]
    assert [item.name for item in bob.list_adapters().items] == ["team/open"]
    assert [item.name for item in bob.search("team").items] == ["team/open"]
    assert [fit.adapter.name for fit in bob.compatible("base").items] == ["team/open"]
    with pytest.raises(AdapterNotFoundError) as never:
        bob.get_version("team/never")
    for read in (
        lambda: bob.get_version("team/secret"),
        lambda: bob.get_version(f"team/secret@{secret.digest}"),
        lambda: bob.list_versions("team/secret"),
        lambda: bob.bases_for("team/secret"),
        lambda: bob.check("team/secret", "base"),
        lambda: bob.inspect("team/secret"),
        lambda: bob.pull("team/secret", tmp_path / "out"),
        lambda: bob.plan(parse_recipe("base+team/secret")),
        lambda: bob.submit(parse_recipe("base+team/secret")),
        lambda: bob.set_private("team/secret", False),
        lambda: bob.set_alias("team/secret", "prod"),
    ):
        with pytest.raises(AdapterNotFoundError) as hidden:
            read()
        said, wanted = str(hidden.value.as_dict()), str(never.value.as_dict())
        assert said.replace("team/secret", "team/never") == wanted


def test_shown_again_it_is_there(registry: LocalRegistry) -> None:
    """Only an owner decides."""
    registry.grant("team", "carol", Role.PUBLISHER)
    with pytest.raises(ForbiddenError):
        registry.acting_as(Principal("carol", PUBLISH)).set_private("team/secret", False)
    registry.acting_as(ALICE).set_private("team/secret", False)
    assert registry.acting_as(BOB).get_version("team/secret").private is False


def test_a_namespace_belongs_to_the_first_who_publishes(registry: LocalRegistry, tmp_path: Path) -> None:
    """Others are refused until they are granted a role; one that was filled while access was open waits for an admin."""
    lora = write_lora(tmp_path / "more", {MODULE: (6, 4)}, seed=5)
    bob = registry.acting_as(BOB)
    for name in ("team/more", "team/secret", "default/x"):
        with pytest.raises(ForbiddenError):
            bob.publish(lora, name=name)
    registry.publish(lora, name="old/x")
    with pytest.raises(ForbiddenError):
        bob.publish(lora, name="old/y")
    with pytest.raises(ForbiddenError):
        bob.grant("team", "bob", Role.OWNER)
    registry.acting_as(ALICE).grant("team", "bob", Role.PUBLISHER)
    assert bob.publish(lora, name="team/more").created
    assert bob.set_alias("team/more", "prod")
    assert bob.publish(lora, name="own/more").created
    assert [item.name for item in bob.list_namespaces().items] == ["own", "team"]
    registry.acting_as(ALICE).revoke("team", "bob")
    with pytest.raises(ForbiddenError):
        bob.set_alias("team/more", "next")
    with pytest.raises(NotFoundError):
        registry.revoke("team", "bob")


def test_a_limited_token_reaches_no_further(registry: LocalRegistry, tmp_path: Path) -> None:
    """alice with a token for another namespace is nobody in hers; an admin of one namespace is none elsewhere."""
    lora = write_lora(tmp_path / "more", {MODULE: (6, 4)}, seed=5)
    elsewhere = registry.acting_as(Principal("alice", PUBLISH, frozenset({"lab"})))
    with pytest.raises(AdapterNotFoundError):
        elsewhere.get_version("team/secret")
    with pytest.raises(ForbiddenError):
        elsewhere.publish(lora, name="team/more")
    assert elsewhere.publish(lora, name="lab/more").created
    with pytest.raises(ForbiddenError):
        elsewhere.add_base(lora, name="x")
    admin = registry.acting_as(Principal("root", frozenset({Scope.ADMIN}), frozenset({"team"})))
    assert admin.get_version("team/secret")
    assert admin.grant("team", "bob", Role.READER)
    for refused in (
        lambda: admin.grant("lab", "bob", Role.READER),
        lambda: admin.list_tokens(),
        lambda: admin.create_token("x", subject="x", scopes=(Scope.ADMIN,)),
        lambda: admin.audit(),
    ):
        with pytest.raises(ForbiddenError):
            refused()


def test_a_token_is_recognised_until_it_ends(registry: LocalRegistry) -> None:
    """Its principal while it is valid; after revocation, expiry or one wrong character, AuthenticationError."""
    known = registry.authenticator()
    token = token_of(registry, "alice", Scope.PUBLISH, namespaces=("team",))
    principal = known.authenticate(token)
    assert principal == Principal("alice", PUBLISH, frozenset({"team"}), token.split("_")[1])
    assert known.authenticate("something-else") is None
    last = "A" if token[-1] != "A" else "B"
    for wrong in (token[:-1] + last, token.replace("ar_", "ar_", 1)[:3] + "0" * 12 + token[15:]):
        with pytest.raises(AuthenticationError):
            known.authenticate(wrong)
    registry.revoke_token(principal.token)
    with pytest.raises(AuthenticationError):
        registry.authenticator().authenticate(token)
    old = token_of(registry, "alice", Scope.READ, days=1)
    with session_scope(registry.engine, writes=True) as session:
        session.execute(sa.update(TokenRow).values(expires_at=now() - timedelta(seconds=1)))
    with pytest.raises(AuthenticationError):
        registry.authenticator().authenticate(old)
    assert not registry.tokens.any_valid()
    for wrong in ({"days": 0}, {"namespaces": ("a b",)}, {"scopes": ()}, {"subject": "a b"}):
        with pytest.raises(UsageError):
            registry.create_token("x", **{"subject": "a", "scopes": (Scope.READ,), **wrong})


def test_no_secret_is_stored_or_listed(registry: LocalRegistry) -> None:
    """Neither in the database, whatever the column, nor in what is listed or audited."""
    secret = token_of(registry, "alice", Scope.READ).split("_", 2)[2]
    with registry.engine.connect() as connection:
        for table in sa.inspect(registry.engine).get_table_names():
            assert secret not in str(connection.execute(sa.text(f"SELECT * FROM {table}")).all())
    assert secret not in registry.list_tokens().model_dump_json() + registry.audit().model_dump_json()


SCOPED = [
    ("GET", "/adapters", "read"),
    ("GET", "/search?q=x", "read"),
    ("GET", "/bases", "read"),
    ("GET", "/jobs", "read"),
    ("GET", "/whoami", "read"),
    ("POST", "/plans", "read"),
    ("POST", "/adapters", "publish"),
    ("POST", "/bases", "publish"),
    ("PUT", "/adapters/team/open/aliases/prod", "publish"),
    ("PUT", "/adapters/team/open/visibility", "publish"),
    ("PUT", "/namespaces/team/members/bob", "publish"),
    ("POST", "/compositions", "compose"),
    ("POST", "/bases/base/verifications", "compose"),
    ("DELETE", "/jobs/x", "compose"),
    ("POST", "/tokens", "admin"),
    ("GET", "/tokens", "admin"),
    ("GET", "/audit", "admin"),
    ("GET", "/doctor", "admin"),
]


@pytest.mark.parametrize(("method", "path", "scope"), SCOPED)
def test_each_route_needs_its_scope(registry: LocalRegistry, method: str, path: str, scope: str) -> None:
    """401 without a token, 403 with a lesser one, and past the door with the right one."""
    client = service(registry)
    answer = client.request(method, f"{API}{path}")
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer realm="registry"')
    for given in Scope:
        right = given in (scope, Scope.ADMIN) or scope == "read"
        answer = client.request(method, f"{API}{path}", headers=bearer(token_of(registry, "alice", given)))
        assert (answer.status_code not in (401, 403)) == right, (given, answer.text)
        if not right:
            assert answer.json()["error"]["code"] == "forbidden"


def test_every_route_under_the_prefix_is_closed(registry: LocalRegistry) -> None:
    """Nothing answers without a token but the description of the API and the probes of a balancer."""
    client = service(registry)
    paths = client.get(f"{API}/openapi.json").json()["paths"]
    assert client.get("/healthz").status_code == 200
    for path, operations in paths.items():
        for method in operations:
            if path.startswith(API) and path not in (f"{API}/health", f"{API}/ready"):
                assert client.request(method, path).status_code == 401, (method, path)


def test_over_rest_a_hidden_name_is_an_unused_name(registry: LocalRegistry) -> None:
    """Status, headers and body, but for the name itself."""
    client, headers = service(registry), bearer(token_of(registry, "bob", Scope.PUBLISH, Scope.COMPOSE))
    for path in ("", "/versions", "/bases", "/inspect", "/files/adapter_config.json"):
        hidden, never = (
            client.get(f"{API}/adapters/team/{name}{path}", headers={**headers, "X-Request-ID": "same"})
            for name in ("secret", "never0")
        )
        assert hidden.status_code == 404
        assert hidden.text.replace("secret", "never0") == never.text
        assert hidden.headers == never.headers
    body = {"recipe": "base+team/secret"}
    assert client.post(f"{API}/compositions", json=body, headers=headers).status_code == 404


def test_paths_of_the_service_are_for_its_admins(registry: LocalRegistry) -> None:
    """Where bases lie is in no answer to others: not in a listing, of a pair, or in a job's result."""
    client = service(registry)
    job = JobService(registry).acting_as(ALICE).submit_base(Path(registry.get_base("base").location), "base")
    Worker(registry).drain()
    paths = ("/bases", "/bases/base", "/adapters/team/open/bases", f"/jobs/{job.id}", f"/jobs/{job.id}/events", "/jobs")
    for scopes, shown in ((("publish", "compose"), False), (("admin",), True)):
        headers = bearer(token_of(registry, "alice", *map(Scope, scopes)))
        for path in (*paths, "/bases/base/inspect"):
            answer = client.get(f"{API}{path}", headers=headers)
            assert answer.status_code == 200, path
            assert (str(registry.get_base("base").location) in answer.text) is (shown and path in paths), path


def test_a_job_is_seen_by_those_who_see_its_adapters(registry: LocalRegistry) -> None:
    """Another's job of a private adapter does not exist; of a public one it is one's own result, not one's to cancel."""
    jobs = JobService(registry)
    alice, bob = jobs.acting_as(ALICE), jobs.acting_as(BOB)
    hidden = alice.submit(parse_recipe("base+team/secret"))
    shared = alice.submit(parse_recipe("base+team/open"))
    with pytest.raises(JobNotFoundError):
        bob.get(hidden.id)
    with pytest.raises(JobNotFoundError):
        bob.cancel(hidden.id)
    assert bob.submit(parse_recipe("base+team/open")).id == shared.id
    assert bob.get(shared.id).owner == "alice"
    assert bob.list(10, None).items == ()
    with pytest.raises(ForbiddenError):
        bob.cancel(shared.id)
    assert alice.cancel(hidden.id).state == "cancelled"


def test_what_is_changed_is_in_the_audit_log(registry: LocalRegistry) -> None:
    """Who, what, with which token; a refusal too, and a change that failed not."""
    token = token_of(registry, "alice", Scope.PUBLISH)
    client = service(registry)
    assert client.put(
        f"{API}/adapters/team/open/aliases/prod", json={"version": "latest"}, headers=bearer(token)
    ).is_success
    assert client.post(f"{API}/tokens", json={}, headers=bearer(token)).status_code == 403
    assert client.put(
        f"{API}/adapters/team/open/aliases/1.0.0", json={"version": "latest"}, headers=bearer(token)
    ).is_client_error
    log = registry.audit().items
    assert [(entry.subject, entry.action, entry.target) for entry in log[:3]] == [
        ("alice", "denied", f"POST {API}/tokens"),
        ("alice", "alias.set", "team/open@prod"),
        ("local", "token.create", token.split("_")[1]),
    ]
    assert [entry.token for entry in log[:3]] == [token.split("_")[1]] * 2 + [None]
    first = registry.audit(limit=2)
    assert (*first.items, *registry.audit(limit=1000, cursor=first.next).items) == log
    assert {entry.action for entry in registry.audit(subject="alice").items} >= {"publish", "namespace.claim"}


def test_an_authenticator_of_ones_own_is_asked(registry: LocalRegistry) -> None:
    """The place for OIDC: it knows its own credentials and leaves others to the next."""

    class Workflow:
        def authenticate(self, credentials: str) -> Principal | None:
            return Principal("repo:acme/train", PUBLISH, frozenset({"team"})) if credentials == "a.b.c" else None

    client = service(registry, authenticators=(Workflow(), registry.authenticator()))
    who = client.get(f"{API}/whoami", headers=bearer("a.b.c")).json()
    assert who == {"subject": "repo:acme/train", "scopes": ["publish"], "namespaces": ["team"], "token": None}
    assert client.get(f"{API}/whoami", headers=bearer(token_of(registry, "bob", Scope.READ))).json()["subject"] == "bob"
    assert client.get(f"{API}/whoami", headers=bearer("x.y")).status_code == 401
    assert client.get(f"{API}/whoami", headers={"Authorization": "Basic YTpi"}).status_code == 401


def test_requests_and_bodies_are_limited(registry: LocalRegistry) -> None:
    """429 with the seconds to wait, each caller apart; guesses count against the address; 413 for a large JSON body."""
    now_s = [0.0]
    limit = RateLimit(2, clock=lambda: now_s[0])
    for caller in ("a", "a", "b"):
        limit.take(caller)
    with pytest.raises(RateLimitError) as refused:
        limit.take("a")
    assert refused.value.fields["retry_after"] == 30
    now_s[0] = 30.0
    limit.take("a")
    client = service(registry, requests_per_minute=3)
    codes = [client.get(f"{API}/whoami", headers=bearer(f"guess{index}")).status_code for index in range(5)]
    assert codes == [401, 401, 401, 429, 429]
    assert client.get(f"{API}/whoami", headers=bearer(token_of(registry, "bob", Scope.READ))).status_code == 200
    open_client = TestClient(create_app(registry, JobService(registry)))
    large = b'{"recipe": "' + b"x" * MAX_BODY_BYTES + b'"}'
    chunks = (large[start : start + 65536] for start in range(0, len(large), 65536))
    for body in (large, chunks):
        answer = open_client.post(f"{API}/plans", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "upload-too-large")


def test_logs_hold_no_secret(registry: LocalRegistry) -> None:
    """Tokens, Authorization values and passwords in URLs are replaced, in messages, arguments and tracebacks."""
    token = token_of(registry, "alice", Scope.READ)
    secret = token.split("_", 2)[2]
    line = logging.LogRecord("x", logging.ERROR, "f", 1, "GET %s with %s", (f"/x?t={token}", f"Bearer {secret}"), None)
    try:
        raise RuntimeError(f"postgresql://me:{secret}@db/registry and {token}")
    except RuntimeError as error:
        line.exc_info = (type(error), error, error.__traceback__)
    text = RedactingFormatter().format(line)
    assert secret not in text
    assert token.split("_")[1] in text
    assert redact("nothing to hide, not even https://host/path") == "nothing to hide, not even https://host/path"


def test_the_client_sends_its_token(registry: LocalRegistry) -> None:
    """And refuses one that would break the header."""
    token = token_of(registry, "alice", Scope.READ)
    app = service(registry)

    def ask(request: httpx.Request) -> httpx.Response:
        answer = app.request(request.method, str(request.url), headers=dict(request.headers))
        return httpx.Response(answer.status_code, content=answer.content)

    client = RemoteRegistry("http://testserver", httpx.MockTransport(ask), token=token)
    assert client.get_version("team/secret").name == "team/secret"
    with pytest.raises(AuthenticationError):
        RemoteRegistry("http://testserver", httpx.MockTransport(ask)).list_bases()
    with pytest.raises(UsageError):
        RemoteRegistry("http://testserver", token="a\nb")


def test_local_may_do_everything() -> None:
    """The command line on the registry's own machine."""
    assert LOCAL.is_admin
    assert all(LOCAL.may(scope) for scope in Scope)
