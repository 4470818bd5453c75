"""Bottleneck adapters as what runs: small networks at the ends of sublayers, and the two files that hold them.

    v = h                                                the sublayer's output
    for each network, in order:
        z = v            reads "output"
            norm(v + x)  reads "sum"                     x: the residual stream; norm: of the layer, where it has one
            x            reads "stream"                  parallel to the sublayer
        u = scaling · up(activation(down(norm_before(z))))
        v = norm_after(u) + r, or norm_after(u + r)      r: v, v + x or z, as `keeps` says "output", "sum" or "read"
    the layer goes on with norm(v + x), or with v itself where `closes` is false

bottlenecks.json          format, adapters (labels), sites: [{module, stream, norm, networks: [{weights, reads, …}]}]
bottlenecks.safetensors   <weights>.down.weight [r, d], .down.bias, .up.weight [d, r], .up.bias, and where there are any
                          .scaling [1] or [d], .norm_before.weight, .norm_before.bias, .norm_after.weight, …

Sources: arXiv:1902.00751 (Houlsby), 2005.00247 (Pfeiffer), 2110.04366 (parallel), 2406.06820 (Adapter+).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from composer.checkpoint import Checkpoint
from composer.errors import CorruptFileError, IncompatibleError
from composer.files import read_json
from composer.tensors import TensorSpec

__all__ = [
    "ACTIVATIONS",
    "BUNDLE",
    "PARTS",
    "TENSORS",
    "Bottleneck",
    "Bottlenecks",
    "Network",
    "Site",
    "bundle_json",
    "read_sites",
    "stack_sites",
]

BUNDLE, TENSORS = "bottlenecks.json", "bottlenecks.safetensors"
FORMAT = "bottlenecks/1"
PARTS = (
    "down.weight", "down.bias", "up.weight", "up.bias", "scaling",
    "norm_before.weight", "norm_before.bias", "norm_after.weight", "norm_after.bias",
)  # fmt: skip
# Names as in transformers.activations, and "leakyrelu", which AdapterHub's library adds.
ACTIVATIONS = ("gelu", "gelu_new", "leakyrelu", "linear", "relu", "sigmoid", "silu", "swish", "tanh")
EPSILON = 1e-5  # of the norms inside a bottleneck: torch's default, which the library does not change


@dataclass(frozen=True, slots=True)
class Network:
    """One bottleneck, without the place where it stands; the words are those of the equations above.

    weights: the prefix of its tensors. scaling: a constant; a tensor of that name is multiplied in as well.
    residual_inside: norm_after(u + r) rather than norm_after(u) + r.
    """

    weights: str
    activation: str
    scaling: float = 1.0
    reads: Literal["output", "sum", "stream"] = "output"
    keeps: Literal["output", "sum", "read"] = "output"
    residual_inside: bool = False
    closes: bool = True


@dataclass(frozen=True, slots=True)
class Site:
    """The end of one sublayer, by names of modules (see `composer.sublayers`), and its networks in order."""

    module: str
    stream: str
    norm: str | None
    networks: tuple[Network, ...]


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What an adapter puts at one site: the site with its one network, and the tensors by their part."""

    site: Site
    tensors: Mapping[str, TensorSpec]

    @property
    def network(self) -> Network:
        """The one network of the site."""
        return self.site.networks[0]

    @property
    def rank(self) -> int:
        """r, the width of the narrow part."""
        return self.tensors["down.bias"].shape[0]


