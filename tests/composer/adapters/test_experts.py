"""LoRA on the experts of a mixture, stored in one tensor or expert by expert, and on modules that have other names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import composer.plan as plan_module
from composer.adapters import open_adapter
from composer.checkpoint import open_checkpoint
from composer.deltas_experts import LOADED
from composer.errors import CorruptFileError, IncompatibleError, TargetMismatchError, UnsupportedAdapterError
from composer.experts import expert_stacks
from tests.composer.adapters.oracles import assert_composed_is_live, random_adapter
from tests.conftest import save_model
from tests.support import (
    compose_folders,
    edit_json,
    plan_folders,
    read_tensors,
    weight_bytes,
    write_base,
    write_tensors,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Mixtures in float32: two stored expert by expert, three in one tensor, one of these with experts as [in, out]."""
    import transformers as t

    torch.manual_seed(8)
    made: dict[str, Callable[[], Any]] = {
        "mixtral": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(num_local_experts=3, intermediate_size=40, **SIZES)
        ),
        "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(num_experts=11, moe_intermediate_size=24, intermediate_size=40, head_dim=8, **SIZES)
        ),
        "granitemoe": lambda: t.GraniteMoeForCausalLM(
            t.GraniteMoeConfig(num_local_experts=3, intermediate_size=40, **SIZES)
        ),
        "llama4": lambda: t.Llama4ForCausalLM(
            t.Llama4TextConfig(
                num_local_experts=3, intermediate_size=40, intermediate_size_mlp=48, head_dim=8,
                interleave_moe_layer_step=1, **{**SIZES, "num_experts_per_tok": 1},
            )
        ),
        "gpt_oss": lambda: t.GptOssForCausalLM(
            t.GptOssConfig(num_local_experts=3, intermediate_size=32, head_dim=8, **SIZES)
        ),
        "gpt_oss_wide": lambda: t.GptOssForCausalLM(
            t.GptOssConfig(num_local_experts=3, intermediate_size=40, head_dim=8, **SIZES)
        ),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("experts")
    return {name: save_model(make().float(), folder / name) for name, make in made.items()}


def lora(*parameters: str, **options: Any) -> peft.LoraConfig:
    """Rank 2 on q_proj and on parameters."""
    fields = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], **options}
    return peft.LoraConfig(target_parameters=list(parameters) or None, **fields)


CASES: list[tuple[str, Any]] = [
    ("mixtral", lora(*EXPERTS)),
    ("mixtral", lora("gate_up_proj")),
    ("mixtral", lora("mlp.experts.down_proj", "mlp.gate.weight", use_rslora=True)),
    ("mixtral", lora(*EXPERTS, rank_pattern={"gate_up_proj": 4}, alpha_pattern={"down_proj": 1})),
    ("mixtral", lora(target_modules=["q_proj", "o_proj"])),
    ("qwen3_moe", lora(*reversed(EXPERTS))),
    ("qwen3_moe", lora(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])),
    ("granitemoe", lora(*EXPERTS)),
    ("llama4", lora(*EXPERTS)),
    ("gpt_oss", lora(*EXPERTS)),
    ("gpt_oss", lora("experts.down_proj", "experts.down_proj_bias")),
    ("gpt_oss_wide", lora(*EXPERTS)),
]


@pytest.mark.parametrize(("base", "config"), CASES)
def test_experts_are_pefts_live_forward(bases: dict[str, Path], tmp_path: Path, base: str, config: Any) -> None:
    """Each expert gets its own change, whatever the names and the layout that the checkpoint stores them in."""
    adapter = random_adapter(bases[base], tmp_path / "adapter", config)
    assert_composed_is_live(bases[base], adapter, tmp_path / "out")
    assert set(read_tensors(tmp_path / "out")) == set(read_tensors(bases[base]))


def arrays_of(adapter: Path) -> dict[str, np.ndarray]:
    """The adapter's tensors."""
    return {name: spec.read() for name, spec in open_adapter(adapter).header.tensors.items()}


def as_before_0_19(adapter: Path, folder: Path, experts: int, version: str | None) -> Path:
    """The same change as PEFT 0.18 laid it out: what was B's rows are A's columns, since (B·A)ᵀ = Aᵀ·Bᵀ."""
    arrays = arrays_of(adapter)
    for name in [name for name in arrays if "experts" in name and "lora_A" in name]:
        a, b = arrays[name], arrays[name.replace("lora_A", "lora_B")]
        arrays[name] = b.reshape(len(b), -1, experts).transpose(2, 1, 0).reshape(-1, len(b))
        old_b = a.reshape(experts, -1, a.shape[1]).transpose(2, 1, 0)
        arrays[name.replace("lora_A", "lora_B")] = old_b.reshape(a.shape[1], -1)
    write_tensors(folder / "adapter_model.safetensors", arrays)
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    edit_json(folder / "adapter_config.json", peft_version=version)
    return folder


