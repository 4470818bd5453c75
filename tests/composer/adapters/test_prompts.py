"""Adapters of virtual tokens: what is read of them, what they need of a base, how they stack, and as bundles.

Oracle: PEFT's own forward and generation on tiny models in float32.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, get_peft_model

from composer.adapters import kinds, open_adapter
from composer.errors import (
    CorruptFileError,
    IncompatibleError,
    RecipeError,
    TargetMismatchError,
    UnsupportedAdapterError,
)
from composer.exporters import find_exporter
from composer.recipe import Export
from composer.run import compose
from composer.tensors import read_header
from tests.composer.prompts import CASES, PREFIXES, PROMPTS, TOKENS, adapt, greedy, live, logits, make_model, sample_ids
from tests.conftest import random_lora, save_model
from tests.support import edit_json, plan_folders, read_tensors, weight_bytes, write_base, write_tensors

DOCS = Path(__file__).parents[3] / "docs" / "additions.md"
CAUSAL = ("llama", "gpt2")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models, saved."""
    return {name: save_model(make_model(name), tmp_path_factory.mktemp("prompts") / name) for name in (*CAUSAL, "bert")}


@pytest.fixture(scope="module")
def loaders() -> dict[str, Any]:
    """The functions that docs/additions.md shows."""
    found: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        exec(block, found)
    return found


def bundle(base: Path, adapters: list[Path], out: Path) -> Path:
    """Compose to a bundle."""
    return compose(plan_folders(base, [(path, 1.0) for path in adapters], export=Export.BUNDLE), out).out


@pytest.mark.parametrize("base", CAUSAL)
@pytest.mark.parametrize("case", CASES)
def test_a_bundle_runs_as_peft_does(
    case: str, base: str, bases: dict[str, Path], loaders: dict[str, Any], tmp_path: Path
) -> None:
    """Oracle: PEFT live, to 1e-5 in every logit and in 32 greedy tokens; the addition's effect is far above that."""
    adapt(make_model(base), case, tmp_path / "adapter")
    model = type(make_model(base)).from_pretrained(bundle(bases[base], [tmp_path / "adapter"], tmp_path / "out"))
    ids = sample_ids()
    prefix = case in PREFIXES
    given = (
        loaders["with_prefix"](tmp_path / "out", ids)
        if prefix
        else loaders["with_prompt"](tmp_path / "out", model, ids)
    )
    kept = {**given, "input_ids": ids} if prefix else given
    with torch.no_grad():
        found = model(**kept).logits[:, -ids.shape[1] :]
    wanted = live(make_model(base), tmp_path / "adapter")
    assert torch.allclose(found, logits(wanted, ids), rtol=0, atol=1e-5)
    assert (found - logits(make_model(base), ids)).abs().max() > 1e-2
    given = loaders["with_prefix"](tmp_path / "out", ids) if prefix else given
    assert torch.equal(greedy(model, ids, **given), greedy(wanted, ids))


