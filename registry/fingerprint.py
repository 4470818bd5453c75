"""What makes two base models the same: the versioned scheme ``wf1``.

    leaf          sha256(json [name, dtype, shape, sha256(bytes)])           one a tensor, stored
    tensor root   sha256 over the leaves sorted by name                      files, shards and order do not matter
    value root    the same over values rounded to bf16, without the dtype    a cast to bf16 does not matter
    layout        sha256(json of the sorted [name, dtype, shape])
    config        sha256(json of the config fields that change behaviour)
    fingerprint   wf1:sha256(json [tensor root, config])                     "the weights it was trained on"

Tied weights are normalised first: an output head that holds the same bytes as the input embedding is left out, and
whether the two are tied is then a fact of the tensors, not of the config. Tokenizer and chat template are hashed
apart: they matter to the user, not to the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.checkpoint import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, Checkpoint
from composer.files import FileSet, sha256_file
from composer.quantised import QuantisedTensor
from composer.tensors import DTYPES, TensorSpec

__all__ = ["Fingerprint", "TensorLeaf", "behaviour_config", "fingerprint_checkpoint", "logical_leaves"]

SCHEME = "wf1"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
CHAT_TEMPLATE = "chat_template.jinja"
NOT_BEHAVIOUR = frozenset(
    {
        "_name_or_path", "_attn_implementation", "_commit_hash", "transformers_version", "torch_dtype", "dtype",
        "use_cache", "output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing",
        "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params",
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id",
        "decoder_start_token_id", "initializer_range", "initializer_factor", "pretraining_tp",
        "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout",
        "classifier_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "activation_dropout", "max_length",
        "tie_word_embeddings", "torchscript", "is_llama_config",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorLeaf:
    """One tensor's contribution; digests are 64 hex digits."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    value_digest: str


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """All digests of a checkpoint, hex without prefix unless said otherwise."""

    tensor_root: str
    value_root: str
    layout: str
    config: str
    tokenizer: str | None
    chat_template: str | None
    leaves: tuple[TensorLeaf, ...]

    @property
    def identity(self) -> str:
        """``wf1:<64 hex>``: equal if and only if weights and behaviour are."""
        return identity(self.tensor_root, self.config)


def identity(tensor_root: str, config_digest: str) -> str:
    """The fingerprint of a base with these weights and this behaviour, as it is registered."""
    return f"{SCHEME}:{_hash([tensor_root, config_digest])}"


def fingerprint_checkpoint(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None, threads: int | None = None
) -> Fingerprint:
    """Hash every tensor, in parallel. progress: called with (bytes done, bytes in all).

    The result does not depend on files, shards, tensor order, metadata or the number of threads.
    """
    specs = sorted(checkpoint.stored.values(), key=lambda spec: -spec.nbytes)
    leaves: dict[str, TensorLeaf] = {}
    done = 0
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        futures = {pool.submit(_leaf, spec): spec for spec in specs}
        try:
            for future in as_completed(futures):
                leaf = future.result()
                leaves[leaf.name] = leaf
                done += futures[future].nbytes
                if progress:
                    progress(done, checkpoint.nbytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    kept, head_is_tied = _untie(leaves)
    ordered = tuple(kept[name] for name in sorted(kept))
    return Fingerprint(
        tensor_root=_hash([_hash([leaf.name, leaf.dtype, leaf.shape, leaf.digest]) for leaf in ordered]),
        value_root=_hash([_hash([leaf.name, leaf.shape, leaf.value_digest]) for leaf in ordered]),
        layout=_hash([[leaf.name, leaf.dtype, leaf.shape] for leaf in ordered]),
        config=_hash(
            {**behaviour_config(checkpoint.config), "tied": head_is_tied or _tied_by_config(checkpoint, kept)}
        ),
        tokenizer=_tokenizer_digest(checkpoint.files),
        chat_template=_chat_template_digest(checkpoint.files),
        leaves=ordered,
    )


def logical_leaves(checkpoint: Checkpoint, fingerprint: Fingerprint) -> tuple[TensorLeaf, ...]:
    """The leaves by logical tensor, sorted by name: a quantised layer has one, with the shape that it decodes to.

    These are what adapters bind to and what two bases are compared by; the fingerprint itself covers the stored ones.
    """
    leaves = {leaf.name: leaf for leaf in fingerprint.leaves}
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, QuantisedTensor):
            names = sorted(part.name for part in tensor.parts if part.name in leaves)
            parts = [leaves.pop(part) for part in names]
            if parts:  # none are left of an output head that repeats the input embedding
                bits = _hash([[part.name, part.digest] for part in parts])
                values = _hash([[part.name, part.value_digest] for part in parts])
                leaves[name] = TensorLeaf(name, tensor.dtype, tensor.shape, bits, values)
    return tuple(leaves[name] for name in sorted(leaves) if name in checkpoint.tensors)


