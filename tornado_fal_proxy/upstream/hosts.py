"""Which calls may go to libcurl now, and which wait: what is known of each host of fal's.

Strategy: decisions only. This module knows neither libcurl nor the clock; the client tells it what happened, and it
answers with the calls that may go.

*One handshake for many calls.* Calls to a host that is known to speak HTTP/2 go at once: libcurl lets them share a
connection. While the protocol is not known one call leads, and the others wait for its handshake.

*Strangers wait for each other, and for nobody else.* libcurl looks names up in a pool of 20 threads, and a look-up that
hangs keeps its thread long after its call has gone. The wildcard of fal's formula lets a caller name any number of
hosts that hang. So a host counts as a stranger until a connection to it was made, and :data:`LOOK_UPS` of strangers
may be under way at once: the rest of the pool is for the hosts that work. When a stranger's first call fails, those
that waited for it fail with it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

__all__ = ["HANDSHAKE_WAIT_S", "HANG_S", "IDLE_CONNECTION_S", "KNOWN_HOSTS", "LOOK_UPS", "SUSPICION_S", "Call", "Hosts"]

# Long enough for any handshake that is going to succeed soon; past it calls make connections of their own.
HANDSHAKE_WAIT_S = 1.0
# Below the time after which common load balancers drop idle connections (60 s and more).
IDLE_CONNECTION_S = 50
# After a pooled connection turned out to be dead, others likely are. Until libcurl must have looked at all of them by
# itself, which it does once a second, POSTs avoid them.
SUSPICION_S = 1.1
# Of strangers, at once: half of libcurl's pool, for it asks for the IPv4 and the IPv6 addresses in a thread each. With
# 10 all of it was taken, and a host that exists waited for its look-up until one of theirs gave up.
LOOK_UPS = 5
# How long a look-up whose call is gone may keep its thread: resolv.conf(5) allows two tries of 5 s at three servers.
HANG_S = 30.0
# Hosts that are remembered: more than fal has.
KNOWN_HOSTS = 1024

# What fal's clients call. Nobody needs to prove that these exist, not even at the first call.
FAMILIAR = frozenset({"fal.run", "queue.fal.run", "rest.fal.ai", "rest.alpha.fal.ai"})


class Call(Protocol):
    """What must be known of a call. ``leads`` and ``looks_up`` are this module's notes on it."""

    host: str
    leads: bool
    looks_up: bool


C = TypeVar("C", bound=Call)


class _Host(Generic[C]):
    """What is known of one host. ``http2`` is None while it is not known, ``proven`` false for a stranger."""

    __slots__ = ("called_at", "http2", "leader", "proven", "suspect_until", "waiting")

    def __init__(self, proven: bool) -> None:
        self.proven = proven
        self.http2: bool | None = None
        self.called_at = 0.0
        self.suspect_until = 0.0
        self.leader: C | None = None
        self.waiting: dict[C, None] = {}  # in the order of their coming


class Hosts(Generic[C]):
    """The hosts that were called, and the calls that wait here. Times are the loop's, in seconds."""

    def __init__(self) -> None:
        self._hosts: dict[str, _Host[C]] = {}
        # Those that may be forgotten, for nobody leads or waits there: the one that was so first comes first.
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._strangers: OrderedDict[C, None] = OrderedDict()  # leading calls that wait for a look-up
        self._looking_up = 0

    @property
    def waiting(self) -> int:
        """Calls that wait here."""
        return len(self._strangers) + sum(len(host.waiting) for host in self._hosts.values())

    def speaks_http2(self, name: str) -> bool | None:
        """Whether a host speaks HTTP/2; None while that is not known."""
        host = self._hosts.get(name)
        return None if host is None else host.http2

    def is_suspect(self, name: str, now: float) -> bool:
        """Whether pooled connections to the host may be dead."""
        host = self._hosts.get(name)
        return host is not None and now < host.suspect_until

    def learn(self, name: str, http2: bool) -> None:
        """The host speaks, or does not speak, HTTP/2."""
        if (host := self._hosts.get(name)) is not None:
            host.http2 = http2

    def suspect(self, name: str, now: float) -> None:
        """A connection to the host broke; the next may also be to another kind of server."""
        if (host := self._hosts.get(name)) is not None:
            host.suspect_until = now + SUSPICION_S
            host.http2 = None

    def arrive(self, call: C, now: float) -> bool:
        """Whether the call may go now. Otherwise it waits here until one of the other methods returns it."""
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
        if self._looking_up >= LOOK_UPS:
            self._strangers[call] = None
            return False
        self._looking_up += 1
        call.looks_up = True
        return True

    def reached(self, call: C) -> list[C]:
        """The call has its connection. Those returned may go."""
        host = self._hosts.get(call.host)
        if host is not None:
            host.proven = True
        return self._no_longer_leads(call, host) + self._has_looked_up(call)

    def too_slow(self, call: C) -> list[C]:
        """The call has led for HANDSHAKE_WAIT_S. Those returned may go; strangers wait on."""
        host = self._hosts.get(call.host)
        return self._no_longer_leads(call, host) if host is not None and host.proven else []

    def leave(self, call: C, now: float, *, hangs: bool) -> list[C]:
        """The call is over, or gives up waiting. Those returned may go.

        Where its look-up may hang, the place of that stays taken until :meth:`look_up_ended`: True is what
        ``call.looks_up`` is then still.
        """
        host = self._hosts.get(call.host)
        self._strangers.pop(call, None)
        if host is None:
            return []
        host.waiting.pop(call, None)
        free: list[C] = []
        if host.proven:
            free = self._no_longer_leads(call, host)
        elif host.leader is call:
            host.leader, heirs = None, list(host.waiting)
            host.waiting.clear()
            free = [heir for heir in heirs if self.arrive(heir, now)]
            if host.leader is None:
                del self._hosts[call.host]
        return free if hangs else free + self._has_looked_up(call)

    def waiting_for(self, call: C) -> list[C]:
        """Those that wait for the call to a stranger that they call too, and will fail with it."""
        host = self._hosts.get(call.host)
        return list(host.waiting) if host is not None and host.leader is call and not host.proven else []

    def look_up_ended(self) -> list[C]:
        """A look-up that hung has had its time. Those returned may go."""
        self._looking_up -= 1
        free = []
        while self._strangers and self._looking_up < LOOK_UPS:
            call, _ = self._strangers.popitem(last=False)
            self._looking_up += 1
            call.looks_up = True
            free.append(call)
        return free

    def _has_looked_up(self, call: C) -> list[C]:
        if not call.looks_up:
            return []
        call.looks_up = False
        return self.look_up_ended()

    def _no_longer_leads(self, call: C, host: _Host[C] | None) -> list[C]:
        if host is None or host.leader is not call:
            return []
        host.leader, free = None, list(host.waiting)
        host.waiting.clear()
        if call.host not in FAMILIAR:
            self._idle[call.host] = None
        return free

    def _host(self, name: str) -> _Host[C]:
        host = self._hosts.get(name)
        if host is None:
            if len(self._hosts) >= KNOWN_HOSTS and self._idle:
                forgotten, _ = self._idle.popitem(last=False)
                del self._hosts[forgotten]
            host = self._hosts[name] = _Host(name in FAMILIAR)
        return host
