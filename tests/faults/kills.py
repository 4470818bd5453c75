"""The loop: prepare, kill, look at what is there, run again, look once more; and in the end collect what was left."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.faults.victims import Blow, Ended

__all__ = ["HEADINGS", "Site", "Tally", "soak"]

HEADINGS = ("operation", "kills", "in the middle", "acknowledged", "lost", "partial", "recovered", "left after gc")
BEYOND = 1.1  # some kills come after the end: what was acknowledged must be there


class Site(Protocol):
    """A registry in which one operation is killed again and again.

    `strike` runs the operation and kills it. `lost` and `partial` name what is wrong at once afterwards; `recover` runs
    the operation again and names what is wrong then; `left` collects, and names what should have been collected.
    """

    name: str

    def strike(self, index: int, blow: Blow) -> Ended: ...
    def lost(self, ended: Ended) -> list[str]: ...
    def partial(self, ended: Ended) -> list[str]: ...
    def recover(self) -> list[str]: ...
    def left(self) -> list[str]: ...


@dataclass(slots=True)
class Tally:
    """What a number of kills did: a row of the table, and the words for all that went wrong."""

    operation: str
    kills: int = 0
    middle: int = 0
    acknowledged: int = 0
    lost: int = 0
    partial: int = 0
    recovered: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def row(self) -> tuple[Any, ...]:
        """In the order of HEADINGS."""
        return (self.operation, self.kills, self.middle, self.acknowledged, self.lost, self.partial, self.recovered,
                self.left)  # fmt: skip


def soak(site: Site, kills: int, seed: int = 0, *, whole_runs: int = 2) -> Tally:
    """Kill `kills` times, by turns after a random time and at a random call, which the last unharmed run measures."""
    rng, tally = random.Random(f"{site.name} {seed}"), Tally(site.name, kills)
    for index in range(-whole_runs, 0):  # the first one warms caches
        whole = site.strike(index, Blow())
        problems = [*site.lost(whole), *site.partial(whole), *site.recover()]
        assert not whole.killed, whole
        assert whole.said is not None, whole
        assert not problems, problems
    for index in range(kills):
        fraction = rng.uniform(0, BEYOND)
        blow = Blow(seconds=fraction * whole.seconds) if index % 2 == 0 else Blow(call=int(fraction * whole.calls))
        ended = site.strike(index, blow)
        tally.middle += ended.killed and ended.said is None
        tally.acknowledged += ended.said is not None
        where = f"{site.name} {index}, {blow}"
        if not ended.killed and ended.said is None:
            tally.wrong.append(f"{where}: it failed: {ended.errors[-500:]}")
        lost, partial, again = site.lost(ended), site.partial(ended), site.recover()
        tally.lost, tally.partial = tally.lost + len(lost), tally.partial + len(partial)
        tally.recovered += not again
        told = {words.partition(": ")[2] for words in tally.wrong}
        tally.wrong += [f"{where}: {words}" for words in dict.fromkeys((*lost, *partial, *again)) if words not in told]
    left = site.left()
    tally.left = len(left)
    tally.wrong += [f"{site.name}: {words}" for words in left]
    return tally
