"""Who a caller is, when a proxy of the operator's own stands between.

Strategy. ``X-Forwarded-For`` is a text that anyone may send. It is read from its end, where the nearest proxy has
written, and only as long as whoever wrote is trusted: the peer of the connection first, then each address that a
trusted one names. The first that is not trusted is the caller.

Source: RFC 7239 section 8.1 says why; nginx's ``real_ip_recursive`` does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

__all__ = ["UNIX", "TrustedProxies"]

# The peer on a socket of the file system, which has no address.
UNIX = "unix"
# Proxies in a row that are looked at.
MOST_HOPS = 16
# An address as text: RFC 4291 section 2.2, form 3.
LONGEST = 45


@dataclass(frozen=True)
class TrustedProxies:
    """Addresses and networks whose ``X-Forwarded-For`` is believed; ``unix`` stands for a socket in the file system.

    Raises ValueError, which names what is none.
    """

    texts: tuple[str, ...] = ()
    _networks: tuple[IPv4Network | IPv6Network, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        networks = []
        for text in self.texts:
            if text != UNIX:
                try:
                    networks.append(ip_network(text))
                except ValueError as exc:
                    raise ValueError(f"{text!r} is no address, no network such as 10.0.0.0/8, and not unix") from exc
        object.__setattr__(self, "_networks", tuple(networks))

    def caller(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """The address of the caller behind ``peer``, which is itself one where it is not trusted."""
        if not (self.texts and forwarded_for):
            return peer
        caller, hops = peer, ",".join(forwarded_for).rsplit(",", MOST_HOPS)[-MOST_HOPS:]
        while hops and self._trusts(caller):
            address = _address(hops.pop().strip(" \t"))
            if address is None:
                break
            caller = str(address)
        return caller

    def _trusts(self, peer: str) -> bool:
        if peer == UNIX:
            return UNIX in self.texts
        address = _address(peer)
        return address is not None and any(address in network for network in self._networks)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    # The zone of an IPv6 address (RFC 4007 section 11), which a peer may have, is any text.
    text = text.partition("%")[0]
    return _parsed(text) if len(text) <= LONGEST else None


@lru_cache(4096)
def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    # What a socket for both families says of a peer of the older one.
    return getattr(address, "ipv4_mapped", None) or address
