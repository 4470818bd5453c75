"""Adapters on T5 and BART: the composition's logits against PEFT's live forward, decoder input and padding included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from composer.checkpoint import open_checkpoint
from composer.ends import tied
from composer.errors import IncompatibleError, TargetMismatchError, TiedWeightsError
from composer.extract import extract_lora
from composer.recipe import Dtype
from tests.composer.adapters.oracles import random_adapter
from tests.composer.seq2seq import IDS, MASK, build
from tests.conftest import save_model
from tests.support import compose_folders, edit_json, plan_folders

AUTO = "AutoModelForSeq2SeqLM"
CROSS_T5, CROSS_BART = r".*decoder.*EncDecAttention\.(q|k|v)", r".*decoder.*encoder_attn\.(q|k|v)_proj"
SHARED = "shared.weight"
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # case: (base, PEFT's config class, options)
    "t5-lora": ("t5", "LoraConfig", {"r": 3}),
    "t5-lora-cross": ("t5", "LoraConfig", {"r": 3, "target_modules": CROSS_T5}),
    "t5-lora-positions": ("t5", "LoraConfig", {"r": 3, "target_modules": ["q", "relative_attention_bias"]}),
    "t5-lora-tokens": ("t5", "LoraConfig", {"r": 3, "target_modules": ["q"], "trainable_token_indices": [5, 7]}),
    "t5-ia3": ("t5", "IA3Config", {}),
    "flan-t5-lora": ("flan-t5", "LoraConfig", {"r": 3, "target_modules": "all-linear"}),
    "flan-t5-lora-head": ("flan-t5", "LoraConfig", {"r": 3, "target_modules": ["v", "lm_head"]}),
    "flan-t5-saved-head": ("flan-t5", "LoraConfig", {"r": 3, "target_modules": ["q"], "modules_to_save": ["lm_head"]}),
    "flan-t5-dora": ("flan-t5", "LoraConfig", {"r": 3, "target_modules": ["q", "wo"], "use_dora": True}),
    "flan-t5-ia3": ("flan-t5", "IA3Config", {}),
    "bart-lora": ("bart", "LoraConfig", {"r": 3, "target_modules": "all-linear", "bias": "all"}),
    "bart-lora-cross": ("bart", "LoraConfig", {"r": 3, "target_modules": CROSS_BART}),
    "bart-lora-tokens": ("bart", "LoraConfig", {"r": 3, "trainable_token_indices": [5, 7]}),
    "bart-ia3": ("bart", "IA3Config", {}),
    "mbart-lora": ("mbart", "LoraConfig", {"r": 3, "target_modules": ["k_proj", "fc1"]}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models in float32."""
    root = tmp_path_factory.mktemp("bases")
    return {name: save_model(build(name), root / name) for name in ("t5", "flan-t5", "bart", "mbart")}


def load(folder: Path) -> Any:
    """The model in a folder, in float32."""
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    """Logits [2, 4, vocabulary] of a batch whose second row is padded."""
    inputs = {"input_ids": torch.from_numpy(IDS), "attention_mask": torch.from_numpy(MASK)}
    with torch.no_grad():
        return model.eval()(
            **inputs, decoder_input_ids=torch.tensor([[0, 5, 9, 100], [0, 7, 7, 33]]), use_cache=False
        ).logits


def adapt(base: Path, folder: Path, cls: str, options: dict[str, Any]) -> Path:
    """An adapter with random weights, saved by PEFT."""
    return random_adapter(base, folder, getattr(peft, cls)(task_type="SEQ_2_SEQ_LM", **options), auto=AUTO)


@pytest.mark.parametrize("case", CASES)
def test_composition_computes_what_peft_computes(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Encoder, decoder, cross-attention, positions, trained tokens of a tied embedding, and a head of its own."""
    name, cls, options = CASES[case]
    adapter = adapt(bases[name], tmp_path / "adapter", cls, options)
    compose_folders(bases[name], [(adapter, 1.0)], tmp_path / "out", dtype=Dtype.FP32)
    live = logits(peft.PeftModel.from_pretrained(load(bases[name]), adapter))
    scale = float(live.abs().max())
    torch.testing.assert_close(logits(load(tmp_path / "out")), live, atol=1e-5 * scale, rtol=0)
    assert (live - logits(load(bases[name]))).abs().max() > 1e-2 * scale


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("t5", {"target_modules": ["shared"]}, TiedWeightsError),
        ("t5", {"target_modules": ["lm_head"]}, TiedWeightsError),
        ("bart", {"target_modules": ["lm_head"]}, TiedWeightsError),
        ("flan-t5", {"target_modules": ["shared"]}, TiedWeightsError),
        ("flan-t5", {"target_modules": ["q"], "modules_to_save": ["shared"]}, TiedWeightsError),
        # PEFT reaches into the head as well where the config says tied, as transformers 5 says of every T5.
        ("flan-t5", {"target_modules": ["q"], "trainable_token_indices": [5, 7]}, TiedWeightsError),
        ("flan-t5", {"target_modules": ["embed_tokens"]}, TargetMismatchError),
    ],
)
def test_changes_of_what_encoder_and_decoder_share_are_refused(
    name: str, options: dict[str, Any], error: type[Exception], bases: dict[str, Path], tmp_path: Path
) -> None:
    """An adapter on the shared embedding reaches other modules in transformers 4 than in 5: no merge is right for both."""
    adapter = adapt(bases[name], tmp_path / "adapter", "LoraConfig", {"r": 2, **options})
    with pytest.raises(error):
        plan_folders(bases[name], [(adapter, 1.0)])


def test_a_t5_with_a_head_of_its_own_is_not_tied_whatever_its_config_says(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """transformers 5 saves true for all of them; a config of transformers 4 says which."""
    assert json.loads((bases["flan-t5"] / "config.json").read_text())["tie_word_embeddings"] is True
    assert not tied(open_checkpoint(bases["flan-t5"]))
    assert tied(open_checkpoint(bases["t5"]))
    assert tied(open_checkpoint(bases["bart"]))
    older = save_model(build("flan-t5"), tmp_path / "older")
    edit_json(older / "config.json", tie_word_embeddings=False, scale_decoder_outputs=True)
    assert not tied(open_checkpoint(older))
    multilingual = save_model(build("mt5"), tmp_path / "mt5")
    assert not tied(open_checkpoint(multilingual))


def test_no_lora_is_extracted_of_a_shared_embedding(bases: dict[str, Path], tmp_path: Path) -> None:
    """What compose would refuse is not written either."""
    tuned = load(bases["flan-t5"])
    tuned.shared.weight.data += 0.1 * torch.randn_like(tuned.shared.weight)
    save_model(tuned, tmp_path / "tuned")
    with pytest.raises(IncompatibleError, match=SHARED):
        extract_lora(open_checkpoint(tmp_path / "tuned"), open_checkpoint(bases["flan-t5"]), tmp_path / "out", rank=2)
