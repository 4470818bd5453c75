"""Encoder-decoders as two graphs over one safetensors file, against torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.errors import OnnxExportError, OnnxVerificationError, UnsupportedArchitectureError
from composer.exporters import prepare_export
from composer.exporters.onnx import ARCHITECTURES, export_onnx, supported
from composer.exporters.onnx import bind as bind_module
from composer.exporters.onnx.seq2seq import DECODER_FILE, ENCODER_FILE
from composer.exporters.onnx.seq2seq_session import generate_seq2seq, open_seq2seq
from composer.exporters.onnx.variants import Variant
from composer.recipe import Export, Placement
from composer.run import compose
from composer.tensors import read_header
from tests.composer.seq2seq import IDS, MASK, MODELS, build
from tests.conftest import random_lora
from tests.support import plan_folders

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One graph cache for the module, so that each configuration is traced once."""
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny random model as a checkpoint folder; the same name gives the same weights."""

    def save(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        build(name).to(dtype).save_pretrained(tmp_path / name, **options)
        return tmp_path / name

    return save


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Save the folder's weights again with other tensors."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def torch_tokens(model: Any) -> np.ndarray:
    """The ten tokens that transformers' greedy search gives for the batch."""
    found = model.generate(
        input_ids=torch.from_numpy(IDS),
        attention_mask=torch.from_numpy(MASK),
        max_new_tokens=10,
        do_sample=False,
        use_cache=False,  # transformers makes its cache as deep as the encoder, which is less deep here
        eos_token_id=None,
        forced_eos_token_id=None,
    )
    return np.asarray(found[:, 1:])


@pytest.mark.parametrize(("name", "dtype"), [("t5", "bfloat16"), ("flan-t5", "float32"), ("bart", "float16")])
def test_two_graphs_compute_what_torch_computes(make: Callable[..., Path], cache: Path, name: str, dtype: str) -> None:
    """Padded batches are encoded, and decoded with a cache from one and from several tokens, as torch does."""
    folder = make(name, getattr(torch, dtype))
    result = export_onnx(folder, cache_dir=cache)
    assert result.files == (ENCODER_FILE, DECODER_FILE)
    assert (result.task, result.weight_dtype, result.compute_dtype) == ("text2text-generation", dtype, "float32")
    assert result.max_abs_diff == max(check["max_abs_diff"] for check in result.checks) <= result.tolerance
    assert {check["padding"] for check in result.checks} == {"none", "right"}
    assert {check["prefill"] for check in result.checks} == {1, 4}
    assert all(check["decoded"] >= 8 and check["greedy_equal"] for check in result.checks)
    assert not list(folder.glob(".*"))
    assert export_onnx(folder, cache_dir=cache).graph_cached


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mt5", "umt5", "mbart"])
def test_relatives_compute_what_torch_computes(make: Callable[..., Path], name: str) -> None:
    """The multilingual models of both families."""
    result = export_onnx(make(name))
    assert result.max_abs_diff <= result.tolerance


def test_every_row_of_encoder_decoders_is_tested() -> None:
    """A row without a tiny model here is not supported."""
    rows = {name for name, row in ARCHITECTURES.items() if row.is_seq2seq}
    assert rows == {f"{stem}ForConditionalGeneration" for stem, _ in MODELS.values()}


def test_every_weight_lies_in_the_safetensors_file(make: Callable[..., Path], cache: Path) -> None:
    """Each tensor is an initializer of one of the graphs or of both, at its own place; there is no second copy."""
    folder = make("bart", torch.float16)
    export_onnx(folder, cache_dir=cache)
    found: dict[str, Any] = {}
    for file in (ENCODER_FILE, DECODER_FILE):
        onnx.checker.check_model(str(folder / file))
        model = onnx.load_model(folder / file, load_external_data=False)
        for item in model.graph.initializer:
            if item.data_location == onnx.TensorProto.EXTERNAL:
                found[item.name] = {entry.key: entry.value for entry in item.external_data}
    tensors = read_header(folder / "model.safetensors").tensors
    assert found == {
        name: {"location": "model.safetensors", "offset": str(spec.offset), "length": str(spec.nbytes)}
        for name, spec in tensors.items()
    }
    assert "final_logits_bias" in found


