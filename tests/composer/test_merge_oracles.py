"""What a composition must equal: PEFT bit for bit, a float64 sum rounded once, and itself at every repetition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import composer.plan as plan_module
import composer.run as run_module
from composer.adapters import open_adapter
from composer.checkpoint import open_checkpoint
from composer.errors import NonFiniteError, TargetMismatchError
from composer.files import sha256_file
from composer.provenance import manifest_digest
from composer.recipe import Dtype
from composer.tensors import read_header
from tests.conftest import llama_config, random_lora, save_model
from tests.support import (
    compose_folders,
    edit_json,
    plan_folders,
    read_tensors,
    reshard,
    weight_bytes,
    write_base,
    write_lora,
    write_tensors,
)

LINEARS = "all-linear"


def peft_merge(base: Path, adapter: Path, auto: str = "AutoModelForCausalLM") -> dict[str, torch.Tensor]:
    """PEFT's own default merge, in the base's dtype."""
    import peft
    import transformers

    model = getattr(transformers, auto).from_pretrained(base, dtype="auto")
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def assert_bit_equal(out: Path, expected: dict[str, torch.Tensor]) -> None:
    """Every tensor written is the oracle's, dtype and bits."""
    written = read_tensors(out)
    assert written
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="session")
def other_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """bf16 models of other architectures, each made once: qwen2 (biases), gpt2 (Conv1D), bert (a classifier)."""
    import transformers

    made: dict[str, Path] = {}
    sizes = {"hidden_size": 160, "intermediate_size": 400, "num_hidden_layers": 2, "num_attention_heads": 4}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(3)
            if name == "qwen2":
                config = transformers.Qwen2Config(
                    **sizes, num_key_value_heads=2, vocab_size=96, tie_word_embeddings=True
                )
                model = transformers.Qwen2ForCausalLM(config)
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        torch.nn.init.normal_(parameter, std=0.1)
            elif name == "gpt2":
                model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
                    n_embd=160, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=1))  # fmt: skip
            else:
                config = transformers.BertConfig(**sizes, vocab_size=96, max_position_embeddings=64, num_labels=3)
                model = transformers.BertForSequenceClassification(config)
            made[name] = save_model(model.bfloat16(), tmp_path_factory.mktemp("models") / name)
        return made[name]

    return make


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"target_modules": LINEARS}, id="all-linear"),
        pytest.param({"target_modules": ["q_proj", "down_proj"]}, id="a-subset"),
        pytest.param({"target_modules": LINEARS, "use_rslora": True, "r": 6, "lora_alpha": 5}, id="rslora"),
        pytest.param(
            {"target_modules": LINEARS, "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2}}, id="rank-pattern"
        ),
        pytest.param(
            {"target_modules": LINEARS, "alpha_pattern": {"model.layers.0.self_attn.k_proj": 3, "down_proj": 32}},
            id="alpha-pattern",
        ),
        pytest.param(
            {
                "target_modules": LINEARS,
                "use_rslora": True,
                "rank_pattern": {"^model.layers.1.*": 3},
                "alpha_pattern": {"o_proj": 7, "proj": 11},
            },
            id="patterns-with-rslora-first-match-wins",
        ),  # fmt: skip
        pytest.param({"target_modules": ["lm_head", "q_proj"]}, id="an-untied-lm-head"),
        pytest.param({"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}, id="modules-to-save"),
    ],
)
@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
def test_one_lora_on_llama_equals_pefts_default_merge_bit_for_bit(
    tiny_llama: Path, tmp_path: Path, config: dict[str, Any], sharded: bool
) -> None:
    """Oracle: merge_and_unload of the bf16 base, compared with torch.equal on every parameter."""
    adapter = random_lora(tiny_llama, tmp_path / "lora", seed=11, **config)
    base = reshard(tiny_llama, tmp_path / "sharded") if sharded else tiny_llama
    compose_folders(base, [(adapter, 1.0)], tmp_path / "out")
    assert_bit_equal(tmp_path / "out", peft_merge(tiny_llama, adapter))


@pytest.mark.parametrize(
    ("name", "auto", "config"),
    [
        pytest.param("qwen2", "AutoModelForCausalLM", {"target_modules": LINEARS}, id="qwen2-with-biases-and-tied-head"),
        pytest.param("gpt2", "AutoModelForCausalLM", {"target_modules": ["c_attn", "c_proj", "c_fc"],
                                                      "fan_in_fan_out": True}, id="gpt2-conv1d"),
        pytest.param("bert", "AutoModelForSequenceClassification", {"target_modules": ["query", "value", "dense"],
                     "task_type": "SEQ_CLS"}, id="bert-classifier-replaced"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("block_bytes", [64 << 20, 1], ids=["whole", "blocks-of-a-row"])
def test_one_lora_on_other_architectures_equals_peft_bit_for_bit(
    other_models: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    auto: str,
    config: dict[str, Any],
    block_bytes: int,
) -> None:
    """Oracle: PEFT on attention biases, on Conv1D ([in, out]) and on a classifier that the adapter replaces."""
    base = other_models(name)
    adapter = random_lora(base, tmp_path / "lora", auto=auto, **config)
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", block_bytes)
    compose_folders(base, [(adapter, 1.0)], tmp_path / "out")
    assert_bit_equal(tmp_path / "out", peft_merge(base, adapter, auto))


def test_the_classifier_of_a_sequence_classifier_is_replaced_not_added(
    other_models: Callable[[str], Path], tmp_path: Path
) -> None:
    """The written classifier is the adapter's tensor rounded to bf16."""
    base = other_models("bert")
    adapter = random_lora(
        base,
        tmp_path / "lora",
        auto="AutoModelForSequenceClassification",
        target_modules=["query"],
        task_type="SEQ_CLS",
    )
    compose_folders(base, [(adapter, 1.0)], tmp_path / "out")
    trained = torch.from_numpy(
        read_header(adapter / "adapter_model.safetensors").tensors["base_model.model.classifier.weight"].read().copy()
    )
    assert torch.equal(read_tensors(tmp_path / "out")["classifier.weight"], trained.bfloat16())


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_size_of_blocks_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transposed: bool, threads: int
) -> None:
    """Oracle: one block a tensor. Blocks of any size give its bytes, in float32, where every bit of B·A shows."""
    shapes = {"a": (1001, 384), "b": (300, 1000), "c": (129, 70), "c_proj": (64, 64), "e": (3, 500)}
    random = np.random.default_rng(0)
    weights = {f"{name}.weight": random.normal(size=shape[::-1] if transposed else shape).astype(np.float32) * 1e-6
               for name, shape in shapes.items()}  # fmt: skip
    base = write_base(tmp_path / "base", weights, model_type="gpt2" if transposed else "llama")
    adapters = [
        (write_lora(tmp_path / "one", shapes, rank=16, fan_in_fan_out=transposed), 0.6),
        (write_lora(tmp_path / "two", shapes, rank=3, seed=4, fan_in_fan_out=transposed), -0.3),
    ]
    compose_folders(base, adapters, tmp_path / "whole")
    monkeypatch.setattr(run_module, "THREADS", threads)
    for block_bytes in (1, 100_000, 250_000, 600_000):
        monkeypatch.setattr(plan_module, "BLOCK_BYTES", block_bytes)
        compose_folders(base, adapters, tmp_path / f"blocks-{block_bytes}")
        assert weight_bytes(tmp_path / "whole") == weight_bytes(tmp_path / f"blocks-{block_bytes}"), block_bytes


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("block_bytes", [1, 64 * 40, 200 * 40, 1 << 20])
def test_blocks_cover_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, block_bytes: int
) -> None:
    """Blocks are adjacent and in order, whatever the budget."""
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", block_bytes)
    base = write_base(tmp_path / "base", {"w": np.zeros((rows, 10), np.float32)})
    blocks = list(plan_folders(base).jobs[0].blocks)
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(rows))


def test_the_copy_of_an_output_head_in_an_adapter_must_be_this_bases(tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT saves the base's head along with a LoRA on it; over a base with another head the compose is refused."""
    adapter = random_lora(tiny_llama, tmp_path / "lora", target_modules=["lm_head"])
    assert any("base_layer" in name for name in read_header(adapter / "adapter_model.safetensors").tensors)
    tensors = {name: spec.read() for name, spec in read_header(tiny_llama / "model.safetensors").tensors.items()}
    head = tensors["lm_head.weight"].copy()
    head[5, 7] += 1
    base = write_base(tmp_path / "base", {**tensors, "lm_head.weight": head})
    with pytest.raises(TargetMismatchError, match="lm_head"):
        compose_folders(base, [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_logits_of_a_float32_composition_are_those_of_the_live_adapter(
    tiny_llama: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    """Oracle: PEFT without merging, in float32: logits to 1e-4 and the same greedy tokens for 10 prompts."""
    import peft
    from transformers import AutoModelForCausalLM

    compose_folders(tiny_llama, [(tiny_lora, 1.0)], tmp_path / "out", dtype=Dtype.FP32)
    live = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), tiny_lora
    ).eval()
    composed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert composed.dtype == torch.float32
    prompts = torch.randint(3, 128, (10, 12), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected, found = live(input_ids=prompts).logits, composed(input_ids=prompts).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()(input_ids=prompts).logits
        assert (expected - base).abs().max() > 1e-2, "the adapter must change something"
        assert (expected - found).abs().max() <= 1e-4
        greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(live.generate(input_ids=prompts, **greedy), composed.generate(input_ids=prompts, **greedy))


def delta64(adapter: Path, scale: Callable[[str, int], float]) -> dict[str, torch.Tensor]:
    """s·B·A of each module in float64, read by the reference reader."""
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    deltas = {}
    for name in [key for key in tensors if "lora_A" in key]:
        a, b = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        deltas[f"{module}.weight"] = scale(module, a.shape[0]) * (b @ a)
    return deltas


@pytest.mark.parametrize("weights", [(0.7, 0.4), (1.0, 1.0), (-0.5, 1.25)], ids=str)
def test_two_adapters_equal_the_float64_sum_rounded_once(
    tiny_llama: Path,
    tiny_lora: Path,
    other_lora: Path,
    tmp_path: Path,
    weights: tuple[float, float],
    record_property: Callable[[str, object], None],
) -> None:
    """Oracle: base + Σ w·s·B·A in float64, rounded to bf16 once; fewer than 1 element in 2,000 may differ, by one ulp."""
    compose_folders(tiny_llama, list(zip((tiny_lora, other_lora), weights, strict=True)), tmp_path / "out")
    first = delta64(tiny_lora, lambda module, rank: 8 / rank)
    second = delta64(other_lora, lambda module, rank: 8 / rank**0.5)
    base, written = read_tensors(tiny_llama), read_tensors(tmp_path / "out")
    differing, total = 0, 0
    for name, tensor in base.items():
        exact = tensor.double()
        for weight, deltas in zip(weights, (first, second), strict=True):
            exact = exact + weight * deltas.get(name, torch.zeros(()))
        rounded = exact.to(torch.bfloat16)
        differing += int((rounded != written[name]).sum())
        total += tensor.numel() if name in first else 0
        spacing = torch.maximum(rounded.float().abs() * 2**-7, torch.tensor(1e-6))
        assert bool(((written[name].float() - rounded.float()).abs() <= spacing).all()), name
    record_property("differing", f"{differing} of {total}")
    assert differing <= total / 2000


def test_weight_zero_gives_the_bytes_of_leaving_the_adapter_out(
    tiny_llama: Path, tiny_lora: Path, other_lora: Path, tmp_path: Path
) -> None:
    """Weights files with an adapter at 0 and without it are the same bytes, and so for an adapter alone."""
    compose_folders(tiny_llama, [(tiny_lora, 0.7)], tmp_path / "without")
    compose_folders(tiny_llama, [(tiny_lora, 0.7), (other_lora, 0.0)], tmp_path / "zero")
    assert weight_bytes(tmp_path / "without") == weight_bytes(tmp_path / "zero")
    compose_folders(tiny_llama, [(other_lora, 0.0)], tmp_path / "alone")
    untouched, base = read_tensors(tmp_path / "alone"), read_tensors(tiny_llama)
    assert all(torch.equal(untouched[name], tensor) for name, tensor in base.items())


def test_no_adapter_at_all_copies_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    """A recipe of a base alone gives the base's tensors."""
    compose_folders(tiny_llama, [], tmp_path / "out")
    base, written = read_tensors(tiny_llama), read_tensors(tmp_path / "out")
    assert base.keys() == written.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in base.items())


def test_a_weight_and_its_opposite_cancel_to_the_base(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """+1 and −1 of one adapter give the base's bits, since nothing is rounded in between."""
    compose_folders(tiny_llama, [(tiny_lora, 1.0), (tiny_lora, -1.0)], tmp_path / "out")
    base, written = read_tensors(tiny_llama), read_tensors(tmp_path / "out")
    assert all(torch.equal(written[name], tensor) for name, tensor in base.items())


def test_the_order_of_adapters_matters_no_more_than_float32_addition(
    tiny_llama: Path, tiny_lora: Path, other_lora: Path, tmp_path: Path
) -> None:
    """In float32 output, swapping the adapters moves no element by more than a few float32 ulps of the operands."""
    terms = [(tiny_lora, 0.7), (other_lora, 0.4)]
    compose_folders(tiny_llama, terms, tmp_path / "ab", dtype=Dtype.FP32)
    compose_folders(tiny_llama, terms[::-1], tmp_path / "ba", dtype=Dtype.FP32)
    ab, ba = read_tensors(tmp_path / "ab"), read_tensors(tmp_path / "ba")
    assert max(float((ab[name] - ba[name]).abs().max()) for name in ab) <= 4 * 2**-24 * 0.5


def test_the_same_recipe_gives_the_same_bytes_at_any_number_of_threads(
    tiny_llama: Path, tiny_lora: Path, other_lora: Path, tmp_path: Path
) -> None:
    """All files, composition.json among them, are identical over repetitions and with 1 and 2 threads."""
    before = torch.get_num_threads()
    try:
        for name, threads in (("first", 1), ("again", 1), ("two", 2)):
            torch.set_num_threads(threads)
            compose_folders(tiny_llama, [(tiny_lora, 0.7), (other_lora, 0.4)], tmp_path / name)
    finally:
        torch.set_num_threads(before)
    first, again, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "again", "two")
    )
    assert "composition.json" in first
    assert first == again == two


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.FP16, Dtype.FP32])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_dtype_conversions_round_once_from_the_float32_sum(
    tiny_lora: Path, tmp_path: Path, stored: torch.dtype, dtype: Dtype
) -> None:
    """Oracle: base.float() + delta in float64 → rounded once; the config names the new dtype and transformers loads it."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    torch.manual_seed(2)
    base = save_model(LlamaForCausalLM(llama_config()).to(stored), tmp_path / "base")
    compose_folders(base, [(tiny_lora, 1.0)], tmp_path / "out", dtype=dtype)
    wanted = {Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16, Dtype.FP32: torch.float32}[dtype]
    deltas = delta64(tiny_lora, lambda module, rank: 8 / rank)
    written = read_tensors(tmp_path / "out")
    for name, tensor in read_tensors(base).items():
        exact = tensor.double() + deltas.get(name, torch.zeros((), dtype=torch.float64))
        assert written[name].dtype == wanted
        if name in deltas:
            assert torch.allclose(written[name].double(), exact, rtol=float(torch.finfo(wanted).eps), atol=1e-7)
        else:
            assert torch.equal(written[name], tensor.to(wanted))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == wanted


def test_a_kept_fp16_or_fp32_base_equals_peft_too(tiny_lora: Path, tmp_path: Path) -> None:
    """Oracle: PEFT's merge into fp16 and fp32 bases, bit for bit."""
    from transformers import LlamaForCausalLM

    for stored in (torch.float16, torch.float32):
        torch.manual_seed(2)
        base = save_model(LlamaForCausalLM(llama_config()).to(stored), tmp_path / f"base-{stored}")
        compose_folders(base, [(tiny_lora, 1.0)], tmp_path / f"out-{stored}")
        assert_bit_equal(tmp_path / f"out-{stored}", peft_merge(base, tiny_lora))


