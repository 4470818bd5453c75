"""Layers used more than once: the composed model is as deep as PEFT's live one, each copy with its own change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from composer.adapters import open_adapter
from composer.checkpoint import open_checkpoint
from composer.errors import CorruptFileError, IncompatibleError, TargetMismatchError, UnsupportedAdapterError
from composer.exporters import prepare_export
from composer.plan import Term, make_plan
from composer.recipe import Recipe
from tests.composer.adapters.oracles import assert_composed_is_live, load_model, logits, random_adapter
from tests.conftest import llama_config, save_model
from tests.support import compose_folders, edit_json, plan_folders, read_tensors, reshard, weight_bytes

RANGES = [[0, 2], [1, 3], [0, 1]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float32 models of three layers."""
    from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
    made = {
        "llama": LlamaForCausalLM(llama_config(num_hidden_layers=3)),
        "mistral": MistralForCausalLM(
            MistralConfig(vocab_size=96, num_key_value_heads=1, tie_word_embeddings=False, sliding_window=4, **sizes)
        ),
        "bert": BertForMaskedLM(BertConfig(vocab_size=96, **sizes)),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("replicated")
    return {name: save_model(model, folder / name) for name, model in made.items()}


AUTO = {"llama": "AutoModelForCausalLM", "mistral": "AutoModelForCausalLM", "bert": "AutoModelForMaskedLM"}
TARGETS = {"llama": ["q_proj", "down_proj"], "mistral": ["q_proj", "v_proj"], "bert": ["query", "dense"]}


def deeper(base: Path, folder: Path, **options: Any) -> Path:
    """A LoRA on the layers 0 1 1 2 0 of the base."""
    config = peft.LoraConfig(r=3, target_modules=TARGETS[base.name], **{"layer_replication": RANGES, **options})
    return random_adapter(base, folder, config, auto=AUTO[base.name])


@pytest.mark.parametrize("name", list(AUTO))
def test_a_deeper_model_is_pefts_live_forward(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Five layers where the base has three."""
    adapter = deeper(bases[name], tmp_path / "adapter")
    assert_composed_is_live(bases[name], adapter, tmp_path / "out", auto=AUTO[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5


def test_shards_and_weights_and_methods_go_on_working(bases: dict[str, Path], tmp_path: Path) -> None:
    """A sharded base gives what one file gives; weight 0 is the base itself, as shallow as it is."""
    adapter = deeper(bases["llama"], tmp_path / "adapter")
    sharded = reshard(bases["llama"], tmp_path / "sharded")
    compose_folders(sharded, [(adapter, 0.5)], tmp_path / "out")
    compose_folders(bases["llama"], [(adapter, 0.5)], tmp_path / "one")
    assert read_tensors(tmp_path / "out").keys() == read_tensors(tmp_path / "one").keys()
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(load_model(tmp_path / "one")))
    compose_folders(bases["llama"], [(adapter, 0.0)], tmp_path / "none")
    compose_folders(bases["llama"], [], tmp_path / "plain")
    assert weight_bytes(tmp_path / "none") == weight_bytes(tmp_path / "plain")
    assert json.loads((tmp_path / "none" / "config.json").read_text())["num_hidden_layers"] == 3


def test_adapters_of_models_of_different_depth_do_not_go_together(bases: dict[str, Path], tmp_path: Path) -> None:
    """Which of the copies the other would change is not defined; two that agree are added."""
    one = deeper(bases["llama"], tmp_path / "one")
    plain = deeper(bases["llama"], tmp_path / "plain", layer_replication=None)
    with pytest.raises(IncompatibleError, match="different depth"):
        plan_folders(bases["llama"], [(one, 1.0), (plain, 1.0)])
    assert plan_folders(bases["llama"], [(one, 1.0), (one, 1.0)]).touched == 10


@pytest.mark.parametrize("changes", [{"model_type": "deepseek_v3"}, {"layer_types": ["full_attention"] * 3}])
def test_only_architectures_whose_layers_are_alike_are_replicated(
    bases: dict[str, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Elsewhere a layer may depend on its place."""
    adapter = deeper(bases["llama"], tmp_path / "adapter")
    base = reshard(bases["llama"], tmp_path / "base", 1)
    edit_json(base / "config.json", **changes)
    with pytest.raises(UnsupportedAdapterError, match="depends on its place"):
        plan_folders(base, [(adapter, 1.0)])


@pytest.mark.parametrize("ranges", [[[0, 2], [1]], [[2, 1]], "0-2", [[0.0, 2]], [[-1, 2]], [[0, 1]], [[0, 10**9]]])
def test_ranges_that_are_none_are_damaged(bases: dict[str, Path], tmp_path: Path, ranges: Any) -> None:
    """Also where the adapter has more layers than they make."""
    adapter = deeper(bases["llama"], tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", layer_replication=ranges)
    with pytest.raises(CorruptFileError):
        open_adapter(adapter)


def test_a_base_with_too_few_layers_is_a_mismatch(bases: dict[str, Path], tmp_path: Path) -> None:
    """Both numbers are named."""
    adapter = deeper(bases["llama"], tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", layer_replication=[[0, 4], [3, 5]])
    with pytest.raises(TargetMismatchError, match="uses layer 4, and the base has 3 layers"):
        plan_folders(bases["llama"], [(adapter, 1.0)])


def test_a_lora_of_a_deeper_model_is_not_exported_as_one_of_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's file names layers that the base does not have."""
    adapter = open_adapter(deeper(bases["llama"], tmp_path / "adapter"))
    recipe = Recipe(base="b", adapters=({"ref": "a"},), export="peft")
    with pytest.raises(IncompatibleError, match="copies of a layer"):
        prepare_export(make_plan(recipe, open_checkpoint(bases["llama"]), [Term("a", adapter, 1.0)]))


def test_the_catalogue_ties_it_to_the_bases_own_layers(bases: dict[str, Path], tmp_path: Path, registry: Any) -> None:
    """Exact on its base, whose three layers are what it needs."""
    from registry.schemas import Level

    registry.add_base(bases["llama"], name="llama")
    registry.publish(deeper(bases["llama"], tmp_path / "adapter"), name="team/deep", base="llama")
    assert registry.check("team/deep", "llama").level is Level.EXACT
    targets = {target.parameter for target in open_adapter(tmp_path / "adapter").signature.targets}
    assert len(targets) == 6
