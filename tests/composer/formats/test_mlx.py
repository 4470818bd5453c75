"""Adapters of mlx-lm: the bytes of their PEFT twin, and a closed form in float64."""

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
    UnknownAdapterTypeError,
    UnsupportedAdapterError,
)
from tests.support import (
    compose_folders,
    plan_folders,
    read_tensors,
    weight_bytes,
    write_base,
    write_raw,
    write_tensors,
)

SHAPES = {"model.layers.0.self_attn.q_proj": (6, 6), "model.layers.0.mlp.down_proj": (6, 10)}
EMBEDDING = "model.embed_tokens"
RANK, SCALE = 3, 2.5
FIELDS = {"rank": RANK, "scale": SCALE, "dropout": 0.1}
Arrays = dict[str, np.ndarray]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A float32 base of two linear layers and an untied embedding, both square and not."""
    random = np.random.default_rng(0)
    shapes = {**SHAPES, EMBEDDING: (7, 6), "lm_head": (7, 6)}
    return write_base(
        tmp_path / "base",
        {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()},
    )


def factors(seed: int = 1) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """B [out, r] and A [r, in] for each linear module."""
    random = np.random.default_rng(seed)
    return {
        module: (
            random.normal(size=(rows, RANK)).astype(np.float32),
            random.normal(size=(RANK, columns)).astype(np.float32),
        )
        for module, (rows, columns) in SHAPES.items()
    }


def write_mlx(folder: Path, tensors: Arrays, **config: Any) -> Path:
    """A folder as mlx-lm saves it."""
    write_tensors(folder / "adapters.safetensors", tensors)
    fields = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": FIELDS, "model": "org/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def write_twin(folder: Path, tensors: Arrays, **config: Any) -> Path:
    """The same adapter as PEFT saves it."""
    write_tensors(folder / "adapter_model.safetensors", tensors)
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def mlx_tensors() -> Arrays:
    """The factors under mlx-lm's names and in its layout."""
    return {
        f"{module}.{name}": array
        for module, (b, a) in factors().items()
        for name, array in (("lora_a", a.T.copy()), ("lora_b", b.T.copy()))
    }


def peft_tensors() -> Arrays:
    """The factors under PEFT's names and in its layout."""
    return {
        f"base_model.model.{module}.{name}.weight": array
        for module, (b, a) in factors().items()
        for name, array in (("lora_A", a), ("lora_B", b))
    }


def merged(folder: Path) -> Arrays:
    """The composed weights in float64."""
    return {name: tensor.double().numpy() for name, tensor in read_tensors(folder).items()}


def test_lora_gives_the_bytes_of_its_peft_twin(base: Path, tmp_path: Path) -> None:
    """W + scale·(a·b)ᵀ, on a square matrix too, where a layout mistaken would not show in the shapes."""
    foreign = write_mlx(tmp_path / "mlx", mlx_tensors())
    twin = write_twin(tmp_path / "twin", peft_tensors())
    compose_folders(base, [(foreign, 0.7)], tmp_path / "out")
    compose_folders(base, [(twin, 0.7)], tmp_path / "expected")
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "expected")
    before, after = merged(base), merged(tmp_path / "out")
    for module, (b, a) in factors().items():
        exact = before[f"{module}.weight"] + 0.7 * SCALE * (a.T.astype(np.float64) @ b.T.astype(np.float64)).T
        np.testing.assert_allclose(after[f"{module}.weight"], exact, rtol=0, atol=2e-6)


def test_dora_gives_the_bytes_of_its_peft_twin(base: Path, tmp_path: Path) -> None:
    """m / ‖V‖ · V, the norms over the inputs."""
    random = np.random.default_rng(5)
    m = {module: random.uniform(1, 2, rows).astype(np.float32) for module, (rows, _) in SHAPES.items()}
    foreign = write_mlx(
        tmp_path / "mlx", mlx_tensors() | {f"{module}.m": v for module, v in m.items()}, fine_tune_type="dora"
    )
    magnitudes = {f"base_model.model.{module}.lora_magnitude_vector": vector for module, vector in m.items()}
    twin = write_twin(tmp_path / "twin", peft_tensors() | magnitudes, use_dora=True)
    compose_folders(base, [(foreign, 1.0)], tmp_path / "out")
    compose_folders(base, [(twin, 1.0)], tmp_path / "expected")
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "expected")
    before, after = merged(base), merged(tmp_path / "out")
    for module, (b, a) in factors().items():
        v = before[f"{module}.weight"] + SCALE * b.astype(np.float64) @ a.astype(np.float64)
        exact = m[module][:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)
        np.testing.assert_allclose(after[f"{module}.weight"], exact, rtol=0, atol=2e-6)


def test_an_embedding_is_not_transposed(base: Path, tmp_path: Path) -> None:
    """lora_a [V, r] and lora_b [r, d] of an embedding: W + scale·a·b."""
    random = np.random.default_rng(6)
    a, b = random.normal(size=(7, RANK)).astype(np.float32), random.normal(size=(RANK, 6)).astype(np.float32)
    foreign = write_mlx(tmp_path / "mlx", {f"{EMBEDDING}.lora_a": a, f"{EMBEDDING}.lora_b": b})
    compose_folders(base, [(foreign, 1.0)], tmp_path / "out")
    exact = merged(base)[f"{EMBEDDING}.weight"] + SCALE * a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(merged(tmp_path / "out")[f"{EMBEDDING}.weight"], exact, rtol=0, atol=2e-6)


