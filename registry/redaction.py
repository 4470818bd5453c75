"""Secrets out of what is logged: tokens, Authorization values, passwords in URLs."""

from __future__ import annotations

import logging
import re

__all__ = ["RedactingFormatter", "redact"]

SECRETS = re.compile(
    r"(?P<token>ar_[0-9a-f]{12}_)[A-Za-z0-9_-]+"
    r"|(?P<scheme>\b(?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{8,}"
    r"|(?P<user>://[^\s/:@]*:)[^\s/@]+(?=@)",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """`text` with each secret replaced by ***; a token keeps its id, which names it in `registry token list`."""
    return SECRETS.sub(lambda match: f"{match['token'] or match['scheme'] or match['user']}***", text)


class RedactingFormatter(logging.Formatter):
    """Redacts whole lines, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """The line without secrets."""
        return redact(super().format(record))
