"""Every verdict, in both directions, with reasons; and what compose makes of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from composer.errors import TargetMismatchError, WeakCompatibilityError
from composer.recipe import Allow, parse_recipe
from registry.errors import BaseChangedError
from registry.schemas import BaseStatus, Level, Relation
from registry.services.local import LocalRegistry
from tests.support import edit_json, write_base, write_lora, write_tensors

Q = "model.layers.0.self_attn.q_proj"
MLP = "model.layers.0.mlp.up_proj"


def weights(seed: int = 0, dtype: type = np.float16) -> dict[str, np.ndarray]:
    """A model of two matrices; the numbers are exact in bf16."""
    random = np.random.default_rng(seed)
    return {f"{name}.weight": random.integers(-8, 8, (6, 4)).astype(dtype) for name in (Q, MLP)}


@pytest.fixture
def base(tmp_path: Path, registry: LocalRegistry) -> Path:
    """A registered base named `base`."""
    folder = write_base(tmp_path / "base", weights())
    registry.add_base(folder, name="base")
    return folder


@pytest.fixture
def lora(tmp_path: Path, base: Path, registry: LocalRegistry) -> Path:
    """An adapter published as team/a, verified on `base`."""
    folder = write_lora(tmp_path / "lora", {Q: (6, 4)})
    registry.publish(folder, name="team/a", base="base")
    return folder


def test_the_very_base_is_exact(registry: LocalRegistry, lora: Path, tmp_path: Path) -> None:
    """In both directions, and compose goes on without a warning."""
    assert registry.check("team/a", "base").level is Level.EXACT
    assert [(item.adapter.name, item.verdict.level) for item in registry.compatible("base").items] == [
        ("team/a", Level.EXACT)
    ]
    assert [(item.base.name, item.verdict.level) for item in registry.bases_for("team/a").items] == [
        ("base", Level.EXACT)
    ]
    assert registry.compose(parse_recipe("base+team/a"), tmp_path / "out").warnings == ()


def test_a_cast_base_has_the_same_values_and_composes_with_a_warning(
    registry: LocalRegistry, lora: Path, tmp_path: Path
) -> None:
    """fp16 stored as fp32: accepted, and the record says so."""
    registry.add_base(write_base(tmp_path / "cast", weights(dtype=np.float32)), name="cast")
    assert registry.check("team/a", "cast").level is Level.SAME_VALUES
    composed = registry.compose(parse_recipe("cast+team/a"), tmp_path / "out")
    assert "same-values" in composed.warnings[0]
    assert composed.record["adapters"][0]["verdict"]["level"] == "same-values"


def test_a_declared_relative_needs_a_flag(registry: LocalRegistry, lora: Path, tmp_path: Path) -> None:
    """A finetune of the base is lineage, in both directions of the edge; --allow lineage composes it."""
    tuned = write_base(tmp_path / "tuned", weights(seed=1))
    registry.add_base(tuned, name="tuned", parent="base", relation=Relation.FINETUNE)
    verdict = registry.check("team/a", "tuned")
    assert verdict.level is Level.LINEAGE
    assert "tuned is declared as finetune from base" in verdict.reasons[0].message
    assert "differ in 2 tensors" in verdict.reasons[1].message
    with pytest.raises(WeakCompatibilityError, match="lineage") as caught:
        registry.compose(parse_recipe("tuned+team/a"), tmp_path / "out")
    assert "--allow lineage" in caught.value.remedy
    assert not (tmp_path / "out").exists()
    composed = registry.compose(parse_recipe("tuned+team/a", allow=Allow.LINEAGE), tmp_path / "out")
    assert composed.record["recipe"]["allow"] == "lineage"
    registry.publish(lora, name="team/b", base="tuned")
    assert registry.check("team/b", "base").level is Level.LINEAGE


def test_other_weights_of_the_same_shapes_are_shape_only(registry: LocalRegistry, lora: Path, tmp_path: Path) -> None:
    """What loads without a word elsewhere is refused here, and lineage is not enough to allow it."""
    registry.add_base(write_base(tmp_path / "other", weights(seed=2)), name="other")
    verdict = registry.check("team/a", "other")
    assert (verdict.level, verdict.reasons[0].code) == (Level.SHAPE, "different-base")
    assert [item.base.name for item in registry.bases_for("team/a", level=Level.SAME_VALUES).items] == ["base"]
    assert [item.base.name for item in registry.bases_for("team/a").items] == ["base", "other"]
    for allow in (Allow.SAME_VALUES, Allow.LINEAGE):
        with pytest.raises(WeakCompatibilityError, match="shape"):
            registry.compose(parse_recipe("other+team/a", allow=allow), tmp_path / "out")
    composed = registry.compose(parse_recipe("other+team/a", allow=Allow.SHAPE), tmp_path / "out")
    assert composed.record["adapters"][0]["verdict"]["level"] == "shape"
    assert composed.warnings


def test_other_shapes_are_incompatible_whatever_is_allowed(registry: LocalRegistry, lora: Path, tmp_path: Path) -> None:
    """The keys are listed, with both shapes."""
    small = {name: array[:4] for name, array in weights().items()}
    registry.add_base(write_base(tmp_path / "small", small), name="small")
    verdict = registry.check("team/a", "small")
    assert verdict.level is Level.INCOMPATIBLE
    assert "the adapter expects [6, 4], the base has [4, 4]" in verdict.reasons[0].message
    assert [item.adapter.name for item in registry.compatible("small").items] == []
    with pytest.raises(TargetMismatchError) as caught:
        registry.compose(parse_recipe("small+team/a", allow=Allow.SHAPE), tmp_path / "out")
    assert caught.value.fields["keys"] == [f"{Q}.weight"]


def test_sizes_that_an_adapter_bounds_are_part_of_the_verdict(
    registry: LocalRegistry, base: Path, tmp_path: Path
) -> None:
    """A VeRA knows no width, but that of its projections: a wider base does not fit, in both directions and in a plan."""
    random = np.random.default_rng(0)
    parts = {
        "base_model.vera_A": (2, 4),
        "base_model.vera_B": (6, 2),
        f"base_model.model.{Q}.vera_lambda_b": (6,),
        f"base_model.model.{Q}.vera_lambda_d": (2,),
    }
    folder = tmp_path / "vera"
    write_tensors(
        folder / "adapter_model.safetensors",
        {name: random.normal(size=shape).astype(np.float32) for name, shape in parts.items()},
    )
    (folder / "adapter_config.json").write_text('{"peft_type": "VERA", "r": 2}')
    registry.publish(folder, name="team/vera")
    registry.add_base(
        write_base(tmp_path / "wide", {**weights(), f"{Q}.weight": np.ones((6, 5), np.float16)}), name="wide"
    )
    levels = {item.base.name: item.verdict.level for item in registry.bases_for("team/vera").items}
    assert levels.get("wide", Level.INCOMPATIBLE) is Level.INCOMPATIBLE
    assert levels["base"] is Level.SHAPE
    verdict = registry.check("team/vera", "wide")
    assert verdict.level is Level.INCOMPATIBLE
    assert "with columns <= 4, the base has [6, 5]" in verdict.reasons[0].message


def test_only_the_touched_modules_count(registry: LocalRegistry, lora: Path, tmp_path: Path) -> None:
    """A base whose other module has another size still takes the adapter by shape."""
    grown = weights() | {f"{MLP}.weight": np.zeros((9, 4), np.float16)}
    registry.add_base(write_base(tmp_path / "grown", grown), name="grown")
    assert registry.check("team/a", "grown").level is Level.SHAPE


def test_a_name_alone_proves_nothing(registry: LocalRegistry, base: Path, tmp_path: Path) -> None:
    """Even where the name is that of a registered base: unverified, at most shape, and the remedy is said."""
    folder = write_lora(tmp_path / "named", {Q: (6, 4)}, base_model_name_or_path="base")
    published = registry.publish(folder, name="team/named")
    assert published.version.base_status is BaseStatus.UNVERIFIED
    assert "unverified" in published.warnings[0]
    verdict = registry.check("team/named", "base")
    assert (verdict.level, verdict.reasons[0].code) == (Level.SHAPE, "base-unverified")
    assert "--base base" in verdict.reasons[0].remedy


def test_an_adapter_becomes_verified_when_its_base_arrives(registry: LocalRegistry, tmp_path: Path) -> None:
    """Published with the hash in its card before the base is known; the version itself does not change."""
    folder = write_base(tmp_path / "late", weights(seed=3))
    from registry.claims import fingerprint_folder

    lora = write_lora(tmp_path / "lora", {Q: (6, 4)})
    card = f"---\nbase_model_fingerprint: {fingerprint_folder(folder).identity}\n---\n# a\n\nEarly.\n"
    (lora / "README.md").write_text(card)
    before = registry.publish(lora, name="team/early").version
    assert before.base_status is BaseStatus.PENDING
    registry.add_base(folder, name="late")
    after = registry.get_version("team/early")
    assert (after.base_status, after.base) == (BaseStatus.VERIFIED, "late")
    assert (after.digest, after.version) == (before.digest, before.version)
    assert registry.check("team/early", "late").level is Level.EXACT


def test_the_trainers_folder_is_hashed_where_it_is_here(registry: LocalRegistry, base: Path, tmp_path: Path) -> None:
    """An absolute path in adapter_config.json that is a checkpoint of this machine ties the adapter to its bytes."""
    lora = write_lora(tmp_path / "lora", {Q: (6, 4)}, base_model_name_or_path=str(base))
    assert registry.publish(lora, name="team/p").version.base_status is BaseStatus.VERIFIED
    unread = registry.publish(lora, name="team/q", read_paths=False).version
    assert unread.base_status is BaseStatus.UNVERIFIED


def test_folders_are_as_good_as_names(registry: LocalRegistry, base: Path, lora: Path, tmp_path: Path) -> None:
    """The same output weights, whether base and adapter are named or given as folders."""
    registry.compose(parse_recipe("base+team/a:0.5"), tmp_path / "named")
    registry.compose(parse_recipe(f"{base}+{lora}:0.5"), tmp_path / "folders")
    named, folders = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("named", "folders"))
    assert named == folders


def test_a_changed_base_is_refused_and_a_touched_one_is_not(
    registry: LocalRegistry, base: Path, lora: Path, tmp_path: Path
) -> None:
    """A new time alone is looked into; new bytes are an integrity error that names both digests."""
    weights_file = base / "model.safetensors"
    os.utime(weights_file, (1, 1))
    assert registry.check("team/a", "base").level is Level.EXACT
    tensors = load_file(weights_file)
    save_file(tensors | {f"{Q}.weight": tensors[f"{Q}.weight"] + 1}, weights_file)
    with pytest.raises(BaseChangedError) as caught:
        registry.compose(parse_recipe("base+team/a"), tmp_path / "out")
    assert caught.value.expected != caught.value.found
    weights_file.unlink()
    with pytest.raises(BaseChangedError):
        registry.plan(parse_recipe("base+team/a"))


def test_the_same_composition_is_found_again(registry: LocalRegistry, lora: Path, tmp_path: Path) -> None:
    """A second run says cached; a damaged output or another recipe is not taken for it."""
    recipe = parse_recipe("base+team/a")
    first = registry.compose(recipe, tmp_path / "out")
    again = registry.compose(recipe, tmp_path / "out")
    assert (first.cached, again.cached) == (False, True)
    assert first.output_digest == again.output_digest
    other = registry.compose(recipe, tmp_path / "other")
    assert other.record == first.record
    (tmp_path / "out" / "model.safetensors").write_bytes(b"short")
    assert registry.compose(recipe, tmp_path / "out", replace=True).cached is False
    assert registry.compose(recipe, tmp_path / "out").output_digest == first.output_digest


def test_a_plan_says_what_compose_would_do(registry: LocalRegistry, lora: Path, tmp_path: Path) -> None:
    """Sizes to the byte, the verdict, and whether it would be accepted; nothing is written."""
    plan = registry.plan(parse_recipe("base+team/a:0.5"))
    out = registry.compose(parse_recipe("base+team/a:0.5"), tmp_path / "out")
    assert plan.accepted
    assert (plan.touched, plan.total) == (1, 2)
    assert plan.files["model.safetensors"] == out.record["outputs"]["model.safetensors"]["size"]
    registry.add_base(write_base(tmp_path / "x", weights(seed=9)), name="x")
    assert registry.plan(parse_recipe("x+team/a")).accepted is False


def test_inspect_tells_an_altered_output(registry: LocalRegistry, lora: Path, tmp_path: Path) -> None:
    """One flipped byte in a composed model is named."""
    registry.compose(parse_recipe("base+team/a"), tmp_path / "out")
    assert registry.inspect(str(tmp_path / "out"))["intact"] is True
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert registry.inspect(str(tmp_path / "out"))["changed"] == ["model.safetensors"]


def test_a_tokenizer_is_no_part_of_the_weights(registry: LocalRegistry, base: Path, lora: Path, tmp_path: Path) -> None:
    """Other companions, the same fingerprint: still exact, and the digest apart tells them."""
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    edit_json(copy / "config.json", transformers_version="1")
    verdict = registry.check("team/a", str(copy))
    assert verdict.level is Level.EXACT
