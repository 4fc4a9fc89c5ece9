"""Which pages of other origins may read the proxy's answers: the rules of CORS, as pure functions.

Strategy. An origin is compared as the text that a browser sends: exactly, or for ``https://*.example.com`` by its end
after a dot. There is no ``*`` for everyone and never ``null``, which any sandboxed frame can be. Nothing here decides
who may call: a browser asks these rules, other callers do not.

Source: the Fetch standard, section 3.3 (https://fetch.spec.whatwg.org/#http-cors-protocol).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tornado_fal_proxy.errors import ConfigError

__all__ = ["CORS_PREFIX", "CorsRules", "cors_rules", "origin_problem", "vary"]

# The target's own headers of this kind speak for its origin and not for the proxy's.
CORS_PREFIX = "access-control-"
# What fal's client reads of an answer's head.
EXPOSED = "x-fal-request-id, x-fal-request-timeout-type"
# The longest that Chromium remembers a preflight's answer.
PREFLIGHT_MAX_AGE_S = 7200
# Far more header names than any page sends.
MAX_REQUESTED_CHARS = 4096

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_ORIGIN = re.compile(rf"(https?)://((?:\*\.)?{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:.]+\])(?::([1-9][0-9]{{0,4}}))?")
_NAMES = re.compile(r"[ \t]*[!#$%&'*+\-.^_`|~0-9A-Za-z]+(?:[ \t]*,[ \t]*[!#$%&'*+\-.^_`|~0-9A-Za-z]+)*[ \t]*")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def origin_problem(text: object, *, wildcard: bool = False, https: bool = False) -> str | None:
    """Why ``text`` is no origin as browsers write one, or None. With ``wildcard``, ``https://*.example.com`` is one."""
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
    """What browsers are told. ``exact`` are origins, ``suffixes`` are ``(port, ".example.com")`` of https ones."""

    exact: frozenset[str]
    suffixes: tuple[tuple[str, str], ...]
    credentials: bool
    methods: str

    def allows(self, origin: str | None) -> bool:
        """Whether pages of ``origin``, as in the Origin header, may read answers."""
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

    def answer_headers(self, origin: str | None) -> list[tuple[str, str]]:
        """What an answer to a page of ``origin`` carries, beside ``vary: Origin``: nothing when it is not allowed."""
        if origin is None or not self.allows(origin):
            return []
        headers = [("Access-Control-Allow-Origin", origin), ("Access-Control-Expose-Headers", EXPOSED)]
        return [*headers, ("Access-Control-Allow-Credentials", "true")] if self.credentials else headers

    def preflight_headers(self, requested: str | None) -> list[tuple[str, str]]:
        """What the answer to a preflight of an allowed origin carries, beside :meth:`answer_headers`.

        ``requested`` is the value of Access-Control-Request-Headers. All that are names are allowed: what an allowed
        page sends is for ``authorize`` to read, and only the headers that policy lists ever go to fal.
        """
        headers = [("Access-Control-Allow-Methods", self.methods), ("Access-Control-Max-Age", str(PREFLIGHT_MAX_AGE_S))]
        if requested and len(requested) <= MAX_REQUESTED_CHARS and _NAMES.fullmatch(requested):
            headers.append(("Access-Control-Allow-Headers", requested.strip(" \t")))
        return headers


def vary(values: Iterable[str], *names: str) -> list[str]:
    """The lines of a Vary field that is to name ``names`` too."""
    lines = [value for value in values if value.strip()]
    listed = {name.strip(" \t").lower() for line in lines for name in line.split(",")}
    missing = [name for name in names if name.lower() not in listed]
    return lines if "*" in listed or not missing else [*lines, ", ".join(missing)]


def cors_rules(
    allowed_origins: Sequence[str] | None, *, allow_credentials: bool = False, allow_cancel: bool = False
) -> CorsRules | None:
    """The rules for these fields of the configuration, or None where CORS is off. Raises ConfigError."""
    if allowed_origins is None:
        if allow_credentials is True:
            raise ConfigError(["allow_credentials: needs allowed_origins"])
        return None
    if not isinstance(allowed_origins, tuple) or not allowed_origins:
        raise ConfigError(
            [f"allowed_origins: must be a list of origins, or left out for no CORS at all, not {allowed_origins!r}"]
        )
    problems = [
        f"allowed_origins: {origin!r} {problem}"
        for origin in allowed_origins
        if (problem := origin_problem(origin, wildcard=True))
    ]
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
    )
