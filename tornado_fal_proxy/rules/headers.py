"""Which headers go to fal, which come back, and how a response's head is read.

Strategy. A head is a sequence of pairs, read once, with duplicates kept. The lines for fal start from nothing and get
what a list allows, which keeps a header that nobody thought of from being sent. The headers for the client are fal's
except what concerns one hop only and what the server sets itself. Most header lines are the same from call to call, and
the result for a short line is cached in both directions.

This module never changes the pairs that it is given, never relays a control character, and reads no key: the line that
authorizes a request is an argument.

Sources: fal's "server-side integration" page (the list of headers), RFC 9110 sections 5.5 and 7.6.1, RFC 9112 sections
4, 5 and 6.3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from tornado_fal_proxy._version import __version__
from tornado_fal_proxy.errors import HeadersTooLarge, MalformedResponse
from tornado_fal_proxy.rules.target import TARGET_HEADER

__all__ = [
    "CLIENT_PROXY",
    "FIELD_NAME",
    "MAX_RELAYED_BYTES",
    "MAX_RELAYED_HEADERS",
    "Pairs",
    "ResponseHead",
    "content_length",
    "is_fals_own",
    "list_members",
    "parse_response_head",
    "request_headers",
]

Pairs = Sequence[tuple[str, str]]
"""Header fields in the order received, duplicates included, names in lower case."""

CLIENT_PROXY = f"tornado-fal-proxy/{__version__}"

# The headers of one request to fal. Many clients share a connection to fal, which a server may close when one head is
# too large, and common servers take more than this. Servers count _OVERHEAD_BYTES more for each header (RFC 9113
# section 6.5.2). fal's SDKs send about six headers.
MAX_RELAYED_HEADERS, MAX_RELAYED_BYTES = 64, 8192
_OVERHEAD_BYTES = 32

_DIGITS = re.compile(r"[0-9]{1,18}")
FIELD_NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 section 5.6.2
_FIELD_VALUE = re.compile(r"[\t -~\x80-\xff]*")
# strip() removes the white space around the value. A pattern would take quadratic time on a line that has much of it.
_FIELD_LINE = re.compile(rf"({FIELD_NAME})([ \t]*):({_FIELD_VALUE.pattern})\r?\n?".encode("latin-1"))
_STATUS_LINE = re.compile(rb"HTTP/(1\.[01]|2) ([1-9][0-9]{2})(?: .*)?\r?\n?", re.DOTALL)

# The fields of RFC 9110 section 7.6.1. Each message adds the names that its Connection field lists, and proxy-* is
# tested by prefix (section 11.7).
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)
# The server sets these two itself, because the body reaches the client decoded.
_SET_BY_SERVER = frozenset({"content-length", "content-encoding"})
_STAYS_HERE = _HOP_BY_HOP | _SET_BY_SERVER
_NO_CODING = ("", "identity")
_FRAMING = ("content-length", "transfer-encoding")
_WITHOUT_BODY = (204, 304)
_RELAYED_BY_NAME = frozenset({"accept", "content-type", "user-agent"})
_RELAYED_BY_PREFIX = re.compile(rf"x-(?:app-)?fal-{FIELD_NAME}")
_NEVER_RELAYED = frozenset({TARGET_HEADER, "x-fal-client-proxy"})
_CLIENT_PROXY_LINE = f"x-fal-client-proxy: {CLIENT_PROXY}".encode()

# The length of a line, or of a value, whose result is cached. It bounds the memory of the caches, and the lines that
# calls have in common are shorter.
_MAX_CACHED_BYTES = 128


class ResponseHead(NamedTuple):
    """The head of fal's response, ready for the client.

    ``headers`` are those that may be passed on, duplicates kept. ``length`` is the body's length in bytes where fal
    declared it and the body is not encoded, else None. ``protocol`` is ``"1.0"``, ``"1.1"`` or ``"2"``. ``coding`` is
    the content-encoding in lower case, empty where there is none. ``framed`` tells whether a length or chunks mark the
    end of the body, encoded or not. ``declared`` is that length, of the body as it comes. ``streams`` tells whether
    each piece must reach the client at once, as in an event stream.
    """

    status: int
    protocol: str
    headers: list[tuple[str, str]]
    length: int | None
    streams: bool
    coding: str = ""
    content_type: str = ""
    framed: bool = False
    declared: int | None = None

    @property
    def has_body(self) -> bool:
        """Return whether the status allows a body (RFC 9110 sections 15.3.5 and 15.4.5)."""
        return self.status not in _WITHOUT_BODY


def content_length(value: str) -> int | None:
    """Return a content-length in bytes, or None where it has not 1 to 18 digits, which is the server's to refuse."""
    return int(value) if _DIGITS.fullmatch(value) else None


def request_headers(headers: Pairs, authorization: bytes) -> list[bytes]:
    """Return the header lines for fal, in libcurl's notation, for a request that came with ``headers``.

    ``authorization`` is the line that carries the key. The notation (CURLOPT_HTTPHEADER) writes ``name;`` for an empty
    value and ``name:`` to keep libcurl from adding a header of its own. Raises HeadersTooLarge where the relayed lines
    exceed MAX_RELAYED_HEADERS or MAX_RELAYED_BYTES.
    """
    lines = []
    absent = set(_RELAYED_BY_NAME)
    listed = _listed_by_connection(headers)
    for name, value in headers:
        if _is_relayed(name) and name not in listed:
            line = _field_line(name, value) if len(value) < _MAX_CACHED_BYTES else _field_line.__wrapped__(name, value)
            if line is not None:
                absent.discard(name)
                lines.append(line)
    size = sum(map(len, lines))
    if len(lines) > MAX_RELAYED_HEADERS or size + _OVERHEAD_BYTES * len(lines) > MAX_RELAYED_BYTES:
        raise HeadersTooLarge(f"{len(lines)} headers for fal of {size} bytes")
    return [authorization, _CLIENT_PROXY_LINE, b"Expect:", *lines, *[f"{name}:".encode() for name in absent]]


