"""Soft prompts and prefixes inside the graph, against PEFT's own forward and generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from composer.errors import OnnxVerificationError, UnsupportedAdapterError
from composer.exporters.onnx import generate, open_session
from composer.exporters.onnx import trace as trace_module
from composer.exporters.onnx.session import forward
from composer.recipe import Export
from composer.run import Outcome, compose
from tests.composer.prompts import CASES, PREFIXES, adapt, greedy, live, logits, make_model, sample_ids
from tests.conftest import random_lora, save_model
from tests.support import edit_json, plan_folders

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

CAUSAL = ("llama", "gpt2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One graph cache for the module, so that each configuration is traced once."""
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models, saved."""
    return {name: save_model(make_model(name), tmp_path_factory.mktemp("onnx") / name) for name in (*CAUSAL, "bert")}


def export(base: Path, adapters: list[Path], out: Path, cache: Path) -> Outcome:
    """Compose to ONNX."""
    plan = plan_folders(base, [(path, 1.0) for path in adapters], export=Export.ONNX)
    return compose(plan, out, cache_dir=cache)


def run_causal(out: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of real tokens in ONNX Runtime, in one pass."""
    found, _ = forward(open_session(out / "model.onnx", threads=1), ids.numpy(), np.ones_like(ids.numpy()))
    return torch.from_numpy(found)


def check_causal(out: Path, wanted: Any, ids: torch.Tensor) -> None:
    """Every logit to 1e-5 of PEFT live, and 32 greedy tokens the same."""
    assert torch.allclose(run_causal(out, ids), logits(wanted, ids), rtol=0, atol=1e-5)
    tokens = generate(open_session(out / "model.onnx", threads=1), ids.numpy(), max_new_tokens=32)
    assert torch.equal(torch.from_numpy(tokens), greedy(wanted, ids))


