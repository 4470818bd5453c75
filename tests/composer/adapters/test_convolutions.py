"""LoRA, DoRA and (IA)³ on convolutions: the composed module computes what PEFT's live one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from composer.adapters import open_adapter
from composer.errors import CorruptFileError, TargetMismatchError, UnsupportedAdapterError
from composer.recipe import Dtype
from tests.composer.adapters.oracles import random_adapter
from tests.support import (
    compose_folders,
    plan_folders,
    read_tensors,
    weight_bytes,
    write_base,
    write_tensors,
)


class Net(nn.Module):
    """One convolution of each number of dimensions, with strides and kernels that are not square.

    None is dilated: PEFT's lora_A never is, and its forward fails beside one that is.
    """

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3, padding=1, groups=groups)
        self.plane = nn.Conv2d(6, 5, (3, 2), stride=2, padding=1)
        self.point = nn.Conv2d(5, 8, 1, bias=False)
        self.space = nn.Conv3d(8, 7, (1, 2, 3), padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, 4, 16]."""
        x = self.line(x).reshape(len(x), 6, 4, 4)
        x = self.point(torch.tanh(self.plane(x)))
        return self.space(torch.tanh(x)[:, :, None])


def net(tensors: dict[str, torch.Tensor] | None = None, groups: int = 1) -> Net:
    """The module, with these weights or its own."""
    torch.manual_seed(1)
    made = Net(groups)
    if tensors:
        made.load_state_dict(tensors)
    return made.eval()


def base_of(module: nn.Module, folder: Path) -> Path:
    """A checkpoint of the module's weights."""
    return write_base(folder, {name: tensor.numpy() for name, tensor in module.state_dict().items()})


def adapted(config: Any, folder: Path, groups: int = 1) -> torch.Tensor:
    """PEFT's adapter on the module, saved with every parameter moved; returns PEFT's live forward."""
    model = peft.get_peft_model(net(groups=groups), config)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return run(model.eval())


def run(module: nn.Module) -> torch.Tensor:
    """The output on a fixed input."""
    with torch.no_grad():
        return module(torch.linspace(-2, 2, 128).reshape(2, 4, 16))


