"""Adapters whose training resized the vocabulary: both ends, the config and the tokenizer go along."""

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
from composer.errors import CorruptFileError, IncompatibleError, TargetMismatchError, TiedWeightsError
from composer.exporters import prepare_export
from composer.plan import Term, make_plan
from composer.recipe import Dtype, Recipe
from tests.composer.adapters.oracles import load_model, logits, random_adapter
from tests.conftest import llama_config, save_model
from tests.support import compose_folders, edit_json, plan_folders, read_tensors, write_base, write_lora, write_tensors

LARGER = 104


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two float32 Llamas of 96 tokens, one with tied ends, each with a tokenizer's files."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("resized")
    made = {}
    for name in ("free", "tied"):
        config = llama_config(vocab_size=96, tie_word_embeddings=name == "tied")
        made[name] = save_model(LlamaForCausalLM(config), folder / name)
        for file in ("tokenizer.json", "vocab.json", "tokenizer_config.json"):
            (made[name] / file).write_text('{"of": "the base"}')
    return made


def make(base: Path, folder: Path, size: int = LARGER, **options: Any) -> Path:
    """A LoRA of a model of `size` tokens, with a tokenizer beside it."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
    random_adapter(base, folder, config, vocabulary=size)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_text('{"of": "the adapter"}')
    return folder


def live(base: Path, adapter: Path, size: int = LARGER) -> torch.Tensor:
    """PEFT's forward on the base, resized as for the training, with tokens that the base lacks."""
    model = load_model(base)
    model.resize_token_embeddings(size, mean_resizing=False)
    return logits(peft.PeftModel.from_pretrained(model, adapter), size)


BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}
TOKENS = {"trainable_token_indices": [14, 56]}


