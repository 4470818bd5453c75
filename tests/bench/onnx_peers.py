"""What is measured of ONNX, each as a process of its own: `python -m tests.bench.onnx_peers NAME MODEL OUT`.

bind      this project, the graph cached: bind and write, which is what each further adapter costs
trace     this project, nothing cached: trace without weights, then the same
torch     from_pretrained and torch.onnx.export(dynamo=True) at opset 23, weights written beside the graph
genai     onnxruntime_genai.models.builder
mobius    mobius build, in a virtual environment of its own
session   one over OUT/model.onnx and one pass; prints its seconds and its anonymous memory

The last line printed is JSON: `seconds` is the work itself, without starting Python and importing libraries.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEERS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {}


def peer(function: Callable[[Path, Path], dict[str, Any]]) -> Callable[[Path, Path], dict[str, Any]]:
    """Register under the function's name."""
    PEERS[function.__name__] = function
    return function


def graph_cache_of(model: Path) -> Path:
    """Where the graphs of this benchmark lie."""
    return model.parent / "graphs"


def bound(model: Path, out: Path, cache: Path | None) -> dict[str, Any]:
    """Everything that an export does but the comparison with torch."""
    import onnx  # noqa: F401

    from composer.exporters.onnx import bind, graph_cache, trace
    from composer.exporters.onnx.architectures import architecture_of

    config = json.loads((model / "config.json").read_text())
    architecture = architecture_of(config)
    started = time.perf_counter()
    digest = graph_cache.digest_of(config, architecture)
    graph = graph_cache.load(cache, digest) if cache else None
    if graph is None:
        graph = trace.trace(model, architecture)
        graph_cache.store(graph_cache_of(model), digest, graph)
    data = bind.bind(graph, model).model.SerializeToString()
    with (model / "model.onnx").open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    del out
    return {"seconds": time.perf_counter() - started}


@peer
def bind(model: Path, out: Path) -> dict[str, Any]:
    """From the cached graph."""
    return bound(model, out, graph_cache_of(model))


@peer
def trace(model: Path, out: Path) -> dict[str, Any]:
    """From nothing."""
    return bound(model, out, None)


@peer
def torch(model: Path, out: Path) -> dict[str, Any]:
    """The exporter as its documentation shows it, with a cache and free sizes."""
    import torch as library
    from transformers import AutoModelForCausalLM, DynamicCache

    class Decoder(library.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any) -> Any:
            found = self.inner(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=DynamicCache([(key, value) for key, value in past_key_values]),
                use_cache=True,
            )
            layers = found.past_key_values.layers
            return (found.logits, *(part for layer in layers for part in (layer.keys, layer.values)))

    started = time.perf_counter()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=library.float32).eval()
    config, past, new = loaded.config, 4, 3
    shape = (2, config.num_key_value_heads, past, config.head_dim or config.hidden_size // config.num_attention_heads)
    tokens, cache = {0: "batch", 1: "sequence"}, {0: "batch", 2: "past"}
    inputs = {
        "input_ids": library.ones(2, new, dtype=library.int64),
        "attention_mask": library.ones(2, past + new, dtype=library.int64),
        "position_ids": library.arange(past, past + new).expand(2, new).clone(),
        "past_key_values": [(library.zeros(shape), library.zeros(shape)) for _ in range(config.num_hidden_layers)],
    }
    sizes = {
        "input_ids": tokens,
        "attention_mask": {0: "batch", 1: "total"},
        "position_ids": tokens,
        "past_key_values": [(cache, cache)] * config.num_hidden_layers,
    }
    with library.no_grad():
        program = library.onnx.export(
            Decoder(loaded), kwargs=inputs, dynamic_shapes=sizes, dynamo=True, opset_version=23, verbose=False
        )
    out.mkdir()
    program.save(str(out / "model.onnx"), external_data=True)
    return {"seconds": time.perf_counter() - started}


@peer
def genai(model: Path, out: Path) -> dict[str, Any]:
    """Its builder, in float32 for the CPU."""
    started = time.perf_counter()
    options = ["-i", model, "-o", out, "-p", "fp32", "-e", "cpu", "-c", out / "cache"]
    subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *options], check=True, stdout=sys.stderr)
    return {"seconds": time.perf_counter() - started}


@peer
def mobius(model: Path, out: Path) -> dict[str, Any]:
    """Its command, in float32."""
    started = time.perf_counter()
    command = Path(sys.executable).parent / "mobius"
    subprocess.run([command, "build", "--config", model, "--dtype", "f32", out], check=True, stdout=sys.stderr)
    return {"seconds": time.perf_counter() - started}


@peer
def session(model: Path, out: Path) -> dict[str, Any]:
    """Load and run once; memory that is mapped from a file is not counted."""
    import numpy as np

    from composer.exporters.onnx.session import forward, open_session

    del model
    before, started = anonymous(), time.perf_counter()
    opened = open_session(out / "model.onnx")
    seconds = time.perf_counter() - started
    ids = np.array([[5, 6, 7, 8]])
    forward(opened, ids, np.ones_like(ids))
    return {"seconds": seconds, "anonymous_mib": (anonymous() - before) / 1024}


def anonymous() -> int:
    """KiB of this process's memory that no file backs."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.findall(r"^Anonymous:\s+(\d+)", text, re.MULTILINE)[0])


if __name__ == "__main__":
    name, *folders = sys.argv[1:]
    print(json.dumps(PEERS[name](*map(Path, folders))))
