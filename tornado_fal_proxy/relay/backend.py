"""Share connections to fal, slots, a ledger and two watches between the handlers of one configuration.

Strategy. A handler lives for one request, so everything that outlives a request is here: one :class:`Backend` for each
application, configuration and loop, made on the first call and so after any fork. It closes client connections whose
peer has left, because unread bytes, such as a next request, hide that from Tornado. It ends bodies that arrive too
slowly, because Tornado waits for the rest of a body for as long as the connection lives.

It reads and writes no request.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import Counter
from typing import Any, Protocol

from tornado.iostream import IOStream
from tornado.web import Application

from tornado_fal_proxy._sweep import Sweep, in_turns
from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.errors import BodyTooSlow, ConnectionLost, ProxyError, TooManyCalls
from tornado_fal_proxy.relay.diagnostics import Diagnostics
from tornado_fal_proxy.relay.hangup import HangupWatch
from tornado_fal_proxy.spending.ledger import Ledger
from tornado_fal_proxy.spending.store import Store
from tornado_fal_proxy.upstream.budget import buffer_limit
from tornado_fal_proxy.upstream.client import UpstreamClient

__all__ = [
    "Backend",
    "BodyReceiver",
    "Slots",
    "backends_of",
    "close_backend",
    "close_upstreams",
    "flush_spending",
    "make_store",
    "renew_backend",
    "shared_backend",
    "store_failures",
    "succeed_backend",
]

# Limit how slowly a body may arrive: this much must come within this time, again and again, or the call is answered
# 408, because a client would otherwise occupy a slot at no cost. The time outlasts a change from one network to
# another, and the rate is less than a phone sends over EDGE.
BODY_WINDOW_S, BODY_WINDOW_BYTES = 30.0, 128 * 1024
# Limits how late a slow body is noticed.
BODY_SWEEP_S = 5.0


class BodyReceiver(Protocol):
    """Describe what the sweep of slow bodies needs of a handler."""

    def received_so_far(self) -> int | None:
        """Return how many bytes of the body have come; None when all of it has."""

    def abort_body(self, error: ProxyError) -> None:
        """Answer a client whose body is waited for no longer."""


class Slots:
    """Count the calls that are served at once, up to ``limit``."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_use = 0

    def acquire(self) -> None:
        """Take a slot. Raise TooManyCalls; otherwise :meth:`release` must follow."""
        if self.in_use >= self.limit:
            raise TooManyCalls(f"{self.in_use} calls in flight")
        self.in_use += 1

    def release(self) -> None:
        """Give a slot back."""
        self.in_use -= 1


class Backend:
    """Hold what the handlers of one configuration share on one loop. The ledger counts the store's ``failures``."""

    def __init__(self, config: ProxyConfig, failures: Counter[str]) -> None:
        self.client = UpstreamClient(force_instance=True, config=config)
        self.slots = Slots(config.max_in_flight)
        self.diagnostics = Diagnostics()
        self.is_closed = False
        self._config, self._failures = config, failures
        self.ledger_in_use: Ledger | None = None  # None until a call needs one
        self._loop = asyncio.get_running_loop()
        self._hangups = HangupWatch()
        self._watched: dict[int, weakref.ref[IOStream]] = {}
        # Handlers whose body is on its way, with the time and the number of bytes at the last check of its rate.
        self._arriving: dict[BodyReceiver, tuple[float, int]] = {}
        self._sweep = Sweep(BODY_SWEEP_S, self._end_slow_bodies)
        if (fd := self._hangups.fileno()) is not None:
            self._loop.add_reader(fd, self._close_left)

    @property
    def ledger(self) -> Ledger:
        """Return the ledger, which is made when it is first asked for. Only a configuration with a store has one."""
        if self.ledger_in_use is None:
            assert self._config.spending is not None
            store = make_store(self._config)
            self.ledger_in_use = Ledger(self._config.spending, store, failures=self._failures)
        return self.ledger_in_use

    def succeed(self, other: Backend) -> None:
        """Count calls and buffered bytes together with a backend whose calls in flight are its last.

        If failover is on in both, calls go to fal's backup domain at once where the other has found that they must.
        """
        self.slots, self.client.budget = other.slots, other.client.budget
        self.slots.limit = self._config.max_in_flight
        self.client.budget.limit = buffer_limit(self._config)
        if self.client.failover is not None and other.client.failover is not None:
            self.client.failover.succeed(other.client.failover)

    def renew(self, config: ProxyConfig) -> None:
        """Count by the prices of an equal configuration from now on."""
        self._config = config
        if self.ledger_in_use is not None and config.spending is not None:
            self.ledger_in_use.rules = config.spending

    def watch(self, stream: IOStream) -> None:
        """Close a client's ``stream`` from now on as soon as its peer leaves, which also tells its handler."""
        fd = stream.socket.fileno()
        known = self._watched.get(fd)
        if known is None or known() is not stream:
            self._watched[fd] = weakref.ref(stream)
            self._hangups.add(fd)

    def expect_body(self, receiver: BodyReceiver) -> None:
        """Require from now on that the body arrives, until :meth:`body_arrived`."""
        self._arriving[receiver] = self._loop.time(), 0
        self._sweep.start()

    def body_arrived(self, receiver: BodyReceiver) -> None:
        """Stop to require that the body arrives."""
        self._arriving.pop(receiver, None)

    def close(self) -> None:
        """Stop both watches and abort all calls, with a response where a body is waited for."""
        self.is_closed = True
        self._sweep.stop()
        for receiver in list(self._arriving):
            if receiver.received_so_far() is not None:
                receiver.abort_body(ConnectionLost("the proxy is closing"))
        self._arriving.clear()
        if (fd := self._hangups.fileno()) is not None:
            self._loop.remove_reader(fd)
        self._hangups.close()
        self.client.close()
        if self.ledger_in_use is not None:
            self.ledger_in_use.close()

    def _close_left(self) -> None:
        # The streams now, because another connection may have the descriptor in a later turn. A descriptor whose stream
        # waits for its turn may be reported again, with a reset.
        found = [self._watched.pop(fd, None) for fd in self._hangups.hung_up()]
        streams = [reference() for reference in found if reference is not None]
        in_turns((stream for stream in streams if stream is not None), IOStream.close)

    def _end_slow_bodies(self) -> bool:
        now = self._loop.time()
        slow = []
        for receiver, (since, size) in list(self._arriving.items()):
            received = receiver.received_so_far()
            if received is None:
                del self._arriving[receiver]
            elif now - since >= BODY_WINDOW_S:
                self._arriving[receiver] = now, received
                if received - size < BODY_WINDOW_BYTES:
                    slow.append(receiver)
        in_turns(slow, self._end_slow_body)
        return bool(self._arriving)

    def _end_slow_body(self, receiver: BodyReceiver) -> None:
        if receiver in self._arriving and receiver.received_so_far() is not None:  # else it came, or has left
            receiver.abort_body(BodyTooSlow())


