"""Run a composed folder in ONNX Runtime: a text that goes on, or what an encoder says of one.

OUT ──► runnable ──► generation    a model that writes: chat template, tokens as they come
           │    └──► encoding      an encoder: scores of labels, or an embedding
           └─ the files are those that composition.json lists, byte for byte
"""

from __future__ import annotations

from composer.running.encoding import Encoding, encode
from composer.running.generation import Answer, Piece, Sampling, answer
from composer.running.runnable import Runnable, open_runnable

__all__ = ["Answer", "Encoding", "Piece", "Runnable", "Sampling", "answer", "encode", "open_runnable"]
