"""Requests that the registry makes because somebody named a place: only to public addresses, and only so many bytes.

A name is resolved once, every address that it has must be public, and the connection goes to the one that was checked:
a name that resolves to another address a moment later gains nothing. Redirects are requests like any other.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import httpx2

from composer.errors import PolicyError

__all__ = ["GuardedTransport", "guarded_hub", "public_address"]

# NAT64, Teredo and 6to4 hold an IPv4 address, which may be any.
TRANSLATED = tuple(ipaddress.IPv6Network(text) for text in ("64:ff9b::/32", "2001::/32", "2002::/16"))
CONNECT_S = 30.0
READ_S = 120.0
_ONE_AT_A_TIME = Lock()


def public_address(host: str, port: int) -> str:
    """The first address of `host`. Raises PolicyError where one of them is private, and ConnectError where none is."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise httpx2.ConnectError(f"{host}: {error}") from error
    addresses = [str(item[4][0]).partition("%")[0] for item in found]
    for address in addresses:
        if not _is_public(address):
            raise PolicyError(
                f"{host} is at the private address {address}, which an import does not reach",
                expected="a public address",
                found=address,
                remedy="allow it with --allow-private where the hub is your own",
            )
    return addresses[0]


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            address = address.ipv4_mapped
        elif any(address in network for network in TRANSLATED):
            return False
    return address.is_global and not address.is_multicast


class GuardedTransport(httpx2.BaseTransport):
    """An HTTP transport that checks addresses and counts bytes.

    budget: the bytes that all answers together may have. allow_private: whether private addresses are reached.
    """

    def __init__(self, budget: int, *, allow_private: bool, inner: httpx2.BaseTransport | None = None) -> None:
        self._inner = inner or httpx2.HTTPTransport()
        self._left = budget
        self._budget = budget
        self._allow_private = allow_private

    def spend(self, count: int) -> None:
        """Take bytes off the budget. Raises PolicyError when it is used up."""
        self._left -= count
        if self._left < 0:
            raise PolicyError(
                "the import is larger than it may be",
                expected=f"at most {self._budget} bytes",
                found="more",
                remedy="raise --max-bytes",
            )

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send the request to an address that was checked, under the name that it was made for."""
        url, extensions = request.url, dict(request.extensions)
        if not self._allow_private:
            address = public_address(url.host, url.port or (443 if url.scheme == "https" else 80))
            extensions["sni_hostname"] = url.host
            url = url.copy_with(host=address)
        sent = httpx2.Request(
            request.method, url, headers=request.headers, stream=request.stream, extensions=extensions
        )
        answer = self._inner.handle_request(sent)
        assert isinstance(answer.stream, httpx2.SyncByteStream)
        return httpx2.Response(
            answer.status_code,
            headers=answer.headers,
            stream=_Counted(answer.stream, self),
            extensions=answer.extensions,
        )

    def close(self) -> None:
        """Close all connections."""
        self._inner.close()


class _Counted(httpx2.SyncByteStream):
    """A body whose bytes are taken off the budget as they come."""

    def __init__(self, inner: httpx2.SyncByteStream, transport: GuardedTransport) -> None:
        self._inner = inner
        self._transport = transport

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._inner:
            self._transport.spend(len(chunk))
            yield chunk

    def close(self) -> None:
        self._inner.close()


@contextmanager
def guarded_hub(budget: int, *, allow_private: bool) -> Iterator[None]:
    """huggingface_hub speaks through a GuardedTransport inside the context, and not by Xet, which has its own way out.

    The library has one client a process, so contexts of several threads wait for each other.
    """
    from huggingface_hub import close_session, constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> httpx2.Client:
        return httpx2.Client(
            transport=GuardedTransport(budget, allow_private=allow_private),
            follow_redirects=True,
            timeout=httpx2.Timeout(READ_S, connect=CONNECT_S),
        )

    with _ONE_AT_A_TIME:
        xet, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
        set_client_factory(client)
        try:
            yield
        finally:
            set_client_factory(default_client_factory)
            close_session()
            constants.HF_HUB_DISABLE_XET = xet
