"""Bottlenecks of AdapterHub's library: hooks and graphs compute what the library itself computes with them.

Oracle: the outputs of the library, live, in tests/fixtures/bottlenecks (made by make_fixtures.py there).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from composer.adapters import open_adapter
from composer.bottlenecks import ACTIVATIONS, BUNDLE, TENSORS
from composer.errors import (
    CorruptFileError,
    IncompatibleError,
    OnnxExportError,
    RecipeError,
    TypedError,
    UnsupportedAdapterError,
    UnsupportedArchitectureError,
)
from composer.exporters.onnx import export_onnx, generate, open_session
from composer.exporters.onnx.seq2seq_session import open_seq2seq
from composer.exporters.onnx.session import forward
from composer.loading import load_model
from composer.recipe import Export
from composer.run import Outcome, compose
from composer.runtime.bottlenecks import attach, load
from composer.tensors import read_header
from tests.composer.test_boundaries import imported
from tests.support import edit_json, plan_folders, read_tensors, weight_bytes, write_lora, write_tensors

ROOT = Path(__file__).parents[2] / "fixtures" / "bottlenecks"
TOLERANCE = 1e-5
EXPECTED = {path.parent.name: load_file(path) for path in sorted(ROOT.glob("*/expected.safetensors"))}
CASES = [
    (model, case) for model, found in EXPECTED.items() for case in found if case not in ("input_ids", "attention_mask")
]
TRACED = ("bert-classifier", "distilbert", "gpt2", "llama", "t5")


def folders(model: str, case: str) -> list[tuple[Path, float]]:
    """The adapters of a case such as houlsby+pfeiffer."""
    return [(ROOT / model / name, 1.0) for name in case.split("+") if name != "base"]


def bundle(model: str, case: str, out: Path, export: Export = Export.BUNDLE, **options: Any) -> Outcome:
    """Compose a case; what has no addition goes to plain safetensors."""
    plan = plan_folders(ROOT / model / "base", folders(model, case), export=export)
    if export is Export.BUNDLE and not plan.additions:
        plan = plan_folders(ROOT / model / "base", folders(model, case))
    return compose(plan, out, **options)


def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The logits, or the last hidden states of an encoder."""
    kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        kept["decoder_input_ids"] = kept["input_ids"].flip(1)
    with torch.no_grad():
        found = model(**kept)
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of graphs for all cases."""
    return tmp_path_factory.mktemp("graphs")


@pytest.mark.parametrize(("model", "case"), CASES)
def test_hooks_compute_what_the_library_does(model: str, case: str, tmp_path: Path) -> None:
    """Every variant, alone, stacked, and on a merged LoRA; on encoders, decoders, and with both."""
    bundle(model, case, tmp_path / "out")
    found = run(load_model(tmp_path / "out"), EXPECTED[model])
    assert torch.allclose(found, EXPECTED[model][case], rtol=0, atol=TOLERANCE)
    if case != "base":
        assert (EXPECTED[model]["base"] - found).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("model", "case"), [item for item in CASES if item[0] in TRACED and item[1] != "base"])
def test_graphs_compute_what_the_library_does(model: str, case: str, graphs: Path, tmp_path: Path) -> None:
    """The same in ONNX Runtime; the record holds the comparison with torch and hooks."""
    import onnx

    record = bundle(model, case, tmp_path / "out", Export.ONNX, cache_dir=graphs).record
    assert record["export"]["max_abs_diff"] <= record["export"]["tolerance"]
    for file in record["export"]["files"]:
        onnx.checker.check_model(str(tmp_path / "out" / file))
    ids, mask = (EXPECTED[model][name].numpy() for name in ("input_ids", "attention_mask"))
    if model == "t5":
        halves = open_seq2seq(tmp_path / "out")
        found, _ = halves.decode(halves.encode(ids, mask), np.ascontiguousarray(ids[:, ::-1]))
        np.testing.assert_allclose(found, EXPECTED[model][case].numpy(), rtol=0, atol=TOLERANCE)
        return
    session = open_session(tmp_path / "out" / "model.onnx")
    if model in ("gpt2", "llama"):
        found, _ = forward(session, ids, mask)
    else:
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        found = session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})[0]
    np.testing.assert_allclose(found, EXPECTED[model][case].numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_generation_goes_on_alike_in_both_runtimes(graphs: Path, tmp_path: Path) -> None:
    """32 greedy tokens with the KV cache: the networks act on each token by itself."""
    bundle("llama", "houlsby+pfeiffer", tmp_path / "out", Export.ONNX, cache_dir=graphs)
    ids = EXPECTED["llama"]["input_ids"]
    found = generate(open_session(tmp_path / "out" / "model.onnx"), ids.numpy(), max_new_tokens=32)
    model = load(tmp_path / "out")
    wanted = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, eos_token_id=None
    )
    np.testing.assert_array_equal(found, wanted[:, ids.shape[1] :].numpy())


@pytest.mark.slow
def test_a_prompt_before_a_lora_and_bottlenecks_runs_in_one_graph(graphs: Path, tmp_path: Path) -> None:
    """base+lora+bottleneck+prompt: the graph gives what hooks give on the prompt's vectors before the embeddings."""
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    write_tensors(tmp_path / "prompt" / "adapter_model.safetensors", {"prompt_embeddings": vectors.numpy()})
    fields = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "token_dim": 16,
              "num_layers": 2, "num_attention_heads": 2}  # fmt: skip
    (tmp_path / "prompt" / "adapter_config.json").write_text(json.dumps(fields))
    terms = [*folders("llama", "lora+houlsby"), (tmp_path / "prompt", 1.0)]
    plan = plan_folders(ROOT / "llama" / "base", terms, export=Export.ONNX)
    compose(plan, tmp_path / "out", cache_dir=graphs)
    ids = EXPECTED["llama"]["input_ids"]
    found, _ = forward(open_session(tmp_path / "out" / "model.onnx"), ids.numpy(), np.ones(ids.shape, np.int64))
    model = load(tmp_path / "out")
    embeddings = torch.cat([vectors.expand(2, -1, -1), model.get_input_embeddings()(ids)], dim=1)
    with torch.no_grad():
        wanted = model(inputs_embeds=embeddings).logits[:, 3:]
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=TOLERANCE)
    assert (wanted - EXPECTED["llama"]["lora+houlsby"]).abs().max() > 1e-2


