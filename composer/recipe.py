"""What the user asked for, before anything is looked up.

smollm2+team/shout@1.0.0:0.7+./my-adapter+team/multitask#2
|       |          |     |   |                           |
base    adapter    |     |   a folder is as good as      task, of an adapter that was trained on several
                   |     |   a name
                   |     weight (default 1)
                   version, alias or sha256:… (default latest)

or a file, which can say more (`load_recipe`):

    base: smollm2
    adapters:
      - {ref: team/shout, version: 1.0.0, weight: 0.7, modules: {"*.layers.0.*": 0, "*.v_proj.weight": 0.3}}
      - {ref: ./my-adapter}
    method: ties
    parameters: {density: 0.2}
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from composer.errors import RecipeError

__all__ = [
    "AdapterTerm",
    "Allow",
    "BasePrecision",
    "Compute",
    "Dtype",
    "Export",
    "Flavour",
    "ModuleWeight",
    "OnnxQuantise",
    "Placement",
    "Recipe",
    "Value",
    "is_path",
    "load_recipe",
    "parse_recipe",
    "split_reference",
]

Value: TypeAlias = int | float | str

TERM = re.compile(
    r"(?P<ref>[^@]+?)(?:@(?P<version>sha256:[0-9a-f]{6,64}|[^@:#]+))?(?:#(?P<task>\d{1,6}))?(?::(?P<weight>[^:/]*))?"
)
SYNTAX = "BASE+ADAPTER[@VERSION][#TASK][:WEIGHT][+ADAPTER…], for example smollm2+team/shout@1.0.0:0.7+team/json"


class Dtype(StrEnum):
    """The number format of the composed weights; `keep` is the base's own."""

    KEEP = "keep"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Export(StrEnum):
    """The artefact to write."""

    SAFETENSORS = "safetensors"
    ONNX = "onnx"
    BUNDLE = "bundle"
    PEFT = "peft"


class Placement(StrEnum):
    """Where adapters go: into the weights, into files that a session activates, or into one graph, row by row."""

    MERGED = "merged"
    SEPARATE = "separate"
    MULTI = "multi"


class Flavour(StrEnum):
    """The operators of an ONNX graph: standard ones, or those that onnxruntime-genai reads."""

    PORTABLE = "portable"
    GENAI = "genai"


class Compute(StrEnum):
    """What an ONNX graph computes in, whatever its weights are stored in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class OnnxQuantise(StrEnum):
    """What the matrices of an ONNX graph become."""

    INT8 = "int8"
    INT4 = "int4"


class Allow(StrEnum):
    """The weakest compatibility that compose accepts; `same-values` is accepted with a warning by default."""

    SAME_VALUES = "same-values"
    LINEAGE = "lineage"
    SHAPE = "shape"


class BasePrecision(StrEnum):
    """What an adapter is merged into where the base is quantised: what it decodes to, or the weights it was made of."""

    QUANTISED = "quantised"
    ORIGINAL = "original"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModuleWeight(_Model):
    """The weight of the tensors whose names fit a glob (``*``, ``?``, ``[…]``; case counts)."""

    pattern: str = Field(min_length=1)
    weight: float = Field(allow_inf_nan=False)

    def fits(self, tensor: str) -> bool:
        """Whether the base tensor's name fits."""
        return fnmatchcase(tensor, self.pattern)


