"""The full form: `python -m tests.faults [--kills 200] [--only publish,…]` prints a table and fails when anything is lost."""

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

SITES = {site.name: site for site in (PublishSite, PushSite, ComposeSite, JobSite, CollectSite, MigrationSite)}


def table(rows: list[tuple[object, ...]]) -> str:
    """Rows in Markdown."""
    lines = [HEADINGS, tuple("---" if index == 0 else "---:" for index in range(len(HEADINGS))), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> int:
    """Run, print, and say whether all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="of each operation")
    parser.add_argument("--only", default=",".join(SITES), help="operations, with commas between them")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows: list[tuple[object, ...]] = []
    wrong: list[str] = []
    for name in options.only.split(","):
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            tally = soak(SITES[name](Path(folder)), options.kills, options.seed)
        rows.append(tally.row)
        wrong += tally.wrong
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        for words in tally.wrong:
            print(f"  {words}", file=sys.stderr, flush=True)
    print(table(rows))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
