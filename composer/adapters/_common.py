"""What the kinds other than LoRA share: names of modules out of tensor names, and checks of headers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from composer.errors import CorruptFileError
from composer.tensors import FLOAT_DTYPES, SafetensorsHeader, TensorSpec

__all__ = ["PREFIX", "check_floats", "damaged", "factors_by_module", "module_names", "whole_tensors"]

PREFIX = "base_model.model."
WRAPPED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer|original_module)(?=\.)")


def factors_by_module(
    header: SafetensorsHeader | Mapping[str, TensorSpec], suffixes: Sequence[str]
) -> dict[str, dict[str, TensorSpec]]:
    """The tensors named <module>.<suffix>, by module and suffix; a trailing `.default` (a raw state dict) is dropped.

    A suffix may hold a dot (oft_R.weight). Raises CorruptFileError when there are none.
    """
    tensors = header if isinstance(header, Mapping) else header.tensors
    found: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in sorted(tensors.items()):
        short = name.removeprefix(PREFIX).removesuffix(".default")
        for suffix in suffixes:
            if (module := short.removesuffix(f".{suffix}")) != short:
                found.setdefault(module, {})[suffix] = spec
    if not found:
        raise damaged("the adapter holds none of its kind's tensors", list(suffixes), list(tensors)[:5])
    return found


def whole_tensors(header: SafetensorsHeader, factors: dict[str, dict[str, TensorSpec]]) -> dict[str, TensorSpec]:
    """The other tensors of the file, by base parameter: a module of modules_to_save, or a trained bias."""
    used = {spec.name for parts in factors.values() for spec in parts.values()}
    return {
        WRAPPED.sub("", name.removeprefix(PREFIX)): spec
        for name, spec in sorted(header.tensors.items())
        if name not in used
    }


def module_names(factors: dict[str, dict[str, TensorSpec]]) -> tuple[str, ...]:
    """The last parts of the module names, sorted: what target_modules says."""
    return tuple(sorted({module.rpartition(".")[2] for module in factors}))


def check_floats(header: SafetensorsHeader, integers: Collection[str] = ()) -> None:
    """Raise CorruptFileError when a tensor other than `integers` does not hold floating-point numbers."""
    for spec in header.tensors.values():
        if spec.name not in integers and spec.dtype not in FLOAT_DTYPES:
            raise damaged(f"{spec.name} is {spec.dtype}", sorted(FLOAT_DTYPES), spec.dtype)


def damaged(message: str, expected: object, found: object) -> CorruptFileError:
    """The error for a file whose tensors do not make up an adapter of its kind."""
    return CorruptFileError(
        message, expected=expected, found=found, remedy="the file is damaged: save the adapter again with PEFT"
    )
