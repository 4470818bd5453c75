"""Changes to one tensor of the base, computed a block of rows at a time.

    LowRank    W += weight · scale · B·A           LoRA
    Replace    W  = tensor                         modules_to_save, trained biases

A delta knows where its tensors lie; `load()` reads them when the run comes to that tensor and not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from composer.errors import NonFiniteError, TargetMismatchError

if TYPE_CHECKING:
    import torch

    from composer.tensors import TensorSpec

__all__ = ["BlockDelta", "Delta", "LowRank", "Replace", "read_torch"]


class BlockDelta(Protocol):
    """A loaded delta: float32 rows on demand."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the unweighted delta (or of the new tensor), float32, in the base's layout."""
        ...

    def check_base(self, base: torch.Tensor, start: int, stop: int) -> None:
        """Raise TargetMismatchError when the adapter carries rows [start, stop) of its own base and `base` differs."""
        ...


class Delta(Protocol):
    """A change to the base tensor `target`."""

    @property
    def target(self) -> str:
        """The base tensor's own name."""
        ...

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        """The adapter tensors consumed."""
        ...

    @property
    def replaces(self) -> bool:
        """Whether `rows` is the new value and not an addition."""
        ...

    def load(self) -> BlockDelta:
        """Read the adapter tensors into memory as float32."""
        ...


def read_torch(spec: TensorSpec) -> torch.Tensor:
    """An adapter tensor as float32. Raises NonFiniteError when it holds NaN or infinity."""
    import torch

    tensor = torch.frombuffer(spec.read_bytes(0, spec.nbytes), dtype=torch_dtype(spec.dtype))
    tensor = tensor.reshape(spec.shape).to(torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(
            f"{spec.path.name}: {spec.name} holds NaN or infinity",
            expected="finite numbers",
            found=int((~torch.isfinite(tensor)).sum()),
            remedy="the training diverged: publish an earlier step",
            tensor=spec.name,
        )
    return tensor


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors float dtype name."""
    import torch

    return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}[name]


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale · B·A with A [r, in] and B [out, r]; `transposed` where the base keeps W as [in, out] (Conv1D).

    Source: arXiv:2106.09685 §4.1; the order of operations is PEFT's get_delta_weight: the product in float32, then
    the scale, so that one adapter merged into bf16 equals PEFT's default merge bit for bit.
    PEFT saves `copy`, the base's own W, along with a LoRA on an output head; it must be what this base holds.
    """

    target: str
    a: TensorSpec
    b: TensorSpec
    scale: float
    transposed: bool = False
    copy: TensorSpec | None = None

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return (self.a, self.b) if self.copy is None else (self.a, self.b, self.copy)

    @property
    def replaces(self) -> bool:
        return False

    def load(self) -> LoadedLowRank:
        return LoadedLowRank(read_torch(self.a), read_torch(self.b), self.scale, self.transposed, self.copy)


@dataclass(frozen=True, slots=True)
class LoadedLowRank:
    """The factors in memory, float32."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool
    copy: TensorSpec | None = None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        if self.transposed:
            return (self.b @ self.a[:, start:stop]).T.mul(self.scale)
        return (self.b[start:stop] @ self.a).mul_(self.scale)

    def check_base(self, base: torch.Tensor, start: int, stop: int) -> None:
        import torch

        if self.copy is None:
            return
        width = self.copy.nbytes // self.copy.shape[0]
        raw = self.copy.read_bytes(start * width, stop * width)
        own = torch.frombuffer(raw, dtype=torch_dtype(self.copy.dtype)).reshape(base.shape).to(base.dtype)
        if not torch.equal(own, base):
            raise TargetMismatchError(
                f"the adapter carries its base's {self.copy.name}, and this base holds other values",
                expected="the base that the adapter was trained on",
                found=f"differences in rows {start} to {stop - 1}",
                remedy="compose it with its own base",
                keys=[self.copy.name],
            )


@dataclass(frozen=True, slots=True)
class Replace:
    """The adapter carries the whole tensor: it takes the base's place. A weight other than 1 is refused by the plan."""

    target: str
    tensor: TensorSpec

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return (self.tensor,)

    @property
    def replaces(self) -> bool:
        return True

    def load(self) -> LoadedReplace:
        return LoadedReplace(read_torch(self.tensor))


@dataclass(frozen=True, slots=True)
class LoadedReplace:
    """The new tensor in memory, float32."""

    tensor: torch.Tensor

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.tensor[start:stop]

    def check_base(self, base: torch.Tensor, start: int, stop: int) -> None:
        """It takes the base's place, whatever that holds."""
