"""Signed URLs: an upload's address is its permission, because clients send no token along with the bytes.

Keys live as long as the process; a URL that outlived it is refused, and its client asks for another.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from urllib.parse import urlencode

from composer.errors import PolicyError

__all__ = ["LIFETIME_S", "Signer"]

LIFETIME_S = 3600


class Signer:
    """Signs what a URL allows, until when."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def query(self, *what: object) -> str:
        """The query that makes a URL one for `what`, from now on for an hour."""
        expires = int(time.time()) + LIFETIME_S
        return urlencode({"expires": expires, "signature": self._sign(expires, what)})

    def token(self, *what: object) -> tuple[str, int]:
        """(token, time at which it expires): the same for a header."""
        expires = int(time.time()) + LIFETIME_S
        return f"{expires}.{self._sign(expires, what)}", expires

    def check(self, expires: int, signature: str, *what: object) -> None:
        """Raise PolicyError unless the signature is ours, for `what`, and not too old."""
        if not hmac.compare_digest(signature.encode(), self._sign(expires, what).encode()):
            raise PolicyError("the URL is not signed for this", expected="the URL that was given", remedy="push again")
        if expires < time.time():
            raise PolicyError("the URL has expired", expected=f"use within {LIFETIME_S} s", remedy="push again")

    def check_token(self, token: str, *what: object) -> None:
        """The same for a token."""
        expires, _, signature = token.partition(".")
        self.check(int(expires) if expires.isdecimal() else 0, signature, *what)

    def _sign(self, expires: int, what: tuple[object, ...]) -> str:
        text = "\n".join(map(str, (expires, *what)))
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
