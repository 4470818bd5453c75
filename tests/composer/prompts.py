"""Adapters of virtual tokens made by PEFT on tiny models, and PEFT's own forward and generation with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.conftest import llama_config

TOKENS = 5  # virtual ones
VOCABULARY = 128
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # case: (PEFT's config class, options)
    "prompt-tuning": ("PromptTuningConfig", {}),
    "p-tuning-mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 16}),
    "p-tuning-lstm": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"},
    ),
    "cpt": (
        "CPTConfig",
        {"cpt_token_ids": [9, 8, 7, 6, 5], "cpt_mask": [1] * TOKENS, "cpt_tokens_type_mask": [1, 2, 3, 1, 2]},
    ),
    "prefix-tuning": ("PrefixTuningConfig", {}),
    "prefix-tuning-projection": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 24}),
    "prefix-tuning-cartridge": ("CartridgeConfig", {"num_frozen_tokens": 1}),
}
MULTITASK = ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2})
PROMPTS = [case for case in CASES if not case.startswith("prefix")]
PREFIXES = [case for case in CASES if case.startswith("prefix")]


def make_model(name: str, *, tied: bool = False) -> Any:
    """A tiny float32 model whose numbers are all far from their defaults: llama, gpt2 or a classifier, bert."""
    import transformers

    torch.manual_seed(11)
    if name == "llama":
        model = transformers.LlamaForCausalLM(llama_config(tie_word_embeddings=tied, initializer_range=0.2))
    elif name == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=32,
                n_layer=3,
                n_head=2,
                vocab_size=VOCABULARY,
                n_positions=128,
                bos_token_id=1,
                eos_token_id=2,
                initializer_range=0.2,
            )  # fmt: skip
        )
    else:
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                num_labels=3,
                vocab_size=VOCABULARY,
                max_position_embeddings=64,
                initializer_range=0.2,
            )  # fmt: skip
        )
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def adapt(model: Any, case: str, folder: Path, *, seed: int = 5, tokens: int = TOKENS) -> Any:
    """Put PEFT's adapter of a case on `model`, far from its initial values, and save it; returns PEFT's model."""
    import peft

    config, options = CASES.get(case, MULTITASK)
    task = "SEQ_CLS" if "Classification" in type(model).__name__ else "CAUSAL_LM"
    torch.manual_seed(seed)
    sizes = {} if case == "cpt" else {"num_virtual_tokens": tokens}
    adapted = peft.get_peft_model(model, getattr(peft, config)(task_type=task, **sizes, **options))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return adapted.eval()


def live(model: Any, folder: Path) -> Any:
    """PEFT's model with a saved adapter."""
    import peft

    return peft.PeftModel.from_pretrained(model, folder).eval()


def sample_ids(rows: int = 2, length: int = 9) -> Tensor:
    """Fixed tokens, none of them special."""
    return torch.arange(rows * length).reshape(rows, length) * 7 % (VOCABULARY - 3) + 3


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Logits of the real tokens, or of a classifier."""
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits
    return found if found.ndim == 2 else found[:, -ids.shape[1] :]


def greedy(model: Any, ids: Tensor, count: int = 32, **options: Any) -> Tensor:
    """The next `count` most likely tokens; none ends the text."""
    inputs = options or {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model.generation_config.eos_token_id = None
    found = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return found[:, -count:]
