"""The command line: parses, calls a registry.interface.Registry, prints.

main.py           the group, global options, failures to exit codes
base.py           base add|list|show|verify|lineage|remove
adapters.py       publish, list, show, versions, search, alias, pull, visibility
lifecycle.py      yank, deprecate, quarantine, delete, gc
compatibility.py  compatible, bases, check
compose.py        plan, compose, inspect
jobs.py           jobs list|show|cancel|retry, worker
access.py         token, namespace, audit
bench.py          bench
service.py        serve, doctor
options.py        what is common to the commands, and which registry they talk to
output.py         human, json or quiet; views.py: each noun as text; progress.py: bytes on stderr
reference.py      docs/cli.md from the commands' own help
"""
