"""A URL of fal's, parsed once: after that, nothing reads the string that the client sent.

Strategy. :func:`parse_target` accepts a URL only where each of its parts consists of characters from a list, and
returns the parts in a frozen :class:`Target`. The URL for fal is rebuilt from them. :func:`canonical_segments` is
stricter: it splits a path only if every server reads that path alike, which the operator's rules need.

This module never decodes, encodes, resolves or re-cases any part of a URL, and never decides who may call what.

Sources: RFC 3986 section 3, RFC 9112 section 3.2, fal's "server-side integration" page (hosts of ``fal.ai`` and
``fal.run`` only, https only).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tornado_fal_proxy.errors import TargetRefused

__all__ = [
    "MAX_PATH_CHARS",
    "MAX_SEGMENTS",
    "MAX_URL_CHARS",
    "SEGMENT",
    "TARGET_HEADER",
    "Target",
    "canonical_segments",
    "parse_target",
]

TARGET_HEADER = "x-fal-target-url"

# Scheme, host, the one allowed port, path, query, fragment. Each character class lists what may pass, which leaves
# nothing that a second parser (a WHATWG one, libcurl, fal's server) could read in another way. The host has no
# userinfo, backslash, percent-encoding or upper case, and no punycode because a WHATWG parser decodes and checks it.
# Path and query are any other printable ASCII.
_LABEL = r"(?!xn--)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_TARGET = re.compile(
    rf"https://((?:{_LABEL}\.)*fal\.(?:ai|run))(?::443)?"
    r"(/[!-\"$->@-\[\]-~]*)?(?:\?([!-\"$-\[\]-~]*))?(?:\#[!-\[\]-~]*)?"
)
# The length of a host name, without the dot of the root: RFC 1035 section 2.3.4.
_MAX_HOST_CHARS = 253
# The length of a URL. Many clients share a connection to fal, which a server may close when one head is too large. RFC
# 9110 section 4.1 asks every server to take this many octets.
MAX_URL_CHARS = 8000

# The length of a canonical path and its number of segments, which bound the cost of matching. Both are more than the
# longest id of an endpoint has, with the id of a job behind it.
MAX_PATH_CHARS, MAX_SEGMENTS = 512, 16

_SEGMENT = r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*"
# One segment of a canonical path. The alias of an app is one too.
SEGMENT = re.compile(_SEGMENT)
_PATH = re.compile(rf"(?:/{_SEGMENT})+")


@dataclass(frozen=True, slots=True)
class Target:
    """A URL of fal's in its parts. Only :func:`parse_target` makes one from a client's string.

    ``host`` is ``fal.ai``, ``fal.run`` or a name below them. ``path`` begins with a slash. ``query`` is None when the
    URL had no question mark, which is not the same as an empty query. Path and query are the client's, byte by byte.
    """

    host: str
    path: str
    query: str | None = None

    @property
    def request_target(self) -> str:
        """Return path and query as they stand in the request line (RFC 9112 section 3.2.1)."""
        return self.path if self.query is None else f"{self.path}?{self.query}"

    @property
    def url(self) -> str:
        """Return the whole URL, rebuilt from the checked parts."""
        return f"https://{self.host}{self.request_target}"


def parse_target(url: str) -> Target:
    """Return ``url`` as a Target, without its fragment, which no HTTP client sends (RFC 9110 section 7.1).

    Raises TargetRefused unless it is an https URL of ``fal.ai``, ``fal.run`` or a sub-domain of theirs, in a spelling
    that all parsers read alike, of up to MAX_URL_CHARS characters.
    """
    if len(url) > MAX_URL_CHARS:
        raise TargetRefused(f"a URL of {len(url)} characters")
    match = _TARGET.fullmatch(url)
    if match is None or len(match[1]) > _MAX_HOST_CHARS:
        raise TargetRefused
    return Target(match[1], match[2] or "/", match[3])


def canonical_segments(path: str) -> list[str] | None:
    """Return the segments of a path that every server reads alike, or None where servers may differ.

    A path of that kind has no escapes, no empty segments and no dot segments, and is not longer than MAX_PATH_CHARS and
    MAX_SEGMENTS.
    """
    if len(path) > MAX_PATH_CHARS or not _PATH.fullmatch(path):
        return None
    segments = path[1:].split("/")
    return segments if len(segments) <= MAX_SEGMENTS else None
