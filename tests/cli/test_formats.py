"""Adapters of other tools through the commands: published, inspected, planned, composed, pulled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.formats import formats
from composer.tensors import read_header
from tests.support import write_tensors


def as_mlx(lora: Path, folder: Path) -> Path:
    """A LoRA of PEFT as mlx-lm would have saved it."""
    config = json.loads((lora / "adapter_config.json").read_text())
    tensors = {}
    for name, spec in read_header(lora / "adapter_model.safetensors").tensors.items():
        module, side = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        tensors[f"{module}.{side.lower()}"] = np.ascontiguousarray(spec.read().T)
    write_tensors(folder / "adapters.safetensors", tensors)
    scale = config["lora_alpha"] / config["r"]
    fields = {"fine_tune_type": "lora", "lora_parameters": {"rank": config["r"], "scale": scale, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def as_adapterhub(lora: Path, folder: Path) -> Path:
    """A LoRA of PEFT as AdapterHub's library would have saved it."""
    config = json.loads((lora / "adapter_config.json").read_text())
    tensors = {}
    for name, spec in read_header(lora / "adapter_model.safetensors").tensors.items():
        module, side = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        tensors[f"{module}.loras.task.{side}"] = spec.read()
    write_tensors(folder / "adapter.safetensors", tensors)
    method = {"architecture": "lora", "r": config["r"], "alpha": config["lora_alpha"], "composition_mode": "add"}
    fields = {"config": method, "model_type": "llama", "model_name": "org/llama", "name": "task"}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def as_kohya(lora: Path, folder: Path) -> Path:
    """A LoRA of PEFT as LyCORIS would have saved it: one file, no config."""
    alpha = json.loads((lora / "adapter_config.json").read_text())["lora_alpha"]
    sides = {"lora_A": "lora_down", "lora_B": "lora_up"}
    tensors = {}
    for name, spec in read_header(lora / "adapter_model.safetensors").tensors.items():
        module, side = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        flat = f"lycoris_{module.replace('.', '_')}"
        tensors[f"{flat}.{sides[side]}.weight"] = spec.read()
        tensors[f"{flat}.alpha"] = np.array(alpha, np.float32)
    write_tensors(folder / "style.safetensors", tensors)
    return folder


def as_diffusers(lora: Path, folder: Path) -> Path:
    """A LoRA of PEFT as diffusers would have saved it for a pipeline's text encoder."""
    config = json.loads((lora / "adapter_config.json").read_text())
    metadata = {f"text_encoder.{key}": config[key] for key in ("r", "lora_alpha")}
    tensors = {
        name.replace("base_model.model.", "text_encoder."): spec.read()
        for name, spec in read_header(lora / "adapter_model.safetensors").tensors.items()
    }
    write_tensors(folder / "pytorch_lora_weights.safetensors", tensors, {"lora_adapter_metadata": json.dumps(metadata)})
    return folder


CONVERTERS = {
    "AdapterHub": as_adapterhub,
    "MLX": as_mlx,
    "diffusers": as_diffusers,
    "kohya-ss / LyCORIS": as_kohya,
}


def test_every_format_goes_through_the_commands() -> None:
    """A format added without a converter here fails."""
    assert set(CONVERTERS) == set(formats())


@pytest.mark.parametrize("format", sorted(CONVERTERS))
def test_a_foreign_adapter_goes_through_every_command(
    run: Any, tiny_llama: Path, tiny_lora: Path, tmp_path: Path, format: str
) -> None:
    """The composed weights are those of its PEFT twin, and pull gives back the published bytes."""
    foreign = CONVERTERS[format](tiny_lora, tmp_path / "foreign")
    (foreign / "scratch.bin").write_bytes(b"not part of the adapter")
    run("base", "add", tiny_llama, "--name", "tiny")
    run("publish", foreign, "--name", "team/foreign", "--version", "1.0.0", "--base", "tiny")
    run("publish", tiny_lora, "--name", "team/twin", "--version", "1.0.0", "--base", "tiny")
    facts = json.loads(run("inspect", "team/foreign", "--format", "json").stdout)
    twin = json.loads(run("inspect", "team/twin", "--format", "json").stdout)
    assert (facts["format"], twin["format"]) == (format, "PEFT")
    same = ("kind", "rank", "alpha", "parameters")
    assert [facts[field] for field in same] == [twin[field] for field in same]
    assert json.loads(run("inspect", foreign, "--format", "json").stdout)["format"] == format
    assert run("check", "team/foreign", "tiny", "--format", "quiet").stdout.split() == ["exact"]
    assert json.loads(run("plan", "tiny+team/foreign:0.5", "--format", "json").stdout)["accepted"]
    for name in ("foreign", "twin"):
        run("compose", f"tiny+team/{name}:0.5", "-o", f"out-{name}")
    weights = "model.safetensors"
    assert (Path("out-foreign") / weights).read_bytes() == (Path("out-twin") / weights).read_bytes()
    assert (Path("out-foreign") / weights).read_bytes() != (tiny_llama / weights).read_bytes()
    run("pull", "team/foreign@1.0.0")
    pulled = {path.name: path.read_bytes() for path in Path("foreign").iterdir()}
    assert pulled == {path.name: path.read_bytes() for path in foreign.iterdir() if path.name != "scratch.bin"}


@pytest.mark.parametrize("format", sorted(CONVERTERS))
def test_a_foreign_adapter_is_uploaded_and_pulled_unchanged(
    run: Any, service: str, tiny_llama: Path, tiny_lora: Path, tmp_path: Path, format: str
) -> None:
    """The service reads the upload as the client read the folder, and gives back the same files."""
    foreign = CONVERTERS[format](tiny_lora, tmp_path / "foreign")
    remote = ("--url", service)
    run(*remote, "base", "add", tiny_llama, "--name", "tiny")
    run(*remote, "publish", foreign, "--name", "team/foreign", "--base", "tiny")
    assert run(*remote, "check", "team/foreign", "tiny", "--format", "quiet").stdout.split() == ["exact"]
    run(*remote, "pull", "team/foreign", "-o", "pulled")
    pulled = {path.name: path.read_bytes() for path in Path("pulled").iterdir()}
    assert pulled == {path.name: path.read_bytes() for path in foreign.iterdir()}
