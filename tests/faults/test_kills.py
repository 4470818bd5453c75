"""kill -9 in short form: five kills of each operation, at random times and at random calls. `make soak` has 200."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.__main__ import SITES
from tests.faults.kills import soak


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_a_kill_loses_nothing_and_shows_nothing_half(site: Any, tmp_path: Path) -> None:
    """What was acknowledged is there, what is visible is whole, the next run succeeds, and gc leaves no remains."""
    tally = soak(site(tmp_path), 5)
    assert tally.wrong == []
    assert (tally.kills, tally.recovered) == (5, 5)
    assert tally.middle > 0
