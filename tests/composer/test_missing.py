"""Target modules that an adapter's file lacks: found where they must be there, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.errors import TargetMismatchError
from composer.missing import missing_modules
from tests.support import plan_folders, write_base, write_lora

SQUARE = (8, 8)
BASE = {
    "model.embed_tokens.weight": (16, 8),
    **{
        f"model.layers.{layer}.{module}.weight": SQUARE
        for layer in range(3)
        for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.experts.0.w1", "mlp.experts.1.w1")
    },
    "model.norm.weight": (8,),
    "vision.layers.0.q_proj.weight": SQUARE,
    "lm_head.weight": (16, 8),
}
Q = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]


def missing(modules: list[str], config: dict[str, Any], base_config: dict[str, Any] | None = None) -> list[str]:
    """What is missing of an adapter with these modules on the base above."""
    names = {f"{module}.weight": f"{module}.weight" for module in modules}
    return missing_modules(config, names, BASE, base_config or {})


def test_a_layer_that_the_file_lacks_is_missing() -> None:
    """q_proj of layer 1, and nothing of the vision tower, which no module of the file lies in."""
    assert missing([Q[0], Q[2]], {"target_modules": ["q_proj"]}) == [Q[1]]


def test_a_role_that_the_file_lacks_is_missing() -> None:
    """k_proj of every layer; an expert may be held as one tensor with others, so w1 is not."""
    lacking = missing(Q, {"target_modules": ["q_proj", "k_proj", "w1"]})
    assert lacking == [name.replace("q_proj", "k_proj") for name in Q]


def test_a_head_that_is_listed_and_nowhere_is_missing() -> None:
    """lm_head lies in no layer."""
    assert missing(Q, {"target_modules": ["q_proj", "lm_head"]}) == ["lm_head"]


@pytest.mark.parametrize(
    ("modules", "config"),
    [
        (Q, {"target_modules": ["q_proj"]}),
        (Q, {"target_modules": ["q_proj", "another"]}),
        (Q[:2], {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}),
        (Q[:1], {"target_modules": ["q_proj"], "layers_to_transform": 0}),
        (Q[:1], {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
        (Q[:2], {"target_modules": ["q_proj"], "exclude_modules": [Q[2]]}),
        (Q[:2], {"target_modules": ["q_proj"], "exclude_modules": r".*\.2\..*"}),
        (Q[:2], {"target_modules": Q[:2]}),
        (Q[:2], {"target_modules": r".*\.[01]\.self_attn\.q_proj"}),
        (Q[:2], {"target_modules": None}),
        (Q, {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_what_the_config_leaves_out_is_not_missing(modules: list[str], config: dict[str, Any]) -> None:
    """Layers chosen, modules excluded or saved whole, full names; and a regular expression is not followed."""
    assert missing(modules, config) == []


@pytest.mark.parametrize(
    "base_config",
    [{"num_hidden_layers": 2}, {"text_config": {"num_hidden_layers": 2}}, {"num_kv_shared_layers": 1}],
)
def test_what_a_checkpoint_stores_besides_the_model_is_not_missing(base_config: dict[str, Any]) -> None:
    """A layer beyond the model's last one, or projections of layers that share keys and values."""
    assert missing(Q[:2], {"target_modules": ["q_proj"]}, base_config) == []


@pytest.mark.parametrize(("inner", "outer"), [("model.", ""), ("", "model.")])
def test_one_prefix_more_or_less_makes_no_difference(inner: str, outer: str) -> None:
    """The names of the base are told, whatever the trainer's class nested."""
    names = {f"{inner}layers.{layer}.q_proj.weight": f"{outer}layers.{layer}.q_proj.weight" for layer in (0, 2)}
    shapes = {f"{outer}layers.{layer}.q_proj.weight": SQUARE for layer in range(3)}
    config = {"target_modules": [f"{inner}layers.{layer}.q_proj" for layer in range(3)]}
    assert missing_modules(config, names, shapes, {}) == [f"{outer}layers.1.q_proj"]


def test_names_that_differ_by_more_are_not_compared() -> None:
    """Renamed modules have no name in the adapter's terms."""
    names = {"a.q_proj.weight": "model.layers.0.self_attn.q_proj.weight"}
    assert missing_modules({"target_modules": ["q_proj"]}, names, BASE, {}) == []


def test_a_plan_names_what_the_file_lacks(tmp_path: Path) -> None:
    """A LoRA trained on every layer does not merge into a base that has one more: TargetMismatchError."""
    base = write_base(tmp_path / "base", {name: np.zeros(shape, np.float32) for name, shape in BASE.items()})
    cut = write_lora(tmp_path / "cut", dict.fromkeys(Q[:2], SQUARE), target_modules=["q_proj"])
    with pytest.raises(TargetMismatchError, match=r"layers\.2\.self_attn\.q_proj") as caught:
        plan_folders(base, [(cut, 1.0)])
    assert caught.value.fields["keys"] == [Q[2]]
    write_lora(tmp_path / "meant", dict.fromkeys(Q[:2], SQUARE), target_modules=Q[:2])
    assert plan_folders(base, [(tmp_path / "meant", 1.0)]).touched == 2
