"""Run a model with the bottleneck adapters that lie beside its weights, by forward hooks in transformers.

    model = load("composed")                     the class that config.json names, with its bottlenecks attached
    handle = attach(model, "composed")           the same for a model that is loaded already; handle.remove() undoes it

    bottlenecks.json         where each network stands, what it reads and what it keeps
    bottlenecks.safetensors  its tensors

Needs torch, transformers and safetensors, nothing else of this project: the file may be copied beside a server.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers.activations import get_activation

__all__ = ["Handle", "attach", "load"]

FORMAT = "bottlenecks/1"
EPSILON = 1e-5


def load(folder: str | Path, **options: Any) -> torch.nn.Module:
    """The model in `folder` in eval mode, its bottlenecks attached.

    options: of transformers' from_pretrained, such as dtype.
    Raises ValueError where config.json names no class of transformers, and what `attach` raises.
    """
    import transformers

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    names = config.get("architectures") or []
    cls = getattr(transformers, names[0], None) if len(names) == 1 else None
    if cls is None:
        raise ValueError(f"config.json names {names}, expected one model class of transformers")
    model = cls.from_pretrained(folder, local_files_only=True, use_safetensors=True, **options).eval()
    attach(model, folder)
    return model


def attach(model: torch.nn.Module, folder: str | Path) -> Handle:
    """Hook the bottlenecks in `folder` into `model`, in the model's dtype and on its device.

    Raises ValueError for a bottlenecks.json of another format, a module that the model lacks, or a tensor that is left.
    """
    folder = Path(folder)
    document = json.loads((folder / "bottlenecks.json").read_text(encoding="utf-8"))
    if document.get("format") != FORMAT:
        raise ValueError(f"bottlenecks.json has the format {document.get('format')!r}, expected {FORMAT!r}")
    tensors = load_file(folder / "bottlenecks.safetensors")
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "")
    sites = []
    for entry in document["sites"]:
        places = {part: _find(modules, prefix, entry[part]) for part in ("module", "stream", "norm") if entry[part]}
        sites.append((places, [_Network(network, tensors) for network in entry["networks"]]))
    if tensors:
        raise ValueError(f"no site uses {len(tensors)} tensors, such as {min(tensors)}")
    return Handle([hook for places, networks in sites for hook in _hook(places, networks)])


class Handle:
    """The hooks of one `attach`."""

    def __init__(self, hooks: list[Any]) -> None:
        self._hooks = hooks

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()


class _Network:
    """One network; its tensors follow the dtype and the device of what it is given."""

    def __init__(self, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.reads, self.keeps = entry["reads"], entry["keeps"]
        self.residual_inside, self.closes = entry["residual_inside"], entry["closes"]
        self._scaling = entry["scaling"]
        prefix = f"{entry['weights']}."
        own = [name for name in tensors if name.startswith(prefix)]
        self._tensors = {name.removeprefix(prefix): tensors.pop(name) for name in own}
        leaky = entry["activation"] == "leakyrelu"
        self._activation = functional.leaky_relu if leaky else get_activation(entry["activation"])

    def change(self, z: torch.Tensor) -> torch.Tensor:
        """scaling · up(activation(down(norm_before(z))))"""
        if self._tensors["down.weight"].dtype != z.dtype or self._tensors["down.weight"].device != z.device:
            self._tensors = {name: tensor.to(z.device, z.dtype) for name, tensor in self._tensors.items()}
        tensors = self._tensors
        z = self._norm(z, "norm_before")
        z = self._activation(functional.linear(z, tensors["down.weight"], tensors["down.bias"]))
        u = functional.linear(z, tensors["up.weight"], tensors["up.bias"]) * self._scaling
        return u * tensors["scaling"] if "scaling" in tensors else u

    def after(self, u: torch.Tensor) -> torch.Tensor:
        """norm_after(u), where there is one."""
        return self._norm(u, "norm_after")

    @property
    def has_norm_after(self) -> bool:
        return "norm_after.weight" in self._tensors

    def _norm(self, value: torch.Tensor, part: str) -> torch.Tensor:
        if f"{part}.weight" not in self._tensors:
            return value
        weight, bias = self._tensors[f"{part}.weight"], self._tensors[f"{part}.bias"]
        return functional.layer_norm(value, weight.shape, weight, bias, EPSILON)


def _hook(places: dict[str, torch.nn.Module], networks: list[_Network]) -> list[Any]:
    """The hooks of one site: keep x, change h, and put v in place of the norm's output where nothing closes it."""
    held = threading.local()
    norm = places.get("norm")

    def keep(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        held.x = args[0]

    def change(_module: torch.nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        changed = _flow(networks, output, held.__dict__.pop("x"), norm)
        if bare:
            held.v = changed
        return changed

    def replace(_module: torch.nn.Module, _args: Any, _output: torch.Tensor) -> torch.Tensor:
        return held.__dict__.pop("v")

    bare = norm is not None and not networks[-1].closes
    hooks = [places["stream"].register_forward_pre_hook(keep), places["module"].register_forward_hook(change)]
    return hooks + ([norm.register_forward_hook(replace)] if bare else [])


def _flow(networks: list[_Network], h: torch.Tensor, x: torch.Tensor, norm: Any) -> torch.Tensor:
    """What stands in place of h, so that the model's own addition of x (and its norm) gives what the networks mean.

    Without a norm the value is v + k·x, and k stays apart: the model adds x once itself, and 1 − 1 costs no rounding.
    """
    v, k = h, 0
    for network in networks:
        value = v + k * x if k else v
        z = {"output": value, "stream": x}.get(network.reads)
        if z is None:
            z = _layer_norm(norm, value + x) if norm is not None else value + x
        u, r, times = network.change(z), v, k
        if network.keeps == "sum":
            r = v + x
        elif network.keeps == "read" and network.reads == "sum":
            r, times = (z, 0) if norm is not None else (v, k + 1)
        if network.residual_inside and network.has_norm_after:
            v, k = network.after(u + (r + times * x if times else r)), 0
        else:
            v, k = network.after(u) + r, times
    if norm is None:
        k += int(networks[-1].closes) - 1
    return v + k * x if k else v


def _layer_norm(norm: Any, value: torch.Tensor) -> torch.Tensor:
    """The layer's norm without its hooks."""
    return functional.layer_norm(value, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _find(modules: dict[str, torch.nn.Module], prefix: str, name: str) -> torch.nn.Module:
    """A module by the name that the checkpoint has for it, with or without the prefix of the base model."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in modules:
            return modules[candidate]
    raise ValueError(f"the model has no module {name}")
