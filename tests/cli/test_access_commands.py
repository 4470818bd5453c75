"""Access from the command line: tokens made and revoked, a service that asks for them, roles, and the audit log."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from cli.options import ROLES, SCOPES
from registry.access import Role, Scope
from tests.cli.conftest import Program, Run, environment
from tests.support import write_lora


def test_a_service_that_asks_for_tokens(program: Program, tmp_path: Path) -> None:
    """It does not start without one; then REGISTRY_TOKEN opens it, no token and a revoked one do not; no secret is logged."""
    refused = program("serve", "--port", "0", "--require-tokens")
    assert refused.returncode == 6
    assert "registry token create" in refused.stderr
    token = program("token", "create", "mine", "--subject", "alice", "--scope", "admin").stdout.strip()
    command = [sys.executable, "-m", "cli", "serve", "--port", "0", "--require-tokens", "--jobs", "0"]
    service = subprocess.Popen(
        command, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        url = service.stdout.readline().strip()

        def ask(*words: str, token: str | None) -> subprocess.CompletedProcess[str]:
            env = {**environment(), **({"REGISTRY_TOKEN": token} if token else {})}
            return subprocess.run(
                [sys.executable, "-m", "cli", "--url", url, *words],
                env=env,
                capture_output=True,
                text=True,
                check=False,
            )

        lora = write_lora(tmp_path / "lora", {"m": (4, 4)})
        assert ask("list", token=None).returncode == 6
        assert ask("publish", str(lora), "--name", "team/a", "--private", token=token).returncode == 0
        assert "team/a" in ask("list", token=token).stdout
        assert ask("token", "revoke", token.split("_")[1], token=token).returncode == 0
    finally:
        service.send_signal(signal.SIGINT)
        log = service.communicate(timeout=30)[1]
    assert "POST '/api/v1/adapters' 201" in log
    assert token.split("_", 2)[2] not in log


def test_roles_and_the_log(run: Run, tmp_path: Path) -> None:
    """Granted, listed, revoked; each is in the log; hiding and showing an adapter too."""
    run("publish", write_lora(tmp_path / "lora", {"m": (4, 4)}), "--name", "team/a")
    assert "owner" in run("namespace", "grant", "team", "alice", "owner").stdout
    assert run("namespace", "list", "--format", "quiet").stdout.split() == ["team"]
    assert run("visibility", "team/a", "--private", "--format", "quiet").stdout.strip() == "private"
    assert json.loads(run("show", "team/a", "--format", "json").stdout)["private"]
    run("namespace", "revoke", "team", "alice")
    run("namespace", "revoke", "team", "alice", code=3)
    actions = [line.split()[0] for line in run("audit", "--format", "quiet").stdout.splitlines()]
    assert actions == ["namespace.revoke", "visibility", "namespace.grant", "publish"]
    assert run("token", "list").stdout.strip() == "no tokens"


def test_the_choices_are_those_of_the_enums() -> None:
    """Scopes and roles are written twice, so that --help imports nothing."""
    assert tuple(Scope) == SCOPES
    assert tuple(Role) == ROLES
