"""What the files of a push are: an adapter, a base, or not yet either; and the base that an adapter's files name.

    adapter   adapter_config.json and weights, or a file of another tool that composer.formats reads
    base      config.json and all of its weights
    neither   a draft: it is kept, and published once the rest has come

A trainer writes the folder that it loaded its base from into the config and the card. Where that base is known here,
its name takes the folder's place, so that the adapter loads on any machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import StrEnum
from typing import Any

import yaml

from composer.checkpoint import INDEX, SINGLE
from composer.files import FileSet, read_json
from composer.formats import find_format
from composer.recipe import is_path
from registry.claims import split_card

__all__ = ["Holding", "base_reference", "complete_card", "complete_config", "holding", "is_ignored"]

CONFIG = "adapter_config.json"
CARD = "README.md"
WEIGHTS = (".safetensors", ".gguf", ".npz")
# What a trainer needs to go on and nobody to use the model; most of it are pickles.
IGNORED = re.compile(
    r"(.*/)?(\.(?!\.)[^/]*|training_args\.bin|optimizer\.(pt|bin)|scheduler\.(pt|bin)|scaler\.pt|rng_state[^/]*\.pth"
    r"|events\.out\.tfevents[^/]*)|(runs|logs|last-checkpoint|checkpoint-\d+|global_step\d+)/.*|(.*/)?\.(?!\.)[^/]+/.*"
)
SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})")


class Holding(StrEnum):
    """What the files of a push make."""

    ADAPTER = "adapter"
    BASE = "base"
    DRAFT = "draft"


def is_ignored(path: str) -> bool:
    """Whether a file is left out of every push: hidden ones, a trainer's state and its logs."""
    return IGNORED.fullmatch(path) is not None


def holding(files: FileSet) -> Holding:
    """What `files` make, by names and configs. Raises CorruptFileError for a config or an index that is no JSON."""
    if not any(path.endswith(WEIGHTS) and "/" not in path for path in files):
        return Holding.DRAFT
    config = read_json(files[CONFIG]) if CONFIG in files else None
    if config is not None or find_format(files, None) is not None:
        return Holding.ADAPTER
    if "config.json" in files and _whole(files):
        return Holding.BASE
    return Holding.DRAFT


def _whole(files: FileSet) -> bool:
    """Whether every shard that the index names is there."""
    if INDEX not in files:
        return SINGLE in files or any(path.endswith(".gguf") for path in files)
    weight_map = read_json(files[INDEX]).get("weight_map")
    return isinstance(weight_map, dict) and all(str(shard) in files for shard in weight_map.values())


def base_reference(config: dict[str, Any]) -> tuple[str, str | None] | None:
    """(repository, revision) of the base that an adapter's config names; None where that is a folder.

    A folder of a hub's cache is no folder: its path has the repository and the commit.
    """
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(named, str) or not named:
        return None
    if match := SNAPSHOT.search(named):
        return match[1].replace("--", "/", 1), match[2]
    if is_path(named) or "\\" in named:
        return None
    return named, revision if isinstance(revision, str) else None


def complete_config(data: bytes, base: str) -> bytes:
    """adapter_config.json with the base's name; the same bytes where it has it."""
    fields = json.loads(data)
    if fields.get("base_model_name_or_path") == base:
        return data
    return json.dumps({**fields, "base_model_name_or_path": base}, indent=2, ensure_ascii=False).encode()


def complete_card(data: bytes, base: str, fingerprint: str, former: Collection[str]) -> bytes:
    """README.md with the base's name and fingerprint in its front matter; the same bytes where it has them.

    former: how the base was called until now; a path is replaced wherever it stands. A card without front matter gets
    none. Lines that are not about the base stay as they are.
    """
    text = data.decode("utf-8", "replace")
    fields, body = split_card(text)
    if not fields:
        return data
    head = text[: len(text) - len(body)]
    name = base if yaml.safe_load(base) == base else json.dumps(base)
    wanted = {"base_model": name, "base_model_fingerprint": fingerprint}
    for key, value in wanted.items():
        if fields.get(key) == (base if key == "base_model" else value):
            continue
        line, found = f"{key}: {value}", rf"(?m)^{key}:.*(?:\n(?:[ \t]+|-).*)*$"
        if re.search(found, head):
            head = re.sub(found, line, head, count=1)
        else:
            head = re.sub(r"\n---\s*\n?\Z", lambda end, line=line: f"\n{line}{end[0]}", head)
    for path in sorted((name for name in former if is_path(name)), key=len, reverse=True):
        head, body = head.replace(path, base), body.replace(path, base)
    return (head + body).encode()