@pytest.mark.slow
@pytest.mark.parametrize("base", CAUSAL)
@pytest.mark.parametrize("case", CASES)
def test_a_graph_computes_what_peft_computes(
    case: str, base: str, bases: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """Oracle: PEFT live, past the first token; the record holds what the export's own verification found."""
    adapt(make_model(base), case, tmp_path / "adapter")
    outcome = export(bases[base], [tmp_path / "adapter"], tmp_path / "out", cache)
    check_causal(outcome.out, live(make_model(base), tmp_path / "adapter"), sample_ids())
    assert (run_causal(outcome.out, sample_ids()) - logits(make_model(base), sample_ids())).abs().max() > 1e-2
    found = outcome.record["export"]
    assert 0 < found["max_abs_diff"] < found["tolerance"]
    assert {check["padding"] for check in found["checks"]} == {"none", "left"}


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("cpt", "prefix-tuning-cartridge")])
def test_a_classifier_computes_what_peft_computes(
    case: str, bases: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """Oracle: PEFT live on rows of two lengths, padded on the right, with both kinds of token types."""
    adapt(make_model("bert"), case, tmp_path / "adapter")
    out = export(bases["bert"], [tmp_path / "adapter"], tmp_path / "out", cache).out
    ids, mask = sample_ids(), torch.ones(2, 9, dtype=torch.int64)
    ids[1, 6:], mask[1, 6:] = 0, 0
    kinds = (torch.arange(9) > 4).long().expand(2, -1).contiguous()
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
    with torch.no_grad():
        wanted = live(make_model("bert"), tmp_path / "adapter")(**given).logits
    session = open_session(out / "model.onnx", threads=1)
    found = session.run(["logits"], {name: value.numpy() for name, value in given.items()})[0]
    assert torch.allclose(torch.from_numpy(found), wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_one_traced_graph_serves_base_prompt_and_prefix(
    bases: dict[str, Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Virtual tokens are put into the bound graph: after the first export nothing is traced any more."""
    export(bases["llama"], [], tmp_path / "plain", cache)
    monkeypatch.setattr(trace_module, "trace", lambda *_: pytest.fail("traced again"))
    digests = set()
    for case in ("prompt-tuning", "prefix-tuning"):
        adapt(make_model("llama"), case, tmp_path / case)
        digests.add(
            export(bases["llama"], [tmp_path / case], tmp_path / f"{case}-out", cache).record["export"]["graph_digest"]
        )
    assert digests == {json.loads((tmp_path / "plain" / "composition.json").read_text())["export"]["graph_digest"]}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["prompt-tuning", "prefix-tuning"])
def test_the_tensors_lie_in_a_file_of_their_own(case: str, bases: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    """The graph points into the companion and holds no copy of it; the checker accepts it."""
    adapt(make_model("llama"), case, tmp_path / "adapter")
    out = export(bases["llama"], [tmp_path / "adapter"], tmp_path / "out", cache).out
    onnx.checker.check_model(out / "model.onnx")
    model = onnx.load(out / "model.onnx", load_external_data=False)
    file = "past_key_values.safetensors" if case in PREFIXES else "soft_prompt.safetensors"
    pointing = [
        item.name
        for item in model.graph.initializer
        if {e.key: e.value for e in item.external_data}.get("location") == file
    ]
    assert len(pointing) == (4 if case in PREFIXES else 1)
    assert [item.name for item in model.graph.input] == [
        item.name for item in onnx.load(export(bases["llama"], [], tmp_path / "plain", cache).out / "model.onnx",
                                        load_external_data=False).graph.input
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", ["prompt-tuning", "prefix-tuning"])
def test_padding_on_the_left_changes_nothing(case: str, bases: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    """A short row in a batch gives the tokens that it gives alone (PEFT itself does not: it ignores positions)."""
    adapt(make_model("llama"), case, tmp_path / "adapter")
    session = open_session(export(bases["llama"], [tmp_path / "adapter"], tmp_path / "out", cache).out / "model.onnx")
    ids = sample_ids().numpy()
    mask = np.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    together = generate(session, ids, mask, max_new_tokens=16)
    for row, start in ((0, 0), (1, 4)):
        assert (generate(session, ids[row : row + 1, start:], max_new_tokens=16) == together[row]).all()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["prompt-tuning", "prefix-tuning"])
def test_a_stack_on_a_bf16_base_is_merged_below(case: str, bases: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    """Oracle: PEFT live in float32 with the addition, over the LoRA merged into bf16; the addition itself stays float32."""
    base = save_model(make_model("llama").bfloat16(), tmp_path / "base")
    random_lora(base, tmp_path / "lora", target_modules="all-linear")
    adapt(make_model("llama"), case, tmp_path / "adapter")
    out = export(base, [tmp_path / "lora", tmp_path / "adapter"], tmp_path / "out", cache).out
    # The folder's own weights are the merged model.
    merged = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    check_causal(out, live(merged, tmp_path / "adapter"), sample_ids())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["prompt-tuning", "prefix-tuning"])
@pytest.mark.parametrize(
    "name", ["Gemma3ForCausalLM", "GraniteForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "qwen2-sliding"]
)
def test_other_architectures_take_them_too(name: str, case: str, cache: Path, tmp_path: Path) -> None:
    """Scaled embeddings, fused projections, windows that slide; oracle: PEFT live on unpadded rows."""
    from tests.composer.exporters.test_onnx import build

    torch.manual_seed(4)
    base = save_model(build(name), tmp_path / "base")
    cls = type(build(name))
    adapted = cls.from_pretrained(base)
    adapt(adapted, case, tmp_path / "adapter")
    outcome = export(base, [tmp_path / "adapter"], tmp_path / "out", cache)
    wanted = live(cls.from_pretrained(base).eval(), tmp_path / "adapter")
    found = run_causal(outcome.out, sample_ids())
    assert torch.allclose(found, logits(wanted, sample_ids()), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_graph_with_another_prompt_fails_verification(
    bases: dict[str, Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verification is part of the export: a splice that is off by one position is not published."""
    from composer.exporters.onnx import virtual_tokens

    adapt(make_model("llama"), "prompt-tuning", tmp_path / "adapter")
    constant = virtual_tokens._Splice._constant

    def wrong(self: Any, name: str, values: Any, *rest: Any, **options: Any) -> str:
        return constant(
            self, name, [value + 1 for value in values] if name == "positions" else values, *rest, **options
        )

    monkeypatch.setattr(virtual_tokens._Splice, "_constant", wrong)
    with pytest.raises(OnnxVerificationError):
        export(bases["llama"], [tmp_path / "adapter"], tmp_path / "out", cache)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["prompt-tuning", "prefix-tuning"])
def test_an_encoder_that_counts_its_padding_takes_them(case: str, cache: Path, tmp_path: Path) -> None:
    """RoBERTa finds positions by comparing ids with the padding's; oracle: PEFT live on rows of two lengths."""
    from tests.composer.exporters.test_onnx import build

    torch.manual_seed(4)
    base = save_model(build("RobertaForSequenceClassification"), tmp_path / "base")
    load = transformers.RobertaForSequenceClassification.from_pretrained
    adapt(load(base), case, tmp_path / "adapter")
    out = export(base, [tmp_path / "adapter"], tmp_path / "out", cache).out
    ids, mask = sample_ids(), torch.ones(2, 9, dtype=torch.int64)
    ids[1, 6:], mask[1, 6:] = 1, 0
    given = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        wanted = live(load(base).eval(), tmp_path / "adapter")(**given).logits
    session = open_session(out / "model.onnx", threads=1)
    found = session.run(["logits"], {name: value.numpy() for name, value in given.items()})[0]
    assert torch.allclose(torch.from_numpy(found), wanted, rtol=0, atol=1e-5)


def test_an_encoder_without_keys_and_values_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """DistilBERT takes none in transformers, so nothing could be compared."""
    adapt(make_model("bert"), "prefix-tuning", tmp_path / "adapter")
    base = tmp_path / "base"
    shutil.copytree(bases["bert"], base)
    edit_json(base / "config.json", architectures=["DistilBertForSequenceClassification"])
    with pytest.raises(UnsupportedAdapterError, match="takes no keys and values"):
        compose(plan_folders(base, [(tmp_path / "adapter", 1.0)], export=Export.ONNX), tmp_path / "out")
