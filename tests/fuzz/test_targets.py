"""About 1,000 mutated inputs, the same in every run: each is read or refused by a typed error, in bounded memory."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import mutate
from tests.fuzz.targets import TARGETS, run_one

INPUTS = 125  # of each of the 8 targets
MEMORY = 32 << 20


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_is_read_or_refused(tmp_path: Path, name: str) -> None:
    """Some are read whole: a target that refuses everything would test nothing."""
    target = TARGETS[name]
    target.prepare(tmp_path)
    assert any(run_one(target, tmp_path, seed) is None for seed in target.seeds())


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_input_is_read_or_refused_in_bounded_memory(tmp_path: Path, name: str) -> None:
    """No other exception leaves a reader, and no few bytes make it take tens of megabytes."""
    target = TARGETS[name]
    target.prepare(tmp_path)
    seeds = target.seeds()
    run_one(target, tmp_path, seeds[0])  # what is imported and cached at the first use is no input's doing

    @settings(
        max_examples=INPUTS, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, len(seeds) - 1), st.integers(0, 2**32))
    def check(seed: int, number: int) -> None:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        run_one(target, tmp_path, mutate(seeds[seed], seeds, random.Random(number)))
        assert tracemalloc.get_traced_memory()[1] - before < MEMORY

    tracemalloc.start()
    try:
        check()
    finally:
        tracemalloc.stop()
