"""The one list of fal's hosts and paths, which kind of call a target is, and whether it is paid.

Strategy. Hosts, paths and the calls of fal's queue stand here as constants, and all that must recognise one of them
asks this module. Two readings exist. :func:`is_queue_call` and :func:`is_cancel` are strict because rules rely on them:
they take canonical segments only. :func:`kind_of` is lenient because logs and metrics rely on it: any target has a
kind. A call is paid unless it is known to be free, in its one spelling.

The segment ``requests`` belongs to fal's queue. Behind the id of an app it is the status, result or cancel of a queued
job, and fal drops the rest of an endpoint's id there.

This module never decides whether a call may pass.

Sources: fal's pages on its queue, on realtime tokens and on workflow endpoints, and the source of fal's SDKs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from tornado_fal_proxy.rules.paths import canonical_segments

__all__ = [
    "BACKUP_HOSTS",
    "COMPLETE_MULTIPART",
    "HEARTBEAT_PATH",
    "ICE",
    "ICE_PATH",
    "INITIATE",
    "INITIATE_MULTIPART",
    "NAMESPACES",
    "OTHER",
    "PATH_TOKENS_PATH",
    "QUEUE_CALLS",
    "QUEUE_HOST",
    "REQUESTS",
    "REST_HOSTS",
    "RUN_HOST",
    "SESSION_PATH",
    "STREAM",
    "TOKENS_PATH",
    "UPLOADS",
    "UPLOAD_TOKEN",
    "WELL_KNOWN_HOSTS",
    "WMA_HOST",
    "Url",
    "endpoint_of",
    "id_length",
    "is_account_call",
    "is_cancel",
    "is_paid",
    "is_queue_call",
    "is_repeatable",
    "is_request_id",
    "job_id_of",
    "kind_of",
    "may_name_job",
]

RUN_HOST, QUEUE_HOST = "fal.run", "queue.fal.run"
# The Swift and Dart SDKs call the second, and so do older JavaScript ones.
REST_HOSTS = _REST_HOST, _ALPHA_REST_HOST = "rest.fal.ai", "rest.alpha.fal.ai"
# Signals for realtime video, whose media do not pass the proxy.
WMA_HOST = "wma.fal.run"
# Hosts that serve the same as others while these cannot be reached. No target of a client's names them.
BACKUP_HOSTS = {RUN_HOST: "falrun.com", QUEUE_HOST: "queue.falrun.com"}
# The hosts that fal's SDKs call, and their backups. They need no proof that they exist, not even at the first request.
WELL_KNOWN_HOSTS = frozenset({RUN_HOST, QUEUE_HOST, WMA_HOST, *REST_HOSTS, *BACKUP_HOSTS.values()})

# The second is for whole paths of endpoints, the first for the names of apps.
TOKENS_PATH, PATH_TOKENS_PATH = "/tokens/", "/tokens/realtime"
INITIATE, INITIATE_MULTIPART = "/storage/upload/initiate", "/storage/upload/initiate-multipart"
# The first completes an upload in parts, and the second opens fal's storage to an upload.
COMPLETE_MULTIPART, UPLOAD_TOKEN = "/storage/upload/complete-multipart", "/storage/auth/token"
_CDN = "?storage_type=fal-cdn-v3"
# Host and request target of the requests that belong to an upload.
UPLOADS = frozenset(
    (host, path + _CDN)
    for host in REST_HOSTS
    for path in (INITIATE, INITIATE_MULTIPART, COMPLETE_MULTIPART, UPLOAD_TOKEN)
) | {(_ALPHA_REST_HOST, INITIATE), (_REST_HOST, f"{INITIATE}?storage_type=gcs")}

# An app's id that begins with one of these has one more segment.
NAMESPACES = ("workflows", "comfy")
# The last segment of an endpoint's path on RUN_HOST where its response is an event stream.
STREAM = "stream"
REQUESTS = "requests"
# Each call of a queued job: the method, then the segments behind the request's id.
QUEUE_CALLS = frozenset({("GET",), ("GET", "status"), ("GET", "status", "stream"), ("PUT", "cancel")})

# A host with one of these labels serves the account: "api" everything about it, "rest" the same beside a few paths
# that belong to models. Hosts such as rest.alpha.fal.ai show that the label need not be the last but two.
_ACCOUNT_LABEL, _REST_LABEL = "api", "rest"
# The first segments of those few paths: realtime tokens and uploads.
_MODEL_SERVICES = _TOKENS, _STORAGE = ("tokens", "storage")
# The last segment of an endpoint's path on RUN_HOST that lists servers for realtime video.
ICE = "ice"
# The paths of WMA_HOST, for POST only. A session is paid by time, and the others are free.
ICE_PATH, SESSION_PATH, HEARTBEAT_PATH = "/ice", "/session", "/session/heartbeat"
# The endpoints of calls that name none in their path, and of all that is not known.
_TOKEN_ENDPOINT, _SESSION_ENDPOINT, OTHER = "realtime/token", "wma/session", "other"

_WMA_KINDS = {ICE_PATH: "ice", SESSION_PATH: "session", HEARTBEAT_PATH: "heartbeat"}

_REQUEST_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")


class Url(Protocol):
    """Describe what this module needs of a :class:`~tornado_fal_proxy.rules.target.Target`."""

    @property
    def host(self) -> str:
        """Return the host."""

    @property
    def path(self) -> str:
        """Return the path, which begins with a slash."""

    @property
    def query(self) -> str | None:
        """Return the query, or None where there is no question mark."""


def is_request_id(text: str) -> bool:
    """Return whether ``text`` can be the id of a job that fal has given out."""
    return _REQUEST_ID.fullmatch(text) is not None


def id_length(segments: Sequence[str]) -> int:
    """Return how many segments the app's id has at least, in an endpoint's id or path that has these ``segments``."""
    return 3 if segments[0] in NAMESPACES else 2


def is_queue_call(method: str, segments: Sequence[str]) -> bool:
    """Return whether a request to QUEUE_HOST is one of QUEUE_CALLS, with its method.

    ``segments`` are canonical: the app's id, ``requests``, the request's id, and nothing, ``status``,
    ``status/stream`` or ``cancel``.
    """
    length = id_length(segments)
    if REQUESTS in segments[:length]:
        return False
    match segments[length:]:
        case ["requests", request_id, *rest]:
            is_id = request_id != REQUESTS and is_request_id(request_id)
            return is_id and (method, *rest) in QUEUE_CALLS
    return False


def is_cancel(target: Url) -> bool:
    """Return whether a PUT to ``target`` cancels a queued job, which has one spelling and no query."""
    if target.host != QUEUE_HOST or target.query is not None:
        return False
    segments = canonical_segments(target.path)
    return segments is not None and is_queue_call("PUT", segments)


def is_repeatable(method: str, target: Url) -> bool:
    """Return whether a second request with ``method`` to ``target`` costs no more than one.

    Only the status and the result of a queued job are such, and its cancel. A GET of an endpoint runs the model, as a
    POST does, and what a GET of any other path does is not known.
    """
    if method == "PUT":
        return is_cancel(target)
    if method != "GET" or target.host != QUEUE_HOST:
        return False
    segments = canonical_segments(target.path)
    return segments is not None and is_queue_call(method, segments)


def is_paid(method: str, target: Url) -> bool:
    """Return whether a request with ``method`` to ``target`` costs money: each does that is not known to be free.

    Free are status, result and cancel of a queued job, uploads, lists of ICE servers, and a session's heartbeat. A
    token for realtime is paid because the proxy does not see the calls that it opens.
    """
    host = target.host
    segments = canonical_segments(target.path)
    if segments is None:
        return True
    if host == QUEUE_HOST:
        return not is_queue_call(method, segments)
    if host in REST_HOSTS:
        return segments[0] != _STORAGE
    if method != "POST" or target.query is not None:
        return True
    if host == RUN_HOST:
        return segments[-1] != ICE or len(segments) <= id_length(segments) or REQUESTS in segments
    return host != WMA_HOST or target.path not in (ICE_PATH, HEARTBEAT_PATH)


def endpoint_of(target: Url) -> str:
    """Return the endpoint that ``target`` names: an app's id with the path behind it, as prices and patterns have it.

    The calls of a queued job have the app's id only. The result is ``realtime/token`` for a token, ``wma/session`` for
    a session of realtime video, and OTHER where no endpoint is known.
    """
    host, path = target.host, target.path
    segments = canonical_segments(path.removesuffix("/") if host in REST_HOSTS else path)
    if segments is None:
        return OTHER
    if host in REST_HOSTS:
        return _TOKEN_ENDPOINT if segments[0] == _TOKENS else OTHER
    if host == WMA_HOST:
        return _SESSION_ENDPOINT if path == SESSION_PATH else OTHER
    length = id_length(segments)
    if REQUESTS in segments:
        segments = segments[: segments.index(REQUESTS)]
    elif host == RUN_HOST and segments[-1] in (STREAM, ICE) and len(segments) > length:
        segments.pop()
    return "/".join(segments) if host in (RUN_HOST, QUEUE_HOST) and len(segments) >= length else OTHER


def job_id_of(method: str, target: Url) -> str | None:
    """Return the id of the queued job whose status, result or cancel ``target`` is, else None."""
    segments = canonical_segments(target.path) if target.host == QUEUE_HOST else None
    if segments is None or not is_queue_call(method, segments):
        return None
    return segments[segments.index(REQUESTS) + 1]


def may_name_job(target: Url) -> bool:
    """Return whether some server could find a queued job's id in ``target``, by whatever spelling."""
    segments = canonical_segments(target.path.removesuffix("/"))
    if segments is None:
        return target.path != "/"
    return REQUESTS in map(str.lower, segments)


