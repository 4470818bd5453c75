"""Requests, and the few answers, that registry.schemas has no noun for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from composer.probe import MAX_PROBE
from composer.recipe import (
    Allow,
    BasePrecision,
    Compute,
    Dtype,
    Export,
    Flavour,
    OnnxQuantise,
    Placement,
    Recipe,
    Value,
    parse_recipe,
)
from registry.access import Role, Scope
from registry.api.rules import refuse_paths
from registry.interface import DEFAULT_DAYS, GRACE_DAYS, KEEP_JOBS_DAYS
from registry.schemas import DoctorCheck

__all__ = [
    "AliasRequest",
    "CollectRequest",
    "ComposeRequest",
    "DeltaRequest",
    "DeprecationRequest",
    "DoctorReport",
    "ExtractRequest",
    "Health",
    "ImportRequest",
    "MemberRequest",
    "ProbedRecipe",
    "PublicationRequest",
    "ReasonRequest",
    "RecipeRequest",
    "ResizeRequest",
    "RestoreRequest",
    "SignatureRequest",
    "TokenRequest",
    "VisibilityRequest",
    "Whoami",
    "form_body",
    "to_recipe",
]


Probe = Annotated[
    str | None,
    Field(max_length=MAX_PROBE, description="a text: its perplexity before and after goes into the record"),
]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AliasRequest(_Request):
    """The version that an alias is to name."""

    version: str = Field(min_length=1, description="a semantic version, another alias or sha256:…")


class VisibilityRequest(_Request):
    """Who sees an adapter."""

    private: bool


class ReasonRequest(_Request):
    """Why a version is withdrawn or blocked."""

    reason: str = Field(min_length=1, max_length=2000, examples=["trained on the wrong data"])


class SignatureRequest(_Request):
    """A signature: what model.sig holds."""

    bundle: dict[str, Any] = Field(description="of model-signing 1.x, signed with a key")


class DeprecationRequest(ReasonRequest):
    """Why a version should no longer be used, and what to use in its place."""

    successor: str | None = Field(default=None, examples=["team/shout@2.0.0"])


class CollectRequest(_Request):
    """What to keep, in days."""

    grace_days: float = Field(default=GRACE_DAYS, ge=0, le=36500, description="since a file was last touched")
    keep_jobs_days: float = Field(default=KEEP_JOBS_DAYS, ge=0, le=36500, description="since a job ended")
    keep_records_days: float | None = Field(default=None, ge=0, le=36500, description="of compositions; null: for ever")
    dry_run: bool = False


class MemberRequest(_Request):
    """What a subject is to be in a namespace."""

    role: Role


class TokenRequest(_Request):
    """A token that is to be made."""

    name: str = Field(min_length=1, max_length=100, examples=["ci of team"])
    subject: str = Field(min_length=1, max_length=200, examples=["alice"], description="whom it stands for")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    namespaces: tuple[str, ...] | None = Field(default=None, description="the only ones it is good for; null: no limit")
    days: int = Field(default=DEFAULT_DAYS, ge=1, le=3650)


class Whoami(BaseModel):
    """Who asks, as the service sees it."""

    subject: str
    scopes: tuple[Scope, ...]
    namespaces: tuple[str, ...] | None
    token: str | None


class RecipeRequest(_Request):
    """A recipe in its text form, with what the text leaves open."""

    recipe: str = Field(min_length=1, examples=["smollm2+team/shout@1.0.0:0.7+team/json"])
    method: str = "linear"
    parameters: dict[str, Value] = Field(default_factory=dict, description="of the method, by name")
    dtype: Dtype = Dtype.KEEP
    export: Export = Export.SAFETENSORS
    placement: Placement = Field(default=Placement.MERGED, description="of the adapters, with export onnx")
    rank: int | None = Field(default=None, ge=1, le=1 << 16, description="of a LoRA (export peft); empty: exact")
    flavour: Flavour = Field(default=Flavour.PORTABLE, description="of an ONNX graph")
    compute: Compute = Field(default=Compute.FP32, description="what an ONNX graph computes in")
    onnx_quantise: OnnxQuantise | None = Field(default=None, description="what the matrices of an ONNX graph become")
    min_agreement: float = Field(default=0.5, ge=0, le=1, description="how often it must choose torch's token then")
    allow: Allow = Allow.SAME_VALUES
    untie: bool = Field(default=False, description="write both ends of a tied pair where one of them changes")
    base_precision: BasePrecision = BasePrecision.QUANTISED
    original: str | None = Field(default=None, min_length=1, description="the base that a quantised one was made of")
    requantise: bool = Field(default=False, description="write the result quantised as the base is")
    min_survival: float = Field(default=0.1, ge=0, le=1, description="what requantising must leave of each adapter")


class ComposeRequest(RecipeRequest):
    """What to compose, and a text to measure it on."""

    probe: Probe = None


class ProbedRecipe(_Request):
    """A whole recipe, and a text to measure its result on."""

    recipe: Recipe
    probe: Probe = None


class PublicationRequest(_Request):
    """What a composition is to be called."""

    name: str = Field(min_length=1, max_length=200, description="of the base, or of the adapter (export peft)")


class ImportRequest(_Request):
    """An adapter or a base of the hub that the service knows (its HF_ENDPOINT)."""

    ref: str = Field(min_length=6, max_length=500, description="hf://ORG/NAME[@REVISION]")
    name: str | None = Field(default=None, min_length=1, max_length=200, description="here; default: as there")
    version: str | None = Field(default=None, min_length=1, description="of an adapter; default: the next one")
    base: str | None = Field(default=None, min_length=1, description="of an adapter: the base it was trained on")
    max_bytes: int | None = Field(default=None, ge=1, le=1 << 50, description="of all files")
    allow_private: bool = Field(default=False, description="the hub may be at a private address")


class SizedRequest(_Request):
    """How large a LoRA is to be: one of the two."""

    rank: int | None = Field(default=None, ge=1, le=1 << 16, description="of every module")
    energy: float | None = Field(default=None, gt=0, le=1, description="the share to keep")


class ExtractRequest(SizedRequest):
    """A LoRA of what one registered base changed in another."""

    finetune: str = Field(min_length=1)
    base: str = Field(min_length=1)
    ignore_rest: bool = Field(default=False, description="leave out what changed and is no linear weight")


class ResizeRequest(SizedRequest):
    """A registered LoRA at another rank."""

    ref: str = Field(min_length=1, description="name[@version]")


class DeltaRequest(_Request):
    """One registered base as its difference from another."""

    finetune: str = Field(min_length=1)
    base: str = Field(min_length=1)


class RestoreRequest(_Request):
    """The checkpoint that a published difference was made of."""

    ref: str = Field(min_length=1, description="name[@version]")
    base: str = Field(min_length=1)


class DoctorReport(BaseModel):
    """All checks of the service."""

    ok: bool
    checks: tuple[DoctorCheck, ...]


class Health(BaseModel):
    """Whether the service answers."""

    status: str = "ok"
    version: str


def to_recipe(body: RecipeRequest | ProbedRecipe | Recipe) -> Recipe:
    """The recipe that a request holds, in either form. Raises RecipeError, or PolicyError for local paths."""
    if isinstance(body, ProbedRecipe):
        body = body.recipe
    if isinstance(body, RecipeRequest):
        body = parse_recipe(body.recipe, **body.model_dump(exclude={"recipe", "probe"}))
    return refuse_paths(body)


def form_body(required: tuple[str, ...], **fields: str) -> dict[str, Any]:
    """The OpenAPI of a multipart upload with text fields; a description that begins with '[]' is of a repeated one."""
    properties: dict[str, Any] = {}
    for name, description in fields.items():
        text: dict[str, Any] = {"type": "string"}
        repeated = description.startswith("[]")
        kind = {"type": "array", "items": text} if repeated else text
        properties[name] = {**kind, "description": description.removeprefix("[]")}
    properties["files"] = {
        "type": "array",
        "items": {"type": "string", "contentMediaType": "application/octet-stream"},
        "description": "each with its filename, relative to the folder",
    }
    schema = {"type": "object", "required": [*required, "files"], "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
