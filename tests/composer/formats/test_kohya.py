"""kohya-ss and LyCORIS files of text models: the bytes of their PEFT twins, closed forms, and flattened names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.adapters import Ambiguity, open_adapter
from composer.errors import CorruptFileError, TargetMismatchError, TypedError, UnsupportedAdapterError
from tests.support import compose_folders, plan_folders, read_tensors, weight_bytes, write_base, write_tensors

QUERY, DENSE = "text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"
SHAPES = {QUERY: (6, 6), DENSE: (10, 6)}
ALPHAS = {QUERY: 4.0, DENSE: 1.5}
RANKS = {QUERY: 3, DENSE: 2}
Arrays = dict[str, np.ndarray]


def random_arrays(shapes: dict[str, tuple[int, ...]], seed: int) -> Arrays:
    """Standard normal float32 arrays."""
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A float32 text encoder of two matrices."""
    return make_base(tmp_path / "base")


def make_base(folder: Path, prefix: str = "", **more: np.ndarray) -> Path:
    """The text encoder, its names after a prefix."""
    tensors = {prefix + name: array for name, array in random_arrays(weights(SHAPES), 0).items()}
    return write_base(folder, tensors | more, model_type="clip_text_model", architectures=["CLIPTextModel"])


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """module to module.weight."""
    return {f"{module}.weight": shape for module, shape in shapes.items()}


def flat(module: str, prefix: str = "lora_te") -> str:
    """A module's name as kohya-ss writes it."""
    return f"{prefix}_{module.replace('.', '_')}"


def write_kohya(folder: Path, parts: dict[str, Arrays], prefix: str = "lora_te") -> Path:
    """A folder with one file: parts by module."""
    tensors = {
        f"{flat(module, prefix)}.{part}": array for module, arrays in parts.items() for part, array in arrays.items()
    }
    write_tensors(folder / "style.safetensors", tensors, {"ss_network_module": "networks.lora"})
    return folder


