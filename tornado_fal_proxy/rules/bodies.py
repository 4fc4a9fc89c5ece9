"""The bodies that name apps: requests for a realtime token, and the signals of realtime video.

Strategy. A rule decides about what a body names, so the body must have one reading: plain JSON in UTF-8, each name once
in each object, and the names that decide in plain ASCII without escapes. Anything else raises ValueError.

This module knows no rule.

Sources: the source of fal's SDKs, and fal's pages on realtime tokens and on realtime video.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tornado_fal_proxy.rules.endpoints import PATH_TOKENS_PATH
from tornado_fal_proxy.rules.paths import SEGMENT, canonical_segments

__all__ = ["TokenRequest", "named_app", "token_request"]

# The size of a token request's body, which holds a few short names at most.
MAX_TOKEN_BODY_BYTES = 4096
# The size of a body that opens a session: the description of media in it (SDP) has some 10 kB.
MAX_SESSION_BODY_BYTES = 131_072
_APP = "app_id"


class TokenRequest(NamedTuple):
    """A request for a token: aliases of apps, or ``paths`` of endpoints, for ``seconds``."""

    apps: list[str]
    paths: list[list[str]]
    seconds: int


def token_request(path: str, body: bytes) -> TokenRequest:
    """Read the body of a token request to this path. Raise ValueError."""
    if len(body) > MAX_TOKEN_BODY_BYTES:
        raise ValueError("the body is too large")
    if not body.isascii() or b"\\" in body:
        raise ValueError("the body has more than plain ASCII without escapes")
    time = "duration" if path == PATH_TOKENS_PATH else "token_expiration"
    fields = _fields(body)
    if set(fields) != {"allowed_apps", time}:
        raise ValueError(f"the body must have allowed_apps and {time}, and nothing else")
    apps, seconds = fields["allowed_apps"], fields[time]
    if not isinstance(apps, list) or not apps or not all(isinstance(app, str) for app in apps):
        raise ValueError("allowed_apps must be a list of names")
    if type(seconds) is not int:
        raise ValueError(f"{time} must be an integer")
    if path == PATH_TOKENS_PATH:
        return TokenRequest([], [_segments(app) for app in apps], seconds)
    if not all(map(SEGMENT.fullmatch, apps)):
        raise ValueError("allowed_apps must be a list of aliases")
    return TokenRequest(apps, [], seconds)


def named_app(body: bytes) -> list[str]:
    """Return the segments of the endpoint that a signal of realtime video is for. Raise ValueError."""
    if len(body) > MAX_SESSION_BODY_BYTES:
        raise ValueError("the body is too large")
    fields = _fields(body)
    # A lenient server may take any of these names for the one that decides.
    if [name for name in fields if re.sub("[^a-z0-9]", "", name.lower()) == "appid"] != [_APP]:
        raise ValueError(f"the body must have {_APP} once")
    app = fields[_APP]
    if not isinstance(app, str) or f'"{_APP}"'.encode() not in body or f'"{app}"'.encode() not in body:
        raise ValueError(f"{_APP} must be a string without escapes")
    return _segments(app)


def _segments(app: str) -> list[str]:
    if (segments := canonical_segments(f"/{app}")) is None or len(segments) < 2:
        raise ValueError("an app must be written as owner/alias, or as a path below it")
    return segments


def _fields(body: bytes) -> Mapping[str, Any]:
    """Return the fields of a JSON object. Raise ValueError where parsers may read it in different ways."""
    try:
        # json.loads() would also take bytes in UTF-16 and UTF-32.
        fields = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ValueError("the body is not plain JSON") from None
    if not isinstance(fields, dict):
        raise ValueError("the body is no JSON object")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a JSON object. Raise ValueError where it has a name twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name stands there twice")
    return fields


def _refuse_constant(text: str) -> Any:
    """Raise ValueError because NaN and Infinity, which Python's parser takes, are not JSON."""
    raise ValueError(f"{text} is not JSON")