def make_store(config: ProxyConfig) -> Store:
    """Return the store of a configuration, which is not open yet."""
    from tornado_fal_proxy.spending.stores import parse_store  # costs memory, which is for those who spend

    return parse_store(config.store)


_backends: weakref.WeakKeyDictionary[Application, dict[tuple[ProxyConfig, Any], Backend]] = weakref.WeakKeyDictionary()

# Failures of stores. They outlive the backends, because a store may fail at its end.
_failures: weakref.WeakKeyDictionary[Application, Counter[str]] = weakref.WeakKeyDictionary()

# Ledgers that close or have closed, until somebody waits for it.
_closing: weakref.WeakKeyDictionary[Application, list[Ledger]] = weakref.WeakKeyDictionary()


def shared_backend(application: Application, config: ProxyConfig) -> Backend:
    """Return the backend of this configuration on the running loop, made on the first call."""
    backends = _backends.setdefault(application, {})
    key = (config, asyncio.get_running_loop())
    backend = backends.get(key)
    if backend is None:
        backend = backends[key] = Backend(config, store_failures(application))
    return backend


def store_failures(application: Application) -> Counter[str]:
    """Return how often each operation of a store failed, in all ledgers of ``application``, those that close included.

    The metrics clear it, as they count what it has.
    """
    return _failures.setdefault(application, Counter())


def backends_of(application: Application) -> list[Backend]:
    """Return the backends of ``application`` that were made so far, one for each configuration and loop."""
    return list(_backends.get(application, {}).values())


def renew_backend(application: Application, config: ProxyConfig) -> None:
    """Use ``config`` in place of an equal one, whose file of prices may have had other prices."""
    backend = _backends.get(application, {}).get((config, asyncio.get_running_loop()))
    if backend is not None:
        backend.renew(config)


def succeed_backend(application: Application, before: ProxyConfig, config: ProxyConfig) -> None:
    """Let ``config`` serve in place of another one: the limits are those of one service, whatever still runs."""
    old = _backends.get(application, {}).get((before, asyncio.get_running_loop()))
    if old is not None:
        shared_backend(application, config).succeed(old)


def close_backend(application: Application, config: ProxyConfig) -> None:
    """Close the connections of one configuration on the running loop, with which no call is served any more."""
    backend = _backends.get(application, {}).pop((config, asyncio.get_running_loop()), None)
    if backend is not None:
        _close(application, backend)


def _close(application: Application, backend: Backend) -> None:
    backend.close()
    if (ledger := backend.ledger_in_use) is not None:
        others = [other for other in _closing.get(application, []) if not other.is_closed]
        _closing[application] = [*others, ledger]


def close_upstreams(application: Application) -> None:
    """Abort all upstream transfers of ``application`` and close its connections to fal.

    Call it at the end of an application's life, after its server has stopped. A later call opens new connections. With
    limits on spending ``await flush_spending(application)`` after it.
    """
    for backend in _backends.pop(application, {}).values():
        _close(application, backend)


async def flush_spending(application: Application) -> None:
    """Wait until what the calls of ``application`` have spent is in the store, for some seconds at most.

    Call it after :func:`close_upstreams`, where limits on spending are set, before the loop ends.
    """
    for ledger in _closing.pop(application, []):
        await ledger.closed()