def test_inputs_and_outputs_have_the_standard_names(make: Callable[..., Path], cache: Path) -> None:
    """The decoder takes and gives what optimum's decoder with a past does, lengths free; the encoder what it takes."""
    folder = make("bart")
    export_onnx(folder, cache_dir=cache)
    session = open_seq2seq(folder)
    pairs = [f"{layer}.{{}}.{part}" for layer in range(2) for part in ("key", "value")]
    own, cross = ([pair.format(side) for pair in pairs] for side in ("decoder", "encoder"))

    def names(values: Any) -> list[str]:
        return [item.name for item in values]

    assert names(session.encoder.get_inputs()) == ["input_ids", "attention_mask"]
    assert names(session.encoder.get_outputs()) == ["last_hidden_state", *(f"present.{name}" for name in cross)]
    past = {f"past_key_values.{name}" for name in (*own, *cross)}
    assert set(names(session.decoder.get_inputs())) == {"encoder_attention_mask", "input_ids", *past}
    assert names(session.decoder.get_outputs()) == ["logits", *(f"present.{name}" for name in own)]
    shapes = {item.name: item.shape for item in session.decoder.get_inputs()}
    assert shapes["input_ids"] == ["batch_size", "decoder_sequence_length"]
    assert shapes["past_key_values.1.decoder.key"] == ["batch_size", 2, "past_decoder_sequence_length", 16]
    assert shapes["past_key_values.1.encoder.key"] == ["batch_size", 2, "encoder_sequence_length", 16]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation_equals_greedy_decoding_by_transformers(make: Callable[..., Path], cache: Path, name: str) -> None:
    """Rows of different lengths get the tokens that transformers gives, and stop at the end token."""
    folder = make(name)
    export_onnx(folder, cache_dir=cache)
    model = build(name)
    session = open_seq2seq(folder)
    start = model.config.decoder_start_token_id
    got = generate_seq2seq(session, IDS, MASK, start_ids=[start], max_new_tokens=10)
    assert np.array_equal(got, torch_tokens(model))
    assert not np.array_equal(got[0], got[1])  # what is encoded matters
    stop = int(got[0, 2])
    ended = generate_seq2seq(session, IDS[:1], MASK[:1], start_ids=[start], max_new_tokens=10, eos_ids=(stop,))
    assert ended.shape[1] <= 3
    assert ended[0, -1] == stop


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_composed_lora_generates_what_peft_generates(make: Callable[..., Path], cache: Path, name: str) -> None:
    """base+lora: the composition's graphs come from the base's cache, hold its record, and say what PEFT says live."""
    base = make(name)
    adapter = random_lora(base, base.parent / "lora", auto="AutoModelForSeq2SeqLM", task_type="SEQ_2_SEQ_LM")
    out = base.parent / "out"
    record = compose(plan_folders(base, [(adapter, 4.0)], export=Export.ONNX), out, cache_dir=cache).record
    assert record["export"]["files"] == [ENCODER_FILE, DECODER_FILE]
    assert record["export"]["max_abs_diff"] <= record["export"]["tolerance"]
    assert {ENCODER_FILE, DECODER_FILE, "model.safetensors"} <= {path.name for path in out.iterdir()}
    live = peft.PeftModel.from_pretrained(build(name), adapter)
    for part in live.modules():
        if hasattr(part, "set_scale"):
            part.set_scale("default", 4.0)
    start = live.config.decoder_start_token_id
    got = generate_seq2seq(open_seq2seq(out), IDS, MASK, start_ids=[start], max_new_tokens=10)
    expected = torch_tokens(live.eval())
    assert np.array_equal(got, expected)
    assert not np.array_equal(got, torch_tokens(build(name)))