LAYERS = ["line", "plane", "point", "space"]
CONFIGS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=LAYERS),
    "rslora": peft.LoraConfig(r=3, use_rslora=True, target_modules=LAYERS, rank_pattern={"plane": 2}),
    "dora": peft.LoraConfig(r=3, use_dora=True, target_modules=LAYERS),
    "lora-bias": peft.LoraConfig(r=3, lora_bias=True, target_modules=["line", "plane", "space"]),
    "whole": peft.LoraConfig(r=3, target_modules=["line", "plane"], modules_to_save=["space"]),
    "ia3": peft.IA3Config(target_modules=["plane", "point", "space"], feedforward_modules=["point"]),
    "ia3-feedforward": peft.IA3Config(target_modules=["plane", "space"], feedforward_modules=r"plane|space"),
    "ia3-outputs": peft.IA3Config(target_modules=["plane", "space"], feedforward_modules=[]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_convolution_is_pefts_live_forward(tmp_path: Path, case: str) -> None:
    """To 1e-5 in float32, which the adapter moved by far more."""
    wanted = adapted(CONFIGS[case], tmp_path / "adapter")
    base = base_of(net(), tmp_path / "base")
    compose_folders(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out", dtype=Dtype.FP32)
    torch.testing.assert_close(run(net(read_tensors(tmp_path / "out"))), wanted, atol=1e-5, rtol=1e-5)
    assert (run(net()) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["lora", "dora", "ia3", "ia3-feedforward"])
def test_weight_zero_gives_the_bytes_of_the_base(tmp_path: Path, case: str) -> None:
    """The adapter is checked and then left out."""
    adapted(CONFIGS[case], tmp_path / "adapter")
    base = base_of(net(), tmp_path / "base")
    compose_folders(base, [(tmp_path / "adapter", 0.0)], tmp_path / "out")
    compose_folders(base, [], tmp_path / "plain")
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "plain")


def test_an_image_model_is_pefts_live_forward(tmp_path: Path) -> None:
    """The patches of a ViT are a Conv2d; its other modules have other names than the checkpoint's tensors."""
    import transformers

    auto = "AutoModelForImageClassification"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=5, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["projection", "q_proj"], modules_to_save=["classifier"])
    adapter = random_adapter(tmp_path / "base", tmp_path / "adapter", lora, auto=auto)
    compose_folders(tmp_path / "base", [(adapter, 1.0)], tmp_path / "out", dtype=Dtype.FP32)
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    model = getattr(transformers, auto)
    live = peft.PeftModel.from_pretrained(model.from_pretrained(tmp_path / "base"), adapter).eval()
    with torch.no_grad():
        wanted = live(pixel_values=pixels).logits
        found = model.from_pretrained(tmp_path / "out").eval()(pixel_values=pixels).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_grouped_convolution_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Its LoRA reads the channels of all groups; PEFT does not merge it either."""
    adapted(peft.LoraConfig(r=4, target_modules=["line"]), tmp_path / "adapter", groups=2)
    with pytest.raises(UnsupportedAdapterError, match="2 groups"):
        open_adapter(tmp_path / "adapter")


def test_ia3_on_the_inputs_of_a_grouped_convolution_is_a_mismatch(tmp_path: Path) -> None:
    """The base has fewer inputs a kernel than the vector has numbers."""
    config = peft.IA3Config(target_modules=["plane"], feedforward_modules=["plane"])
    adapted(config, tmp_path / "adapter")
    tensors = {name: tensor.numpy() for name, tensor in net().state_dict().items()}
    tensors["plane.weight"] = tensors["plane.weight"][:, :3].copy()
    with pytest.raises(TargetMismatchError, match=r"plane\.weight"):
        plan_folders(write_base(tmp_path / "base", tensors), [(tmp_path / "adapter", 1.0)])


def damaged(source: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """The adapter with tensors of other shapes."""
    arrays = {name: spec.read() for name, spec in open_adapter(source).header.tensors.items()}
    for name, shape in changes.items():
        full = f"base_model.model.{name}"
        assert full in arrays
        arrays[full] = np.ones(shape, np.float32)
    write_tensors(folder / "adapter_model.safetensors", arrays)
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"plane.lora_A.weight": (3, 6, 3)},
        {"plane.lora_B.weight": (5, 3, 3, 2)},
        {"plane.lora_B.weight": (5, 2, 1, 1)},
        {"plane.lora_A.weight": (3, 6, 3, 2, 1, 1), "plane.lora_B.weight": (5, 3, 1, 1, 1, 1)},
        {"plane.lora_magnitude_vector": (1, 4, 1, 1)},
        {"plane.lora_magnitude_vector": (5, 1, 1, 1)},
    ],
)
def test_factors_of_no_convolution_are_damaged(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A kernel in B, dimensions that differ, magnitudes of another size."""
    adapted(CONFIGS["dora"], tmp_path / "adapter")
    with pytest.raises(CorruptFileError):
        open_adapter(damaged(tmp_path / "adapter", tmp_path / "damaged", changes))


def test_a_kernel_of_another_size_is_a_mismatch(tmp_path: Path) -> None:
    """Named with both shapes."""
    adapted(CONFIGS["lora"], tmp_path / "adapter")
    other = damaged(tmp_path / "adapter", tmp_path / "other", {"plane.lora_A.weight": (3, 6, 3, 3)})
    with pytest.raises(TargetMismatchError, match=r"expects \[5, 6, 3, 3\], the base has \[5, 6, 3, 2\]"):
        plan_folders(base_of(net(), tmp_path / "base"), [(other, 1.0)])


@pytest.mark.parametrize("value", [None, 7, "("])
def test_ia3_without_feedforward_modules_does_not_say_what_it_scales(tmp_path: Path, value: Any) -> None:
    """The vector of a convolution is [1, n, 1, 1] for outputs and for inputs."""
    adapted(CONFIGS["ia3"], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "feedforward_modules": value}))
    with pytest.raises(CorruptFileError):
        open_adapter(tmp_path / "adapter")


def test_a_lora_on_a_convolution_is_neither_resized_nor_exported(tmp_path: Path) -> None:
    """As a LoRA of matrices it would be another one: both say what works instead."""
    from composer.checkpoint import open_checkpoint
    from composer.exporters import prepare_export
    from composer.plan import Term, make_plan
    from composer.recipe import Recipe
    from composer.resize import resize_lora

    adapted(CONFIGS["lora"], tmp_path / "adapter")
    adapter = open_adapter(tmp_path / "adapter")
    with pytest.raises(UnsupportedAdapterError):
        resize_lora(adapter, tmp_path / "small", rank=1)
    checkpoint = open_checkpoint(base_of(net(), tmp_path / "base"))
    recipe = Recipe(base="b", adapters=({"ref": "a"},), export="peft")
    with pytest.raises(UnsupportedAdapterError):
        prepare_export(make_plan(recipe, checkpoint, [Term("a", adapter, 1.0)]))
