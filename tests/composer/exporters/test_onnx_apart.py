"""Adapters kept apart from the weights in one graph, against PEFT's own forward."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from composer.errors import (
    ConflictError,
    IncompatibleError,
    NotFoundError,
    OnnxExportError,
    OnnxVerificationError,
    RecipeError,
    UnsupportedAdapterError,
    UsageError,
)
from composer.exporters import find_exporter, prepare_export
from composer.exporters.onnx import append as append_module
from composer.exporters.onnx import generate, open_session
from composer.exporters.onnx import separate as separate_module
from composer.exporters.onnx.adapted import activate, adapters_in
from composer.exporters.onnx.append import append_adapters
from composer.exporters.onnx.session import forward
from composer.provenance import read_record, record_file, sealed
from composer.recipe import Export, Placement
from composer.run import Outcome, compose
from tests.composer.prompts import make_model
from tests.conftest import random_lora, save_model
from tests.support import plan_folders, read_tensors, write_lora

pytest.importorskip("onnxruntime")

LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"target_modules": "all-linear"},
        {
            "r": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 3},
            "alpha_pattern": {"v_proj": 5},
        },
        {"r": 1, "target_modules": ["down_proj", "lm_head"]},
    ],
    "gpt2": [
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"r": 2, "target_modules": ["c_fc"], "fan_in_fan_out": True},
    ],
    "bert": [
        {"target_modules": ["query", "value"]},
        {"r": 2, "target_modules": ["query", "dense", "classifier"]},
    ],
}
CAUSAL = ("llama", "gpt2")
AUTO = ("AutoModelForSequenceClassification", "AutoModelForCausalLM")
Models = dict[str, tuple[Path, list[Path]]]
IDS = torch.tensor([[5, 9, 11, 40, 3, 77, 2], [8, 8, 1, 90, 4, 6, 30]])


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One graph cache for the module, so that each configuration is traced once."""
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Models:
    """A base by name, and its adapters: of different ranks, targets and scales."""
    root = tmp_path_factory.mktemp("apart")
    bases = {"llama": tiny_llama, **{name: save_model(make_model(name), root / name) for name in ("gpt2", "bert")}}
    return {
        name: (
            base,
            [
                random_lora(base, root / f"{name}-{number}", seed=number, auto=AUTO[name in CAUSAL], **config)
                for number, config in enumerate(LAYOUTS[name])
            ],
        )
        for name, base in bases.items()
    }


def export(base: Path, adapters: list[Path], out: Path, graphs: Path, placement: Placement) -> Outcome:
    """Compose, with the adapters kept apart."""
    plan = plan_folders(base, [(path, 1.0) for path in adapters], export=Export.ONNX, placement=placement)
    return compose(plan, out, cache_dir=graphs)


def peft_logits(base: Path, adapter: Path | None, ids: torch.Tensor) -> np.ndarray:
    """PEFT live on the float32 base; the base itself where there is no adapter."""
    config = transformers.AutoConfig.from_pretrained(base)
    auto = AUTO["CausalLM" in config.architectures[0] or "LMHead" in config.architectures[0]]
    model = getattr(transformers, auto).from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(ids).logits.numpy()


