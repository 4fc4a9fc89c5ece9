"""The rules of the relay, as pure functions: may this call pass, and which headers go which way.

Strategy: the request's head is one list of pairs, read once. :func:`decide` refuses in the order of fal's proxy formula
(405, 400, 412, 415, then 413) and otherwise returns a frozen :class:`Target`; the caller's URL string goes no further.
The operator's own rules, where there are any, come in between, as soon as the target is known (403, after 412).
Header building starts from nothing and adds what PROTOCOL's list allows, so that a header nobody thought of stays out.

This module is the whole of the security review, together with :mod:`tornado_fal_proxy.access` where rules are set. It
uses the standard library only and never does I/O, logs, looks at the clock or reads the environment.

Sources: fal's "server-side integration" page (the formula), RFC 9110 sections 7.6.1 and 8.3, RFC 9112 section 5.2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from tornado_fal_proxy._version import __version__
from tornado_fal_proxy.errors import (
    BodyTooLarge,
    HeadersTooLarge,
    MalformedAnswer,
    MethodNotAllowed,
    TargetMissing,
    TargetRefused,
    UnsupportedMediaType,
)

if TYPE_CHECKING:
    from tornado_fal_proxy.access import AccessRules

__all__ = [
    "Pairs",
    "ResponseHead",
    "Target",
    "decide",
    "parse_response_head",
    "parse_target",
    "request_headers",
]

Pairs = Sequence[tuple[str, str]]
"""Header fields in the order received, duplicates included, names in lower case."""

TARGET_HEADER = "x-fal-target-url"
CLIENT_PROXY = f"tornado-fal-proxy/{__version__}"

# Scheme, host, the one allowed port, path, query, fragment: each character class is a list of what may pass, so there
# is nothing here for a second parser (a WHATWG one, libcurl, fal's server) to read in another way. No userinfo, no
# backslash, no percent-encoding in the host, no upper case there, no punycode (a WHATWG parser decodes and checks it).
# Path and query are any other printable ASCII.
_LABEL = r"(?!xn--)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_TARGET = re.compile(
    rf"https://((?:{_LABEL}\.)*fal\.(?:ai|run))(?::443)?"
    r"(/[!-\"$->@-\[\]-~]*)?(?:\?([!-\"$-\[\]-~]*))?(?:\#[!-\[\]-~]*)?"
)
_MAX_HOST = 253  # RFC 1035 section 2.3.4, without the root's dot
# Many callers share a connection to fal, and a server may close it for one head that is too large for it: so one has
# less than any common server takes. The length of a URL is what RFC 9110 section 4.1 asks of all of them; the size of
# the headers counts 32 bytes more for each, as servers do (RFC 9113 section 6.5.2). fal's clients send about six.
MAX_URL_CHARS = 8000
MAX_RELAYED_HEADERS, MAX_RELAYED_BYTES = 64, 8192
_OVERHEAD = 32

_DIGITS = re.compile(r"[0-9]{1,18}")
_JSON = re.compile(r"application/json[ \t]*(?:;.*)?", re.IGNORECASE)
_NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 section 5.6.2
_FIELD_VALUE = re.compile(r"[\t -~\x80-\xff]*")
# White space around the value is for strip(): as part of the pattern it takes quadratic time on a line that has much.
_FIELD_LINE = re.compile(rf"({_NAME}):({_FIELD_VALUE.pattern})\r?\n?".encode("latin-1"))
_STATUS_LINE = re.compile(rb"HTTP/([0-9](?:\.[0-9])?) ([1-9][0-9]{2})(?: .*)?\r?\n?", re.DOTALL)

# RFC 9110 section 7.6.1 and, for proxy-*, sections 11.7 and 7.6.1; what Connection lists is added for each message.
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)
# The formula: the server sets these two itself, for the body reaches the caller decoded.
_SET_BY_SERVER = frozenset({"content-length", "content-encoding"})
_STAYS_HERE = _HOP_BY_HOP | _SET_BY_SERVER
_NOTHING: frozenset[str] = frozenset()
_NO_CODING = ("", "identity")
_RELAYED_BY_NAME = frozenset({"accept", "content-type", "user-agent"})
_RELAYED_BY_PREFIX = re.compile(rf"x-(?:app-)?fal-{_NAME}")
_NEVER_RELAYED = frozenset({TARGET_HEADER, "x-fal-client-proxy"})
_CLIENT_PROXY_LINE = f"x-fal-client-proxy: {CLIENT_PROXY}".encode()

# Most header lines are the same from call to call, in both directions: what came of a short one is kept.
_CACHED_BYTES = 128


@dataclass(frozen=True, slots=True)
class Target:
    """A URL of fal's, taken apart. Only :func:`parse_target` makes one from a caller's string.

    ``host`` is ``fal.ai``, ``fal.run`` or a name below them. ``path`` begins with a slash; ``query`` is None when the
    URL had no question mark, which is not the same as an empty one. Both are byte for byte what the caller wrote.
    """

    host: str
    path: str
    query: str | None = None

    @property
    def request_target(self) -> str:
        """Path and query as they stand in the request line (RFC 9112 section 3.2.1)."""
        return self.path if self.query is None else f"{self.path}?{self.query}"

    @property
    def url(self) -> str:
        """The whole URL, rebuilt from the checked parts."""
        return f"https://{self.host}{self.request_target}"


class ResponseHead(NamedTuple):
    """The head of the target's answer, ready for the caller.

    ``headers`` are those that may be passed on, duplicates kept. ``length`` is the body's length in bytes where the
    target declared it and the body is not encoded, else None. ``protocol`` is ``"1.0"``, ``"1.1"`` or ``"2"``.
    ``coding`` is the content-encoding in lower case, empty where there is none.
    """

    status: int
    protocol: str
    headers: list[tuple[str, str]]
    length: int | None
    event_stream: bool
    coding: str = ""

    @property
    def has_body(self) -> bool:
        """Whether the status allows a body (RFC 9110 sections 15.3.5 and 15.4.5)."""
        return self.status not in (204, 304)


def parse_target(url: str) -> Target:
    """``url`` as a Target. A fragment is allowed and dropped, as every HTTP client does. Raises TargetRefused."""
    if len(url) > MAX_URL_CHARS:
        raise TargetRefused(f"a URL of {len(url)} characters")
    match = _TARGET.fullmatch(url)
    if match is None or len(match[1]) > _MAX_HOST:
        raise TargetRefused
    return Target(match[1], match[2] or "/", match[3])


def decide(method: str, headers: Pairs, *, max_body_bytes: int, access: AccessRules | None = None) -> Target:
    """The target of a call that may pass, from nothing but its head.

    Raises, in this order: MethodNotAllowed, TargetMissing, TargetRefused, AccessRefused, UnsupportedMediaType,
    BodyTooLarge.
    """
    urls = [value for name, value in headers if name == TARGET_HEADER]
    if method not in ("GET", "POST"):
        may_put = access is not None and access.cancels(urls)
        if method != "PUT" or not may_put:
            raise MethodNotAllowed(may_put=may_put)
    if len(urls) != 1 or not urls[0]:
        raise TargetMissing
    target = parse_target(urls[0])
    if access is not None:
        access.check(method, target)
    _check_body(headers, max_body_bytes)
    return target


def _check_body(headers: Pairs, max_body_bytes: int) -> None:
    """Whether the declared body, if there is one, is JSON and small enough. Its length is proved while it is read."""
    has_body = is_json = too_large = False
    other_type = encoded = False
    for name, value in headers:
        if name == "content-type":
            is_json = True
            other_type = other_type or not _JSON.fullmatch(value)
        elif name == "content-length":
            length = _length(value)
            has_body = has_body or length != 0
            too_large = too_large or (length is not None and length > max_body_bytes)
        elif name == "transfer-encoding":
            has_body = True
        elif name == "content-encoding":
            encoded = encoded or value.lower() != "identity"
    if not has_body:
        return
    if other_type or encoded or not is_json:
        raise UnsupportedMediaType
    if too_large:
        raise BodyTooLarge


def _length(value: str) -> int | None:
    """A content-length of up to 18 digits, more than any body has; anything else is the server's to refuse."""
    return int(value) if _DIGITS.fullmatch(value) else None


