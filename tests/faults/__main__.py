"""The full form: `python -m tests.faults [--kills 200] [--only publish,…,writers]`.

Prints a table of kills and one of many publishers at once, and ends with 1 when anything is lost, partial or in the way.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.collecting import CollectSite
from tests.faults.composing import ComposeSite, JobSite
from tests.faults.kills import HEADINGS, soak
from tests.faults.migrating import MigrationSite
from tests.faults.publishing import PublishSite
from tests.faults.pushing import PushSite
from tests.faults.writers import WRITER_HEADINGS, Contest, contest
from tests.postgres import find_server, running_server

SITES = {site.name: site for site in (PublishSite, PushSite, ComposeSite, JobSite, CollectSite, MigrationSite)}


WRITERS = "writers"


def table(headings: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """Rows in Markdown."""
    lines = [headings, tuple("---" if index == 0 else "---:" for index in range(len(headings))), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> int:
    """Run, print, and say whether all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="of each operation")
    parser.add_argument("--publishers", type=int, default=32, help="at a time")
    parser.add_argument("--rounds", type=int, default=50, help="of all publishers")
    parser.add_argument("--only", default=",".join((*SITES, WRITERS)), help="operations, with commas between them")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kills: list[tuple[object, ...]] = []
    contests: list[tuple[object, ...]] = []
    wrong: list[str] = []
    for name in options.only.split(","):
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            if name != WRITERS:
                tally = soak(SITES[name](Path(folder)), options.kills, options.seed)
                kills.append(tally.row)
                told = tally.wrong
            else:
                found = contest_everywhere(Path(folder), options.publishers, options.rounds)
                contests += [item.row for item in found]
                told = [words for item in found for words in (*item.wrong, *item.errors)]
        wrong += told
        print(f"{name}: {len(told)} things wrong, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        for words in told:
            print(f"  {words}", file=sys.stderr, flush=True)
    for headings, rows in ((HEADINGS, kills), (WRITER_HEADINGS, contests)):
        if rows:
            print(table(headings, rows), end="\n\n")
    return 1 if wrong else 0


def contest_everywhere(folder: Path, publishers: int, rounds: int) -> list[Contest]:
    """On SQLite, and on PostgreSQL where its server is installed."""
    found = [contest(folder / "sqlite", publishers, rounds)]
    if (programs := find_server()) is not None:
        with running_server(programs) as url:
            found.append(contest(folder / "postgresql", publishers, rounds, url))
    return found


if __name__ == "__main__":
    sys.exit(main())
