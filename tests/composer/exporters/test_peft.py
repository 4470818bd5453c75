"""A composition as one LoRA: PEFT loads it and computes what it computes with all the inputs active at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from composer.adapters import open_adapter
from composer.checkpoint import open_checkpoint
from composer.errors import IncompatibleError, RecipeError, TargetMismatchError, UnsupportedAdapterError
from composer.exporters import find_plan_exporter
from composer.plan import Plan, Term, make_plan
from composer.recipe import AdapterTerm, Dtype, Export, Recipe
from composer.run import compose
from composer.tensors import read_header
from tests.conftest import llama_config, random_lora, save_model
from tests.support import edit_json, read_tensors, write_base, write_lora

Weighted = list[tuple[Path, float]]
IDS = torch.arange(12).reshape(2, 6)
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """float32 models: a Llama, and a GPT-2, whose Conv1D keeps W as [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(5)
            if name == "llama":
                model = LlamaForCausalLM(llama_config())
            else:
                model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32,
                                                   bos_token_id=0, eos_token_id=1))  # fmt: skip
            made[name] = save_model(model.float(), tmp_path_factory.mktemp("models") / name)
        return made[name]

    return make


def plan_of(base: Path, adapters: Weighted, export: Export = Export.PEFT, **recipe: Any) -> Plan:
    """The plan of adapters with weights, labelled by their folders' names."""
    terms = [Term(path.name, open_adapter(path), weight) for path, weight in adapters]
    wanted = tuple(AdapterTerm(ref=term.label, weight=term.weight) for term in terms)
    return make_plan(Recipe(base=base.name, adapters=wanted, export=export, **recipe), open_checkpoint(base), terms)


def logits(model: Any) -> torch.Tensor:
    """Of a few tokens, without dropout."""
    with torch.no_grad():
        return model.eval()(IDS).logits


def loaded(base: Path, adapter: Path | None = None) -> Any:
    """The base, with an adapter by PEFT; a key that PEFT misses or does not expect fails."""
    import warnings

    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)


def peft_sum(base: Path, adapters: Weighted) -> torch.Tensor:
    """PEFT's own forward with every adapter active, each scaled by its weight."""
    model = loaded(base, adapters[0][0])
    for index, (path, _) in enumerate(adapters[1:], 1):
        model.load_adapter(path, f"a{index}")
    names = ["default", *(f"a{index}" for index in range(1, len(adapters)))]
    for module in model.modules():
        for name, (_, weight) in zip(names, adapters, strict=True):
            if isinstance(getattr(module, "scaling", None), dict) and name in module.scaling:
                module.scaling[name] *= weight
    model.base_model.set_adapter(names)
    return logits(model)


def two(base: Path, folder: Path, name: str) -> Weighted:
    """Two LoRAs of unlike ranks, scales and modules."""
    transposed = {"fan_in_fan_out": name == "gpt2"}
    one = random_lora(base, folder / "one", target_modules=TARGETS[name], **transposed)
    other = random_lora(
        base, folder / "other", seed=3, r=6, use_rslora=True, target_modules=TARGETS[name][:2], **transposed
    )
    return [(one, 0.7), (other, -0.5)]


