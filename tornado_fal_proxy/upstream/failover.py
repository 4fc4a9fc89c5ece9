"""Decide which calls go to fal's backup domains, and when they go back to the usual ones.

Strategy. fal serves two of its hosts under a second domain too, for the time that the first cannot be reached. A call
to which no connection could be made goes there once, because nothing of it has left. From then on the host is down: its
calls go to the backup at once, and none waits for a time-out of its own. A probe, which is a connection with TLS and
without a request, is made every :data:`PROBE_INTERVAL_S` beside the calls, and the first that succeeds ends the outage.
Where the backup cannot be reached either, a client gets the error of the usual host.

A reload makes another client, which begins with the outages of the one before. Else its first calls would wait for the
same time-out again. It probes at once, because the options may have ended the outage.

This module uses neither libcurl nor a request. Source: fal's page on reliability.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from tornado_fal_proxy.errors import ConnectFailed, NameNotFound, UpstreamError, UpstreamTimeout
from tornado_fal_proxy.rules.endpoints import BACKUP_HOSTS

__all__ = ["BACKUP_CONNECT_TIMEOUT_S", "PROBE_INTERVAL_S", "Failover", "bits_of", "hosts_of"]

logger = logging.getLogger("tornado_fal_proxy")

# Limits a connection to a backup: the client has waited for the usual host already.
BACKUP_CONNECT_TIMEOUT_S = 5.0
# The time between two probes: an outage takes minutes, and a second more of the backup costs nobody anything.
PROBE_INTERVAL_S = 10.0


@dataclass(slots=True)
class _Outage:
    """An outage of a host: when it began, by the loop's clock, the error that began it, and the timer of a probe."""

    since: float
    kind: type[UpstreamError]
    detail: str
    timer: asyncio.TimerHandle | None = None  # None while a probe runs


class Failover:
    """Keep the outages. ``probe`` begins a probe of a host, whose result :meth:`probed` gets."""

    def __init__(self, loop: asyncio.AbstractEventLoop, probe: Callable[[str], None]) -> None:
        self._loop = loop
        self._probe = probe
        self._outages: dict[str, _Outage] = {}
        self._logs = True

    @property
    def down(self) -> tuple[str, ...]:
        """Return the hosts whose calls go to a backup now."""
        return tuple(self._outages)

    def is_down(self, host: str) -> bool:
        """Tell whether calls to this host go to its backup now."""
        return host in self._outages

    def begins(self, host: str, failure: UpstreamError) -> bool:
        """Note that a call to ``host`` has failed before anything left. Return whether it goes to a backup instead."""
        if host not in BACKUP_HOSTS or not isinstance(failure, NameNotFound | ConnectFailed | UpstreamTimeout):
            return False
        if host not in self._outages:
            self._log(
                "failover: %s cannot be reached: %s (%s); its calls go to %s",
                *(host, failure.detail, type(failure).__name__, BACKUP_HOSTS[host]),
            )
            outage = self._outages[host] = _Outage(self._loop.time(), type(failure), failure.detail)
            outage.timer = self._loop.call_later(PROBE_INTERVAL_S, self._begin_probe, host)
        return True

    def error(self, host: str) -> UpstreamError | None:
        """Return the error of a call whose backup cannot be reached: that of its usual ``host``, which is probed now.

        Return None where the outage of that host is over.
        """
        outage = self._outages.get(host)
        if outage is None:
            return None
        if outage.timer is not None:
            self._begin_probe(host)
        return outage.kind(outage.detail)

    def probed(self, host: str, *, reached: bool) -> None:
        """Note the result of a probe."""
        outage = self._outages.get(host)
        if outage is None:
            return
        if not reached:
            outage.timer = self._loop.call_later(PROBE_INTERVAL_S, self._begin_probe, host)
            return
        del self._outages[host]
        self._log("failover: %s can be reached again, after %d s", host, self._loop.time() - outage.since)

    def succeed(self, other: Failover) -> None:
        """Take over the outages of ``other``, whose calls in flight are its last, and probe those hosts now.

        ``other`` keeps its outages for those calls, and logs no more.
        """
        self._logs, other._logs = True, False
        for host, outage in other._outages.items():
            if host not in self._outages:
                self._outages[host] = replace(outage, timer=None)
                self._probe(host)

    def close(self) -> None:
        """Stop to probe."""
        for outage in self._outages.values():
            if outage.timer is not None:
                outage.timer.cancel()

    def _log(self, message: str, *arguments: object) -> None:
        if self._logs:
            logger.warning(message, *arguments)

    def _begin_probe(self, host: str) -> None:
        outage = self._outages[host]
        if outage.timer is not None:
            outage.timer.cancel()
            outage.timer = None
        self._probe(host)


def hosts_of(outages: int) -> Iterator[str]:
    """Yield the hosts of these bits, as :func:`bits_of` makes them."""
    return (host for bit, host in enumerate(BACKUP_HOSTS) if outages >> bit & 1)


def bits_of(hosts: Collection[str]) -> int:
    """Return hosts as bits of one number, for the memory that workers share."""
    return sum(1 << bit for bit, host in enumerate(BACKUP_HOSTS) if host in hosts)
