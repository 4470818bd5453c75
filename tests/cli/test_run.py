"""The command run: what a composed graph says, against transformers on the same folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from cli import run as run_command
from cli.main import cli
from composer.errors import UnsupportedArchitectureError, UsageError
from composer.exporters.onnx import session
from composer.recipe import Export, Placement
from composer.run import compose
from composer.running import Sampling, answer, encode, open_runnable
from composer.running.generation import Speller
from tests.composer.exporters.test_prompt_vocabulary import CHAT, bert_tokenizer, word_tokenizer
from tests.composer.prompts import VOCABULARY
from tests.conftest import random_lora, save_model
from tests.support import edit_json, plan_folders

pytest.importorskip("onnxruntime")

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.5,
}
PROMPT = "w5 w9 w11"


def composed(model: Any, tokenizer: Any, folder: Path) -> Path:
    """A base with a tokenizer, composed to ONNX without adapters; its graph is kept beside it."""
    save_model(model, folder / "base")
    tokenizer.save_pretrained(folder / "base")
    plan = plan_folders(folder / "base", export=Export.ONNX)
    return compose(plan, folder / "out", cache_dir=folder / "graphs").out


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with a chat template."""
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, eos_token_id=2))
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    return composed(model, tokenizer, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer with three labels."""
    torch.manual_seed(4)
    config = transformers.BertConfig(**SMALL, id2label={0: "red", 1: "green", 2: "blue"})
    model = transformers.BertForSequenceClassification(config)
    return composed(model, bert_tokenizer(), tmp_path_factory.mktemp("bert"))


def greedy(folder: Path, prompt: str, *, chat: bool, new: int = 12) -> tuple[list[int], str]:
    """The ids and the text that transformers' own generate gives."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return ids.tolist(), tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_is_the_greedy_text_of_transformers(run: Any, llama: Path, chat: bool) -> None:
    """Token for token, through the chat template and without it; the same from stdin, as text and as one object."""
    tokens, text = greedy(llama, PROMPT, chat=chat)
    words = ("run", llama, PROMPT, "--max-new-tokens", 12, *(() if chat else ("--raw",)))
    assert run(*words).stdout == f"{text}\n"
    found = json.loads(run(*words, "--format", "json").stdout)
    assert found.pop("prefill_s") > 0
    assert found.pop("tokens_per_s") > 0
    given = 4 if chat else 3
    finish = "stop" if tokens[-1] == 2 else "length"
    assert found == {
        "text": text,
        "tokens": tokens,
        "prompt_tokens": given,
        "finish": finish,
        "provider": "cpu",
    }
    piped = CliRunner().invoke(cli, [str(word) for word in (*words[:2], "-", *words[3:])], input=PROMPT)
    assert piped.stdout == f"{text}\n"


def test_the_pieces_are_the_answer_and_a_longest_text_ends_it(llama: Path) -> None:
    """What is streamed adds up to the text, token by token; places end before the budget does."""
    runnable = open_runnable(llama)
    *pieces, found = answer(runnable, PROMPT, max_new_tokens=1000)
    assert "".join(piece.text for piece in pieces) == found.text
    assert len(pieces) >= len(found.tokens) - 1 > 0
    assert found.prompt_tokens + len(found.tokens) <= SMALL["max_position_embeddings"]
    with pytest.raises(UsageError, match="50 tokens"):
        list(answer(runnable, " ".join(["w5"] * 50), raw=True))


def test_a_seed_repeats_its_draws_and_a_small_top_p_is_greedy(llama: Path) -> None:
    """The same seed gives the same text, another one another; the likeliest token alone is left by a tiny top-p."""
    runnable = open_runnable(llama)

    def tokens(**options: Any) -> tuple[int, ...]:
        *_, found = answer(runnable, PROMPT, max_new_tokens=16, sampling=Sampling(**options))
        return found.tokens

    assert tokens(temperature=2.0, seed=1) == tokens(temperature=2.0, seed=1) != tokens(temperature=2.0, seed=2)
    assert tokens(temperature=2.0, top_p=1e-9, seed=1) == tokens()
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"temperature": math.nan}):
        with pytest.raises(UsageError):
            Sampling(**wrong)


def test_draws_follow_the_softmax_of_the_nucleus() -> None:
    """Closed form: of the probabilities ½, ¼, ⅛, ⅛ a top-p of 0.75 leaves the first two, drawn 2 to 1."""
    import numpy as np

    logits = np.log(np.array([[0.125, 0.5, 0.125, 0.25]], np.float32))
    choose = Sampling(temperature=1.0, top_p=0.75, seed=0).chooser()
    drawn = np.bincount([int(choose(logits)[0]) for _ in range(3000)], minlength=4)
    assert drawn[0] == drawn[2] == 0
    assert abs(drawn[1] / 3000 - 2 / 3) < 0.04


