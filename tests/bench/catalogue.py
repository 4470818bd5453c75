"""A catalogue of a million versions in SQLite and PostgreSQL: `python -m tests.bench.catalogue`.

2,000 bases, of which the most popular has an eighth of all adapters; half a million adapters of two versions each, in 200
signatures. Each figure is of 400 calls with other bases, words and places: `query` is the page's statement as the service
builds it, `service` the whole call, schemas included, on a page of 50.
"""

from __future__ import annotations

import hashlib
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import quantiles
from typing import Any

import click
import sqlalchemy as sa

from registry.db import CatalogueSession, refresh_statistics, session_scope
from registry.models import (
    AdapterRow,
    BaseClosureRow,
    BaseModelRow,
    BaseTensorRow,
    SignatureRow,
    SignatureTargetRow,
    VersionRow,
    now,
)
from registry.schemas import Level
from registry.services.catalogue import base_facts, find_base
from registry.services.local import LocalRegistry, open_registry
from registry.services.matching import levels_of, newest_rows
from registry.services.search import Query, prefers_text, search_page
from registry.words import index_text
from tests.postgres import find_server, running_server

BASES, SIGNATURES, BATCH, PAGE = 2000, 200, 20_000, 50
WORDS = [f"{first}{second}" for first in ("math", "law", "code", "chat", "med", "poem", "sum", "trans", "sql", "tool")
         for second in ("", "fr", "de", "es", "json", "short", "long", "safe", "fast", "test")]  # fmt: skip
MODULES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(4) for name in "qkvo"]