@pytest.mark.slow
def test_bottlenecks_of_half_precision_run_in_the_graph(graphs: Path, tmp_path: Path) -> None:
    """A bundle that was stored in bf16 is cast, as weights are."""
    bundle("llama", "houlsby", tmp_path / "out")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "out" / TENSORS).items()}
    save_file(tensors, tmp_path / "out" / TENSORS)
    assert export_onnx(tmp_path / "out", cache_dir=graphs).max_abs_diff < TOLERANCE


@pytest.mark.parametrize("model", ["bert-classifier", "gpt2"])
def test_zero_up_projections_leave_the_model_as_it_was(model: str, tmp_path: Path) -> None:
    """h + up(f(down(h))) with up = 0 is h, to the bit."""
    shutil.copytree(ROOT / model / "houlsby", tmp_path / "zero")
    tensors = load_file(tmp_path / "zero" / "adapter.safetensors")
    zeros = {name: torch.zeros_like(tensor) if "adapter_up" in name else tensor for name, tensor in tensors.items()}
    save_file(zeros, tmp_path / "zero" / "adapter.safetensors")
    base = ROOT / model / "base"
    compose(plan_folders(base, [(tmp_path / "zero", 1.0)], export=Export.BUNDLE), tmp_path / "out")
    assert torch.equal(run(load(tmp_path / "out"), EXPECTED[model]), run(load_model(base), EXPECTED[model]))


def test_what_an_adapter_says_of_itself() -> None:
    """2dr + d + r parameters a module: 2·16·4 + 16 + 4 = 148, after attention and feed-forward of two layers."""
    adapter = open_adapter(ROOT / "bert-classifier" / "houlsby")
    signature = adapter.signature
    assert (adapter.format, signature.kind, signature.rank) == ("AdapterHub", "bottleneck", 4)
    assert signature.parameters == 4 * 148
    assert signature.target_modules == ("output.dense",)
    assert adapter.additions()[0].summary == "4 bottlenecks of rank 4, 592 parameters"
    by_layer = open_adapter(ROOT / "bert-classifier" / "by-layer")
    assert by_layer.additions()[0].summary == "2 bottlenecks of rank 1 to 8, 329 parameters"
    # a norm of 2d before and after, a learned scaling; the copies of the norm before are not counted
    assert open_adapter(ROOT / "bert-classifier" / "norms").signature.parameters == 4 * (148 + 2 * 32 + 1)


