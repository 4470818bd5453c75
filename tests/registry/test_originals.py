"""Adapters of a quantised base, merged into the weights that it was made of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.checkpoint import open_checkpoint
from composer.errors import IncompatibleError, NotFoundError, PolicyError, RecipeError
from composer.precision import quantisation_error
from composer.recipe import Export, parse_recipe
from composer.tensors import read_header
from registry.api.rules import refuse_paths
from registry.schemas import Level, Relation
from registry.undo import undo
from tests.support import compose_folders, edit_json, read_tensors, weight_bytes, write_lora, write_tensors

NF4 = Path(__file__).parents[1] / "fixtures" / "quantised" / "tiny-llama-nf4"
ORIGINAL = {"base_precision": "original"}


@pytest.fixture
def decoded(tmp_path: Path) -> Path:
    """What the NF4 Llama decodes to, in bf16."""
    compose_folders(NF4, [], tmp_path / "decoded")
    (tmp_path / "decoded" / "composition.json").unlink()
    return tmp_path / "decoded"


def changed(folder: Path, out: Path, share: float) -> Path:
    """A copy of a checkpoint, each matrix moved by noise of that share of its norm."""
    shutil.copytree(folder, out)
    random = np.random.default_rng(0)
    tensors = {name: spec.read() for name, spec in read_header(folder / "model.safetensors").tensors.items()}
    for name, array in tensors.items():
        if name.endswith("proj.weight"):
            values = array.astype(np.float64)
            noise = random.normal(size=array.shape)
            tensors[name] = (values + noise * (share * np.linalg.norm(values) / np.linalg.norm(noise))).astype(
                array.dtype
            )
    write_tensors(out / "model.safetensors", tensors, {"format": "pt"})
    return out


@pytest.fixture
def catalogue(registry: Any, decoded: Path, tmp_path: Path) -> Any:
    """The NF4 Llama, a source 10% away from it, and an adapter trained over the NF4 one."""
    source = changed(decoded, tmp_path / "source", 0.1)
    registry.add_base(source, name="source")
    registry.add_base(NF4, name="quantised", parent="source", relation=Relation.QUANTIZED)
    shapes = {name.removesuffix(".weight"): shape for name, shape in open_checkpoint(decoded).shapes.items()}
    lora = write_lora(tmp_path / "lora", {name: shape for name, shape in shapes.items() if name.endswith("_proj")})
    registry.publish(lora, name="team/a", base="quantised")
    return registry


def test_the_adapter_is_merged_into_the_declared_parent(catalogue: Any, tmp_path: Path) -> None:
    """The same bytes as composing on the parent itself; both fingerprints and the distance are in the record."""
    result = catalogue.compose(parse_recipe("quantised+team/a:0.7", **ORIGINAL), tmp_path / "out")
    compose_folders(tmp_path / "source", [(tmp_path / "lora", 0.7)], tmp_path / "direct")
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "direct")
    base = result.record["base"]
    assert base["fingerprint"] == catalogue.get_base("quantised").fingerprint
    assert base["original"]["fingerprint"] == catalogue.get_base("source").fingerprint
    assert base["original"]["ref"] == "source"
    assert base["original"]["difference"] == pytest.approx(0.1, rel=0.1)
    assert result.record["adapters"][0]["verdict"]["level"] == Level.EXACT
    assert any("merged into source" in line and "of their norm" in line for line in result.warnings)
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()


def test_the_original_may_be_named_and_a_folder(catalogue: Any, decoded: Path, tmp_path: Path) -> None:
    """What is named goes before what is declared; the plan warns as the composition does."""
    recipe = parse_recipe("quantised+team/a", **ORIGINAL, original=str(decoded))
    catalogue.compose(recipe, tmp_path / "named")
    compose_folders(decoded, [(tmp_path / "lora", 1.0)], tmp_path / "direct")
    assert weight_bytes(tmp_path / "named") == weight_bytes(tmp_path / "direct")
    assert any("0.0% of their norm" in line for line in catalogue.plan(recipe).warnings)


def test_the_key_tells_the_original_apart(catalogue: Any, decoded: Path, tmp_path: Path) -> None:
    """Another original at the same place is another composition, not the one that lies there."""
    out = tmp_path / "out"
    first = catalogue.compose(parse_recipe("quantised+team/a", **ORIGINAL), out)
    assert catalogue.compose(parse_recipe("quantised+team/a", **ORIGINAL, original="source"), out).cached
    other = parse_recipe("quantised+team/a", **ORIGINAL, original=str(decoded))
    second = catalogue.compose(other, out, replace=True)
    assert not second.cached
    assert second.output_digest != first.output_digest


def test_undo_gives_the_originals_tensors_back(catalogue: Any, tmp_path: Path) -> None:
    """Without any adapter the result is the source, not the quantised base."""
    catalogue.compose(parse_recipe("quantised+team/a", **ORIGINAL), tmp_path / "out")
    undo(catalogue, tmp_path / "out", tmp_path / "bare")
    expected, found = read_tensors(tmp_path / "source"), read_tensors(tmp_path / "bare")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_a_requantised_composition_is_planned_written_and_undone(catalogue: Any, tmp_path: Path) -> None:
    """Into the original and back into the base's format; taken out again, the base's own fingerprint comes back."""
    recipe = parse_recipe("quantised+team/a", **ORIGINAL, requantise=True)
    plan = catalogue.plan(recipe)
    result = catalogue.compose(recipe, tmp_path / "out")
    sizes = {name: (tmp_path / "out" / name).stat().st_size for name in plan.files}
    assert sizes == pytest.approx(plan.files, rel=0.01)
    assert result.record["export"]["quantisation"] == "bitsandbytes 4-bit"
    assert result.record["adapters"][0]["survival"] > 0.5
    catalogue.compose(parse_recipe("quantised+team/a", requantise=True, min_survival=0), tmp_path / "own")
    bare = undo(catalogue, tmp_path / "own", tmp_path / "bare")
    assert bare.record["base"]["fingerprint"] == catalogue.get_base("quantised").fingerprint
    assert read_tensors(tmp_path / "bare").keys() == read_tensors(NF4).keys()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
def test_the_error_is_the_distance_of_the_two(decoded: Path, tmp_path: Path, share: float) -> None:
    """Oracle: all rows in float64."""
    source = changed(decoded, tmp_path / "source", share)
    tensors = read_tensors(source)
    own = read_tensors(decoded)
    names = [name for name in tensors if name.endswith("proj.weight")]
    off = sum(float((tensors[name].double() - own[name].double()).square().sum()) for name in names)
    size = sum(float(tensors[name].double().square().sum()) for name in names)
    found = quantisation_error(open_checkpoint(NF4), open_checkpoint(source))
    assert found == pytest.approx((off / size) ** 0.5, rel=0.15, abs=1e-9)


def test_weights_that_are_no_source_are_refused(catalogue: Any, decoded: Path, tmp_path: Path) -> None:
    """Unrelated weights, other shapes, another config, a quantised one."""
    cases = {
        "further": changed(decoded, tmp_path / "further", 1.0),
        "config": changed(decoded, tmp_path / "config", 0.0),
    }
    edit_json(cases["config"] / "config.json", rms_norm_eps=0.5)
    cases["quantised"] = NF4
    cases["smaller"] = changed(decoded, tmp_path / "smaller", 0.0)
    tensors = {name: spec.read() for name, spec in read_header(cases["smaller"] / "model.safetensors").tensors.items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    write_tensors(cases["smaller"] / "model.safetensors", tensors)
    messages = {
        "further": "of its norm",
        "config": "rms_norm_eps",
        "quantised": "are not what",
        "smaller": "norm.weight",
    }
    for name, folder in cases.items():
        with pytest.raises(IncompatibleError, match=messages[name]):
            catalogue.plan(parse_recipe("quantised+team/a", **ORIGINAL, original=str(folder)))


def test_what_makes_no_sense_is_refused(catalogue: Any, decoded: Path, tmp_path: Path) -> None:
    """An original of an unquantised base, without a name, without the option, for a LoRA, or a path over REST."""
    with pytest.raises(IncompatibleError, match="its own original"):
        catalogue.plan(parse_recipe("source+team/a", **ORIGINAL, original="source"))
    with pytest.raises(NotFoundError, match="quantised from"):
        catalogue.plan(parse_recipe(f"{shutil.copytree(NF4, tmp_path / 'copy')}+team/a", **ORIGINAL))
    with pytest.raises(RecipeError, match="an original is named"):
        catalogue.plan(parse_recipe("quantised+team/a", original="source"))
    with pytest.raises(RecipeError, match="merged into nothing"):
        catalogue.plan(parse_recipe("quantised+team/a", **ORIGINAL, export=Export.PEFT))
    with pytest.raises(PolicyError, match="the original"):
        refuse_paths(parse_recipe("quantised+team/a", **ORIGINAL, original=str(decoded)))