def digest(*parts: Any) -> str:
    """A sha256 of anything."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def fill(registry: LocalRegistry, count: int) -> None:
    """Write the catalogue, seeded, in large batches."""
    pick, at = random.Random(1), now()
    with registry.engine.execution_options(writes=True).begin() as connection:
        connection.execute(sa.insert(BaseModelRow), [
            {"id": number, "name": f"base{number}", "fingerprint": f"wf1:{digest('f', number)}",
             "tensor_root": digest("t", number), "value_root": digest("v", number), "layout_digest": digest("l"),
             "config_digest": digest("c"), "architecture": "LlamaForCausalLM", "dtype": "BF16", "parameters": 1,
             "nbytes": 2, "location": "/nowhere", "created_at": at,
             "parent_id": number // 4 if number >= 4 else None, "relation": "finetune" if number >= 4 else None}
            for number in range(1, BASES + 1)])  # fmt: skip
        pairs = [pair for number in range(1, BASES + 1) for pair in ancestors(number)]
        connection.execute(sa.insert(BaseClosureRow), pairs)
        connection.execute(sa.insert(BaseTensorRow), [
            {"base_id": number, "name": f"{module}.weight", "dtype": "BF16", "shape": [64, 64],
             "digest": digest(number, module), "value_digest": digest("v", number, module)}
            for number in range(1, BASES + 1) for module in MODULES])  # fmt: skip
        connection.execute(sa.insert(SignatureRow), [{"digest": digest("s", item)} for item in range(SIGNATURES)])
        connection.execute(sa.insert(SignatureTargetRow), [
            {"signature": digest("s", item), "parameter": f"{module}.weight", "shape": [64 + item % 8, 64]}
            for item in range(SIGNATURES) for module in MODULES[: 1 + item // 16]])  # fmt: skip
        weights = [1 / rank for rank in range(1, BASES + 1)]
        bases = pick.choices(range(1, BASES + 1), weights, k=count // 2)
        for start in range(0, count // 2, BATCH):
            chunk = range(start, min(start + BATCH, count // 2))
            connection.execute(sa.insert(AdapterRow), [
                {"id": item + 1, "namespace": f"team{item % 5000}", "name": f"adapter{item}", "private": item % 100 == 7,
                 "created_at": at} for item in chunk])  # fmt: skip
            connection.execute(
                sa.insert(VersionRow), [row for item in chunk for row in versions(item, bases[item], pick, at)]
            )
    refresh_statistics(registry.engine)
    if registry.engine.dialect.name == "postgresql":
        with registry.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")


def ancestors(number: int) -> Iterator[dict[str, int]]:
    """The line of a base: each has a quarter of its number as its parent."""
    parent, depth = number // 4, 1
    while parent:
        yield {"ancestor_id": parent, "descendant_id": number, "depth": depth}
        parent, depth = parent // 4, depth + 1


def versions(item: int, base: int, pick: random.Random, at: Any) -> Iterator[dict[str, Any]]:
    """Two versions of one adapter."""
    words = pick.sample(WORDS, 4)
    signature = 8 * pick.randrange(SIGNATURES // 8) if pick.random() < 0.9 else pick.randrange(SIGNATURES)
    for number in (0, 1):
        yield {
            "adapter_id": item + 1, "version": f"{number}.0.0", "sort_key": f"{number}~", "prerelease": False,
            "digest": f"sha256:{digest(item, number)}", "kind": "lora", "rank": 8, "alpha": 16.0,
            "target_modules": ["q_proj"], "parameters": 1, "nbytes": 1000, "base_fingerprint": f"wf1:{digest('f', base)}",
            "base_value_root": digest("v", base), "base_config_digest": digest("c"), "base_name": f"base{base}",
            "license": "mit", "tags": words[:1], "description": " ".join(words), "created_at": at,
            "search_text": index_text(f"team{item % 5000}/adapter{item}", *words), "signature": digest("s", signature),
            "task": "CAUSAL_LM", "latest": number == 1, "state": "published",
        }  # fmt: skip


def measure(calls: int, run: Callable[[random.Random], Callable[[], Any]]) -> tuple[float, float]:
    """p50 and p99 in milliseconds of what `run` prepares, which is not timed."""
    pick, times = random.Random(7), []
    for _ in range(calls):
        call = run(pick)
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1000)
    cuts = quantiles(times, n=100)
    return cuts[49], cuts[98]


def cases(
    registry: LocalRegistry, count: int
) -> Iterator[tuple[str, str, Callable[[random.Random], Callable[[], Any]]]]:
    """What is measured: name, what of it, and how."""
    engine = registry.engine
    connection = engine.connect()
    reading = CatalogueSession(connection)
    stages = {}
    for number in range(1, BASES + 1, 7):
        with session_scope(engine) as session:
            row = find_base(session, f"base{number}")
            found = levels_of(session, row, base_facts(session, row))
            stages[number] = {level: found[level]() for level in (Level.EXACT, Level.LINEAGE, Level.SHAPE)}
    weights = [1 / number for number in stages]

    def base(pick: random.Random) -> int:
        return pick.choices(list(stages), weights)[0]

    def place(pick: random.Random) -> int | None:
        return pick.randrange(count // 4, count) if pick.random() < 0.5 else None

    dialect = engine.dialect.name

    def of_level(pick: random.Random, level: Level) -> Callable[[], Any]:
        parts, before = stages[base(pick)][level], place(pick)

        def call() -> Any:
            return connection.execute(newest_rows(connection, parts, PAGE, before)).all()

        return call

    for level in (Level.EXACT, Level.LINEAGE, Level.SHAPE):
        yield f"{level.value} of a base", "query", lambda pick, level=level: of_level(pick, level)

    def words(pick: random.Random, of_base: bool) -> Callable[[], Any]:
        wanted, number = tuple(pick.sample(WORDS, 2)), base(pick)
        fingerprint, before = f"wf1:{digest('f', number)}" if of_base else None, place(pick)

        def call() -> Any:
            by_text = prefers_text(reading, dialect, wanted, fingerprint)
            page = search_page(dialect, Query(), wanted, fingerprint, PAGE, before, by_text=by_text)
            return connection.execute(page).all()

        return call

    yield "two words and a base", "query", lambda pick: words(pick, True)
    yield "two words", "query", lambda pick: words(pick, False)
    yield (
        "exact of a base",
        "service",
        lambda pick: lambda name=f"base{base(pick)}": registry.compatible(name, level=Level.EXACT, limit=PAGE),
    )
    yield (
        "two words and a base",
        "service",
        lambda pick: (
            lambda name=f"base{base(pick)}", text=" ".join(pick.sample(WORDS, 2)): registry.search(
                text, base=name, limit=PAGE
            )
        ),
    )


@click.command()
@click.option("--versions", "count", default=1_000_000, show_default=True, help="How many.")
@click.option("--calls", default=400, show_default=True, help="Of each kind.")
@click.option("--database", multiple=True, default=("sqlite", "postgresql"), help="Only these.")
def main(count: int, calls: int, database: tuple[str, ...]) -> None:
    """Print the table."""
    print("| database | page of 50 | of | p50 ms | p99 ms |\n|---|---|---|---|---|")
    for name in database:
        with ExitStack() as stack:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            url = None
            if name == "postgresql":
                programs = find_server()
                if programs is None:
                    print("PostgreSQL's server is not installed", file=sys.stderr)
                    continue
                url = stack.enter_context(
                    running_server(programs, "shared_buffers=512MB", "jit=off", "max_wal_size=4GB")
                )
            registry = open_registry(home, url)
            started = time.perf_counter()
            fill(registry, count)
            print(f"{name}: {count} versions in {time.perf_counter() - started:.0f} s", file=sys.stderr)
            for what, part, run in cases(registry, count):
                measure(20, run)
                middle, late = measure(calls, run)
                print(f"| {name} | {what} | {part} | {middle:.2f} | {late:.2f} |", flush=True)
            registry.close()


if __name__ == "__main__":
    main()