def test_wrong_offset_is_caught_and_leaves_no_graph(
    make: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Projections of the cross-attention bound to each other's bytes are noticed; both files, old or new, are gone."""
    folder = make("t5")
    export_onnx(folder, cache_dir=cache)
    honest = bind_module.stored_tensors

    def swapped(path: Path) -> dict[str, Any]:
        tensors = honest(path)
        one, other = (f"decoder.block.1.layer.1.EncDecAttention.{part}.weight" for part in ("k", "v"))
        return {**tensors, one: tensors[other], other: tensors[one]}

    monkeypatch.setattr(bind_module, "stored_tensors", swapped)
    with pytest.raises(OnnxVerificationError) as caught:
        export_onnx(folder, cache_dir=cache)
    assert caught.value.fields["max_abs_diff"] > caught.value.fields["tolerance"]
    assert not list(folder.glob("*.onnx"))
    assert not list(folder.glob(".*"))


def test_tensors_of_neither_graph_are_named(make: Callable[..., Path], cache: Path) -> None:
    """What transformers itself passes over is passed over, a tensor of no parameter is not."""
    folder = make("t5")
    first = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    rewrite(folder, lambda tensors: {**tensors, first: torch.ones(32, 4)})
    export_onnx(folder, cache_dir=cache)
    rewrite(folder, lambda tensors: {**tensors, "decoder.extra.weight": torch.ones(3)})
    with pytest.raises(OnnxExportError) as caught:
        export_onnx(folder, cache_dir=cache)
    assert caught.value.fields["unused"] == ["decoder.extra.weight"]


def test_bart_without_a_bias_of_the_logits_is_taken_as_transformers_takes_it(
    make: Callable[..., Path], cache: Path
) -> None:
    """A checkpoint that stores no final_logits_bias has one of zeros."""
    folder = make("bart")
    rewrite(folder, lambda tensors: {name: value for name, value in tensors.items() if name != "final_logits_bias"})
    result = export_onnx(folder, cache_dir=cache)
    assert result.graph_cached
    assert result.max_abs_diff <= result.tolerance


def test_stored_head_decides_whether_it_is_tied(make: Callable[..., Path], cache: Path) -> None:
    """transformers 5 says of every T5 that its ends are tied; a head with other bytes is one of its own."""
    folder = make("flan-t5")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert bind_module.own_head(folder)
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["shared.weight"].clone()})
    assert not bind_module.own_head(folder)
    assert not bind_module.own_head(make("t5"))


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["MarianMTModel"]},
        {"architectures": ["T5EncoderModel"]},
        {"architectures": ["BartForSequenceClassification"]},
        {"architectures": ["BartForCausalLM"]},
        {"is_encoder_decoder": False},
        {"add_cross_attention": True},
    ],
)
def test_other_encoder_decoders_are_refused_by_name(change: dict[str, Any]) -> None:
    """The error names what was found; nothing is read but the config."""
    config = {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    supported(config)
    with pytest.raises(UnsupportedArchitectureError) as caught:
        supported({**config, **change})
    assert caught.value.found == (change.get("architectures") or config["architectures"])[0]


@pytest.mark.parametrize("placement", [Placement.SEPARATE, Placement.MULTI])
def test_adapters_are_not_kept_apart_from_an_encoder_decoder(make: Callable[..., Path], placement: Placement) -> None:
    """They are kept beside one graph, and this model has two: refused by name, before anything is written."""
    base = make("t5")
    adapter = random_lora(base, base.parent / "lora", auto="AutoModelForSeq2SeqLM", task_type="SEQ_2_SEQ_LM")
    plan = plan_folders(base, [(adapter, 1.0)], export=Export.ONNX, placement=placement)
    with pytest.raises(UnsupportedArchitectureError, match="T5ForConditionalGeneration"):
        prepare_export(plan)


@pytest.mark.parametrize("options", [{"compute": "float16"}, {"quantise": "int8"}, {"flavour": "genai"}])
def test_variants_are_not_made_of_an_encoder_decoder(make: Callable[..., Path], options: dict[str, str]) -> None:
    """What is done to one graph is refused for two, by name, before anything is traced or written."""
    folder = make("t5")
    with pytest.raises(UnsupportedArchitectureError, match="T5ForConditionalGeneration"):
        export_onnx(folder, variant=Variant(**options))
    assert not list(folder.glob("*.onnx"))