def request_headers(headers: Pairs, authorization: bytes) -> list[bytes]:
    """The header lines to send to fal for a call that came with ``headers``, in libcurl's notation.

    That notation (CURLOPT_HTTPHEADER) writes ``name;`` for an empty value and ``name:`` to keep libcurl from adding a
    header of its own. Raises HeadersTooLarge.
    """
    lines = []
    absent = set(_RELAYED_BY_NAME)
    listed = _listed_by_connection(headers)
    for name, value in headers:
        if _is_relayed(name) and name not in listed:
            line = _field_line(name, value) if len(value) < _CACHED_BYTES else _field_line.__wrapped__(name, value)
            if line is not None:
                absent.discard(name)
                lines.append(line)
    if len(lines) > MAX_RELAYED_HEADERS or sum(map(len, lines)) + _OVERHEAD * len(lines) > MAX_RELAYED_BYTES:
        raise HeadersTooLarge(f"{len(lines)} headers for fal of {sum(map(len, lines))} bytes")
    return [authorization, _CLIENT_PROXY_LINE, b"Expect:", *lines, *(f"{name}:".encode() for name in absent)]


@lru_cache(256)
def _is_relayed(name: str) -> bool:
    return name not in _NEVER_RELAYED and (name in _RELAYED_BY_NAME or bool(_RELAYED_BY_PREFIX.fullmatch(name)))


