"""The whole path on real models: SmolLM2-135M-Instruct with the adapters that ship in examples/, and MiniLM.

Oracle: PEFT live on the same base. Everything is composed through the registry, as a user would.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.recipe import Dtype, Export, Recipe, parse_recipe
from registry.schemas import BaseStatus, Level
from registry.services.local import LocalRegistry, open_registry
from tests.conftest import random_lora

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NEW_TOKENS = 12
PROMPTS = (
    "What is the capital of France?",
    "What colour is the sky?",
    "What is 2 plus 2?",
    "What is the opposite of black?",
    "Tell me about cats.",
    "Why do we sleep?",
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
    "Write a sentence about rain.",
    "Goodbye!",
)


def build(model: str, folder: Path) -> Path:
    """A base built as the demo builds it."""
    subprocess.run([sys.executable, EXAMPLES / "build_base.py", model, folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in bf16."""
    return build("smollm2", tmp_path_factory.mktemp("bases") / "smollm2")


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 in fp32."""
    return build("minilm", tmp_path_factory.mktemp("bases") / "minilm")


@pytest.fixture(scope="module")
def opened(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalRegistry:
    """A registry that holds the example adapters, published before their base arrived, and then the base."""
    registry = open_registry(tmp_path_factory.mktemp("home"))
    for name in ("shout", "json", "pirate"):
        published = registry.publish(EXAMPLES / "adapters" / name, name=f"team/{name}", version="1.0.0")
        assert published.version.base_status is BaseStatus.PENDING
    registry.add_base(smollm2, name="smollm2")
    return registry


def prompt_ids(tokenizer: Any) -> list[Any]:
    """The ten prompts through the chat template, each [1, tokens] int64."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        for prompt in PROMPTS
    ]


def answers(model: Any, prompts: list[Any]) -> tuple[list[np.ndarray], list[list[int]]]:
    """Logits [tokens, vocabulary] of each prompt, and its greedy continuation."""
    import torch

    logits, tokens = [], []
    with torch.inference_mode():
        for ids in prompts:
            logits.append(model(input_ids=ids).logits[0].float().numpy())
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
            )
            tokens.append(output[0, ids.shape[1] :].tolist())
    return logits, tokens


def test_the_example_adapters_are_verified_by_their_own_fingerprint(opened: LocalRegistry) -> None:
    """The hash in each model card is that of the base which build_base.py makes, so both fit exactly."""
    found = opened.compatible("smollm2").items
    assert sorted((item.adapter.name, item.verdict.level) for item in found) == [
        ("team/json", Level.EXACT),
        ("team/pirate", Level.EXACT),
        ("team/shout", Level.EXACT),
    ]
    assert all(item.adapter.base_status is BaseStatus.VERIFIED for item in found)


