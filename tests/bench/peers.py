"""What is measured, each as a process of its own: `python -m tests.bench.peers NAME BASE ADAPTER OUT`.

cp        the base copied file by file and fsynced: the floor
ours      compose, durable
peft      from_pretrained, merge_and_unload, save_pretrained, fsync of what it wrote
mergekit  mergekit-yaml with model+lora, in a virtual environment of its own
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

PEERS: dict[str, Callable[[Path, Path, Path], None]] = {}


def peer(function: Callable[[Path, Path, Path], None]) -> Callable[[Path, Path, Path], None]:
    """Register under the function's name."""
    PEERS[function.__name__] = function
    return function


@peer
def cp(base: Path, adapter: Path, out: Path) -> None:
    """Copy the base's files."""
    out.mkdir()
    for path in sorted(base.iterdir()):
        shutil.copyfile(path, out / path.name)
    sync(out)


@peer
def ours(base: Path, adapter: Path, out: Path) -> None:
    """Plan and run."""
    from composer.adapters import open_adapter
    from composer.checkpoint import open_checkpoint
    from composer.plan import Term, make_plan
    from composer.recipe import AdapterTerm, Recipe
    from composer.run import compose

    recipe = Recipe(base=base.name, adapters=(AdapterTerm(ref=adapter.name),))
    compose(make_plan(recipe, open_checkpoint(base), [Term(adapter.name, open_adapter(adapter), 1.0)]), out)


@peer
def peft(base: Path, adapter: Path, out: Path) -> None:
    """PEFT's way, in the base's dtype."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    sync(out)


@peer
def mergekit(base: Path, adapter: Path, out: Path) -> None:
    """mergekit's way; runs in the interpreter that has it."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    recipe = {"merge_method": "passthrough", "dtype": "bfloat16", "models": [{"model": f"{base}+{adapter}"}]}
    cache = out.parent / "mergekit-cache"
    run_merge(
        MergeConfiguration.model_validate(recipe), str(out),
        MergeOptions(copy_tokenizer=False, lora_merge_cache=str(cache)),
    )  # fmt: skip
    sync(out)
    shutil.rmtree(cache, ignore_errors=True)


def sync(folder: Path) -> None:
    """fsync every file and the folder."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    PEERS[sys.argv[1]](*map(Path, sys.argv[2:5]))
