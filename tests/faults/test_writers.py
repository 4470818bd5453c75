"""Many publishers at once in short form: eight for three rounds. `make soak` has 32 for 50 rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.writers import contest
from tests.postgres import find_server, running_server


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_of_many_publishers_of_one_version_one_wins(tmp_path: Path, database: str) -> None:
    """The others are refused by name; who does not ask for a version gets one; no failure of the database is seen."""
    if database == "sqlite":
        found = contest(tmp_path, 8, 3)
    else:
        programs = find_server()
        if programs is None:
            pytest.skip("PostgreSQL's server is not installed (Debian: postgresql)")
        with running_server(programs) as url:
            found = contest(tmp_path, 8, 3, url)
    assert (found.wrong, found.errors) == ([], [])
    assert (found.won_once, found.refused, found.others) == (3, 21, 48)
