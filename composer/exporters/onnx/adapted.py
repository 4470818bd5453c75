"""Run a graph whose adapters were kept apart: which it has, and a session in which one of them is active.

    session = open_session(folder / "model.onnx")
    adapted = activate(session, folder, "shout")     forward and generate take it like the session

The names are in the graph's metadata, in the order of the recipe.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.errors import NotFoundError
from composer.exporters.onnx.session import require_runtime
from composer.recipe import Placement

if TYPE_CHECKING:
    import onnx
    import onnxruntime

__all__ = ["AdaptedSession", "activate", "adapters_in", "note_adapters"]

METADATA = "composer.adapters"


class AdaptedSession:
    """A session, and the options that name an adapter in each of its runs."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        options: onnxruntime.RunOptions,
        adapter: onnxruntime.LoraAdapter,
    ) -> None:
        self._session, self._options = session, options
        self._adapter = adapter  # the options only refer to it

    def run(self, outputs: Sequence[str] | None, feeds: dict[str, Any]) -> list[Any]:
        """As InferenceSession.run."""
        found: list[Any] = self._session.run(outputs, feeds, self._options)
        return found

    def run_with_iobinding(self, binding: onnxruntime.IOBinding, options: onnxruntime.RunOptions | None = None) -> None:
        """As InferenceSession.run_with_iobinding; `options` take the place of those that name the adapter."""
        self._session.run_with_iobinding(binding, options or self._options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def note_adapters(model: onnx.ModelProto, placement: Placement, entries: Sequence[dict[str, Any]]) -> None:
    """Write into the graph's metadata which adapters it has; what was noted before is replaced."""
    kept = [(entry.key, entry.value) for entry in model.metadata_props if entry.key != METADATA]
    del model.metadata_props[:]
    for key, value in [*kept, (METADATA, json.dumps({"placement": placement.value, "adapters": list(entries)}))]:
        model.metadata_props.add(key=key, value=value)


def adapters_in(session: onnxruntime.InferenceSession) -> tuple[Placement, list[dict[str, Any]]]:
    """How the adapters of a graph were kept, and an entry with its `name` for each; none where they were merged."""
    noted = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if noted is None:
        return Placement.MERGED, []
    fields = json.loads(noted)
    return Placement(fields["placement"]), fields["adapters"]


def activate(session: onnxruntime.InferenceSession, folder: Path, adapter: str) -> AdaptedSession:
    """The session with an adapter active.

    folder: of the graph, where the files of its adapters lie. Raises NotFoundError for a name that it does not have.
    """
    entries = {entry["name"]: entry for entry in adapters_in(session)[1]}
    if adapter not in entries:
        raise NotFoundError(
            f"this graph has no adapter {adapter!r}",
            expected=list(entries) or "a graph composed with --separate",
            found=adapter,
            remedy="name one of these" if entries else "its adapters are merged: run it as it is",
        )
    runtime = require_runtime()
    loaded = runtime.LoraAdapter()
    loaded.Load(str(folder / entries[adapter]["file"]))
    options = runtime.RunOptions()
    options.add_active_adapter(loaded)
    return AdaptedSession(session, options=options, adapter=loaded)
