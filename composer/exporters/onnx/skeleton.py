"""A transformers module that has every parameter and no weights: what a trace needs, in a few megabytes.

    config.json → module ─┬─ parameters of SMALL elements or more: one element, seen through stride 0
                          ├─ smaller parameters: real, distinct values
                          └─ buffers (rotary frequencies, position ids): the real ones; the graph carries them

Nothing here reads a weight file.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.exporters.onnx.architectures import Architecture
from composer.exporters.onnx.experts import separate_experts

if TYPE_CHECKING:
    import torch

__all__ = ["quiet", "weightless_module"]

# Parameters below this size get real, distinct values: the optimiser merges small initializers that are equal.
SMALL = 65536

BIAS = "final_logits_bias"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings and progress bars of torch and transformers, which nobody can act on here, off stderr."""
    # Importing torch resets the levels of its loggers, so it comes first.
    import torch  # noqa: F401
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "transformers", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.disable_progress_bar()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()


def weightless_module(folder: Path, architecture: Architecture) -> torch.nn.Module:
    """The module, in float32 and eval mode, whose large parameters take no memory; its buffers are real."""
    import torch
    import transformers
    from torch.overrides import TorchFunctionMode

    class NoStorage(TorchFunctionMode):
        """Large torch.empty gives a zero-stride tensor; initialising one does nothing. Local to this thread."""

        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            if name == "empty":
                shape = func(*args, **{**kwargs, "device": "meta"})
                if shape.dim() and shape.numel() >= SMALL:
                    return torch.zeros((), dtype=shape.dtype).expand(shape.shape)
            elif name.endswith("_") and not name.endswith("__"):
                target = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
                if target is not None and target.numel() >= SMALL and not any(target.stride()):
                    return target
            return func(*args, **kwargs)

    cls = getattr(transformers, architecture.name)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not isinstance(config, cls.config_class):
        raise TypeError(f"model_type {config.model_type!r} is not one of {cls.__name__}")
    # What from_pretrained chooses as well: some models have no scaled_dot_product_attention, or one without soft caps.
    attention = "sdpa" if cls._supports_sdpa else "eager"
    with NoStorage():
        module = cls._from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention)
        if architecture.experts:
            separate_experts(module, architecture.experts)
    _as_weights(module, architecture)
    persistent = {name for name, _ in module.named_buffers()} & set(module.state_dict())
    if persistent:
        raise TypeError(f"buffers stored in checkpoints are not supported: {', '.join(sorted(persistent))}")
    generator = torch.Generator().manual_seed(0)
    replaced: dict[int, torch.nn.Parameter] = {}
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in replaced:
                if parameter.numel() < SMALL:
                    value = torch.rand(parameter.shape, generator=generator) + 0.1
                else:
                    value = torch.zeros(()).expand(parameter.shape)
                # The old parameter is kept alive beside the new one, or its id could be given out again.
                replaced[id(parameter)] = torch.nn.Parameter(value, requires_grad=False)
                replaced[id(parameter)].original = parameter
            submodule._parameters[name] = replaced[id(parameter)]
    return module.eval()


def _as_weights(module: torch.nn.Module, architecture: Architecture) -> None:
    """BART's bias of the logits, a buffer that checkpoints store; and a head that only the config ties."""
    import torch

    bias = module._buffers.pop(BIAS, None)
    if bias is not None:
        module._parameters[BIAS] = torch.nn.Parameter(bias, requires_grad=False)
    if architecture.own_head:
        head = module.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.zeros(()).expand(head.weight.shape), requires_grad=False)
