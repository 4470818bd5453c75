"""Adapters of AdapterHub's library: the bytes of their PEFT twin, and a closed form in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.adapters import open_adapter
from composer.errors import (
    CorruptFileError,
    NotFoundError,
    TargetMismatchError,
    TypedError,
    UnsafeFormatError,
    UnsupportedAdapterError,
)
from composer.formats.adapterhub import REASONS
from tests.support import compose_folders, plan_folders, read_tensors, weight_bytes, write_base, write_tensors

QUERY, DENSE = "encoder.layer.0.attention.self.query", "encoder.layer.0.output.dense"
SHAPES = {QUERY: (6, 6), DENSE: (6, 10)}
RANK, ALPHA = 3, 8
LORA = {"architecture": "lora", "r": RANK, "alpha": ALPHA, "composition_mode": "add", "use_gating": False}
IA3 = {**LORA, "r": 1, "alpha": 1, "composition_mode": "scale", "init_weights": "ia3"}
Arrays = dict[str, np.ndarray]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A float32 base with biases, saved without the prefix `bert.` that the adapter's names have."""
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in SHAPES.items():
        tensors[f"{name}.weight"] = random.normal(size=shape).astype(np.float32)
        tensors[f"{name}.bias"] = random.normal(size=shape[0]).astype(np.float32)
    return write_base(tmp_path / "base", tensors, model_type="bert", architectures=["BertModel"])


def random_arrays(shapes: dict[str, tuple[int, ...]], seed: int = 1) -> Arrays:
    """Standard normal float32 arrays."""
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def lora_arrays() -> Arrays:
    """The factors, as module.lora_A and module.lora_B."""
    return random_arrays(
        {f"{module}.lora_A": (RANK, columns) for module, (_, columns) in SHAPES.items()}
        | {f"{module}.lora_B": (rows, RANK) for module, (rows, _) in SHAPES.items()}
    )


