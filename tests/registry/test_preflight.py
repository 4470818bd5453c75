"""Advice: each rule where it holds, and silence where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from composer.adapters import open_adapter
from composer.checkpoint import open_checkpoint
from composer.recipe import Export
from registry.preflight import BILLION, adapter_advice, plan_advice, training_examples
from registry.schemas import Advice
from tests.support import plan_folders, write_base, write_lora, write_tensors

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bottlenecks"
MODULES = {f"model.layers.{layer}.q_proj": (12, 8) for layer in range(6)}


def codes(found: list[Advice]) -> list[str]:
    """Their codes."""
    return [advice.code for advice in found]


def prompt(folder: Path) -> Path:
    """A soft prompt of three tokens on 16 numbers."""
    write_tensors(folder / "adapter_model.safetensors", {"prompt_embeddings": np.ones((3, 16), np.float32)})
    fields = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 3,
        "token_dim": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def base(folder: Path, dtype: Any = np.float32) -> Path:
    """Weights that are all 1."""
    return write_base(folder, {f"{module}.weight": np.ones(shape, dtype) for module, shape in MODULES.items()})


def lora(folder: Path, size: float, rank: int) -> Path:
    """A LoRA whose change is `size` in every element: A = 1, B = size / (scale · rank)."""
    write_lora(folder, MODULES, rank=rank)
    tensors = {}
    for module, (rows, columns) in MODULES.items():
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = np.ones((rank, columns), np.float32)
        tensors[f"{name}.lora_B.weight"] = np.full((rows, rank), size / (2 * rank), np.float32)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    return folder


def test_a_prompt_on_a_small_base_is_unreliable(tmp_path: Path) -> None:
    """Under a billion parameters; where the base is not known, nothing is said."""
    adapter = open_adapter(prompt(tmp_path))
    (advice,) = adapter_advice("team/prompt", adapter, parameters=BILLION - 1)
    assert (advice.code, advice.adapter) == ("small-base-for-a-prompt", "team/prompt")
    assert advice.source == "https://arxiv.org/abs/2104.08691"
    assert adapter_advice("p", adapter, parameters=BILLION) == []
    assert adapter_advice("p", adapter) == []


def test_bottlenecks_add_latency() -> None:
    """Said of a bottleneck and of no LoRA; with the number of networks."""
    (advice,) = adapter_advice("b", open_adapter(FIXTURES / "llama" / "houlsby"), parameters=10)
    assert (advice.code, advice.source) == ("bottlenecks-add-latency", "https://arxiv.org/abs/2106.09685")
    assert advice.message.startswith("4 networks")
    assert adapter_advice("l", open_adapter(FIXTURES / "llama" / "lora"), parameters=10) == []


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("rank", "size", "found"), [(4, 0.06, True), (4, 0.04, False), (5, 0.06, False), (1, 0.5, True)]
)
def test_a_low_rank_for_a_large_shift(rank: int, size: float, found: bool, dtype: Any, tmp_path: Path) -> None:
    """The shift is ‖ΔW‖/‖W‖, here the size of each element over 1."""
    adapter = open_adapter(lora(tmp_path / "lora", size, rank))
    advice = adapter_advice("l", adapter, base=open_checkpoint(base(tmp_path / "base", dtype)))
    assert codes(advice) == (["low-rank-for-its-shift"] if found else [])
    if found:
        assert f"rank {rank} carries a change of {size:.0%}" in advice[0].message
    assert adapter_advice("l", adapter) == []


def test_the_shift_of_replicated_layers_is_beside_the_base_s_own(tmp_path: Path) -> None:
    """The adapter's tensors are named after a deeper model."""
    folder = write_base(
        tmp_path / "base",
        {f"{module}.weight": np.ones(shape, np.float32) for module, shape in MODULES.items()},
        num_hidden_layers=6,
    )
    deeper = {f"model.layers.{layer}.q_proj": (12, 8) for layer in range(8)}
    write_lora(tmp_path / "lora", deeper, rank=2, std=1.0, layer_replication=[[0, 6], [4, 6]])
    adapter = open_adapter(tmp_path / "lora")
    assert codes(adapter_advice("l", adapter, base=open_checkpoint(folder))) == ["low-rank-for-its-shift"]
    plan = plan_folders(folder, [(tmp_path / "lora", 1.0)])
    assert codes(plan_advice(plan)) == ["low-rank-for-its-shift"]


