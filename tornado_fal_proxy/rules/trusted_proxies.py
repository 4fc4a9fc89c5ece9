"""The address of a client that comes through the operator's own proxies.

Strategy. ``X-Forwarded-For`` is a text that anyone may send. It is read from its end, where the nearest proxy has
written, and only as long as the writer is trusted. The first writer is the peer of the connection, and each address
that a trusted writer names is the next. The first address that is not trusted is the client's. Some writers add a port
(Azure, IIS), which is not part of the address, or leave an element empty, which names nobody.

This module never believes an untrusted peer, and never resolves a name.

Sources: RFC 7239 section 8.1, nginx's ``real_ip_recursive``, which does the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

__all__ = ["UNIX", "TrustedProxies"]

# The name of a peer on a socket in the file system, which has no address.
UNIX = "unix"
# The number of elements read from the end of X-Forwarded-For, which bounds the work. No operator has as many proxies
# in a row.
MAX_HOPS = 16
# RFC 7239 section 6: an IPv6 address has brackets, with or without a port. IPv4 has dots, so its colon is a port's.
_WITH_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)(?=:))(?::([0-9]{1,5}))?")
# The length of an address as text: the longest form of RFC 4291 section 2.2 is the third.
MAX_ADDRESS_CHARS = 45


@dataclass(frozen=True)
class TrustedProxies:
    """Addresses and networks whose ``X-Forwarded-For`` is believed.

    ``unix`` among ``texts`` stands for a socket in the file system. Raises ValueError, which names the first text that
    is none of these.
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

    def client(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """Return the address of the client behind ``peer``, which is the client itself unless it is trusted.

        ``forwarded_for`` are the values of the X-Forwarded-For lines, in the order received.
        """
        if not (self.texts and forwarded_for):
            return peer
        client, hops = peer, ",".join(forwarded_for).rstrip(", \t").rsplit(",", MAX_HOPS)[-MAX_HOPS:]
        while hops and self.trusts(client):
            hop = hops.pop().strip(" \t")
            if not hop:
                continue
            address = _address(hop) or _address(_without_port(hop))
            if address is None:
                break
            client = str(address)
        return client

    def trusts(self, peer: str) -> bool:
        """Return whether ``peer`` is one of these."""
        if peer == UNIX:
            return UNIX in self.texts
        address = _address(peer)
        return address is not None and any(address in network for network in self._networks)


def _without_port(text: str) -> str:
    """Return what stands before the port of ``address:port``, or in brackets; an empty text for anything else."""
    match = _WITH_PORT.fullmatch(text[: MAX_ADDRESS_CHARS + len("[]:65535")])
    return "" if match is None or int(match[3] or 1) not in range(1, 65536) else match[1] or match[2]


def _address(text: str) -> IPv4Address | IPv6Address | None:
    # A peer's IPv6 address may have a zone (RFC 4007 section 11), which is any text.
    text = text.partition("%")[0]
    return _parsed(text) if len(text) <= MAX_ADDRESS_CHARS else None


@lru_cache(4096)
def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    # A socket for both families writes an IPv4 peer as an IPv4-mapped IPv6 address.
    return getattr(address, "ipv4_mapped", None) or address