@pytest.mark.parametrize("name", ["shout", "json"])
def test_a_bf16_merge_is_bit_equal_to_pefts_default(
    opened: LocalRegistry, smollm2: Path, tmp_path: Path, name: str
) -> None:
    """Every parameter of the merged model equals PEFT's merge_and_unload on the same bf16 base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    opened.compose(parse_recipe(f"smollm2+team/{name}"), tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    expected = PeftModel.from_pretrained(base, EXAMPLES / "adapters" / name).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_live_merged_and_onnx_agree_on_ten_prompts(opened: LocalRegistry, smollm2: Path, tmp_path: Path) -> None:
    """fp32 logits to 1e-4 and equal greedy tokens: PEFT live, merged safetensors in transformers, ONNX Runtime."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from composer.exporters.onnx.session import generate, open_session
    from composer.running import answer, open_runnable

    out = tmp_path / "out"
    composed = opened.compose(parse_recipe("smollm2+team/shout", dtype=Dtype.FP32, export=Export.ONNX), out)
    prompts = prompt_ids(AutoTokenizer.from_pretrained(out))
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    live_logits, live_tokens = answers(PeftModel.from_pretrained(base, EXAMPLES / "adapters" / "shout"), prompts)
    merged_logits, merged_tokens = answers(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), prompts)
    assert max(float(np.abs(a - b).max()) for a, b in zip(live_logits, merged_logits, strict=True)) <= 1e-4
    assert merged_tokens == live_tokens

    session = open_session(out / "model.onnx")
    past = {item.name: item for item in session.get_inputs() if item.name.startswith("past_key_values.")}
    for ids, expected_logits, expected_tokens in zip(prompts, live_logits, live_tokens, strict=True):
        count = ids.shape[1]
        feeds = {
            "input_ids": ids.numpy(),
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count, dtype=np.int64)[None],
            **{name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32) for name, item in past.items()},
        }
        logits = session.run(["logits"], feeds)[0][0]
        assert float(np.abs(logits - expected_logits).max()) <= 1e-4
        tokens = generate(session, ids.numpy(), np.ones((1, count), np.int64), NEW_TOKENS, [2])
        assert list(tokens[0]) == expected_tokens
    assert composed.record["export"]["max_abs_diff"] <= composed.record["export"]["tolerance"]
    runnable = open_runnable(out)
    for prompt, expected_tokens in zip(PROMPTS, live_tokens, strict=True):
        *pieces, found = answer(runnable, prompt, max_new_tokens=NEW_TOKENS)
        assert list(found.tokens) == expected_tokens
        spelled = runnable.tokenizer.decode(expected_tokens, skip_special_tokens=True)
        assert "".join(piece.text for piece in pieces) == found.text == spelled