def run(session: Any, ids: torch.Tensor) -> np.ndarray:
    """Logits in one pass."""
    return forward(session, ids.numpy(), np.ones_like(ids.numpy()))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_each_separate_adapter_is_what_peft_computes(name: str, models: Models, graphs: Path, tmp_path: Path) -> None:
    """Oracle: PEFT live, whatever ranks, scales, targets and layout; with none active, the base; its bytes stay."""
    base, adapters = models[name]
    outcome = export(base, adapters, tmp_path / "out", graphs, Placement.SEPARATE)
    session = open_session(outcome.out / "model.onnx", threads=1)
    for path in adapters:
        found = run(activate(session, outcome.out, path.name), IDS)
        assert np.abs(found - peft_logits(base, path, IDS)).max() < 1e-5
        assert np.abs(found - run(session, IDS)).max() > 1e-3
    assert np.abs(run(session, IDS) - peft_logits(base, None, IDS)).max() < 1e-5
    stored, written = read_tensors(base), read_tensors(outcome.out)
    assert all(torch.equal(stored[key], written[key]) for key in stored)
    record = outcome.record["export"]
    assert [entry["file"] for entry in record["adapters"]] == [f"{path.name}.onnx_adapter" for path in adapters]
    assert {entry["file"] for entry in record["adapters"]} < set(outcome.record["outputs"])
    assert 0 < record["max_abs_diff"] < record["tolerance"]
    assert adapters_in(session)[0] is Placement.SEPARATE


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_rows_of_one_batch_have_adapters_of_their_own(name: str, models: Models, graphs: Path, tmp_path: Path) -> None:
    """Oracle: PEFT live on each row alone. Ranks, targets and lengths differ; padding is on the left; some are the base.

    Prefill and four tokens decoded with the cache, each logit to 1e-5; the base's bytes stay.
    """
    base, adapters = models[name]
    outcome = export(base, adapters, tmp_path / "out", graphs, Placement.MULTI)
    paths = [adapters[0], None, adapters[1], adapters[0], adapters[-1]]
    session = open_session(outcome.out / "model.onnx", threads=1)
    adapted = activate(session, outcome.out, [path and path.name for path in paths])
    rows = [IDS[0, :7], IDS[1, :3], IDS[1, :5], IDS[1, :6], IDS[0, :2]]
    ids, mask = np.zeros((5, 7), np.int64), np.zeros((5, 7), np.int64)
    for number, row in enumerate(rows):
        ids[number, 7 - len(row) :], mask[number, 7 - len(row) :] = row, 1
    step, past, parts = ids, None, []
    for _ in range(5):
        logits, past = forward(adapted, step, mask, past)
        parts.append(logits)
        step = logits[:, -1].argmax(axis=-1)[:, None]
        ids, mask = np.concatenate([ids, step], axis=1), np.concatenate([mask, np.ones_like(step)], axis=1)
    found = np.concatenate(parts, axis=1)
    for number, (path, row) in enumerate(zip(paths, rows, strict=True)):
        start = 7 - len(row)
        wanted = peft_logits(base, path, torch.from_numpy(ids[number : number + 1, start:-1]))
        assert np.abs(found[number, start:] - wanted[0]).max() < 1e-5
    stored, written = read_tensors(base), read_tensors(outcome.out)
    assert all(torch.equal(stored[key], written[key]) for key in stored)
    record = outcome.record["export"]
    assert [(entry["name"], entry["id"]) for entry in record["adapters"]] == [
        (path.name, number) for number, path in enumerate(adapters, 1)
    ]
    assert 0 < record["max_abs_diff"] < record["tolerance"]


@pytest.mark.slow
def test_a_classifier_takes_adapters_either_way(models: Models, graphs: Path, tmp_path: Path) -> None:
    """Oracle: PEFT live, head and all; one row each, and one row padded on the right."""
    base, adapters = models["bert"]
    wanted = np.concatenate([peft_logits(base, path, IDS[:1] % 64) for path in (*adapters, None)])
    ids = np.pad(np.repeat(IDS[:1].numpy() % 64, 3, axis=0), ((0, 0), (0, 2)))
    mask = np.pad(np.ones((3, 7), np.int64), ((0, 0), (0, 2)))
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    multi = export(base, adapters, tmp_path / "multi", graphs, Placement.MULTI).out
    names = [*(path.name for path in adapters), None]
    session = activate(open_session(multi / "model.onnx", threads=1), multi, names)
    assert np.abs(session.run(["logits"], feeds)[0] - wanted).max() < 1e-5
    separate = export(base, adapters, tmp_path / "separate", graphs, Placement.SEPARATE).out
    session = open_session(separate / "model.onnx", threads=1)
    for number, path in enumerate(adapters):
        found = activate(session, separate, path.name).run(["logits"], feeds)[0]
        assert np.abs(found - wanted[number]).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("placement", [Placement.SEPARATE, Placement.MULTI])
def test_bound_inputs_have_the_adapter_too(placement: Placement, models: Models, graphs: Path, tmp_path: Path) -> None:
    """ONNX Runtime leaves an active adapter out where inputs are bound to it; oracle: the same session's plain run."""
    base, adapters = models["llama"]
    out = export(base, adapters, tmp_path / "out", graphs, placement).out
    session = open_session(out / "model.onnx", threads=1)
    ids = IDS.numpy()
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(7)[None].repeat(2, axis=0),
    }
    feeds |= {
        item.name: np.zeros((2, 2, 0, 16), np.float32) for item in session.get_inputs() if item.name.startswith("past")
    }
    for path in adapters:
        adapted = activate(session, out, path.name)
        binding = adapted.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits")
        adapted.run_with_iobinding(binding)
        assert np.array_equal(binding.copy_outputs_to_cpu()[0], adapted.run(["logits"], feeds)[0])
        assert np.abs(run(session, IDS) - binding.copy_outputs_to_cpu()[0]).max() > 1e-3


