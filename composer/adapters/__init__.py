"""Adapter kinds, one file each; this file finds the one that reads a given folder.

    open_adapter(folder)  ->  Adapter (kind, config, header)
        .signature        what it touches: modules and sizes, known without any base
        .bind(shapes)     the same against one base: base tensor names, or the list of what does not fit
        .deltas(binding)  changes to base tensors
        .additions()      what it adds to the model besides

A kind registers itself with ``@adapter_kind``; siblings are imported in sorted order and a duplicate is an error.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from composer.adapter_config import check_config
from composer.additions import Addition
from composer.admission import refuse_pickles, refuse_remote_code
from composer.conditions import holds
from composer.deltas import Delta
from composer.errors import (
    CorruptFileError,
    NotFoundError,
    RecipeError,
    UnknownAdapterTypeError,
    UnsupportedAdapterError,
)
from composer.files import FileSet, folder_files, read_json
from composer.flattened import FLATTENED, flattened_candidates
from composer.formats import View, find_format, readable
from composer.quantised import QuantisedTensor
from composer.renames import FAMILIES, module_names
from composer.sizes import SIZE_MARK, model_sizes
from composer.tensors import SafetensorsHeader, TensorSpec, read_adapter_header

__all__ = [
    "ANY_SIZE",
    "Adapter",
    "AdapterKind",
    "BaseTensor",
    "Binding",
    "Mismatch",
    "Signature",
    "Target",
    "adapter_kind",
    "kinds",
    "open_adapter",
]

BaseTensor = TensorSpec | QuantisedTensor
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ANY_SIZE = -1  # in a target's shape: the adapter does not say this size


@dataclass(frozen=True, slots=True)
class Target:
    """One base parameter that an adapter touches: its name in the adapter, its shape in the base's layout.

    A size the adapter does not know (IA3 knows one of two) is ANY_SIZE; `conditions` (composer.conditions) say what it
    knows of such sizes. Nor does it know whether a stack of experts, a parameter that is no module's weight, is
    [experts, out, in] or [experts, in, out]: either fits. An adapter that names no parameter asks for a size of the
    model (composer.sizes), such as @hidden_size.
    """

    parameter: str
    shape: tuple[int, ...]
    conditions: tuple[str, ...] = ()

    def fits(self, shape: tuple[int, ...] | None) -> bool:
        """Whether a base tensor of this shape (None: the base has no such tensor) can be the target."""
        if shape is None or len(shape) != len(self.shape):
            return False
        if len(shape) == 3 and not self.parameter.endswith((".weight", ".bias")) and self.shape[1:] == shape[:0:-1]:
            return self.shape[0] == shape[0]
        sizes = all(own in (ANY_SIZE, size) for own, size in zip(self.shape, shape, strict=True))
        return sizes and all(holds(condition, shape) for condition in self.conditions)

    @property
    def needs(self) -> tuple[int | str, ...]:
        """The sizes, then the conditions: what a catalogue keeps."""
        return (*self.shape, *self.conditions)

    @classmethod
    def of(cls, parameter: str, needs: Iterable[int | str]) -> Target:
        """The target that `needs` is of."""
        given = tuple(needs)
        sizes = tuple(size for size in given if isinstance(size, int))
        return cls(parameter, sizes, tuple(text for text in given if isinstance(text, str)))


@dataclass(frozen=True, slots=True)
class Signature:
    """What an adapter needs of a base, known from its own header: the catalogue stores it.

    `optional` are biases that are touched where the base has them, each next to a weight among the targets.
    Where the adapter uses layers of its base several times, `targets` are the base's own tensors, and `replicas` those
    of the deeper model, which the adapter's tensors are named after.
    """

    kind: str
    targets: tuple[Target, ...]
    parameters: int
    rank: int | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] = ()
    optional: tuple[Target, ...] = ()
    replicas: tuple[Target, ...] = ()
    virtual_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One parameter of the adapter that does not fit the base; `found` is None where the base lacks it.

    `expected` are the sizes, then the conditions on them.
    """

    parameter: str
    expected: tuple[int | str, ...]
    found: tuple[int, ...] | None

    def __str__(self) -> str:
        if self.found is None:
            missing = "does not show this size" if self.parameter.startswith(SIZE_MARK) else "has no such tensor"
            return f"{self.parameter}: the base {missing}"
        sizes = ", ".join("any" if size == ANY_SIZE else str(size) for size in self.expected if isinstance(size, int))
        conditions = "".join(f" with {text}" for text in self.expected if isinstance(text, str))
        return f"{self.parameter}: the adapter expects [{sizes}]{conditions}, the base has {list(self.found)}"


