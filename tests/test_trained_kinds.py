"""The kinds that people use most, each trained for a few steps on SmolLM2-135M and composed.

Oracle: PEFT's live forward of the adapter under training, in float32. A trained adapter is not like a random one: its
parts have moved together from where they began, AdaLoRA's by what its own allocator left.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import compose_folders

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
ATTENTION = ["q_proj", "v_proj"]
STEPS = 3
TEXT = (
    "The adapters of this registry are tied to the weights that they were trained on, by hash.",
    "A merge is a sum in float32, rounded once; everything else is a matter of taste.",
)
KINDS: dict[str, tuple[str, dict[str, Any], float]] = {
    # kind: (PEFT's config class, options, learning rate)
    "lora": ("LoraConfig", {"r": 8, "lora_alpha": 16}, 1e-2),
    "rslora": ("LoraConfig", {"r": 8, "lora_alpha": 8, "use_rslora": True}, 1e-2),
    "dora": ("LoraConfig", {"r": 8, "lora_alpha": 16, "use_dora": True}, 1e-2),
    "adalora": (
        "AdaLoraConfig",
        {"init_r": 6, "target_r": 2, "lora_alpha": 16, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": STEPS},
        3e-2,
    ),
    "ia3": (
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        5e-2,
    ),
    "loha": ("LoHaConfig", {"r": 4, "alpha": 8}, 3e-2),
    "lokr": ("LoKrConfig", {"r": 8, "alpha": 8}, 1e-2),
    "oft": ("OFTConfig", {"oft_block_size": 32}, 3e-3),
    "vera": ("VeraConfig", {"r": 64, "save_projection": False}, 1e-1),
    "pissa": ("LoraConfig", {"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa"}, 3e-3),
    "ln-tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}, 1e-2),
}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, built as the demo builds it, in float32: what PiSSA takes off the base is not rounded."""
    built = tmp_path_factory.mktemp("trained") / "smollm2"
    script = ROOT / "examples" / "build_base.py"
    subprocess.run([sys.executable, script, "smollm2", built], check=True, capture_output=True)
    folder = built.with_name("smollm2-fp32")
    load(built).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(built / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def tokens(smollm2: Path) -> torch.Tensor:
    """The text, [2, 16] token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return torch.tensor([tokenizer(line)["input_ids"][:16] for line in TEXT])


def load(folder: Path) -> Any:
    """A causal language model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[2, 16, vocabulary]."""
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


@pytest.fixture(scope="module")
def untrained(smollm2: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The base's own logits."""
    return logits(load(smollm2), tokens)


def train(kind: str, base: Path, tokens: torch.Tensor, folder: Path) -> torch.Tensor:
    """Train and save an adapter; returns the logits of the model it was trained in."""
    import peft

    config, options, rate = KINDS[kind]
    torch.manual_seed(1)
    model = peft.get_peft_model(
        load(base), getattr(peft, config)(**{"target_modules": ATTENTION, "task_type": "CAUSAL_LM", **options})
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for step in range(STEPS):
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        if kind == "adalora":
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return logits(model, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_adapter_composed_is_the_model_it_was_trained_in(
    kind: str, smollm2: Path, tokens: torch.Tensor, untrained: torch.Tensor, tmp_path: Path
) -> None:
    """Logits to 1e-4 of their largest; what the training changed is far above that."""
    wanted = train(kind, smollm2, tokens, tmp_path / "adapter")
    compose_folders(smollm2, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    found = logits(load(tmp_path / "out"), tokens)
    shutil.rmtree(tmp_path / "out")
    scale = wanted.abs().max()
    assert (untrained - wanted).abs().max() > 1e-2 * scale
    assert (found - wanted).abs().max() < 1e-4 * scale