def test_a_base_that_does_not_fit_gives_no_shift(tmp_path: Path) -> None:
    """Publishing an adapter with another base says other things."""
    other = write_base(tmp_path / "other", {"x.weight": np.ones((2, 2), np.float32)})
    assert adapter_advice("l", open_adapter(lora(tmp_path / "lora", 1.0, 1)), base=open_checkpoint(other)) == []


@pytest.mark.parametrize(
    ("weights", "method", "found"),
    [
        ((1.0, 1.0), "linear", True),
        ((1.0, -1.5), "linear", True),
        ((1.0, 0.5), "linear", False),
        ((1.0, 0.0), "linear", False),
        ((1.0,), "linear", False),
        ((1.0, 1.0), "ties", False),
    ],
)
def test_several_adapters_at_full_weight(weights: tuple[float, ...], method: str, found: bool, tmp_path: Path) -> None:
    """In a plain sum, on tensors that they share."""
    adapters = [(lora(tmp_path / f"lora-{index}", 0.01, 8), weight) for index, weight in enumerate(weights)]
    advice = plan_advice(plan_folders(base(tmp_path / "base"), adapters, method=method))
    assert codes(advice) == (["several-at-full-weight"] if found else [])
    if found:
        assert (advice[0].adapter, advice[0].source) == ("lora-0, lora-1", "https://arxiv.org/abs/2306.01708")


def test_adapters_of_different_tensors_do_not_meet(tmp_path: Path) -> None:
    """Nothing is summed then."""
    first, second = list(MODULES.items())[:2]
    adapters = [(write_lora(tmp_path / name, {name: shape}, rank=8, std=0.01), 1.0) for name, shape in (first, second)]
    assert plan_advice(plan_folders(base(tmp_path / "base"), adapters)) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The adapter was trained on 120 examples of polite answers.", 120),
        ("Fine-tuned for 3 epochs on about 1,200 labelled samples.", 1200),
        ("tuned with LoRA on 2.5k instruction pairs", 2500),
        ("trained on 8 GPUs with many examples", None),
        ("- num_train_examples: 64", 64),
        ("Number of training samples: **350**", 350),
        ("---\ntags:\n- dataset_size:96\n---\ntrained on 4,000 instances", 96),
        ("Trained for 300 steps. The base saw 9 examples in its prompt.", None),
        ("trained on SQuAD", None),
        ("", None),
    ],
)
def test_what_a_card_says_of_its_examples(text: str, count: int | None, tmp_path: Path) -> None:
    """A number that is said of the training, the least of several; silence is no number."""
    card = tmp_path / "README.md"
    card.write_text(text)
    assert training_examples(card) == count
    assert training_examples(tmp_path / "none.md") is None
    assert training_examples(None) is None


@pytest.mark.parametrize(("count", "found"), [(499, True), (500, False)])
def test_few_examples(count: int, found: bool, tmp_path: Path) -> None:
    """Under five hundred."""
    folder = write_lora(tmp_path / "lora", MODULES, rank=8)
    (folder / "README.md").write_text(f"Trained on {count} examples.")
    advice = adapter_advice("l", open_adapter(folder))
    assert codes(advice) == (["few-training-examples"] if found else [])


def test_an_adapter_that_is_left_out_gets_no_advice() -> None:
    """Its weight is 0."""
    llama = FIXTURES / "llama"
    plan = plan_folders(llama / "base", [(llama / "lora", 1.0), (llama / "houlsby", 0.0)])
    assert "bottlenecks-add-latency" not in codes(plan_advice(plan))
    plan = plan_folders(llama / "base", [(llama / "houlsby", 1.0)], export=Export.BUNDLE)
    assert codes(plan_advice(plan)) == ["bottlenecks-add-latency"]