def write_hub(folder: Path, arrays: Arrays, method: Any = LORA, **config: Any) -> Path:
    """A folder as save_adapter(use_safetensors=True) writes it, the adapter being named `task`."""
    names = {name: name.rpartition(".") for name in arrays}
    tensors = {f"bert.{names[name][0]}.loras.task.{names[name][2]}": array for name, array in arrays.items()}
    write_tensors(folder / "adapter.safetensors", tensors)
    fields = {
        "config": method,
        "hidden_size": 6,
        "model_class": "BertAdapterModel",
        "model_name": "org/bert",
        "model_type": "bert",
        "name": "task",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def write_twin(folder: Path, tensors: Arrays, **config: Any) -> Path:
    """The same adapter as PEFT saves it."""
    write_tensors(
        folder / "adapter_model.safetensors", {f"base_model.model.{name}": array for name, array in tensors.items()}
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def doubles(folder: Path) -> Arrays:
    """A checkpoint in float64."""
    return {name: tensor.double().numpy() for name, tensor in read_tensors(folder).items()}


def test_lora_gives_the_bytes_of_its_peft_twin(base: Path, tmp_path: Path) -> None:
    """W + alpha/r · B·A."""
    arrays = lora_arrays()
    foreign = write_hub(tmp_path / "hub", arrays)
    twin = {f"{name}.weight": array for name, array in arrays.items()}
    compose_folders(base, [(foreign, 0.7)], tmp_path / "out")
    expected = write_twin(tmp_path / "twin", twin, peft_type="LORA", r=RANK, lora_alpha=ALPHA)
    compose_folders(base, [(expected, 0.7)], tmp_path / "expected")
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "expected")
    before, after = doubles(base), doubles(tmp_path / "out")
    for module in SHAPES:
        b, a = (arrays[f"{module}.lora_{side}"].astype(np.float64) for side in "BA")
        exact = before[f"{module}.weight"] + 0.7 * ALPHA / RANK * b @ a
        np.testing.assert_allclose(after[f"{module}.weight"], exact, rtol=0, atol=2e-6)


def test_ia3_gives_the_bytes_of_its_peft_twin(base: Path, tmp_path: Path) -> None:
    """The outputs are scaled, so the rows of W and the bias; on a feedforward module too."""
    vectors = random_arrays({module: (rows, 1) for module, (rows, _) in SHAPES.items()})
    foreign = write_hub(tmp_path / "hub", {f"{module}.lora_B": v for module, v in vectors.items()}, IA3)
    compose_folders(base, [(foreign, 1.0)], tmp_path / "out")
    expected = write_twin(tmp_path / "twin", {f"{module}.ia3_l": v for module, v in vectors.items()}, peft_type="IA3")
    compose_folders(base, [(expected, 1.0)], tmp_path / "expected")
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "expected")
    before, after = doubles(base), doubles(tmp_path / "out")
    for module, vector in vectors.items():
        for name, factor in ((f"{module}.weight", vector), (f"{module}.bias", vector[:, 0])):
            np.testing.assert_allclose(after[name], before[name] * factor.astype(np.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["add", "scale"])
def test_conv1d_is_transposed(tmp_path: Path, mode: str) -> None:
    """GPT-2 keeps [in, out]; on a square matrix the shapes alone would not tell."""
    module = "h.0.mlp.c_proj"
    weight = random_arrays({f"{module}.weight": (6, 6), f"{module}.bias": (6,)}, seed=3)
    base = write_base(tmp_path / "base", weight, model_type="gpt2", architectures=["GPT2Model"])
    b, a = random_arrays({"b": (6, RANK), "a": (RANK, 6)}, seed=4).values()
    arrays = {f"{module}.lora_A": a, f"{module}.lora_B": b} if mode == "add" else {f"{module}.lora_B": b[:, :1].copy()}
    foreign = write_hub(tmp_path / "hub", arrays, LORA if mode == "add" else IA3, model_type="gpt2")
    compose_folders(base, [(foreign, 1.0)], tmp_path / "out")
    before = weight[f"{module}.weight"].astype(np.float64)
    delta = ALPHA / RANK * (b.astype(np.float64) @ a).T
    exact = before + delta if mode == "add" else before * b[:, 0].astype(np.float64)
    np.testing.assert_allclose(doubles(tmp_path / "out")[f"{module}.weight"], exact, rtol=0, atol=2e-6)


def test_what_the_header_says_in_peft_terms(tmp_path: Path) -> None:
    """Format, files, base, rank and alpha."""
    adapter = open_adapter(write_hub(tmp_path / "hub", lora_arrays()))
    assert (adapter.format, adapter.stored) == ("AdapterHub", ("adapter_config.json", "adapter.safetensors"))
    assert adapter.base_name == "org/bert"
    assert (adapter.signature.kind, adapter.signature.rank, adapter.signature.alpha) == ("lora", RANK, ALPHA)


@pytest.mark.parametrize("architecture", [*sorted(REASONS), "new"])
def test_other_methods_are_refused_by_name(tmp_path: Path, architecture: str) -> None:
    """With the reason."""
    reason = REASONS.get(architecture, "not known")[:20]
    with pytest.raises(UnsupportedAdapterError, match=f"{architecture!r} of AdapterHub.*{reason}"):
        open_adapter(write_hub(tmp_path / "hub", lora_arrays(), {"architecture": architecture, "reduction_factor": 16}))


def test_a_config_without_architecture_is_a_bottleneck(tmp_path: Path) -> None:
    """So the tensors of a LoRA do not belong to it."""
    method = {"architecture": None, "reduction_factor": 16}
    with pytest.raises(CorruptFileError, match="is not of a bottleneck"):
        open_adapter(write_hub(tmp_path / "hub", lora_arrays(), method))


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("lora", UnsupportedAdapterError, "defaults"),
        ({**LORA, "use_gating": True}, UnsupportedAdapterError, "gate depends on the input"),
        ({**LORA, "vera_d": 0.1}, UnsupportedAdapterError, "VeRA"),
        ({**LORA, "composition_mode": "other"}, CorruptFileError, "composition_mode='other'"),
        ({**LORA, "r": {"query": 4}}, CorruptFileError, "r={'query': 4}"),
        ({**LORA, "alpha": None}, CorruptFileError, "alpha=None"),
        ({**IA3, "alpha": 2}, UnsupportedAdapterError, "alpha=2"),
        (IA3, CorruptFileError, "in an"),
    ],
)
def test_configs_that_change_the_maths_are_refused(
    tmp_path: Path, method: Any, error: type[TypedError], message: str
) -> None:
    """By name, with what was found."""
    with pytest.raises(error, match=message):
        open_adapter(write_hub(tmp_path / "hub", lora_arrays(), method))


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    """A gate, an invertible adapter, a second adapter, a merged attention matrix."""
    cases = {
        f"{QUERY}.gate": (UnsupportedAdapterError, "not a factor", (1, 6)),
        "loras.other.lora_A": (CorruptFileError, "2 adapters", (RANK, 6)),
        f"{QUERY}.lora_A": (UnsupportedAdapterError, "merged attention", (3 * RANK, 6)),
    }
    for index, (name, (error, message, shape)) in enumerate(cases.items()):
        folder = write_hub(tmp_path / str(index), lora_arrays() | {f"{name}": np.ones(shape, np.float32)})
        if name.startswith("loras."):
            array = np.ones(shape, np.float32)
            write_tensors(
                folder / "adapter.safetensors",
                {f"x.loras.{adapter}.lora_A": array for adapter in ("task", "other")},
            )
        with pytest.raises(error, match=message):
            open_adapter(folder)


def test_a_rank_that_the_config_does_not_say_is_refused(base: Path, tmp_path: Path) -> None:
    """The scale would be wrong."""
    foreign = write_hub(tmp_path / "hub", lora_arrays(), {**LORA, "r": 4})
    with pytest.raises(TargetMismatchError, match="says rank 4"):
        plan_folders(base, [(foreign, 1.0)])


def test_pickles_and_heads_are_refused_with_a_remedy(tmp_path: Path) -> None:
    """pytorch_adapter.bin is unsafe, no weights at all are missing, and a head is not composed in silence."""
    folder = write_hub(tmp_path / "hub", lora_arrays())
    (folder / "head_config.json").write_text("{}")
    with pytest.raises(UnsupportedAdapterError, match="prediction head"):
        open_adapter(folder)
    (folder / "head_config.json").unlink()
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(UnsafeFormatError, match="pickle") as error:
        open_adapter(folder)
    assert "safetensors" in str(error.value.remedy)
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(NotFoundError, match=r"no adapter\.safetensors"):
        open_adapter(folder)