@pytest.mark.slow
def test_one_number_holds_for_all_rows_and_none_is_the_base(models: Models, graphs: Path, tmp_path: Path) -> None:
    """A graph with adapters in it serves who knows nothing of them; names are as in separate files."""
    base, adapters = models["llama"]
    out = export(base, adapters, tmp_path / "out", graphs, Placement.MULTI).out
    session = open_session(out / "model.onnx", threads=1)
    for path in adapters:
        alone, each = (run(activate(session, out, who), IDS) for who in (path.name, [path.name] * 2))
        assert np.array_equal(alone, each)
    assert np.array_equal(run(session, IDS), run(activate(session, out, [None, None]), IDS))
    with pytest.raises(NotFoundError):
        activate(session, out, [None, "missing"])
    other = open_session(export(base, adapters, tmp_path / "separate", graphs, Placement.SEPARATE).out / "model.onnx")
    with pytest.raises(UsageError, match="one adapter at a time"):
        activate(other, tmp_path / "separate", [None, adapters[0].name])


@pytest.mark.slow
def test_more_adapters_are_longer_files_and_not_another_computation(
    models: Models, graphs: Path, tmp_path: Path
) -> None:
    """With 2 and with 12 adapters the graphs have the same nodes: what they gather from is longer, nothing else."""
    onnx = pytest.importorskip("onnx")
    base, adapters = models["llama"]
    graph: list[Any] = []
    for count in (2, 12):
        out = export(base, [adapters[0], *[adapters[1]] * (count - 1)], tmp_path / str(count), graphs, Placement.MULTI)
        graph.append(onnx.load(out.out / "model.onnx", load_external_data=False).graph)
    few, many = ([node.SerializeToString() for node in each.node] for each in graph)
    assert few == many
    few, many = ({item.name: tuple(item.dims) for item in each.initializer} for each in graph)
    grown = {name for name, shape in few.items() if many[name] != shape}
    assert few.keys() == many.keys()
    assert grown == {"adapters/index", "adapters/vectors_64", "adapters/vectors_32"}
    assert many["adapters/index"][0] - few["adapters/index"][0] == 10


