"""PEFT's live forward as the oracle of a composition: adapters with random weights, and logits to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from composer.recipe import Dtype
from tests.support import compose_folders

CAUSAL = "AutoModelForCausalLM"


def load_model(folder: Path, auto: str = CAUSAL) -> Any:
    """The model in a folder, in float32."""
    return getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32)


def random_adapter(base: Path, folder: Path, config: Any, *, auto: str = CAUSAL, vocabulary: int | None = None) -> Path:
    """An adapter by PEFT whose every trained parameter is moved far from where it began.

    vocabulary: the rows that the embeddings are resized to before the training.
    """
    torch.manual_seed(11)
    model = load_model(base, auto)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


def logits(model: Any, tokens: int = 96) -> torch.Tensor:
    """The logits of two sequences of twelve tokens below `tokens`."""
    inputs = torch.arange(24).reshape(2, 12) * 7 % tokens
    with torch.no_grad():
        return model.eval()(input_ids=inputs).logits


def live_logits(base: Path, adapter: Path, *, auto: str = CAUSAL, tokens: int = 96) -> torch.Tensor:
    """The logits of the base with the adapter loaded by PEFT, not merged."""
    return logits(peft.PeftModel.from_pretrained(load_model(base, auto), adapter), tokens)


def assert_composed_is_live(base: Path, adapter: Path, out: Path, *, auto: str = CAUSAL, **options: Any) -> None:
    """The composition's logits are those of PEFT's live forward to 1e-5, which the adapter moved by far more."""
    compose_folders(base, [(adapter, 1.0)], out, dtype=Dtype.FP32, **options)
    live = live_logits(base, adapter, auto=auto)
    torch.testing.assert_close(logits(load_model(out, auto)), live, atol=1e-5, rtol=1e-5)
    assert (live - logits(load_model(base, auto))).abs().max() > 5e-3
