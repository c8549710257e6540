"""The bytes of an image that a request names: a ``data:`` URL, or an address on an allow-list.

A fetch must not become a way into the network that the service runs in. So only hosts on the list
are fetched from. A name is resolved once, all its addresses must be public, and the connection goes
to that very address (a second look-up could answer differently). Redirects are refused, proxies of
the environment are not used, bytes are capped, and one deadline covers the whole fetch, however
slowly the bytes drip.
"""

from __future__ import annotations

import ipaddress
import ssl
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from socket import SOCK_STREAM, getaddrinfo
from typing import Any

import httpcore
import httpx

from rayapp.errors import RequestError
from rayapp.vision.images import parse_data_url
from rayapp.vision.limits import ImageLimits

_PORTS = {"http": 80, "https": 443}
# These networks are public, but their addresses contain an IPv4 address that may not be.
_TUNNELS = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "2002::/16", "2001::/32")))


def image_bytes(url: str, limits: ImageLimits) -> tuple[bytes, str | None]:
    """Return the bytes of an image, and the media type that its sender claims.

    Raises:
        RequestError: The URL is malformed, not allowed, or does not answer with an image in time.
    """
    if url[:5].lower() == "data:":
        return parse_data_url(url, limits)
    deadline_s = time.monotonic() + limits.fetch_timeout_s
    target = _allowed(url, limits)
    address = _public_address(target.host, limits.fetch_timeout_s)
    try:
        return _download(target, address, limits, deadline_s)
    except httpcore.TimeoutException:
        raise RequestError(
            f"the image at {target.host} took longer than {limits.fetch_timeout_s:g} s"
        ) from None
    except (httpcore.NetworkError, httpcore.ProtocolError, OSError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise RequestError(f"the image at {target.host} cannot be fetched ({reason})") from None


def _allowed(url: str, limits: ImageLimits) -> httpx.URL:
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, ValueError, TypeError) as error:
        raise RequestError(f"an image's URL is malformed ({error}); send a data: URL") from None
    if target.scheme not in _PORTS or target.userinfo:
        raise RequestError("an image's URL must be data:, or http(s): without a user name")
    if target.host.lower() not in limits.allowed_hosts:
        raise RequestError(
            f"images from host {target.host!r} are not allowed here; send a data: URL"
        )
    if target.port not in (None, _PORTS[target.scheme]):
        raise RequestError(f"images are fetched from the standard port only, not {target.port}")
    return target


def _public_address(host: str, timeout_s: float) -> str:
    """Return an address of ``host``, all of whose addresses must be public."""
    lookup = ThreadPoolExecutor(max_workers=1)  # A resolver has no deadline of its own.
    try:
        answers = lookup.submit(getaddrinfo, host, None, type=SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in answers.result(timeout_s)]
    except (OSError, UnicodeError, FutureTimeoutError):
        raise RequestError(f"the image's host {host!r} cannot be resolved") from None
    finally:
        lookup.shutdown(wait=False)
    if not addresses or not all(is_public(address) for address in addresses):
        raise RequestError(
            f"the image's host {host!r} has an address that is not public; send a data: URL"
        )
    return addresses[0]


def is_public(address: str) -> bool:
    """True if an IP address, also one wrapped in another, belongs to the public internet."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    tunnelled = any(parsed in network for network in _TUNNELS if network.version == parsed.version)
    return parsed.is_global and not parsed.is_multicast and not tunnelled


def _download(
    target: httpx.URL, address: str, limits: ImageLimits, deadline_s: float
) -> tuple[bytes, str | None]:
    headers = [("Host", target.host), ("Accept", "image/*"), ("Accept-Encoding", "identity")]
    chunks, num_bytes = [], 0
    with (
        httpcore.ConnectionPool(network_backend=_PinnedBackend(address, deadline_s)) as pool,
        pool.stream("GET", str(target), headers=headers) as response,
    ):
        if response.status != 200:
            raise RequestError(
                f"the image at {target.host} answered with status {response.status}, not 200 "
                "(redirects are not followed); send a data: URL"
            )
        for chunk in response.iter_stream():
            num_bytes += len(chunk)
            if num_bytes > limits.max_bytes:
                raise RequestError(f"the image at {target.host} exceeds {limits.max_bytes} bytes")
            chunks.append(chunk)
        received = {name.lower(): value.decode("latin-1") for name, value in response.headers}
    kind = received.get(b"content-type", "").partition(";")[0].strip().lower()
    return b"".join(chunks), kind or None


class _PinnedBackend(httpcore.SyncBackend):
    """A network backend that connects to one address for any host name, until a deadline."""

    def __init__(self, address: str, deadline_s: float) -> None:
        self._address = address
        self._deadline_s = deadline_s

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Open a connection to the pinned address."""
        stream = super().connect_tcp(self._address, port, timeout=_left(self._deadline_s))
        return _DeadlineStream(stream, self._deadline_s)


class _DeadlineStream(httpcore.NetworkStream):
    """A stream whose every wait ends at one deadline."""

    def __init__(self, stream: httpcore.NetworkStream, deadline_s: float) -> None:
        self._stream = stream
        self._deadline_s = deadline_s

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline_s))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline_s))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left_s = _left(self._deadline_s)
        stream = self._stream.start_tls(ssl_context, server_hostname, left_s)
        return _DeadlineStream(stream, self._deadline_s)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise httpcore.ReadTimeout("the deadline has passed")
    return left_s
