"""Read the head of a client's request: bytes in, a start line and headers out, or a fault.

Strategy. Everything that RFC 9112 lets a server refuse and that two servers could read in two ways is refused. One
search over the whole head finds all characters that no head may have, so a line costs two operations on strings, and
only names, of which clients send few, are cached. The result is what Tornado's parser makes of the same bytes, in the
form that it gives to a handler: a path as the target, ``Host`` and ``Content-Length`` once, the version 1.0 or 1.1.

This module does no I/O.

Sources: RFC 9112 sections 2 to 7, RFC 9110 sections 4, 5, 7 and 10. ``tests/relay/test_http.py`` has a row for each
requirement.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv6Address

from tornado.httputil import HTTPHeaders, RequestStartLine

from tornado_fal_proxy.errors import ProxyError
from tornado_fal_proxy.rules.headers import list_members

__all__ = [
    "MAX_CACHED_LINE_CHARS",
    "MAX_HEAD_BYTES",
    "MAX_HEAD_LINES",
    "MAX_REQUEST_LINE_BYTES",
    "MalformedRequest",
    "RequestFault",
    "RequestTooLarge",
    "RequestTooSlow",
    "UnsupportedRequest",
    "continues",
    "keeps_alive",
    "parse_head",
]

# Limits a head, as Tornado does: eight times as much as nginx and Apache take in a line.
MAX_HEAD_BYTES = 64 * 1024
# Limits the lines of a head: more than a browser sends behind several proxies (about 40), and as many as Apache takes.
# Each line costs time, however short it is.
MAX_HEAD_LINES = 100
# Limits the request line: RFC 9112 section 3 wants 8000 bytes, and the route is called by its path alone.
MAX_REQUEST_LINE_BYTES = 8192
# Limits a length or a chunk's size, of which more digits would only cost time: 2**60 has 19 digits.
MAX_LENGTH_DIGITS = 18
# Names in the cache, and the longest of them: no more than 1 MB in all, whatever clients send.
MAX_CACHED_NAMES, MAX_CACHED_NAME_CHARS = 2048, 64
MAX_CACHED_LINES, MAX_CACHED_LINE_CHARS = 256, 256

# All bytes except controls (RFC 9110 section 5.5); of these only HTAB and line ends may be in a head.
_ALLOWED = bytes({*b"\t\r\n", *range(0x20, 0x7F), *range(0x80, 0x100)})
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_DIGITS = re.compile(r"[0-9]+")
_REQUEST_LINE = re.compile(rf"({_TOKEN.pattern}) ([\x21\x22\x24-\x7e]+) HTTP/([0-9])\.([0-9])")
_ABSOLUTE = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE)
# RFC 3986 section 3.2 without user information, and without the comma that joins two hosts.
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|(?:[A-Za-z0-9\-._~!$&'()*+;=]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?")
# The transfer codings that have names (RFC 9112 section 7) and, last, one that lost its name.
_CODINGS = {"chunked", "gzip", "x-gzip", "compress", "x-compress", "deflate", "identity"}


class RequestFault(ProxyError):
    """Refuse a request that cannot be read. The connection is closed after the response."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class MalformedRequest(RequestFault):
    """Refuse what is no HTTP/1.1, or has more than one reading."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


class RequestTooLarge(RequestFault):
    """Refuse a request of which a part is larger than this server takes."""


class RequestTooSlow(RequestFault):
    """Refuse a request that does not arrive."""

    def __init__(self, message: str) -> None:
        super().__init__(408, message)


class UnsupportedRequest(RequestFault):
    """Refuse what is HTTP, but not implemented here."""


def parse_head(data: bytes) -> tuple[RequestStartLine, HTTPHeaders, int | None]:
    """Return the start line and the headers of a head that ends with its empty line, and the length of the body.

    The length is None if the body is in chunks. Raise RequestFault.
    """
    if data.translate(None, _ALLOWED) or data.count(b"\r") != data.count(b"\r\n"):
        raise MalformedRequest("The head of the request has a control character.")
    first, *lines = data.decode("latin-1").replace("\r\n", "\n").split("\n")[:-2]
    if len(first) > MAX_REQUEST_LINE_BYTES:
        raise RequestTooLarge(414, "The URL of the request is too long.")
    start_line, authority = (_cached_line if len(first) <= MAX_CACHED_LINE_CHARS else _request_line)(first)
    headers = HTTPHeaders()
    fields, combined = headers._as_list, headers._combined_cache
    for line in lines:
        name, colon, value = line.partition(":")
        key = _cached_name(name) if len(name) <= MAX_CACHED_NAME_CHARS else _name(name)
        if not key or not colon:
            raise MalformedRequest("A header line of the request is malformed.")
        value = value.strip(" \t")
        if key in fields:
            fields[key].append(value)
            combined.pop(key, None)
        else:
            fields[key] = [value]
            combined[key] = value
    _check_host(start_line, headers, authority)
    return start_line, headers, _body_length(start_line, headers)


def _name(name: str) -> str:
    """Return a header's name as Tornado writes it, and an empty text for what is no name."""
    return "-".join([part.capitalize() for part in name.split("-")]) if _TOKEN.fullmatch(name) else ""


