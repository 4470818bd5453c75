"""Which numbers of a quantised base an adapter is merged into: those that it decodes to, or those it was made of.

    base_precision quantised    base ──decode──► W', what the adapter was trained on        merged, written unquantised
    base_precision original     base's 16-bit source W, named by the user                   merged, written in its dtype

W and W' are other numbers: what is composed from W differs from what was trained by W − W', which is often larger than
the adapter's own change. How large is measured on rows of every quantised layer, and a checkpoint that lies further off
than a quantisation can is no source.
"""

from __future__ import annotations

import math

import numpy as np

from composer.checkpoint import OUTPUT_EMBEDDINGS, Checkpoint
from composer.errors import IncompatibleError
from composer.quantised import QuantisedTensor
from composer.tensors import DTYPES, FLOAT_DTYPES, TensorSpec

__all__ = ["quantisation_error"]

TILES, TILE_ROWS = 4, 4
FURTHEST = 0.5  # of a layer's norm; 2-bit formats stay below 0.4, unrelated weights are near 1.4
LISTED = 5


def quantisation_error(quantised: Checkpoint, original: Checkpoint) -> float:
    """‖W − W'‖ / ‖W‖ over sampled rows of all quantised layers, W of `original` and W' what `quantised` decodes to.

    Raises IncompatibleError when `quantised` is not quantised, `original` is, their tensors differ in name or shape, or
    a layer differs by more than a quantisation does.
    """
    if quantised.scheme is None:
        raise IncompatibleError(
            "the base is not quantised: it is its own original",
            expected="a quantised base that can be decoded",
            found=quantised.config.get("quantization_config", "unquantised weights"),
            remedy="leave base_precision out",
        )
    if quantised.shapes.keys() - original.shapes.keys() or _wrong(quantised, original):
        listed = sorted((quantised.shapes.keys() - original.shapes.keys()) | _wrong(quantised, original))
        raise IncompatibleError(
            f"{len(listed)} tensors of the original are not what the quantised base decodes to: "
            f"{', '.join(listed[:LISTED])}",
            expected="an unquantised checkpoint with the same tensors",
            found=listed[:20],
            remedy="name the very model that was quantised",
            keys=listed,
        )
    difference = norm = 0.0
    for name, tensor in quantised.tensors.items():
        if not isinstance(tensor, QuantisedTensor):
            continue
        source = original.tensors[name]
        assert isinstance(source, TensorSpec)
        off, size = _compare(tensor, source)
        if off > FURTHEST**2 * size:
            raise IncompatibleError(
                f"{name}: the original differs from the quantised base by {math.sqrt(off / size):.0%} of its norm",
                expected=f"at most {FURTHEST:.0%}, which no quantisation exceeds",
                found=f"{math.sqrt(off / size):.0%}",
                remedy="name the very model that was quantised",
                tensor=name,
            )
        difference, norm = difference + off, norm + size
    return math.sqrt(difference / norm) if norm else 0.0


def _wrong(quantised: Checkpoint, original: Checkpoint) -> set[str]:
    """Tensors of the original that are of another shape, no plain floats, or that the quantised base does not have."""
    return {
        name
        for name, tensor in original.tensors.items()
        if not isinstance(tensor, TensorSpec)
        or tensor.dtype not in FLOAT_DTYPES
        or quantised.shapes.get(name, tensor.shape) != tensor.shape
        or (name not in quantised.shapes and not name.endswith(OUTPUT_EMBEDDINGS))
    }


def _compare(tensor: QuantisedTensor, source: TensorSpec) -> tuple[float, float]:
    """Σ(W − W')² and ΣW² over a few tiles of rows, spread over the tensor."""
    rows = tensor.shape[0]
    off = size = 0.0
    for start in sorted({max(0, min(rows - TILE_ROWS, index * rows // TILES)) for index in range(TILES)}):
        stop = min(rows, start + TILE_ROWS)
        width = source.nbytes // rows
        raw = np.frombuffer(source.read_bytes(start * width, stop * width), DTYPES[source.dtype])
        own = raw.astype(np.float64)
        off += float(np.sum(np.square(own - tensor.decoder.rows(start, stop).reshape(-1))))
        size += float(np.sum(np.square(own)))
    return off, size