def test_what_the_header_says_in_peft_terms(tmp_path: Path) -> None:
    """Format, files, base, rank, and alpha = scale · rank."""
    adapter = open_adapter(write_mlx(tmp_path / "mlx", mlx_tensors()))
    assert (adapter.format, adapter.stored) == ("MLX", ("adapter_config.json", "adapters.safetensors"))
    assert adapter.base_name == "org/base"
    assert (adapter.signature.kind, adapter.signature.rank, adapter.signature.alpha) == ("lora", RANK, SCALE * RANK)
    assert {target.parameter: target.shape for target in adapter.signature.targets} == {
        f"{module}.weight": shape for module, shape in SHAPES.items()
    }


def test_an_alpha_equal_to_the_rank_changes_nothing(tmp_path: Path) -> None:
    """Every version of mlx-lm then agrees on the scale."""
    adapter = open_adapter(write_mlx(tmp_path / "mlx", mlx_tensors(), lora_parameters={**FIELDS, "alpha": RANK}))
    assert adapter.signature.alpha == SCALE * RANK


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"fine_tune_type": "full"}, UnsupportedAdapterError, "whole weights"),
        ({"fine_tune_type": "other"}, UnsupportedAdapterError, "'other' is not known"),
        ({"fine_tune_type": "dora"}, CorruptFileError, "use_dora"),
        ({"lora_parameters": None}, CorruptFileError, "lora_parameters"),
        ({"lora_parameters": {"rank": 3}}, CorruptFileError, "rank and scale"),
        ({"lora_parameters": {"rank": 0, "scale": 1}}, CorruptFileError, "rank and scale"),
        ({"lora_parameters": {**FIELDS, "alpha": 16}}, UnsupportedAdapterError, "2.5 or as 13.3333"),
        ({"model": ["org/base"]}, CorruptFileError, "base_model_name_or_path"),
    ],
)
def test_configs_that_do_not_say_one_thing_are_refused(
    tmp_path: Path, config: dict[str, Any], error: type[TypedError], message: str
) -> None:
    """By name, with what was found."""
    with pytest.raises(error, match=message):
        open_adapter(write_mlx(tmp_path / "mlx", mlx_tensors(), **config))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.mlp.up_proj.lora_a_scales", (2, 2), "not a tensor of an MLX LoRA"),
        ("model.norm.weight", (6,), "not a tensor of an MLX LoRA"),
        ("model.layers.0.mlp.switch_mlp.up_proj.lora_a", (2, 3, 6), "experts"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    """Nothing of the file is left out in silence."""
    with pytest.raises(UnsupportedAdapterError, match=message):
        open_adapter(write_mlx(tmp_path / "mlx", mlx_tensors() | {name: np.ones(shape, np.float32)}))


def test_a_magnitude_without_dora_is_refused(tmp_path: Path) -> None:
    """A DoRA whose config says LoRA."""
    extra = {f"{module}.m": np.ones(rows, np.float32) for module, (rows, _) in SHAPES.items()}
    with pytest.raises(UnsupportedAdapterError, match="use_dora"):
        open_adapter(write_mlx(tmp_path / "mlx", mlx_tensors() | extra))


def test_another_rank_than_the_config_says_is_refused(base: Path, tmp_path: Path) -> None:
    """The scale is direct, yet a rank that does not fit shows a config of another adapter."""
    foreign = write_mlx(tmp_path / "mlx", mlx_tensors(), lora_parameters={"rank": 4, "scale": 1.0})
    with pytest.raises(TargetMismatchError, match="says rank 4"):
        plan_folders(base, [(foreign, 1.0)])


def test_weights_in_another_file_are_asked_for(tmp_path: Path) -> None:
    """adapters.npz of early versions is not read."""
    folder = write_mlx(tmp_path / "mlx", mlx_tensors())
    (folder / "adapters.safetensors").rename(folder / "adapters.npz")
    with pytest.raises(NotFoundError, match=r"no adapters\.safetensors"):
        open_adapter(folder)


def test_an_unknown_folder_is_told_what_can_be_read(tmp_path: Path) -> None:
    """Both errors list every format: a config that no format claims, and no config at all."""
    from composer.formats import formats

    folder = write_mlx(tmp_path / "other", mlx_tensors())
    (folder / "adapter_config.json").write_text('{"rank": 3}')
    with pytest.raises(UnknownAdapterTypeError) as unknown:
        open_adapter(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "adapters.safetensors").rename(folder / "weights.txt")
    with pytest.raises(NotFoundError) as missing:
        open_adapter(folder)
    assert "MLX" in formats()
    for name in ("PEFT", *formats()):
        assert name in unknown.value.message
        assert name in missing.value.expected


def test_the_null_metadata_that_mlx_writes_is_none(tmp_path: Path) -> None:
    """mx.save_safetensors without metadata writes "__metadata__": null, which the reference reader accepts too."""
    from safetensors.numpy import load_file

    folder = write_mlx(tmp_path / "mlx", mlx_tensors())
    path = folder / "adapters.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = {"__metadata__": None, **json.loads(raw[8 : 8 + length])}
    write_raw(path, header, raw[8 + length :])
    assert open_adapter(folder).header.metadata == {}
    assert set(load_file(path)) == set(mlx_tensors())
