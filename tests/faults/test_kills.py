"""kill -9 in short form: five kills of each operation, at random times and at random calls. `make soak` has 200."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from composer.recipe import parse_recipe
from registry.db import session_scope
from registry.models import CompositionRow
from tests.faults.__main__ import SITES
from tests.faults.composing import RECIPES, shelf_with_adapters
from tests.faults.kills import soak


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_a_kill_loses_nothing_and_shows_nothing_half(site: Any, tmp_path: Path) -> None:
    """What was acknowledged is there, what is visible is whole, the next run succeeds, and gc leaves no remains."""
    tally = soak(site(tmp_path), 5)
    assert tally.wrong == []
    assert (tally.kills, tally.recovered) == (5, 5)
    assert tally.middle > 0


def test_a_result_that_is_there_is_recorded_and_alone(tmp_path: Path) -> None:
    """Killed after its folder was in place: the next compose makes nothing, but does what was left to do."""
    shelf = shelf_with_adapters(tmp_path)
    shelf.registry.compose(parse_recipe(RECIPES[0]), tmp_path / "made" / "out")
    with session_scope(shelf.registry.engine, writes=True) as session:
        session.execute(sa.delete(CompositionRow))
    (tmp_path / "made" / ".out.abcdefgh.part").mkdir()
    assert shelf.registry.compose(parse_recipe(RECIPES[0]), tmp_path / "made" / "out").cached
    with session_scope(shelf.registry.engine) as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(CompositionRow)) == 1
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["out"]
    shelf.close()
