"""GGUF, as llama.cpp writes it: the tensors of llama, qwen2 and qwen3 under the names that transformers has for them.

    blk.N.attn_q.weight     Q4_K and the like [out, in]  ─►  model.layers.N.self_attn.q_proj.weight  F32 [out, in]
    output_norm.weight      F32 [in]                     ─►  model.norm.weight                       F32 [in]

Of the llama architecture, llama.cpp interleaves the two halves of each rotary head of q and k (row 2i + j of a head is
row j·d/2 + i of transformers): that is undone. The blocks are decoded by the gguf package. Sources: gguf-py's
tensor_mapping.py; LlamaModel.permute of convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.gguf import PLAIN, GgufSpec
from composer.gguf_config import ROPE_FREQUENCIES
from composer.quantised import Decoder, corrupt, refuse, scheme
from composer.tensors import DTYPES, TensorSpec

__all__ = ["Gguf", "GgufTensor", "describe"]

# model_type of config.json by general.architecture; Mistral is a llama to llama.cpp.
ARCHITECTURES = {"llama": ("llama", "mistral"), "qwen2": ("qwen2",), "qwen3": ("qwen3",)}
TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS",
)  # fmt: skip
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
MODULES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
LAYER = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")


def describe(metadata: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """What stands in for a quantization_config: a GGUF file says in its metadata how it is to be read."""
    architecture = metadata.get("general.architecture")
    heads = metadata.get(f"{architecture}.attention.head_count")
    return {
        "quant_method": "gguf",
        "architecture": architecture,
        "heads": heads,
        "kv_heads": metadata.get(f"{architecture}.attention.head_count_kv", heads),
        "types": sorted({spec.ggml for spec in stored.values() if isinstance(spec, GgufSpec)}),
        "splits": metadata.get("split.count", 1),
    }


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor; `heads` is how many heads its rows are interleaved in, 0 where they are as transformers has them."""

    name: str
    stored: GgufSpec
    heads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.logical

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return (self.stored,)

    def rows(self, start: int, stop: int) -> np.ndarray:
        if not self.heads:
            return self._read(start, stop)
        height = self.shape[0] // self.heads
        first, last = start // height * height, -(-stop // height) * height
        wanted = np.arange(start, stop)
        head, row = wanted // height * height, wanted % height
        half = height // 2
        return self._read(first, last)[head - first + 2 * (row % half) + row // half]

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Rows as they lie in the file, float32 [stop - start, numbers a row]."""
        width = self.stored.nbytes // self.shape[0]
        raw = np.frombuffer(self.stored.read_bytes(start * width, stop * width), np.uint8)
        if self.stored.ggml in PLAIN:
            values = raw.view(DTYPES[self.stored.dtype]).astype(np.float32)
        else:
            import gguf

            # A block whose scale is not finite decodes to NaN or infinity, which the merge refuses by name.
            with np.errstate(over="ignore", invalid="ignore"):
                kind = gguf.GGMLQuantizationType[self.stored.ggml]
                values = gguf.dequantize(raw.reshape(-1, self.stored.shape[-1]), kind)
        return values.reshape(stop - start, math.prod(self.shape[1:]))


@scheme
class Gguf:
    """A folder whose weights are one .gguf file."""

    name = "gguf"
    ignored = (ROPE_FREQUENCIES,)  # checked against the config when the file is opened

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "gguf"

    def check(self, config: Mapping[str, Any]) -> None:
        if config.get("architecture") not in ARCHITECTURES:
            found = config.get("architecture")
            raise refuse(f"gguf: the architecture {found!r} is not read", expected=sorted(ARCHITECTURES), found=found)
        unknown = [kind for kind in config.get("types", ()) if kind not in TYPES]
        if unknown:
            raise refuse(f"gguf: the type {unknown[0]} cannot be decoded", expected=list(TYPES), found=unknown)
        if config.get("splits", 1) not in (0, 1):
            raise refuse("gguf: the file is one of several", expected="one file", found=config["splits"])

    def decoders(self, config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> list[Decoder]:
        return [
            _decoder(config, spec)
            for spec in stored.values()
            if isinstance(spec, GgufSpec) and spec.name not in self.ignored
        ]


def _decoder(config: Mapping[str, Any], spec: GgufSpec) -> GgufTensor:
    module, _, kind = spec.name.rpartition(".")
    if module in ENDS and kind == "weight":
        name, heads = f"{ENDS[module]}.weight", 0
    elif (found := LAYER.fullmatch(spec.name)) and found[2] in MODULES:
        name = f"model.layers.{int(found[1])}.{MODULES[found[2]]}.{found[3]}"
        heads = _interleaved(config, found[2])
    else:
        raise refuse(f"gguf: {spec.name} has no place in this architecture", found=spec.name, expected=sorted(MODULES))
    if spec.dtype == "U8" and len(spec.logical) == 1:
        raise corrupt(spec.name, "a vector of F32", spec.ggml)
    if heads and spec.logical[0] % (2 * heads):
        raise corrupt(spec.name, f"an even number of rows for each of {heads} heads", spec.logical[0])
    return GgufTensor(name, spec, heads)


def _interleaved(config: Mapping[str, Any], module: str) -> int:
    if config["architecture"] != "llama" or module not in ("attn_q", "attn_k"):
        return 0
    field = "heads" if module == "attn_q" else "kv_heads"
    heads = config.get(field)
    if type(heads) is not int or heads < 1:
        raise corrupt(module, f"{field} in the metadata", heads)
    return heads
