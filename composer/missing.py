"""Modules that an adapter should hold and does not: a file cut off between two of them is valid, and merges by half.

PEFT adapts every module whose name target_modules lists, so a base shows what is missing, as far as the list is one of
names. Only modules like those in the file count: those of the layers that it changes, and any of a listed name that it
has nowhere. What a checkpoint stores besides the model that was trained does not count: layers for multi-token
prediction, a tower or a pooler that was left out, experts that the model holds as one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["missing_modules"]

LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def missing_modules(
    config: Mapping[str, Any],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    base_config: Mapping[str, Any],
) -> list[str]:
    """The modules that target_modules lists and the adapter lacks, by their names in the base, sorted.

    config: the adapter's, in PEFT's terms. names: adapter parameter to base tensor. shapes: of the base's tensors.
    Empty where the config has no list of names, or where the base's names differ from the adapter's by more than a
    prefix.
    """
    targets = _targets(config)
    text = base_config.get("text_config") or base_config
    if targets is None or not names or text.get("num_kv_shared_layers"):
        return []  # layers that share keys and values store projections that the model does not have
    prefix = _prefix(names)
    if prefix is None:
        return []
    present = {name.rpartition(".")[0] for name in names.values()}
    roles = {_pattern(module) for module in present}
    stacks = {role.partition("*")[0] for role in roles if "*" in role}
    found = {target for target in targets if any(_ends(module, target) for module in present)}
    layers = text.get("num_hidden_layers")
    missing = []
    for module in _modules(shapes):
        if module in present or not _wanted(config, prefix(module)):
            continue
        role, layer = _pattern(module), LAYER.match(f"{prefix(module)}.")
        if layer and type(layers) is int and int(layer["index"]) >= layers:
            continue
        beside = role.count("*") == 1 and (not stacks or role.partition("*")[0] in stacks)
        nowhere = "*" not in role and not any(_ends(module, target) for target in found)
        if role in roles or beside or nowhere:
            missing.append(module)
    return sorted(missing)


def _targets(config: Mapping[str, Any]) -> list[Any] | None:
    """What target_modules lists, and the modules of the weights in target_parameters; None where it is no list."""
    targets, parameters = config.get("target_modules"), config.get("target_parameters") or []
    if not isinstance(targets, list):
        return None
    weights = [name for name in parameters if isinstance(name, str) and name.endswith(".weight")]
    return [*targets, *(name.removesuffix(".weight") for name in weights)]


def _modules(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Modules with a matrix, or a norm, as their weight."""
    return (name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and shape)


def _prefix(names: Mapping[str, str]) -> Any:
    """What turns a base's name into an adapter's, where one prefix is all that differs; else None."""
    parameter, name = next(iter(names.items()))
    if name.endswith(parameter):
        extra = name.removesuffix(parameter)
        fits = all(own == extra + other for other, own in names.items())
        return (lambda module: module.removeprefix(extra)) if fits else None
    if parameter.endswith(name):
        extra = parameter.removesuffix(name)
        fits = all(extra + own == other for other, own in names.items())
        return (lambda module: extra + module) if fits else None
    return None


def _pattern(module: str) -> str:
    return NUMBER.sub("*", f".{module}.")[1:-1]


def _ends(module: str, target: Any) -> bool:
    return isinstance(target, str) and (module == target or module.endswith(f".{target}"))


def _wanted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adapts a module of this name (peft/tuners/tuners_utils.py, check_target_module_exists)."""
    excluded, saved = config.get("exclude_modules") or [], config.get("modules_to_save") or []
    if isinstance(excluded, str) or any(_ends(module, name) for name in excluded):
        return False
    if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in saved if isinstance(name, str)):
        return False
    targets = _targets(config) or []
    if not any(_ends(module, target) for target in targets):
        return False
    indices = config.get("layers_to_transform")
    if indices is None or indices == [] or module in targets:
        return True
    if config.get("layers_pattern"):
        return False  # where the layers lie is the trainer's own saying: nothing is missed there
    match = LAYER.match(f"{module}.")
    return match is not None and int(match["index"]) in ([indices] if isinstance(indices, int) else indices)
