"""The long run: `python -m tests.fuzz [TARGET]... --runs 100000`, a process a target.

Steered by coverage where atheris is installed (the extra `fuzz`), else by mutating the seeds at random. An input that
ends in another exception than a typed one, takes more than 2 GiB or 20 s is printed, in hex, and ends the run with 1.
"""

from __future__ import annotations

import importlib.util
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from tests.fuzz.mutations import DICTIONARY, MAX_SIZE, mutate

NAMES = ("safetensors", "adapter-config", "index", "config", "gguf", "recipe", "tokenizer", "xet")
MEMORY = 2 << 30
INPUT_S = 20
PACKAGES = ("composer", "registry")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--runs", default=100_000, show_default=True, help="Inputs in all, shared out among the targets.")
@click.option("--seed", default=1, show_default=True, help="Of the random generator.")
@click.option("--plain", is_flag=True, help="Without atheris.")
@click.option("--one", hidden=True, type=click.Choice(NAMES))
def main(names: tuple[str, ...], runs: int, seed: int, plain: bool, one: str | None) -> None:
    """Print a table: target, inputs, seconds, peak memory."""
    if one:
        _fuzz(one, runs, seed, plain=plain)
        return
    chosen, failed = names or NAMES, False
    steered = not plain and importlib.util.find_spec("atheris") is not None
    print(f"{'by coverage' if steered else 'at random'}, seed {seed}\n")
    print("| target | inputs | seconds | peak MiB | outcome |\n|---|---|---|---|---|")
    for name in chosen:
        share = -(-runs // len(chosen))
        command = [sys.executable, "-m", "tests.fuzz", "--one", name, "--runs", str(share), "--seed", str(seed)]
        started = time.perf_counter()
        done = subprocess.run([*command, *(["--plain"] if plain else [])], capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
        outcome = "all read or refused" if done.returncode == 0 else f"status {done.returncode}"
        print(f"| {name} | {share} | {seconds:.0f} | {peak} | {outcome} |", flush=True)
        if done.returncode:
            failed = True
            print(done.stdout[-4000:] + done.stderr[-8000:], file=sys.stderr)
    sys.exit(failed)


def _fuzz(name: str, runs: int, seed: int, *, plain: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "input"
        folder.mkdir()
        if plain or importlib.util.find_spec("atheris") is None:
            _at_random(name, folder, runs, seed)
        else:
            _by_coverage(name, folder, Path(scratch) / "corpus", runs, seed)


def _at_random(name: str, folder: Path, runs: int, seed: int) -> None:
    from tests.fuzz.targets import TARGETS, run_one

    target = TARGETS[name]
    target.prepare(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seeds, source = target.seeds(), random.Random(seed)
    for number in range(runs):
        data = mutate(source.choice(seeds), seeds, source) if number >= len(seeds) else seeds[number]
        started = time.thread_time()
        try:
            run_one(target, folder, data)
            assert time.thread_time() - started < INPUT_S, "an input took too long"
        except BaseException:
            print(f"input: {data.hex()}")
            raise


def _by_coverage(name: str, folder: Path, corpus: Path, runs: int, seed: int) -> None:
    """libFuzzer's loop; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=list(PACKAGES), enable_loader_override=False):
        from tests.fuzz.targets import TARGETS, run_one
    target = TARGETS[name]
    target.prepare(folder)
    corpus.mkdir()
    for index, data in enumerate(target.seeds()):
        (corpus / f"seed-{index:03}").write_bytes(data)
    words = corpus.parent / "words"
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in DICTIONARY))

    def read(data: bytes) -> None:
        try:
            run_one(target, folder, data)
        except BaseException:
            print(f"input: {data.hex()}", file=sys.stderr)
            raise

    options = [f"-runs={runs}", f"-seed={seed}", f"-max_len={MAX_SIZE}", f"-rss_limit_mb={MEMORY >> 20}"]
    options += [f"-timeout={INPUT_S}", f"-dict={words}", f"-artifact_prefix={corpus.parent}/", "-close_fd_mask=0"]
    atheris.Setup(["tests.fuzz", *options, str(corpus)], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
