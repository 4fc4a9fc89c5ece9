"""Who may call what, where the operator has set rules: pure decisions about a checked target and a token's body.

Strategy. Rules are compiled once into a frozen :class:`AccessRules`. Where endpoints are restricted, a call must be one
that is known: a path in a grammar with one spelling for each endpoint (no escapes, no empty or dot segments, upper case
only where a pattern has it), on a host whose meaning is known, with a method that it has. Whatever fal's server might
read in another way than this module is refused, and so is all that nobody thought of.

The segment ``requests`` belongs to fal's queue: behind the id of an application it is a queued job's status, result or
cancel, and anywhere else the call is refused. fal drops the rest of an endpoint's id there, so a job of any endpoint of
an application can be read where one of its endpoints is allowed.

Like ``policy`` this uses the standard library only and never does I/O, logs, looks at the clock or reads the
environment. Patterns mean what they mean to fal's own proxy (picomatch): ``*`` is any part of one segment, ``**`` as a
whole segment any number of them, none included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from tornado_fal_proxy.cors import origin_problem
from tornado_fal_proxy.errors import (
    ConfigError,
    EndpointNotAllowed,
    HostNotAllowed,
    TargetRefused,
    TokenNotAllowed,
    UploadNotAllowed,
    WebhookNotAllowed,
)
from tornado_fal_proxy.policy import Target, parse_target

__all__ = ["DEFAULT_MAX_TOKEN_EXPIRATION_S", "AccessRules", "Pattern", "access_rules"]

# fal's client asks for 120 s, and for a new token before they are over.
DEFAULT_MAX_TOKEN_EXPIRATION_S = 300

# More than the longest id of an endpoint with a job's id behind it. They bound what matching costs.
MAX_PATH_CHARS, MAX_SEGMENTS = 512, 16
# A token's body has one or a few short names.
MAX_TOKEN_BODY_BYTES = 4096

RUN_HOST, QUEUE_HOST = "fal.run", "queue.fal.run"
# The second is what the Swift and Dart clients call, and older JavaScript ones.
REST_HOSTS = ("rest.fal.ai", "rest.alpha.fal.ai")
TOKENS = "/tokens/"
INITIATE, INITIATE_MULTIPART = "/storage/upload/initiate", "/storage/upload/initiate-multipart"
CDN = "?storage_type=fal-cdn-v3"
UPLOADS = frozenset((host, path + CDN) for host in REST_HOSTS for path in (INITIATE, INITIATE_MULTIPART)) | {
    ("rest.alpha.fal.ai", INITIATE)
}
NAMESPACES = ("workflows", "comfy")  # an id that begins with one has one more segment
REQUESTS = "requests"
# Method, and what stands behind the request's id.
QUEUE_CALLS = {("GET",), ("GET", "status"), ("GET", "status", "stream"), ("PUT", "cancel")}
WEBHOOK = "fal_webhook"

_SEGMENT = r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*"
_PATH = re.compile(rf"(?:/{_SEGMENT})+")
_ALIAS = re.compile(_SEGMENT)
_REQUEST_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_WILD = "[a-z0-9._-]*"  # no upper case: should fal's server not care about case, * opens nothing new
_PATTERN_CHARS = re.compile(r"[A-Za-z0-9._*/-]+")
_HOST = re.compile(r"(\*\.)?(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*fal\.(?:ai|run)")
# A value that all decoders read alike: escapes are whole, and + is none of them.
_WEBHOOK_VALUE = re.compile(r"(?:[!-$&-*,-~]|%[0-9A-Fa-f]{2})*")
_WEBHOOK_URL = re.compile(r"[!-\[\]-~]+")


@dataclass(frozen=True, slots=True)
class Pattern:
    """One of ``allowed_endpoints``, by segments; None stands for ``**``."""

    text: str
    segments: tuple[re.Pattern[str] | None, ...]

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Raises ValueError, with what is wrong."""
        if not _PATTERN_CHARS.fullmatch(text):
            raise ValueError("may have letters, digits, '.', '_', '-', '/', * and ** only")
        parts = text.split("/")
        if "***" in text or not all(part == "**" or _ALIAS.fullmatch(re.sub(r"\*+", "a", part)) for part in parts):
            raise ValueError("has a segment that no endpoint has")
        if REQUESTS in parts:
            raise ValueError("has the segment requests: the queue's calls are allowed together with their endpoint")
        if "**" not in parts and len(parts) < _id_length(parts):
            raise ValueError("has too few segments to be an endpoint's; for all below it add /**")
        return cls(text, tuple(None if part == "**" else _segment_pattern(part) for part in parts))

    def matches(self, segments: Sequence[str | None]) -> bool:
        """Whether it is an endpoint that this pattern allows. A segment that is None stands for any owner."""
        return len(self.segments) in self._positions(segments)

    def may_begin(self, segments: Sequence[str | None]) -> bool:
        """Whether it is, or there is something below it that is."""
        return bool(self._positions(segments))

    def _positions(self, segments: Iterable[str | None]) -> set[int]:
        """How many of the pattern's segments ``segments`` can use up, exactly: none, one or several numbers."""
        positions = self._skipping({0})
        for segment in segments:
            taken = set()
            for position in positions:
                if position < len(self.segments):
                    pattern = self.segments[position]
                    if pattern is None:
                        if segment is None or segment == segment.lower():
                            taken.add(position)
                    elif segment is None or pattern.fullmatch(segment):
                        taken.add(position + 1)
            positions = self._skipping(taken)
        return positions

    def _skipping(self, positions: set[int]) -> set[int]:
        """``positions``, and those behind each ``**`` that takes no segment."""
        for position, pattern in enumerate(self.segments):
            if pattern is None and position in positions:
                positions.add(position + 1)
        return positions


