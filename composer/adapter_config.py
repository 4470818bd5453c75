"""adapter_config.json by schema: the fields that all kinds of PEFT share have the types that PEFT gives them.

Fields of one kind alone (ranks, scales, switches) are checked by the file that reads that kind, which knows their
limits; fields that nobody reads are left as they are. What is checked here is what several places rely on.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from composer.errors import CorruptFileError

__all__ = ["check_config"]

MAX_NAMES = 200_000
Name = Annotated[str, Field(max_length=1024)]
Names = Annotated[list[Name], Field(max_length=MAX_NAMES)]
Pattern = Annotated[str, Field(max_length=100_000)]
Natural = Annotated[int, Field(ge=0, lt=2**31)]


class AdapterConfig(BaseModel):
    """The shared fields; null and absent are the same."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    base_model_name_or_path: Annotated[str, Field(max_length=4096)] | None = None
    revision: Name | None = None
    task_type: Name | None = None
    inference_mode: bool | None = None
    fan_in_fan_out: bool | None = None
    bias: Name | bool | None = None
    target_modules: Names | Pattern | None = None
    exclude_modules: Names | Pattern | None = None
    modules_to_save: Names | None = None
    target_parameters: Names | None = None
    layers_to_transform: Annotated[list[Natural], Field(max_length=MAX_NAMES)] | Natural | None = None
    layers_pattern: Names | Pattern | None = None
    rank_pattern: Annotated[dict[Pattern, Any], Field(max_length=MAX_NAMES)] | None = None
    alpha_pattern: Annotated[dict[Pattern, Any], Field(max_length=MAX_NAMES)] | None = None
    auto_mapping: dict[Name, Name | None] | None = None


def check_config(config: dict[str, Any]) -> None:
    """Raise CorruptFileError for a shared field of another type, and for numbers that are none (NaN, Infinity)."""
    try:
        AdapterConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = str(first["loc"][0])
        raise CorruptFileError(
            f"adapter_config.json: {field}: {first['msg']}",
            expected=first["msg"],
            found=json.dumps(config.get(field), default=str)[:200],
            remedy="correct the field, or save the adapter again with the tool that trained it",
            field=field,
        ) from None
    for field, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise CorruptFileError(
                f"adapter_config.json: {field} is {value}",
                expected="a finite number",
                found=str(value),
                remedy="correct the field",
                field=field,
            )