def test_a_soft_prompt_says_the_same_live_as_words_and_inside_the_graph(
    opened: LocalRegistry, smollm2: Path, tmp_path: Path
) -> None:
    """Logits and 32 greedy tokens on three prompts. PEFT live against the plain checkpoint: fp32 logits to 1e-4; against
    ONNX Runtime, whose sums have another order: to 1e-5 of the largest logit; the tokens are equal.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from composer.exporters.onnx.session import forward, generate, open_session
    from composer.running import answer, open_runnable

    for export in (Export.SAFETENSORS, Export.ONNX):
        opened.compose(parse_recipe("smollm2+team/pirate", dtype=Dtype.FP32, export=export), tmp_path / export)
    live = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), EXAMPLES / "adapters" / "pirate"
    ).eval()
    words = AutoModelForCausalLM.from_pretrained(tmp_path / "safetensors", dtype=torch.float32)
    runnable = open_runnable(tmp_path / "onnx")
    session = open_session(tmp_path / "onnx" / "model.onnx")
    prompts = prompt_ids(AutoTokenizer.from_pretrained(smollm2))[:3]
    with_words = prompt_ids(AutoTokenizer.from_pretrained(tmp_path / "safetensors"))[:3]
    with torch.inference_mode():
        for text, ids, given in zip(PROMPTS, prompts, with_words, strict=False):
            assert given[0, 16:].tolist() == ids[0].tolist()
            mask = np.ones((1, ids.shape[1]), np.int64)
            expected = live(input_ids=ids, attention_mask=torch.from_numpy(mask)).logits[0, 16:]
            plain = words(input_ids=given).logits[0, 16:]
            assert float((plain[:, : expected.shape[1]] - expected).abs().max()) <= 1e-4
            assert bool((plain.argmax(-1) < expected.shape[1]).all())
            difference = np.abs(forward(session, ids.numpy(), mask)[0][0] - expected.numpy()).max()
            assert float(difference) <= 1e-5 * float(expected.abs().max())
            wanted = live.generate(
                input_ids=ids, attention_mask=torch.from_numpy(mask), max_new_tokens=32, do_sample=False
            )
            tokens = wanted[0, ids.shape[1] :]
            found = words.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=32, do_sample=False
            )
            assert found[0, given.shape[1] :].tolist() == tokens.tolist()
            assert generate(session, ids.numpy(), mask, 32, [2])[0].tolist() == tokens.tolist()
            *_, said = answer(runnable, text, max_new_tokens=32)
            assert list(said.tokens) == tokens.tolist()


def test_a_prefix_of_grouped_queries_is_the_cache_that_the_graph_begins_with(
    opened: LocalRegistry, smollm2: Path, tmp_path: Path
) -> None:
    """20 tokens of SmolLM2 are 230,400 numbers, not the 691,200 of its hidden size.

    The prefix is what the cache holds of a text of 20 tokens, so two oracles agree: PEFT live with the prefix, and the
    base itself on the text and the prompt; in logits to 1e-5 of the largest, and in 32 greedy tokens.
    """
    import torch
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from composer.exporters.onnx.session import forward, generate, open_session

    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = tokenizer(" ".join(PROMPTS), return_tensors="pt").input_ids[:, :20]
    ids = prompt_ids(tokenizer)[0]
    with torch.inference_mode():
        whole = base(input_ids=torch.cat([text, ids], dim=1)).logits[0, 20:].numpy()
        layers = base(input_ids=text, use_cache=True).past_key_values.layers
        pairs = [part[0].transpose(0, 1).flatten(1) for layer in layers for part in (layer.keys, layer.values)]
    live = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)).eval()
    live.prompt_encoder["default"].embedding.weight.data = torch.cat(pairs, dim=1).clone()
    live.save_pretrained(tmp_path / "prefix")
    published = opened.publish(tmp_path / "prefix", name="test/prefix", version="1.0.0", base="smollm2")
    assert published.version.parameters == 230_400
    opened.compose(parse_recipe("smollm2+test/prefix", dtype=Dtype.FP32, export=Export.ONNX), tmp_path / "out")
    session = open_session(tmp_path / "out" / "model.onnx")
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        expected = live(input_ids=ids, attention_mask=mask).logits[0].numpy()
        wanted = live.generate(input_ids=ids, attention_mask=mask, max_new_tokens=32, do_sample=False)
    found = forward(session, ids.numpy(), mask.numpy())[0][0]
    for oracle in (expected, whole):
        assert float(np.abs(found - oracle).max()) <= 1e-5 * float(np.abs(oracle).max())
    tokens = generate(session, ids.numpy(), mask.numpy(), 32, [2])[0]
    assert tokens.tolist() == wanted[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("config", "options", "ref"),
    [
        ("PromptEncoderConfig", {"encoder_hidden_size": 64}, "test/p-tuning"),
        ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}, "test/multitask#1"),
        ("CPTConfig", {"cpt_token_ids": [28, 30, 47, 198], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]},
         "test/cpt"),
    ],
)  # fmt: skip
def test_each_kind_of_soft_prompt_is_words_of_smollm2(
    config: str, options: dict[str, Any], ref: str, opened: LocalRegistry, smollm2: Path, tmp_path: Path
) -> None:
    """PEFT live against the plain checkpoint: fp32 logits to 1e-4 and 32 greedy tokens."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    rows = base.get_input_embeddings().weight
    torch.manual_seed(2)
    sizes = {} if "CPT" in config else {"num_virtual_tokens": 8}
    live = peft.get_peft_model(base, getattr(peft, config)(task_type="CAUSAL_LM", **sizes, **options)).eval()
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * rows.std() * torch.randn_like(parameter)
    live.save_pretrained(tmp_path / "soft")
    opened.publish(tmp_path / "soft", name=ref.split("#", maxsplit=1)[0], version="1.0.0", base="smollm2")
    opened.compose(parse_recipe(f"smollm2+{ref}", dtype=Dtype.FP32), tmp_path / "out")
    words = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    task = {"task_ids": torch.tensor([1])} if "#" in ref else {}
    ids = prompt_ids(AutoTokenizer.from_pretrained(smollm2))[0]
    given = prompt_ids(AutoTokenizer.from_pretrained(tmp_path / "out"))[0]
    count = given.shape[1] - ids.shape[1]
    with torch.inference_mode():
        expected = live(input_ids=ids, attention_mask=torch.ones_like(ids), **task).logits[0, count:]
        found = words(input_ids=given).logits[0, count:, : expected.shape[1]]
        wanted = live.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, **task
        )
        tokens = words.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=32, do_sample=False
        )
    assert float((found - expected).abs().max()) <= 1e-4
    assert tokens[0, given.shape[1] :].tolist() == wanted[0, -(tokens.shape[1] - given.shape[1]) :].tolist()


