"""YAML from strangers: plain values only, no merge keys, a bounded length.

A few lines of merge keys stand for more pairs than fit into memory; anchors alone do not, for they share one value.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["MAX_YAML", "load_yaml"]

MAX_YAML = 64 << 10
MAX_FLOW_DEPTH = 64
BRACKETS = re.compile(r"[\[{\]}]")
MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse what would be flattened."""
        for key, _ in node.value:
            if key.tag == MERGE:
                raise yaml.constructor.ConstructorError(None, None, "merge keys are not read", key.start_mark)


def load_yaml(text: str) -> Any:
    """The value of one document. Raises ValueError that says what is wrong."""
    if len(text) > MAX_YAML:
        raise ValueError(f"{len(text)} characters, at most {MAX_YAML} are read")
    depth = 0
    for bracket in BRACKETS.findall(text):  # the parser takes a second to find that it went too deep
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_FLOW_DEPTH:
            raise ValueError(f"more than {MAX_FLOW_DEPTH} brackets are open")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise ValueError(" ".join(str(error).split())[:500]) from None
