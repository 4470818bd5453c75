"""`extract` and `resize` from names and folders to adapters that can be published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support import weight_bytes


def test_an_extracted_lora_is_exact_on_its_base(run: Any, tiny_llama: Path, tiny_lora: Path) -> None:
    """Compose a fine-tune, extract, publish: verified against the base without --base."""
    run("base", "add", tiny_llama, "--name", "tiny")
    run("compose", f"tiny+{tiny_lora}", "-o", "finetune")
    shown = run("extract", "./finetune", "--base", "tiny", "--rank", "8", "-o", "lora").stdout
    assert "energy kept" in shown
    assert f"{json.loads(Path('lora/provenance.json').read_text())['kept_energy']:.3%}" in shown
    run("publish", "./lora", "--name", "team/extracted")
    info = json.loads(run("show", "team/extracted", "--format", "json").stdout)
    assert (info["base"], info["base_status"], info["rank"]) == ("tiny", "verified", 8)
    run("compose", "tiny+team/extracted")
    run("extract", "./finetune", "--base", "tiny", "--rank", "8", "-o", "lora", code=7)
    run("extract", "./finetune", "--base", "tiny", "-o", "sizeless", code=2)


def test_a_resized_adapter_keeps_its_base(run: Any, service: str, tiny_llama: Path, other_lora: Path) -> None:
    """By name, by folder and over a service: the same factors, tied to the base they were published with."""
    run("base", "add", tiny_llama, "--name", "tiny")
    run("publish", other_lora, "--name", "team/json", "--base", "tiny")
    run("resize", "team/json", "--rank", "3", "-o", "named")
    run("resize", other_lora, "--rank", "3", "-o", "folder")
    run("--url", service, "resize", "team/json", "--rank", "3", "-o", "remote")
    assert weight_bytes(Path("named")) == weight_bytes(Path("folder")) == weight_bytes(Path("remote"))
    for out in ("named", "folder", "remote"):
        run("publish", f"./{out}", "--name", f"team/{out}")
        info = json.loads(run("show", f"team/{out}", "--format", "json").stdout)
        assert (info["base_status"], info["rank"]) == ("verified", 3)
    run("--url", service, "extract", "./a", "--base", "./b", "--rank", "3", "-o", "c", code=6)
