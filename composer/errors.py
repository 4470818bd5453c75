"""Every failure that a caller can act on.

    TypedError                        code, message, expected, found, remedy, fields
    ├── UsageError                    usage          the request itself is malformed
    │   ├── RecipeError                              a recipe does not parse
    │   └── MissingDependencyError                   an optional package is not installed
    ├── NotFoundError                 not-found      a name, version, file or folder does not exist
    ├── IncompatibleError             incompatible   well-formed inputs that do not fit together
    │   ├── UnknownAdapterTypeError                  no file in composer/adapters reads this kind
    │   ├── UnsupportedAdapterError                  the kind is known, this use of it is not
    │   ├── TargetMismatchError                      adapter and base disagree on names or shapes
    │   ├── TiedWeightsError                         the adapter would change one end of a tied pair
    │   ├── UnsupportedQuantisationError             no file in composer/quantised reads these weights
    │   ├── WeakCompatibilityError                   the verdict is weaker than what was allowed
    │   ├── UnsupportedArchitectureError             an exporter does not know this model
    │   └── OnnxExportError                          tracing or binding failed
    ├── IntegrityError                integrity      bytes are not what they claim to be
    │   ├── CorruptFileError                         truncated, overlapping, duplicate, not safetensors …
    │   ├── NonFiniteError                           NaN or infinity where a number is needed
    │   └── OnnxVerificationError                    the exported graph computes something else
    ├── PolicyError                   policy         possible, but not allowed without an explicit flag
    │   ├── UnsafeFormatError                        pickle or remote code
    │   └── ErasedAdapterError                       requantising would round an adapter away
    ├── ConflictError                 conflict       the name or version is taken by something else
    └── StorageError                  internal       the disk is full, read-only or failing

`category` decides the exit code of the CLI and the HTTP status of the service; `code` is stable and may be
matched by programs; the message is for people and may change.
"""

from __future__ import annotations

from typing import Any, ClassVar


class TypedError(Exception):
    """A failure that names the thing, what was expected, what was found, and the remedy."""

    code: ClassVar[str] = "internal-error"
    category: ClassVar[str] = "internal"

    def __init__(
        self, message: str, *, expected: Any = None, found: Any = None, remedy: str | None = None, **fields: Any
    ) -> None:
        super().__init__(message)
        self.message = message
        self.expected = expected
        self.found = found
        self.remedy = remedy
        self.fields = fields

    def as_dict(self) -> dict[str, Any]:
        """The error as JSON-ready fields; empty ones are left out."""
        entries = {
            "code": self.code,
            "category": self.category,
            "message": self.message,
            "expected": _plain(self.expected),
            "found": _plain(self.found),
            "remedy": self.remedy,
            "fields": {name: _plain(value) for name, value in self.fields.items()},
        }
        return {name: value for name, value in entries.items() if value not in (None, {})}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return str(value)


class UsageError(TypedError):
    """The request itself is malformed."""

    code = "usage"
    category = "usage"


class RecipeError(UsageError):
    """A recipe such as ``base+adapter@1.0.0:0.7`` does not parse."""

    code = "bad-recipe"


class MissingDependencyError(UsageError):
    """An optional package is needed and not installed."""

    code = "missing-dependency"


class NotFoundError(TypedError):
    """A name, version, file or folder does not exist."""

    code = "not-found"
    category = "not-found"


class IncompatibleError(TypedError):
    """Well-formed inputs that do not fit together."""

    code = "incompatible"
    category = "incompatible"


class UnknownAdapterTypeError(IncompatibleError):
    """No file in composer/adapters reads this kind of adapter."""

    code = "unknown-adapter-type"


class UnsupportedAdapterError(IncompatibleError):
    """The kind is known, but this adapter uses a part of it that cannot be composed."""

    code = "unsupported-adapter"


class TargetMismatchError(IncompatibleError):
    """Adapter and base disagree on names or shapes; `fields['keys']` lists the adapter's tensors concerned."""

    code = "target-mismatch"


class TiedWeightsError(IncompatibleError):
    """The adapter would change one end of a tied pair (embedding and output head)."""

    code = "tied-weights"


class UnsupportedQuantisationError(IncompatibleError):
    """The base is quantised in a way that cannot be decoded."""

    code = "unsupported-quantisation"


class UnsupportedArchitectureError(IncompatibleError):
    """An exporter does not know this model."""

    code = "unsupported-architecture"


class OnnxExportError(IncompatibleError):
    """Tracing the model or binding its weights to the graph failed."""

    code = "onnx-export-failed"


class IntegrityError(TypedError):
    """Bytes are not what they claim to be."""

    code = "integrity"
    category = "integrity"


class CorruptFileError(IntegrityError):
    """A file is truncated, inconsistent or not in the format its name claims."""

    code = "corrupt-file"


class NonFiniteError(IntegrityError):
    """A tensor or a weight holds NaN or infinity."""

    code = "not-finite"


class OnnxVerificationError(IntegrityError):
    """The exported graph computes something else than the model it was made from."""

    code = "onnx-verification-failed"


class PolicyError(TypedError):
    """Possible, but not allowed without an explicit flag."""

    code = "policy"
    category = "policy"


class UnsafeFormatError(PolicyError):
    """Pickled weights or remote code: loading them could run a stranger's program."""

    code = "unsafe-format"


class ErasedAdapterError(PolicyError):
    """Too little of an adapter would survive the requantisation of the result."""

    code = "adapter-erased"


class WeakCompatibilityError(IncompatibleError):
    """The compatibility verdict is weaker than what the caller allowed."""

    code = "weak-compatibility"


class ConflictError(TypedError):
    """The name or version is taken by something else."""

    code = "conflict"
    category = "conflict"


class StorageError(TypedError):
    """The disk is full, read-only or failing."""

    code = "storage"
    category = "internal"