class AdapterTerm(_Model):
    """One adapter of a recipe: a name or a folder, a version, a task, a weight, and weights of single modules.

    `task` is for an adapter that was trained on several. `modules` may be given as a mapping of globs to weights; the
    first that fits a tensor's name takes the place of `weight` there.
    """

    ref: str = Field(min_length=1)
    version: str | None = None
    task: int | None = Field(default=None, ge=0)
    weight: float = 1.0
    modules: tuple[ModuleWeight, ...] = ()

    @field_validator("modules", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        # A list, because the order decides and the canonical JSON sorts the keys of objects.
        return (
            [{"pattern": key, "weight": each} for key, each in value.items()] if isinstance(value, Mapping) else value
        )

    @field_validator("weight")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError(f"a weight must be finite, found {value}")
        return value

    def __str__(self) -> str:
        version = f"@{self.version}" if self.version else ""
        weight = f":{self.weight:g}" if self.weight != 1.0 else ""
        task = "" if self.task is None else f"#{self.task}"
        return f"{self.ref}{version}{task}{weight}"


class Recipe(_Model):
    """A base, adapters with weights, how they are combined and what is written. Immutable; its digest names it."""

    schema_version: int = Field(default=1, ge=1, le=1)
    base: str = Field(min_length=1)
    adapters: tuple[AdapterTerm, ...] = ()
    method: str = "linear"
    parameters: dict[str, Value] = Field(default_factory=dict)
    dtype: Dtype = Dtype.KEEP
    export: Export = Export.SAFETENSORS
    placement: Placement = Field(default=Placement.MERGED, description="of the adapters in an ONNX export")
    rank: int | None = Field(default=None, ge=1, le=1 << 16, description="of a LoRA that is written; None: exact")
    flavour: Flavour = Field(default=Flavour.PORTABLE, description="of an ONNX graph")
    compute: Compute = Field(default=Compute.FP32, description="what an ONNX graph computes in")
    onnx_quantise: OnnxQuantise | None = Field(default=None, description="what the matrices of an ONNX graph become")
    min_agreement: float = Field(
        default=0.5, ge=0, le=1, description="the share of tokens that an ONNX graph which rounds must choose as torch"
    )
    allow: Allow = Allow.SAME_VALUES
    untie: bool = Field(default=False, description="write both ends of a tied pair where one of them changes")
    base_precision: BasePrecision = BasePrecision.QUANTISED
    original: str | None = Field(
        default=None, min_length=1, description="the base that a quantised one was made of; None: its declared parent"
    )
    requantise: bool = Field(default=False, description="write the result quantised as the base is")
    min_survival: float = Field(
        default=0.1, ge=0, le=1, description="the share of each adapter that requantising must leave"
    )

    def __str__(self) -> str:
        return "+".join([self.base, *map(str, self.adapters)])

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of this recipe, as 64 hex digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def is_path(ref: str) -> bool:
    """Whether a reference is a folder rather than a catalogue name, of a base or of an adapter.

    It is when it begins with ``.``, ``/`` or ``~``, or has more slashes than the one of ``namespace/name``.
    """
    return ref.startswith((".", "/", "~")) or ref.count("/") > 1


def parse_recipe(text: str, **settings: Any) -> Recipe:
    """Parse ``base+adapter@version:weight+…``; `settings` are the other fields of Recipe.

    Raises RecipeError that points at the part which is wrong.
    """
    if text != (readable := text.encode("utf-8", "replace").decode()):
        raise _bad(readable, "text in UTF-8", readable)
    base, *terms = text.split("+")
    if not base.strip() or base != base.strip():
        raise _bad(text, "a base model first", base)
    if not is_path(base) and ("@" in base or ":" in base.removeprefix("wf1:")):
        raise _bad(text, "a base without version or weight", base)
    return Recipe(base=base, adapters=tuple(_term(text, term) for term in terms), **settings)


def load_recipe(path: Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML or JSON file, with some of its fields replaced by `changes`.

    Raises RecipeError when the file cannot be read or a field is unknown, missing or of another type.
    """
    from composer.safe_yaml import load_yaml

    try:
        fields = load_yaml(path.read_text(encoding="utf-8"))
        if isinstance(fields.get("adapters"), list):
            fields["adapters"] = [_file_term(term) for term in fields["adapters"]]
        return Recipe.model_validate({**fields, **(changes or {})})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        found = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        found = " ".join(str(error).split())
    raise RecipeError(
        f"cannot read the recipe in {path}: {found}",
        expected=sorted(Recipe.model_fields),
        found=found,
        remedy="write base, adapters (each with ref, task, weight, modules), method, parameters, dtype, export, untie",
    )


def _file_term(term: Any) -> Any:
    """An adapter of a recipe file may be written as on the command line, or name its version in `ref`."""
    if isinstance(term, str):
        return _term(term, term)
    if isinstance(term, dict) and isinstance(term.get("ref"), str) and "version" not in term:
        ref, version = split_reference(term["ref"])
        return {**term, "ref": ref, "version": version}
    return term


def split_reference(text: str) -> tuple[str, str | None]:
    """``team/shout@1.0.0`` to ("team/shout", "1.0.0"); a path has no version. Raises RecipeError."""
    term = _term(text, text)
    if term.task is not None or ":" in text.removeprefix(term.ref).removeprefix(f"@{term.version}"):
        raise RecipeError(f"{text!r} has a task or a weight where none belongs", expected="NAME[@VERSION]", found=text)
    return term.ref, term.version


def _term(text: str, term: str) -> AdapterTerm:
    match = TERM.fullmatch(term)
    if match is None or term != term.strip():
        raise _bad(text, "ADAPTER[@VERSION][#TASK][:WEIGHT] after each '+'", term)
    weight = 1.0
    if match["weight"] is not None:
        try:
            weight = float(match["weight"])
        except ValueError:
            raise _bad(text, "a number after ':'", match["weight"]) from None
        if not math.isfinite(weight):
            raise _bad(text, "a finite weight", match["weight"])
    if is_path(match["ref"]) and match["version"]:
        raise _bad(text, "a folder without '@VERSION'", term)
    task = None if match["task"] is None else int(match["task"])
    return AdapterTerm(ref=match["ref"], version=match["version"], task=task, weight=weight)


def _bad(text: str, expected: str, found: str) -> RecipeError:
    return RecipeError(
        f"cannot read the recipe {text!r}: expected {expected}, found {found!r}",
        expected=expected,
        found=found,
        remedy=f"write it as {SYNTAX}",
        recipe=text,
    )
