"""Variants of LoRA that PEFT saves: the composed model's logits are those of PEFT's live forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import composer.plan as plan_module
from composer.adapters import open_adapter
from composer.errors import (
    CorruptFileError,
    IncompatibleError,
    NonFiniteError,
    TargetMismatchError,
    UnsupportedAdapterError,
)
from composer.recipe import Dtype
from composer.tensors import read_header
from tests.conftest import llama_config, save_model
from tests.support import compose_folders, edit_json, read_tensors, weight_bytes, write_base, write_lora, write_tensors

KEY = "base_model.model.model.q_proj"
AUTO = {"llama": "AutoModelForCausalLM", "gpt2": "AutoModelForCausalLM", "bert": "AutoModelForSequenceClassification"}
MODULES = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "dense"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """fp32 models; all biases are random, so that a change of one shows."""
    folder = tmp_path_factory.mktemp("variants")
    torch.manual_seed(5)
    made = {
        "llama": transformers.LlamaForCausalLM(llama_config(attention_bias=True, mlp_bias=True)),
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=96, n_positions=32)
        ),
        "bert": transformers.BertForSequenceClassification(
            transformers.BertConfig(
                hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
            )
        ),
    }
    for model in made.values():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return {name: save_model(model, folder / name) for name, model in made.items()}


def save_variant(base: Path, folder: Path, **config: Any) -> Path:
    """An adapter by PEFT whose every trained parameter is random and far from where it began."""
    torch.manual_seed(11)
    model = getattr(transformers, AUTO[base.name]).from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": MODULES[base.name], **config}
    adapted = peft.get_peft_model(model, peft.LoraConfig(fan_in_fan_out=base.name == "gpt2", **options))
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
        elif parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return folder


def logits(base: Path, kind: str, adapter: Path | None = None) -> torch.Tensor:
    """The forward of a model, with PEFT's adapter live on it."""
    model = getattr(transformers, AUTO[kind]).from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 26).reshape(2, 12)).logits


