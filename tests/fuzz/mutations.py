"""Bytes changed a little: what libFuzzer does, with what these formats are made of as its dictionary."""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["DICTIONARY", "mutate"]

DICTIONARY = (
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"Infinity", b"[]", b"{}", b'""', b'"a"', b"[[[[[[[[", b"9" * 30,
    b"9223372036854775807", b"18446744073709551615", b'":', b",", b"\\u0000", b"\\ud800", b"../", b"/", b"\0", b"\xff",
    b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\x80" + b"\0" * 7, b"{{", b"<<: *a", b"&a ", b"*a", b"!!", b"2020-99-99", b"---\n",
    b"peft_type", b"data_offsets", b"shape", b"dtype", b"weight_map", b"auto_map", b"target_modules", b"rank_pattern",
)  # fmt: skip
MAX_EDITS = 4
MAX_SIZE = 1 << 16


def mutate(data: bytes, seeds: Sequence[bytes], source: random.Random) -> bytes:
    """`data` after one to four edits: bits, bytes, numbers, words, pieces doubled, moved, cut or taken from a seed."""
    found = bytearray(data)
    for _ in range(source.randint(1, MAX_EDITS)):
        at = source.randrange(len(found) + 1)
        end = min(len(found), at + source.choice((1, 2, 4, 8, 16, 64)))
        kind = source.randrange(8)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << source.randrange(8)
        elif kind == 1:
            found[at:end] = source.randbytes(end - at)
        elif kind == 2:
            found[at:end] = source.choice(DICTIONARY)
        elif kind == 3:
            found[at:at] = source.choice(DICTIONARY)
        elif kind == 4:
            found[at:at] = found[at:end] * source.choice((1, 2, 50))
        elif kind == 5:
            del found[at:end]
        elif kind == 6:
            number = source.choice((0, 1, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            found[at : at + 8] = number.to_bytes(8, "little")
        else:
            other = source.choice(seeds)
            begin = source.randrange(len(other) + 1)
            found[at:end] = other[begin : begin + source.choice((4, 16, 64))]
    return bytes(found[:MAX_SIZE])
