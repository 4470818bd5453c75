"""Bottlenecks of AdapterHub's library: Houlsby, Pfeiffer, parallel and their kin (adapters/methods/modeling.py).

<holder>.adapter_down.0.weight [r, d], .bias [r]     .1. after a norm, which is both .0. and adapter_norm_before
<holder>.adapter_up.weight     [d, r], .bias [d]     h + scaling · up(f(down(h))); variants in composer.bottlenecks
<holder>.adapter_norm_after    .weight [d], .bias    where ln_after is set
<holder>.scaling               [1] or [d]            where scaling is "learned" or "channel"

No weight of the base can hold a nonlinearity, so there is nothing to merge: the networks stay beside the weights, and
run in the graph (ONNX) or by hooks (composer.runtime.bottlenecks). A module has 2dr + d + r parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from composer.adapters import ANY_SIZE, Signature, Target, adapter_kind, refuse
from composer.adapters._common import check_floats, damaged
from composer.additions import Addition
from composer.bottlenecks import ACTIVATIONS, Bottleneck, Bottlenecks, Network, Site
from composer.deltas import Delta
from composer.formats.adapterhub import BOTTLENECK
from composer.sublayers import Sublayer, find_sublayer
from composer.tensors import SafetensorsHeader, TensorSpec

__all__ = ["BottleneckKind"]

# The library's defaults for what a config of an older version does not say.
DEFAULTS: dict[str, Any] = {
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "scaling": 1.0,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
}
SWITCHES = ("original_ln_before", "original_ln_after", "ln_before", "ln_after", "is_parallel",
            "adapter_residual_before_ln")  # fmt: skip
REFUSED = {
    "phm_layer": "Compacter's Kronecker products (phm_layer)",
    "use_gating": "a gate, which depends on the whole sequence and so not on a token at a time (use_gating)",
    "inv_adapter": "invertible adapters after the embedding (inv_adapter)",
}
PARTS = {
    "adapter_up.weight": "up.weight",
    "adapter_up.bias": "up.bias",
    "scaling": "scaling",
    "adapter_norm_after.weight": "norm_after.weight",
    "adapter_norm_after.bias": "norm_after.bias",
}
NORM_BEFORE = {
    "adapter_norm_before.weight": "norm_before.weight",
    "adapter_norm_before.bias": "norm_before.bias",
    "adapter_down.0.weight": "norm_before.weight",
    "adapter_down.0.bias": "norm_before.bias",
    "adapter_down.1.weight": "down.weight",
    "adapter_down.1.bias": "down.bias",
}
SECOND_NAMES = {f"adapter_down.0.{part}": f"adapter_norm_before.{part}" for part in ("weight", "bias")}
PLAIN = {"adapter_down.0.weight": "down.weight", "adapter_down.0.bias": "down.bias"}


@adapter_kind
class BottleneckKind:
    """Small networks at the ends of sublayers; it is AdapterHub's kind, not one of PEFT's."""

    name = "bottleneck"
    peft_types = (BOTTLENECK,)

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise UnsupportedAdapterError for variants that are not read, CorruptFileError for sizes that disagree.

        Raises UnsupportedArchitectureError where it is not known where the model's sublayers end.
        """
        check_floats(header)
        _check_config(config)
        for holder, tensors in _holders(config, header).items():
            sublayer = _sublayer(config, holder)
            _check_shapes(config, holder, tensors)
            if _adds_before_no_norm(config, sublayer):
                raise refuse(
                    "residual_before_ln='post_add' has no meaning: no norm of the layer comes before the bottleneck",
                    expected="true or false",
                    found="post_add",
                    remedy="the library itself cannot run it: train it with another residual",
                )

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """The last linear weight of each sublayer with a bottleneck, of which one size is known."""
        targets, ranks, modules = [], set(), set()
        holders = _holders(config, header)
        for holder, tensors in holders.items():
            sublayer = _sublayer(config, holder)
            rank, size = tensors["down.weight"].shape
            shape = (ANY_SIZE, size) if sublayer.transposed else (size, ANY_SIZE)
            targets.append(Target(sublayer.weight, shape))
            ranks.add(rank)
            modules.add(".".join(sublayer.module.split(".")[-2:]))
        return Signature(
            kind=self.name,
            targets=tuple(targets),
            parameters=sum(math.prod(spec.shape) for tensors in holders.values() for spec in tensors.values()),
            rank=max(ranks),
            target_modules=tuple(sorted(modules)),
        )

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """None: a bottleneck changes no weight."""
        return []

    def additions(self, config: dict[str, Any], header: SafetensorsHeader) -> list[Addition]:
        """All bottlenecks, under the adapter's names of modules."""
        items = []
        for holder, tensors in _holders(config, header).items():
            sublayer = _sublayer(config, holder)
            network = _network(config, sublayer)
            items.append(Bottleneck(Site(sublayer.module, sublayer.stream, sublayer.norm, (network,)), tensors))
        return [Bottlenecks(config["model_type"], tuple(items), tuple(_copies(config, header).items()))]


