"""Soft prompts as words of the vocabulary, against PEFT's own forward: weights, head, tokenizer, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from composer.errors import CorruptFileError, UnsupportedAdapterError, UnsupportedArchitectureError
from composer.recipe import Dtype, Export
from composer.run import compose
from composer.tensors import read_header
from tests.composer.prompts import PROMPTS, TOKENS, VOCABULARY, adapt, greedy, live, logits, make_model, sample_ids
from tests.conftest import random_lora, save_model
from tests.support import compose_folders, edit_json, plan_folders, read_tensors, reshard, write_base, write_tensors

SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
WORDS = {**SPECIAL, **{f"w{index}": index for index in range(len(SPECIAL), VOCABULARY)}}
TEXT = " ".join(f"w{number}" for number in sample_ids(1, 9)[0].tolist())
CHAT = "{{ bos_token }}{% for message in messages %}{{ message['content'] }} {% endfor %}"
KINDS = ("llama", "llama-tied", "gpt2", "bert")


def model_of(kind: str) -> Any:
    """A tiny model, its embedding and head tied or not."""
    return make_model(kind.removesuffix("-tied"), tied=kind.endswith("tied"))


def word_tokenizer(processor: Any = None, words: dict[str, int] = WORDS) -> Any:
    """One token a word, split at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if processor is not None:
        tokenizer.post_processor = processor
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def checkpoint(kind: str, folder: Path, tokenizer: Any = None, dtype: torch.dtype = torch.float32) -> Path:
    """A base with weights and, where one is given, a tokenizer."""
    save_model(model_of(kind).to(dtype), folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def reload(folder: Path) -> Any:
    """The composed model as transformers loads it."""
    auto = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "bert": "BertForSequenceClassification"}
    name = json.loads((folder / "config.json").read_text())["model_type"]
    model, info = getattr(transformers, auto[name]).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def virtual(out: Path) -> list[int]:
    """The ids of the virtual tokens."""
    return json.loads((out / "composition.json").read_text())["export"]["virtual_tokens"]["ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", PROMPTS)
