"""Make a variant of a bound graph, compare it with torch, and publish it with the files that it needs.

    model.onnx             the graph
    model.onnx.data        quantised matrices, where there are any
    genai_config.json      of the flavour genai

The graph and its data are written under names of their own first, and get these once they have been compared with
torch: the data before the graph that reads them. When something fails, files of these names are gone.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from composer.errors import OnnxExportError
from composer.exporters.onnx.architectures import Architecture
from composer.exporters.onnx.genai import GENAI_CONFIG, genai_config
from composer.exporters.onnx.grouped import attend_grouped
from composer.exporters.onnx.half import compute_in
from composer.exporters.onnx.quantise import DATA_FILE, quantise
from composer.exporters.onnx.session import PAST
from composer.exporters.onnx.variants import Variant
from composer.exporters.onnx.verify import Verification
from composer.exporters.onnx.verify_variant import verify_variant
from composer.sinks import fsync_folder, storage_errors

if TYPE_CHECKING:
    import onnx

__all__ = ["publish_variant"]


def publish_variant(
    model: onnx.ModelProto,
    folder: Path,
    file: str,
    config: dict[str, Any],
    architecture: Architecture,
    variant: Variant,
    say: Callable[[str], None],
) -> tuple[tuple[str, ...], Verification]:
    """Write the variant of `model`, a bound graph in float32, into its `folder` as `file`.

    Returns the names of the files, and what the comparison with torch found.
    Raises OnnxExportError when the graph cannot be made so, OnnxVerificationError when it computes something else,
    StorageError when the disk fails.
    """
    names = [file, *([DATA_FILE] if variant.quantise else []), *([GENAI_CONFIG] if variant.flavour == "genai" else [])]
    build = _Build(folder, file, config, architecture)
    compared = variant.on_cpu
    try:
        if variant.flavour == "genai":
            inputs = [item.name for item in model.graph.input if not item.name.startswith(PAST)]
            content = genai_config(folder, config, file, inputs)
            with _aside(folder, GENAI_CONFIG) as written:
                written.write((json.dumps(content, indent=2) + "\n").encode())
            os.replace(written.name, folder / GENAI_CONFIG)  # onnxruntime-genai reads it under no other name
        with build.made(model, compared, say) as made:
            say(f"verify {architecture.name} in ONNX Runtime against torch")
            result = verify_variant(folder, made.graph, architecture, compared)
            if compared == variant:
                made.publish()
        if compared != variant:
            with build.made(model, variant, say) as made:
                _check_types(made.model)
                made.publish()
        fsync_folder(folder)
    except BaseException:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        raise
    return tuple(names), result


@dataclass(frozen=True, slots=True)
class _Made:
    """A graph and its data aside."""

    folder: Path
    file: str
    model: onnx.ModelProto
    graph: Path
    data: Path | None

    def publish(self) -> None:
        """Give both their names; the graph is written again, to read the data under its new one."""
        if self.data is not None:
            os.replace(self.data, self.folder / DATA_FILE)
            for initializer in self.model.graph.initializer:
                for entry in initializer.external_data:
                    if entry.key == "location" and entry.value == self.data.name:
                        entry.value = DATA_FILE
            with _aside(self.folder, self.file) as written:
                written.write(self.model.SerializeToString())
            os.replace(written.name, self.folder / self.file)
        else:
            os.replace(self.graph, self.folder / self.file)


@dataclass(frozen=True, slots=True)
class _Build:
    """What graphs are made of."""

    folder: Path
    file: str
    config: dict[str, Any]
    architecture: Architecture

    @contextmanager
    def made(self, bound: onnx.ModelProto, variant: Variant, say: Callable[[str], None]) -> Iterator[_Made]:
        """A variant of a copy of `bound` aside; what was not published is gone afterwards."""
        model = copy.deepcopy(bound)
        if variant.compute != "float32":
            compute_in(model, variant.compute)
        if variant.flavour == "genai":
            attend_grouped(model, self.config, self.architecture)
        made: list[Path] = []
        try:
            if variant.quantise:
                say(f"quantise the matrices to {variant.quantise}")
                with _aside(self.folder, DATA_FILE) as data:
                    made.append(Path(data.name))
                    quantise(model, self.folder, variant, data, made[0].name)
            with _aside(self.folder, self.file) as written:
                made.append(Path(written.name))
                written.write(model.SerializeToString())
            yield _Made(self.folder, self.file, model, made[-1], made[0] if variant.quantise else None)
        finally:
            for path in made:
                path.unlink(missing_ok=True)


@contextmanager
def _aside(folder: Path, name: str) -> Iterator[IO[bytes]]:
    """A file under a name of its own in `folder`; on disk when the block ends, and gone when it fails."""
    with (
        storage_errors(f"writing {name}"),
        tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", suffix=".tmp", delete=False) as file,
    ):
        try:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _check_types(model: onnx.ModelProto) -> None:
    """Raise OnnxExportError where the dtypes of a graph that is not run here do not fit together."""
    import onnx

    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise OnnxExportError(
            f"onnx: the graph in bfloat16 is not valid: {error}",
            remedy="compute in float16 or float32, and report the configuration",
        ) from error