def test_a_bundle_holds_the_base_and_the_networks(tmp_path: Path) -> None:
    """The weights are the base's bytes; the networks lie beside them, named by their sites, in float32."""
    outcome = bundle("llama", "houlsby+pfeiffer", tmp_path / "out")
    base = ROOT / "llama" / "base"
    assert read_tensors(tmp_path / "out").keys() == read_tensors(base).keys()
    assert all(torch.equal(tensor, read_tensors(base)[name]) for name, tensor in read_tensors(tmp_path / "out").items())
    tensors = read_header(tmp_path / "out" / TENSORS).tensors
    assert tensors["1.model.layers.0.mlp.down_proj.up.weight"].shape == (16, 4)
    assert {spec.dtype for spec in tensors.values()} == {"F32"}
    document = json.loads((tmp_path / "out" / BUNDLE).read_text())
    assert document["adapters"] == ["houlsby", "pfeiffer"]
    assert [len(site["networks"]) for site in document["sites"]] == [1, 2, 1, 2]
    assert [item["adds"] for item in outcome.record["additions"]] == [
        "4 bottlenecks of rank 4, 592 parameters",
        "2 bottlenecks of rank 4, 296 parameters",
    ]
    assert outcome.record["export"]["additions"] == {"bottleneck": TENSORS}
    assert {BUNDLE, TENSORS} <= outcome.record["outputs"].keys()


def test_the_order_of_a_stack_is_the_recipes(tmp_path: Path) -> None:
    """Two sequential bottlenecks in one place do not commute."""
    found = []
    for case in ("houlsby+pfeiffer", "pfeiffer+houlsby"):
        bundle("llama", case, tmp_path / case)
        found.append(run(load(tmp_path / case), EXPECTED["llama"]))
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_a_checkpoint_of_the_bare_encoder_takes_the_classifiers_bottlenecks(tmp_path: Path) -> None:
    """The names differ by a prefix; the bundle has the base's."""
    plan = plan_folders(
        ROOT / "bert-encoder" / "base", [(ROOT / "bert-classifier" / "houlsby", 1.0)], export=Export.BUNDLE
    )
    compose(plan, tmp_path / "out")
    sites = json.loads((tmp_path / "out" / BUNDLE).read_text())["sites"]
    assert sites[0]["module"] == "encoder.layer.0.attention.output.dense"
    changed = run(load(tmp_path / "out"), EXPECTED["bert-encoder"])
    assert (changed - EXPECTED["bert-encoder"]["base"]).abs().max() > 1e-2


def test_hooks_can_be_removed(tmp_path: Path) -> None:
    """And the model is the base's again, to the bit."""
    bundle("bert-classifier", "no-norm-after", tmp_path / "out")
    model = load_model(ROOT / "bert-classifier" / "base")
    before = run(model, EXPECTED["bert-classifier"])
    handle = attach(model, tmp_path / "out")
    assert (run(model, EXPECTED["bert-classifier"]) - before).abs().max() > 1e-2
    handle.remove()
    assert torch.equal(run(model, EXPECTED["bert-classifier"]), before)


def test_a_weight_of_zero_leaves_it_out(tmp_path: Path) -> None:
    """Any other than 0 and 1 means nothing."""
    base, adapter, lora = ROOT / "llama" / "base", ROOT / "llama" / "houlsby", ROOT / "llama" / "lora"
    compose(plan_folders(base, [(lora, 1.0), (adapter, 0.0)]), tmp_path / "out")
    compose(plan_folders(base, [(lora, 1.0)]), tmp_path / "alone")
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "alone")
    with pytest.raises(RecipeError, match=r"must be 1 \(or 0\), not 0\.5"):
        plan_folders(base, [(adapter, 0.5)])


@pytest.mark.parametrize("pair", ["parallel+pfeiffer", "houlsby+parallel"])
def test_a_parallel_bottleneck_shares_its_place_with_none(pair: str) -> None:
    """It reads the residual stream, so what the other one gives would be lost; the library loses it without a word."""
    with pytest.raises(IncompatibleError, match=r"mlp\.down_proj: 2 bottlenecks, one of them parallel"):
        plan_folders(ROOT / "llama" / "base", folders("llama", pair), export=Export.BUNDLE)


