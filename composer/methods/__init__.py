"""Ways to combine deltas, one file each.

    @merge_method
    def linear(deltas, weights): …                            float32 blocks in product space -> one float32 block

    @merge_method(whole=True)
    def ties(deltas, weights, *, density: Annotated[float, Range(0, 1)] = 0.2): …

The decorator reads what a method needs off its signature and its own arguments:

    keyword-only, annotated     a parameter of the recipe: type, default, Range or Choice, checked before a byte is read
    base                        the base's own rows, float32
    rng                         one numpy Generator a delta, seeded by recipe, tensor and position; adds `seed`
    whole=True                  all rows of a tensor at once; else any block of rows, and the bytes depend on no block
    factors=True                low-rank factors (left, right, scale) instead of blocks; gives a block or (left, right)
    equal_ranks=True            the factors of a tensor must have one rank
    terms=2                     at most so many adapters

Siblings are imported in sorted order; a duplicate name is an error. A method's docstring is its documentation.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, get_args, get_type_hints, overload

import numpy as np

from composer.errors import RecipeError
from composer.product import product

__all__ = [
    "BoundMethod",
    "Choice",
    "MergeMethod",
    "Parameter",
    "Range",
    "Value",
    "find_method",
    "merge_method",
    "methods",
]

Value: TypeAlias = float | int | str
Function: TypeAlias = Callable[..., Any]
PROVIDED = ("base", "rng")


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included unless `above`, which leaves `low` out."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        end = "∞)" if math.isinf(self.high) else f"{_short(self.high)}]"
        return f"{'(' if self.above else '['}{_short(self.low)}, {end}"


def _short(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]

    def __contains__(self, value: str) -> bool:
        return value in self.words

    def __str__(self) -> str:
        return " or ".join(self.words)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number or word that tunes a method."""

    name: str
    type: type[float | int | str]
    default: Value
    allowed: Range | Choice

    def read(self, value: Value) -> Value:
        """`value` in this parameter's type; text is parsed. Raises ValueError when it does not fit."""
        if isinstance(value, bool) or (self.type is int and isinstance(value, float) and value != int(value)):
            raise ValueError(value)
        converted = self.type(value)
        if converted not in self.allowed:  # type: ignore[operator]
            raise ValueError(value)
        return converted

    def __str__(self) -> str:
        return f"{self.name}: {self.type.__name__} in {self.allowed} (default {self.default})"


