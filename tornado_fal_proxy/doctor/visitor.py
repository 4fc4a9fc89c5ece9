"""Send one request after another to a proxy, and note how each response came.

Strategy. libcurl, as in the relay, because it tells times, versions and the reasons of its errors. Each request may
have a connection of its own or that of the one before, as with a browser. Nothing is repeated or redirected.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pycurl

__all__ = ["Seen", "Visitor"]

# Limit, in seconds, name lookup with TCP and TLS, and a response that does not say how long it takes.
CONNECT_TIMEOUT_S, TIMEOUT_S = 10, 20
# Limit what is kept of a body, and what is read of it: no response to these requests is as long.
MAX_BODY_BYTES, MAX_READ_BYTES = 64 * 1024, 1024 * 1024

_VERSIONS = {
    pycurl.CURL_HTTP_VERSION_1_0: "HTTP/1.0",
    pycurl.CURL_HTTP_VERSION_1_1: "HTTP/1.1",
    pycurl.CURL_HTTP_VERSION_2_0: "HTTP/2",
    pycurl.CURL_HTTP_VERSION_3: "HTTP/3",
}


@dataclass
class Seen:
    """Hold one response. Times are in seconds since the request began, and ``wait_s`` since it had left.

    ``status`` is 0 where there was none. ``error`` and ``reason`` are libcurl's where it is not whole. ``arrivals`` are
    the times at which pieces of the body came. ``took_body`` is true where the body that was announced would have been
    taken.
    """

    status: int = 0
    version: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    arrivals: list[float] = field(default_factory=list)
    seconds: float = 0.0
    wait_s: float = 0.0
    connect_s: float = 0.0
    tls_s: float = 0.0
    error: int = 0
    reason: str = ""
    took_body: bool = False
    expires: str = ""

    def header(self, name: str) -> str | None:
        """Return the first value of a header, or None."""
        return next(iter(self.all(name)), None)

    def all(self, name: str) -> list[str]:
        """Return the values of a header, whose ``name`` is in lower case."""
        return [value for known, value in self.headers if known == name]


class Visitor:
    """Send requests to one URL, with the ``headers`` that the visitor was given."""

    def __init__(
        self, url: str, *, headers: Sequence[str] = (), ca_certs: str | None = None, connect_to: str | None = None
    ) -> None:
        self.url = url
        self._headers = list(headers)
        self._ca_certs, self._connect_to = ca_certs, connect_to
        self._curl = pycurl.Curl()
        #: Limits a response that does not say how long it takes, in seconds.
        self.timeout_s: float = TIMEOUT_S

    def close(self) -> None:
        """Close the connection."""
        self._curl.close()

    def send(
        self,
        method: str = "GET",
        headers: Sequence[str] = (),
        *,
        body: bytes | None = None,
        announced_bytes: int | None = None,
        timeout_s: float | None = None,
    ) -> Seen:
        """Send a request, and return what came.

        ``announced_bytes`` is a length that the request declares, with ``expect: 100-continue``, and never sends.
        """
        seen, curl = Seen(), self._curl
        curl.reset()
        self._configure(curl, method, [*self._headers, *headers], timeout_s or self.timeout_s)
        if announced_bytes is not None:
            self._announce(curl, announced_bytes, seen)
        elif body is not None or method == "POST":
            curl.setopt(pycurl.POSTFIELDS, body or b"")
            curl.setopt(pycurl.CUSTOMREQUEST, method)
        began = time.monotonic()

        left = MAX_READ_BYTES

        def write(data: bytes) -> int | None:
            nonlocal left
            left -= len(data)
            seen.arrivals.append(time.monotonic() - began)
            seen.body += data[: MAX_BODY_BYTES - len(seen.body)]
            return None if left > 0 else 0  # 0 ends it

        def header(line: bytes) -> None:
            if line.startswith(b"HTTP/"):
                seen.headers.clear()  # of a 100, or of an earlier try with another version
                return
            name, colon, value = line.decode("latin-1").partition(":")
            if colon:
                seen.headers.append((name.strip().lower(), value.strip()))

        curl.setopt(pycurl.WRITEFUNCTION, write)
        curl.setopt(pycurl.HEADERFUNCTION, header)
        try:
            curl.perform()
        except pycurl.error as exc:
            args: tuple[Any, ...] = exc.args
            seen.error, seen.reason = args if left > 0 else (args[0], f"it has more than {MAX_READ_BYTES} bytes")
        seen.seconds = time.monotonic() - began
        seen.wait_s = curl.getinfo(pycurl.TOTAL_TIME) - curl.getinfo(pycurl.PRETRANSFER_TIME)
        seen.status = curl.getinfo(pycurl.RESPONSE_CODE)
        seen.version = _VERSIONS.get(curl.getinfo(pycurl.INFO_HTTP_VERSION), "HTTP")
        seen.connect_s, seen.tls_s = curl.getinfo(pycurl.CONNECT_TIME), curl.getinfo(pycurl.APPCONNECT_TIME)
        seen.expires = _expiry(curl.getinfo(pycurl.INFO_CERTINFO))
        return seen

    def _configure(self, curl: Any, method: str, headers: list[str], timeout_s: float) -> None:
        for option, value in (
            (pycurl.URL, self.url),
            (pycurl.CUSTOMREQUEST, method),
            (pycurl.HTTPHEADER, headers),
            (pycurl.NOSIGNAL, True),
            (pycurl.PROXY, ""),  # a browser on the internet has none of this machine's proxies
            (pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_2TLS),
            (pycurl.CONNECTTIMEOUT_MS, CONNECT_TIMEOUT_S * 1000),
            (pycurl.TIMEOUT_MS, round(timeout_s * 1000)),
            (pycurl.OPT_CERTINFO, True),
        ):
            curl.setopt(option, value)
        if self._ca_certs is not None:
            curl.setopt(pycurl.CAINFO, self._ca_certs)
        if self._connect_to is not None:
            curl.setopt(pycurl.CONNECT_TO, [f"::{self._connect_to}"])

    @staticmethod
    def _announce(curl: Any, size: int, seen: Seen) -> None:
        def read(_size: int) -> int:
            seen.took_body = True
            return pycurl.READFUNC_ABORT

        curl.setopt(pycurl.POST, True)
        curl.setopt(pycurl.POSTFIELDSIZE_LARGE, size)
        curl.setopt(pycurl.READFUNCTION, read)
        curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        curl.setopt(pycurl.FRESH_CONNECT, True)  # the one before may be about to end
        curl.setopt(pycurl.FORBID_REUSE, True)
        curl.setopt(pycurl.EXPECT_100_TIMEOUT_MS, 5000)


def _expiry(certificates: Any) -> str:
    """Return when the first certificate of the chain ends to be valid, as libcurl writes it; empty without one."""
    for pair in certificates[0] if certificates else ():
        if pair[0] == "Expire date":
            return str(pair[1])
    return ""