@pytest.mark.parametrize(("name", "options", "untie"), [
    ("free", {}, False),
    ("free", BOTH, False),
    ("tied", {}, False),
    ("tied", {}, True),
    ("tied", BOTH, True),
    ("free", TOKENS, False),
    ("tied", TOKENS, False),
])  # fmt: skip
@pytest.mark.parametrize("size", [LARGER, 64])
def test_a_resized_vocabulary_is_pefts_live_forward(
    bases: dict[str, Path], tmp_path: Path, name: str, options: dict[str, Any], untie: bool, size: int
) -> None:
    """Larger or smaller, the new tokens' logits included; a tie that the training kept is kept."""
    adapter = make(bases[name], tmp_path / "adapter", size, **options)
    compose_folders(bases[name], [(adapter, 1.0)], tmp_path / "out", dtype=Dtype.FP32, untie=untie)
    wanted = live(bases[name], adapter, size)
    torch.testing.assert_close(logits(load_model(tmp_path / "out"), size), wanted, atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == size == wanted.shape[-1]
    assert ("lm_head.weight" in read_tensors(tmp_path / "out")) == (name == "free" or options == BOTH)


def larger(base: Path, folder: Path) -> Path:
    """The base, resized as for the training and saved."""
    model = load_model(base)
    torch.manual_seed(11)
    model.resize_token_embeddings(LARGER, mean_resizing=False)
    return save_model(model, folder)


def test_rows_alone_bring_the_vocabulary_of_a_tied_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT saves the pair with the rows, under both names."""
    config = peft.TrainableTokensConfig(token_indices=[14, 98])
    adapter = random_adapter(bases["tied"], tmp_path / "adapter", config, vocabulary=LARGER)
    (adapter / "tokenizer.json").write_text("{}")
    compose_folders(bases["tied"], [(adapter, 1.0)], tmp_path / "out")
    wanted = live(bases["tied"], adapter)
    torch.testing.assert_close(logits(load_model(tmp_path / "out"), LARGER), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["free", "tied"])
@pytest.mark.parametrize(
    "config",
    [peft.TrainableTokensConfig(token_indices=[14, 98]), peft.LoraConfig(r=2, target_modules=["q_proj"], **TOKENS)],
    ids=["rows", "lora"],
)
def test_a_base_that_was_resized_takes_the_adapter_too(
    bases: dict[str, Path], tmp_path: Path, name: str, config: Any
) -> None:
    """What the refusal asks for works: the matrix in the file takes the place of one of its size, rows and all."""
    adapter = random_adapter(bases[name], tmp_path / "adapter", config, vocabulary=LARGER)
    if name == "free":
        with pytest.raises(TargetMismatchError, match=r"rows in the adapter and 96 in the base|no tokenizer"):
            plan_folders(bases[name], [(adapter, 1.0)])
    base = larger(bases[name], tmp_path / "larger")
    compose_folders(base, [(adapter, 1.0)], tmp_path / "out")
    wanted = logits(peft.PeftModel.from_pretrained(load_model(base), adapter), LARGER)
    torch.testing.assert_close(logits(load_model(tmp_path / "out"), LARGER), wanted, atol=1e-5, rtol=1e-5)


def test_the_tokenizer_is_the_adapters_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    """The base's files of it do not go along, not even those that the adapter has no other of."""
    adapter = make(bases["free"], tmp_path / "adapter")
    compose_folders(bases["free"], [(adapter, 1.0)], tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()
    assert not (tmp_path / "out" / "vocab.json").exists()
    record = json.loads((tmp_path / "out" / "composition.json").read_text())
    assert "chat_template.jinja" in record["outputs"]


def test_a_dtype_is_the_bases_own_or_the_one_that_is_asked_for(bases: dict[str, Path], tmp_path: Path) -> None:
    """The resized ends are written as the others, whatever the adapter stores them in."""
    adapter = make(bases["free"], tmp_path / "adapter")
    compose_folders(bases["free"], [(adapter, 1.0)], tmp_path / "out", dtype=Dtype.BF16)
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_without_a_tokenizer_it_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """Nobody could say what the new rows stand for."""
    adapter = make(bases["free"], tmp_path / "adapter")
    (adapter / "tokenizer.json").unlink()
    with pytest.raises(TargetMismatchError, match="no tokenizer") as caught:
        plan_folders(bases["free"], [(adapter, 1.0)])
    assert "save_pretrained" in str(caught.value.remedy)


@pytest.mark.parametrize("missing", ["lm_head", "model.embed_tokens"])
def test_one_resized_end_is_refused_with_both_sizes(bases: dict[str, Path], tmp_path: Path, missing: str) -> None:
    """The other end would keep the base's rows."""
    adapter = make(bases["free"], tmp_path / "adapter", **BOTH)
    arrays = {name: spec.read() for name, spec in open_adapter(adapter).header.tensors.items()}
    kept = {name: array for name, array in arrays.items() if f".{missing}." not in name}
    write_tensors(adapter / "adapter_model.safetensors", kept)
    with pytest.raises(TargetMismatchError, match=r"104 rows in the adapter and 96 in the base"):
        plan_folders(bases["free"], [(adapter, 1.0)])


def test_an_end_that_a_recipe_leaves_out_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """A weight of 0 for the head would leave it in the base's size."""
    adapter = open_adapter(make(bases["free"], tmp_path / "adapter"))
    from composer.recipe import ModuleWeight

    term = Term("a", adapter, 1.0, (ModuleWeight(pattern="lm_head*", weight=0),))
    recipe = Recipe(base="b", adapters=({"ref": "a"},))
    with pytest.raises(TargetMismatchError, match="104 rows"):
        make_plan(recipe, open_checkpoint(bases["free"]), [term])


def test_a_tied_pair_that_was_trained_apart_needs_the_option(bases: dict[str, Path], tmp_path: Path) -> None:
    """modules_to_save trains two tensors, tied base or not; two that should be one and differ are damaged."""
    adapter = make(bases["tied"], tmp_path / "adapter", **BOTH)
    with pytest.raises(TiedWeightsError, match="shares between"):
        plan_folders(bases["tied"], [(adapter, 1.0)])
    edit_json(adapter / "adapter_config.json", modules_to_save=None)
    with pytest.raises(CorruptFileError, match="one tensor of a tied base"):
        compose_folders(bases["tied"], [(adapter, 1.0)], tmp_path / "out")


def test_a_config_of_another_size_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """Where vocab_size is not the number of rows, it is not known what else it counts."""
    import shutil

    adapter = make(bases["free"], tmp_path / "adapter")
    shutil.copytree(bases["free"], tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", vocab_size=90)
    with pytest.raises(TargetMismatchError, match="104 rows"):
        plan_folders(tmp_path / "base", [(adapter, 1.0)])


def test_a_second_adapter_that_replaces_an_end_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """Two vocabularies are not one."""
    one, two = (make(bases["free"], tmp_path / name, size) for name, size in (("one", 104), ("two", 112)))
    with pytest.raises(IncompatibleError, match="replaces the whole tensor"):
        plan_folders(bases["free"], [(one, 1.0), (two, 1.0)])


def test_trained_rows_in_a_saved_embedding_are_not_left_out(bases: dict[str, Path], tmp_path: Path) -> None:
    """A LoRA of another rank would carry the embedding without them: it says so."""
    from composer.errors import UnsupportedAdapterError
    from composer.resize import resize_lora

    adapter = open_adapter(make(bases["free"], tmp_path / "adapter", **TOKENS))
    with pytest.raises(UnsupportedAdapterError, match="embed_tokens"):
        resize_lora(adapter, tmp_path / "small", rank=1)


def test_it_is_not_exported_as_a_lora(bases: dict[str, Path], tmp_path: Path) -> None:
    """A LoRA of the base cannot bring a vocabulary."""
    adapter = open_adapter(make(bases["free"], tmp_path / "adapter"))
    recipe = Recipe(base="b", adapters=({"ref": "a"},), export="peft")
    with pytest.raises(IncompatibleError, match="resize the vocabulary"):
        prepare_export(make_plan(recipe, open_checkpoint(bases["free"]), [Term("a", adapter, 1.0)]))


def test_the_catalogue_keeps_the_tokenizer_and_knows_the_base(
    bases: dict[str, Path], tmp_path: Path, registry: Any
) -> None:
    """Exact on the base that was resized for it; composed by name, the tokenizer comes out of the store."""
    from composer.recipe import parse_recipe
    from registry.schemas import Level

    registry.add_base(bases["free"], name="free")
    registry.publish(make(bases["free"], tmp_path / "adapter"), name="team/words", base="free")
    assert registry.check("team/words", "free").level is Level.EXACT
    planned = registry.plan(parse_recipe("free+team/words"))
    registry.compose(parse_recipe("free+team/words"), tmp_path / "out")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name != "composition.json"}
    assert planned.files == sizes
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"of": "the adapter"}


def test_a_head_with_a_bias_keeps_the_refusal(tmp_path: Path) -> None:
    """Its bias has a row a token too, and no adapter brings one."""
    ends = ("model.embed_tokens", "lm_head")
    tensors = {f"{end}.weight": np.ones((6, 4), np.float32) for end in ends}
    tensors |= {"lm_head.bias": np.ones(6, np.float32), "q.weight": np.ones((4, 4), np.float32)}
    base = write_base(tmp_path / "base", tensors, vocab_size=6)
    extra = {f"base_model.model.{end}.weight": np.ones((8, 4), np.float32) for end in ends}
    adapter = write_lora(tmp_path / "lora", {"q": (4, 4)}, extra=extra)
    (adapter / "tokenizer.json").write_text("{}")
    with pytest.raises(TargetMismatchError, match="8 rows in the adapter and 6 in the base"):
        plan_folders(base, [(adapter, 1.0)])