def write_twin(folder: Path, parts: dict[str, Arrays], **config: Any) -> Path:
    """The same adapter as PEFT saves it: parts under PEFT's names, alphas and ranks as patterns."""
    tensors = {
        f"base_model.model.{module}.{part}": array for module, arrays in parts.items() for part, array in arrays.items()
    }
    write_tensors(folder / "adapter_model.safetensors", tensors)
    alpha = "lora_alpha" if config["peft_type"] == "LORA" else "alpha"
    fields = {"r": RANKS[QUERY], alpha: ALPHAS[QUERY], "rank_pattern": {DENSE: RANKS[DENSE]}}
    fields |= {"alpha_pattern": {DENSE: ALPHAS[DENSE]}, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def lora_parts() -> dict[str, Arrays]:
    """Factors by module, each module with a rank and an alpha of its own."""
    return {
        module: {
            **random_arrays({"lora_down.weight": (RANKS[module], columns), "lora_up.weight": (rows, RANKS[module])}, 1),
            "alpha": np.array(ALPHAS[module], np.float32),
        }
        for module, (rows, columns) in SHAPES.items()
    }


def without_alpha(parts: dict[str, Arrays], names: dict[str, str] | None = None) -> dict[str, Arrays]:
    """The parts under PEFT's names."""
    return {
        module: {(names or {}).get(part, part): array for part, array in arrays.items() if part != "alpha"}
        for module, arrays in parts.items()
    }


def check_twin(base: Path, foreign: Path, twin: Path, deltas: Arrays, folder: Path) -> None:
    """The foreign adapter gives the twin's bytes, and those are W + 0.7·delta in float64."""
    compose_folders(base, [(foreign, 0.7)], folder / "out")
    compose_folders(base, [(twin, 0.7)], folder / "expected")
    assert weight_bytes(folder / "out") == weight_bytes(folder / "expected")
    before, after = ({n: t.double().numpy() for n, t in read_tensors(f).items()} for f in (base, folder / "out"))
    for module, delta in deltas.items():
        exact = before[f"{module}.weight"] + 0.7 * delta
        np.testing.assert_allclose(after[f"{module}.weight"], exact, rtol=0, atol=5e-6)


LORA_NAMES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1", "lycoris"])
def test_lora_gives_the_bytes_of_its_peft_twin(base: Path, tmp_path: Path, prefix: str) -> None:
    """W + alpha/r · up·down, with ranks and alphas by module."""
    parts = lora_parts()
    twin = write_twin(tmp_path / "twin", without_alpha(parts, LORA_NAMES), peft_type="LORA")
    deltas = {
        module: ALPHAS[module]
        / RANKS[module]
        * arrays["lora_up.weight"].astype(np.float64)
        @ arrays["lora_down.weight"]
        for module, arrays in parts.items()
    }
    check_twin(base, write_kohya(tmp_path / "kohya", parts, prefix), twin, deltas, tmp_path)


def test_loha_gives_the_bytes_of_its_peft_twin(base: Path, tmp_path: Path) -> None:
    """alpha/r · (w1_a·w1_b) ⊙ (w2_a·w2_b)."""
    parts = {}
    for module, (rows, columns) in SHAPES.items():
        rank = RANKS[module]
        shapes = {
            f"hada_w{i}_{side}": (rows, rank) if side == "a" else (rank, columns) for i in (1, 2) for side in "ab"
        }
        parts[module] = {**random_arrays(shapes, 2), "alpha": np.array(ALPHAS[module], np.float32)}
    twin = write_twin(tmp_path / "twin", without_alpha(parts), peft_type="LOHA")
    deltas = {}
    for module, arrays in parts.items():
        a1, b1, a2, b2 = (arrays[f"hada_{name}"].astype(np.float64) for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        deltas[module] = ALPHAS[module] / RANKS[module] * (a1 @ b1) * (a2 @ b2)
    check_twin(base, write_kohya(tmp_path / "kohya", parts), twin, deltas, tmp_path)


def test_lokr_gives_the_bytes_of_its_peft_twin(base: Path, tmp_path: Path) -> None:
    """alpha/r · kron(w1, w2); two whole matrices are not scaled, whatever alpha says."""
    whole = {"lokr_w1": (2, 3), "lokr_w2": (3, 2)}
    factored = {"lokr_w1": (5, 2), "lokr_w2_a": (2, RANKS[DENSE]), "lokr_w2_b": (RANKS[DENSE], 3)}
    parts = {
        QUERY: {**random_arrays(whole, 3), "alpha": np.array(9, np.float32)},
        DENSE: {**random_arrays(factored, 4), "alpha": np.array([ALPHAS[DENSE]], np.float16)},
    }
    twin = write_twin(tmp_path / "twin", without_alpha(parts), peft_type="LOKR", r=1, alpha=1)
    query, dense = ({n: a.astype(np.float64) for n, a in parts[module].items()} for module in (QUERY, DENSE))
    deltas = {
        QUERY: np.kron(query["lokr_w1"], query["lokr_w2"]),
        DENSE: ALPHAS[DENSE] / RANKS[DENSE] * np.kron(dense["lokr_w1"], dense["lokr_w2_a"] @ dense["lokr_w2_b"]),
    }
    check_twin(base, write_kohya(tmp_path / "kohya", parts), twin, deltas, tmp_path)


def test_dora_gives_the_bytes_of_its_peft_twin(base: Path, tmp_path: Path) -> None:
    """dora_scale [out, 1] are PEFT's magnitudes [out]."""
    parts = lora_parts()
    scales = {module: np.linspace(1, 2, rows, dtype=np.float32) for module, (rows, _) in SHAPES.items()}
    twin_parts = without_alpha(parts, LORA_NAMES)
    for module, scale in scales.items():
        parts[module]["dora_scale"] = scale[:, None]
        twin_parts[module]["lora_magnitude_vector"] = scale
    twin = write_twin(tmp_path / "twin", twin_parts, peft_type="LORA", use_dora=True)
    before = {name: tensor.double().numpy() for name, tensor in read_tensors(base).items()}
    deltas = {}
    for module, arrays in parts.items():
        w = before[f"{module}.weight"]
        up, down = (arrays[f"lora_{side}.weight"].astype(np.float64) for side in ("up", "down"))
        v = w + ALPHAS[module] / RANKS[module] * up @ down
        deltas[module] = scales[module][:, None] * v / np.linalg.norm(v, axis=1, keepdims=True) - w
    check_twin(base, write_kohya(tmp_path / "kohya", parts), twin, deltas, tmp_path)


def test_without_alpha_the_scale_is_one(tmp_path: Path) -> None:
    """alpha / rank is then 1 for each module."""
    adapter = open_adapter(write_kohya(tmp_path / "kohya", without_alpha(lora_parts())))
    names = {f"{flat(module)}.weight": f"{module}.weight" for module in SHAPES}
    assert {delta.scale for delta in adapter.deltas(names)} == {1.0}
    assert (adapter.format, adapter.stored, adapter.base_name) == ("kohya-ss / LyCORIS", ("style.safetensors",), None)


@pytest.mark.parametrize("prefix", ["", "clip."])
def test_one_prefix_more_in_the_base_is_found(tmp_path: Path, prefix: str) -> None:
    """Names resolve to the base's own, underscores of a module's name included."""
    checkpoint = make_base(tmp_path / "base", prefix)
    plan = plan_folders(checkpoint, [(write_kohya(tmp_path / "kohya", lora_parts()), 1.0)])
    assert {job.source.name for job in plan.jobs if job.deltas} == {prefix + name for name in weights(SHAPES)}


def test_one_prefix_less_in_the_base_is_found(tmp_path: Path) -> None:
    """A base saved without text_model."""
    arrays = random_arrays(weights(SHAPES), 0)
    checkpoint = write_base(tmp_path / "base", {n.removeprefix("text_model."): a for n, a in arrays.items()})
    plan = plan_folders(checkpoint, [(write_kohya(tmp_path / "kohya", lora_parts()), 1.0)])
    assert {job.source.name for job in plan.jobs if job.deltas} == {
        name.removeprefix("text_model.") for name in weights(SHAPES)
    }


def test_a_name_that_two_tensors_flatten_to_is_an_error(tmp_path: Path) -> None:
    """Even where only one of them has the size."""
    other = {f"{QUERY.replace('self_attn', 'self.attn')}.weight": np.ones((2, 2), np.float32)}
    checkpoint = make_base(tmp_path / "base", **other)
    with pytest.raises(TargetMismatchError, match="ambiguous, it may be"):
        plan_folders(checkpoint, [(write_kohya(tmp_path / "kohya", lora_parts()), 1.0)])


def test_two_places_in_the_base_are_an_error(tmp_path: Path) -> None:
    """A base of two text encoders, each with all the modules."""
    tensors = random_arrays(weights(SHAPES), 0)
    checkpoint = write_base(
        tmp_path / "base", {f"{side}.{name}": array for side in ("one", "two") for name, array in tensors.items()}
    )
    adapter = write_kohya(tmp_path / "kohya", lora_parts())
    with pytest.raises(TargetMismatchError, match=r"one\.text_model.* or two\.text_model"):
        plan_folders(checkpoint, [(adapter, 1.0)])
    shapes = {f"{side}.{name}": array.shape for side in ("one", "two") for name, array in tensors.items()}
    assert {type(found) for found in open_adapter(adapter).bind(shapes).mismatches} == {Ambiguity}


def test_a_base_without_the_modules_does_not_fit(tmp_path: Path) -> None:
    """Each is named."""
    checkpoint = write_base(tmp_path / "base", {"model.q_proj.weight": np.ones((6, 6), np.float32)})
    with pytest.raises(TargetMismatchError, match="2 of 2 tensors"):
        plan_folders(checkpoint, [(write_kohya(tmp_path / "kohya", lora_parts()), 1.0)])


@pytest.mark.parametrize(
    ("name", "array", "error", "message"),
    [
        ("lora_unet_down_blocks_0.lora_down.weight", np.ones((2, 6)), UnsupportedAdapterError, "image model"),
        ("lora_te2_text_model.lora_down.weight", np.ones((2, 6)), UnsupportedAdapterError, "several models"),
        (f"{flat(QUERY)}.hada_w1_a", np.ones((6, 2)), UnsupportedAdapterError, "one kind"),
        (f"{flat(QUERY)}.lora_mid.weight", np.ones((2, 2)), UnsupportedAdapterError, "lora_mid"),
        (f"{flat(QUERY)}.diff_b", np.ones(6), UnsupportedAdapterError, "diff_b"),
        (f"{flat(QUERY)}.dora_scale", np.ones((1, 6)), UnsupportedAdapterError, "one magnitude an output"),
        (f"{flat(QUERY)}.alpha", np.array(0.0), CorruptFileError, "alpha is 0"),
        (f"{flat(QUERY)}.alpha", np.array(np.nan), CorruptFileError, "alpha is nan"),
        (f"{flat(QUERY)}.alpha", np.ones(2), CorruptFileError, "F32"),
        (f"{flat(QUERY)}.lora_up.weight", np.ones((6, 4)), CorruptFileError, "no common rank"),
        (f"{flat(QUERY)}.lora_up.weight", np.ones((6, 3, 1, 1)), CorruptFileError, "of no layer"),
        ("emb_params", np.ones((2, 6)), CorruptFileError, "does not belong to a module"),
        ("lora_te_other.alpha", np.array(1.0), CorruptFileError, "no lora_down"),
    ],
)
def test_what_cannot_be_composed_is_refused_by_name(
    tmp_path: Path, name: str, array: np.ndarray, error: type[TypedError], message: str
) -> None:
    """One tensor changed or added in a file that is fine without it."""
    parts = lora_parts()
    tensors = {f"{flat(module)}.{part}": value for module, arrays in parts.items() for part, value in arrays.items()}
    write_tensors(tmp_path / "kohya" / "style.safetensors", tensors | {name: array.astype(np.float32)})
    with pytest.raises(error, match=message):
        open_adapter(tmp_path / "kohya")
