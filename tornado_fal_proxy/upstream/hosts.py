"""Decide which calls may go to libcurl now, and which wait, from what is known of each of fal's hosts.

Strategy: decisions only. This module uses neither libcurl nor the clock; the client reports what happened and gets the
calls that may go.

*One handshake for many calls.* Calls to a host that is known to speak HTTP/2 go at once: libcurl lets them share a
connection. While the protocol is not known one call leads, and the others wait for its handshake.

*Unproven hosts wait for each other only.* libcurl looks names up in a pool of 20 threads, and a lookup that hangs keeps
its thread long after its call has gone. The wildcard of fal's formula lets a client name any number of hosts that hang.
So a host is unproven until a connection to it was made, and at most :data:`MAX_LOOKUPS` of unproven hosts run at once:
the rest of the pool is kept for the hosts that work. When the first call to an unproven host fails, the calls that
waited for it fail too. Clients take turns, so one that names hundreds of hosts delays its own calls most. Each client's
newest call goes first, because its older ones may be for names that hang.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

from tornado_fal_proxy.rules.endpoints import WELL_KNOWN_HOSTS

__all__ = [
    "HANDSHAKE_WAIT_S",
    "HANG_S",
    "IDLE_CONNECTION_S",
    "MAX_HOSTS",
    "MAX_LOOKUPS",
    "SUSPICION_S",
    "Hosts",
    "PendingTransfer",
]

# Limits the wait for another call's handshake: enough for any handshake that will succeed soon. After it calls make
# connections of their own.
HANDSHAKE_WAIT_S = 1.0
# Limits how long an idle connection is used again: less than common load balancers allow (60 s and more).
IDLE_CONNECTION_S = 50
# Limits how long paid calls avoid the pool of a host after one of its connections turned out to be dead: until libcurl
# must have checked all of them by itself, which it does once a second.
SUSPICION_S = 1.1
# Limits lookups of unproven hosts at once: half of libcurl's pool, because a lookup takes a thread each for IPv4 and
# IPv6 addresses. 10 took the whole pool, and a host that exists waited until one of them timed out.
MAX_LOOKUPS = 5
# Limits how long a lookup without a call counts: resolv.conf(5) allows two tries of 5 s at three servers.
HANG_S = 30.0
# Limits the hosts that are remembered: more than fal has.
MAX_HOSTS = 1024


class PendingTransfer(Protocol):
    """Describe what must be known of a call. ``leads`` and ``resolving`` are this module's notes on it."""

    host: str
    client: str
    leads: bool
    resolving: bool


T = TypeVar("T", bound=PendingTransfer)


class _Host(Generic[T]):
    """Hold what is known of one host. ``http2`` is None while the protocol is not known."""

    __slots__ = ("called_at", "http2", "leader", "proven", "suspect_until", "waiting")

    def __init__(self, proven: bool) -> None:
        self.proven = proven
        self.http2: bool | None = None
        self.called_at = 0.0
        self.suspect_until = 0.0
        self.leader: T | None = None
        self.waiting: dict[T, None] = {}  # in the order of arrival


