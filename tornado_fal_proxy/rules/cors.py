"""The rules of CORS: which pages of other origins may read the proxy's responses.

Strategy. An origin is compared as the text that a browser sends, either exactly or, for ``https://*.example.com``, by
its end after a dot. There is no ``*`` for everyone and never ``null``, which any sandboxed frame can send.

This module never decides who may call: a browser follows these rules, other clients do not.

Source: the Fetch standard, section 3.3 (https://fetch.spec.whatwg.org/#http-cors-protocol).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.rules.fal_headers import header_names
from tornado_fal_proxy.rules.headers import list_members

__all__ = ["CORS_PREFIX", "CorsRules", "cors_rules", "origin_problem", "vary"]

# The prefix of the headers that fal's response may have too. They are valid for fal's origin, not for the proxy's.
CORS_PREFIX = "access-control-"
# The headers of a response that fal's SDKs read, and fal's bill.
EXPOSED = "x-fal-request-id, x-fal-request-timeout-type, x-fal-billable-units"
# The headers that tell a page what is left of its limits.
EXPOSED_LIMITS = "ratelimit, ratelimit-policy, retry-after"
# The time, in seconds, for which a browser may keep the response to a preflight. Chromium keeps it no longer.
PREFLIGHT_MAX_AGE_S = 7200
# The length of a preflight's list of header names, which the response repeats. No page sends nearly as many names.
MAX_REQUESTED_CHARS = 4096

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_ORIGIN = re.compile(rf"(https?)://((?:\*\.)?{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:.]+\])(?::([1-9][0-9]{{0,4}}))?")
_NAMES = re.compile(r"[ \t]*[!#$%&'*+\-.^_`|~0-9A-Za-z]+(?:[ \t]*,[ \t]*[!#$%&'*+\-.^_`|~0-9A-Za-z]+)*[ \t]*")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def origin_problem(text: object, *, wildcard: bool = False, https: bool = False) -> str | None:
    """Return the problem that keeps ``text`` from being an origin as browsers write it, or None if it is one.

    With ``wildcard`` the text may be ``https://*.example.com``. With ``https`` the scheme must be https. The problem
    continues a sentence that names the text.
    """
    match = _ORIGIN.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return "must be an origin such as https://app.example.com, in lower case and with nothing behind it"
    scheme, host, port = match.groups()
    if host.startswith("*."):
        if not wildcard:
            return "must be exact, without *"
        if scheme != "https" or "." not in host[2:]:
            return "may have * only as in https://*.example.com"
    if https and scheme != "https":
        return "must begin with https://"
    if port is not None and (int(port) > 65_535 or port == _DEFAULT_PORTS[scheme]):
        return "must have a port up to 65535, and none where it is the scheme's own"
    return None


@dataclass(frozen=True, slots=True)
class CorsRules:
    """The rules of one configuration. Only :func:`cors_rules` makes one.

    ``exact`` are whole origins, ``suffixes`` are ``(port, ".example.com")`` of https origins with a wildcard. The port
    is empty for the default one. ``methods`` is the value of Access-Control-Allow-Methods, and ``exposed`` of
    Access-Control-Expose-Headers.
    """

    exact: frozenset[str]
    suffixes: tuple[tuple[str, str], ...]
    credentials: bool
    methods: str
    exposed: str

    def allows(self, origin: str | None) -> bool:
        """Return whether pages of ``origin``, the value of the Origin header, may read responses."""
        if origin is None:
            return False
        if origin in self.exact:
            return True
        match = _ORIGIN.fullmatch(origin) if self.suffixes else None
        return (
            match is not None
            and match[1] == "https"
            and "*" not in match[2]
            and any((match[3] or "") == port and match[2].endswith(suffix) for port, suffix in self.suffixes)
        )

    def response_headers(self, origin: str | None) -> list[tuple[str, str]]:
        """Return the CORS headers of a response to a page of ``origin``, none when the origin is not allowed.

        The response needs ``vary: Origin`` in both cases.
        """
        if origin is None or not self.allows(origin):
            return []
        headers = [("Access-Control-Allow-Origin", origin), ("Access-Control-Expose-Headers", self.exposed)]
        return [*headers, ("Access-Control-Allow-Credentials", "true")] if self.credentials else headers

    def preflight_headers(self, requested: str | None) -> list[tuple[str, str]]:
        """Return what the response to a preflight of an allowed origin has beside :meth:`response_headers`.

        ``requested`` is the value of Access-Control-Request-Headers. All valid names are allowed, because the headers
        of an allowed page are there for ``authorize`` to read, and only those that ``rules.headers`` lists go to fal.
        """
        headers = [("Access-Control-Allow-Methods", self.methods), ("Access-Control-Max-Age", str(PREFLIGHT_MAX_AGE_S))]
        if requested and len(requested) <= MAX_REQUESTED_CHARS and _NAMES.fullmatch(requested):
            headers.append(("Access-Control-Allow-Headers", requested.strip(" \t")))
        return headers


def vary(values: Iterable[str], *names: str) -> list[str]:
    """Return the lines of a Vary field, with those of ``names`` added that it has not (RFC 9110 section 12.5.5)."""
    lines = [value for value in values if value.strip()]
    listed = {name for line in lines for name in list_members(line)}
    missing = [name for name in names if name.lower() not in listed]
    return lines if "*" in listed or not missing else [*lines, ", ".join(missing)]


def cors_rules(
    allowed_origins: Sequence[str] | None,
    *,
    allow_credentials: bool = False,
    allow_cancel: bool = False,
    exposes_limits: bool = False,
    expose_headers: Sequence[str] | None = None,
) -> CorsRules | None:
    """Return the rules for these fields of the configuration, or None where CORS is off.

    With ``exposes_limits`` pages may read what is left of spending limits. They may read ``expose_headers`` too.
    Raises ConfigError, which names every problem.
    """
    exposed, problems = _exposed(expose_headers)
    if allowed_origins is None:
        if allow_credentials is True:
            problems.append("allow_credentials: needs allowed_origins")
        if problems:
            raise ConfigError(problems)
        return None
    if not isinstance(allowed_origins, tuple) or not allowed_origins:
        wrong = f"allowed_origins: must be a list of origins, or left out for no CORS at all, not {allowed_origins!r}"
        raise ConfigError([wrong, *problems])
    problems.extend(
        f"allowed_origins: {origin!r} {problem}"
        for origin in allowed_origins
        if (problem := origin_problem(origin, wildcard=True))
    )
    if not problems and allow_credentials is True and any("*" in origin for origin in allowed_origins):
        problems.append("allow_credentials: works only where all allowed_origins are exact, without *")
    if problems:
        raise ConfigError(problems)
    suffixes = [match for origin in allowed_origins if (match := _ORIGIN.fullmatch(origin)) and "*" in match[2]]
    return CorsRules(
        exact=frozenset(origin for origin in allowed_origins if "*" not in origin),
        suffixes=tuple((match[3] or "", match[2].removeprefix("*")) for match in suffixes),
        credentials=allow_credentials is True,
        methods="GET, POST, PUT" if allow_cancel is True else "GET, POST",
        exposed=", ".join([EXPOSED, *([EXPOSED_LIMITS] if exposes_limits else []), *exposed]),
    )


def _exposed(names: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return the names of more headers that pages may read, and the problems of this field."""
    try:
        return sorted(header_names("expose_headers", names)), []
    except ConfigError as exc:
        return [], list(exc.problems)
