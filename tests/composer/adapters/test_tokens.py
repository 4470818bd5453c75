"""Rows that were trained alone, within a LoRA and as a kind of their own, on tied ends and on free ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from composer.adapters import open_adapter
from composer.errors import CorruptFileError, TargetMismatchError, TiedWeightsError
from composer.tensors import DTYPES
from tests.composer.adapters.oracles import assert_composed_is_live, random_adapter
from tests.conftest import llama_config, save_model
from tests.support import compose_folders, edit_json, plan_folders, read_tensors, write_base, write_lora, write_tensors

ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two float32 Llamas, one with tied ends."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("tokens")
    return {
        name: save_model(LlamaForCausalLM(llama_config(tie_word_embeddings=name == "tied")), folder / name)
        for name in ("free", "tied")
    }


CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 70, 7]),
    "lora-ends": peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 14], "lm_head": [7, 14]}
    ),
    "rows": peft.TrainableTokensConfig(token_indices=[0, 91, 21]),
    "rows-ends": peft.TrainableTokensConfig(token_indices=[7, 63], target_modules=["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize(
    ("base", "case"),  # PEFT's own forward fails on rows at both of two tied ends
    [("free", case) for case in CONFIGS] + [("tied", case) for case in CONFIGS if case != "rows-ends"],
)
def test_trained_rows_are_pefts_live_forward(bases: dict[str, Path], tmp_path: Path, base: str, case: str) -> None:
    """A tied pair stays tied: PEFT trains its rows as one, and the file that is written has no head."""
    adapter = random_adapter(bases[base], tmp_path / "adapter", CONFIGS[case])
    assert_composed_is_live(bases[base], adapter, tmp_path / "out")
    assert ("lm_head.weight" in read_tensors(tmp_path / "out")) == (base == "free")


def test_rows_of_other_tokens_at_each_end_untie_them(bases: dict[str, Path], tmp_path: Path) -> None:
    """Refused on a tied base, with the option that helps; with it, PEFT's live forward."""
    indices = {"embed_tokens": [7, 14], "lm_head": [21]}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    adapter = random_adapter(bases["tied"], tmp_path / "adapter", config)
    with pytest.raises(TiedWeightsError) as caught:
        plan_folders(bases["tied"], [(adapter, 1.0)])
    assert "--untie" in str(caught.value.remedy)
    assert_composed_is_live(bases["tied"], adapter, tmp_path / "out", untie=True)


def small(folder: Path, rows: np.ndarray, **config: Any) -> Path:
    """A LoRA file with trained rows of an embedding, without PEFT."""
    return write_lora(folder, {"model.q_proj": (6, 6)}, extra={ROWS: rows}, **config)


def small_base(folder: Path) -> Path:
    """An embedding [8, 6] and a matrix in bf16."""
    values = np.linspace(-3, 3, 48).reshape(8, 6).astype(DTYPES["BF16"])
    return write_base(
        folder, {"model.embed_tokens.weight": values, "model.q_proj.weight": values[:6], "lm_head.weight": values}
    )


def test_the_rows_are_written_as_they_were_saved(tmp_path: Path) -> None:
    """The numbers themselves, which W + (W' − W) in float32 misses where W is large; the other rows keep their bits."""
    base = small_base(tmp_path / "base")
    rows = np.array([[1e-8, 2e-9, -3e-8, 0, 1, 2]] * 2, np.float32)
    compose_folders(base, [(small(tmp_path / "a", rows, trainable_token_indices=[5, 2]), 1.0)], tmp_path / "out")
    before, after = (read_tensors(folder)["model.embed_tokens.weight"] for folder in (base, tmp_path / "out"))
    assert torch.equal(after[[5, 2]], torch.from_numpy(rows).bfloat16())
    others = [0, 1, 3, 4, 6, 7]
    assert torch.equal(after[others], before[others])


def test_half_the_weight_goes_half_the_way(tmp_path: Path) -> None:
    """Oracle: W + (W' − W)/2 in float64."""
    base = small_base(tmp_path / "base")
    rows = np.full((1, 6), 4, np.float32)
    compose_folders(base, [(small(tmp_path / "a", rows, trainable_token_indices=[1]), 0.5)], tmp_path / "out")
    before, after = (read_tensors(folder)["model.embed_tokens.weight"] for folder in (base, tmp_path / "out"))
    assert torch.equal(after[1], ((before[1].double() + 4) / 2).bfloat16())


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """Named, with the number of rows that the base has."""
    adapter = small(tmp_path / "a", np.ones((1, 6), np.float32), trainable_token_indices=[8])
    with pytest.raises(TargetMismatchError, match="token 8, and the base has 8 rows"):
        plan_folders(small_base(tmp_path / "base"), [(adapter, 1.0)])


@pytest.mark.parametrize("indices", [None, [], [1], [1, 1], [-1, 2], [1.0, 2], "12", {"wte": [1, 2]}, [1, 2, 3]])
def test_rows_whose_tokens_are_not_known_are_damaged(tmp_path: Path, indices: Any) -> None:
    """One token a row, each once."""
    adapter = small(tmp_path / "a", np.ones((2, 6), np.float32), trainable_token_indices=[1, 2])
    edit_json(adapter / "adapter_config.json", trainable_token_indices=indices)
    with pytest.raises(CorruptFileError):
        open_adapter(adapter)


def test_tokens_without_rows_are_damaged(tmp_path: Path) -> None:
    """The config promises what the file lacks."""
    with pytest.raises(CorruptFileError, match="no rows"):
        open_adapter(write_lora(tmp_path / "a", {"model.q_proj": (6, 6)}, trainable_token_indices=[1]))


def test_copies_of_a_tied_pair_that_differ_are_damaged(bases: dict[str, Path], tmp_path: Path) -> None:
    """One of them is not what was trained."""
    adapter = random_adapter(bases["tied"], tmp_path / "adapter", CONFIGS["rows"])
    arrays = {name: spec.read() for name, spec in open_adapter(adapter).header.tensors.items()}
    arrays["base_model.model.lm_head.trainable_tokens_delta"] = np.zeros((3, 64), np.float32)
    write_tensors(adapter / "adapter_model.safetensors", arrays)
    with pytest.raises(CorruptFileError, match="tied pair"):
        compose_folders(bases["tied"], [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