@pytest.mark.parametrize("kind", list(MODULES))
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"use_dora": True}, id="dora"),
        pytest.param({"use_dora": True, "use_rslora": True}, id="dora-rslora"),
        pytest.param({"use_dora": True, "rank_pattern": {"q_proj|c_fc|query": 2}}, id="dora-rank-pattern"),
        pytest.param({"lora_bias": True}, id="lora-bias"),
        pytest.param(
            {"lora_bias": True, "use_rslora": True, "modules_to_save": ["norm", "ln_f", "classifier"]}, id="bias-whole"
        ),
    ],
)
def test_logits_are_those_of_pefts_live_forward(
    models: dict[str, Path], tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    """Oracle: PEFT's forward in fp32, to 1e-5; the adapter moves the logits by far more than that."""
    adapter = save_variant(models[kind], tmp_path / "adapter", **config)
    compose_folders(models[kind], [(adapter, 1.0)], tmp_path / "out", dtype=Dtype.FP32)
    live = logits(models[kind], kind, adapter)
    torch.testing.assert_close(logits(tmp_path / "out", kind), live, atol=1e-5, rtol=1e-5)
    assert (live - logits(models[kind], kind)).abs().max() > 1e-2


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """The adapter's tensors as numpy arrays."""
    return {name: spec.read() for name, spec in read_header(path / "adapter_model.safetensors").tensors.items()}


def small_dora(folder: Path, **config: Any) -> Path:
    """DoRA on a matrix [8, 6], without PEFT."""
    magnitude = np.linspace(0.5, 2.0, 8, dtype=np.float32)
    extra = {f"{KEY}.lora_magnitude_vector": magnitude}
    return write_lora(folder, {"model.q_proj": (8, 6)}, extra=extra, **{"use_dora": True, **config})


def small_base(folder: Path, shape: tuple[int, int] = (8, 6)) -> Path:
    """One random matrix in bf16."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    from composer.tensors import DTYPES

    return write_base(folder, {"model.q_proj.weight": values.view(torch.int16).numpy().view(DTYPES["BF16"])})


@pytest.mark.parametrize("weight", [1.0, 0.5, -0.25])
@pytest.mark.parametrize("one_row", [False, True], ids=["blocks", "row-by-row"])
def test_dora_into_bf16_is_the_float64_form_rounded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float, one_row: bool
) -> None:
    """Oracle: W + w·(m/‖V‖·V − W) in float64, rounded to bf16; float32 sums may fall to the other side once."""
    if one_row:
        monkeypatch.setattr(plan_module, "BLOCK_BYTES", 1)
    base, adapter = small_base(tmp_path / "base"), small_dora(tmp_path / "dora")
    compose_folders(base, [(adapter, weight)], tmp_path / "out")
    arrays = {name.removeprefix(f"{KEY}."): array.astype(np.float64) for name, array in tensors_of(adapter).items()}
    w = read_tensors(base)["model.q_proj.weight"].double().numpy()
    v = w + 2.0 * arrays["lora_B.weight"] @ arrays["lora_A.weight"]
    new = v * (arrays["lora_magnitude_vector"] / np.linalg.norm(v, axis=1))[:, None]
    exact = torch.from_numpy(w + weight * (new - w)).bfloat16()
    written = read_tensors(tmp_path / "out")["model.q_proj.weight"]
    assert (written != exact).sum() <= 1
    torch.testing.assert_close(written, exact, atol=0, rtol=2**-7)


def test_a_magnitude_saved_under_its_older_name_gives_the_same_bytes(tmp_path: Path) -> None:
    """`lora_magnitude_vector.weight` and `.default.weight` are read as `lora_magnitude_vector` is."""
    base = small_base(tmp_path / "base")
    written = []
    for suffix in ("", ".weight", ".default.weight"):
        adapter = small_dora(tmp_path / f"dora{suffix}")
        arrays = tensors_of(adapter)
        arrays[f"{KEY}.lora_magnitude_vector{suffix}"] = arrays.pop(f"{KEY}.lora_magnitude_vector")
        write_tensors(adapter / "adapter_model.safetensors", arrays)
        compose_folders(base, [(adapter, 1.0)], tmp_path / f"out{suffix}")
        written.append(weight_bytes(tmp_path / f"out{suffix}"))
    assert written[0] == written[1] == written[2] != weight_bytes(base)


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
@pytest.mark.parametrize("length", [None, 7], ids=["missing", "wrong-size"])
def test_an_option_without_its_tensor_is_refused(tmp_path: Path, option: str, length: int | None) -> None:
    """A damaged file, not a plain LoRA."""
    name = {"use_dora": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}[option]
    extra = {f"{KEY}.{name}": np.ones(length, np.float32)} if length else {}
    adapter = write_lora(tmp_path / "lora", {"model.q_proj": (8, 6)}, extra=extra, **{option: True})
    with pytest.raises(CorruptFileError, match=option):
        open_adapter(adapter)


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_B.bias"])
def test_a_tensor_whose_option_is_not_set_is_refused(tmp_path: Path, name: str) -> None:
    """PEFT would leave it out with a warning."""
    extra = {f"{KEY}.{name}": np.ones(8, np.float32)}
    with pytest.raises(UnsupportedAdapterError, match="does not set"):
        open_adapter(write_lora(tmp_path / "lora", {"model.q_proj": (8, 6)}, extra=extra))


def test_a_bias_that_the_base_lacks_is_refused_by_name(tmp_path: Path) -> None:
    """There is nothing to add lora_B's bias to."""
    extra = {f"{KEY}.lora_B.bias": np.ones(8, np.float32)}
    adapter = write_lora(tmp_path / "lora", {"model.q_proj": (8, 6)}, extra=extra, lora_bias=True)
    with pytest.raises(TargetMismatchError, match=r"q_proj\.bias: the base has no such tensor"):
        compose_folders(small_base(tmp_path / "base"), [(adapter, 1.0)], tmp_path / "out")


def test_a_row_of_norm_zero_is_refused(tmp_path: Path) -> None:
    """DoRA would divide by it and write NaN."""
    base = write_base(tmp_path / "base", {"model.q_proj.weight": np.zeros((8, 6), np.float32)})
    extra = {f"{KEY}.lora_magnitude_vector": np.ones(8, np.float32)}
    adapter = write_lora(tmp_path / "lora", {"model.q_proj": (8, 6)}, std=0.0, extra=extra, use_dora=True)
    with pytest.raises(NonFiniteError, match="norm"):
        compose_folders(base, [(adapter, 1.0)], tmp_path / "out")


def test_a_square_dora_in_the_wrong_layout_is_refused(tmp_path: Path) -> None:
    """A square matrix does not show its layout; the architecture does, as for LoRA."""
    extra = {f"{KEY}.lora_magnitude_vector": np.ones(8, np.float32)}
    adapter = write_lora(tmp_path / "lora", {"model.q_proj": (8, 8)}, extra=extra, use_dora=True)
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=True)
    with pytest.raises(IncompatibleError, match="fan_in_fan_out"):
        compose_folders(small_base(tmp_path / "base", (8, 8)), [(adapter, 1.0)], tmp_path / "out")


