"""The operator's rules: pure decisions about a parsed target, and about a body that names apps.

Strategy. Rules are compiled once into a frozen :class:`AccessRules`. Where endpoints are restricted, a request must be
one that is known. Its path has one spelling for each endpoint, its host has a known meaning, and its method is one that
the endpoint has. The rules refuse whatever fal's server might read in another way than this module, and all that nobody
thought of. Because fal drops the rest of an endpoint's id in the queue's calls, a job of any endpoint of an app can be
read where one of the app's endpoints is allowed.

This module never refuses what no rule restricts, except calls for the key's account. Its errors name the rule but
nothing of what the rule contains. Their ``detail``, for the operator's log, has the target that was refused.

Sources: fal's pages on its queue, webhooks, realtime tokens and realtime video, and the source of fal's SDKs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from tornado_fal_proxy.errors import (
    AccountNotAllowed,
    ConfigError,
    EndpointNotAllowed,
    HostNotAllowed,
    TokenNotAllowed,
    UploadNotAllowed,
    WebhookNotAllowed,
)
from tornado_fal_proxy.rules.bodies import named_app, token_request
from tornado_fal_proxy.rules.cors import origin_problem
from tornado_fal_proxy.rules.endpoints import (
    HEARTBEAT_PATH,
    ICE,
    ICE_PATH,
    PATH_TOKENS_PATH,
    QUEUE_HOST,
    REQUESTS,
    REST_HOSTS,
    RUN_HOST,
    SESSION_PATH,
    STREAM,
    TOKENS_PATH,
    UPLOADS,
    WMA_HOST,
    id_length,
    is_account_call,
    is_cancel,
    is_queue_call,
)
from tornado_fal_proxy.rules.excerpt import excerpt
from tornado_fal_proxy.rules.paths import canonical_segments
from tornado_fal_proxy.rules.patterns import Pattern
from tornado_fal_proxy.rules.target import Target

__all__ = ["DEFAULT_MAX_TOKEN_EXPIRATION_S", "AccessRules", "access_rules", "check_account"]

# The life of a realtime token, in seconds. fal's JavaScript SDK asks for 120, and for a new token before they are over.
DEFAULT_MAX_TOKEN_EXPIRATION_S = 300
WEBHOOK = "fal_webhook"

_HOST = re.compile(r"(\*\.)?(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*fal\.(?:ai|run)")
# A value that all decoders read alike: its escapes are whole, and it has no +.
_WEBHOOK_VALUE = re.compile(r"(?:[!-$&-*,-~]|%[0-9A-Fa-f]{2})*")
_WEBHOOK_URL = re.compile(r"[!-\[\]-~]+")


@dataclass(frozen=True, slots=True)
class AccessRules:
    """The rules of one configuration. Only :func:`access_rules` makes one. None stands for a rule that is not set."""

    endpoints: tuple[Pattern, ...] | None
    hosts: tuple[str, ...] | None
    webhooks: tuple[str, ...] | None
    uploads: bool
    cancel: bool
    max_token_expiration_s: int

    def allows_cancel(self, target: Target) -> bool:
        """Return whether a PUT may be sent to ``target``, as far as ``allow_cancel`` decides. ``check`` comes after."""
        return self.cancel and is_cancel(target)

    def check(self, method: str, target: Target) -> None:
        """Raise AccessRefused unless the rules allow this request.

        Raises HostNotAllowed, then AccountNotAllowed, then WebhookNotAllowed, then UploadNotAllowed or
        EndpointNotAllowed. Only a host that ``allowed_hosts`` names without ``*`` may serve the account. Where
        endpoints are restricted, none does.
        """
        if self.hosts is not None and not any(_is_host(target.host, allowed) for allowed in self.hosts):
            raise HostNotAllowed(_described("allowed_hosts", target))
        if self.endpoints is None and target.host not in (self.hosts or ()):
            check_account(target)
        if self.webhooks is not None and target.query is not None:
            self._check_webhook(target)
        if self.endpoints is None:
            return
        if target.host in REST_HOSTS:
            self._check_rest_call(method, target)
            return
        if target.host == WMA_HOST:
            if method != "POST" or target.request_target not in (ICE_PATH, SESSION_PATH, HEARTBEAT_PATH):
                raise EndpointNotAllowed(_described("allowed_endpoints", target))
            return
        segments = canonical_segments(target.path)
        if segments is None or not self._allows(method, target.host, segments):
            raise EndpointNotAllowed(_described("allowed_endpoints", target))

    def needs_body(self, target: Target) -> bool:
        """Return whether :meth:`check_body` must see the whole body before the request goes to fal."""
        if self.endpoints is None:
            return False
        if target.host == WMA_HOST:
            return target.path in (ICE_PATH, SESSION_PATH)
        return target.host in REST_HOSTS and target.path in (TOKENS_PATH, PATH_TOKENS_PATH)

    def check_body(self, target: Target, body: bytes) -> None:
        """Raise EndpointNotAllowed or TokenNotAllowed unless this body may go to ``target``.

        A signal of realtime video must be for an allowed endpoint. The apps of a token must all be allowed, and it must
        live from 1 to ``max_token_expiration_s`` seconds.
        """
        if target.host == WMA_HOST:
            self._check_signal(target, body)
            return
        try:
            asked = token_request(target.path, body)
        except ValueError as exc:
            raise TokenNotAllowed(f"token: {exc}") from None
        if not 1 <= asked.seconds <= self.max_token_expiration_s:
            raise TokenNotAllowed("token: it would live too long")
        if not all(map(self._allows_whole, asked.apps)) or not all(map(self._spells, asked.paths)):
            raise TokenNotAllowed("token: for an app that no pattern of allowed_endpoints spells")

    def _check_signal(self, target: Target, body: bytes) -> None:
        assert self.endpoints is not None
        try:
            segments = named_app(body)
        except ValueError as exc:
            raise EndpointNotAllowed(f"{_described('allowed_endpoints', target)}: {exc}") from None
        if len(segments) < id_length(segments) or not any(pattern.matches(segments) for pattern in self.endpoints):
            raise EndpointNotAllowed(f"allowed_endpoints: {excerpt(target.host + target.path)} for an app outside them")

    def _allows(self, method: str, host: str, segments: Sequence[str]) -> bool:
        """Return whether this is an allowed endpoint, its stream, its list of servers, or a call for its jobs."""
        assert self.endpoints is not None
        length = id_length(segments)
        if len(segments) < length or host not in (RUN_HOST, QUEUE_HOST):
            return False
        if REQUESTS in segments:
            app = segments[:length]
            return (
                host == QUEUE_HOST
                and is_queue_call(method, segments)
                and any(pattern.may_begin(app) for pattern in self.endpoints)
            )
        if any(pattern.matches(segments) for pattern in self.endpoints):
            return True
        *endpoint, last = segments
        return (
            host == RUN_HOST
            and (last == STREAM or (method, last) == ("POST", ICE))
            and len(endpoint) >= length
            and any(pattern.matches(endpoint) for pattern in self.endpoints)
        )

    def _allows_whole(self, alias: str) -> bool:
        """Return whether a pattern allows an app of that name as such, because a token opens all below it.

        The token opens the apps of that name of all owners, so a wildcard in its place allows none.
        """
        assert self.endpoints is not None
        return any(pattern.alias == alias for pattern in self.endpoints)

    def _spells(self, segments: Sequence[str]) -> bool:
        """Return whether a pattern names this endpoint literally, or allows the whole app and names that."""
        assert self.endpoints is not None
        return any(
            (pattern.alias is not None or "*" not in pattern.text) and pattern.matches(segments)
            for pattern in self.endpoints
        )

    def _check_rest_call(self, method: str, target: Target) -> None:
        if (target.host, target.request_target) in UPLOADS:
            if method != "POST" or not self.uploads:
                raise UploadNotAllowed(_described("allow_uploads", target))
        elif method != "POST" or target.request_target not in (TOKENS_PATH, PATH_TOKENS_PATH):
            raise EndpointNotAllowed(_described("allowed_endpoints", target))

    def _check_webhook(self, target: Target) -> None:
        """Raise WebhookNotAllowed unless the query has no webhook, or exactly one whose origin is allowed.

        Every parameter counts that some server could take for ``fal_webhook``: a server may separate parameters at
        semicolons too, or decode the query before it separates them.
        """
        query = target.query or ""
        layers = (query, unquote(query), unquote(unquote(query)))
        counts = {sum(map(_may_be_webhook, re.split("[&;]", layer))) for layer in layers}
        if counts == {0}:
            return
        parameter = next((text for text in query.split("&") if text.startswith(f"{WEBHOOK}=")), "")
        value = parameter.removeprefix(f"{WEBHOOK}=")
        if counts != {1} or not self._allows_webhook(value):
            host = unquote(value).partition("//")[2].partition("/")[0]  # its path is often a secret
            raise WebhookNotAllowed(f"allowed_webhooks: {excerpt(host) or 'an odd spelling'}")

    def _allows_webhook(self, value: str) -> bool:
        assert self.webhooks is not None
        url = unquote(value) if _WEBHOOK_VALUE.fullmatch(value) else ""
        return _WEBHOOK_URL.fullmatch(url) is not None and any(
            url == origin or url.startswith(f"{origin}/") for origin in self.webhooks
        )


def check_account(target: Target) -> None:
    """Raise AccountNotAllowed where ``target`` serves the key's account, which fal's SDKs call through no proxy."""
    if is_account_call(target):
        raise AccountNotAllowed(_described("the key's account", target))


def _described(rule: str, target: Target) -> str:
    """Return what the log shows of a refused target, after the rule that refused it."""
    return f"{rule}: {excerpt(target.host + target.path)}"


def _may_be_webhook(parameter: str) -> bool:
    name = unquote(unquote(parameter.partition("=")[0]))
    return "falwebhook" in re.sub("[^a-z0-9]", "", name.lower())


def _is_host(host: str, allowed: str) -> bool:
    return host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed


def access_rules(
    *,
    allowed_endpoints: object = None,
    allowed_hosts: object = None,
    allowed_webhooks: object = None,
    allow_uploads: object = False,
    allow_cancel: object = False,
    max_token_expiration_s: int = DEFAULT_MAX_TOKEN_EXPIRATION_S,
) -> AccessRules | None:
    """Return the rules for these fields of the configuration, or None when nothing is restricted or opened.

    Raises ConfigError, which names every problem.
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
    """Return the patterns that are valid, and add a problem for each that is not."""
    patterns = []
    name = "allowed_endpoints"
    for text in _texts(name, allowed_endpoints, "patterns, or left out for every endpoint", problems) or ():
        try:
            patterns.append(Pattern.parse(text))
        except ValueError as exc:
            problems.append(f"{name}: {text!r} {exc}")
    return tuple(patterns)


def _texts(name: str, value: object, kind: str, problems: list[str], *, empty: bool = False) -> tuple[str, ...] | None:
    """Return ``value`` when it is None or a tuple of texts. Otherwise add a problem and return None."""
    if value is None:
        return None
    if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value) or not (value or empty):
        problems.append(f"{name}: must be a list of {kind}, not {value!r}")
        return None
    return value
