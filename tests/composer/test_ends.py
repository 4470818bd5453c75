"""Tied ends taken apart: an adapter on one of them is PEFT's live forward, which its own merge is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from composer.adapters import open_adapter
from composer.checkpoint import open_checkpoint
from composer.checkpoint_delta import make_delta
from composer.errors import IncompatibleError, TiedWeightsError
from composer.exporters import prepare_export
from composer.places import places
from composer.plan import Term, make_plan
from composer.recipe import Dtype, Recipe
from tests.composer.adapters.oracles import assert_composed_is_live, live_logits, load_model, logits, random_adapter
from tests.conftest import llama_config, save_model
from tests.support import compose_folders, edit_json, plan_folders, read_tensors, reshard, weight_bytes, write_base


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float32 models of three architectures whose ends are tied."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(6)
    small = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = {
        "llama": LlamaForCausalLM(llama_config(tie_word_embeddings=True)),
        "qwen2": Qwen2ForCausalLM(
            Qwen2Config(hidden_size=32, intermediate_size=48, num_key_value_heads=1, tie_word_embeddings=True, **small)
        ),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=32)),
    }
    folder = tmp_path_factory.mktemp("tied")
    return {name: save_model(model, folder / name) for name, model in made.items()}


LORA = {"r": 3, "lora_alpha": 5}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("qwen2", {"target_modules": ["v_proj", "lm_head"]}),
    ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"], "fan_in_fan_out": True}),
]


@pytest.mark.parametrize(("base", "config"), CONFIGS)
def test_an_untied_composition_is_pefts_live_forward(
    bases: dict[str, Path], tmp_path: Path, base: str, config: dict[str, Any]
) -> None:
    """Both ends are written, the config unties them; without the option it is refused, and the remedy names it."""
    adapter = random_adapter(bases[base], tmp_path / "adapter", peft.LoraConfig(**LORA, **config))
    with pytest.raises(TiedWeightsError) as caught:
        plan_folders(bases[base], [(adapter, 1.0)])
    assert "--untie" in str(caught.value.remedy)
    assert_composed_is_live(bases[base], adapter, tmp_path / "out", untie=True)
    assert "lm_head.weight" in read_tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    record = json.loads((tmp_path / "out" / "composition.json").read_text())
    assert record["config"] == {"tie_word_embeddings": False}


def head_lora(base: Path, folder: Path) -> Path:
    """A LoRA on the head and on q_proj."""
    return random_adapter(base, folder, peft.LoraConfig(**LORA, target_modules=["q_proj", "lm_head"]))


def test_the_option_changes_nothing_where_the_tie_stays(bases: dict[str, Path], tmp_path: Path) -> None:
    """An adapter of neither end, and trained rows of both: the same bytes with the option and without it."""
    for name, config in {"plain": {}, "tokens": {"trainable_token_indices": [3, 9]}}.items():
        lora = peft.LoraConfig(**LORA, target_modules=["q_proj"], **config)
        adapter = random_adapter(bases["llama"], tmp_path / name, lora)
        for untie in (False, True):
            compose_folders(bases["llama"], [(adapter, 1.0)], tmp_path / f"{name}-{untie}", untie=untie)
        assert weight_bytes(tmp_path / f"{name}-False") == weight_bytes(tmp_path / f"{name}-True")


def test_the_head_of_a_sharded_base_lies_beside_the_embedding(bases: dict[str, Path], tmp_path: Path) -> None:
    """The index names it; the result computes what that of one file computes."""
    adapter = head_lora(bases["llama"], tmp_path / "adapter")
    sharded = reshard(bases["llama"], tmp_path / "sharded")
    compose_folders(sharded, [(adapter, 1.0)], tmp_path / "out", untie=True)
    places_of = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert places_of["lm_head.weight"] == places_of["model.embed_tokens.weight"]
    torch.testing.assert_close(
        logits(load_model(tmp_path / "out")), live_logits(bases["llama"], adapter), atol=1e-5, rtol=1e-5
    )


def test_rows_of_both_ends_and_a_lora_on_one_go_together(bases: dict[str, Path], tmp_path: Path) -> None:
    """Oracle: each adapter's own effect on each end, in float64: the rows change both, the LoRA the head alone."""
    base = bases["llama"]
    rows = random_adapter(base, tmp_path / "rows", peft.TrainableTokensConfig(token_indices=[4, 8]))
    lora = random_adapter(base, tmp_path / "lora", peft.LoraConfig(**LORA, target_modules=["lm_head"]))
    compose_folders(base, [(rows, 1.0), (lora, 1.0)], tmp_path / "out", dtype=Dtype.FP32, untie=True)
    old = read_tensors(base)["model.embed_tokens.weight"].double()
    new = {name: spec.read().astype(np.float64) for name, spec in open_adapter(rows).header.tensors.items()}
    factors = {name: spec.read().astype(np.float64) for name, spec in open_adapter(lora).header.tensors.items()}
    embedding = old.clone()
    embedding[[4, 8]] = torch.from_numpy(new["base_model.model.model.embed_tokens.trainable_tokens_delta"])
    prefix = "base_model.model.lm_head"
    product = factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"] * LORA["lora_alpha"] / LORA["r"]
    written = read_tensors(tmp_path / "out")
    torch.testing.assert_close(written["model.embed_tokens.weight"].double(), embedding, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        written["lm_head.weight"].double(), embedding + torch.from_numpy(product), atol=1e-6, rtol=1e-6
    )


