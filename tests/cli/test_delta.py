"""`registry delta` from a fine-tune to a published adapter and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from composer.files import sha256_file


def test_a_fine_tune_is_published_composed_and_restored(run: Any, tiny_llama: Path, tiny_lora: Path) -> None:
    """The weights that come back have the fine-tune's SHA-256, by composing (same layout here) and by restoring."""
    run("base", "add", tiny_llama, "--name", "tiny")
    run("compose", f"tiny+{tiny_lora}", "-o", "finetune")
    run("delta", "make", "./finetune", "--base", "tiny", "-o", "delta")
    run("publish", "./delta", "--name", "team/full")
    info = json.loads(run("show", "team/full", "--format", "json").stdout)
    assert (info["kind"], info["base"], info["base_status"]) == ("checkpoint-delta", "tiny", "verified")
    run("delta", "restore", "team/full", "--base", "tiny", "-o", "back")
    run("compose", "tiny+team/full", "-o", "composed")
    expected = sha256_file(Path("finetune/model.safetensors"))
    assert sha256_file(Path("back/model.safetensors")) == expected
    assert sha256_file(Path("composed/model.safetensors")) == expected
    assert expected != sha256_file(tiny_llama / "model.safetensors")
    run("--url", "http://127.0.0.1:9", "delta", "make", "./finetune", "--base", "tiny", "-o", "x", code=6)
