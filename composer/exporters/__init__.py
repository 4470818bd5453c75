"""Targets: what a composed checkpoint is turned into, one file (or package) each.

safetensors   the checkpoint itself
onnx          the checkpoint and a graph whose weights lie in its safetensors files
bundle        the checkpoint, and its additions in files beside it
peft          a LoRA in place of the checkpoint
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from composer.additions import Prefix, SoftPrompt
from composer.apart import check_placement, keep_apart
from composer.checkpoint import Checkpoint
from composer.errors import RecipeError, UnsupportedAdapterError, UnsupportedArchitectureError
from composer.exporters.bundle import BundleExporter
from composer.exporters.companions import companion_files, write_companions
from composer.exporters.peft import PeftExporter
from composer.exporters.safetensors import SafetensorsExporter
from composer.exporters.vocabulary import GENERATES
from composer.kernels import Survival
from composer.plan import Plan
from composer.recipe import Compute, Export, Flavour, Placement, Recipe
from composer.sinks import FolderSink

if TYPE_CHECKING:
    from composer.exporters.onnx import Variant

__all__ = ["Exporter", "PlanExporter", "find_exporter", "find_plan_exporter", "prepare_export"]


class Exporter(Protocol):
    """Turns the checkpoint in a sink's folder into an artefact."""

    def prepare(self, plan: Plan) -> Plan:
        """The plan of the checkpoint that this target needs; most need the one that was made.

        Raises before anything is written when the base, or an addition of the plan, cannot be exported.
        """
        ...

    def plan_files(self, plan: Plan) -> dict[str, int]:
        """The large files that it adds to the checkpoint's, where their size is known beforehand, in bytes."""
        ...

    def export(
        self, plan: Plan, sink: FolderSink, cache_dir: Path | None, progress: Callable[[str], None]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Add files to the sink. Returns the facts for composition.json, and seconds by step."""
        ...


class PlanExporter(Protocol):
    """Writes files of its own in place of the merged weights."""

    def check_plan(self, plan: Plan) -> None:
        """Raise before anything is written when this plan cannot become the target."""
        ...

    def plan_files(self, plan: Plan) -> dict[str, int]:
        """The large files that it will write, and at most how many bytes each."""
        ...

    def export_plan(
        self, plan: Plan, sink: FolderSink, inputs: Mapping[str, Any], progress: Callable[[str, int, int], None]
    ) -> tuple[dict[str, Any], Survival]:
        """Write every file. Returns the facts for composition.json, and how much of each adapter is left."""
        ...


class OnnxExporter:
    """A graph beside the weights, verified in ONNX Runtime."""

    def prepare(self, plan: Plan) -> Plan:
        """Raise UnsupportedArchitectureError (a model that is not traced) or UnsupportedAdapterError (an addition)."""
        from composer.exporters.onnx import ARCHITECTURES

        self.check(plan.checkpoint)
        _check_variant(plan)
        architecture = plan.checkpoint.architecture
        if plan.recipe.placement is not Placement.MERGED:
            if ARCHITECTURES[architecture].is_seq2seq:
                raise UnsupportedArchitectureError(
                    f"onnx: {architecture}: adapters are kept apart in one graph, and an encoder-decoder has two",
                    expected="a model of one graph",
                    found=architecture,
                    remedy="merge the adapters",
                    architecture=architecture,
                )
            return keep_apart(plan)
        takes_prefix = architecture.endswith(GENERATES) or architecture.startswith(PREFIX_ENCODERS)
        for item in plan.additions:
            if item.addition.family == Prefix.family and not takes_prefix:
                raise UnsupportedAdapterError(
                    f"{plan.terms[item.term].label} cannot become part of the graph: it takes no keys and values",
                    expected=f"a prefix of a model that generates, or of {', '.join(PREFIX_ENCODERS)}",
                    found=architecture,
                    remedy="use the base that it was trained on",
                )
        return plan

    def plan_files(self, plan: Plan) -> dict[str, int]:
        """The additions, and adapters that are kept apart; the size of a graph is known once it is traced."""
        if plan.apart:
            from composer.exporters.onnx.apart import apart_files

            return apart_files(plan)
        return companion_files(plan)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UnsupportedArchitectureError for a model that cannot be traced."""
        from composer.exporters.onnx import supported

        supported(_exported_config(checkpoint))

    def export(
        self, plan: Plan, sink: FolderSink, cache_dir: Path | None, progress: Callable[[str], None]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Write the graph, or two, whose additions lie beside the weights, and compare with torch."""
        from composer.exporters.onnx import export_onnx
        from composer.exporters.onnx.apart import kept_apart

        added: dict[str, Any] = {"additions": write_companions(plan, sink)} if plan.additions else {}
        apart = kept_apart(plan, sink) if plan.apart else None
        result = export_onnx(
            sink.folder, cache_dir=cache_dir, progress=progress, variant=_variant(plan.recipe), apart=apart
        )
        if apart is not None:
            added |= {"placement": plan.recipe.placement.value, "adapters": apart.entries}
        for name in result.files:
            sink.adopt(name)
        facts = {name: value for name, value in asdict(result).items() if value is not None}
        seconds = facts.pop("seconds")
        facts.pop("graph_cached")
        return {"format": "onnx", **facts, **added}, seconds


def _exported_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of what is exported, which is not quantised any more."""
    config = dict(checkpoint.config)
    if checkpoint.scheme:
        del config["quantization_config"]
    return config


def _variant(recipe: Recipe) -> Variant:
    """What the recipe asks of an ONNX graph."""
    from composer.exporters.onnx import Variant

    quantise = None if recipe.onnx_quantise is None else recipe.onnx_quantise.value
    return Variant(recipe.flavour.value, COMPUTE_DTYPES[recipe.compute], quantise, recipe.min_agreement)


def _check_variant(plan: Plan) -> None:
    """Raise what check_variant raises, or UnsupportedAdapterError for virtual tokens in front of another runtime."""
    from composer.exporters.onnx.architectures import architecture_of
    from composer.exporters.onnx.variants import check_variant

    check_variant(architecture_of(_exported_config(plan.checkpoint)), _variant(plan.recipe))
    for item in plan.additions if plan.recipe.flavour is Flavour.GENAI else ():
        if item.addition.family in (Prefix.family, SoftPrompt.family):
            raise UnsupportedAdapterError(
                f"{plan.terms[item.term].label} cannot become part of a graph for onnxruntime-genai, which sizes the"
                " cache by the tokens that it gives",
                expected="adapters that change weights",
                found=item.addition.summary,
                remedy="export the portable flavour, or a soft prompt as words of the vocabulary: export safetensors",
            )


COMPUTE_DTYPES = {Compute.FP32: "float32", Compute.FP16: "float16", Compute.BF16: "bfloat16"}
PREFIX_ENCODERS = ("Bert", "Roberta", "XLMRoberta")  # transformers gives them past_key_values
PLAN_EXPORTERS: dict[str, PlanExporter] = {"peft": PeftExporter()}
EXPORTERS: dict[str, Exporter] = {
    "safetensors": SafetensorsExporter(),
    "onnx": OnnxExporter(),
    "bundle": BundleExporter(),
}


def find_exporter(name: str) -> Exporter:
    """The exporter of that name."""
    return EXPORTERS[name]


def find_plan_exporter(name: str) -> PlanExporter | None:
    """The exporter of that name, if it takes the place of the merge."""
    return PLAN_EXPORTERS.get(name)


def prepare_export(plan: Plan) -> Plan:
    """The plan of what is written for the export that its recipe names.

    Raises before anything is written when this plan cannot be exported so.
    """
    if plan.recipe.requantise:
        from composer.requantise import check_requantise  # built on composer.run, which is built on this package

        check_requantise(plan)
    if plan.recipe.placement is not Placement.MERGED:
        check_placement(plan.recipe)
    in_place = find_plan_exporter(plan.recipe.export)
    asked = plan.recipe.model_dump(include={"flavour", "compute", "onnx_quantise"}, exclude_defaults=True, mode="json")
    if asked and plan.recipe.placement is not Placement.MERGED:
        raise RecipeError(
            f"{', '.join(asked)} are not made of a graph that keeps its adapters apart",
            expected="one or the other",
            found={"placement": plan.recipe.placement.value, **asked},
            remedy="merge the adapters, or leave them out",
        )
    if asked and plan.recipe.export is not Export.ONNX:
        raise RecipeError(
            f"{', '.join(asked)} belong to an ONNX graph, not to the export {plan.recipe.export.value!r}",
            expected="export onnx",
            found={"export": plan.recipe.export.value, **asked},
            remedy="export onnx, or leave them out; the weights' own number format is dtype",
        )
    if plan.recipe.rank is not None and in_place is None:
        raise RecipeError(
            f"a rank belongs to a LoRA, not to the export {plan.recipe.export.value!r}",
            expected="export peft",
            found={"export": plan.recipe.export.value, "rank": plan.recipe.rank},
            remedy="leave the rank out, or export peft; merged weights of a low rank: --method svd -p rank=N",
        )
    if in_place is not None:
        in_place.check_plan(plan)
        return plan
    return find_exporter(plan.recipe.export).prepare(plan)
