"""A URL of fal's, parsed once: after that, nothing reads the string that the client sent.

Strategy. :func:`parse_target` accepts a URL only where each of its parts consists of characters from a list, and
returns the parts in a frozen :class:`Target`. The URL for fal is rebuilt from them. :mod:`~.rules.paths` is stricter,
and :mod:`~.rules.endpoints` knows what a target is for.

This module never decodes, encodes, resolves or re-cases any part of a URL, and never decides who may call what.

Sources: RFC 3986 section 3, RFC 9112 section 3.2, fal's "server-side integration" page (hosts of ``fal.ai`` and
``fal.run`` only, https only).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tornado_fal_proxy.errors import TargetRefused
from tornado_fal_proxy.rules.endpoints import endpoint_of, is_paid, job_id_of, kind_of

__all__ = ["MAX_URL_CHARS", "TARGET_HEADER", "Target", "parse_target"]

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


@dataclass(frozen=True, slots=True)
class Target:
    """A URL of fal's in its parts. Only :func:`parse_target` makes one from a client's string.

    ``host`` is ``fal.ai``, ``fal.run`` or a name below them. ``path`` begins with a slash. ``query`` is None when the
    URL had no question mark, which is not the same as an empty query. Path and query are the client's, byte by byte.
    ``method`` is the one of the call.
    """

    host: str
    path: str
    query: str | None = None
    method: str = "POST"

    @property
    def request_target(self) -> str:
        """Return path and query as they stand in the request line (RFC 9112 section 3.2.1)."""
        return self.path if self.query is None else f"{self.path}?{self.query}"

    @property
    def url(self) -> str:
        """Return the whole URL, rebuilt from the checked parts."""
        return f"https://{self.host}{self.request_target}"

    # Worked out when they are asked for: most calls are relayed without.

    @property
    def kind(self) -> str:
        """Return the kind of the call, such as ``run`` or ``queue_status``."""
        return kind_of(self)

    @property
    def endpoint(self) -> str:
        """Return the endpoint as ``owner/alias`` with the path behind it, or ``other``."""
        return endpoint_of(self)

    @property
    def job_id(self) -> str | None:
        """Return the id of the queued job whose status, result or cancel this is; None for any other call."""
        return job_id_of(self.method, self)

    @property
    def paid(self) -> bool:
        """Return whether the call costs money, as far as is known before fal's bill."""
        return is_paid(self.method, self)


def parse_target(url: str, method: str = "POST") -> Target:
    """Return ``url`` as a Target of a call with ``method``, without its fragment, which no HTTP client
    sends (RFC 9110 section 7.1).

    Raises TargetRefused unless it is an https URL of ``fal.ai``, ``fal.run`` or a sub-domain of theirs, in a spelling
    that all parsers read alike, of up to MAX_URL_CHARS characters.
    """
    if len(url) > MAX_URL_CHARS:
        raise TargetRefused(f"a URL of {len(url)} characters")
    match = _TARGET.fullmatch(url)
    if match is None or len(match[1]) > _MAX_HOST_CHARS:
        raise TargetRefused
    return Target(match[1], match[2] or "/", match[3], method)