def _adds_before_no_norm(config: dict[str, Any], sublayer: Sublayer) -> bool:
    """Whether the residual would be taken between an addition and a norm that are not there."""
    if config.get("residual_before_ln", True) != "post_add" or config.get("is_parallel"):
        return False
    return sublayer.norm is None or not config.get("original_ln_before")


def _network(config: dict[str, Any], sublayer: Sublayer) -> Network:
    options = {**DEFAULTS, **config}
    scaling = options["scaling"]
    common = {
        "weights": sublayer.module,
        "activation": str(options["non_linearity"]).lower(),
        "scaling": 1.0 if isinstance(scaling, str) else float(scaling),
        "closes": options["original_ln_after"],
    }
    if options["is_parallel"]:
        return Network(**common, reads="stream")
    common["residual_inside"] = options["adapter_residual_before_ln"]
    if not options["original_ln_before"]:
        return Network(**common)
    keeps = {True: "output", False: "read", "post_add": "sum"}[options["residual_before_ln"]]
    return Network(**common, reads="sum", keeps=keeps)


def _sublayer(config: dict[str, Any], holder: str) -> Sublayer:
    found = find_sublayer(str(config.get("model_type")), holder)
    if found is None:
        raise refuse(
            f"{holder}: a bottleneck there is at no sublayer's end of a {config['model_type']} model",
            expected="bottlenecks after attention and feed-forward layers",
            found=holder,
            remedy="train one with mh_adapter and output_adapter alone",
        )
    return found


def _check_config(config: dict[str, Any]) -> None:
    for option, what in REFUSED.items():
        if config.get(option) not in (None, False):
            raise refuse(
                f"{option} is set: {what} cannot be composed",
                expected=f"{option} unset",
                found=config[option],
                remedy=f"train the bottleneck without {option}",
            )
    for option in SWITCHES:
        if type(config.get(option, False)) is not bool:
            raise damaged(f"adapter_config.json: {option}={config[option]!r}", "true or false", config[option])
    if config.get("residual_before_ln", True) not in (True, False, "post_add"):
        raise damaged(
            "adapter_config.json: residual_before_ln", "true, false or post_add", config["residual_before_ln"]
        )
    activation, scaling = config.get("non_linearity"), config.get("scaling", 1.0)
    if not isinstance(activation, str) or activation.lower() not in ACTIVATIONS:
        raise refuse(
            f"the nonlinearity {activation!r} cannot be exported",
            expected=list(ACTIVATIONS),
            found=activation,
            remedy="train the bottleneck with one of these",
        )
    if scaling not in ("learned", "channel") and (type(scaling) not in (int, float) or not abs(scaling) < 2**53):
        raise damaged(f"adapter_config.json: scaling={scaling!r}", "a number, learned or channel", scaling)


def _holders(config: dict[str, Any], header: SafetensorsHeader) -> dict[str, dict[str, TensorSpec]]:
    """The tensors of each bottleneck by their part, by the module that holds it."""
    parts = PARTS | (NORM_BEFORE if config.get("ln_before") else PLAIN)
    copies = _copies(config, header)
    found: dict[str, dict[str, TensorSpec]] = {}
    for spec in sorted(header.tensors.values(), key=lambda spec: spec.name):
        if spec in copies:
            continue
        for suffix, part in parts.items():
            if (holder := spec.name.removesuffix(f".{suffix}")) != spec.name:
                found.setdefault(holder, {})[part] = spec
                break
        else:
            raise damaged(f"{spec.name} is no part of a bottleneck", sorted(parts), spec.name)
    return found


def _copies(config: dict[str, Any], header: SafetensorsHeader) -> dict[TensorSpec, TensorSpec]:
    """The norm before a bottleneck under its second name → under its first: one module in the library."""
    found = {}
    for spec in header.tensors.values() if config.get("ln_before") else ():
        for second, first in SECOND_NAMES.items():
            original = header.tensors.get(spec.name.removesuffix(second) + first)
            if spec.name.endswith(second) and original is not None:
                found[spec] = original
    return found


def _check_shapes(config: dict[str, Any], holder: str, tensors: dict[str, TensorSpec]) -> None:
    """Raise CorruptFileError unless every part that the config promises is there, in one size."""
    down = tensors.get("down.weight")
    rank, size = down.shape if down is not None and len(down.shape) == 2 else (0, 0)
    expected: dict[str, tuple[int, ...]] = {
        "down.weight": (rank, size),
        "down.bias": (rank,),
        "up.weight": (size, rank),
        "up.bias": (size,),
    }
    for option, part in (("ln_before", "norm_before"), ("ln_after", "norm_after")):
        if config.get(option):
            expected |= {f"{part}.weight": (size,), f"{part}.bias": (size,)}
    if config.get("scaling") in ("learned", "channel"):
        expected["scaling"] = (1,) if config["scaling"] == "learned" else (size,)
    found = {part: spec.shape for part, spec in tensors.items()}
    if not rank or found != expected:
        wrong = sorted({part for part in expected | found if expected.get(part) != found.get(part)})
        raise damaged(
            f"{holder}: {', '.join(wrong)} are not those of a bottleneck",
            {part: list(shape) for part, shape in expected.items()},
            {part: list(shape) for part, shape in found.items()},
        )
