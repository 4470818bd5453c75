"""Where things lie on the disk.

REGISTRY_HOME/                       default ~/.local/share/registry
├── registry.db                      the catalogue, unless REGISTRY_DATABASE_URL says otherwise
├── store/
│   ├── blobs/sha256/ab/abcd…        one file a digest, read-only, written once
│   ├── xorbs/ab/abcd…               chunks that Xet clients uploaded; abcd….places where they are in blobs by now
│   ├── chunks/ab/abcd…              digests of the chunks of files, for reading ranges of them
│   └── incoming/                    half-written blobs; nothing reads them
├── graphs/                          weightless ONNX graphs, one an architecture
├── uploads/                         bases that came over REST
├── imports/                         what is being fetched from a hub
└── compositions/<job>/              what the service composed
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_data_path

__all__ = ["Layout", "default_home"]


def default_home() -> Path:
    """REGISTRY_HOME, or the user's data folder."""
    return Path(os.environ.get("REGISTRY_HOME") or user_data_path("registry")).expanduser()


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths under one home."""

    home: Path

    @property
    def database_url(self) -> str:
        """The default database."""
        return f"sqlite:///{self.home / 'registry.db'}"

    @property
    def blobs(self) -> Path:
        """The folder of blobs."""
        return self.home / "store" / "blobs" / "sha256"

    @property
    def xorbs(self) -> Path:
        """The folder of xorbs."""
        return self.home / "store" / "xorbs"

    @property
    def chunks(self) -> Path:
        """The folder of lists of chunk digests."""
        return self.home / "store" / "chunks"

    @property
    def incoming(self) -> Path:
        """Half-written blobs."""
        return self.home / "store" / "incoming"

    @property
    def graphs(self) -> Path:
        """The ONNX graph cache."""
        return self.home / "graphs"

    @property
    def uploads(self) -> Path:
        """Bases that came over REST."""
        return self.home / "uploads"

    @property
    def imports(self) -> Path:
        """What is being fetched from a hub."""
        return self.home / "imports"

    @property
    def compositions(self) -> Path:
        """What the service composed."""
        return self.home / "compositions"

    def xorb(self, name: str) -> Path:
        """The place of one xorb."""
        return self.xorbs / name[:2] / name

    def xorb_places(self, name: str) -> Path:
        """The file that says where the chunks of a xorb lie in blobs."""
        return self.xorbs / name[:2] / f"{name}.places"

    def xorb_files(self, name: str) -> list[Path]:
        """What there is of a xorb: itself, or the places of its chunks."""
        return [path for path in (self.xorb(name), self.xorb_places(name)) if path.is_file()]

    def blob(self, sha256: str) -> Path:
        """The place of one blob."""
        return self.blobs / sha256[:2] / sha256

    def chunk_list(self, sha256: str) -> Path:
        """The place of the digests of a file's chunks."""
        return self.chunks / sha256[:2] / sha256
