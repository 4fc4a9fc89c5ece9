"""Tell whether a body that seems to have ended is whole, where HTTP alone does not say it.

Strategy. A stream of HTTP/2 that ends with RST_STREAM and the code 0 instead of END_STREAM is truncated, as when a
proxy in front of fal loses its own upstream. libcurl reports it as complete, as it does a body of HTTP/1 that only the
end of the connection delimits. A declared length or chunks expose it, and so does the content: JSON ends when its
outermost value is closed, and an event stream ends behind an empty line. Both are followed piece by piece, decoded,
without a copy of the body, because an encoded one may end too early in a place where its coding allows an end: between
two members of gzip. A body of any other type without a length is taken for whole.

Sources: RFC 9113 section 8.1, RFC 8259 section 2, the HTML standard section 9.2.6 (event streams).
"""

from __future__ import annotations

import re
from typing import Protocol

__all__ = ["Completeness", "Truncated", "completeness_for"]

_JSON = re.compile(r"application/(?:[!#$&^_.+a-z0-9-]*\+)?json", re.IGNORECASE)
# A whole string, and the rest of one behind its opening quote. An escape that the piece cuts in two stays out.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_REST_OF_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
# Words and numbers that end too early. Any other text without brackets passes: it may be a server's error.
_CUT_WORD = re.compile(rb"t(?:ru?)?|f(?:a(?:ls?)?)?|n(?:ul?)?|-|-?[0-9]+(?:\.|(?:\.[0-9]+)?[eE][+-]?)")
# Limits what is kept of a text's beginning: a number of more digits than any program writes.
_MAX_START_BYTES = 32
# Limits what is kept of an event whose end has not come: longer than any line that is a comment only.
_MAX_TAIL_BYTES = 4096


class Truncated(ValueError):
    """Report a body that ended before it was whole."""


class Completeness(Protocol):
    """Follow a body. ``is_complete`` tells whether what was fed so far can be all of it."""

    @property
    def is_complete(self) -> bool:
        """Tell whether the body may end here."""

    def feed(self, data: bytes) -> None:
        """Follow the next piece."""


def completeness_for(content_type: str) -> Completeness | None:
    """Return what follows a body of that content type; None where its content does not tell its end."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "text/event-stream":
        return _EventStream()
    return _Json() if _JSON.fullmatch(kind) else None


class _Json:
    """Follow the nesting of a JSON text. A text may be empty, and a number may end behind any digit."""

    def __init__(self) -> None:
        self._start = b""  # the first bytes behind white space
        self._depth = 0
        self._in_string = False
        self._rest = b""  # a backslash whose second character is in the next piece

    @property
    def is_complete(self) -> bool:
        return self._depth <= 0 and not self._in_string and _CUT_WORD.fullmatch(self._start) is None

    def feed(self, data: bytes) -> None:
        if len(self._start) < _MAX_START_BYTES:
            self._start = (self._start + data).lstrip(b" \t\r\n")[:_MAX_START_BYTES]
        data, self._rest = self._rest + data, b""
        if self._in_string:
            match = _REST_OF_STRING.match(data)
            assert match is not None  # it also matches nothing
            end = match.end()
            if data[end : end + 1] != b'"':
                self._rest = data[end:]  # nothing, or a backslash
                return
            data = data[end + 1 :]
        # Brackets are counted where no string is, in few steps however many there are.
        outside, quote, inside = _STRING.sub(b"", data).partition(b'"')
        self._depth += sum(map(outside.count, (b"{", b"["))) - sum(map(outside.count, (b"}", b"]")))
        self._in_string = bool(quote)
        if quote and (len(inside) - len(inside.rstrip(b"\\"))) % 2:
            self._rest = b"\\"


class _EventStream:
    """Follow the events. An event that has begun behind the last empty line is cut off; a comment there is not."""

    def __init__(self) -> None:
        self._tail = b""

    @property
    def is_complete(self) -> bool:
        return all(line.startswith(b":") for line in self._tail.splitlines() if line)

    def feed(self, data: bytes) -> None:
        tail = self._tail + data
        # Lines end with CRLF, LF or CR, and one stream may mix them: these are the second end of any two in a row.
        end = max(tail.rfind(b"\n\n"), tail.rfind(b"\r\r"), tail.rfind(b"\n\r"))
        if end >= 0:
            tail = tail[end:].lstrip(b"\r\n")
        # The front of a long event suffices to see that it is none of comments; its end to see the next boundary.
        self._tail = tail if len(tail) <= _MAX_TAIL_BYTES else tail[: _MAX_TAIL_BYTES // 2] + tail[-3:]