@dataclass(frozen=True, slots=True)
class Bottlenecks:
    """All bottlenecks of one adapter: an Addition. `copies`: tensors that its file holds twice, each with the other."""

    family: ClassVar[str] = "bottleneck"

    model_type: str
    items: tuple[Bottleneck, ...]
    copies: tuple[tuple[TensorSpec, TensorSpec], ...] = ()

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        seconds = (second for second, _ in self.copies)
        return (*seconds, *(spec for item in self.items for spec in item.tensors.values()))

    @property
    def parameters(self) -> int:
        """2dr + d + r a bottleneck, and its norms and learned scaling."""
        return sum(math.prod(spec.shape) for item in self.items for spec in item.tensors.values())

    @property
    def summary(self) -> str:
        ranks = sorted({item.rank for item in self.items})
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"{len(self.items)} bottlenecks of rank {rank}, {self.parameters:,} parameters"

    def check(self, label: str, checkpoint: Checkpoint) -> None:
        """Raise IncompatibleError where the base is of another model type: its sublayers may end elsewhere."""
        found = checkpoint.config.get("model_type")
        if found != self.model_type:
            raise IncompatibleError(
                f"{label} was trained on a {self.model_type} model, this base is {found}",
                expected=self.model_type,
                found=found,
                remedy="compose it with the base it was trained on",
            )

    def check_copies(self) -> None:
        """Raise CorruptFileError where a tensor that stands twice has two values."""
        for second, first in self.copies:
            if not np.array_equal(second.read(), first.read()):
                raise CorruptFileError(
                    f"{second.name} and {first.name} are one tensor, and differ",
                    expected="equal values",
                    found=[second.name, first.name],
                    remedy="save the adapter again with the library that trained it",
                )

    def bound(self, names: Mapping[str, str]) -> Bottlenecks:
        """The same under a base's names of modules; names: from the adapter's name of a weight to the base's."""
        return replace(self, items=tuple(replace(item, site=_renamed(item.site, names)) for item in self.items))


def _renamed(site: Site, names: Mapping[str, str]) -> Site:
    """A site under the base's names, by the one prefix that its weight's name has more or less."""
    own, found = f"{site.module}.weight", names[f"{site.module}.weight"]
    added = found.removesuffix(own) if found.endswith(own) else ""
    removed = own.removesuffix(found) if own.endswith(found) else ""

    def rename(name: str) -> str:
        return added + name.removeprefix(removed)

    return Site(rename(site.module), rename(site.stream), site.norm and rename(site.norm), site.networks)


def stack_sites(stack: Sequence[Bottlenecks]) -> tuple[tuple[Site, ...], dict[str, TensorSpec]]:
    """The sites of several adapters, in the order of the stack, and their tensors by the names in the bundle.

    Raises IncompatibleError where a parallel bottleneck would share a site: what stands before it would have no effect.
    """
    networks: dict[str, list[Network]] = {}
    places: dict[str, Site] = {}
    tensors: dict[str, TensorSpec] = {}
    for index, addition in enumerate(stack):
        for item in addition.items:
            site = item.site
            network = replace(item.network, weights=f"{index}.{site.module}")
            places.setdefault(site.module, site)
            networks.setdefault(site.module, []).append(network)
            parts = (part for part in PARTS if part in item.tensors)
            tensors |= {f"{network.weights}.{part}": item.tensors[part] for part in parts}
    for module, found in networks.items():
        if len(found) > 1 and any(network.reads == "stream" for network in found):
            raise IncompatibleError(
                f"{module}: {len(found)} bottlenecks, one of them parallel to the layer, cannot stand in one place: "
                "it does not read what the others give, so they would have no effect",
                expected="one parallel bottleneck a sublayer, or any number of sequential ones",
                found=[network.reads for network in found],
                remedy="compose one of them",
            )
    sites = [replace(place, networks=tuple(networks[module])) for module, place in places.items()]
    return tuple(sites), tensors


def bundle_json(adapters: Sequence[str], sites: Sequence[Site]) -> bytes:
    """The text of bottlenecks.json."""
    document = {"format": FORMAT, "adapters": list(adapters), "sites": [asdict(site) for site in sites]}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def read_sites(path: Path) -> tuple[Site, ...]:
    """The sites of a bottlenecks.json. Raises CorruptFileError where it is not one."""
    document = read_json(path)
    try:
        if document["format"] != FORMAT:
            raise ValueError(document["format"])
        return tuple(map(_site, document["sites"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{path.name} is not a description of bottlenecks",
            expected=f"format {FORMAT} and a list of sites",
            found=str(error),
            remedy="compose it again",
        ) from None


def _site(entry: dict[str, Any]) -> Site:
    networks = tuple(Network(**network) for network in entry["networks"])
    return Site(entry["module"], entry["stream"], entry["norm"], networks)