@lru_cache(256)
def _is_relayed(name: str) -> bool:
    return name in _RELAYED_BY_NAME or is_fals_own(name)


def is_fals_own(name: str) -> bool:
    """Return whether a client's header of that name, in lower case, is one of fal's own that may be relayed."""
    return name not in _NEVER_RELAYED and _RELAYED_BY_PREFIX.fullmatch(name) is not None


@lru_cache(1024)
def _field_line(name: str, value: str) -> bytes | None:
    """Return the line of a header for fal, or None where a control character must not reach the wire."""
    if not _FIELD_VALUE.fullmatch(value):
        return None
    return (f"{name}: {value}" if value else f"{name};").encode("latin-1")


def parse_response_head(lines: Sequence[bytes]) -> ResponseHead:
    """Return the head of a response from its lines as received: the status line and the fields.

    The empty line at the end is not among ``lines``. A line that is not a valid field is left out and does not fail the
    call, because the result behind it is paid. A folded line continues the one before it (RFC 9112 section 5.2), and
    space before a colon is removed (section 5.1). Raises MalformedResponse where the status line is not valid (section
    4), or the end of the body cannot be told (section 6.3).
    """
    status_line = _STATUS_LINE.fullmatch(lines[0]) if lines else None
    if status_line is None:
        raise MalformedResponse(f"status line {bytes(lines[0][:80]) if lines else b''!r}")
    fields = [field for line in _unfolded(lines) if (field := _field(line)) is not None]
    encoded, transferred, content_type = False, "", ""
    lengths: list[str] = []
    codings: list[str] = []
    listed = _listed_by_connection(fields)
    headers = []
    for name, value in fields:
        if name not in _STAYS_HERE:
            if name not in listed and not name.startswith("proxy-"):
                headers.append((name, value))
            if name == "content-type":
                content_type = value
        elif name == "content-length":
            lengths.append(value)
        elif name == "content-encoding":
            encoded = True
            parts = value.lower().split(",")
            codings += [coding for part in parts if part and (coding := part.strip(" \t")) not in _NO_CODING]
        elif name == "transfer-encoding":
            encoded, transferred = True, f"{transferred},{value}"  # it voids a length too (RFC 9112 section 6.3)
    status = int(status_line[2])
    chunked = bool(transferred) and _is_chunked(transferred)
    counts = lengths and not chunked and status >= 200 and status not in _WITHOUT_BODY
    declared = _declared_length(lengths) if counts else None
    return ResponseHead(
        status,
        status_line[1].decode(),
        headers,
        None if encoded else declared,
        content_type.lower().startswith("text/event-stream"),
        ", ".join(codings),
        content_type,
        chunked or declared is not None,
        declared,
    )


def _declared_length(values: list[str]) -> int:
    """Return the length that all values of content-length agree on. Raise MalformedResponse where there is none.

    libcurl takes a number beyond 18 digits for none, and then the body for one that the end of the connection marks.
    """
    length = content_length(values[0])
    if length is None or len(values) > 1:
        lengths = {content_length(value.strip(" \t")) for value in set(",".join(values).split(","))}
        length = lengths.pop()
        if lengths or length is None:
            raise MalformedResponse(f"content-length {', '.join(values)[:80]!r}")
    return length


def _is_chunked(codings: str) -> bool:
    """Return whether chunks frame a body with these transfer codings: only as the last (RFC 9112 section 6.3)."""
    return codings.rpartition(",")[2].strip(" \t").lower() == "chunked"


def list_members(value: str) -> set[str]:
    """Return the different members of a list, in lower case: a flood of commas costs no more than its length."""
    return {member.strip(" \t") for member in set(value.lower().split(","))}


def _listed_by_connection(fields: Pairs) -> set[str]:
    """Return the names that concern this hop only because a Connection field lists them (RFC 9110 section 7.6.1)."""
    return {option for name, value in fields if name == "connection" for option in list_members(value)}


def _unfolded(lines: Sequence[bytes]) -> list[bytes]:
    """Return the field lines of a head, each whole. The status line, which comes first, is not among them."""
    unfolded: list[bytes] = []
    for line in lines[1:]:
        if unfolded and line.startswith((b" ", b"\t")):
            unfolded[-1] = unfolded[-1].rstrip(b"\r\n") + b" " + line.strip()
        else:
            unfolded.append(line)
    return unfolded


def _field(line: bytes) -> tuple[str, str] | None:
    return _parsed_field(line) if len(line) < _MAX_CACHED_BYTES else _parsed_field.__wrapped__(line)


@lru_cache(1024)
def _parsed_field(line: bytes) -> tuple[str, str] | None:
    """Return the name, in lower case, and the value of a field line, or None where it is not a field line."""
    match = _FIELD_LINE.fullmatch(line)
    if match is None:
        return None
    name = match[1].lower().decode("ascii")
    if match[2] and name in _FRAMING:
        raise MalformedResponse(f"a space behind {name}")  # libcurl does not know it then
    return name, match[3].strip(b" \t").decode("latin-1")
