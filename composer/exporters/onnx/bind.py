"""Point a weightless graph into the safetensors files of one checkpoint folder, without copying a weight.

    initializer 'model.norm.weight' → external_data {location: model.safetensors, offset, length}
    stored as BF16 or F16           → the same, and Cast(to=float32) before its readers

The names of the initializers become the checkpoint's own. A parameter without a tensor, and a tensor without a
parameter, are errors: nothing is skipped.
"""

from __future__ import annotations

import json
import mmap
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from composer.errors import OnnxExportError
from composer.exporters.onnx.trace import ALIASES, FAMILY, PREFIX, UNUSED
from composer.renames import module_names
from composer.tensors import TensorSpec, read_header

if TYPE_CHECKING:
    import onnx

__all__ = ["Bound", "bind", "own_head", "rename_inputs", "stored_tensors"]

# onnx.TensorProto's numbers for the dtypes that a weight may be stored in.
STORED = {"F32": 1, "F16": 10, "BF16": 16}
FLOAT32 = 1

# Buffers that some versions of transformers stored beside the weights; every graph carries its own.
NOT_WEIGHTS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|attn\.(bias|masked_bias)|embeddings\.(position_ids|token_type_ids)|(en|de)coder\.version"
    r"|EncDecAttention\.relative_attention_bias\.weight)$"  # of T5's first conversion, read by no version
)
# What transformers takes for zeros where a checkpoint has none.
ZERO_IF_ABSENT = frozenset({"final_logits_bias"})


@dataclass(frozen=True, slots=True)
class Bound:
    """A graph whose initializers lie in safetensors files, and what was found there.

    weight_dtype: the dtype that most bytes are stored in, such as ``bfloat16``.
    unused: tensors that the graph's output does not depend on (a pooler, when hidden states are asked for).
    """

    model: onnx.ModelProto
    weight_dtype: str
    unused: tuple[str, ...]


def stored_tensors(folder: Path) -> dict[str, tuple[str, TensorSpec]]:
    """Every tensor of the checkpoint: name → (file name inside the folder, where it lies in that file).

    Raises OnnxExportError when the folder holds no safetensors, the index disagrees with the files, or a file is a
    link out of the folder (ONNX Runtime refuses to follow one).
    """
    index = folder / "model.safetensors.index.json"
    weight_map: dict[str, str] | None = None
    if index.exists():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    else:
        files = ["model.safetensors"]
    tensors: dict[str, tuple[str, TensorSpec]] = {}
    for file in files:
        path = folder / file
        if Path(file).name != file or not path.is_file() or path.resolve().parent != folder.resolve():
            raise OnnxExportError(
                f"onnx: {file}: weights must be a file inside the exported folder",
                expected="a safetensors file beside config.json, not a link out of it",
                found=str(path.resolve()) if path.exists() else "missing",
                remedy="export into a folder that holds its own weights",
            )
        for name, spec in read_header(path).tensors.items():
            if name in tensors:
                raise OnnxExportError(f"onnx: {name} is stored in both {tensors[name][0]} and {file}", keys=[name])
            tensors[name] = (file, spec)
    if weight_map is not None and {name: file for name, (file, _) in tensors.items()} != weight_map:
        wrong = sorted(
            name for name in {*weight_map, *tensors} if tensors.get(name, ("",))[0] != weight_map.get(name, "")
        )
        raise OnnxExportError(f"onnx: {index.name} disagrees with its files on: {', '.join(wrong[:5])}", keys=wrong)
    return tensors


def bind(graph: onnx.ModelProto, folder: Path) -> Bound:
    """The graph with every weight pointing into `folder`; `graph` itself is changed.

    bfloat16 and float16 weights stay as they are stored and are cast to float32 inside the graph: the CPU provider
    has no bfloat16 MatMul, and float32 inputs, outputs and arithmetic are the same for every dtype. ONNX Runtime
    folds the casts when it loads the file.
    Raises OnnxExportError naming the keys that are missing, left over, of another shape or of another dtype.
    """
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    aliases: dict[str, list[str]] = json.loads(metadata[ALIASES])
    prefix, family = metadata[PREFIX], metadata[FAMILY]
    tensors = stored_tensors(folder)
    renamed = (module_names(family, tuple(tensors)) if family else None) or {}
    left = {name for name in tensors if not NOT_WEIGHTS.search(name)}
    sources, missing, absent, tied = {}, [], [], []
    for first, names in aliases.items():
        found = [key for name in names for key in _keys(name, prefix, renamed) if key in left]
        if not found:
            (absent if first in ZERO_IF_ABSENT else missing).append(first)
            continue
        sources[first] = found[0]
        left.difference_update(found)
        tied += [(found[0], other) for other in found[1:]]
    unused = [key for name in json.loads(metadata[UNUSED]) for key in _keys(name, prefix, renamed) if key in left]
    left.difference_update(unused)
    if missing or left:
        raise OnnxExportError(
            f"onnx: weights and graph disagree: {len(missing)} parameters without a tensor"
            f" ({', '.join(missing[:5]) or 'none'}), {len(left)} tensors without a parameter"
            f" ({', '.join(sorted(left)[:5]) or 'none'})",
            remedy="config.json and the weights must come from one model",
            missing=missing,
            unused=sorted(left),
        )
    for one, other in tied:
        if not _same_bytes(folder, tensors[one], tensors[other]):
            raise OnnxExportError(
                f"onnx: {one} and {other} are one parameter in this configuration, but differ in the weights",
                expected="equal bytes, or tie_word_embeddings = false",
                remedy="set tie_word_embeddings to false in config.json",
                keys=[one, other],
            )
    _fill_with_zeros(graph, absent)
    stored = _point(graph, sources, tensors)
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return Bound(graph, names[stored.most_common(1)[0][0]], tuple(unused))