def test_a_plain_checkpoint_computes_what_peft_computes(case: str, kind: str, tmp_path: Path) -> None:
    """Oracle: PEFT live to 1e-5 on every token that can be generated; transformers misses and ignores no weight."""
    if (case, kind) == ("cpt", "bert"):
        pytest.skip("CPT is of causal models only")
    base = checkpoint(kind, tmp_path / "base")
    adapt(model_of(kind), case, tmp_path / "adapter")
    outcome = compose_folders(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    out, ids = outcome.out, sample_ids()
    assert ["no tokenizer" in warning for warning in outcome.record["warnings"]] == [True]
    before = torch.tensor([virtual(out)] * len(ids))
    found = logits(reload(out), torch.cat([before, ids], dim=1))
    found = found if kind == "bert" else found[:, TOKENS:, :VOCABULARY]
    wanted = logits(live(model_of(kind), tmp_path / "adapter"), ids)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5)
    assert (wanted - logits(model_of(kind), ids)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_virtual_tokens_are_never_the_most_likely(kind: str, tmp_path: Path) -> None:
    """Oracle: the closed form. Each one's logit is the mean of all others, so its probability is at most 1/V."""
    base = checkpoint(kind, tmp_path / "base")
    adapt(model_of(kind), "prompt-tuning", tmp_path / "adapter")
    out = compose_folders(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out").out
    model = reload(out)
    ids = torch.cat([torch.tensor([virtual(out)] * 2), sample_ids()], dim=1)
    with torch.no_grad():
        found = model(input_ids=ids).logits
    real, new = found[..., :VOCABULARY], found[..., VOCABULARY:]
    assert torch.allclose(new, real.mean(-1, keepdim=True).expand_as(new), atol=1e-5)
    assert (new.max(-1).values < real.max(-1).values).all()
    assert (found.softmax(-1)[..., VOCABULARY:] <= 1 / VOCABULARY).all()
    # The rows are not what the tied pair would have put there, which wins every time.
    assert not torch.equal(model.lm_head.weight[VOCABULARY:], model.get_input_embeddings().weight[VOCABULARY:])
    assert model.config.vocab_size == VOCABULARY + TOKENS == len(model.lm_head.weight)
    assert model.config.tie_word_embeddings is False


def test_a_head_whose_logits_are_all_negative_does_not_fall_for_them(tmp_path: Path) -> None:
    """Rows of zeros would win here, as in GPT-2, where every logit of a real token is below zero."""
    model = model_of("gpt2")
    model.config.tie_word_embeddings = False
    model.transformer.ln_f.bias.data[:] = 3.0
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() - 1.0)
    base = save_model(model, tmp_path / "base")
    adapt(model, "prompt-tuning", tmp_path / "adapter")
    out = compose_folders(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out").out
    ids = torch.cat([torch.tensor([virtual(out)] * 2), sample_ids()], dim=1)
    with torch.no_grad():
        found = reload(out)(input_ids=ids).logits[:, TOKENS:]
    assert (found.max(-1).values < 0).all()
    assert (found.argmax(-1) < VOCABULARY).all()


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_generation_goes_on_as_in_peft(kind: str, tmp_path: Path) -> None:
    """Oracle: 32 greedy tokens of PEFT live; and sampling at a high temperature gives no virtual token."""
    base = checkpoint(kind, tmp_path / "base", word_tokenizer())
    adapt(model_of(kind), "prompt-tuning", tmp_path / "adapter")
    out = compose_folders(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out").out
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(out), reload(out)
    inputs = tokenizer(TEXT, return_tensors="pt")
    assert inputs.input_ids.tolist() == [virtual(out) + sample_ids(1, 9)[0].tolist()]
    found = greedy(model, inputs.input_ids, **inputs)
    assert torch.equal(found, greedy(live(model_of(kind), tmp_path / "adapter"), sample_ids(1, 9)))
    torch.manual_seed(0)
    sampled = model.generate(**inputs, do_sample=True, temperature=50.0, top_k=0, max_new_tokens=60, min_new_tokens=60)
    assert sampled[:, inputs.input_ids.shape[1] :].max() < VOCABULARY


def bert_tokenizer() -> Any:
    """BERT's own class, which builds its post-processor anew unless another class is named."""
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    return transformers.BertTokenizer(vocab={**words, **{f"w{n}": n for n in range(5, VOCABULARY)}})


def byte_tokenizer(name: str) -> Any:
    """A byte-level tokenizer of one of transformers' classes, with a merge of two letters."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789Ġ"))
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *letters, "th"])}
    return getattr(transformers, name)(vocab=vocabulary, merges=[("t", "h")])


def template_tokenizer() -> Any:
    """A start and an end token by a template, as Llama has it."""
    from tokenizers import processors

    return word_tokenizer(
        processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    )


TOKENIZERS = {
    "none": word_tokenizer,
    "template": template_tokenizer,
    "bert": bert_tokenizer,
    "gpt2": lambda: byte_tokenizer("GPT2Tokenizer"),
    "roberta": lambda: byte_tokenizer("RobertaTokenizer"),
    "qwen2": lambda: byte_tokenizer("Qwen2Tokenizer"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_text_begins_with_the_virtual_tokens(name: str, tmp_path: Path) -> None:
    """Oracle: the base's own tokenizer. Texts, pairs and batches get k ids in front, and are the same otherwise."""
    original = TOKENIZERS[name]()
    base = checkpoint("bert" if name == "bert" else "llama", tmp_path / "base", original)
    adapt(model_of("bert" if name == "bert" else "llama"), "prompt-tuning", tmp_path / "adapter")
    out = compose_folders(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out").out
    before, tokenizer = (
        transformers.AutoTokenizer.from_pretrained(base),
        transformers.AutoTokenizer.from_pretrained(out),
    )
    added = list(range(len(before), len(before) + TOKENS))
    for given in (("w9 the w7",), ("w9 w8", "the w6 w5")):
        wanted, found = before(*given), tokenizer(*given)
        assert found["input_ids"] == added + wanted["input_ids"]
        assert found["attention_mask"] == [1] * TOKENS + wanted["attention_mask"]
        assert set(found) == set(wanted)
        if "token_type_ids" in wanted:
            assert found["token_type_ids"] == [0] * TOKENS + wanted["token_type_ids"]
        plain = (before(*given, add_special_tokens=False), tokenizer(*given, add_special_tokens=False))
        assert plain[0]["input_ids"] == plain[1]["input_ids"]
    assert tokenizer.decode(found["input_ids"], skip_special_tokens=True) == before.decode(
        wanted["input_ids"], skip_special_tokens=True
    )
    assert len(tokenizer) == len(before) + TOKENS
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(added)) == added


@pytest.mark.parametrize("where", ["file", "config", "named"])
def test_the_chat_template_begins_with_them(where: str, tmp_path: Path) -> None:
    """What it makes is tokenised without the post-processor: the k tokens stand there once."""
    original = word_tokenizer()
    original.chat_template = CHAT
    base = checkpoint("llama", tmp_path / "base", original)
    if where != "file":
        (base / "chat_template.jinja").unlink()
        named = [{"name": "default", "template": CHAT}, {"name": "tools", "template": CHAT}]
        edit_json(base / "tokenizer_config.json", chat_template=CHAT if where == "config" else named)
    adapt(model_of("llama"), "prompt-tuning", tmp_path / "adapter")
    out = compose_folders(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out").out
    messages = [{"role": "user", "content": "w9 w8"}]
    ids = [
        transformers.AutoTokenizer.from_pretrained(path).apply_chat_template(messages, return_dict=True)["input_ids"]
        for path in (base, out)
    ]
    assert ids[1] == virtual(out) + ids[0]


def test_a_padded_matrix_takes_the_rows_that_no_text_uses(tmp_path: Path) -> None:
    """Rows behind the tokenizer's last id are used first, those behind them stay; oracle: PEFT live."""
    words = {word: number for word, number in WORDS.items() if number < VOCABULARY - 12}
    base = checkpoint("llama", tmp_path / "base", word_tokenizer(words=words))
    adapt(model_of("llama"), "prompt-tuning", tmp_path / "adapter")
    outcome = compose_folders(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    first = VOCABULARY - 12
    assert virtual(outcome.out) == list(range(first, first + TOKENS))
    old, new = read_tensors(base), read_tensors(outcome.out)
    changed = slice(first, first + TOKENS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        same = (old[name] == new[name]).all(-1)
        assert same.sum() == VOCABULARY - TOKENS
        assert not same[changed].any()
    assert torch.allclose(new["lm_head.weight"][changed][0], old["lm_head.weight"][:first].double().mean(0).float())
    ids = sample_ids(1, 9) % 100 + 3
    before = torch.tensor([virtual(outcome.out)])
    found = logits(reload(outcome.out), torch.cat([before, ids], dim=1))[:, TOKENS:, :first]
    wanted = logits(live(model_of("llama"), tmp_path / "adapter"), ids)[..., :first]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_shards_and_dtypes_make_no_difference(kind: str, tmp_path: Path) -> None:
    """A base in three files gives the tensors that one file gives; in bf16 each new number is rounded once."""
    base = checkpoint(kind, tmp_path / "base", dtype=torch.bfloat16)
    adapt(model_of(kind), "prompt-tuning", tmp_path / "adapter")
    whole = compose_folders(base, [(tmp_path / "adapter", 1.0)], tmp_path / "whole").out
    parts = compose_folders(reshard(base, tmp_path / "parts"), [(tmp_path / "adapter", 1.0)], tmp_path / "split").out
    wide = compose_folders(base, [(tmp_path / "adapter", 1.0)], tmp_path / "wide", dtype=Dtype.FP32).out
    one, several, exact = read_tensors(whole), read_tensors(parts), read_tensors(wide)
    assert one.keys() == several.keys() == exact.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, several[name]), name
        assert torch.equal(tensor, exact[name].bfloat16()), name
    index = json.loads((parts / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == one.keys()


def test_a_stack_of_lora_and_two_prompts_is_one_model(tmp_path: Path) -> None:
    """Oracle: PEFT live with both prompts joined, over PEFT's merge of the LoRA."""
    base = checkpoint("llama", tmp_path / "base")
    random_lora(base, tmp_path / "lora", target_modules="all-linear")
    for seed in (1, 2):
        adapt(model_of("llama"), "prompt-tuning", tmp_path / f"{seed}", seed=seed, tokens=2 + seed)
    stack = [(tmp_path / name, 1.0) for name in ("lora", "2", "1")]
    out = compose_folders(base, stack, tmp_path / "out").out
    both = [read_header(tmp_path / n / "adapter_model.safetensors").tensors["prompt_embeddings"].read() for n in "21"]
    joined = adapt(model_of("llama"), "prompt-tuning", tmp_path / "joined", tokens=7)
    del joined
    write_tensors(tmp_path / "joined" / "adapter_model.safetensors", {"prompt_embeddings": np.concatenate(both)})
    ids = sample_ids()
    before = torch.tensor([virtual(out)] * 2)
    found = logits(reload(out), torch.cat([before, ids], dim=1))[:, 7:, :VOCABULARY]
    merged = live(model_of("llama"), tmp_path / "lora").merge_and_unload()
    assert torch.allclose(found, logits(live(merged, tmp_path / "joined"), ids), rtol=0, atol=1e-5)


def test_a_composed_model_can_take_another_prompt(tmp_path: Path) -> None:
    """Its virtual tokens are words like others: the new ones get other names, and stand in front."""
    base = checkpoint("llama", tmp_path / "base", template_tokenizer())
    adapt(model_of("llama"), "prompt-tuning", tmp_path / "adapter")
    once = compose_folders(base, [(tmp_path / "adapter", 1.0)], tmp_path / "once").out
    twice = compose_folders(once, [(tmp_path / "adapter", 1.0)], tmp_path / "twice").out
    tokenizer = transformers.AutoTokenizer.from_pretrained(twice)
    assert tokenizer("w9").input_ids == virtual(twice) + virtual(once) + [1, 9, 2]
    assert len(set(tokenizer.convert_ids_to_tokens(virtual(twice) + virtual(once)))) == 2 * TOKENS
    assert json.loads((twice / "generation_config.json").read_text())["suppress_tokens"] == virtual(once) + virtual(
        twice
    )


def test_what_cannot_be_a_word_is_refused(tmp_path: Path) -> None:
    """A prefix; a tokenizer without tokenizer.json, with a post-processor that is not known, or of another model."""
    base = checkpoint("llama", tmp_path / "base", word_tokenizer())
    adapt(model_of("llama"), "prefix-tuning", tmp_path / "prefix")
    adapt(model_of("llama"), "prompt-tuning", tmp_path / "prompt")

    def refused(error: Any, match: str, adapter: str = "prompt", folder: Path = base) -> None:
        plan = plan_folders(folder, [(tmp_path / adapter, 1.0)], export=Export.SAFETENSORS)
        with pytest.raises(error, match=match) as caught:
            compose(plan, tmp_path / "out")
        assert caught.value.remedy
        assert not (tmp_path / "out").exists()

    refused(UnsupportedAdapterError, "prefix cannot be written as a plain checkpoint", "prefix")
    content = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps({**content, "post_processor": {"type": "Other"}}))
    refused(UnsupportedAdapterError, "post-processor of type Other")
    (base / "tokenizer.json").write_text(json.dumps({**content, "model": {}}))
    refused(CorruptFileError, "no vocabulary")
    (base / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": [{"id": 500, "content": "x"}]}))
    refused(UnsupportedArchitectureError, "501 ids, the embedding matrix 128 rows")
    (base / "tokenizer.json").rename(base / "vocab.json")
    refused(UnsupportedAdapterError, r"no tokenizer\.json")
    arrays = {name: tensor.numpy() for name, tensor in read_tensors(base).items()}
    write_base(tmp_path / "masked", arrays, architectures=["BertForMaskedLM"])
    refused(UnsupportedArchitectureError, "belong to its vocabulary", folder=tmp_path / "masked")


def test_gemma_takes_rows_that_its_embedding_layer_scales(tmp_path: Path) -> None:
    """The layer multiplies by √d what it looks up, and PEFT's prompt stands behind it; oracle: PEFT live."""
    torch.manual_seed(2)
    config = transformers.Gemma3TextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCABULARY, max_position_embeddings=128, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval()
    base = save_model(model, tmp_path / "base")
    adapt(model, "prompt-tuning", tmp_path / "adapter")
    out = compose_folders(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out").out
    ids = sample_ids()
    composed = transformers.Gemma3ForCausalLM.from_pretrained(out).eval()
    found = logits(composed, torch.cat([torch.tensor([virtual(out)] * 2), ids], dim=1))[:, TOKENS:, :VOCABULARY]
    wanted = logits(live(transformers.Gemma3ForCausalLM.from_pretrained(base), tmp_path / "adapter"), ids)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5)
