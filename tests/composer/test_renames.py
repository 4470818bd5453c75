"""Adapters of modules whose names are not those of the checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from composer.adapters import Target, bind_targets, open_adapter
from composer.checkpoint import open_checkpoint
from composer.errors import IncompatibleError, TargetMismatchError
from composer.recipe import Dtype, Recipe
from composer.renames import FAMILIES, module_names
from tests.composer.adapters.oracles import load_model, random_adapter
from tests.conftest import save_model
from tests.support import compose_folders, plan_folders, read_tensors, write_base, write_lora

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "vocab_size": 96,
}
IMAGE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}


def _models() -> dict[str, tuple[str, str, Callable[[], Any]]]:
    """name: (family, auto class, how it is made)."""
    import transformers as t

    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    clip = {"model_type": "clip_vision_model", "projection_dim": 16, **IMAGE}
    siglip = {"model_type": "siglip_vision_model", **IMAGE}
    text = "AutoModelForImageTextToText"
    image = "AutoModelForImageClassification"
    return {
        "qwen2_vl": ("qwen2_vl", text, lambda: t.Qwen2VLForConditionalGeneration(
            t.Qwen2VLConfig(text_config={**TEXT, **ROPE}, vision_config=vision))),
        "llava": ("llava", text, lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(text_config={"model_type": "llama", **TEXT}, vision_config=clip))),
        "gemma3": ("llava", text, lambda: t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(text_config={**TEXT, "head_dim": 8}, vision_config=siglip))),
        "vit": ("vit", image, lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE))),
        "deit": ("vit", image, lambda: t.DeiTForImageClassification(t.DeiTConfig(**IMAGE))),
        "dinov2": ("dinov2", image, lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**IMAGE))),
        "swin": ("swin", image, lambda: t.SwinForImageClassification(t.SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[2], window_size=4))),
    }  # fmt: skip


NAMES = ["qwen2_vl", "llava", "gemma3", "vit", "deit", "dinov2", "swin"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose tensors are stored under other names than their modules have."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("renamed")
    return {name: save_model(make(), folder / name) for name, (_, _, make) in _models().items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_family_names_modules_as_transformers_does(bases: dict[str, Path], name: str) -> None:
    """Oracle: the names of the loaded model's own linear weights, each under the tensor with the same numbers."""
    family, auto, _ = _models()[name]
    stored = read_tensors(bases[name])
    found = module_names(family, tuple(stored))
    assert found is not None
    model = load_model(bases[name], auto)
    linear = {
        f"{key}.weight": module.weight for key, module in model.named_modules() if type(module).__name__ == "Linear"
    }
    for key, weight in linear.items():
        if key == "lm_head.weight" and key not in found:
            continue  # tied
        assert torch.equal(stored[found[key]].float(), weight), key


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_renamed_modules_is_merged_where_it_belongs(
    bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Oracle: the weights of PEFT's merged model, module by module, and that each differs from the base's."""
    _, auto, _ = _models()[name]
    config = peft.LoraConfig(r=2, target_modules=r".*\.(q_proj|k_proj|mlp\.fc1|up_proj)")
    adapter = random_adapter(bases[name], tmp_path / "adapter", config, auto=auto)
    compose_folders(bases[name], [(adapter, 1.0)], tmp_path / "out", dtype=Dtype.FP32)
    base = load_model(bases[name], auto).state_dict()
    merged = peft.PeftModel.from_pretrained(load_model(bases[name], auto), adapter).merge_and_unload().state_dict()
    ours = load_model(tmp_path / "out", auto).state_dict()
    for key, tensor in merged.items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=1e-6)
    changed = [key for key, tensor in ours.items() if not torch.equal(tensor, base[key])]
    assert len(changed) == len(open_adapter(adapter).signature.targets) > 0


def test_names_that_two_families_read_differently_are_ambiguous() -> None:
    """Neither is taken: each of the tensors is named."""
    shapes = {
        "language_model.model.a.weight": (4, 4),
        "model.a.weight": (4, 4),
    }
    binding = bind_targets((Target("model.language_model.a.weight", (4, 4)),), shapes)
    assert [str(mismatch) for mismatch in binding.mismatches] == [
        "model.language_model.a.weight: ambiguous, it may be language_model.model.a.weight or model.a.weight"
    ]


def test_names_of_no_family_are_refused(tmp_path: Path) -> None:
    """Nothing is skipped: the tensor that the base lacks is named."""
    base = write_base(tmp_path / "base", {"language_model.model.a.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(TargetMismatchError, match="no such tensor"):
        plan_folders(base, [(write_lora(tmp_path / "lora", {"model.text_model.a": (4, 4)}), 1.0)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_leaves_other_names_alone(family: str) -> None:
    """No change, no part in the search; a collision of two names is none either."""
    assert module_names(family, ("a.q_proj.weight", "a.k_proj.weight")) is None


def test_a_collision_rules_a_family_out() -> None:
    """Two stored names that would be one module's."""
    names = ("model.0.block_sparse_moe.gate.weight", "model.0.mlp.gate.weight")
    assert module_names("mixtral", names) is None


def test_renamed_modules_are_not_exported_under_the_wrong_names(bases: dict[str, Path], tmp_path: Path) -> None:
    """--export peft would have to know the module's name of every tensor: it says that it does not."""
    from composer.exporters import prepare_export
    from composer.plan import Term, make_plan

    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|k_proj)")
    adapter = random_adapter(bases["llava"], tmp_path / "adapter", config, auto="AutoModelForImageTextToText")
    recipe = Recipe(base="b", adapters=({"ref": "a"},), export="peft")
    plan = make_plan(recipe, open_checkpoint(bases["llava"]), [Term("a", open_adapter(adapter), 1.0)])
    with pytest.raises(IncompatibleError, match="name modules differently"):
        prepare_export(plan)