def test_an_untrained_prefix_is_not_taken_for_a_wrong_graph(
    opened: LocalRegistry, smollm2: Path, tmp_path: Path
) -> None:
    """Its logits are ill-conditioned: torch itself is as far from float64, which the export measures and records."""
    import torch
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    torch.manual_seed(0)
    live = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20))
    live.prompt_encoder["default"].embedding.weight.data.normal_()
    live.save_pretrained(tmp_path / "prefix")
    opened.publish(tmp_path / "prefix", name="test/untrained", version="1.0.0", base="smollm2")
    found = opened.compose(
        parse_recipe("smollm2+test/untrained", dtype=Dtype.FP32, export=Export.ONNX), tmp_path / "out"
    ).record["export"]
    largest = max(check["max_abs_diff"] for check in found["checks"])
    rounding = max(check.get("float32_rounding", 0.0) for check in found["checks"])
    assert 1e-3 < largest <= found["tolerance"] <= 8 * rounding


def test_two_real_adapters_are_the_float64_sum_rounded_once(
    opened: LocalRegistry, smollm2: Path, tmp_path: Path
) -> None:
    """At most one element in a thousand differs from the float64 reference, by accumulation in float32."""
    import torch
    from safetensors.torch import load_file

    composed = opened.compose(parse_recipe("smollm2+team/shout:0.7+team/json:-0.4"), tmp_path / "out")
    base, found = load_file(smollm2 / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: tensor.double() for name, tensor in base.items()}
    for name, weight, scale in (("shout", 0.7, 16 / 8), ("json", -0.4, 8 / 4**0.5)):
        state = load_file(EXAMPLES / "adapters" / name / "adapter_model.safetensors")
        for key in (key for key in state if key.endswith(".lora_A.weight")):
            target = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            product = state[key.replace("lora_A", "lora_B")].double() @ state[key].double()
            expected[target] += weight * scale * product
    different = sum(int((found[name] != expected[name].to(torch.bfloat16)).sum()) for name in found)
    touched = sum(tensor.numel() for name, tensor in found.items() if not torch.equal(tensor, base[name]))
    assert 0 < touched
    assert different <= touched / 1000
    assert all(0.9 < entry["survival"] <= 1.1 for entry in composed.record["adapters"])


def test_minilm_with_a_lora_runs_in_onnx_runtime(opened: LocalRegistry, minilm: Path, tmp_path: Path) -> None:
    """Hidden states of the exported encoder equal PEFT live to 1e-4 on a padded batch."""
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    from composer.exporters.onnx.session import open_session

    lora = random_lora(minilm, tmp_path / "lora", auto="AutoModel", target_modules=["query", "value"])
    recipe = Recipe(base=str(minilm), adapters=({"ref": str(lora)},), export=Export.ONNX)
    opened.compose(recipe, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    batch = tokenizer(["A cat sat on the mat.", "The weather is nice."], padding=True, return_tensors="pt")
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(minilm), lora).eval()
    with torch.inference_mode():
        expected = model(**batch).last_hidden_state.numpy()
    session = open_session(tmp_path / "out" / "model.onnx")
    feeds = {item.name: batch[item.name].numpy() for item in session.get_inputs()}
    found = session.run(["last_hidden_state"], feeds)[0]
    mask = batch["attention_mask"].numpy().astype(bool)
    assert float(np.abs(found - expected)[mask].max()) <= 1e-4
