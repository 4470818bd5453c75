"""What the registry promises when things break: kill -9, many writers, full disks, failing fsyncs, clocks that jump.

victims.py     a process that is killed, after a time or at a call of the operating system
kills.py       the loop that kills, checks and counts
shelf.py       a registry whose content is checked past the services
publishing.py, pushing.py, composing.py, collecting.py, migrating.py     what is killed, and what must hold afterwards
writers.py     many publishers at once
test_*.py      the short form, part of `make test`
__main__.py    the full form, `make soak`: 200 kills of each, 32 publishers for 50 rounds
"""