@pytest.mark.parametrize(("base", "experts"), [("mixtral", 3), ("llama4", 3), ("granitemoe", 3)])
@pytest.mark.parametrize("version", [None, "0.18.1"])
def test_the_layout_before_peft_0_19_is_read(
    bases: dict[str, Path], tmp_path: Path, base: str, experts: int, version: str | None
) -> None:
    """The shapes of the base show which of the two layouts it is; the sums are those of the other layout."""
    new = random_adapter(bases[base], tmp_path / "new", lora(*EXPERTS))
    old = as_before_0_19(new, tmp_path / "old", experts, version)
    for adapter in (new, old):
        compose_folders(bases[base], [(adapter, 1.0)], tmp_path / f"out-{adapter.name}")
    ours, theirs = (read_tensors(tmp_path / f"out-{name}") for name in ("old", "new"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-6)


def square(folder: Path, config: dict[str, Any], stacked: bool) -> Path:
    """Two experts whose down_proj is [4, 4], in one tensor or in two."""
    values = np.random.default_rng(1).normal(size=(2, 4, 4)).astype(np.float32)
    if stacked:
        tensors = {"model.experts.down_proj": values}
    else:
        tensors = {f"model.experts.{index}.down_proj.weight": values[index] for index in range(2)}
    return write_base(folder, tensors, **config)


def square_lora(folder: Path, version: str) -> Path:
    """A LoRA of rank 1 on them, without PEFT."""
    random = np.random.default_rng(2)
    prefix = "base_model.model.model.experts"
    tensors = {
        f"{prefix}.lora_A.weight": random.normal(size=(2, 4)).astype(np.float32),
        f"{prefix}.lora_B.weight": random.normal(size=(4, 2)).astype(np.float32),
    }
    write_tensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_parameters": ["experts.down_proj"],'
        f' "peft_version": "{version}"}}'
    )
    return folder


@pytest.mark.parametrize(
    ("stacked", "model_type", "version", "turned"),
    [
        (False, "qwen3_moe", "0.19.0", False),
        (False, "qwen3_moe", "0.18.1", True),
        (True, "llama4_text", "0.21.2", False),
        (True, "llama4_text", "0.18.0", True),
        (True, "gpt_oss", "0.21.2", True),
        (True, "gpt_oss", "0.18.0", True),
        (True, "qwen3_vl_moe_text", "0.21.2", True),
    ],
)
def test_square_experts_go_by_the_version_and_the_architecture(
    tmp_path: Path, stacked: bool, model_type: str, version: str, turned: bool
) -> None:
    """Oracle: B_e·A_e in float64, or its transpose where A has the first of the stored dimensions."""
    base = square(tmp_path / "base", {"model_type": model_type}, stacked)
    adapter = square_lora(tmp_path / "lora", version)
    compose_folders(base, [(adapter, 1.0)], tmp_path / "out")
    a, b = arrays_of(adapter).values()
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    for expert in range(2):
        name = "model.experts.down_proj" if stacked else f"model.experts.{expert}.down_proj.weight"
        change = np.outer(b[:, expert], a[expert])
        exact = before[name].double().numpy().reshape(-1, 4, 4)[expert if stacked else 0] + (
            change.T if turned else change
        )
        found = after[name].double().numpy().reshape(-1, 4, 4)[expert if stacked else 0]
        np.testing.assert_allclose(found, exact, atol=1e-6)


@pytest.mark.parametrize(("model_type", "version"), [("new_moe", "0.21.2"), ("qwen3_vl_moe_text", "0.18.1")])
def test_square_experts_whose_layout_is_not_known_are_refused(tmp_path: Path, model_type: str, version: str) -> None:
    """A guess would be right half of the time."""
    base = square(tmp_path / "base", {"text_config": {"model_type": model_type}}, stacked=True)
    with pytest.raises(IncompatibleError, match="square"):
        plan_folders(base, [(square_lora(tmp_path / "lora", version), 1.0)])