@pytest.mark.parametrize("export", [Export.SAFETENSORS, Export.PEFT])
def test_exports_that_hold_weights_alone_refuse_it(export: Export, tmp_path: Path) -> None:
    """With what would work."""
    plan = plan_folders(ROOT / "llama" / "base", folders("llama", "houlsby"), export=export)
    with pytest.raises(UnsupportedAdapterError) as error:
        compose(plan, tmp_path / "out")
    assert "bundle" in str(error.value.remedy)
    assert not (tmp_path / "out").exists()


def test_weights_changed_after_a_bottleneck_are_refused() -> None:
    """One order is enough."""
    with pytest.raises(RecipeError, match="changes weights and stands after houlsby"):
        plan_folders(ROOT / "llama" / "base", folders("llama", "houlsby+lora"))


def test_a_composition_with_bottlenecks_is_no_base(tmp_path: Path) -> None:
    """They would be lost without a word."""
    bundle("llama", "houlsby", tmp_path / "out")
    with pytest.raises(IncompatibleError, match="additions lie beside its weights"):
        plan_folders(tmp_path / "out", folders("llama", "lora"))


def test_another_model_type_is_refused(tmp_path: Path) -> None:
    """Mistral's tensors have Llama's names."""
    with pytest.raises(IncompatibleError, match="trained on a llama model, this base is mistral"):
        plan_folders(ROOT / "mistral" / "base", folders("llama", "houlsby"), export=Export.BUNDLE)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"phm_layer": True}, UnsupportedAdapterError, "Compacter"),
        ({"use_gating": True}, UnsupportedAdapterError, "a gate"),
        ({"inv_adapter": "nice"}, UnsupportedAdapterError, "invertible"),
        ({"non_linearity": "prelu"}, UnsupportedAdapterError, "nonlinearity 'prelu'"),
        ({"non_linearity": None}, UnsupportedAdapterError, "nonlinearity None"),
        ({"scaling": "other"}, CorruptFileError, "scaling='other'"),
        ({"scaling": True}, CorruptFileError, "scaling=True"),
        ({"ln_after": 1}, CorruptFileError, "ln_after=1"),
        ({"ln_after": True}, CorruptFileError, "norm_after"),
        ({"ln_before": True}, CorruptFileError, "no part of a bottleneck|not those of a bottleneck"),
        ({"scaling": "learned"}, CorruptFileError, "scaling are not those"),
        ({"residual_before_ln": "later"}, CorruptFileError, "residual_before_ln"),
        ({"residual_before_ln": "post_add"}, UnsupportedAdapterError, "post_add"),
    ],
)
def test_configs_that_cannot_be_run_are_refused(
    changes: dict[str, Any], error: type[TypedError], message: str, tmp_path: Path
) -> None:
    """By name; a config that promises other tensors is damaged."""
    shutil.copytree(ROOT / "llama" / "houlsby", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["config"] |= changes
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        open_adapter(tmp_path / "adapter")


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    """It is not known where its sublayers end."""
    shutil.copytree(ROOT / "llama" / "houlsby", tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", model_type="qwen2")
    with pytest.raises(UnsupportedArchitectureError, match="'qwen2' models cannot be placed"):
        open_adapter(tmp_path / "adapter")


def test_tensors_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    """A part that is missing, one that is no bottleneck's, a place that is no sublayer's end, a second adapter."""
    tensors = load_file(ROOT / "llama" / "houlsby" / "adapter.safetensors")
    first = min(tensors)
    cases = {
        "not those of a bottleneck": {name: tensor for name, tensor in tensors.items() if name != first},
        "no part of a bottleneck": {
            **tensors,
            first.replace("adapter_down.0.bias", "adapter_attn.bias"): torch.ones(4),
        },
        "no sublayer's end": {name.replace("output_adapters", "cross_adapters"): t for name, t in tensors.items()},
        "2 adapters": {**tensors, first.replace("houlsby", "other"): torch.ones(4)},
        "invertible adapter": {**tensors, "model.invertible_adapters.houlsby.F.0.bias": torch.ones(4)},
    }
    for index, (message, found) in enumerate(cases.items()):
        folder = tmp_path / str(index)
        shutil.copytree(ROOT / "llama" / "houlsby", folder)
        save_file(found, folder / "adapter.safetensors")
        with pytest.raises((CorruptFileError, UnsupportedAdapterError), match=message):
            open_adapter(folder)


def test_a_norm_before_may_have_either_of_its_names_or_both(tmp_path: Path) -> None:
    """The library saves one module under two; where these differ, neither is taken."""
    tensors = load_file(ROOT / "bert-classifier" / "norms" / "adapter.safetensors")
    shutil.copytree(ROOT / "bert-classifier" / "norms", tmp_path / "norms")
    base, found = ROOT / "bert-classifier" / "base", []
    for absent in ("adapter_norm_before", "adapter_down.0", "neither"):
        save_file(
            {name: t for name, t in tensors.items() if absent not in name}, tmp_path / "norms/adapter.safetensors"
        )
        plan = plan_folders(base, [(tmp_path / "norms", 1.0)], export=Export.BUNDLE)
        found.append(compose(plan, tmp_path / absent).out / TENSORS)
    assert found[0].read_bytes() == found[1].read_bytes() == found[2].read_bytes()
    name = next(name for name in tensors if name.endswith("adapter_down.0.weight"))
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "norms" / "adapter.safetensors")
    with pytest.raises(CorruptFileError, match="are one tensor, and differ"):
        compose(plan_folders(base, [(tmp_path / "norms", 1.0)], export=Export.BUNDLE), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_loader_names_what_does_not_fit(tmp_path: Path) -> None:
    """Another format, a module that the model lacks, tensors that are left."""
    bundle("llama", "houlsby", tmp_path / "out")
    model = load_model(ROOT / "bert-classifier" / "base")
    with pytest.raises(ValueError, match=r"no module model\.layers\.0"):
        attach(model, tmp_path / "out")
    assert torch.equal(run(model, EXPECTED["bert-classifier"]), EXPECTED["bert-classifier"]["base"])
    document = json.loads((tmp_path / "out" / BUNDLE).read_text())
    (tmp_path / "out" / BUNDLE).write_text(json.dumps({**document, "sites": document["sites"][1:]}))
    model = load_model(ROOT / "llama" / "base")
    with pytest.raises(ValueError, match="no site uses 4 tensors"):
        attach(model, tmp_path / "out")
    (tmp_path / "out" / BUNDLE).write_text(json.dumps({**document, "format": "bottlenecks/2"}))
    with pytest.raises(ValueError, match="bottlenecks/2"):
        attach(model, tmp_path / "out")


def test_the_loader_stands_alone() -> None:
    """It may be copied beside a server that has nothing else of this project."""
    found = imported(Path(__file__).parents[3] / "composer" / "runtime" / "bottlenecks.py")
    assert found <= {"torch", "transformers", "safetensors", *sys.stdlib_module_names}


@pytest.mark.slow
def test_a_graph_without_the_place_is_refused(graphs: Path, tmp_path: Path) -> None:
    """A site whose layer is not followed by an addition: nothing is published."""
    bundle("llama", "houlsby", tmp_path / "out")
    document = json.loads((tmp_path / "out" / BUNDLE).read_text())
    document["sites"][0]["module"] = "model.layers.0.mlp.gate_proj"
    (tmp_path / "out" / BUNDLE).write_text(json.dumps(document))
    with pytest.raises(OnnxExportError, match=r"mlp\.gate_proj: the graph has no place for a bottleneck"):
        export_onnx(tmp_path / "out", cache_dir=graphs)
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_every_nonlinearity_is_known_to_transformers() -> None:
    """The names mean what the library means by them."""
    from transformers.activations import ACT2FN

    assert {name for name in ACTIVATIONS if name not in ACT2FN} == {"leakyrelu"}


def test_a_lora_of_another_tool_goes_below(tmp_path: Path) -> None:
    """base+lora+bottleneck: the weights are the merge, the networks are on top."""
    lora = write_lora(tmp_path / "lora", {"model.layers.0.mlp.down_proj": (16, 20)})
    base = ROOT / "llama" / "base"
    compose(plan_folders(base, [(lora, 0.5), *folders("llama", "houlsby")], export=Export.BUNDLE), tmp_path / "both")
    compose(plan_folders(base, [(lora, 0.5)]), tmp_path / "merged")
    assert read_tensors(tmp_path / "both").keys() == read_tensors(tmp_path / "merged").keys()
    assert (tmp_path / "both" / "model.safetensors").read_bytes() == (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()
