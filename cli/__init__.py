"""The command line: parses, calls a registry.interface.Registry, prints.

main.py           the group, global options, failures to exit codes
base.py           base add|list|show
adapters.py       publish, list, show, versions, search, alias, pull
compatibility.py  compatible, bases, check
compose.py        plan, compose, inspect
bench.py          bench
service.py        serve, doctor
options.py        what is common to the commands, and which registry they talk to
output.py         human, json or quiet; views.py: each noun as text; progress.py: bytes on stderr
reference.py      docs/cli.md from the commands' own help
"""