SEED = Parameter("seed", int, 0, Range(0, 2**31 - 1))


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A registered method: its function, parameters and needs."""

    name: str
    function: Function
    parameters: Mapping[str, Parameter]
    base: bool = False
    rng: bool = False
    whole: bool = False
    factors: bool = False
    equal_ranks: bool = False
    terms: int | None = None
    check: Callable[[Mapping[str, Any]], str | None] | None = None

    def resolve(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """All parameters: those given, checked, and the defaults of the others.

        Raises RecipeError, which lists the valid ones, for a name that is unknown or a value out of its range.
        """
        values = {name: parameter.default for name, parameter in self.parameters.items()}
        for name, value in given.items():
            if name not in self.parameters:
                raise self._refuse(f"has no parameter {name!r}", name)
            try:
                values[name] = self.parameters[name].read(value)
            except (ValueError, OverflowError):
                raise self._refuse(f"cannot have {name}={value!r}", value) from None
        if self.check and (wrong := self.check(values)):
            raise self._refuse(wrong, dict(given))
        return values

    def bind(self, given: Mapping[str, Value], tensor: str) -> BoundMethod:
        """This method with its parameters, for one tensor. Raises RecipeError as `resolve` does."""
        return BoundMethod(self, self.resolve(given), tensor)

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def _refuse(self, message: str, found: Any) -> RecipeError:
        valid = [str(parameter) for parameter in self.parameters.values()]
        return RecipeError(
            f"method {self.name!r} {message}",
            expected=valid or "no parameters",
            found=found,
            remedy=f"its parameters are {'; '.join(valid)}" if valid else "leave the parameters out",
        )


@dataclass(frozen=True, slots=True)
class BoundMethod:
    """A method with its parameters, for one tensor."""

    method: MergeMethod
    values: Mapping[str, Value]
    tensor: str
    _tuning: dict[str, Value] = field(init=False)

    def __post_init__(self) -> None:
        own = inspect.signature(self.method.function).parameters
        object.__setattr__(self, "_tuning", {name: value for name, value in self.values.items() if name in own})

    def __call__(
        self,
        deltas: Sequence[np.ndarray],
        weights: Sequence[float],
        base: np.ndarray,
        start: int,
        loaded: Sequence[Any],
    ) -> np.ndarray:
        """The combination of rows [start, start + len(base)) as a new float32 block.

        deltas: float32 blocks [rows, columns], one or more. base: the base's rows as float32. loaded: the deltas that
        the blocks came from; a method on factors takes their left, right and scale.
        """
        options = self._options(len(deltas), start * base.shape[1])
        if self.method.base:
            options["base"] = base
        result = self.method.function(loaded if self.method.factors else deltas, weights, **options)
        return product(*result) if isinstance(result, tuple) else result

    def pair(self, loaded: Sequence[Any], weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Of a method on factors: float32 left [rows, r] and right [r, columns] whose product is the combination."""
        left, right = self.method.function(loaded, weights, **self._options(len(loaded), 0))
        return left, right

    def _options(self, count: int, skip: int) -> dict[str, Any]:
        options: dict[str, Any] = dict(self._tuning)
        if self.method.rng:
            options["rng"] = [self._generator(index, skip) for index in range(count)]
        return options

    def _generator(self, index: int, skip: int) -> np.random.Generator:
        """The stream of the delta at `index` among those of this tensor, moved on by `skip` float64 numbers.

        The position counts the deltas of this tensor only, so an adapter of weight 0 does not shift the others.
        """
        text = f"{self.values['seed']}\n{self.method.name}\n{self.tensor}\n{index}"
        bits = np.random.PCG64(int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"))
        return np.random.Generator(bits.advance(skip))


_METHODS: dict[str, MergeMethod] = {}


@overload
def merge_method(function: Function) -> Function: ...
@overload
def merge_method(*, name: str | None = None, **needs: Any) -> Callable[[Function], Function]: ...
def merge_method(function: Function | None = None, *, name: str | None = None, **needs: Any) -> Any:
    """Register a method under its function's name or `name`, which must be new; see the module's docstring.

    needs: fields of MergeMethod. check: a function of all parameters that says what is wrong with them
    together.
    Raises RuntimeError for a second method of that name, TypeError for a parameter without type, range or default.
    """
    if function is None:
        return lambda decorated: _register(decorated, name or decorated.__name__, needs)
    return _register(function, name or function.__name__, needs)


def _register(function: Function, name: str, needs: dict[str, Any]) -> Function:
    if name in _METHODS:
        raise RuntimeError(f"two merge methods are named {name!r}")
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    provided = {each.name for each in keywords} & set(PROVIDED)
    hints = get_type_hints(function, include_extras=True)
    parameters = {p.name: _parameter(name, p, hints.get(p.name)) for p in keywords if p.name not in PROVIDED}
    if "rng" in provided:
        parameters["seed"] = SEED
    needs = {"whole": needs.get("factors", False), **needs}
    _METHODS[name] = MergeMethod(name, function, parameters, "base" in provided, "rng" in provided, **needs)
    return function


def _parameter(method: str, keyword: inspect.Parameter, hint: Any) -> Parameter:
    kind, *notes = get_args(hint) or (hint,)
    allowed = next((note for note in notes if isinstance(note, Range | Choice)), None)
    if kind not in (float, int, str) or allowed is None or keyword.default not in allowed:
        raise TypeError(f"{method}: {keyword.name} needs Annotated[float | int | str, Range | Choice] and a default")
    return Parameter(keyword.name, kind, keyword.default, allowed)


@functools.cache
def methods() -> dict[str, MergeMethod]:
    """All methods by name."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        importlib.import_module(f"{__name__}.{module.name}")
    return _METHODS


def find_method(name: str) -> MergeMethod:
    """The method of that name. Raises RecipeError listing the known ones."""
    known = methods()
    if name not in known:
        raise RecipeError(
            f"unknown merge method {name!r}",
            expected=sorted(known),
            found=name,
            remedy=f"use {' or '.join(sorted(known))}",
        )
    return known[name]
