"""The table of what leaves a fingerprint unchanged, and an independent computation of wf1."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from composer.checkpoint import open_checkpoint
from registry.fingerprint import Fingerprint, behaviour_config, fingerprint_checkpoint
from tests.conftest import llama_config


def fingerprint(folder: Path, **options: Any) -> Fingerprint:
    """Of a folder."""
    return fingerprint_checkpoint(open_checkpoint(folder), **options)


def changed(source: Path, folder: Path, **config: Any) -> Path:
    """A copy of a checkpoint with config fields changed; None removes one."""
    shutil.copytree(source, folder)
    fields = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return folder


def facts(found: Fingerprint) -> tuple[str, str, str, str]:
    """The four digests of the reference table."""
    return found.tensor_root, found.value_root, found.layout, found.config


def test_resharding_does_not_change_it(tiny_llama: Path, tmp_path: Path) -> None:
    """One file or many: the same fingerprint."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert facts(fingerprint(tmp_path / "sharded")) == facts(fingerprint(tiny_llama))
    assert fingerprint(tmp_path / "sharded").identity == fingerprint(tiny_llama).identity


def test_order_metadata_and_names_of_files_do_not_change_it(tiny_llama: Path, tmp_path: Path) -> None:
    """Tensors saved in another order, with other metadata: the same fingerprint."""
    folder = changed(tiny_llama, tmp_path / "reordered")
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(reversed(tensors.items())), folder / "model.safetensors", {"note": "edited", "format": "pt"})
    assert fingerprint(folder).identity == fingerprint(tiny_llama).identity


def test_a_cast_keeps_the_values_and_not_the_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    """bf16 weights stored as fp32: another tensor root, the same value root and config."""
    folder = tmp_path / "fp32"
    LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).save_pretrained(folder)
    original, cast = fingerprint(tiny_llama), fingerprint(folder)
    assert cast.tensor_root != original.tensor_root
    assert cast.identity != original.identity
    assert (cast.value_root, cast.config) == (original.value_root, original.config)


def test_one_weight_changes_both_roots(tiny_llama: Path, tmp_path: Path) -> None:
    """+0.1 on one number, and only the layout stays."""
    folder = changed(tiny_llama, tmp_path / "nudged")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.1
    save_file(tensors, folder / "model.safetensors")
    original, nudged = fingerprint(tiny_llama), fingerprint(folder)
    assert nudged.tensor_root != original.tensor_root
    assert nudged.value_root != original.value_root
    assert nudged.layout == original.layout
    assert [a.name for a, b in zip(original.leaves, nudged.leaves, strict=True) if a != b] == ["model.norm.weight"]


def test_a_larger_vocabulary_changes_the_layout(tiny_llama: Path, tmp_path: Path) -> None:
    """Eight more rows: nothing but the tokenizer is the same."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(tmp_path / "larger")
    pairs = zip(facts(fingerprint(tiny_llama)), facts(fingerprint(tmp_path / "larger")), strict=True)
    assert all(a != b for a, b in pairs)


def test_a_tied_head_counts_once_whether_it_is_stored_or_not(tmp_path: Path) -> None:
    """The same tied model saved with and without a copy of its head has one fingerprint."""
    torch.manual_seed(2)
    LlamaForCausalLM(llama_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "once")
    twice = changed(tmp_path / "once", tmp_path / "twice")
    tensors = load_file(twice / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / "model.safetensors")
    assert fingerprint(twice).identity == fingerprint(tmp_path / "once").identity


def test_an_untied_head_counts(tiny_llama: Path, tmp_path: Path) -> None:
    """A head of its own is part of the weights."""
    assert "lm_head.weight" in {leaf.name for leaf in fingerprint(tiny_llama).leaves}


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"transformers_version": "4.40.0"}, True),
        ({"_name_or_path": "elsewhere", "torch_dtype": "bfloat16", "use_cache": False}, True),
        ({"attention_dropout": 0.1, "initializer_range": 0.5}, True),
        ({"rms_norm_eps": 9.999999974752427e-07}, True),
        ({"rms_norm_eps": 1e-5}, False),
        ({"hidden_act": "gelu"}, False),
        ({"num_key_value_heads": 4}, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, False),
        ({"rope_parameters": None, "rope_theta": 10000.0}, True),
        ({"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, False),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, False),
    ],
)
def test_config_counts_where_it_changes_behaviour(
    tiny_llama: Path, tmp_path: Path, fields: dict[str, Any], same: bool
) -> None:
    """Spelling and bookkeeping are ignored; anything that changes the output is not."""
    found = fingerprint(changed(tiny_llama, tmp_path / "edited", **fields))
    assert (found.identity == fingerprint(tiny_llama).identity) is same


def test_it_does_not_depend_on_threads(tiny_llama: Path) -> None:
    """One thread and eight give the same leaves."""
    assert fingerprint(tiny_llama, threads=1) == fingerprint(tiny_llama, threads=8)


def test_wf1_is_what_its_definition_says(tiny_llama: Path) -> None:
    """Computed again here, from the tensors as the safetensors library reads them."""

    def sha(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    leaves = []
    for name, tensor in sorted(load_file(tiny_llama / "model.safetensors").items()):
        data = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        leaves.append(sha([name, "BF16", list(tensor.shape), data]))
    config = sha({**behaviour_config(json.loads((tiny_llama / "config.json").read_text())), "tied": False})
    assert fingerprint(tiny_llama).tensor_root == sha(leaves)
    assert fingerprint(tiny_llama).identity == "wf1:" + sha([sha(leaves), config])


def test_a_fixed_checkpoint_has_a_fixed_fingerprint(tmp_path: Path) -> None:
    """wf1 is a promise: this value may never change."""
    save_file({"w": torch.arange(6, dtype=torch.float32).reshape(2, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 3}')
    assert fingerprint(tmp_path).identity == "wf1:cb7ba1b6c2bc807303850af45763429ec9ed4b05ed6f7c6f83d5483793eeaf6f"


def test_progress_ends_at_all_bytes(tiny_llama: Path) -> None:
    """Bytes done rise to the bytes in all."""
    seen: list[tuple[int, int]] = []
    fingerprint(tiny_llama, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == open_checkpoint(tiny_llama).nbytes


def test_the_chat_template_is_found_in_either_place(tiny_llama: Path, tmp_path: Path) -> None:
    """A template in its own file or inside tokenizer_config.json has one digest, apart from the weights'."""
    alone = changed(tiny_llama, tmp_path / "alone")
    (alone / "chat_template.jinja").write_text("{{ messages }}")
    inside = changed(tiny_llama, tmp_path / "inside")
    (inside / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert fingerprint(alone).chat_template == fingerprint(inside).chat_template is not None
    assert fingerprint(alone).identity == fingerprint(tiny_llama).identity
