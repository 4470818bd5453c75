"""Load a checkpoint or a composed model as transformers does, in float32, with the bottlenecks that lie beside it.

What measures a model (its latency, its perplexity, its graph against torch) loads it here; nothing that merges does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from composer.bottlenecks import BUNDLE, Bottlenecks
from composer.errors import UnsupportedAdapterError, UnsupportedArchitectureError
from composer.exporters.onnx.skeleton import quiet
from composer.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_as", "load_model"]


def load_model(folder: Path) -> PreTrainedModel:
    """The model in eval mode, on the CPU.

    Raises NotFoundError (no config.json), UnsupportedArchitectureError (no one class of transformers, remote code, a
    quantised checkpoint) or UnsupportedAdapterError (additions that transformers would not see).
    """
    config = read_json(folder / "config.json")
    names = config.get("architectures") or []
    with quiet():
        import transformers

        cls = getattr(transformers, names[0], None) if len(names) == 1 and not config.get("auto_map") else None
        if cls is None or config.get("quantization_config"):
            raise UnsupportedArchitectureError(
                f"{folder}: transformers cannot load {', '.join(names) or 'a config without architectures'} as it is",
                expected="one model class of transformers, no remote code, weights that are not quantised",
                found="quantised weights" if cls is not None else names,
                remedy="compose the base without adapters: that writes it unquantised",
            )
        _refuse_unseen(folder)
        return load_as(cls, folder)


def load_as(cls: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """The weights in `folder` as one class of transformers, in float32 and eval mode, with its bottlenecks."""
    import torch

    model = cls.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True).eval()
    if (folder / BUNDLE).is_file():
        from composer.runtime.bottlenecks import attach

        attach(model, folder)
    return model


def _refuse_unseen(folder: Path) -> None:
    """Raise UnsupportedAdapterError where composition.json says that the weights are not all, besides bottlenecks."""
    path = folder / "composition.json"
    record = read_json(path) if path.is_file() else {}
    if record.get("recipe", {}).get("export") == "safetensors":
        return
    unseen = [item for item in record.get("additions", []) if item.get("family") != Bottlenecks.family]
    if unseen:
        raise UnsupportedAdapterError(
            f"{folder}: transformers does not see {unseen[0].get('ref')} by itself ({unseen[0].get('adds')})",
            expected="weights, and bottlenecks beside them",
            found=[item.get("ref") for item in unseen],
            remedy="run its graph (bench --runtime onnx); docs/additions.md shows how to run it in transformers",
        )