_cached_name = lru_cache(MAX_CACHED_NAMES)(_name)


def _request_line(line: str) -> tuple[RequestStartLine, str | None]:
    """Return the start line with a path as its target, and the authority of a target in absolute form."""
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise MalformedRequest("The first line of the request is malformed.")
    method, target, major, minor = match.groups()
    if major != "1":
        raise UnsupportedRequest(505, "This server speaks HTTP/1.1.")
    authority = None
    if absolute := _ABSOLUTE.fullmatch(target):
        authority, target = absolute.groups()
        if not authority or not _is_host(authority):
            raise MalformedRequest("The URL of the request has no valid host.")
        if not target.startswith("/"):
            target = f"/{target}"
    elif method == "CONNECT" and not target.startswith("/"):
        raise UnsupportedRequest(501, "This server opens no tunnels.")
    elif not target.startswith("/") and (method, target) != ("OPTIONS", "*"):
        raise MalformedRequest("The target of the request is malformed.")
    return RequestStartLine(method, target, "HTTP/1.0" if minor == "0" else "HTTP/1.1"), authority


_cached_line = lru_cache(MAX_CACHED_LINES)(_request_line)


def _check_host(start_line: RequestStartLine, headers: HTTPHeaders, authority: str | None) -> None:
    """Require one valid Host, which the authority of the target replaces (RFC 9112 section 3.2)."""
    hosts = headers.get_list("Host")
    if len(hosts) > 1 or (not hosts and start_line.version != "HTTP/1.0"):
        raise MalformedRequest("The request must have exactly one Host header.")
    if hosts and not _is_host(hosts[0]):
        raise MalformedRequest("The Host header of the request is malformed.")
    if authority is not None:
        headers["Host"] = authority


@lru_cache(256)
def _is_host(text: str) -> bool:
    match = _HOST.fullmatch(text) if len(text) <= MAX_CACHED_LINE_CHARS else None
    if match is None:
        return False
    try:
        return match[1] is None or bool(IPv6Address(match[1]))
    except ValueError:
        return False


def _body_length(start_line: RequestStartLine, headers: HTTPHeaders) -> int | None:
    """Return the length of the request's body, None if the body is in chunks. Raise RequestFault.

    RFC 9112 sections 6.1 to 6.3, of which every MAY that a smuggled request could use is refused.
    """
    fields = headers._as_list  # its names are as parse_head() has written them
    lengths = fields.get("Content-Length")
    if "Transfer-Encoding" in fields:
        _check_codings(headers["Transfer-Encoding"])
        if lengths:
            raise MalformedRequest("The request has both Content-Length and Transfer-Encoding.")
        if start_line.version == "HTTP/1.0":
            raise MalformedRequest("HTTP/1.0 has no Transfer-Encoding.")
        return None
    if lengths is None:
        return 0
    if len(lengths) == 1 and _DIGITS.fullmatch(lengths[0]) and len(lengths[0]) <= MAX_LENGTH_DIGITS:
        return int(lengths[0])
    first, *others = (value.strip(" \t") for value in headers["Content-Length"].split(","))
    if not _DIGITS.fullmatch(first) or any(other != first for other in others):
        raise MalformedRequest("The Content-Length of the request is malformed.")
    if len(first) > MAX_LENGTH_DIGITS:
        raise RequestTooLarge(413, "The body of the request is too large.")
    if others:
        headers["Content-Length"] = first
    return int(first)


def _check_codings(value: str) -> None:
    *others, last = (name.strip(" \t").lower() for name in value.split(","))
    names = [*others, last]
    if not all(map(_TOKEN.fullmatch, names)):
        raise MalformedRequest("The Transfer-Encoding of the request is malformed.")
    if any(name not in _CODINGS for name in names) or (others and last == "chunked" and "chunked" not in others):
        raise UnsupportedRequest(501, "This server knows no Transfer-Encoding except chunked.")
    if names != ["chunked"]:
        raise MalformedRequest("The Transfer-Encoding of the request must end with chunked, once.")


def keeps_alive(start_line: RequestStartLine, headers: HTTPHeaders) -> bool:
    """Return whether the client wants the connection kept (RFC 9112 section 9.3)."""
    if "Connection" not in headers:
        return start_line.version != "HTTP/1.0"
    options = list_members(headers["Connection"])
    return "close" not in options and (start_line.version != "HTTP/1.0" or "keep-alive" in options)


def continues(start_line: RequestStartLine, headers: HTTPHeaders) -> bool:
    """Return whether the client waits for "100 Continue" (RFC 9110 section 10.1.1). Raise UnsupportedRequest.

    HTTP/1.0 has no expectations: the header is removed there, because a handler reads it too.
    """
    if "Expect" not in headers:
        return False
    if start_line.version == "HTTP/1.0":
        del headers["Expect"]
        return False
    if list_members(headers["Expect"]) != {"100-continue"}:
        raise UnsupportedRequest(417, "This server meets no expectation except 100-continue.")
    return True
