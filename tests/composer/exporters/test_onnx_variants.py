"""Variants of one traced graph, each against torch in float32: flavours, dtypes of arithmetic, quantised matrices."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.adapters import open_adapter
from composer.checkpoint import open_checkpoint
from composer.errors import (
    MissingDependencyError,
    OnnxVerificationError,
    RecipeError,
    StorageError,
    TypedError,
    UnsupportedAdapterError,
    UnsupportedArchitectureError,
    UsageError,
)
from composer.exporters import prepare_export
from composer.exporters.onnx import Variant, export_onnx, generate, open_session
from composer.exporters.onnx.session import forward
from composer.plan import Plan, Term, make_plan
from composer.recipe import AdapterTerm, Recipe
from composer.run import compose
from composer.tensors import read_header
from tests.composer.prompts import adapt, make_model
from tests.conftest import random_lora, save_model

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
IDS = np.array([[5, 9, 1, 33, 7, 101]])
BATCH = np.array([[11, 12, 13, 14], [21, 22, 0, 0]])
RIGHT = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One graph cache for the module."""
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with grouped queries, in float32."""
    return save_model(make_model("llama"), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy of it to write to."""
    return shutil.copytree(base, tmp_path / "model")


def stored_as(folder: Path, dtype: Any) -> Path:
    """Save its weights in another dtype."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path, {"format": "pt"})
    return folder


def torch_logits(folder: Path, ids: np.ndarray = IDS) -> np.ndarray:
    """What transformers computes in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.from_numpy(ids)).logits.numpy()


def graph_of(folder: Path) -> Any:
    """The graph without its weights."""
    return onnx.load_model(folder / "model.onnx", load_external_data=False)


def places(graph: Any) -> dict[str, dict[str, str]]:
    """Where each initializer outside the graph lies."""
    return {
        item.name: {entry.key: entry.value for entry in item.external_data}
        for item in graph.graph.initializer
        if item.data_location == onnx.TensorProto.EXTERNAL
    }


def recipe_plan(base: Path, *adapters: Path, **fields: Any) -> Plan:
    """The plan of an ONNX export with more fields of the recipe."""
    terms = [Term(path.name, open_adapter(path), 1.0) for path in adapters]
    named = tuple(AdapterTerm(ref=term.label) for term in terms)
    return make_plan(
        Recipe(**{"base": base.name, "adapters": named, "export": "onnx", **fields}), open_checkpoint(base), terms
    )


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("flavour", ["portable", "genai"])
def test_a_graph_that_computes_in_float16_chooses_what_torch_chooses(
    folder: Path, cache: Path, stored: str, flavour: str
) -> None:
    """Logits to 1% of the largest, whatever weights are stored in; the cache is float16, logits and ids are not."""
    if flavour == "genai":
        pytest.importorskip("onnxruntime_genai")
    stored_as(folder, getattr(torch, stored))
    result = export_onnx(folder, cache_dir=cache, variant=Variant(flavour, "float16", min_agreement=0.95))
    assert (result.compute_dtype, result.weight_dtype, result.flavour) == ("float16", stored, flavour)
    assert 0 < result.max_abs_diff <= result.tolerance
    assert 0.95 <= result.agreement <= 1
    session = open_session(folder / "model.onnx")
    types = {item.name: item.type for item in (*session.get_inputs(), *session.get_outputs())}
    assert (types["input_ids"], types["logits"]) == ("tensor(int64)", "tensor(float)")
    assert (types["past_key_values.0.key"], types["present.1.value"]) == ("tensor(float16)", "tensor(float16)")
    expected = torch_logits(folder)
    assert float(np.abs(forward(session, IDS, np.ones_like(IDS))[0] - expected).max()) <= 0.01 * np.abs(expected).max()


def test_weights_that_are_stored_as_is_computed_are_read_without_a_cast(folder: Path, cache: Path) -> None:
    """In float16 every weight is an initializer that no Cast reads, and lies in the safetensors file."""
    stored_as(folder, torch.float16)
    export_onnx(folder, cache_dir=cache, variant=Variant(compute="float16"))
    graph = graph_of(folder)
    weights = read_header(folder / "model.safetensors").tensors
    assert set(places(graph)) == set(weights)
    assert not {node.input[0] for node in graph.graph.node if node.op_type == "Cast"} & set(weights)


def test_bfloat16_is_compared_as_float16_and_its_types_fit(folder: Path, cache: Path) -> None:
    """The CPU cannot multiply in it: the record says what was compared; the published graph is bfloat16 throughout."""
    stored_as(folder, torch.bfloat16)
    result = export_onnx(folder, cache_dir=cache, variant=Variant(compute="bfloat16"))
    assert (result.compute_dtype, result.compared_in) == ("bfloat16", "float16")
    graph = graph_of(folder)
    caches = [item for item in (*graph.graph.input, *graph.graph.output) if "key" in item.name]
    assert {item.type.tensor_type.elem_type for item in caches} == {onnx.TensorProto.BFLOAT16}
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    assert sorted(path.name for path in folder.iterdir() if "onnx" in path.name) == ["model.onnx"]


