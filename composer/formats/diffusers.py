"""LoRA as diffusers saves it for a text encoder (diffusers/loaders/lora_base.py, utils/state_dict_utils.py).

one .safetensors file, no config; its metadata may hold lora_adapter_metadata, PEFT's config with prefixed keys
text_encoder.<module>.lora_A.weight [r, in]                       text_encoder.<module>.lora_B.weight [out, r]
text_encoder.<module>.lora_linear_layer.down.weight, .lora.down.weight    the same as older versions name them
text_encoder.<module>.lora_magnitude_vector [out], .lora_B.bias [out]     DoRA and lora_bias

Without metadata alpha is the rank, so the scale is 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from composer.files import FileSet
from composer.formats import View, adapter_format, damaged, refuse, renamed, view_header, weight_files
from composer.tensors import SafetensorsHeader, TensorSpec, read_adapter_header

__all__ = ["Diffusers"]

PREFIX = "base_model.model."
NAME = re.compile(r"(?P<component>text_encoder(?:_\d)?|unet|transformer)\.(?P<rest>.+\.lora[_.].+)")
PART = re.compile(r"(?P<module>.+)\.(?P<part>lora[_.].+)")
PARTS = {
    "lora_A.weight": "lora_A.weight",
    "lora_B.weight": "lora_B.weight",
    "lora_linear_layer.down.weight": "lora_A.weight",
    "lora_linear_layer.up.weight": "lora_B.weight",
    "lora.down.weight": "lora_A.weight",
    "lora.up.weight": "lora_B.weight",
    "lora_B.bias": "lora_B.bias",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
}
METADATA = "lora_adapter_metadata"


@adapter_format
class Diffusers:
    """One file of PEFT's factors under the name of a pipeline's component."""

    name = "diffusers"
    layout = "one .safetensors file with tensors text_encoder.….lora_A.weight, no adapter_config.json"

    def recognises(self, files: FileSet, config: Mapping[str, Any] | None) -> bool:
        """By the names in the only safetensors file of a folder without configs."""
        weights = weight_files(files)
        if config is not None or "config.json" in files or len(weights) != 1:
            return False
        return any(NAME.fullmatch(name) for name in read_adapter_header(files[weights[0]]).tensors)

    def read(self, files: FileSet, config: Mapping[str, Any] | None) -> View:
        """PEFT's config from the metadata, or the one that diffusers infers from the shapes.

        Raises UnsupportedAdapterError for image models, several text encoders, unknown tensors, and ranks that differ
        without metadata; CorruptFileError for tensors or metadata that are not this format's.
        """
        name = weight_files(files)[0]
        header = read_adapter_header(files[name])
        component = _component(header)
        view = view_header(header, [_spec(spec, component) for spec in header.tensors.values()])
        peft = _stated(header, component) or _inferred(view)
        return View({**peft, "peft_type": "LORA"}, view, (name,))


def _component(header: SafetensorsHeader) -> str:
    """The one component of the pipeline that the file changes: a text encoder."""
    found = set()
    for name in header.tensors:
        match = NAME.fullmatch(name)
        if match is None:
            raise damaged(f"{name} is not a part of a LoRA", "text_encoder.<module>.lora_A.weight", name)
        found.add(match["component"])
    if len(found) > 1 or not next(iter(found)).startswith("text_encoder"):
        raise refuse(
            f"the adapter changes {', '.join(sorted(found))}",
            "tensors of one text encoder",
            sorted(found),
            "keep only the tensors of one text encoder (text_encoder.…) in the file",
        )
    return found.pop()


def _spec(spec: TensorSpec, component: str) -> TensorSpec:
    match = PART.fullmatch(spec.name.removeprefix(f"{component}."))
    if match is None or match["part"] not in PARTS:
        raise refuse(
            f"{spec.name} is not supported yet",
            sorted(PARTS),
            spec.name,
            "save the pipeline's LoRA again with a current version of diffusers",
        )
    return renamed(spec, f"{PREFIX}{match['module']}.{PARTS[match['part']]}")


def _stated(header: SafetensorsHeader, component: str) -> dict[str, Any] | None:
    """The component's part of the metadata; None where the file has none."""
    if METADATA not in header.metadata:
        return None
    try:
        fields = json.loads(header.metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise damaged(f"{METADATA} is not JSON: {error}", "a JSON object", header.metadata[METADATA][:80]) from None
    if not isinstance(fields, dict):
        raise damaged(f"{METADATA} is not an object", "PEFT's config with prefixed keys", fields)
    own = {key.removeprefix(f"{component}."): value for key, value in fields.items() if key.startswith(f"{component}.")}
    if own.get("peft_type", "LORA") != "LORA":
        raise refuse(f"{METADATA} says {own['peft_type']!r}", "a LoRA", own["peft_type"], "train a LoRA")
    if not own:
        raise damaged(f"{METADATA} says nothing of {component}", f"{component}.r and others", sorted(fields)[:8])
    return own


def _inferred(view: SafetensorsHeader) -> dict[str, Any]:
    """What diffusers assumes without metadata: alpha is the rank.

    Where ranks differ it takes the alpha of all from the module it meets first, so that is refused.
    """
    ranks = {
        spec.shape[0] for name, spec in view.tensors.items() if name.endswith(".lora_A.weight") and len(spec.shape) > 1
    }
    if len(ranks) != 1:
        raise refuse(
            f"the modules have the ranks {sorted(ranks)}, and without {METADATA} the scale of each is not certain",
            f"one rank, or {METADATA}",
            sorted(ranks),
            "save the adapter with a version of diffusers that writes its metadata",
        )
    rank = ranks.pop()
    return {
        "r": rank,
        "lora_alpha": rank,
        "use_dora": any(name.endswith(".lora_magnitude_vector") for name in view.tensors),
        "lora_bias": any(name.endswith(".lora_B.bias") for name in view.tensors),
    }
