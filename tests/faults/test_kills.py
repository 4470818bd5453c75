"""kill -9 in short form: five kills of each operation, at random times and at random calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.composing import ComposeSite, JobSite
from tests.faults.kills import soak
from tests.faults.publishing import PublishSite


@pytest.mark.parametrize("site", [PublishSite, ComposeSite, JobSite], ids=lambda site: site.name)
def test_a_kill_loses_nothing_and_shows_nothing_half(site: Any, tmp_path: Path) -> None:
    """What was acknowledged is there, what is visible is whole, the next run succeeds, and gc leaves no remains."""
    tally = soak(site(tmp_path), 5)
    assert tally.wrong == []
    assert (tally.kills, tally.recovered) == (5, 5)
    assert tally.middle > 0