def _segment_pattern(text: str) -> re.Pattern[str]:
    """A segment, which may have ``*``. What stands between two of them is found where it comes first, for good: that
    loses no match, and keeps the time in proportion to the length."""
    first, *rest = [re.escape(part) for part in re.split(r"\*+", text)]
    if not rest:
        return re.compile(first)
    return re.compile(first + "".join(f"(?>{_WILD}?{part})" for part in rest[:-1]) + _WILD + rest[-1])


def _id_length(segments: Sequence[str]) -> int:
    """How many segments the id of the application has, at least, that these begin with."""
    return 3 if segments[0] in NAMESPACES else 2


@dataclass(frozen=True, slots=True)
class AccessRules:
    """The rules of one configuration. Only :func:`access_rules` makes one. None stands for a rule that is not set."""

    endpoints: tuple[Pattern, ...] | None
    hosts: tuple[str, ...] | None
    webhooks: tuple[str, ...] | None
    uploads: bool
    cancel: bool
    max_token_expiration_s: int

    def cancels(self, urls: Sequence[str]) -> bool:
        """Whether the target headers ``urls`` are one that a PUT may be sent to."""
        if not self.cancel or len(urls) != 1:
            return False
        try:
            target = parse_target(urls[0])
        except TargetRefused:
            return False
        segments = plain_segments(target.path)
        return (
            segments is not None
            and (target.host, target.query) == (QUEUE_HOST, None)
            and _is_queue_call("PUT", segments)
        )

    def check(self, method: str, target: Target) -> None:
        """Raises HostNotAllowed, WebhookNotAllowed, or EndpointNotAllowed and its like, in this order."""
        if self.hosts is not None and not any(_is_host(target.host, allowed) for allowed in self.hosts):
            raise HostNotAllowed
        if self.webhooks is not None and target.query is not None:
            self._check_webhook(target.query)
        if self.endpoints is None:
            return
        if target.host in REST_HOSTS:
            self._check_rest_call(method, target)
            return
        segments = plain_segments(target.path)
        if segments is None or not self._allows(method, target.host, segments):
            raise EndpointNotAllowed

    def judges_body(self, target: Target) -> bool:
        """Whether :meth:`check_body` must see the body before this call begins."""
        return self.endpoints is not None and target.host in REST_HOSTS and target.path == TOKENS

    def check_body(self, body: bytes) -> None:
        """Whether this body of a call for a realtime token may go to fal. Raises TokenNotAllowed."""
        try:
            apps, expiration_s = _token_request(body)
        except ValueError as exc:
            raise TokenNotAllowed(f"token: {exc}") from None
        if not 1 <= expiration_s <= self.max_token_expiration_s:
            raise TokenNotAllowed("token: it would live too long")
        if not all(map(self._allows_whole, apps)):
            raise TokenNotAllowed("token: for an app that is not allowed")

    def _allows(self, method: str, host: str, segments: Sequence[str]) -> bool:
        assert self.endpoints is not None
        length = _id_length(segments)
        if len(segments) < length or host not in (RUN_HOST, QUEUE_HOST):
            return False
        if REQUESTS in segments:
            app = segments[:length]
            return (
                host == QUEUE_HOST
                and _is_queue_call(method, segments)
                and any(pattern.may_begin(app) for pattern in self.endpoints)
            )
        if any(pattern.matches(segments) for pattern in self.endpoints):
            return True
        *endpoint, last = segments
        return (
            (host, last) == (RUN_HOST, "stream")
            and len(endpoint) >= length
            and any(pattern.matches(endpoint) for pattern in self.endpoints)
        )

    def _allows_whole(self, alias: str) -> bool:
        """Whether some owner's application of that name is allowed as such: a token opens all that is below it."""
        assert self.endpoints is not None
        ids = [[None, alias], *([namespace, None, alias] for namespace in NAMESPACES)]
        return any(pattern.matches(segments) for pattern in self.endpoints for segments in ids)

    def _check_rest_call(self, method: str, target: Target) -> None:
        if (target.host, target.request_target) in UPLOADS:
            if method != "POST" or not self.uploads:
                raise UploadNotAllowed
        elif method != "POST" or target.request_target != TOKENS:
            raise EndpointNotAllowed

    def _check_webhook(self, query: str) -> None:
        """Every parameter that some server could take for ``fal_webhook`` must be it, once, with an allowed origin.

        Such a server may separate parameters at semicolons too, or decode the query before it separates them.
        """
        layers = (query, unquote(query), unquote(unquote(query)))
        counts = {sum(map(_may_be_webhook, re.split("[&;]", layer))) for layer in layers}
        if counts == {0}:
            return
        parameter = next((text for text in query.split("&") if text.startswith(f"{WEBHOOK}=")), "")
        if counts != {1} or not self._allows_webhook(parameter.removeprefix(f"{WEBHOOK}=")):
            raise WebhookNotAllowed

    def _allows_webhook(self, value: str) -> bool:
        assert self.webhooks is not None
        url = unquote(value) if _WEBHOOK_VALUE.fullmatch(value) else ""
        return _WEBHOOK_URL.fullmatch(url) is not None and any(
            url == origin or url.startswith(f"{origin}/") for origin in self.webhooks
        )


