"""A checkpoint: full weights of a base or a composed model, known from its headers.

config.json
model.safetensors                                     one file, or
model.safetensors.index.json + model-0000i-of-n       shards, each tensor in exactly one of them, or
NAME.gguf                                             llama.cpp's, beside the config.json of the same model, or alone

A quantised checkpoint stores several tensors a layer; `tensors` has one float tensor for them (composer.quantised).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.admission import refuse_pickles, refuse_remote_code
from composer.errors import CorruptFileError, NotFoundError, UnsupportedQuantisationError
from composer.files import FileSet, folder_files, read_json
from composer.gguf import read_gguf
from composer.gguf_config import build_config, check_rope_frequencies
from composer.quantised import QuantisedTensor, Scheme, find_scheme, logical_tensors
from composer.tensors import SafetensorsHeader, TensorSpec, read_header

__all__ = ["Checkpoint", "Shard", "open_checkpoint"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of a checkpoint; `tensors` are the logical ones that a composition writes to its place."""

    name: str
    header: SafetensorsHeader
    tensors: dict[str, TensorSpec | QuantisedTensor]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Full weights, opened by their headers only. `scheme` is how they are quantised, where they are and it is read."""

    files: FileSet
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorSpec | QuantisedTensor]
    scheme: Scheme | None = None

    @property
    def stored(self) -> dict[str, TensorSpec]:
        """The tensors as they lie in the files: what a fingerprint covers."""
        return {name: spec for shard in self.shards for name, spec in shard.header.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of weights, as stored."""
        return sum(spec.nbytes for spec in self.stored.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape: all that compatibility needs."""
        return {name: spec.shape for name, spec in self.tensors.items()}

    @property
    def architecture(self) -> str:
        """The class named by the config, such as LlamaForCausalLM."""
        return (self.config.get("architectures") or [self.config.get("model_type") or "unknown"])[0]

    @property
    def sharded(self) -> bool:
        """Whether the weights lie in more than one file, under an index."""
        return INDEX in self.files


def open_checkpoint(source: Path | FileSet) -> Checkpoint:
    """Open a folder (or a mapping of file names to paths) as a checkpoint, reading headers only.

    Of a quantised one the few bytes that describe each layer are read too. A quantisation that cannot be decoded is no
    error here, so that such a base can be catalogued: its tensors are the stored ones, and a plan refuses it.

    Raises NotFoundError (no config, no weights, missing shard), UnsafeFormatError (pickle, remote code) or
    CorruptFileError (bad safetensors, index and shards disagree, a quantised layer is not whole).
    """
    files = folder_files(source) if isinstance(source, Path) else source
    where = str(source) if isinstance(source, Path) else "the checkpoint"
    gguf = _gguf_name(files)
    if "config.json" not in files and gguf is None:
        adapter = "adapter_config.json" in files
        raise NotFoundError(
            f"{where} has no config.json",
            expected="config.json and model.safetensors of a base model",
            found="an adapter (adapter_config.json)" if adapter else ", ".join(list(files)[:8]) or "an empty folder",
            remedy="give the adapter to 'registry publish'" if adapter else "give a folder saved by save_pretrained",
        )
    config = read_json(files["config.json"]) if "config.json" in files else None
    if gguf:
        headers, config = _open_gguf(files[gguf], config)
    assert config is not None
    _check_config(config)
    refuse_remote_code("config.json", config)
    if not gguf:
        headers = {name: read_header(files[name]) for name in _shard_names(files, where)}
    stored: dict[str, TensorSpec] = {}
    for shard, header in headers.items():
        for name, spec in header.tensors.items():
            if name in stored:
                raise CorruptFileError(
                    f"{name} lies in two shards",
                    expected="each tensor once",
                    found=[stored[name].path.name, shard],
                )
            stored[name] = spec
    if INDEX in files:
        _check_index(files, stored, {shard: set(header.tensors) for shard, header in headers.items()})
    try:
        scheme = find_scheme(config)
    except UnsupportedQuantisationError:
        scheme = None
    tensors = logical_tensors(scheme, config, stored) if scheme else dict(stored)
    return Checkpoint(files, config, _shards(headers, tensors), tensors, scheme)


def _gguf_name(files: FileSet) -> str | None:
    """The one .gguf of a folder without safetensors."""
    found = [name for name in files if name.endswith(".gguf")]
    if not found or SINGLE in files or INDEX in files or "adapter_config.json" in files:
        return None
    if len(found) > 1:
        raise NotFoundError(
            f"{len(found)} GGUF files lie here: {', '.join(found[:3])}",
            expected="one .gguf",
            found=found,
            remedy="give each its own folder with config.json; join a split one with llama-gguf-split --merge",
        )
    return found[0]


def _open_gguf(path: Path, config: dict[str, Any] | None) -> tuple[dict[str, SafetensorsHeader], dict[str, Any]]:
    """The header under the name that a composition writes, and the config with what the file says of itself.

    Raises CorruptFileError when config.json is another model's, UnsupportedQuantisationError when there is none and
    none can be built.
    """
    from composer.quantised.gguf import ARCHITECTURES, describe

    header, metadata = read_gguf(path)
    said = describe(metadata, header.tensors)
    if config is None:
        config = build_config(metadata, header.tensors)
    check_rope_frequencies(config, header.tensors)
    heads = config.get("num_attention_heads")
    expected = {
        "quantization_config": None,
        "model_type": ARCHITECTURES.get(said["architecture"]),
        "num_attention_heads": said["heads"],
        "num_key_value_heads": said["kv_heads"],
        "hidden_size": metadata.get(f"{said['architecture']}.embedding_length"),
        "num_hidden_layers": metadata.get(f"{said['architecture']}.block_count"),
    }
    for field, wanted in expected.items():
        found = config.get(field, heads if field == "num_key_value_heads" else None)
        fits = found in wanted if isinstance(wanted, tuple) else found == wanted
        if not fits and not (wanted is None and field != "quantization_config"):
            raise CorruptFileError(
                f"config.json is not the one of {path.name}: {field} is {found!r}, expected {wanted!r}",
                expected=wanted,
                found=found,
                remedy="put the config.json of the model that was converted beside the .gguf",
            )
    return {SINGLE: header}, {**config, "quantization_config": said}


def _shards(
    headers: dict[str, SafetensorsHeader], tensors: dict[str, TensorSpec | QuantisedTensor]
) -> tuple[Shard, ...]:
    """The logical tensors by shard, in the order in which they lie there: a decoded one where its first part does."""
    places = {tensor.parts[0].name if isinstance(tensor, QuantisedTensor) else name: tensor
              for name, tensor in tensors.items()}  # fmt: skip
    return tuple(
        Shard(shard, header, {places[name].name: places[name] for name in header.tensors if name in places})
        for shard, header in headers.items()
    )


def _check_config(config: dict[str, Any]) -> None:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        field, expected = "architectures", "a list of class names"
    elif not isinstance(config.get("model_type") or "", str):
        field, expected = "model_type", "a name of the transformers library"
    else:
        return
    raise CorruptFileError(
        f"config.json: {field} is not {expected}",
        expected=expected,
        found=config[field],
        remedy="fetch config.json again, or save the model anew with save_pretrained",
    )


def _shard_names(files: FileSet, where: str) -> list[str]:
    if INDEX in files:
        weight_map = read_json(files[INDEX]).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CorruptFileError(f"{INDEX} has no weight_map", expected="a map from tensor to file", found=weight_map)
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if name not in files]
        if missing:
            raise NotFoundError(
                f"{where} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:3])}",
                expected=names,
                found=[name for name in names if name in files],
                remedy="fetch the missing files",
            )
        return names
    if SINGLE in files:
        return [SINGLE]
    refuse_pickles(files, SINGLE)
    raise NotFoundError(
        f"{where} has no weights",
        expected=f"{SINGLE} or {INDEX}",
        found=", ".join(list(files)[:8]),
        remedy="save the model with save_pretrained(safe_serialization=True)",
    )


def _check_index(files: FileSet, tensors: dict[str, TensorSpec], shards: dict[str, set[str]]) -> None:
    weight_map = read_json(files[INDEX])["weight_map"]
    wrong = sorted(name for name, shard in weight_map.items() if name not in shards[shard])
    extra = sorted(set(tensors) - set(weight_map))
    if wrong or extra:
        raise CorruptFileError(
            f"{INDEX} and the shards disagree on {len(wrong) + len(extra)} tensors: {', '.join((wrong + extra)[:3])}",
            expected="every tensor of the shards in the index, and the reverse",
            found={"not in the shard named": wrong[:20], "not in the index": extra[:20]},
            remedy="fetch the checkpoint again, or save it anew",
        )