@dataclass(frozen=True, slots=True)
class Ambiguity(Mismatch):
    """A parameter of the adapter that may be any of several base tensors."""

    candidates: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.parameter}: ambiguous, it may be {' or '.join(self.candidates)}"


@dataclass(frozen=True, slots=True)
class Binding:
    """A signature resolved against one base: adapter parameter name to base tensor name."""

    names: dict[str, str] = field(default_factory=dict)
    mismatches: tuple[Mismatch, ...] = ()


class AdapterKind(Protocol):
    """What one file of this package provides."""

    name: str
    peft_types: tuple[str, ...]
    # A kind may also have
    #   switches = ("kasa_config",)    config fields: it reads only the adapters of its types that set one of these
    #   deltas_on(config, header, names, base)   in place of `deltas` where these depend on the base beyond its names;
    #                                  base: adapter parameter -> the base's tensor, of which only the header is known
    # One that adds to the model has `additions(config, header)`, a list of composer.additions.Addition. One that was
    # trained on several tasks has `tasks(config)`, their number, and `additions` takes the task as well.

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise UnsupportedAdapterError or CorruptFileError for what this kind cannot compose."""
        ...

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """What the adapter touches."""
        ...

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """Changes to base tensors, with `names` from adapter parameter to base tensor."""
        ...


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter, opened by its header only.

    `config` and `header` are in PEFT's terms whatever tool saved it; `format` names the tool's format, and `stored`
    the files of the folder that hold the adapter itself.
    """

    kind: AdapterKind
    config: dict[str, Any]
    header: SafetensorsHeader
    files: FileSet
    signature: Signature
    format: str = "PEFT"
    stored: tuple[str, ...] = (CONFIG, WEIGHTS)
    task: int | None = None

    @property
    def base_name(self) -> str | None:
        """The base as the trainer named it: a hub name or a path of the trainer's machine; proves nothing."""
        return self.config.get("base_model_name_or_path") or None

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> Binding:
        """Resolve this adapter's parameters against tensor names and shapes: a base's, or those of its deeper model."""
        targets = self.signature.replicas or self.signature.targets
        return bind_optional(bind_targets(targets, shapes), self.signature.optional, shapes)

    def deltas(self, names: Mapping[str, str], base: Mapping[str, BaseTensor] | None = None) -> list[Delta]:
        """The changes, in the order of the adapter's tensors; base: its tensors by their own names."""
        deltas_on = getattr(self.kind, "deltas_on", None)
        if deltas_on is None or base is None:
            return self.kind.deltas(self.config, self.header, names)
        bound = {parameter: base[name] for parameter, name in names.items() if name in base}
        return deltas_on(self.config, self.header, names, bound)

    @property
    def adds(self) -> bool:
        """Whether it is of a kind that adds to the model."""
        return hasattr(self.kind, "additions")

    def additions(self) -> list[Addition]:
        """What it adds to the model; nothing for most kinds."""
        chosen = () if self.task is None else (self.task,)
        return self.kind.additions(self.config, self.header, *chosen) if self.adds else []

    def for_task(self, label: str, task: int | None) -> Adapter:
        """The adapter as it acts for one of its tasks.

        Raises RecipeError for a task that it does not have, or where it has several and none is named.
        """
        count = self.kind.tasks(self.config) if hasattr(self.kind, "tasks") else 0
        if task is None and count <= 1:
            return self
        if task is None or task >= count:
            named = f"has no task {task}" if task is not None else "was trained on several tasks, and none is named"
            raise RecipeError(
                f"{label} {named}",
                expected=f"a task of 0 to {count - 1}" if count else "no task",
                found=task,
                remedy=f"write the task after '#', such as {label}#0" if count else "leave the task out",
            )
        return replace(self, task=task)


K = TypeVar("K", bound=AdapterKind)

_KINDS: dict[str, AdapterKind] = {}


def adapter_kind(cls: type[K]) -> type[K]:
    """Register an adapter kind; its name must be new."""
    kind = cls()
    if kind.name in _KINDS:
        raise RuntimeError(f"two adapter kinds are named {kind.name!r}")
    _KINDS[kind.name] = kind
    return cls


def kinds() -> dict[str, AdapterKind]:
    """All adapter kinds by name."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        importlib.import_module(f"{__name__}.{module.name}")
    return _KINDS


def open_adapter(source: Path | FileSet) -> Adapter:
    """Open an adapter folder (or a mapping of file names to paths) of any readable format, reading headers only.

    Raises NotFoundError, UnsafeFormatError (pickle), CorruptFileError, UnknownAdapterTypeError or
    UnsupportedAdapterError.
    """
    files = folder_files(source) if isinstance(source, Path) else source
    where = str(source) if isinstance(source, Path) else "the adapter"
    config = read_json(files[CONFIG]) if CONFIG in files else None
    refuse_remote_code(CONFIG, config or {})
    found = find_format(files, config)
    if found is not None:
        view = found.read(files, config)
    elif config is not None:
        _find_kind(config)  # an unknown kind is named before its weights are asked for
        view = _peft_view(where, files, config)
    else:
        raise NotFoundError(
            f"{where} has no {CONFIG}",
            expected=readable(),
            found=", ".join(list(files)[:8]) or "an empty folder",
            remedy="a base model goes to 'registry base add'" if "config.json" in files else "check the path",
        )
    check_config(view.config)
    if not view.header.tensors:
        raise CorruptFileError(
            f"{view.header.path.name} holds no tensors",
            expected="the adapter's weights",
            found="none",
            remedy="save it again",
        )
    kind = _find_kind(view.config)
    kind.check(view.config, view.header)
    signature = kind.signature(view.config, view.header)
    return Adapter(kind, view.config, view.header, files, signature, found.name if found else "PEFT", view.stored)


def _peft_view(where: str, files: FileSet, config: dict[str, Any]) -> View:
    if WEIGHTS not in files:
        refuse_pickles(files, WEIGHTS)
        raise NotFoundError(
            f"{where} has no {WEIGHTS}",
            expected=WEIGHTS,
            found=", ".join(list(files)[:8]),
            remedy="save the adapter with PEFT's save_pretrained",
        )
    return View(config, read_adapter_header(files[WEIGHTS]), (CONFIG, WEIGHTS))


def _find_kind(config: dict[str, Any]) -> AdapterKind:
    found = config.get("peft_type")
    able = [kind for kind in kinds().values() if found in kind.peft_types]
    for kind in able:
        if any(config.get(field) for field in getattr(kind, "switches", ())):
            return kind
    for kind in able:
        if not getattr(kind, "switches", ()):
            return kind
    known = sorted({name for kind in kinds().values() for name in kind.peft_types})
    raise UnknownAdapterTypeError(
        f"adapters of type {found!r} cannot be read; these formats can: {readable()}",
        expected=f"peft_type of {', '.join(known)}, or another format: {readable()}",
        found=found,
        remedy="publish one of these; an adapter of another tool must be converted first",
    )


def bind_targets(targets: tuple[Target, ...], shapes: Mapping[str, tuple[int, ...]]) -> Binding:
    """Match adapter parameter names to base tensor names, and sizes of the model to what its shapes show."""
    parameters = tuple(target for target in targets if not target.parameter.startswith(SIZE_MARK))
    binding = _bind_parameters(parameters, shapes)
    if len(parameters) == len(targets):
        return binding
    sizes = model_sizes(shapes)
    mismatches = tuple(
        Mismatch(target.parameter, target.shape, sizes.get(target.parameter))
        for target in targets
        if target.parameter.startswith(SIZE_MARK) and not target.fits(sizes.get(target.parameter))
    )
    return Binding(binding.names, (*mismatches, *binding.mismatches))


def _bind_parameters(targets: tuple[Target, ...], shapes: Mapping[str, tuple[int, ...]]) -> Binding:
    """Match names exactly, through one missing or extra prefix, or renamed.

    A trainer saves ``model.layers.0…`` or ``bert.encoder…`` as its class nests modules; a checkpoint saved without
    its head lacks that prefix, one saved inside a wrapper has one more. One prefix rule must hold for all targets.
    Where modules have other names than the checkpoint's tensors (composer.renames), two families that lead to
    different tensors make the targets ambiguous.
    """
    if any(FLATTENED.fullmatch(target.parameter) for target in targets):
        return _bind_flattened(targets, shapes)
    direct = _bind_prefixed(targets, shapes)
    if not direct.mismatches:
        return direct
    return _one_of(targets, _bind_renamed(targets, shapes)) or direct


def _bind_renamed(targets: tuple[Target, ...], shapes: Mapping[str, tuple[int, ...]]) -> list[Binding]:
    """What the names of modules lead to, in each family of architectures through which all targets are found."""
    found = []
    for family in FAMILIES:
        stored = module_names(family, tuple(shapes))
        if stored is None:
            continue
        binding = _bind_prefixed(targets, {module: shapes[name] for module, name in stored.items()})
        if not binding.mismatches:
            found.append(Binding({parameter: stored[module] for parameter, module in binding.names.items()}))
    return found


def _one_of(targets: tuple[Target, ...], complete: Sequence[Binding]) -> Binding | None:
    """The binding that all agree on; where they do not, the targets that may be several tensors are mismatches."""
    if not complete or all(binding.names == complete[0].names for binding in complete):
        return complete[0] if complete else None
    found = {target: tuple(sorted({binding.names[target.parameter] for binding in complete})) for target in targets}
    ambiguous = (Ambiguity(t.parameter, t.shape, None, names) for t, names in found.items() if len(names) > 1)
    return Binding(complete[0].names, tuple(ambiguous))


def _bind_prefixed(targets: tuple[Target, ...], shapes: Mapping[str, tuple[int, ...]]) -> Binding:
    best: Binding | None = None
    for rename in _prefix_rules(targets, shapes):
        names = {target.parameter: rename(target.parameter) for target in targets}
        mismatches = tuple(
            Mismatch(target.parameter, target.needs, shapes.get(names[target.parameter]))
            for target in targets
            if not target.fits(shapes.get(names[target.parameter]))
        )
        if not mismatches:
            return Binding(names)
        if best is None or len(mismatches) < len(best.mismatches):
            best = Binding(names, mismatches)
    return best or Binding()


def _bind_flattened(targets: tuple[Target, ...], shapes: Mapping[str, tuple[int, ...]]) -> Binding:
    """Match names without dots; those that two base tensors answer to are mismatches."""
    ways = flattened_candidates([target.parameter for target in targets], shapes)
    bindings = [_bind_way(targets, shapes, way) for way in ways]
    if not bindings[0].mismatches or any(isinstance(found, Ambiguity) for found in bindings[0].mismatches):
        return bindings[0]
    complete = [binding for binding in bindings if not binding.mismatches]
    if not complete:
        return min(bindings, key=lambda binding: len(binding.mismatches))
    return _one_of(targets, complete) or bindings[0]


def _bind_way(
    targets: tuple[Target, ...], shapes: Mapping[str, tuple[int, ...]], way: Mapping[str, tuple[str, ...]]
) -> Binding:
    names: dict[str, str] = {}
    mismatches: list[Mismatch] = []
    for target in targets:
        candidates = way[target.parameter]
        names[target.parameter] = candidates[0] if candidates else target.parameter
        found = shapes.get(names[target.parameter])
        if len(candidates) > 1:
            mismatches.append(Ambiguity(target.parameter, target.shape, found, candidates))
        elif not target.fits(found):
            mismatches.append(Mismatch(target.parameter, target.needs, found))
    return Binding(names, tuple(mismatches))


def bind_optional(binding: Binding, optional: tuple[Target, ...], shapes: Mapping[str, tuple[int, ...]]) -> Binding:
    """The binding with the biases that the base has, each found next to the weight of its module."""
    names, mismatches = dict(binding.names), list(binding.mismatches)
    for target in optional:
        weight = binding.names[f"{target.parameter.removesuffix('.bias')}.weight"]
        name = f"{weight.removesuffix('.weight')}.bias"
        if name not in shapes:
            continue
        names[target.parameter] = name
        if not target.fits(shapes[name]):
            mismatches.append(Mismatch(target.parameter, target.needs, shapes[name]))
    return Binding(names, tuple(mismatches))


def _prefix_rules(targets: tuple[Target, ...], shapes: Mapping[str, tuple[int, ...]]) -> list[Callable[[str], str]]:
    rules: list[Callable[[str], str]] = [lambda name: name]
    if targets:
        first = targets[0].parameter
        head, _, rest = first.partition(".")
        if rest in shapes:
            rules.append(lambda name: name.removeprefix(f"{head}."))
        for name in shapes:
            if name.endswith(f".{first}"):
                prefix = name.removesuffix(first)
                rules.append(lambda parameter, prefix=prefix: prefix + parameter)
    return rules


def refuse(message: str, *, expected: str, found: Any, remedy: str) -> UnsupportedAdapterError:
    """The error for a known kind used in a way that cannot be composed."""
    return UnsupportedAdapterError(message, expected=expected, found=found, remedy=remedy)


def parameter_count(header: SafetensorsHeader) -> int:
    """How many numbers the adapter holds."""
    return sum(_count(spec) for spec in header.tensors.values())


def _count(spec: TensorSpec) -> int:
    count = 1
    for size in spec.shape:
        count *= size
    return count