def test_an_adapter_stored_in_bf16_is_widened_as_peft_does(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """Oracle: PEFT's merge of the same adapter saved in bf16."""
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / "bf16"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes((tiny_lora / "adapter_config.json").read_bytes())
    tensors = load_file(tiny_lora / "adapter_model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    compose_folders(tiny_llama, [(adapter, 1.0)], tmp_path / "out")
    assert_bit_equal(tmp_path / "out", peft_merge(tiny_llama, adapter))


def test_an_overflow_into_fp16_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    """1e5 does not fit into fp16: NonFiniteError names the tensor, merged or cast, and OUT does not appear."""
    big = {"model.q_proj.weight": np.full((4, 4), 6.5e4, np.float32), "model.norm.weight": np.ones(4, np.float32)}
    base = write_base(tmp_path / "base", big)
    lora = write_lora(tmp_path / "lora", {"model.q_proj": (4, 4)}, std=100.0)
    with pytest.raises(NonFiniteError, match=r"model\.q_proj\.weight"):
        compose_folders(base, [(lora, 1.0)], tmp_path / "out", dtype=Dtype.FP16)
    write_base(base, {**big, "model.norm.weight": np.full(4, 1e5, np.float32)})
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        compose_folders(base, [], tmp_path / "out", dtype=Dtype.FP16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"]


def test_integer_tensors_of_a_base_pass_through_unchanged(tmp_path: Path) -> None:
    """A buffer of integers, an empty tensor and a scalar keep bytes and dtype, whatever --dtype says of floats."""
    tensors = {
        "model.q_proj.weight": np.ones((4, 4), np.float32),
        "model.position_ids": np.arange(8, dtype=np.int64).reshape(1, 8),
        "model.empty": np.zeros((0, 4), np.float32),
        "model.scale": np.array(2.5, np.float32),
    }
    base = write_base(tmp_path / "base", tensors)
    lora = write_lora(tmp_path / "lora", {"model.q_proj": (4, 4)})
    compose_folders(base, [(lora, 1.0)], tmp_path / "out", dtype=Dtype.BF16)
    written = read_tensors(tmp_path / "out")
    assert torch.equal(written["model.position_ids"], torch.arange(8).reshape(1, 8))
    assert written["model.empty"].shape == (0, 4)
    assert written["model.scale"].item() == 2.5
    assert written["model.scale"].dtype == torch.bfloat16


def test_an_output_is_a_checkpoint_with_its_companions(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """Config, tokenizer, template and generation config go along unchanged; README, pickles and hidden files do not."""
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_llama.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    kept = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "{{ x }}", "vocab.txt": "a\n"}
    dropped = {"README.md": "no", "pytorch_model.bin": "no", ".hidden.json": "{}", "composition.json": "{}"}
    for name, text in (kept | dropped).items():
        (base / name).write_text(text)
    compose_folders(base, [(tiny_lora, 1.0)], tmp_path / "out")
    for name in (*kept, "config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {*kept, "config.json", "generation_config.json", "model.safetensors", "composition.json"}


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
def test_weights_begin_at_a_page_and_the_index_is_true(
    tiny_llama: Path, tiny_lora: Path, tmp_path: Path, sharded: bool
) -> None:
    """The data of every file begins at a multiple of 4096; the index names each tensor's file and the total size."""
    base = reshard(tiny_llama, tmp_path / "sharded") if sharded else tiny_llama
    compose_folders(base, [(tiny_lora, 1.0)], tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == (3 if sharded else 1)
    for path in files:
        header = read_header(path)
        assert min(spec.offset for spec in header.tensors.values()) % 4096 == 0
        assert header.metadata == {"format": "pt"}
    if sharded:
        from transformers import AutoModelForCausalLM

        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        held = {name: path.name for path in files for name in read_header(path).tensors}
        assert index["weight_map"] == held
        sizes = (spec.nbytes for path in files for spec in read_header(path).tensors.values())
        assert index["metadata"]["total_size"] == sum(sizes)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_the_record_says_what_went_in_and_what_came_out(
    tiny_llama: Path, tiny_lora: Path, other_lora: Path, tmp_path: Path
) -> None:
    """Every sha256 and size in composition.json is that of the file; counts, recipe and digest agree with the plan."""
    outcome = compose_folders(tiny_llama, [(tiny_lora, 0.5), (other_lora, 1.0)], tmp_path / "out")
    record = json.loads((tmp_path / "out" / "composition.json").read_text())
    assert record == outcome.record
    files = {path.name for path in (tmp_path / "out").iterdir()} - {"composition.json"}
    assert set(record["outputs"]) == files
    for name, entry in record["outputs"].items():
        path = tmp_path / "out" / name
        assert entry == {"sha256": sha256_file(path), "size": path.stat().st_size}
    assert record["output_digest"] == manifest_digest(record["outputs"])
    assert record["tensors"] == {"touched": 14, "total": len(read_tensors(tiny_llama))}
    assert [entry["weight"] for entry in record["adapters"]] == [0.5, 1.0]
    assert record["recipe_text"] == f"{tiny_llama.name}+{tiny_lora.name}:0.5+{other_lora.name}"
    assert not {"time", "host", "path"} & set(record)


def test_the_recorded_norm_is_that_of_the_delta(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """Oracle: the Frobenius norm of all s·B·A in float64."""
    outcome = compose_folders(tiny_llama, [(tiny_lora, 0.5)], tmp_path / "out")
    deltas = delta64(tiny_lora, lambda module, rank: 8 / rank)
    exact = sum(float((delta**2).sum()) for delta in deltas.values()) ** 0.5
    assert outcome.record["adapters"][0]["delta_norm"] == pytest.approx(exact, rel=1e-4)


def test_survival_is_one_in_float32_and_measured_in_bf16(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """Oracle: ⟨written − base, Δ⟩ / ⟨Δ, Δ⟩ in float64 over all touched tensors."""
    wide = compose_folders(tiny_llama, [(tiny_lora, 1.0)], tmp_path / "fp32", dtype=Dtype.FP32)
    assert wide.record["adapters"][0]["survival"] == pytest.approx(1.0, abs=1e-4)
    kept = compose_folders(tiny_llama, [(tiny_lora, 0.01)], tmp_path / "bf16")
    base, written = read_tensors(tiny_llama), read_tensors(tmp_path / "bf16")
    deltas = delta64(tiny_lora, lambda module, rank: 0.01 * 8 / rank)
    numerator = sum(
        float(((written[name].double() - base[name].double()) * delta).sum()) for name, delta in deltas.items()
    )
    denominator = sum(float((delta**2).sum()) for delta in deltas.values())
    assert kept.record["adapters"][0]["survival"] == pytest.approx(numerator / denominator, abs=2e-3)


def test_a_minuscule_adapter_is_reported_as_lost(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """A delta far below the spacing of bf16 survives not at all: the warning says so and names the remedy."""
    record = compose_folders(tiny_llama, [(tiny_lora, 1e-6)], tmp_path / "out").record
    assert record["adapters"][0]["survival"] < 0.5
    assert any("survives rounding" in line and "--dtype" in line for line in record["warnings"])
    assert not compose_folders(tiny_llama, [(tiny_lora, 1.0)], tmp_path / "full").record["warnings"]


def test_an_adapter_that_changes_nothing_is_reported(tiny_llama: Path, tmp_path: Path) -> None:
    """A LoRA with B = 0 (never trained) gives a warning, also beside another adapter that replaces a tensor."""
    zero = write_lora(tmp_path / "zero", {"model.layers.0.self_attn.q_proj": (64, 64)}, std=0.0)
    record = compose_folders(tiny_llama, [(zero, 1.0)], tmp_path / "out").record
    assert record["warnings"] == ["zero changes nothing: its delta is zero"]
    norm = {"base_model.model.model.norm.weight": np.ones(64, np.float32)}
    whole = write_lora(tmp_path / "whole", {"model.layers.1.self_attn.q_proj": (64, 64)}, extra=norm)
    record = compose_folders(tiny_llama, [(zero, 1.0), (whole, 1.0)], tmp_path / "both").record
    assert record["warnings"] == ["zero changes nothing: its delta is zero"]


def test_a_classifier_saved_without_its_head_prefix_is_found(tmp_path: Path) -> None:
    """A base saved as the bare encoder lacks the adapter's prefix; the one rule that fits all targets is used."""
    base = write_base(
        tmp_path / "base", {"layer.0.q.weight": np.zeros((4, 6), np.float32)}, architectures=["BertModel"]
    )
    lora = write_lora(tmp_path / "lora", {"bert.layer.0.q": (4, 6)})
    compose_folders(base, [(lora, 1.0)], tmp_path / "out")
    tensors = {name: spec.read() for name, spec in open_adapter(lora).header.tensors.items()}
    a, b = (tensors[f"base_model.model.bert.layer.0.q.lora_{side}.weight"] for side in "AB")
    assert np.allclose(read_tensors(tmp_path / "out")["layer.0.q.weight"].numpy(), 2 * (b @ a), atol=1e-6)


def test_the_plan_is_an_honest_dry_run(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """Names, sizes and the count of changed tensors of the plan are those of the files written."""
    plan = plan_folders(tiny_llama, [(tiny_lora, 1.0)], dtype=Dtype.FP32)
    compose_folders(tiny_llama, [(tiny_lora, 1.0)], tmp_path / "out", dtype=Dtype.FP32)
    assert plan.nbytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert {shard.name for shard in plan.shards} == {shard.name for shard in open_checkpoint(tmp_path / "out").shards}
    base, written = read_tensors(tiny_llama), read_tensors(tmp_path / "out")
    assert plan.touched == sum(not torch.equal(tensor.float(), written[name]) for name, tensor in base.items())


def test_progress_counts_every_byte_once(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """The counts rise and end at the size of the weights."""
    from composer.run import compose

    seen: list[tuple[int, int]] = []
    plan = plan_folders(tiny_llama, [(tiny_lora, 1.0)])
    compose(plan, tmp_path / "out", progress=lambda step, done, total: seen.append((done, total)))
    counts = [done for done, total in seen if total]
    assert counts == sorted(counts)
    assert seen[-1] == (plan.nbytes, plan.nbytes)


def test_names_written_by_an_adapter_under_training_resolve(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """`.default` in the keys (a raw state dict) gives the bytes of PEFT's own saving."""
    tensors = {
        name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): spec.read()
        for name, spec in read_header(tiny_lora / "adapter_model.safetensors").tensors.items()
    }
    write_tensors(tmp_path / "raw" / "adapter_model.safetensors", tensors)
    (tmp_path / "raw" / "adapter_config.json").write_bytes((tiny_lora / "adapter_config.json").read_bytes())
    edit_json(tmp_path / "raw" / "adapter_config.json", revision=None)
    compose_folders(tiny_llama, [(tiny_lora, 1.0)], tmp_path / "a")
    compose_folders(tiny_llama, [(tmp_path / "raw", 1.0)], tmp_path / "b")
    assert weight_bytes(tmp_path / "a") == weight_bytes(tmp_path / "b")
