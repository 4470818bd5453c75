"""PiSSA and OLoRA: the start that PEFT takes off the base on loading is taken off here too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import composer.plan as plan_module
from composer.adapters import open_adapter
from composer.errors import UnsupportedAdapterError
from composer.recipe import Dtype
from tests.composer.adapters.oracles import assert_composed_is_live, load_model, logits, random_adapter
from tests.conftest import llama_config, save_model
from tests.support import compose_folders, edit_json, plan_folders, read_tensors, weight_bytes, write_base, write_lora


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama in float32 and the same in bf16, and a GPT-2, whose linear weights are [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("residual")
    llama = LlamaForCausalLM(llama_config())
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=32))
    made = {"llama": llama, "gpt2": gpt2}
    found = {name: save_model(model, folder / name) for name, model in made.items()}
    return {**found, "bf16": save_model(llama.bfloat16(), folder / "bf16")}


MODULES = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"init_lora_weights": "pissa"}),
    ("llama", {"init_lora_weights": "pissa", "use_rslora": True, "alpha_pattern": {"v_proj": 3}}),
    ("llama", {"init_lora_weights": "pissa", "use_dora": True}),
    ("llama", {"init_lora_weights": "olora"}),
    ("llama", {"init_lora_weights": "olora", "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    ("gpt2", {"init_lora_weights": "pissa", "fan_in_fan_out": True}),
]


def make(base: Path, name: str, folder: Path, **config: Any) -> Path:
    """An adapter of rank 4 whose factors are moved from their start."""
    fields = {"r": 4, "lora_alpha": 7, "target_modules": MODULES[name], **config}
    return random_adapter(base, folder, peft.LoraConfig(**fields))


@pytest.mark.parametrize(("base", "config"), CASES)
def test_a_start_from_the_base_is_pefts_live_forward(
    bases: dict[str, Path], tmp_path: Path, base: str, config: dict[str, Any]
) -> None:
    """As PEFT loads the adapter: over the residual, not over the base."""
    adapter = make(bases[base], base, tmp_path / "adapter", **config)
    assert_composed_is_live(bases[base], adapter, tmp_path / "out")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_was_not_trained_changes_nothing(bases: dict[str, Path], tmp_path: Path, init: str) -> None:
    """R + s·B₀·A₀ is W: the composed weights are the base's to the rounding of float32."""
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=init)
    peft.get_peft_model(load_model(bases["llama"]), config).save_pretrained(tmp_path / "adapter")
    compose_folders(bases["llama"], [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    for name, tensor in read_tensors(bases["llama"]).items():
        torch.testing.assert_close(read_tensors(tmp_path / "out")[name], tensor, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_residual_of_a_bf16_base_is_rounded_as_peft_rounds_it(
    bases: dict[str, Path], tmp_path: Path, init: str
) -> None:
    """Oracle: PEFT's own residual, in bf16, + s·B·A in float32: equal but where a start falls on the other side."""
    from transformers import AutoModelForCausalLM

    # a scale of 1: OLoRA makes (1 − s)·W of the first columns, and three quarters of a bf16 number is often a tie
    adapter = make(bases["bf16"], "llama", tmp_path / "adapter", init_lora_weights=init, lora_alpha=4)
    compose_folders(bases["bf16"], [(adapter, 1.0)], tmp_path / "out", dtype=Dtype.FP32)
    model = AutoModelForCausalLM.from_pretrained(bases["bf16"], dtype=torch.bfloat16)
    live = peft.PeftModel.from_pretrained(model, adapter)
    written = read_tensors(tmp_path / "out")
    for name, module in live.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            assert module.base_layer.weight.dtype == torch.bfloat16
            exact = module.base_layer.weight.float() + module.get_delta_weight("default").float()
            close = torch.isclose(written[f"{name}.weight"], exact, atol=1e-6, rtol=1e-6)
            assert close.float().mean() > 0.998, name
            assert (written[f"{name}.weight"] - exact).abs().max() < 2e-3


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_converted_adapter_is_plain_and_gives_the_same(bases: dict[str, Path], tmp_path: Path, init: str) -> None:
    """PEFT's conversion to twice the rank composes as any LoRA, to the same logits as the adapter itself."""
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=init)
    model = peft.get_peft_model(load_model(bases["llama"]), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "itself")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert open_adapter(tmp_path / "converted").signature.rank == 6
    for name in ("itself", "converted"):
        compose_folders(bases["llama"], [(tmp_path / name, 1.0)], tmp_path / f"out-{name}")
    itself, converted = (logits(load_model(tmp_path / f"out-{name}")) for name in ("itself", "converted"))
    torch.testing.assert_close(itself, converted, atol=2e-5, rtol=1e-5)
    assert (itself - logits(load_model(bases["llama"]))).abs().max() > 1e-2


def test_weights_scale_the_whole_change(bases: dict[str, Path], tmp_path: Path) -> None:
    """W + w·(W' − W), residual included; weight 0 is the base, byte for byte."""
    adapter = make(bases["llama"], "llama", tmp_path / "adapter", init_lora_weights="pissa")
    for weight in (0.0, 0.5, 1.0):
        compose_folders(bases["llama"], [(adapter, weight)], tmp_path / str(weight))
    compose_folders(bases["llama"], [], tmp_path / "plain")
    assert weight_bytes(tmp_path / "0.0") == weight_bytes(tmp_path / "plain")
    start, half, full = (read_tensors(folder) for folder in (bases["llama"], tmp_path / "0.5", tmp_path / "1.0"))
    for name, tensor in start.items():
        torch.testing.assert_close(half[name] - tensor, (full[name] - tensor) / 2, atol=1e-6, rtol=1e-5)


def test_the_plan_counts_the_memory_of_the_decomposition(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole matrix is one block whatever a block may hold, and float64 copies of it are in the bound."""
    adapter = make(bases["llama"], "llama", tmp_path / "adapter", init_lora_weights="pissa")
    compose_folders(bases["llama"], [(adapter, 1.0)], tmp_path / "large")
    plan = plan_folders(bases["llama"], [(adapter, 1.0)])
    assert plan.peak_bytes > 8 * 4 * 64 * 160
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 1)
    compose_folders(bases["llama"], [(adapter, 1.0)], tmp_path / "small")
    assert weight_bytes(tmp_path / "large") == weight_bytes(tmp_path / "small")


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "PiSSA_niter_16", 7, ["pissa"]])
def test_a_start_that_cannot_be_computed_is_refused(tmp_path: Path, init: Any) -> None:
    """Random numbers, data or a quantisation went into it; the remedy is PEFT's conversion."""
    adapter = write_lora(tmp_path / "lora", {"model.q_proj": (6, 4)})
    edit_json(adapter / "adapter_config.json", init_lora_weights=init)
    with pytest.raises(UnsupportedAdapterError) as caught:
        open_adapter(adapter)
    assert "path_initial_model_for_weight_conversion" in str(caught.value.remedy)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_a_start_at_an_end_of_the_model_is_refused(tmp_path: Path, module: str) -> None:
    """PEFT saves the residual of a head with the adapter and none of an embedding: neither is recomputed here."""
    adapter = write_lora(tmp_path / "lora", {module: (6, 4)}, init_lora_weights="pissa")
    with pytest.raises(UnsupportedAdapterError, match="linear layers inside the model"):
        open_adapter(adapter)


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    """What is left of quantised weights depends on how they are quantised again."""
    bits = np.arange(16 * 128, dtype=np.uint8).reshape(16, 128).astype(np.uint8) % 120
    from composer.tensors import DTYPES

    base = write_base(
        tmp_path / "base",
        {
            "model.q_proj.weight": bits.view(DTYPES["F8_E4M3"]),
            "model.q_proj.weight_scale_inv": np.ones((1, 1), np.float32),
        },
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    )
    adapter = write_lora(tmp_path / "lora", {"model.q_proj": (16, 128)}, init_lora_weights="pissa")
    with pytest.raises(UnsupportedAdapterError, match="quantised"):
        plan_folders(base, [(adapter, 1.0)])
