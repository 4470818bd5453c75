"""sign and verify as commands: what they print, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from tests.registry.test_verification import MODULE, make_keys, tamper
from tests.support import write_base, write_lora


def test_from_a_key_to_a_proof(run: Any, tmp_path: Path) -> None:
    """Publish signed, verify, compose, sign, verify by composing again; one changed bit is exit code 5, by name."""
    keys = make_keys(tmp_path, "key", ec.SECP256R1())
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": np.ones((6, 4), np.float32)})
    adapter = write_lora(tmp_path / "shout", {MODULE: (6, 4)})
    run("base", "add", base, "--name", "base")
    run("publish", adapter, "--name", "team/shout", "--base", "base", "--sign", "nowhere.pem", code=2)
    run("show", "team/shout", code=3)
    run("publish", adapter, "--name", "team/shout", "--base", "base", "--sign", keys.private)
    shown = json.loads(run("show", "team/shout", "--format", "json").stdout)
    key = shown["signatures"][0]["key"]
    assert key in run("show", "team/shout").stdout
    assert key in run("verify", "team/shout", "--public-key", keys.public).stdout
    run("compose", "base+team/shout", "-o", "out")
    assert run("verify", "./out", "--format", "quiet").stdout.startswith("sha256:")
    run("verify", "./out", "--public-key", keys.public, code=3)
    assert run("sign", "./out", "--key", keys.private, "--format", "quiet").stdout.strip() == key
    (found,) = json.loads(run("verify", "./out", "--public-key", keys.public, "--rebuild", "--format", "json").stdout)
    assert (found["signed_by"], found["attested"], found["rebuilt"]) == (key, True, True)
    both = run("verify", "./out", "team/shout", "--public-key", keys.public, "--format", "quiet").stdout.split()
    assert both == [found["digest"], shown["digest"]]
    tamper(Path("out"), "model.safetensors")
    refused = run("verify", "./out", "--format", "json", code=5)
    assert json.loads(refused.stderr)["error"]["fields"]["changed"] == ["model.safetensors"]
    for words in (["team/shout", "--rebuild"], [], ["./out", "--all"], ["--all", "--rebuild"]):
        run("verify", *words, code=2)
