"""Small tools of the tests: write files byte by byte, save adapters without PEFT, compose folders, read them back."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from composer.adapters import open_adapter
from composer.checkpoint import open_checkpoint
from composer.plan import Plan, Term, make_plan
from composer.recipe import AdapterTerm, Dtype, Export, Placement, Recipe
from composer.run import Outcome, compose
from composer.tensors import DTYPES, encode_header, read_header

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    """A valid safetensors file with the tensors in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = [(name, NAMES[array.dtype], array.shape) for name, array in tensors.items()]
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(encode_header(layout, metadata or {}) + data)
    return path


def write_raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file that need not be valid: `header` is bytes or becomes JSON, `length` may lie."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body + data)
    return path


def write_base(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    """A checkpoint of one file with any tensors."""
    write_tensors(folder / "model.safetensors", tensors)
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, **config}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def write_lora(
    folder: Path,
    modules: Mapping[str, tuple[int, int]],
    *,
    rank: int = 2,
    seed: int = 0,
    std: float = 0.1,
    extra: Mapping[str, np.ndarray] | None = None,
    **config: Any,
) -> Path:
    """A LoRA in PEFT's format, without PEFT: `modules` maps names to (out, in)."""
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for module, (rows, columns) in modules.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = random.normal(0, std, (rank, columns)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = random.normal(0, std, (rows, rank)).astype(np.float32)
    write_tensors(folder / "adapter_model.safetensors", {**tensors, **(extra or {})}, {"format": "pt"})
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "somewhere", **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def add_words(folder: Path, count: int) -> Path:
    """Give a base a tokenizer of `count` words, w0 is 0, w1 is 1, …; the last stands for all that are unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    unknown = f"w{count - 1}"
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(count)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown).save_pretrained(folder)
    return folder


def plan_folders(
    base: Path,
    adapters: Iterable[tuple[Path, float]] = (),
    *,
    dtype: Dtype = Dtype.KEEP,
    method: str = "linear",
    export: Export = Export.SAFETENSORS,
    task: int | None = None,
    untie: bool = False,
    placement: Placement = Placement.MERGED,
) -> Plan:
    """The plan of adapters with weights on a base, each labelled by its folder's name."""
    terms = [Term(path.name, open_adapter(path), weight, task=task) for path, weight in adapters]
    recipe = Recipe(
        base=base.name,
        adapters=tuple(AdapterTerm(ref=term.label, weight=term.weight) for term in terms),
        dtype=dtype,
        method=method,
        export=export,
        untie=untie,
        placement=placement,
    )
    return make_plan(recipe, open_checkpoint(base), terms)


def compose_folders(
    base: Path, adapters: Iterable[tuple[Path, float]], out: Path, *, dtype: Dtype = Dtype.KEEP, untie: bool = False
) -> Outcome:
    """Compose into `out`."""
    return compose(plan_folders(base, adapters, dtype=dtype, untie=untie), out)


def flip(path: Path, at: int) -> None:
    """Change one bit, and put the times back, as a disk does that loses one."""
    stat = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def read_tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint by the reference reader, as torch tensors."""
    from safetensors.torch import load_file

    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


def weight_bytes(folder: Path) -> dict[str, bytes]:
    """The weight files of a folder, whole."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def reshard(base: Path, folder: Path, shards: int = 3, *, names: list[str] | None = None) -> Path:
    """A copy of a checkpoint in several files under an index, tensors dealt out in the order of `names`."""
    tensors = {name: spec.read() for name, spec in read_header(base / "model.safetensors").tensors.items()}
    order = names or sorted(tensors)
    weight_map: dict[str, str] = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in order[index::shards]}
        write_tensors(folder / file, part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in base.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder
