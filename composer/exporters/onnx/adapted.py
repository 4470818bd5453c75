"""Run a graph whose adapters were kept apart: which it has, and a session in which one of them is active.

    session = open_session(folder / "model.onnx")
    adapted = activate(session, folder, "shout")            all rows; forward and generate take it like the session
    adapted = activate(session, folder, ["shout", None])    multi only: one adapter for each row, None is the base

The names are in the graph's metadata, in the order of the recipe.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.errors import NotFoundError, UsageError
from composer.exporters.onnx.session import require_runtime
from composer.recipe import Placement

if TYPE_CHECKING:
    import onnx
    import onnxruntime

__all__ = ["ADAPTER_IDS", "METADATA", "AdaptedSession", "activate", "adapters_in", "note_adapters"]

ADAPTER_IDS = "adapter_ids"
METADATA = "composer.adapters"


class AdaptedSession:
    """A session, and what each of its runs gets besides: inputs, or options that name an active adapter.

    A run with bound inputs pays no heed to active adapters, so their factors are bound as the inputs that they are.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        feeds: dict[str, Any] | None = None,
        options: onnxruntime.RunOptions | None = None,
        adapter: onnxruntime.LoraAdapter | None = None,
        factors: dict[str, onnxruntime.OrtValue] | None = None,
    ) -> None:
        self._session, self._feeds, self._options = session, feeds or {}, options
        self._adapter = adapter  # the options only refer to it
        self._factors = factors or {}

    def run(self, outputs: Sequence[str] | None, feeds: dict[str, Any]) -> list[Any]:
        """As InferenceSession.run."""
        found: list[Any] = self._session.run(outputs, {**feeds, **self._feeds}, self._options)
        return found

    def io_binding(self) -> onnxruntime.IOBinding:
        """A binding in which the inputs of the adapters are bound."""
        binding = self._session.io_binding()
        for name, value in self._feeds.items():  # by value: an input that has a default is in no list of inputs
            binding.bind_ortvalue_input(name, require_runtime().OrtValue.ortvalue_from_numpy(value))
        for name, factor in self._factors.items():
            binding.bind_ortvalue_input(name, factor)
        return binding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def note_adapters(model: onnx.ModelProto, fields: dict[str, Any]) -> None:
    """Write into the graph's metadata its placement and its adapters, in place of what was noted before."""
    noted = json.dumps(fields, separators=(",", ":"))
    for entry in model.metadata_props:
        if entry.key == METADATA:
            entry.value = noted
            return
    model.metadata_props.add(key=METADATA, value=noted)


def adapters_in(session: onnxruntime.InferenceSession) -> tuple[Placement, list[dict[str, Any]]]:
    """How the adapters of a graph were kept, and an entry with its `name` for each; none where they were merged."""
    noted = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if noted is None:
        return Placement.MERGED, []
    fields = json.loads(noted)
    return Placement(fields["placement"]), fields["adapters"]


def activate(
    session: onnxruntime.InferenceSession, folder: Path, adapters: str | Sequence[str | None]
) -> AdaptedSession:
    """The session with an adapter active: one for all rows, or (multi only) one for each row of a batch.

    folder: of the graph, where the files of separate adapters lie.
    Raises NotFoundError for a name that the graph does not have, and UsageError for rows that differ where adapters are
    separate.
    """
    placement, entries = adapters_in(session)
    numbers = {entry["name"]: number for number, entry in enumerate(entries, 1)}
    rows = [adapters] if isinstance(adapters, str) else list(adapters)
    for name in rows:
        if name is not None and name not in numbers:
            raise NotFoundError(
                f"this graph has no adapter {name!r}",
                expected=list(numbers) or "a graph composed with --separate or --multi",
                found=name,
                remedy="name one of these" if numbers else "its adapters are merged: run it without --adapter",
            )
    if placement is Placement.MULTI:
        import numpy as np

        ids = np.array([0 if name is None else numbers[name] for name in rows], np.int64)
        return AdaptedSession(session, feeds={ADAPTER_IDS: ids})
    if len(set(rows)) != 1:
        raise UsageError(
            "one adapter at a time is active in a graph with separate adapters",
            expected="one name",
            found=rows,
            remedy="run the rows apart, or compose with --multi",
        )
    if rows[0] is None:
        return AdaptedSession(session)
    runtime = require_runtime()
    adapter = runtime.LoraAdapter()
    path = str(folder / entries[numbers[rows[0]] - 1]["file"])
    adapter.Load(path)
    options = runtime.RunOptions()
    options.add_active_adapter(adapter)
    factors = runtime.AdapterFormat.read_adapter(path).get_parameters()
    return AdaptedSession(session, options=options, adapter=adapter, factors=factors)