class Hosts(Generic[T]):
    """Keep the hosts that were called, and the calls that wait. Times are the loop's, in seconds."""

    def __init__(self) -> None:
        self._hosts: dict[str, _Host[T]] = {}
        # The hosts that may be forgotten because no call leads or waits there, in the order of becoming so.
        self._idle: OrderedDict[str, None] = OrderedDict()
        # Leading calls that wait for a lookup, by client, in the order of the clients' turns.
        self._unproven: OrderedDict[str, dict[T, None]] = OrderedDict()
        self._lookups = 0

    @property
    def waiting(self) -> int:
        """Count the calls that wait here."""
        unproven = sum(map(len, self._unproven.values()))
        return unproven + sum(len(host.waiting) for host in self._hosts.values())

    def speaks_http2(self, name: str) -> bool | None:
        """Tell whether a host speaks HTTP/2; None while that is not known."""
        host = self._hosts.get(name)
        return None if host is None else host.http2

    def is_suspect(self, name: str, now: float) -> bool:
        """Tell whether pooled connections to the host may be dead."""
        host = self._hosts.get(name)
        return host is not None and now < host.suspect_until

    def set_protocol(self, name: str, http2: bool) -> None:
        """Note whether the host speaks HTTP/2."""
        if (host := self._hosts.get(name)) is not None:
            host.http2 = http2

    def suspect(self, name: str, now: float) -> None:
        """Note that a connection to the host broke; the next may also be to another kind of server."""
        if (host := self._hosts.get(name)) is not None:
            host.suspect_until = now + SUSPICION_S
            host.http2 = None

    def enter(self, call: T, now: float) -> bool:
        """Return whether the call may go now. Otherwise it waits here until one of the other methods returns it."""
        host = self._host(call.host)
        if now - host.called_at > IDLE_CONNECTION_S:
            host.http2 = None  # its connections have gone, and the next may be to another kind of server
        host.called_at = now
        if host.http2 is None:
            if host.leader is not None:
                host.waiting[call] = None
                return False
            host.leader = call
            call.leads = True
            self._idle.pop(call.host, None)
        if host.proven:
            return True
        if self._lookups >= MAX_LOOKUPS:
            self._unproven.setdefault(call.client, {})[call] = None
            return False
        self._lookups += 1
        call.resolving = True
        return True

    def connected(self, call: T) -> list[T]:
        """Note that the call has its connection. Return the calls that may go."""
        host = self._hosts.get(call.host)
        if host is not None:
            host.proven = True
        return self._stop_leading(call, host) + self._end_lookup(call)

    def lead_timed_out(self, call: T) -> list[T]:
        """Note that the call has led for HANDSHAKE_WAIT_S. Return the calls that may go, none to an unproven host."""
        host = self._hosts.get(call.host)
        return self._stop_leading(call, host) if host is not None and host.proven else []

    def leave(self, call: T, now: float, *, hangs: bool) -> list[T]:
        """Note that the call is over, or waits no longer. Return the calls that may go.

        Where its lookup may hang, the lookup counts until :meth:`lookup_ended`, and ``call.resolving`` stays true.
        """
        host = self._hosts.get(call.host)
        self._drop_unproven(call)
        if host is None:
            return []
        host.waiting.pop(call, None)
        free: list[T] = []
        if host.proven:
            free = self._stop_leading(call, host)
        elif host.leader is call:
            host.leader, waiting = None, list(host.waiting)
            host.waiting.clear()
            free = [other for other in waiting if self.enter(other, now)]
            if host.leader is None:
                del self._hosts[call.host]
        return free if hangs else free + self._end_lookup(call)

    def waiting_for(self, call: T) -> list[T]:
        """Return the calls that wait for this one to the same unproven host, and will fail with it."""
        host = self._hosts.get(call.host)
        return list(host.waiting) if host is not None and host.leader is call and not host.proven else []

    def lookup_ended(self) -> list[T]:
        """Note that a lookup that hung has had its time. Return the calls that may go."""
        self._lookups -= 1
        free = []
        while self._unproven and self._lookups < MAX_LOOKUPS:
            client, calls = next(iter(self._unproven.items()))
            call, _ = calls.popitem()
            if calls:
                self._unproven.move_to_end(client)
            else:
                del self._unproven[client]
            self._lookups += 1
            call.resolving = True
            free.append(call)
        return free

    def _drop_unproven(self, call: T) -> None:
        calls = self._unproven.get(call.client, {})
        if call in calls:
            del calls[call]
            if not calls:
                del self._unproven[call.client]

    def _end_lookup(self, call: T) -> list[T]:
        if not call.resolving:
            return []
        call.resolving = False
        return self.lookup_ended()

    def _stop_leading(self, call: T, host: _Host[T] | None) -> list[T]:
        if host is None or host.leader is not call:
            return []
        host.leader, free = None, list(host.waiting)
        host.waiting.clear()
        if call.host not in WELL_KNOWN_HOSTS:
            self._idle[call.host] = None
        return free

    def _host(self, name: str) -> _Host[T]:
        host = self._hosts.get(name)
        if host is None:
            if len(self._hosts) >= MAX_HOSTS and self._idle:
                forgotten, _ = self._idle.popitem(last=False)
                del self._hosts[forgotten]
            host = self._hosts[name] = _Host(name in WELL_KNOWN_HOSTS)
        return host
