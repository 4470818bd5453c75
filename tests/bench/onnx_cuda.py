"""The matrix of ONNX variants on a GPU against transformers on the same card: `python -m tests.bench.onnx_cuda`.

Without CUDA the same script runs on the CPU, and the columns of CUDA say "not measured". The model is SmolLM2-135M, as
the demo builds it, its weights stored as each graph computes. Tokens are decoded greedily after a random prompt, the KV
cache bound where the session computes; the difference is that of logits from torch in float32.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

UNKNOWN = "not measured"
VARIANTS = {
    "portable, fp32": ("portable", "float32"),
    "portable, fp16": ("portable", "float16"),
    "genai, fp32": ("genai", "float32"),
    "genai, fp16": ("genai", "float16"),
    "genai, bf16": ("genai", "bfloat16"),
}
ON_CUDA_ALONE = ("bfloat16",)


def store_as(model: Path, folder: Path, dtype: str) -> Path:
    """The model with its weights in another dtype, and its other files."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.onnx*", "*.safetensors"))
    tensors = load_file(model / "model.safetensors")
    cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(cast, folder / "model.safetensors", {"format": "pt"})
    return folder


def prompts(vocabulary: int, batch: int, length: int) -> np.ndarray:
    """int64 [batch, length], seeded."""
    return np.random.default_rng(0).integers(0, vocabulary, (batch, length))


def tokens_a_second(step: Callable[[np.ndarray | None], Any], batch: int, new: int) -> float:
    """Decode `new` tokens after a prefill and some steps that warm up."""
    token = step(None)
    for _ in range(3):
        token = step(token)
    started = time.perf_counter()
    for _ in range(new):
        token = step(token)
    np.asarray(token.cpu() if hasattr(token, "cpu") else token)  # what is queued on a device ends here
    return batch * new / (time.perf_counter() - started)


def of_graph(folder: Path, provider: Any, ids: np.ndarray, new: int) -> float:
    """A graph of the folder."""
    from composer.exporters.onnx.session import Decoder, most_likely, open_session

    decoder, mask = Decoder(open_session(folder / "model.onnx", provider)), np.ones_like(ids)

    def step(token: np.ndarray | None) -> np.ndarray:
        nonlocal mask
        if token is not None:
            mask = np.concatenate([mask, np.ones((len(ids), 1), np.int64)], axis=1)
        return most_likely(decoder.step(ids if token is None else token[:, None], mask))

    return tokens_a_second(step, len(ids), new)


def of_torch(folder: Path, dtype: str, ids: np.ndarray, new: int, *, compiled: bool) -> float:
    """The model in transformers on the GPU; compiled with a cache of fixed size, as its documentation has it."""
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).cuda().eval()
    prompt = torch.from_numpy(ids).cuda()
    cache: Any = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new + 8) if compiled else None
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if compiled else model.forward
    place = 0

    def step(token: Any) -> Any:
        nonlocal cache, place
        given = prompt if token is None else token[:, None]
        positions = torch.arange(place, place + given.shape[1], device="cuda")[None]
        place += given.shape[1]
        run = model.forward if token is None else forward
        with torch.inference_mode():
            out = run(input_ids=given, position_ids=positions, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        return out.logits[:, -1].argmax(-1).clone()

    return tokens_a_second(step, len(ids), new)


def difference(folder: Path, model: Path, provider: Any) -> float:
    """The largest difference of a logit from torch in float32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    from composer.exporters.onnx.session import forward, open_session

    ids = prompts(1000, 1, 24)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    found = forward(open_session(folder / "model.onnx", provider), ids, np.ones_like(ids))[0]
    return float(np.abs(found - expected).max())


@click.command()
@click.option("--work", default=Path(".bench/onnx"), show_default=True, type=click.Path(path_type=Path), help="Where.")
@click.option("--new", default=64, show_default=True, help="Tokens decoded in each row.")
@click.option("--prompt", default=32, show_default=True, help="Tokens of each prompt.")
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 8, 32), show_default=True)
def main(work: Path, new: int, prompt: int, batches: tuple[int, ...]) -> None:
    """Print the table."""
    import torch

    from composer.exporters.onnx import Variant, export_onnx
    from composer.exporters.onnx.session import require_runtime
    from tests.bench.onnx_peers import graph_cache_of

    model = (work / "smollm2").resolve()
    subprocess.run([sys.executable, "examples/build_base.py", "smollm2", model], check=True, stderr=subprocess.DEVNULL)
    cuda = "CUDAExecutionProvider" in require_runtime().get_available_providers() and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "no CUDA"
    print(f"SmolLM2-135M, {device}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before it started\n")
    print("| graph | batch | logits differ by | CPU, tokens/s | CUDA | torch eager, CUDA | torch.compile, CUDA |")
    print("|---|---|---|---|---|---|---|")
    for name, (flavour, dtype) in VARIANTS.items():
        folder = store_as(model, work.resolve() / name.replace(", ", "-cuda-"), dtype)
        export_onnx(folder, cache_dir=graph_cache_of(model), variant=Variant(flavour, dtype))
        here = "cuda" if cuda else "cpu"
        runs_here = cuda or dtype not in ON_CUDA_ALONE
        off = f"{difference(folder, model, here):.2g} ({here})" if runs_here else UNKNOWN
        for batch in batches:
            ids = prompts(1000, batch, prompt)
            on_cpu = dtype not in ON_CUDA_ALONE
            cells = [
                f"{of_graph(folder, 'cpu', ids, new):.1f}" if on_cpu else "does not run",
                f"{of_graph(folder, 'cuda', ids, new):.1f}" if cuda else UNKNOWN,
                f"{of_torch(folder, dtype, ids, new, compiled=False):.1f}" if cuda else UNKNOWN,
                f"{of_torch(folder, dtype, ids, new, compiled=True):.1f}" if cuda else UNKNOWN,
            ]
            print(f"| {name} | {batch} | {off} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