def test_dora_on_conv1d_takes_whole_tensors(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norms of [in, out] run over all rows: blocks of one row are not used, and the bytes are the same."""
    adapter = save_variant(models["gpt2"], tmp_path / "adapter", use_dora=True)
    compose_folders(models["gpt2"], [(adapter, 1.0)], tmp_path / "large")
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 1)
    compose_folders(models["gpt2"], [(adapter, 1.0)], tmp_path / "small")
    assert weight_bytes(tmp_path / "large") == weight_bytes(tmp_path / "small") != weight_bytes(models["gpt2"])


def assert_forward_is_pefts(base: Path, kind: str, adapter: Path, out: Path) -> None:
    """The composed model's logits are those of PEFT's live forward, which the adapter moved."""
    compose_folders(base, [(adapter, 1.0)], out, dtype=Dtype.FP32)
    live = logits(base, kind, adapter)
    torch.testing.assert_close(logits(out, kind), live, atol=1e-5, rtol=1e-5)
    assert (live - logits(base, kind)).abs().max() > 5e-3


@pytest.mark.parametrize(
    ("kind", "modules"),
    [("llama", ["embed_tokens", "q_proj"]), ("llama", ["embed_tokens", "lm_head"]), ("bert", ["word_embeddings"])],
)
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_a_lora_on_an_embedding_is_pefts_forward(
    models: dict[str, Path], tmp_path: Path, kind: str, modules: list[str], config: dict[str, Any]
) -> None:
    """Oracle: PEFT's forward in fp32; the file's copy of the base's embedding is compared with the base."""
    adapter = save_variant(models[kind], tmp_path / "adapter", target_modules=modules, **config)
    if kind == "llama":
        assert any(".base_layer.weight" in name for name in tensors_of(adapter))
    assert_forward_is_pefts(models[kind], kind, adapter, tmp_path / "out")


def small_embedding(folder: Path, rows: int = 6, **factors: np.ndarray) -> Path:
    """LoRA of rank 2 on an embedding [rows, 6], without PEFT."""
    random = np.random.default_rng(3)
    made = {
        "lora_embedding_A": random.normal(0, 0.1, (2, rows)).astype(np.float32),
        "lora_embedding_B": random.normal(0, 0.1, (6, 2)).astype(np.float32),
        **factors,
    }
    write_lora(folder, {})
    write_tensors(
        folder / "adapter_model.safetensors",
        {f"base_model.model.model.embed_tokens.{name}": array for name, array in made.items()},
    )
    return folder


def embedding_base(folder: Path) -> Path:
    """An embedding [6, 6] of ones and a head of its own."""
    ones = np.ones((6, 6), np.float32)
    return write_base(folder, {"model.embed_tokens.weight": ones, "lm_head.weight": ones})


def test_a_square_embedding_is_a_table_of_rows(tmp_path: Path) -> None:
    """Oracle: W + 2·(B·A)ᵀ in float64; that other square matrices are [out, in] does not matter."""
    adapter = small_embedding(tmp_path / "lora")
    compose_folders(embedding_base(tmp_path / "base"), [(adapter, 1.0)], tmp_path / "out")
    a, b = (tensors_of(adapter)[f"base_model.model.model.embed_tokens.lora_embedding_{side}"] for side in "AB")
    exact = 1 + 2 * (b.astype(np.float64) @ a).T
    np.testing.assert_allclose(read_tensors(tmp_path / "out")["model.embed_tokens.weight"], exact, atol=1e-6)


def test_an_embedding_of_another_base_is_refused(tmp_path: Path) -> None:
    """The copy that PEFT saves differs from this base's rows: the adapter was trained on other weights."""
    adapter = small_embedding(tmp_path / "lora", **{"base_layer.weight": np.zeros((6, 6), np.float32)})
    with pytest.raises(TargetMismatchError, match="other values"):
        compose_folders(embedding_base(tmp_path / "base"), [(adapter, 1.0)], tmp_path / "out")


def test_factors_of_two_sorts_of_layer_are_refused(tmp_path: Path) -> None:
    """An embedding's A beside a linear layer's B is a damaged file."""
    adapter = small_embedding(tmp_path / "lora")
    arrays = tensors_of(adapter)
    prefix = "base_model.model.model.embed_tokens"
    arrays[f"{prefix}.lora_B.weight"] = arrays.pop(f"{prefix}.lora_embedding_B")
    write_tensors(adapter / "adapter_model.safetensors", arrays)
    with pytest.raises(CorruptFileError, match="one factor of an embedding"):
        open_adapter(adapter)


@pytest.mark.parametrize("whole", [False, True], ids=["lora", "modules_to_save"])
def test_a_resized_vocabulary_is_named_with_both_sizes(tmp_path: Path, whole: bool) -> None:
    """8 rows in the adapter, 6 in the base: the error says both, and that the base has to be resized."""
    if whole:
        extra = {"base_model.model.model.embed_tokens.weight": np.ones((8, 6), np.float32)}
        adapter = write_lora(tmp_path / "lora", {"lm_head": (6, 6)}, extra=extra)
    else:
        adapter = small_embedding(tmp_path / "lora", rows=8)
    with pytest.raises(TargetMismatchError, match=r"8 rows in the adapter and 6 in the base") as caught:
        compose_folders(embedding_base(tmp_path / "base"), [(adapter, 1.0)], tmp_path / "out")
    assert "resize_token_embeddings(8)" in str(caught.value.remedy)