def plain_segments(path: str) -> list[str] | None:
    """The segments of a path that every server reads alike, or None."""
    if len(path) > MAX_PATH_CHARS or not _PATH.fullmatch(path):
        return None
    segments = path[1:].split("/")
    return segments if len(segments) <= MAX_SEGMENTS else None


def _is_queue_call(method: str, segments: Sequence[str]) -> bool:
    """Whether that is ``{app}/requests/{id}`` or what may stand behind it, with its method."""
    length = _id_length(segments)
    if REQUESTS in segments[:length]:
        return False
    match segments[length:]:
        case ["requests", request_id, *rest]:
            is_id = request_id != REQUESTS and _REQUEST_ID.fullmatch(request_id) is not None
            return is_id and (method, *rest) in QUEUE_CALLS
    return False


def _may_be_webhook(parameter: str) -> bool:
    name = unquote(unquote(parameter.partition("=")[0]))
    return "falwebhook" in re.sub("[^a-z0-9]", "", name.lower())


def _is_host(host: str, allowed: str) -> bool:
    return host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed


def _token_request(body: bytes) -> tuple[list[str], int]:
    """Apps and seconds of a call for a token, from a body that every JSON parser reads alike. Raises ValueError."""
    if len(body) > MAX_TOKEN_BODY_BYTES:
        raise ValueError("the body is too large")
    if not body.isascii() or b"\\" in body:
        raise ValueError("the body has more than plain ASCII without escapes")
    try:
        fields = json.loads(body, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise ValueError("the body is not plain JSON") from None
    if not isinstance(fields, dict) or set(fields) != {"allowed_apps", "token_expiration"}:
        raise ValueError("the body must have allowed_apps and token_expiration, and nothing else")
    apps, expiration_s = fields["allowed_apps"], fields["token_expiration"]
    if (
        not isinstance(apps, list)
        or not apps
        or not all(isinstance(app, str) and _ALIAS.fullmatch(app) for app in apps)
    ):
        raise ValueError("allowed_apps must be a list of aliases")
    if type(expiration_s) is not int:
        raise ValueError("token_expiration must be an integer")
    return apps, expiration_s


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name stands there twice")
    return fields


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def access_rules(
    *,
    allowed_endpoints: object = None,
    allowed_hosts: object = None,
    allowed_webhooks: object = None,
    allow_uploads: object = False,
    allow_cancel: object = False,
    max_token_expiration_s: int = DEFAULT_MAX_TOKEN_EXPIRATION_S,
) -> AccessRules | None:
    """The rules for these fields of the configuration, or None when nothing is restricted or opened.

    Raises ConfigError, naming every problem.
    """
    problems: list[str] = []
    patterns = None
    if allowed_endpoints is not None:
        patterns = _patterns(allowed_endpoints, problems)
    hosts = _texts("allowed_hosts", allowed_hosts, "hosts, or left out for all of fal's", problems)
    problems.extend(
        f"allowed_hosts: {host!r} must be a host of fal's, such as queue.fal.run or *.fal.run"
        for host in hosts or ()
        if not _HOST.fullmatch(host)
    )
    webhooks = _texts("allowed_webhooks", allowed_webhooks, "origins", problems, empty=True)
    problems.extend(
        f"allowed_webhooks: {origin!r} {problem}"
        for origin in webhooks or ()
        if (problem := origin_problem(origin, https=True))
    )
    if problems:
        raise ConfigError(problems)
    rules = AccessRules(
        endpoints=patterns,
        hosts=hosts,
        webhooks=webhooks,
        uploads=allow_uploads is True,
        cancel=allow_cancel is True,
        max_token_expiration_s=max_token_expiration_s,
    )
    nothing = (rules.endpoints, rules.hosts, rules.webhooks, rules.cancel) == (None, None, None, False)
    return None if nothing else rules


def _patterns(allowed_endpoints: object, problems: list[str]) -> tuple[Pattern, ...]:
    patterns = []
    name = "allowed_endpoints"
    for text in _texts(name, allowed_endpoints, "patterns, or left out for every endpoint", problems) or ():
        try:
            patterns.append(Pattern.parse(text))
        except ValueError as exc:
            problems.append(f"{name}: {text!r} {exc}")
    return tuple(patterns)


def _texts(name: str, value: object, kind: str, problems: list[str], *, empty: bool = False) -> tuple[str, ...] | None:
    """``value`` when it is None or a tuple of texts; else None, and a problem."""
    if value is None:
        return None
    if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value) or not (value or empty):
        problems.append(f"{name}: must be a list of {kind}, not {value!r}")
        return None
    return value