def test_a_character_waits_for_the_last_of_its_bytes(tmp_path: Path) -> None:
    """Spelled byte by byte, a text of four-byte characters never shows half of one, and ends whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {sign: number for number, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(alphabet, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    text = "Ölpreis 🛢️🌱 = 5 €\n"
    speller = Speller(tokenizer)
    pieces = [speller.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces.count("") > 8
    broken = Speller(tokenizer)
    assert broken.add(tokenizer("🌱")["input_ids"][0]) == ""
    assert broken.end() == "\ufffd"


def test_an_encoder_gives_the_scores_of_its_labels(run: Any, bert: Path) -> None:
    """Probabilities as transformers computes them, best first; quiet prints the label; generating is refused."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert)
    with torch.inference_mode():
        shares = torch.softmax(model(**tokenizer(PROMPT, return_tensors="pt")).logits[0].double(), 0)
    expected = dict(zip(("red", "green", "blue"), shares.tolist(), strict=True))
    found = json.loads(run("run", bert, PROMPT, "--format", "json").stdout)
    assert found["labels"] == pytest.approx(expected, abs=1e-6)
    best = max(expected, key=expected.__getitem__)
    assert run("run", bert, PROMPT, "--format", "quiet").stdout == f"{best}\n"
    assert run("run", bert, PROMPT).stdout.splitlines()[1].split() == [best, f"{expected[best]:.4f}"]
    with pytest.raises(UnsupportedArchitectureError):
        next(answer(open_runnable(bert), PROMPT))


@pytest.mark.parametrize("name", ["flan-t5", "mbart"])
def test_an_encoder_decoder_answers_as_transformers_does(run: Any, name: str, tmp_path: Path) -> None:
    """Both graphs, from the decoder's start token and from one that forces a language; typed refusal of an adapter."""
    from tests.composer.seq2seq import build

    model = build(name)
    model.generation_config.forced_bos_token_id = 7 if name == "mbart" else None
    model.generation_config.eos_token_id = model.config.eos_token_id
    out = composed(model, word_tokenizer(), tmp_path)
    ids = torch.tensor([word_tokenizer()(PROMPT)["input_ids"]])
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=1, use_cache=False)[0].tolist()
    found = json.loads(run("run", str(out), PROMPT, "--max-new-tokens", "6", "--format", "json").stdout)
    start = 2 if name == "mbart" else 1
    assert found["tokens"][: len(expected) - start] == expected[start:]
    assert "keeps no adapters apart" in run("run", str(out), PROMPT, "--adapter", "team/shout", code=3).stderr


def test_a_decoder_is_no_encoder(llama: Path) -> None:
    """Refused by name."""
    with pytest.raises(UnsupportedArchitectureError, match="generates text"):
        encode(open_runnable(llama), PROMPT)


def test_a_changed_file_is_not_run(run: Any, llama: Path, tmp_path: Path) -> None:
    """One flipped byte of the weights ends with 5, unless the check is left out."""
    import shutil

    out = shutil.copytree(llama, tmp_path / "changed")
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    assert "model.safetensors" in run("run", out, PROMPT, code=5).stderr
    run("run", out, PROMPT, "--no-check", "--max-new-tokens", 1)


@pytest.mark.parametrize("placement", ["separate", "multi"])
def test_an_adapter_that_is_kept_apart_answers_as_merged(run: Any, llama: Path, tmp_path: Path, placement: str) -> None:
    """By its name; without one it is the base, and an unknown name ends with 3."""
    lora = random_lora(llama.parent / "base", tmp_path / "lora", seed=9, r=8, target_modules=["q_proj", "v_proj"])
    cache = llama.parent / "graphs"
    for name, options in (("merged", {}), ("apart", {"placement": Placement(placement)})):
        plan = plan_folders(llama.parent / "base", [(lora, 4.0)], export=Export.ONNX, **options)
        compose(plan, tmp_path / name, cache_dir=cache)
    words = (PROMPT, "--max-new-tokens", 12)
    merged, apart = run("run", tmp_path / "merged", *words), run("run", tmp_path / "apart", *words, "--adapter", "lora")
    base = run("run", llama, *words).stdout
    assert apart.stdout == merged.stdout != base
    assert run("run", tmp_path / "apart", *words).stdout == base
    assert "lora" in run("run", tmp_path / "apart", *words, "--adapter", "other", code=3).stderr
    assert "merged" in run("run", tmp_path / "merged", *words, "--adapter", "lora", code=3).stderr


def test_what_cannot_be_run_is_refused(run: Any, llama: Path, tmp_path: Path) -> None:
    """No graph and no tokenizer end with 3, a provider that is not there and an empty prompt with 2."""
    import shutil

    assert "model.onnx" in run("run", llama.parent / "base", PROMPT, code=3).stderr
    bare = shutil.copytree(llama, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "composition.json"))
    assert "tokenizer" in run("run", bare, PROMPT, code=3).stderr
    assert "CUDAExecutionProvider" in run("run", llama, PROMPT, "--provider", "cuda", code=2).stderr
    assert "0 tokens" in run("run", llama, "", "--raw", code=2).stderr


def test_an_end_token_of_the_generation_config_ends_the_text(llama: Path, tmp_path: Path) -> None:
    """A list of them, as chat models have; the last token is one of the list."""
    import shutil

    out = shutil.copytree(llama, tmp_path / "out", ignore=shutil.ignore_patterns("composition.json"))
    tokens, _ = greedy(llama, PROMPT, chat=True)
    edit_json(out / "generation_config.json", eos_token_id=[2, tokens[3]])
    *_, found = answer(open_runnable(out), PROMPT, max_new_tokens=12)
    assert found.tokens == tuple(tokens[: tokens.index(tokens[3]) + 1])
    assert found.finish == "stop"


def test_the_choices_are_the_sessions() -> None:
    """--help need not import ONNX Runtime."""
    assert tuple(session.PROVIDERS) == run_command.PROVIDERS