@pytest.mark.parametrize("method", ["linear", "cat", "task_arithmetic", "svd"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_written_lora_computes_the_sum(bases: Any, tmp_path: Path, name: str, method: str) -> None:
    """Oracles: PEFT's forward with both adapters active; and the same recipe merged into the weights."""
    base = bases(name)
    adapters = two(base, tmp_path, name)
    parameters = {"task_arithmetic": {"scaling": 1.0}, "svd": {"rank": 10}}.get(method, {})
    outcome = compose(plan_of(base, adapters, method=method, parameters=parameters), tmp_path / "out")
    compose(plan_of(base, adapters, Export.SAFETENSORS, method=method, parameters=parameters), tmp_path / "merged")
    found = logits(loaded(base, tmp_path / "out"))
    torch.testing.assert_close(found, peft_sum(base, adapters), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, logits(loaded(tmp_path / "merged")), rtol=0, atol=1e-5)
    assert (found - logits(loaded(base))).abs().max() > 1e-3
    assert [item["survival"] for item in outcome.record["adapters"]] == [1.0, 1.0]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (10, 10, name == "gpt2")
    assert config["base_model_name_or_path"] == str(base)
    assert not list((tmp_path / "out").glob("model*"))


def test_scaling_is_part_of_the_factors(bases: Any, tmp_path: Path) -> None:
    """task_arithmetic's λ: twice the sum is the sum at twice the weights."""
    base = bases("llama")
    adapters = two(base, tmp_path, "llama")
    compose(plan_of(base, adapters, method="task_arithmetic", parameters={"scaling": 2.0}), tmp_path / "out")
    expected = peft_sum(base, [(path, 2 * weight) for path, weight in adapters])
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out")), expected, rtol=0, atol=1e-5)


def dense(base: Path, adapters: Weighted) -> dict[str, np.ndarray]:
    """Σ w·s·B·A in float64, by module."""
    total: dict[str, np.ndarray] = {}
    for path, weight in adapters:
        adapter = open_adapter(path)
        for delta in adapter.deltas(adapter.bind(open_checkpoint(base).shapes).names):
            change = weight * delta.scale * delta.b.read().astype(float) @ delta.a.read().astype(float)
            module = delta.target.removesuffix(".weight")
            total[module] = total.get(module, 0) + change
    return total


def test_a_lower_rank_is_the_best_one_and_says_what_it_costs(bases: Any, tmp_path: Path) -> None:
    """Oracle: numpy's full SVD of the dense float64 sum; the energy left out is that of its smallest values."""
    base = bases("llama")
    adapters = two(base, tmp_path, "llama")
    outcome = compose(plan_of(base, adapters, rank=3), tmp_path / "out")
    facts = outcome.record["export"]
    tensors = read_header(tmp_path / "out" / "adapter_model.safetensors").tensors
    lost = whole = 0.0
    for module, change in dense(base, adapters).items():
        u, s, v = np.linalg.svd(change, full_matrices=False)
        parts = [tensors[f"base_model.model.{module}.lora_{side}.weight"].read() for side in "BA"]
        np.testing.assert_allclose(parts[0] @ parts[1], (u[:, :3] * s[:3]) @ v[:3], atol=1e-6)
        share = np.square(s[3:]).sum() / np.square(s).sum()
        assert facts["discarded_energy_by_module"][module] == pytest.approx(share, rel=1e-4, abs=1e-12)
        lost, whole = lost + np.square(s[3:]).sum(), whole + np.square(s).sum()
    assert 0.05 < lost / whole < 1
    assert facts["discarded_energy"] == pytest.approx(lost / whole, rel=1e-4)
    assert all(0 < item["survival"] < 1 for item in outcome.record["adapters"])


def test_a_rank_above_the_sum_is_exact(bases: Any, tmp_path: Path) -> None:
    """Nothing is discarded, and no module is wider than its adapters together."""
    base = bases("llama")
    adapters = two(base, tmp_path, "llama")
    outcome = compose(plan_of(base, adapters, rank=64), tmp_path / "out")
    assert outcome.record["export"]["discarded_energy"] == 0
    assert outcome.record["export"]["rank"] == 10
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out")), peft_sum(base, adapters), rtol=0, atol=1e-5)


def test_modules_to_save_and_biases_go_along(bases: Any, tmp_path: Path) -> None:
    """A trained head of one adapter and the trained biases of another; logits are PEFT's of the merged weights."""
    base = bases("llama")
    one = random_lora(base, tmp_path / "one", target_modules=["q_proj"], modules_to_save=["lm_head"])
    other = random_lora(base, tmp_path / "other", seed=4, target_modules=["v_proj"])
    compose(plan_of(base, [(one, 1.0), (other, 0.5)]), tmp_path / "out")
    compose(plan_of(base, [(one, 1.0), (other, 0.5)], Export.SAFETENSORS), tmp_path / "merged")
    found = logits(loaded(base, tmp_path / "out"))
    torch.testing.assert_close(found, logits(loaded(tmp_path / "merged")), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]


def test_trained_biases_go_along(bases: Any, tmp_path: Path) -> None:
    """bias="all": those inside LoRA layers of either adapter, and those outside."""
    base = bases("gpt2")
    one = random_lora(base, tmp_path / "one", target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    other = random_lora(base, tmp_path / "other", seed=4, target_modules=["c_fc"], fan_in_fan_out=True)
    compose(plan_of(base, [(one, 1.0), (other, 0.5)]), tmp_path / "out")
    compose(plan_of(base, [(one, 1.0), (other, 0.5)], Export.SAFETENSORS), tmp_path / "merged")
    found = logits(loaded(base, tmp_path / "out"))
    torch.testing.assert_close(found, logits(loaded(tmp_path / "merged")), rtol=0, atol=1e-5)
    assert (found - logits(loaded(base))).abs().max() > 1e-3


def test_the_copy_of_a_head_is_checked_and_dropped(bases: Any, tmp_path: Path) -> None:
    """PEFT saves W along with a LoRA on lm_head; it must be this base's, and is not written."""
    base = bases("llama")
    adapter = random_lora(base, tmp_path / "one", target_modules=["lm_head", "q_proj"])
    compose(plan_of(base, [(adapter, 0.5)]), tmp_path / "out")
    written = read_header(tmp_path / "out" / "adapter_model.safetensors").tensors
    assert "base_model.model.lm_head.base_layer.weight" in read_header(adapter / "adapter_model.safetensors").tensors
    assert not [name for name in written if "base_layer" in name]
    torch.testing.assert_close(
        logits(loaded(base, tmp_path / "out")), peft_sum(base, [(adapter, 0.5)]), rtol=0, atol=1e-5
    )
    other = {name: tensor.numpy().copy() for name, tensor in read_tensors(base).items()}
    other["lm_head.weight"] += 1
    changed = write_base(tmp_path / "changed", other)
    with pytest.raises(TargetMismatchError):
        compose(plan_of(changed, [(adapter, 0.5)]), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_our_own_reader_reads_it_back(bases: Any, tmp_path: Path) -> None:
    """Composing the written LoRA at weight 1 gives the merged weights to the last digits of float32."""
    base = bases("gpt2")
    adapters = two(base, tmp_path, "gpt2")
    compose(plan_of(base, adapters), tmp_path / "out")
    compose(plan_of(base, adapters, Export.SAFETENSORS), tmp_path / "merged")
    compose(plan_of(base, [(tmp_path / "out", 1.0)], Export.SAFETENSORS), tmp_path / "again")
    again = read_tensors(tmp_path / "again")
    for name, tensor in read_tensors(tmp_path / "merged").items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-7)


def test_adapters_of_a_class_without_the_head_keep_their_names(tmp_path: Path) -> None:
    """One adapter names layers.…, the checkpoint and the other one model.layers.…: the names that reach all targets win."""
    weights = {name: np.zeros((4, 4), np.float32) for name in ("model.layers.0.q.weight", "lm_head.weight")}
    base = write_base(tmp_path / "base", weights)
    bare = write_lora(tmp_path / "bare", {"layers.0.q": (4, 4)})
    full = write_lora(tmp_path / "full", {"model.layers.0.q": (4, 4), "lm_head": (4, 4)}, seed=2)
    compose(plan_of(base, [(bare, 1.0)]), tmp_path / "alone")
    assert set(open_adapter(tmp_path / "alone").bind({"layers.0.q.weight": (4, 4)}).names) == {"layers.0.q.weight"}
    compose(plan_of(base, [(bare, 1.0), (full, 1.0)]), tmp_path / "both")
    names = {target.parameter for target in open_adapter(tmp_path / "both").signature.targets}
    assert names == {"model.layers.0.q.weight", "lm_head.weight"}


def test_patterns_name_one_module_each(tmp_path: Path) -> None:
    """Modules whose names end alike have their own ranks; target_modules does not catch a module that has no LoRA."""
    weights = {f"{name}.weight": np.zeros((8, 8), np.float32) for name in ("a.q", "b.a.q", "c.q", "c.k")}
    base = write_base(tmp_path / "base", weights)
    one = write_lora(tmp_path / "one", {"a.q": (8, 8), "b.a.q": (8, 8)}, rank=2)
    other = write_lora(tmp_path / "other", {"b.a.q": (8, 8)}, rank=3)
    third = write_lora(tmp_path / "third", {"a.q": (8, 8)}, rank=1)
    compose(plan_of(base, [(one, 1.0), (other, 1.0), (third, 1.0)]), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (5, {r"b\.a\.q": 5, r"a\.q": 3})
    assert config["target_modules"] == ["a.q", "b.a.q"]
    reopened = plan_of(base, [(tmp_path / "out", 1.0)])
    assert {job.source.name for job in reopened.jobs if job.deltas} == {"a.q.weight", "b.a.q.weight"}


def test_fp16_factors_are_smaller_and_their_loss_is_measured(bases: Any, tmp_path: Path) -> None:
    """The plan says how large the file will be, to the byte."""
    base = bases("llama")
    adapters = two(base, tmp_path, "llama")
    for dtype, name in ((Dtype.KEEP, "F32"), (Dtype.FP16, "F16")):
        plan = plan_of(base, adapters, dtype=dtype, rank=4)
        exporter = find_plan_exporter("peft")
        assert exporter is not None
        outcome = compose(plan, tmp_path / name)
        file = tmp_path / name / "adapter_model.safetensors"
        assert exporter.plan_files(plan) == {file.name: file.stat().st_size}
        assert {spec.dtype for spec in read_header(file).tensors.values()} == {name}
        assert outcome.record["export"]["dtype"] == name


def refused(base: Path, adapters: Weighted, tmp_path: Path, error: type[Exception], match: str, **recipe: Any) -> None:
    """Nothing is written."""
    with pytest.raises(error, match=match):
        compose(plan_of(base, adapters, **recipe), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_what_is_not_low_rank_is_refused_by_name(bases: Any, tmp_path: Path) -> None:
    """IA3, DoRA, a method on whole weights, a rank for a merge, nothing at all."""
    import peft
    import transformers

    base = bases("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    ia3 = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    peft.get_peft_model(model, ia3).save_pretrained(tmp_path / "ia3")
    dora = random_lora(base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    lora = random_lora(base, tmp_path / "lora", target_modules=["q_proj"])
    refused(base, [(lora, 1.0), (tmp_path / "ia3", 1.0)], tmp_path, UnsupportedAdapterError, "ia3: .*cannot be written")
    refused(base, [(dora, 1.0)], tmp_path, UnsupportedAdapterError, "Dora")
    refused(base, [(lora, 1.0)], tmp_path, RecipeError, "ties", method="ties")
    refused(base, [(lora, 1.0)], tmp_path, RecipeError, "a rank belongs to a LoRA", export=Export.SAFETENSORS, rank=2)
    refused(base, [(lora, 0.0)], tmp_path, RecipeError, "nothing is left")
    refused(base, [], tmp_path, RecipeError, "nothing is left")


def test_mixed_layouts_are_refused(tmp_path: Path) -> None:
    """A Conv1D module of one adapter and a linear one of the other cannot share one fan_in_fan_out."""
    weights = {"h.0.c_fc.weight": np.zeros((4, 8), np.float32), "head.weight": np.zeros((6, 4), np.float32)}
    base = write_base(tmp_path / "base", weights, model_type="gpt2")
    conv = write_lora(tmp_path / "conv", {"h.0.c_fc": (8, 4)}, fan_in_fan_out=True)
    head = write_lora(tmp_path / "head", {"head": (6, 4)})
    refused(base, [(conv, 1.0), (head, 1.0)], tmp_path, IncompatibleError, r"\[in, out\]")


def test_a_tensor_that_no_option_accounts_for_is_refused(tmp_path: Path) -> None:
    """A whole tensor is carried only where modules_to_save or bias says so: PEFT would not load it."""
    base = write_base(tmp_path / "base", {"q.weight": np.zeros((4, 4), np.float32), "n.weight": np.ones(4, np.float32)})
    lora = write_lora(tmp_path / "lora", {"q": (4, 4)}, extra={"base_model.model.n.weight": np.zeros(4, np.float32)})
    refused(base, [(lora, 1.0)], tmp_path, UnsupportedAdapterError, "n.weight")
    edit_json(lora / "adapter_config.json", modules_to_save=["n"])
    compose(plan_of(base, [(lora, 1.0)]), tmp_path / "out")
    assert "base_model.model.n.weight" in read_header(tmp_path / "out" / "adapter_model.safetensors").tensors


def test_the_same_recipe_gives_the_same_bytes(bases: Any, tmp_path: Path) -> None:
    """Every file, record included."""
    base = bases("llama")
    adapters = two(base, tmp_path, "llama")
    for out in ("first", "second"):
        compose(plan_of(base, adapters, rank=3), tmp_path / out)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_adalora_becomes_a_plain_lora(bases: Any, tmp_path: Path) -> None:
    """Its singular values go into the factors, in the export and in a resize; PEFT's AdaLoRA is the oracle."""
    import peft
    import transformers

    from composer.resize import resize_lora

    base = bases("llama")
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adalora")
    expected = logits(loaded(base, tmp_path / "adalora"))
    compose(plan_of(base, [(tmp_path / "adalora", 1.0)]), tmp_path / "out")
    resize_lora(open_adapter(tmp_path / "adalora"), tmp_path / "resized", rank=8)
    for out in ("out", "resized"):
        torch.testing.assert_close(logits(loaded(base, tmp_path / out)), expected, rtol=0, atol=1e-5)
    assert (expected - logits(loaded(base))).abs().max() > 1e-3
