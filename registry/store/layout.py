"""Where things lie on the disk.

REGISTRY_HOME/                       default ~/.local/share/registry
├── registry.db                      the catalogue, unless REGISTRY_DATABASE_URL says otherwise
├── store/
│   ├── blobs/sha256/ab/abcd…        one file a digest, read-only, written once
│   ├── xorbs/ab/abcd…               chunks of files that Xet clients uploaded
│   ├── shards/ab/abcd…              which chunks of which xorbs a file came by
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
    def shards(self) -> Path:
        """The folder of what Xet clients said of their files."""
        return self.home / "store" / "shards"

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

    def blob(self, sha256: str) -> Path:
        """The place of one blob."""
        return self.blobs / sha256[:2] / sha256

    def chunk_list(self, sha256: str) -> Path:
        """The place of the digests of a file's chunks."""
        return self.chunks / sha256[:2] / sha256