@pytest.mark.parametrize("case", ["prompt-tuning", "prefix-tuning"])
def test_a_bundle_of_a_classifier_runs_as_peft_does(
    case: str, bases: dict[str, Path], loaders: dict[str, Any], tmp_path: Path
) -> None:
    """Oracle: PEFT live to 1e-5, its trained classifier included."""
    adapt(make_model("bert"), case, tmp_path / "adapter")
    out = bundle(bases["bert"], [tmp_path / "adapter"], tmp_path / "out")
    model, ids = type(make_model("bert")).from_pretrained(out).eval(), sample_ids()
    if case in PREFIXES:
        given = {**loaders["with_prefix"](out, ids), "input_ids": ids}
    else:
        given = loaders["with_prompt"](out, model, ids)
    with torch.no_grad():
        found = model(**given).logits
    wanted = logits(live(make_model("bert"), tmp_path / "adapter"), ids)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_an_adapter_needs_is_read_off_its_header(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Sizes in the signature; a base of another hidden size, or of other layers, is named with both sizes."""
    adapt(make_model("llama"), case, tmp_path / "adapter")
    adapter = open_adapter(tmp_path / "adapter")
    needs = {target.parameter: target.shape for target in adapter.signature.targets}
    prefix = case in PREFIXES
    assert needs == ({"@layers": (2,), "@key_value_width": (32,)} if prefix else {"@hidden_size": (64,)})
    assert adapter.signature.virtual_tokens == 5
    narrow = {name: t[:16, :32] if t.ndim == 2 else t for name, t in read_tensors(bases["llama"]).items()}
    write_base(tmp_path / "base", {name: tensor.numpy() for name, tensor in narrow.items()})
    with pytest.raises(TargetMismatchError, match="@key_value_width" if prefix else "@hidden_size") as caught:
        plan_folders(tmp_path / "base", [(tmp_path / "adapter", 1.0)])
    assert "expects" in str(caught.value)


def test_a_prefix_of_other_heads_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """The width of the cache fits, its split into heads does not."""
    adapt(make_model("llama"), "prefix-tuning", tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", num_attention_heads=4)
    with pytest.raises(TargetMismatchError, match="4 heads a layer, this base has 2"):
        plan_folders(bases["llama"], [(tmp_path / "adapter", 1.0)])


@pytest.mark.parametrize("case", ["prompt-tuning", "prefix-tuning"])
@pytest.mark.parametrize(
    ("config", "shape", "error"),
    [
        ({"num_virtual_tokens": 4}, None, CorruptFileError),
        ({"num_virtual_tokens": None}, None, CorruptFileError),
        ({"task_type": "SEQ_2_SEQ_LM"}, None, UnsupportedAdapterError),
        ({"num_transformer_submodules": 2}, None, UnsupportedAdapterError),
        ({}, (5,), CorruptFileError),
        ({}, (5, 0), CorruptFileError),
        ({"num_layers": 3, "token_dim": None}, (5, 7), (CorruptFileError, TargetMismatchError)),
    ],
)
def test_a_damaged_adapter_is_named(
    case: str, config: dict[str, Any], shape: tuple[int, ...] | None, error: Any, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Config and tensor must agree; an encoder-decoder's prompt is refused."""
    adapt(make_model("llama"), case, tmp_path)
    edit_json(tmp_path / "adapter_config.json", **config)
    if shape is not None:
        write_tensors(tmp_path / "adapter_model.safetensors", {"prompt_embeddings": np.ones(shape, np.float32)})
    with pytest.raises(error):
        plan_folders(bases["llama"], [(tmp_path, 1.0)])


def test_a_tensor_that_peft_does_not_save_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    """An encoder's own weights beside what it gave: nothing is left unused."""
    adapt(make_model("llama"), "p-tuning-mlp", tmp_path)
    tensors = {name: spec.read() for name, spec in read_header(tmp_path / "adapter_model.safetensors").tensors.items()}
    write_tensors(tmp_path / "adapter_model.safetensors", {**tensors, "mlp_head.0.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(CorruptFileError, match=r"mlp_head\.0\.weight"):
        open_adapter(tmp_path)


def test_a_classifier_trained_along_is_replaced(bases: dict[str, Path], tmp_path: Path) -> None:
    """Every tensor of the adapter is used: the prompt as an addition, the classifier as weights."""
    adapt(make_model("bert"), "prompt-tuning", tmp_path / "adapter")
    out = bundle(bases["bert"], [tmp_path / "adapter"], tmp_path / "out")
    trained = {
        name: spec.read()
        for name, spec in read_header(tmp_path / "adapter" / "adapter_model.safetensors").tensors.items()
    }
    written = read_tensors(out)
    for part in ("weight", "bias"):
        np.testing.assert_array_equal(written[f"classifier.{part}"].numpy(), trained[f"base_model.classifier.{part}"])


class TestStacks:
    """base+lora+prompt and the orders that are refused."""

    @pytest.fixture
    def parts(self, bases: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
        """A LoRA, an IA3, two prompts and two prefixes on the tiny Llama."""
        for seed in (1, 2):
            adapt(make_model("llama"), "prompt-tuning", tmp_path / f"prompt{seed}", seed=seed, tokens=2 + seed)
            adapt(make_model("llama"), "prefix-tuning", tmp_path / f"prefix{seed}", seed=seed)
        random_lora(bases["llama"], tmp_path / "lora", target_modules=["q_proj", "v_proj"])
        config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        scaled = get_peft_model(make_model("llama"), config)
        for name, parameter in scaled.named_parameters():
            if "ia3_l" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        scaled.save_pretrained(tmp_path / "ia3")
        return {path.name: path for path in tmp_path.iterdir()}

    @pytest.mark.parametrize("weights", ["lora", "ia3"])
    @pytest.mark.parametrize("addition", ["prompt1", "prefix1"])
    def test_weights_are_merged_and_the_addition_put_before_them(
        self,
        addition: str,
        weights: str,
        parts: dict[str, Path],
        bases: dict[str, Path],
        loaders: dict[str, Any],
        tmp_path: Path,
    ) -> None:
        """Oracle: PEFT live with the addition, over PEFT's merge of the adapter below it."""
        out = bundle(bases["llama"], [parts[weights], parts[addition]], tmp_path / "out")
        model = type(make_model("llama")).from_pretrained(out)
        ids = sample_ids()
        if addition == "prefix1":
            given = {**loaders["with_prefix"](out, ids), "input_ids": ids}
        else:
            given = loaders["with_prompt"](out, model, ids)
        wanted = live(live(make_model("llama"), parts[weights]).merge_and_unload(), parts[addition])
        with torch.no_grad():
            found = model(**given).logits[:, -ids.shape[1] :]
        assert torch.allclose(found, logits(wanted, ids), rtol=0, atol=1e-5)

    def test_two_prompts_stand_in_the_order_given(
        self, parts: dict[str, Path], bases: dict[str, Path], tmp_path: Path
    ) -> None:
        """The companion holds one after the other; the record names both."""
        for index, order in enumerate((("prompt1", "prompt2"), ("prompt2", "prompt1"))):
            plan = plan_folders(bases["llama"], [(parts[name], 1.0) for name in order], export=Export.BUNDLE)
            outcome = compose(plan, tmp_path / f"out{index}")
            wanted = np.concatenate(
                [
                    read_header(parts[name] / "adapter_model.safetensors").tensors["prompt_embeddings"].read()
                    for name in order
                ]
            )
            written = read_header(outcome.out / "soft_prompt.safetensors").tensors["embeddings"].read()
            np.testing.assert_array_equal(written, wanted)
            assert [entry["ref"] for entry in outcome.record["additions"]] == list(order)
            assert outcome.record["warnings"] == []

    @pytest.mark.parametrize(
        ("order", "error", "message"),
        [
            (("prompt1", "lora"), RecipeError, "write lora before prompt1"),
            (("prefix1", "lora"), RecipeError, "write lora before prefix1"),
            (("prefix1", "prefix2"), IncompatibleError, "prefix1 and prefix2 cannot be combined"),
            (("prompt1", "prefix1"), IncompatibleError, "prompt1 and prefix1 cannot be combined"),
        ],
    )
    def test_stacks_that_mean_nothing_are_refused(
        self, order: tuple[str, ...], error: Any, message: str, parts: dict[str, Path], bases: dict[str, Path]
    ) -> None:
        """With the reason and what to write instead."""
        with pytest.raises(error) as caught:
            plan_folders(bases["llama"], [(parts[name], 1.0) for name in order])
        assert message in f"{caught.value} {caught.value.remedy}"

    def test_an_addition_is_taken_whole_or_left_out(
        self, parts: dict[str, Path], bases: dict[str, Path], tmp_path: Path
    ) -> None:
        """Half a prompt is not defined; at weight 0 the bytes are those without it, even before a LoRA."""
        with pytest.raises(RecipeError, match="weight must be 1"):
            plan_folders(bases["llama"], [(parts["prompt1"], 0.5)])
        compose(plan_folders(bases["llama"], [(parts["prompt1"], 0.0), (parts["lora"], 1.0)]), tmp_path / "without")
        compose(plan_folders(bases["llama"], [(parts["lora"], 1.0)]), tmp_path / "plain")
        assert weight_bytes(tmp_path / "without") == weight_bytes(tmp_path / "plain")


@pytest.mark.parametrize("case", ["prompt-tuning", "prefix-tuning"])
def test_exports_that_cannot_hold_it_say_which_can(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """A LoRA holds no virtual tokens; the remedy names an export that does."""
    adapt(make_model("llama"), case, tmp_path / "adapter")
    refused = [Export.PEFT, *([Export.SAFETENSORS] if case in PREFIXES else [])]
    for export in refused:
        with pytest.raises(UnsupportedAdapterError) as caught:
            compose(plan_folders(bases["llama"], [(tmp_path / "adapter", 1.0)], export=export), tmp_path / "out")
        assert "bundle" in caught.value.remedy
        assert not (tmp_path / "out").exists()


def test_the_docs_have_a_row_for_each_kind() -> None:
    """With the types that it reads and what it exports to."""
    text = DOCS.read_text()
    found = {name: kind for name, kind in kinds().items() if hasattr(kind, "exports")}
    assert len(found) >= 5
    for name, kind in found.items():
        (row,) = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert row[1] == ", ".join(f"`{peft_type}`" for peft_type in kind.peft_types)
        assert row[-1] == f"{', '.join(kind.exports)} |"


def test_a_bundle_without_additions_is_refused(bases: dict[str, Path]) -> None:
    """There is nothing to put beside the weights."""
    with pytest.raises(RecipeError, match="nothing is left"):
        find_exporter("bundle").prepare(plan_folders(bases["llama"]))


@pytest.mark.parametrize("case", ["prompt-tuning", "prefix-tuning"])
def test_a_plan_knows_the_size_of_every_file(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """The companions' sizes are exact before anything is read of them."""
    adapt(make_model("llama"), case, tmp_path / "adapter")
    plan = plan_folders(bases["llama"], [(tmp_path / "adapter", 1.0)], export=Export.BUNDLE)
    out = compose(plan, tmp_path / "out").out
    assert find_exporter("bundle").plan_files(plan) == {
        path.name: path.stat().st_size for path in out.glob("*.safetensors") if path.name != "model.safetensors"
    }


def test_the_catalogue_knows_what_a_prompt_fits(registry: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    """Published, found for its base, and not for one of another size; planned with what it adds."""
    from composer.recipe import parse_recipe

    adapt(make_model("llama"), PROMPTS[0], tmp_path / "prompt")
    adapt(make_model("llama"), PREFIXES[0], tmp_path / "prefix")
    for name in CAUSAL:
        registry.add_base(bases[name], name=name)
    for name in ("prompt", "prefix"):
        registry.publish(tmp_path / name, name=f"team/{name}", version="1.0.0", base="llama")
        assert [fit.base.name for fit in registry.bases_for(f"team/{name}").items] == ["llama"]
    assert registry.check("team/prompt", "gpt2").level.value == "incompatible"
    plan = registry.plan(parse_recipe("llama+team/prompt", export=Export.BUNDLE))
    assert plan.additions == ("team/prompt@1.0.0: 5 virtual tokens before every input",)
    assert plan.touched == 0
    assert "soft_prompt.safetensors" in plan.files
    assert registry.inspect("team/prefix")["virtual_tokens"] == 5


class TestTasks:
    """One prompt of several, named in the recipe."""

    @pytest.mark.parametrize("task", [0, 2])
    def test_a_task_computes_what_peft_computes(
        self, task: int, bases: dict[str, Path], loaders: dict[str, Any], tmp_path: Path
    ) -> None:
        """Oracle: PEFT live with that task's id, to 1e-5; the tasks differ by far more."""
        adapt(make_model("llama"), "multitask", tmp_path / "adapter")
        plan = plan_folders(bases["llama"], [(tmp_path / "adapter", 1.0)], export=Export.BUNDLE, task=task)
        outcome = compose(plan, tmp_path / "out")
        assert outcome.record["additions"][0]["adds"] == f"5 virtual tokens before every input (task {task})"
        model = type(make_model("llama")).from_pretrained(outcome.out)
        wanted = live(make_model("llama"), tmp_path / "adapter")
        ids = sample_ids()
        by_task = [logits(wanted, ids, task_ids=torch.tensor([number] * 2)) for number in range(3)]
        with torch.no_grad():
            found = model(**loaders["with_prompt"](outcome.out, model, ids)).logits[:, 5:]
        assert torch.allclose(found, by_task[task], rtol=0, atol=1e-5)
        assert (by_task[0] - by_task[2]).abs().max() > 1e-2

    def test_a_task_must_be_one_of_the_adapters(self, bases: dict[str, Path], tmp_path: Path) -> None:
        """None named of several, one too many, one of an adapter that has none."""
        adapt(make_model("llama"), "multitask", tmp_path / "tasks")
        adapt(make_model("llama"), "prompt-tuning", tmp_path / "prompt")
        for name, task, message in (
            ("tasks", None, "none is named"),
            ("tasks", 3, "no task 3"),
            ("prompt", 0, "no task 0"),
        ):
            with pytest.raises(RecipeError, match=message):
                plan_folders(bases["llama"], [(tmp_path / name, 1.0)], task=task)

    def test_factors_of_another_size_are_named(self, bases: dict[str, Path], tmp_path: Path) -> None:
        """One task too many in the config, or a factor of another rank."""
        adapt(make_model("llama"), "multitask", tmp_path)
        edit_json(tmp_path / "adapter_config.json", num_tasks=4)
        with pytest.raises(CorruptFileError, match="prefix_task_cols"):
            open_adapter(tmp_path)

    def test_the_catalogue_composes_a_task_by_its_name(
        self, registry: Any, bases: dict[str, Path], tmp_path: Path
    ) -> None:
        """Two tasks of one version are two results; undo goes back to the other adapters without the task."""
        from composer.recipe import parse_recipe

        adapt(make_model("llama"), "multitask", tmp_path / "tasks")
        registry.add_base(bases["llama"], name="llama")
        registry.publish(tmp_path / "tasks", name="team/tasks", version="1.0.0", base="llama")
        texts = [f"llama+team/tasks@1.0.0#{task}" for task in (0, 1)]
        done = [registry.compose(parse_recipe(text), tmp_path / text[-1]) for text in texts]
        assert [item.recipe_text for item in done] == texts
        assert done[0].output_digest != done[1].output_digest
        assert registry.compose(parse_recipe(texts[0]), tmp_path / "0").cached
        with pytest.raises(RecipeError, match="none is named"):
            registry.plan(parse_recipe("llama+team/tasks"))


@pytest.mark.parametrize("case", ["prompt-tuning", "prefix-tuning"])
def test_virtual_tokens_leave_a_position_for_the_input(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """As many as the base has positions are refused, and so are several adapters that have as many together."""
    base = shutil.copytree(bases["gpt2"], tmp_path / "base")
    for name in ("one", "two"):
        adapt(make_model("gpt2"), case, tmp_path / name)
    one, two = (tmp_path / name for name in ("one", "two"))
    edit_json(base / "config.json", n_positions=TOKENS + 1)
    plan_folders(base, [(one, 1.0)], export=Export.BUNDLE)
    if case == "prompt-tuning":
        with pytest.raises(IncompatibleError, match=f"one and two: {2 * TOKENS} virtual tokens"):
            plan_folders(base, [(one, 1.0), (two, 1.0)], export=Export.BUNDLE)
    edit_json(base / "config.json", n_positions=TOKENS)
    with pytest.raises(IncompatibleError, match=f"{TOKENS} positions in all"):
        plan_folders(base, [(one, 1.0)], export=Export.BUNDLE)