def own_head(folder: Path) -> bool:
    """Whether an output head is stored beside a shared embedding that differs from it, whatever the config ties.

    transformers does not tie the two then either; the configs of the T5 family always say that they are tied.
    """
    tensors = stored_tensors(folder)
    head = tensors.get("lm_head.weight")
    shared = next((found for name, found in tensors.items() if name.endswith("shared.weight")), None)
    return head is not None and shared is not None and not _same_bytes(folder, head, shared)


def _fill_with_zeros(graph: onnx.ModelProto, names: Iterable[str]) -> None:
    import numpy as np
    from onnx import numpy_helper

    for initializer in graph.graph.initializer:
        if initializer.name in names:
            zeros = np.zeros(tuple(initializer.dims), np.float32)
            initializer.CopyFrom(numpy_helper.from_array(zeros, initializer.name))


def _point(graph: onnx.ModelProto, sources: dict[str, str], tensors: dict[str, tuple[str, TensorSpec]]) -> Counter[str]:
    """Rewrite the initializers in `sources` (parameter → key); returns the bytes stored in each dtype."""
    from onnx import TensorProto, helper

    stored: Counter[str] = Counter()
    renamed: dict[str, str] = {}
    casts = []
    for initializer in graph.graph.initializer:
        key = sources.get(initializer.name)
        if key is None:
            continue
        file, spec = tensors[key]
        if tuple(initializer.dims) != tuple(spec.shape):
            raise OnnxExportError(
                f"onnx: {key}: the graph expects {list(initializer.dims)}, the weights have {list(spec.shape)}",
                expected=list(initializer.dims),
                found=list(spec.shape),
                keys=[key],
            )
        if spec.dtype not in STORED:
            raise OnnxExportError(
                f"onnx: {key}: weights must be stored as one of {', '.join(STORED)}, not {spec.dtype}",
                expected=list(STORED),
                found=spec.dtype,
                keys=[key],
            )
        renamed[initializer.name] = key
        if spec.dtype != "F32":
            renamed[initializer.name] = f"{key}.float32"
            casts.append(helper.make_node("Cast", [key], [f"{key}.float32"], name=f"{key}.cast", to=FLOAT32))
        initializer.name = key
        initializer.data_type = STORED[spec.dtype]
        initializer.data_location = TensorProto.EXTERNAL
        del initializer.external_data[:]
        for field, value in (("location", file), ("offset", spec.offset), ("length", spec.nbytes)):
            initializer.external_data.add(key=field, value=str(value))
        stored[spec.dtype] += spec.nbytes
    rename_inputs(graph.graph.node, renamed)
    nodes = [*casts, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    kept = [info for info in graph.graph.value_info if info.name not in sources]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(kept)
    return stored


def rename_inputs(nodes: Iterable[onnx.NodeProto], renamed: Mapping[str, str]) -> None:
    """Have `nodes`, and those of graphs inside them, read other values."""
    for node in nodes:
        for position, name in enumerate(node.input):
            if name in renamed:
                node.input[position] = renamed[name]
        for attribute in node.attribute:
            rename_inputs(attribute.g.node, renamed)


def _keys(name: str, prefix: str, renamed: Mapping[str, str]) -> list[str]:
    """The keys that a checkpoint may store this parameter under, the module's own name first.

    renamed: what the checkpoint calls the parameters that its family names otherwise (see composer.renames).
    """
    keys = [name]
    if renamed.get(name, name) != name:
        keys.append(renamed[name])
    if prefix:
        keys.append(name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}")
    # BERT checkpoints converted from TensorFlow still say gamma and beta; transformers reads them too.
    for old, new in (("weight", "gamma"), ("bias", "beta")):
        keys += [f"{key.removesuffix(old)}{new}" for key in list(keys) if key.endswith(f"LayerNorm.{old}")]
    return keys


def _same_bytes(folder: Path, one: tuple[str, TensorSpec], other: tuple[str, TensorSpec]) -> bool:
    if (one[1].dtype, one[1].shape) != (other[1].dtype, other[1].shape):
        return False
    with (
        open(folder / one[0], "rb") as first,
        open(folder / other[0], "rb") as second,
        mmap.mmap(first.fileno(), 0, access=mmap.ACCESS_READ) as left,
        mmap.mmap(second.fileno(), 0, access=mmap.ACCESS_READ) as right,
    ):
        step, end = 1 << 24, one[1].nbytes
        return all(
            left[one[1].offset + at : one[1].offset + min(at + step, end)]
            == right[other[1].offset + at : other[1].offset + min(at + step, end)]
            for at in range(0, end, step)
        )