def behaviour_config(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that change what the model computes, in one canonical form.

    Rotary settings are gathered under rope_parameters whichever generation of transformers wrote them; numbers are
    rounded to float32, because formats such as GGUF keep no more.
    """
    kept = {key: _canonical(value) for key, value in config.items() if key not in NOT_BEHAVIOUR and value is not None}
    rope = dict(kept.pop("rope_parameters", None) or {})
    rope |= kept.pop("rope_scaling", None) or {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in kept:
            rope.setdefault(key, kept.pop(key))
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    if rope:
        kept["rope_parameters"] = {"rope_type": "default", **rope}
    return kept


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return behaviour_config(value) if "model_type" in value else {k: _canonical(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(np.float32(value))
    return value


def _leaf(spec: TensorSpec) -> TensorLeaf:
    bits, values = hashlib.sha256(), hashlib.sha256()
    dtype = DTYPES[spec.dtype]
    rounds = spec.dtype in ("F16", "F32", "F64")
    for chunk in spec.chunks():
        bits.update(chunk)
        if rounds:
            with np.errstate(over="ignore", invalid="ignore"):
                values.update(np.frombuffer(chunk, dtype).astype(DTYPES["BF16"]).view(np.uint8))
    digest = bits.hexdigest()
    return TensorLeaf(spec.name, spec.dtype, spec.shape, digest, values.hexdigest() if rounds else digest)


def _untie(leaves: dict[str, TensorLeaf]) -> tuple[dict[str, TensorLeaf], bool]:
    """The leaves without an output head that repeats the input embedding, and whether there was one."""
    heads = [name for name in leaves if name.endswith(OUTPUT_EMBEDDINGS)]
    embeddings = {leaf.digest for name, leaf in leaves.items() if name.endswith(INPUT_EMBEDDINGS)}
    repeated = {name for name in heads if leaves[name].digest in embeddings}
    return {name: leaf for name, leaf in leaves.items() if name not in repeated}, bool(repeated)


def _tied_by_config(checkpoint: Checkpoint, leaves: dict[str, TensorLeaf]) -> bool:
    has_head = any(name.endswith(OUTPUT_EMBEDDINGS) for name in leaves)
    return bool(checkpoint.config.get("tie_word_embeddings", False)) if has_head else True


def _tokenizer_digest(files: FileSet) -> str | None:
    found = {name: sha256_file(files[name]) for name in TOKENIZER_FILES if name in files}
    # The fast tokenizer's one file holds all that the others do.
    if "tokenizer.json" in found:
        return found["tokenizer.json"]
    return _hash(found) if found else None


def _chat_template_digest(files: FileSet) -> str | None:
    if CHAT_TEMPLATE in files:
        return sha256_file(files[CHAT_TEMPLATE])
    if "tokenizer_config.json" in files:
        from composer.files import read_json

        template = read_json(files["tokenizer_config.json"]).get("chat_template")
        if isinstance(template, str):
            return hashlib.sha256(template.encode()).hexdigest()
        return _hash(template) if template else None
    return None


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
