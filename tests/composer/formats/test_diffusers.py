"""LoRA of diffusers for text encoders: the bytes of its PEFT twin, and a closed form in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.adapters import open_adapter
from composer.errors import CorruptFileError, TypedError, UnsupportedAdapterError
from tests.support import compose_folders, read_tensors, weight_bytes, write_base, write_tensors

QUERY, DENSE = "text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"
SHAPES = {QUERY: (6, 6), DENSE: (10, 6)}
RANK, ALPHA = 3, 8
NAMES = {  # what versions of diffusers call A and B
    "peft": ("lora_A.weight", "lora_B.weight"),
    "lora_linear_layer": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "lora": ("lora.down.weight", "lora.up.weight"),
}
Arrays = dict[str, np.ndarray]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A float32 text encoder of two matrices, one with a bias."""
    random = np.random.default_rng(0)
    tensors = {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    tensors |= {f"{name}.bias": random.normal(size=shape[0]).astype(np.float32) for name, shape in SHAPES.items()}
    return write_base(tmp_path / "base", tensors, model_type="clip_text_model", architectures=["CLIPTextModel"])


def factors(ranks: dict[str, int] | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A [r, in] and B [out, r] by module."""
    random = np.random.default_rng(1)
    found = {}
    for module, (rows, columns) in SHAPES.items():
        rank = (ranks or {}).get(module, RANK)
        found[module] = tuple(random.normal(size=s).astype(np.float32) for s in ((rank, columns), (rows, rank)))
    return found


def arrays(names: tuple[str, str], prefix: str, ranks: dict[str, int] | None = None) -> Arrays:
    """The factors under the given names."""
    return {
        f"{prefix}.{module}.{name}": array
        for module, pair in factors(ranks).items()
        for name, array in zip(names, pair, strict=True)
    }


def write_diffusers(folder: Path, tensors: Arrays, config: Any = None, component: str = "text_encoder") -> Path:
    """A folder as save_lora_weights writes it; `config` becomes the metadata."""
    fields = {f"{component}.{key}": value for key, value in config.items()} if isinstance(config, dict) else config
    metadata = {} if config is None else {"lora_adapter_metadata": json.dumps(fields)}
    write_tensors(folder / "pytorch_lora_weights.safetensors", tensors, {"format": "pt", **metadata})
    return folder


def write_twin(folder: Path, tensors: Arrays, **config: Any) -> Path:
    """The same adapter as PEFT saves it."""
    write_tensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, **config}))
    return folder


def check_twin(base: Path, foreign: Path, twin: Path, folder: Path) -> Arrays:
    """The foreign adapter gives the twin's bytes; returns after − before in float64."""
    compose_folders(base, [(foreign, 1.0)], folder / "out")
    compose_folders(base, [(twin, 1.0)], folder / "expected")
    assert weight_bytes(folder / "out") == weight_bytes(folder / "expected")
    before, after = read_tensors(base), read_tensors(folder / "out")
    return {name: (after[name].double() - before[name].double()).numpy() for name in before}


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("naming", sorted(NAMES))
@pytest.mark.parametrize("stated", [True, False])
def test_lora_gives_the_bytes_of_its_peft_twin(
    base: Path, tmp_path: Path, naming: str, component: str, stated: bool
) -> None:
    """alpha / r from the metadata; without it alpha is the rank and the scale 1."""
    config = {"r": RANK, "lora_alpha": ALPHA} if stated else None
    foreign = write_diffusers(tmp_path / "diffusers", arrays(NAMES[naming], component), config, component)
    alpha = ALPHA if stated else RANK
    twin = write_twin(tmp_path / "twin", arrays(NAMES["peft"], "base_model.model"), lora_alpha=alpha)
    changes = check_twin(base, foreign, twin, tmp_path)
    for module, (a, b) in factors().items():
        exact = alpha / RANK * b.astype(np.float64) @ a.astype(np.float64)
        np.testing.assert_allclose(changes[f"{module}.weight"], exact, rtol=0, atol=5e-6)


@pytest.mark.parametrize("stated", [True, False])
def test_dora_gives_the_bytes_of_its_peft_twin(base: Path, tmp_path: Path, stated: bool) -> None:
    """The magnitudes tell that it is a DoRA where no metadata does."""
    m = {module: np.linspace(1, 2, rows, dtype=np.float32) for module, (rows, _) in SHAPES.items()}
    tensors, twin_tensors = arrays(NAMES["peft"], "text_encoder"), arrays(NAMES["peft"], "base_model.model")
    for module, vector in m.items():
        tensors[f"text_encoder.{module}.lora_magnitude_vector"] = vector
        twin_tensors[f"base_model.model.{module}.lora_magnitude_vector"] = vector
    config = {"r": RANK, "lora_alpha": RANK, "use_dora": True}
    foreign = write_diffusers(tmp_path / "diffusers", tensors, config if stated else None)
    twin = write_twin(tmp_path / "twin", twin_tensors, lora_alpha=RANK, use_dora=True)
    changes = check_twin(base, foreign, twin, tmp_path)
    before = read_tensors(base)
    for module, (a, b) in factors().items():
        w = before[f"{module}.weight"].double().numpy()
        v = w + b.astype(np.float64) @ a.astype(np.float64)
        exact = m[module][:, None] * v / np.linalg.norm(v, axis=1, keepdims=True) - w
        np.testing.assert_allclose(changes[f"{module}.weight"], exact, rtol=0, atol=5e-6)


def test_a_bias_is_scaled_and_added(base: Path, tmp_path: Path) -> None:
    """lora_bias: b += alpha/r · b_B."""
    biases = {module: np.linspace(-1, 1, rows, dtype=np.float32) for module, (rows, _) in SHAPES.items()}
    tensors = arrays(NAMES["peft"], "text_encoder")
    tensors |= {f"text_encoder.{module}.lora_B.bias": vector for module, vector in biases.items()}
    twin_tensors = {name.replace("text_encoder.", "base_model.model."): array for name, array in tensors.items()}
    config = {"lora_alpha": ALPHA, "lora_bias": True}
    foreign = write_diffusers(tmp_path / "diffusers", tensors, {"r": RANK, **config})
    changes = check_twin(base, foreign, write_twin(tmp_path / "twin", twin_tensors, **config), tmp_path)
    for module, vector in biases.items():
        exact = ALPHA / RANK * vector.astype(np.float64)
        np.testing.assert_allclose(changes[f"{module}.bias"], exact, rtol=0, atol=2e-6)


def test_ranks_by_module_come_from_the_metadata(base: Path, tmp_path: Path) -> None:
    """rank_pattern and alpha_pattern are PEFT's own; without metadata several ranks are refused."""
    ranks = {DENSE: 2}
    patterns = {"lora_alpha": ALPHA, "rank_pattern": ranks, "alpha_pattern": {DENSE: 5}}
    tensors = arrays(NAMES["lora_linear_layer"], "text_encoder", ranks)
    foreign = write_diffusers(tmp_path / "diffusers", tensors, {"r": RANK, **patterns})
    twin = write_twin(tmp_path / "twin", arrays(NAMES["peft"], "base_model.model", ranks), **patterns)
    changes = check_twin(base, foreign, twin, tmp_path)
    a, b = factors(ranks)[DENSE]
    exact = 5 / 2 * b.astype(np.float64) @ a.astype(np.float64)
    np.testing.assert_allclose(changes[f"{DENSE}.weight"], exact, rtol=0, atol=5e-6)
    with pytest.raises(UnsupportedAdapterError, match=r"ranks \[2, 3\]"):
        open_adapter(write_diffusers(tmp_path / "silent", tensors))


def test_what_the_header_says_in_peft_terms(tmp_path: Path) -> None:
    """Format and files; the base is not known."""
    adapter = open_adapter(write_diffusers(tmp_path / "diffusers", arrays(NAMES["peft"], "text_encoder")))
    assert (adapter.format, adapter.stored) == ("diffusers", ("pytorch_lora_weights.safetensors",))
    assert (adapter.base_name, adapter.signature.rank, adapter.signature.alpha) == (None, RANK, RANK)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("unet.mid_block.attn.to_q.lora_A.weight", UnsupportedAdapterError, "changes text_encoder, unet"),
        ("transformer.blocks.0.to_q.lora_A.weight", UnsupportedAdapterError, "changes text_encoder, transformer"),
        (f"text_encoder_2.{QUERY}.lora_A.weight", UnsupportedAdapterError, "text_encoder, text_encoder_2"),
        ("text_encoder.self_attn.to_q_lora.down.weight", CorruptFileError, "not a part of a LoRA"),
        (f"text_encoder.{QUERY}.lora_C.weight", UnsupportedAdapterError, "lora_C.weight is not supported"),
        (f"text_encoder.{QUERY}.lora.down.weight", CorruptFileError, "under two names"),
        ("norm.weight", CorruptFileError, "not a part of a LoRA"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, name: str, error: type[TypedError], message: str) -> None:
    """Nothing of the file is left out in silence."""
    tensors = arrays(NAMES["peft"], "text_encoder") | {name: np.ones((RANK, 6), np.float32)}
    with pytest.raises(error, match=message):
        open_adapter(write_diffusers(tmp_path / "diffusers", tensors))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ([1], CorruptFileError, "not an object"),
        ({}, CorruptFileError, "says nothing of text_encoder"),
        ({"r": RANK}, CorruptFileError, "lora_alpha"),
        ({"r": RANK, "lora_alpha": 1, "peft_type": "LOHA"}, UnsupportedAdapterError, "LOHA"),
        ({"r": RANK, "lora_alpha": 1, "use_qalora": True}, UnsupportedAdapterError, "QALoRA"),
    ],
)
def test_metadata_that_does_not_describe_a_lora_is_refused(
    tmp_path: Path, config: Any, error: type[TypedError], message: str
) -> None:
    """Every option of PEFT's config is checked as in a folder of PEFT."""
    with pytest.raises(error, match=message):
        open_adapter(write_diffusers(tmp_path / "diffusers", arrays(NAMES["peft"], "text_encoder"), config))


def test_metadata_that_is_not_json_is_refused(tmp_path: Path) -> None:
    """CorruptFileError names the field."""
    tensors = arrays(NAMES["peft"], "text_encoder")
    write_tensors(tmp_path / "a" / "lora.safetensors", tensors, {"lora_adapter_metadata": "{"})
    with pytest.raises(CorruptFileError, match="lora_adapter_metadata is not JSON"):
        open_adapter(tmp_path / "a")
