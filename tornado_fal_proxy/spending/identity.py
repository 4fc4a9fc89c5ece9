"""The user of a call, as an id.

Strategy. The operator's function returns an id, or an id and the name of a plan, or None. Without an id the client's
address counts, in a form that no id has. Nothing here knows who may do what.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from functools import lru_cache

__all__ = ["ADDRESS", "MAX_USER_CHARS", "address_user", "check_id", "identity", "tag_of"]

# Limits an id: longer than an e-mail address or an account's number needs.
MAX_USER_CHARS = 128
# The beginning of an address that stands for a user. No id begins so.
ADDRESS = "address:"
# The network that counts as one user in IPv6: one connection to the internet gets one of these at least.
_IPV6_PREFIX = 64

_TAG = re.compile(r"[A-Za-z0-9._@+-]{1,128}")
# The beginning of a tag that is a hash, and the number of hexadecimal digits behind it.
_HASH, _HASH_CHARS = "sha256-", 16


def identity(result: object, address: str) -> tuple[str, str | None]:
    """Return the id of a user and the name of a plan, or None for no plan, from what the operator's function returned.

    ``address`` is the client's. Raise ValueError, without the id in its text.
    """
    user, plan = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if user is None:
        user = address_user(address)
    elif not isinstance(user, str):
        raise ValueError(f"returned a {type(user).__name__}, and not an id, (id, plan), or None")
    else:
        try:
            check_id(user)
        except ValueError as exc:
            raise ValueError(f"returned an id that {exc}") from None
    if plan is not None and not isinstance(plan, str):
        raise ValueError(f"returned a {type(plan).__name__} as a plan, and not its name")
    return user, plan


def check_id(user: str) -> None:
    """Raise ValueError unless ``user`` can be the id of a user. Its text does not have the id."""
    if not 1 <= len(user) <= MAX_USER_CHARS or not user.isprintable():
        raise ValueError(f"is not 1 to {MAX_USER_CHARS} printable characters")
    if user.startswith(ADDRESS):
        raise ValueError(f"begins with {ADDRESS}, as addresses do")


@lru_cache(4096)
def address_user(address: str) -> str:
    """Return the user that an address stands for: itself, or its /64 in IPv6."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # a socket file has none
        return f"{ADDRESS}unix"
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            return f"{ADDRESS}{ipaddress.ip_network((ip, _IPV6_PREFIX), strict=False)}"
        ip = ip.ipv4_mapped
    return f"{ADDRESS}{ip}"


@lru_cache(4096)
def tag_of(user: str) -> str:
    """Return the value of ``x-fal-tags`` for a user.

    It is the id itself where fal's grammar allows that. Otherwise, and for an address, it is a hash of it.
    """
    if not _TAG.fullmatch(user) or user.startswith(_HASH):  # an address has a colon
        user = _HASH + hashlib.sha256(user.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_CHARS]
    return f"user={user}"
