"""Perplexity before and after: against a closed form, transformers' own loss, and what cannot be compared."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer import probe as probing
from composer.errors import (
    NonFiniteError,
    NotFoundError,
    TypedError,
    UnsupportedArchitectureError,
    UsageError,
)
from composer.loading import load_model
from composer.probe import perplexity, probe_digest
from composer.recipe import Export
from composer.run import compose
from tests.support import add_words, edit_json, plan_folders

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bottlenecks"
LLAMA = FIXTURES / "llama"
TEXT = " ".join(f"w{index % 7}" for index in range(30))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer of 24 words."""
    folder = tmp_path_factory.mktemp("probe") / "base"
    return add_words(shutil.copytree(LLAMA / "base", folder), 24)


def ids() -> torch.Tensor:
    """The text's tokens."""
    return torch.tensor([[index % 7 for index in range(30)]])


def test_perplexity_is_the_exponential_of_transformers_own_loss(base: Path) -> None:
    """One window: the loss that the model itself computes."""
    found, count = perplexity(base, TEXT)
    with torch.no_grad():
        loss = load_model(base)(input_ids=ids(), labels=ids()).loss
    assert count == 29
    assert math.isclose(found, math.exp(float(loss)), rel_tol=1e-5)


def test_windows_are_counted_together(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of each is not predicted; the mean is over all others."""
    monkeypatch.setattr(probing, "WINDOW", 12)
    found, count = perplexity(base, TEXT)
    model, total = load_model(base), 0.0
    with torch.no_grad():
        for start in (0, 12, 24):
            window = ids()[:, start : start + 12]
            total += float(model(input_ids=window, labels=window).loss) * (window.shape[1] - 1)
    assert count == 27
    assert math.isclose(found, math.exp(total / 27), rel_tol=1e-5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(base: Path, tmp_path: Path) -> None:
    """A head of zeros gives every token 1/24."""
    shutil.copytree(base, tmp_path / "flat")
    tensors = load_file(tmp_path / "flat" / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros_like(tensors["lm_head.weight"])},
              tmp_path / "flat" / "model.safetensors", {"format": "pt"})  # fmt: skip
    assert math.isclose(perplexity(tmp_path / "flat", TEXT)[0], 24, rel_tol=1e-6)


@pytest.mark.parametrize(("case", "export"), [("lora", Export.SAFETENSORS), ("houlsby", Export.BUNDLE)])
def test_both_perplexities_are_in_the_record(case: str, export: Export, base: Path, tmp_path: Path) -> None:
    """Of the base and of the result, bottlenecks included; the same text over the same inputs is the same record."""
    plan = plan_folders(base, [(LLAMA / case, 1.0)], export=export)
    record = compose(plan, tmp_path / "out", text=TEXT).record
    found = record["probe"]
    assert (found["text_sha256"], found["tokens"]) == (probe_digest(TEXT), 29)
    assert math.isclose(found["perplexity"]["base"], perplexity(base, TEXT)[0], rel_tol=1e-5)
    assert math.isclose(found["perplexity"]["composed"], perplexity(tmp_path / "out", TEXT)[0], rel_tol=1e-5)
    assert found["perplexity"]["base"] != found["perplexity"]["composed"]
    assert json.loads((tmp_path / "out" / "composition.json").read_text()) == record
    assert compose(plan, tmp_path / "again", text=TEXT).record == record


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("window", [12, 512])
def test_virtual_tokens_stand_before_every_window(
    kind: str, window: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of PEFT's live model on the same windows; from words of the vocabulary, and from files."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    monkeypatch.setattr(probing, "WINDOW", window)
    torch.manual_seed(3)
    cls = PromptTuningConfig if kind == "PROMPT_TUNING" else PrefixTuningConfig
    live = get_peft_model(load_model(base), cls(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    live.save_pretrained(tmp_path / "adapter")
    total = 0.0
    with torch.no_grad():
        for part in ids().split(window, dim=1):
            logits = live(input_ids=part, attention_mask=torch.ones_like(part)).logits[0, -part.shape[1] : -1]
            total += float(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum"))
    for export in [Export.BUNDLE] + [Export.SAFETENSORS] * (kind == "PROMPT_TUNING"):
        plan = plan_folders(base, [(tmp_path / "adapter", 1.0)], export=export)
        found = compose(plan, tmp_path / export, text=TEXT).record["probe"]
        assert found["tokens"] == 30 - len(ids().split(window, dim=1))
        assert math.isclose(found["perplexity"]["composed"], math.exp(total / found["tokens"]), rel_tol=1e-5)
        assert not math.isclose(found["perplexity"]["base"], found["perplexity"]["composed"], rel_tol=1e-3)


def test_a_composition_without_adapters_changes_nothing(base: Path, tmp_path: Path) -> None:
    """Both numbers are one."""
    found = compose(plan_folders(base), tmp_path / "out", text=TEXT).record["probe"]["perplexity"]
    assert found["base"] == found["composed"]


def refused(error: type[TypedError], message: str, plan: Any, out: Path, text: str = TEXT) -> None:
    """Nothing is published then."""
    with pytest.raises(error, match=message):
        compose(plan, out, text=text)
    assert not out.exists()


def test_what_has_no_perplexity_is_refused(base: Path, tmp_path: Path) -> None:
    """An encoder, a LoRA alone, no tokenizer, a text of one token, a model of NaN."""
    lora = [(LLAMA / "lora", 1.0)]
    out = tmp_path / "out"
    refused(UnsupportedArchitectureError, "BertModel", plan_folders(FIXTURES / "bert-encoder" / "base"), out)
    refused(UsageError, "LoRA alone", plan_folders(base, lora, export=Export.PEFT), out)
    refused(NotFoundError, "no tokenizer", plan_folders(LLAMA / "base", lora), out)
    refused(UsageError, "1 tokens", plan_folders(base, lora), out, text="w1")
    shutil.copytree(base, tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    refused(NonFiniteError, "no finite perplexity", plan_folders(tmp_path / "broken"), out)


def test_a_quantised_base_is_not_compared(base: Path, tmp_path: Path) -> None:
    """transformers would need the library that quantised it."""
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "quantised" / "tiny-llama-nf4", tmp_path / "nf4")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "nf4" / name)
    refused(UnsupportedArchitectureError, "not quantised", plan_folders(tmp_path / "nf4"), tmp_path / "out")


def test_a_short_context_bounds_the_windows(base: Path, tmp_path: Path) -> None:
    """No window is longer than the model's positions."""
    shutil.copytree(base, tmp_path / "short")
    edit_json(tmp_path / "short" / "config.json", max_position_embeddings=10)
    assert perplexity(tmp_path / "short", TEXT)[1] == 27