@pytest.mark.slow
def test_genai_loads_the_same_files(models: Models, graphs: Path, tmp_path: Path) -> None:
    """Oracle: our own greedy generation; onnxruntime-genai needs a config of its own beside the graph."""
    genai = pytest.importorskip("onnxruntime_genai")
    base, adapters = models["llama"]
    out = export(base, adapters, tmp_path / "out", graphs, Placement.SEPARATE).out
    config = json.loads((out / "config.json").read_text())
    names = ("input_ids", "attention_mask", "position_ids")
    decoder = {
        "filename": "model.onnx",
        "head_size": 16,
        "hidden_size": config["hidden_size"],
        "inputs": {
            **{name: name for name in names},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_key_value_heads": config["num_key_value_heads"],
    }
    fields = {
        "model": {
            "type": "llama",
            "decoder": decoder,
            "vocab_size": config["vocab_size"],
            "context_length": config["max_position_embeddings"],
            "bos_token_id": 1,
            "eos_token_id": [config["vocab_size"] - 1],
            "pad_token_id": 0,
        },
        "search": {"max_length": 24, "past_present_share_buffer": False},
    }
    (out / "genai_config.json").write_text(json.dumps(fields))
    model = genai.Model(str(out))
    loaded = genai.Adapters(model)
    session = open_session(out / "model.onnx", threads=1)
    ids = IDS[:1].numpy()
    for path in adapters:
        loaded.load(str(out / f"{path.name}.onnx_adapter"), path.name)
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=ids.shape[1] + 12)
        generator = genai.Generator(model, parameters)
        generator.set_active_adapter(loaded, path.name)
        generator.append_tokens(ids[0].astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found = generator.get_sequence(0).tolist()[ids.shape[1] :]
        wanted = generate(activate(session, out, path.name), ids, max_new_tokens=12)[0].tolist()
        assert found == wanted[: len(found)]
        assert len(found) > 3


@pytest.mark.slow
def test_a_separate_adapter_with_wrong_numbers_is_not_published(
    models: Models, graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verification runs each file: one whose factors are off by 1% fails, and nothing is left."""
    base, adapters = models["llama"]
    write = separate_module.write_adapter

    def off(path: Path, factors: Any) -> None:
        write(path, {name: (a, b * np.float32(1.01)) for name, (a, b) in factors.items()})

    monkeypatch.setattr("composer.exporters.onnx.apart.write_adapter", off)
    with pytest.raises(OnnxVerificationError, match="with an adapter active"):
        export(base, adapters[:1], tmp_path / "out", graphs, Placement.SEPARATE)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_unknown_name_is_an_error_that_lists_the_known(models: Models, graphs: Path, tmp_path: Path) -> None:
    """Two adapters of one name get numbers, and a name that is none of them says so."""
    base, adapters = models["llama"]
    out = export(base, [adapters[1], adapters[1]], tmp_path / "out", graphs, Placement.SEPARATE).out
    session = open_session(out / "model.onnx", threads=1)
    with pytest.raises(NotFoundError) as caught:
        activate(session, out, "missing")
    assert caught.value.expected == ["llama-1", "llama-1-2"]
    one, two = (run(activate(session, out, name), IDS) for name in caught.value.expected)
    assert np.array_equal(one, two)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "embedding"),
        ({"init_lora_weights": "pissa"}, "PiSSA"),
    ],
)
def test_what_is_no_product_beside_a_linear_layer_is_refused(
    config: dict[str, Any], reason: str, models: Models, tmp_path: Path
) -> None:
    """By the adapter's name and with the reason, before anything is written."""
    base = models["gpt2" if config.get("fan_in_fan_out") else "llama"][0]
    path = random_lora(base, tmp_path / "odd", **{"target_modules": ["q_proj", "v_proj"], **config})
    plan = plan_folders(base, [(path, 1.0)], export=Export.ONNX, placement=Placement.SEPARATE)
    with pytest.raises(UnsupportedAdapterError, match=rf"odd cannot be kept apart.*{reason}"):
        prepare_export(plan)


def test_other_kinds_are_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    """IA3 rescales what a layer gives: that is no product of two factors."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "scaled")
    plan = plan_folders(tiny_llama, [(tmp_path / "scaled", 1.0)], export=Export.ONNX, placement=Placement.SEPARATE)
    with pytest.raises(UnsupportedAdapterError, match=r"scaled cannot be kept apart.*ia3 is no product"):
        prepare_export(plan)


def test_recipes_that_ask_for_merged_weights_are_refused(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """Another export, a method, a weight of 0 and no adapter at all."""

    def refused(adapters: list[tuple[Path, float]], match: str, **settings: Any) -> None:
        settings = {"export": Export.ONNX, "placement": Placement.SEPARATE, **settings}
        with pytest.raises(RecipeError, match=match):
            prepare_export(plan_folders(tiny_llama, adapters, **settings))

    refused([(tiny_lora, 1.0)], "in an ONNX graph", export=Export.SAFETENSORS)
    refused([(tiny_lora, 1.0)], "in an ONNX graph", export=Export.PEFT)
    refused([(tiny_lora, 1.0)], "in an ONNX graph", method="ties")
    refused([(tiny_lora, 0.0)], "weight of 0")
    refused([], "no adapter to keep apart")


def test_replicated_layers_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """A deeper model is another base."""
    sizes = {f"model.layers.{layer}.self_attn.q_proj": (64, 64) for layer in range(3)}
    path = write_lora(tmp_path / "deeper", sizes, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    plan = plan_folders(tiny_llama, [(path, 1.0)], export=Export.ONNX, placement=Placement.SEPARATE)
    with pytest.raises(IncompatibleError, match="change the base itself"):
        prepare_export(plan)


@pytest.mark.slow
def test_the_plan_bounds_the_files_and_the_weight_is_folded_in(models: Models, graphs: Path, tmp_path: Path) -> None:
    """Planned bytes hold and are not far off; a weight of 0.5 is half of the change, of a linear head exactly so."""
    base, adapters = models["llama"]
    head = random_lora(base, tmp_path / "head", target_modules=["lm_head"])
    terms = [(head, 1.0), (head, 0.5), (adapters[0], 1.0)]
    plan = prepare_export(plan_folders(base, terms, export=Export.ONNX, placement=Placement.SEPARATE))
    planned = find_exporter("onnx").plan_files(plan)
    outcome = compose(plan_folders(base, terms, export=Export.ONNX, placement=Placement.SEPARATE), tmp_path / "out",
                      cache_dir=graphs)  # fmt: skip
    for name, size in planned.items():
        assert 0.5 * size < outcome.record["outputs"][name]["size"] <= size
    session = open_session(outcome.out / "model.onnx", threads=1)
    none, whole = run(session, IDS), run(activate(session, outcome.out, "head"), IDS)
    half = run(activate(session, outcome.out, "head-2"), IDS)
    assert np.allclose(half - none, (whole - none) / 2, rtol=0, atol=1e-6)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file but the record."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "composition.json"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_adding_later_gives_the_bytes_of_composing_at_once(
    name: str, models: Models, graphs: Path, tmp_path: Path
) -> None:
    """Base weights and vectors that are there stay as they lie; other ranks and targets than before may come."""
    base, adapters = models[name]
    all_of = adapters[::-1]  # the last has the fewest modules: the others bring new ones, and larger ranks
    whole = export(base, all_of, tmp_path / "whole", graphs, Placement.MULTI)
    out = export(base, all_of[:1], tmp_path / "out", graphs, Placement.MULTI).out
    for path in all_of[1:]:
        before = folder_bytes(out)
        nodes = {file.name: file.stat().st_ino for file in out.glob("*.safetensors")}
        added = export(base, [path], tmp_path / f"only-{path.name}", graphs, Placement.MULTI).out
        record = append_adapters(out, added)
        for file, data in before.items():
            if file.startswith("adapters-index"):
                assert not (out / file).exists()
            elif file.endswith(".safetensors"):
                assert (out / file).stat().st_ino == nodes[file]
                assert (out / file).read_bytes()[4096 : len(data)] == data[4096:]
    assert folder_bytes(out) == folder_bytes(whole.out)
    assert record == read_record(out / "composition.json")
    for field in ("output_digest", "outputs", "adapters"):
        assert record[field] == whole.record[field]
    assert record["export"]["adapters"] == whole.record["export"]["adapters"]


@pytest.mark.slow
def test_an_addition_that_fails_leaves_the_folder_as_it_was(
    models: Models, graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong numbers, another base, another placement, a writer beside; and leftovers of a crash are cut off."""
    base, adapters = models["llama"]
    out = export(base, adapters[1:2], tmp_path / "out", graphs, Placement.MULTI).out
    added = export(base, adapters[:1], tmp_path / "added", graphs, Placement.MULTI).out
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def refused(error: type[Exception], match: str, other: Path = added) -> None:
        with pytest.raises(error, match=match):
            append_adapters(out, other)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    with monkeypatch.context() as patched:
        make = append_module.make_index
        patched.setattr(append_module, "make_index", lambda groups, blocks: make(groups, blocks[::-1]))
        refused(OnnxVerificationError, "differs from what it was made of")
    with monkeypatch.context() as patched:
        patched.setattr(append_module, "write_aside", lambda *_: 1 / 0)
        refused(ZeroDivisionError, "division")
    refused(OnnxExportError, "no adapters that could be added", export(base, adapters[:1], tmp_path / "separate", graphs,
                                                                       Placement.SEPARATE).out)  # fmt: skip
    other = shutil.copytree(added, tmp_path / "other")
    record = json.loads((other / "composition.json").read_text())
    record["outputs"]["model.safetensors"]["sha256"] = "0" * 64
    (other / "composition.json").write_bytes(record_file(sealed(record)))
    refused(IncompatibleError, "another base", other)
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    refused(ConflictError, "someone else")
    os.close(descriptor)
    with (out / "adapters-64.safetensors").open("ab") as file:
        file.write(b"left over by a process that died")
    append_adapters(out, added)
    whole = export(base, [adapters[1], adapters[0]], tmp_path / "whole", graphs, Placement.MULTI).out
    assert folder_bytes(out) == folder_bytes(whole)
