"""Decode on a GPU with nothing copied between steps: a fixed cache, IO binding, and one CUDA graph replayed.

    registry compose smollm2+team/shout --dtype fp16 --compute fp16 --export onnx --flavour genai -o shout
    python examples/cuda.py shout "What is the opposite of hot?"
    python examples/cuda.py shout "…" --provider cpu           the same steps without a CUDA graph

The flavour genai attends by GroupQueryAttention, which writes new keys and values into the cache in place where past
and present are one buffer. So every step has the same shapes and addresses: ids [1, 1], a mask as long as the cache,
and the cache itself. ONNX Runtime captures such a step once and replays it. The prompt has another length and is not
captured.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from composer.errors import MissingDependencyError
from composer.exporters.onnx.session import CACHE_TYPES, PAST, PRESENT, PROVIDERS, require_runtime
from composer.running import open_runnable

OWN_GRAPH = "gpu_graph_id"  # of a run: -1 is not captured, any other number names a captured graph


class FixedDecoder:
    """One text in a cache of `longest` places on the device."""

    def __init__(self, path: Path, provider: str, longest: int) -> None:
        self.runtime, self.device, self.longest = require_runtime(), provider, longest
        wanted = PROVIDERS[provider]
        options = {"enable_cuda_graph": "1"} if provider == "cuda" else {}
        found = self.runtime.get_available_providers()
        if wanted in found:
            self.session = self.runtime.InferenceSession(str(path), providers=[(wanted, options)])
            found = self.session.get_providers()[:1]
        if wanted not in found:  # never the CPU in its place without a word
            raise MissingDependencyError(
                f"ONNX Runtime cannot use {wanted} here",
                expected=wanted,
                found=found,
                remedy="install the extra 'cuda' with CUDA and cuDNN",
            )
        self.caches = {
            item.name: self._empty([1, item.shape[1], longest, item.shape[3]], CACHE_TYPES[item.type][0])
            for item in self.session.get_inputs()
            if item.name.startswith(PAST)
        }
        self.mask = np.zeros((1, longest), np.int64)
        self.length = 0
        vocabulary = self.session.get_outputs()[0].shape[-1]
        self.step_logits = self._empty([1, 1, vocabulary], CACHE_TYPES["tensor(float)"][0])
        self.step_inputs = {name: self._put(np.zeros((1, 1), np.int64)) for name in ("input_ids", "position_ids")}
        self.step_inputs["attention_mask"] = self._put(self.mask)
        self.step_binding = self._bind(self.step_inputs, self.step_logits)

    def prefill(self, ids: list[int]) -> int:
        """Run the prompt; returns the most likely token after it."""
        count = len(ids)
        self.mask[:, :count] = 1
        self.length = count
        inputs = {
            "input_ids": self._put(np.array([ids], np.int64)),
            "position_ids": self._put(np.arange(count, dtype=np.int64)[None]),
            "attention_mask": self._put(self.mask[:, :count].copy()),
        }
        logits = self._empty([1, count, self.step_logits.shape()[2]], CACHE_TYPES["tensor(float)"][0])
        self._run(self._bind(inputs, logits), "-1")
        return int(logits.numpy()[0, -1].argmax())

    def step(self, token: int) -> int:
        """Run one token; returns the most likely one after it."""
        self.mask[0, self.length] = 1
        self.step_inputs["input_ids"].update_inplace(np.array([[token]], np.int64))
        self.step_inputs["position_ids"].update_inplace(np.array([[self.length]], np.int64))
        self.step_inputs["attention_mask"].update_inplace(self.mask)
        self.length += 1
        self._run(self.step_binding, "1")
        return int(self.step_logits.numpy()[0, 0].argmax())

    def _bind(self, inputs: dict[str, Any], logits: Any) -> Any:
        binding = self.session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("logits", logits)
        for name, value in self.caches.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace(PAST, PRESENT, 1), value)
        return binding

    def _run(self, binding: Any, graph: str) -> None:
        options = self.runtime.RunOptions()
        if self.device == "cuda":
            options.add_run_config_entry(OWN_GRAPH, graph)
        self.session.run_with_iobinding(binding, options)

    def _put(self, array: np.ndarray) -> Any:
        return self.runtime.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def _empty(self, shape: list[int], number: int) -> Any:
        return self.runtime.OrtValue.ortvalue_from_shape_and_type(shape, number, self.device, 0)


def decode(folder: Path, ids: list[int], count: int, provider: str, eos_ids: tuple[int, ...] = ()) -> list[int]:
    """The most likely `count` tokens after `ids`, or fewer where one of `eos_ids` comes."""
    decoder = FixedDecoder(folder / "model.onnx", provider, len(ids) + count)
    tokens = [decoder.prefill(ids)]
    while len(tokens) < count and tokens[-1] not in eos_ids:
        tokens.append(decoder.step(tokens[-1]))
    return tokens


def main() -> None:
    """Answer one prompt and say how fast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--provider", choices=PROVIDERS, default="cuda")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()
    runnable = open_runnable(args.folder)
    message = [{"role": "user", "content": args.prompt}]
    ids = runnable.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    started = time.perf_counter()
    tokens = decode(args.folder, ids, args.max_new_tokens, args.provider, runnable.eos_ids)
    seconds = time.perf_counter() - started
    print(runnable.tokenizer.decode(tokens, skip_special_tokens=True))
    print(f"{len(tokens)} tokens in {seconds:.2f} s, loading included", file=sys.stderr)


if __name__ == "__main__":
    main()