def test_a_fine_tune_that_keeps_the_tie_does_not_go_with_an_adapter_that_parts_it(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """The bits of a delta are of one tensor; which end they belong to would be a guess."""
    base = bases["llama"]
    tuned = load_model(base)
    tuned.model.embed_tokens.weight.data += 0.1
    make_delta(open_checkpoint(save_model(tuned, tmp_path / "tuned")), open_checkpoint(base), tmp_path / "delta")
    adapter = head_lora(base, tmp_path / "adapter")
    with pytest.raises(IncompatibleError, match="keeps it tied"):
        plan_folders(base, [(adapter, 1.0), (tmp_path / "delta", 1.0)], untie=True)


def test_only_decoders_are_untied(tmp_path: Path) -> None:
    """An encoder-decoder scales its output by the tie as well: the refusal stays, and says so."""
    ones = np.ones((6, 4), np.float32)
    base = write_base(tmp_path / "base", {"shared.weight": ones, "encoder.q.weight": ones})
    edit_json(base / "config.json", architectures=["T5ForConditionalGeneration"], tie_word_embeddings=True)
    from tests.support import write_lora

    extra = {"base_model.model.shared.weight": ones}
    adapter = write_lora(tmp_path / "lora", {"encoder.q": (6, 4)}, extra=extra)
    with pytest.raises(TiedWeightsError) as caught:
        plan_folders(base, [(adapter, 1.0)], untie=True)
    assert "only decoders" in str(caught.value.remedy)


def test_a_lora_cannot_untie_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """--export peft writes no weights of the base, so nothing could hold the second end."""
    adapter = head_lora(bases["llama"], tmp_path / "adapter")
    recipe = Recipe(base="llama", adapters=({"ref": "a"},), export="peft", untie=True)
    plan = make_plan(recipe, open_checkpoint(bases["llama"]), [Term("a", open_adapter(adapter), 1.0)])
    with pytest.raises(IncompatibleError, match="cannot untie"):
        prepare_export(plan)


def test_a_tied_head_is_a_place_for_adapters_of_decoders_alone(tmp_path: Path, bases: dict[str, Path]) -> None:
    """An encoder without a head has no place for one; neither has a base whose head is stored two of them."""
    assert places(open_checkpoint(bases["gpt2"]))["lm_head.weight"] == (96, 32)
    ones = np.ones((6, 4), np.float32)
    encoder = write_base(tmp_path / "encoder", {"embeddings.word_embeddings.weight": ones})
    edit_json(encoder / "config.json", architectures=["BertModel"])
    assert set(places(open_checkpoint(encoder))) == {"embeddings.word_embeddings.weight"}
    free = write_base(tmp_path / "free", {"model.embed_tokens.weight": ones, "lm_head.weight": ones})
    assert places(open_checkpoint(free)) == open_checkpoint(free).shapes
