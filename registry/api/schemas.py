"""Requests, and the few answers, that registry.schemas has no noun for."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from composer.recipe import Allow, Dtype, Export, Recipe, Value, parse_recipe
from registry.api.rules import refuse_paths
from registry.schemas import DoctorCheck

__all__ = ["AliasRequest", "DoctorReport", "Health", "RecipeRequest", "form_body", "to_recipe"]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AliasRequest(_Request):
    """The version that an alias is to name."""

    version: str = Field(min_length=1, description="a semantic version, another alias or sha256:…")


class RecipeRequest(_Request):
    """A recipe in its text form, with what the text leaves open."""

    recipe: str = Field(min_length=1, examples=["smollm2+team/shout@1.0.0:0.7+team/json"])
    method: str = "linear"
    parameters: dict[str, Value] = Field(default_factory=dict, description="of the method, by name")
    dtype: Dtype = Dtype.KEEP
    export: Export = Export.SAFETENSORS
    rank: int | None = Field(default=None, ge=1, le=1 << 16, description="of a LoRA (export peft); empty: exact")
    allow: Allow = Allow.SAME_VALUES
    untie: bool = Field(default=False, description="write both ends of a tied pair where one of them changes")


class DoctorReport(BaseModel):
    """All checks of the service."""

    ok: bool
    checks: tuple[DoctorCheck, ...]


class Health(BaseModel):
    """Whether the service answers."""

    status: str = "ok"
    version: str


SETTINGS = ("method", "parameters", "dtype", "export", "rank", "allow", "untie")


def to_recipe(body: RecipeRequest | Recipe) -> Recipe:
    """The recipe that a request holds, in either form. Raises RecipeError, or PolicyError for local paths."""
    if isinstance(body, RecipeRequest):
        body = parse_recipe(body.recipe, **{name: getattr(body, name) for name in SETTINGS})
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