def is_account_call(target: Url) -> bool:
    """Return whether ``target`` is known to serve the key's account (keys, usage, billing), and not a model.

    A path on a REST host counts as a model's only in a spelling that all servers read alike.
    """
    host = target.host
    if host in (RUN_HOST, QUEUE_HOST):  # nearly every call
        return False
    labels = host.split(".")
    if _ACCOUNT_LABEL in labels:
        return True
    if _REST_LABEL not in labels:
        return False
    segments = canonical_segments(target.path.removesuffix("/"))
    return segments is None or segments[0] not in _MODEL_SERVICES


def kind_of(target: Url | None) -> str:
    """Return the kind of a call to ``target`` for logs and metrics, one of fourteen names whatever clients send.

    They are ``run``, ``stream``, ``ice``, ``queue_submit``, ``queue_status``, ``queue_stream``, ``queue_result``,
    ``queue_cancel``, ``session``, ``heartbeat``, ``token``, ``storage``, ``other``, and ``none`` where the request has
    no valid target.
    """
    if target is None:
        return "none"
    host, path = target.host, target.path
    if host == RUN_HOST:
        last = path.rpartition("/")[2]
        return last if last in (STREAM, ICE) else "run"
    if host == QUEUE_HOST:
        _, found, rest = path.partition(f"/{REQUESTS}/")
        if not found:
            return "queue_submit"
        for end in ("stream", "cancel", "status"):
            if rest.endswith(f"/{end}"):
                return f"queue_{end}"
        return "queue_result"
    if host == WMA_HOST:
        return _WMA_KINDS.get(path, "other")
    if host.startswith("rest."):
        return "token" if path.startswith("/tokens") else "storage" if path.startswith("/storage/") else "other"
    return "other"
