"""Take the user of a call from a header that a proxy in front has set, such as oauth2-proxy's X-Forwarded-User.

Strategy. The header counts only where the peer of the connection is one of ``--trusted-proxies``: any client can send
it. A proxy that lets the client's own pass beside its own would let everyone be everyone, so two of them are a fault of
the configuration. So is a value that can be no id. Without the header, or with an empty one, the client's address
counts, as without this option. The header is never one that goes on to fal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tornado_fal_proxy.errors import Misconfigured
from tornado_fal_proxy.rules.headers import FIELD_NAME, is_fals_own
from tornado_fal_proxy.rules.target import TARGET_HEADER
from tornado_fal_proxy.rules.trusted_proxies import TrustedProxies
from tornado_fal_proxy.service.connection import peer_of
from tornado_fal_proxy.spending.identity import check_id

__all__ = ["UserHeader", "as_user_header"]

_NAME = re.compile(FIELD_NAME)
# Limits a name: longer than any proxy in front has.
MAX_NAME_CHARS = 64
# Headers that have another meaning, hold a secret that the log must not have, or go on to fal.
_TAKEN = frozenset(
    {
        *("accept", "authorization", "connection", "content-length", "content-type", "cookie", "expect", "forwarded"),
        *("host", "origin", "proxy-authorization", "te", "transfer-encoding", "upgrade", "user-agent", "via"),
        *("x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "x-request-id", TARGET_HEADER),
    }
)


def as_user_header(text: str) -> str:
    """Return the name of a header that may have a user. Raise ValueError."""
    name = text.lower()
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME_CHARS or name in _TAKEN or is_fals_own(name):
        raise ValueError(f"must be the name of a header for users, such as X-Forwarded-User, not {text!r}")
    return text


@dataclass(frozen=True)
class UserHeader:
    """Identify users by a header: a function for ``ProxyConfig.identify``."""

    name: str
    trusted: TrustedProxies

    def __call__(self, handler: Any, _target: object) -> str | None:
        """Return the user that the header names; None where it does not count. Raise Misconfigured."""
        if not self.trusted.trusts(peer_of(handler.request.connection)):
            return None
        users = handler.request.headers.get_list(self.name)
        if len(users) > 1:
            raise Misconfigured(f"user_header: {self.name} comes twice; the proxy in front must drop the client's own")
        user = _decoded(users[0]) if users else ""
        if not user:
            return None  # nobody has signed in
        try:
            check_id(user)
        except ValueError as exc:
            raise Misconfigured(f"user_header: the value of {self.name} {exc}") from None
        return user


def _decoded(value: str) -> str:
    """Return a header's value as UTF-8, which Tornado takes for Latin-1, where it is that."""
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return value
