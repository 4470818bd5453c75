"""Tiny random models and adapters trained for nothing, made once a session; and an empty registry."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MakeLora = Callable[..., Path]


def save_model(model: Any, folder: Path, **options: Any) -> Path:
    """Save a transformers model, quietly."""
    model.save_pretrained(folder, **options)
    return folder


def random_lora(base: Path, folder: Path, *, seed: int = 0, auto: str = "AutoModelForCausalLM", **config: Any) -> Path:
    """A LoRA on the model at `base`, made by PEFT, with random B so that it changes something."""
    import peft
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif parameter.requires_grad and "lora_" not in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder)
    return folder


def llama_config(**changes: Any) -> Any:
    """A Llama of two layers with grouped-query attention."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            **changes,
        }
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Llama of 2 layers in one file."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    return save_model(LlamaForCausalLM(llama_config()).bfloat16(), tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_lora(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 4 on all linear layers of tiny_llama; its config names that folder."""
    return random_lora(tiny_llama, tmp_path_factory.mktemp("adapters") / "tiny-lora", target_modules="all-linear")


@pytest.fixture(scope="session")
def other_lora(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another LoRA on tiny_llama: rank 8, rsLoRA, query and value only."""
    return random_lora(
        tiny_llama,
        tmp_path_factory.mktemp("adapters") / "other-lora",
        seed=7,
        r=8,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty REGISTRY_HOME."""
    folder = tmp_path / "home"
    monkeypatch.setenv("REGISTRY_HOME", str(folder))
    monkeypatch.delenv("REGISTRY_DATABASE_URL", raising=False)
    monkeypatch.delenv("REGISTRY_URL", raising=False)
    return folder


@pytest.fixture
def registry(home: Path) -> Iterator[Any]:
    """An empty local registry."""
    from registry.services.local import open_registry

    opened = open_registry(home)
    yield opened
    opened.close()