def dequantised(folder: Path, name: str, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix [out, in] of the data file as its blocks say, and the step of each element."""
    parts = {}
    for part, dtype in (("packed", np.uint8), ("scales", np.float32), ("zeros", np.uint8)):
        where = places(graph_of(folder))[f"{name}.int{bits}.{part}"]
        raw = np.fromfile(folder / where["location"], np.uint8)[int(where["offset"]) :][: int(where["length"])]
        parts[part] = raw.view(dtype)
    rows, columns = read_header(folder / "model.safetensors").tensors[name].shape
    blocks = -(-columns // 32)

    def split(values: np.ndarray, count: int) -> np.ndarray:
        values = values.reshape(rows, -1)
        if bits == 4:
            values = np.stack([values & 15, values >> 4], axis=-1).reshape(rows, -1)
        return values[:, :count].astype(np.float64)

    scales = parts["scales"].reshape(rows, blocks, 1).astype(np.float64)
    levels = split(parts["packed"], blocks * 32).reshape(rows, blocks, 32)
    values = (levels - split(parts["zeros"], blocks)[..., None]) * scales
    steps = np.broadcast_to(scales, values.shape)
    return values.reshape(rows, -1)[:, :columns], steps.reshape(rows, -1)[:, :columns]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_matrices_are_within_a_step_of_the_weights(folder: Path, cache: Path, kind: str) -> None:
    """Closed form: each element is off by at most its block's step, the head in int8; all matrices are quantised."""
    result = export_onnx(folder, cache_dir=cache, variant=Variant(quantise=kind, min_agreement=0.3))
    assert (result.files, result.quantised) == (("model.onnx", "model.onnx.data"), kind)
    assert result.kl_divergence > 0
    graph = graph_of(folder)
    products = [node for node in graph.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 15
    assert not [node for node in graph.graph.node if node.op_type == "MatMul"]
    weights = read_header(folder / "model.safetensors").tensors
    for name, bits in (("model.layers.1.mlp.down_proj.weight", int(kind[3:])), ("lm_head.weight", 8)):
        found, steps = dequantised(folder, name, bits)
        assert (np.abs(found - weights[name].read()) <= steps * 1.01).all()
    assert all(int(place["offset"]) % 4096 == 0 for place in places(graph).values() if "data" in place["location"])


def test_int8_is_nearer_to_torch_than_int4(folder: Path, cache: Path) -> None:
    """By the divergence that is recorded."""
    found = {
        kind: export_onnx(folder, cache_dir=cache, variant=Variant(quantise=kind, min_agreement=0.3)).kl_divergence
        for kind in ("int8", "int4")
    }
    assert found["int8"] < found["int4"] / 10


def test_a_share_that_is_asked_of_an_exact_graph_changes_nothing(folder: Path, cache: Path) -> None:
    """The same graph, byte for byte, held to float32's tolerance."""
    export_onnx(folder, cache_dir=cache)
    plain = (folder / "model.onnx").read_bytes()
    result = export_onnx(folder, cache_dir=cache, variant=Variant(min_agreement=0.9))
    assert (folder / "model.onnx").read_bytes() == plain
    assert result.agreement is None


def leftovers(folder: Path) -> list[str]:
    """What an export wrote."""
    return sorted(path.name for path in folder.iterdir() if "onnx" in path.name or "genai" in path.name)


def test_a_model_that_quantising_breaks_is_refused_and_gone(folder: Path, cache: Path) -> None:
    """Below the share of tokens that is asked for, the error has the numbers, and graph, data and config are deleted."""
    pytest.importorskip("onnxruntime_genai")
    with pytest.raises(OnnxVerificationError) as caught:
        export_onnx(folder, cache_dir=cache, variant=Variant("genai", quantise="int4", min_agreement=1.0))
    assert 0 < caught.value.fields["agreement"] < 1
    assert "--min-agreement" in caught.value.remedy
    assert leftovers(folder) == []


def test_a_full_disk_leaves_nothing(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one of storage; an older graph, whose data were to be replaced, is gone too."""
    export_onnx(folder, cache_dir=cache)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError):
        export_onnx(folder, cache_dir=cache, variant=Variant(quantise="int8"))
    assert leftovers(folder) == []


def test_onnxruntime_genai_generates_what_transformers_generates(folder: Path, cache: Path) -> None:
    """A folder of weights, one graph and one config: rows of a batch padded on the right, and each alone."""
    genai = pytest.importorskip("onnxruntime_genai")
    result = export_onnx(folder, cache_dir=cache, variant=Variant("genai"))
    assert result.files == ("model.onnx", "genai_config.json")
    assert result.checks[-1]["check"].startswith("onnxruntime-genai")
    assert result.checks[-1]["greedy_equal"]
    graph = graph_of(folder)
    assert {place["location"] for place in places(graph).values()} == {"model.safetensors"}
    assert sum(node.op_type == "GroupQueryAttention" for node in graph.graph.node) == 2
    assert not [node for node in graph.graph.node if node.op_type in ("Attention", "Expand")]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = [
        model.generate(
            torch.from_numpy(row[None, :length].copy()), max_new_tokens=8, do_sample=False, eos_token_id=None
        )[0, length:]
        for row, length in ((BATCH[0], 4), (BATCH[1], 2))
    ]
    runtime = genai.Model(str(folder))
    for row, length, tokens in ((BATCH[0], 4, expected[0]), (BATCH[1], 2, expected[1])):
        parameters = genai.GeneratorParams(runtime)
        parameters.set_search_options(max_length=length + 8, do_sample=False)
        generator = genai.Generator(runtime, parameters)
        generator.append_tokens([row[:length].tolist()])
        found = []
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        assert found == tokens.tolist()[: len(found)]
        assert found
    found = generate(open_session(folder / "model.onnx"), BATCH, RIGHT, max_new_tokens=8)
    assert found.tolist() == [tokens.tolist() for tokens in expected]


def test_the_example_for_cuda_decodes_in_a_cache_of_fixed_size(folder: Path, cache: Path) -> None:
    """On the CPU: masks and buffers that never change their shape give the tokens of a cache that grows."""
    pytest.importorskip("onnxruntime_genai")
    spec = importlib.util.spec_from_file_location("cuda_example", EXAMPLES / "cuda.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    export_onnx(folder, cache_dir=cache, variant=Variant("genai"))
    expected = generate(open_session(folder / "model.onnx"), IDS, max_new_tokens=12)[0].tolist()
    assert example.decode(folder, IDS[0].tolist(), 12, "cpu") == expected
    with pytest.raises(MissingDependencyError, match="CUDAExecutionProvider"):
        example.decode(folder, IDS[0].tolist(), 12, "cuda")


def test_a_grouped_graph_refuses_padding_on_the_left(folder: Path, cache: Path) -> None:
    """It would be wrong without a word; the portable one takes it."""
    pytest.importorskip("onnxruntime_genai")
    export_onnx(folder, cache_dir=cache, variant=Variant("genai"))
    session = open_session(folder / "model.onnx")
    for run in (lambda: forward(session, BATCH, RIGHT[:, ::-1]), lambda: generate(session, BATCH, RIGHT[:, ::-1])):
        with pytest.raises(UsageError, match="left"):
            run()


def test_a_composed_lora_records_its_variant(base: Path, cache: Path, tmp_path: Path) -> None:
    """composition.json names flavour, dtypes, what the matrices became, and how far off they are; files are listed."""
    pytest.importorskip("onnxruntime_genai")
    lora = random_lora(base, tmp_path / "lora", target_modules="all-linear")
    plan = recipe_plan(base, lora, flavour="genai", compute="fp16", onnx_quantise="int8", min_agreement=0.6)
    record = compose(plan, tmp_path / "out", cache_dir=cache).record
    facts = record["export"]
    assert (facts["flavour"], facts["compute_dtype"], facts["quantised"]) == ("genai", "float16", "int8")
    assert 0.6 <= facts["agreement"] <= 1
    assert {"model.onnx", "model.onnx.data", "genai_config.json"} <= set(record["outputs"])
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert (config["decoder"]["filename"], config["vocab_size"]) == ("model.onnx", 128)
    plain = compose(recipe_plan(base, lora), tmp_path / "plain", cache_dir=cache).record["export"]
    assert not {"agreement", "quantised", "kl_divergence", "compared_in"} & set(plain)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"export": "safetensors", "flavour": "genai"}, RecipeError),
        ({"export": "bundle", "compute": "fp16"}, RecipeError),
        ({"export": "peft", "onnx_quantise": "int4"}, RecipeError),
    ],
)
def test_options_of_a_graph_without_one_are_refused(
    base: Path, fields: dict[str, Any], error: type[TypedError]
) -> None:
    """Nothing is ignored."""
    with pytest.raises(error, match=next(name for name in fields if name != "export")):
        prepare_export(recipe_plan(base, **fields))


def test_virtual_tokens_and_encoders_are_refused_for_genai_before_anything_is_written(
    base: Path, tmp_path: Path
) -> None:
    """By name, while the plan is made."""
    adapt(make_model("llama"), "prompt-tuning", tmp_path / "prompt")
    with pytest.raises(UnsupportedAdapterError, match="prompt"):
        prepare_export(recipe_plan(base, tmp_path / "prompt", flavour="genai"))
    bert = save_model(make_model("bert"), tmp_path / "bert")
    with pytest.raises(UnsupportedArchitectureError, match="BertForSequenceClassification"):
        prepare_export(recipe_plan(bert, flavour="genai"))


def test_without_onnxruntime_genai_its_flavour_is_refused(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not be checked; the error says which extra brings it."""
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(MissingDependencyError) as caught:
        export_onnx(folder, cache_dir=cache, variant=Variant("genai"))
    assert caught.value.fields["extras"] == ["genai"]
    assert leftovers(folder) == []