@pytest.mark.parametrize("base", ["granitemoe", "qwen3_moe"])
def test_blocks_of_experts_do_not_matter(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    """Rows one at a time, across the borders of experts, and factors that are loaded for each block: the same bytes."""
    adapter = random_adapter(bases[base], tmp_path / "adapter", lora(*EXPERTS))
    written = []
    for index, (block, held) in enumerate([(1 << 21, 1 << 26), (1, 1 << 26), (7 * 4 * 32, 1 << 26), (1 << 21, 0)]):
        monkeypatch.setattr(plan_module, "BLOCK_BYTES", block)
        monkeypatch.setattr(plan_module, "FACTOR_BYTES", held)
        monkeypatch.setattr(plan_module, "STREAM_BYTES", 7 * 4 * 32)
        compose_folders(bases[base], [(adapter, 0.5)], tmp_path / f"out-{index}")
        written.append(weight_bytes(tmp_path / f"out-{index}"))
    assert written[0] == written[1] == written[2] == written[3] != weight_bytes(bases[base])
    assert not LOADED


def test_two_adapters_on_one_stack_add_up(bases: dict[str, Path], tmp_path: Path) -> None:
    """Oracle: the sum of what each changes alone."""
    base = bases["granitemoe"]
    one = random_adapter(base, tmp_path / "one", lora(*EXPERTS))
    two = random_adapter(base, tmp_path / "two", lora("down_proj", r=3))
    compose_folders(base, [(one, 1.0), (two, -0.5)], tmp_path / "both")
    compose_folders(base, [(one, 1.0)], tmp_path / "first")
    compose_folders(base, [(two, -0.5)], tmp_path / "second")
    start, both, first, second = (
        read_tensors(folder) for folder in (base, tmp_path / "both", tmp_path / "first", tmp_path / "second")
    )
    for name, tensor in start.items():
        torch.testing.assert_close(both[name], first[name] + second[name] - tensor, atol=1e-6, rtol=1e-6)


def test_no_block_holds_a_whole_expert(tmp_path: Path) -> None:
    """Rows of an expert are merged a few at a time, so the bound does not grow with its size; a stack is of rows."""
    bounds = []
    for rows in (1 << 12, 1 << 14):
        spec = {"model.experts.down_proj": np.zeros((2, rows, 512), np.float16)}
        base = write_base(tmp_path / f"base-{rows}", spec)
        prefix = "base_model.model.model.experts"
        tensors = {
            f"{prefix}.lora_A.weight": np.zeros((4, 512), np.float32),
            f"{prefix}.lora_B.weight": np.zeros((rows, 4), np.float32),
        }
        folder = tmp_path / f"lora-{rows}"
        write_tensors(folder / "adapter_model.safetensors", tensors)
        fields = '{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_parameters": ["experts.down_proj"]}'
        (folder / "adapter_config.json").write_text(fields)
        plan = plan_folders(base, [(folder, 1.0)])
        assert plan.jobs[0].matrix == (2 * rows, 512)
        bounds.append(plan.peak_bytes)
    assert bounds[1] < bounds[0] + 8 * (3 << 12) * 4 * 4


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        (["experts.gate_up_proj"], CorruptFileError),
        (["experts.gate_up_proj", "experts.w9"], UnsupportedAdapterError),
        ([*EXPERTS, "experts.down_proj_bias"], CorruptFileError),
        ("experts.gate_up_proj", CorruptFileError),
        ([7], CorruptFileError),
    ],
)
def test_parameters_that_do_not_match_the_factors_are_refused(
    bases: dict[str, Path], tmp_path: Path, parameters: Any, error: type[Exception]
) -> None:
    """Which pair belongs to which parameter is known from the config alone."""
    adapter = random_adapter(bases["mixtral"], tmp_path / "adapter", lora(*EXPERTS))
    edit_json(adapter / "adapter_config.json", target_parameters=parameters)
    with pytest.raises(error):
        open_adapter(adapter)


def test_factors_that_are_no_whole_number_of_experts_are_damaged(bases: dict[str, Path], tmp_path: Path) -> None:
    """Six rows are not two experts of rank 4."""
    adapter = random_adapter(bases["mixtral"], tmp_path / "adapter", lora(*EXPERTS))
    edit_json(adapter / "adapter_config.json", rank_pattern={".*experts.*": 4})
    with pytest.raises(CorruptFileError, match="not 4 an expert"):
        open_adapter(adapter)


def test_another_number_of_experts_is_a_mismatch(bases: dict[str, Path], tmp_path: Path) -> None:
    """Named with both shapes."""
    adapter = random_adapter(bases["mixtral"], tmp_path / "adapter", lora(*EXPERTS))
    with pytest.raises(TargetMismatchError):
        plan_folders(bases["qwen3_moe"], [(adapter, 1.0)])


def test_experts_that_differ_are_no_stack(tmp_path: Path) -> None:
    """One that is missing, or of another size, and the parameter has no place."""
    ones = np.ones((4, 4), np.float32)
    names = [f"m.experts.{index}.down_proj.weight" for index in range(3)]
    assert list(expert_stacks(dict.fromkeys(names, (4, 4)))) == ["m.experts.down_proj"]
    assert not expert_stacks(dict.fromkeys([names[0], names[2]], (4, 4)))
    assert not expert_stacks({names[0]: (4, 4), names[1]: (4, 5)})
    base = write_base(tmp_path / "base", {names[0]: ones, names[2]: ones})
    assert open_checkpoint(base).tensors.keys() == {names[0], names[2]}


def test_the_catalogue_knows_where_experts_belong(bases: dict[str, Path], tmp_path: Path, registry: Any) -> None:
    """Published on its base it is exact there, and incompatible with the other mixtures."""
    from registry.schemas import Level

    for name in ("mixtral", "qwen3_moe", "granitemoe"):
        registry.add_base(bases[name], name=name)
    adapter = random_adapter(bases["mixtral"], tmp_path / "adapter", lora(*EXPERTS))
    registry.publish(adapter, name="team/experts", base="mixtral")
    assert registry.check("team/experts", "mixtral").level is Level.EXACT
    assert [item.adapter.name for item in registry.compatible("mixtral").items] == ["team/experts"]
    assert not registry.compatible("granitemoe").items
    assert registry.check("team/experts", "qwen3_moe").level is Level.INCOMPATIBLE