@lru_cache(1024)
def _field_line(name: str, value: str) -> bytes | None:
    """The line of a header for fal; None where the value holds a control character, which must not reach the wire."""
    if not _FIELD_VALUE.fullmatch(value):
        return None
    return (f"{name}: {value}" if value else f"{name};").encode("latin-1")


def parse_response_head(lines: Sequence[bytes]) -> ResponseHead:
    """The head of an answer, from its lines as received: the status line and the fields, without the empty line.

    A line that is not a valid field is left out rather than made the caller's problem: the result it came with is
    paid for. A folded line continues the one before it (RFC 9112 section 5.2). Raises MalformedAnswer.
    """
    status_line = _STATUS_LINE.fullmatch(lines[0]) if lines else None
    if status_line is None:
        raise MalformedAnswer(f"status line {bytes(lines[0][:80]) if lines else b''!r}")
    fields = [field for line in _unfolded(lines) if (field := _field(line)) is not None]
    length, encoded, event_stream = None, False, False
    codings: list[str] = []
    never = _listed_by_connection(fields)
    headers = []
    for name, value in fields:
        if name not in _STAYS_HERE:
            if name not in never and not name.startswith("proxy-"):
                headers.append((name, value))
            if name == "content-type":
                event_stream = value.lower().startswith("text/event-stream")
        elif name == "content-length":
            length = _length(value)
        elif name == "content-encoding":
            encoded = True
            codings += [coding for part in value.split(",") if (coding := part.strip(" \t").lower()) not in _NO_CODING]
        elif name == "transfer-encoding":
            encoded = True  # by it too a length is void (RFC 9112 section 6.3)
    return ResponseHead(
        int(status_line[2]),
        status_line[1].decode(),
        headers,
        None if encoded else length,
        event_stream,
        ", ".join(codings),
    )


def _listed_by_connection(fields: Pairs) -> frozenset[str]:
    """The names that only concern this hop because a Connection field says so (RFC 9110 section 7.6.1)."""
    values = [value for name, value in fields if name == "connection"]
    return _options(",".join(values)) if values else _NOTHING


@lru_cache(64)
def _options(value: str) -> frozenset[str]:
    return frozenset(option.strip(" \t").lower() for option in value.split(","))


def _unfolded(lines: Sequence[bytes]) -> list[bytes]:
    """The field lines of a head, each whole; its first line is the status line."""
    unfolded: list[bytes] = []
    for line in lines[1:]:
        if unfolded and line.startswith((b" ", b"\t")):
            unfolded[-1] = unfolded[-1].rstrip(b"\r\n") + b" " + line.strip()
        else:
            unfolded.append(line)
    return unfolded


def _field(line: bytes) -> tuple[str, str] | None:
    return _parsed_field(line) if len(line) < _CACHED_BYTES else _parsed_field.__wrapped__(line)


@lru_cache(1024)
def _parsed_field(line: bytes) -> tuple[str, str] | None:
    """Name, in lower case, and value of a field line; None when it is not one."""
    match = _FIELD_LINE.fullmatch(line)
    return match and (match[1].lower().decode("ascii"), match[2].strip(b" \t").decode("latin-1"))
