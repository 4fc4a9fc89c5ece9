"""The faults: how each is caused, its allowed effect on clients, and how soon it is over."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.support.recovery.load import IDLE_S, PATIENT_S, REAL_TIME
from tests.support.recovery.stand import REST_S, Stand
from tests.support.waiting import TIMEOUT_S

__all__ = ["FAULTS", "Fault"]

BOTH = ("h2", "http/1.1")
# Limits how long a connection takes new calls, unless a fault has a limit of its own.
LIFETIME_S = 1
# Limits a handshake: after some faults all clients connect at once, and a slow machine needs this long for them.
CONNECT_S = 5
# The time for which a server misbehaves at least.
FAULT_S = 1.5


async def is_killed(stand: Stand) -> None:
    await stand.server.end(signal.SIGKILL)
    await stand.load.more(40)
    await stand.server.start()


async def is_restarted(stand: Stand) -> None:
    await stand.server.end()
    await stand.server.start()


async def is_stopped(stand: Stand) -> None:
    stand.server.signal(signal.SIGSTOP)
    await stand.load.goes_wrong()
    stand.server.signal(signal.SIGCONT)


def does(mode: str, count: int = 0, body: bytes = b"{}") -> Callable[[Stand], Awaitable[None]]:
    """Return a fault in which the server misbehaves in that way for a while, and until so many calls have ended."""

    async def happens(stand: Stand) -> None:
        stand.load.body = body
        await stand.server.do(mode)
        await asyncio.sleep(FAULT_S)
        await stand.load.more(count)
        stand.load.body = b"{}"
        await stand.server.do("fine")

    return happens


async def vanishes(stand: Stand) -> None:
    assert stand.wire is not None
    stand.recovery_began = time.monotonic()
    stand.wire.silence()


async def is_far_and_lossy(stand: Stand) -> None:
    assert stand.wire is not None
    stand.how = stand.wire.be_bad(0.2, 0.02)
    since = time.monotonic()
    await stand.load.each_kind(since, stand.wanted, TIMEOUT_S)
    await stand.load.more(100)
    stand.wire.be_good()


async def is_near_again(stand: Stand) -> None:
    if stand.wire is not None:
        stand.wire.be_good()


async def moves(stand: Stand) -> None:
    stand.recovery_began = time.monotonic()
    stand.wanted = stand.other.host
    stand.name(stand.other.host)


async def moves_and_ends(stand: Stand) -> None:
    await moves(stand)
    await stand.server.end()


async def moves_back(stand: Stand) -> None:
    await stand.server.end()
    await stand.server.start()
    stand.wanted = stand.server.host
    stand.home()
    async with asyncio.timeout(REST_S):
        while await stand.serves() != stand.wanted:
            await asyncio.sleep(0.1)


@dataclass(frozen=True)
class Fault:
    """One fault, which ``happens`` causes.

    Calls may end as in ``bad``, and some must end as in ``felt``; all others must get the right response. ``repeated``
    is how many calls of one client may fail that began after the fault. It is None where calls may fail until a time is
    over, for example while an address is remembered. The test waits ``within_s`` seconds, and longer on a slow machine,
    until all is right again. Then ``is_undone`` restores the former state, where that is needed.
    """

    happens: Callable[[Stand], Awaitable[None]]
    bad: frozenset[str] = frozenset()
    felt: frozenset[str] = frozenset()
    repeated: int | None = 1
    within_s: float = 2.0
    protocols: tuple[str, ...] = BOTH
    network: str = ""  # needs a network of its own, in which this differs: "names" or "wire"
    idle_s: int = IDLE_S
    connect_s: int = CONNECT_S
    lifetime_s: int = LIFETIME_S
    is_undone: Callable[[Stand], Awaitable[None]] | None = None


BROKEN = frozenset({"POST 500", "GET 500", "stream 500", "stream aborted"})
NOT_SENT = frozenset({"POST 502", "GET 502", "stream 502"})
TOO_SLOW = frozenset({"POST 500", "POST 504", "GET 500", "GET 504", "stream 500", "stream 504", "stream aborted"})

FAULTS = {
    "killed": Fault(is_killed, BROKEN | NOT_SENT, NOT_SENT),
    "restarted": Fault(is_restarted, BROKEN | NOT_SENT, BROKEN),
    "stopped": Fault(is_stopped, TOO_SLOW, frozenset({"POST 500", "GET 500"})),
    # Over HTTP/1 a connection serves one call, so none has a second one to be reset at.
    "every third connection reset": Fault(does("connection resets", 120), BROKEN, BROKEN, protocols=("h2",)),
    "GOAWAY, streams go on": Fault(does("goaway"), protocols=("h2",)),
    "GOAWAY and close": Fault(does("goaway and close"), BROKEN, BROKEN, protocols=("h2",)),
    "RST_STREAM for every third": Fault(
        does("stream resets", 40), BROKEN, frozenset({"POST 500", "stream aborted"}), protocols=("h2",)
    ),
    "one stream at a time": Fault(does("one stream", 40), protocols=("h2",)),
    "a byte a second": Fault(does("trickle")),
    "response before the body": Fault(
        does("early response", 40, b"{%b}" % (b" " * 400_000)),
        # Over HTTP/1.1 the response is lost when the connection is reset before libcurl has read it.
        frozenset({"POST 413", "POST 500", "POST 502", "stream 413", "stream 500", "stream 502"}),
        frozenset({"POST 413"}),
    ),
    # The lifetime is long, so the connection ends because the proxy notices the silence, and not because of its age.
    "half-open": Fault(
        vanishes,
        BROKEN | TOO_SLOW,
        frozenset({"POST 500"}),
        # All calls on the connection hang when it is cut, and the next call may use it before it is closed.
        repeated=3,
        within_s=40 if REAL_TIME else 10,
        network="wire",
        lifetime_s=20,
        is_undone=is_near_again,
    ),
    "200 ms and 2 % loss": Fault(is_far_and_lossy, within_s=5, network="wire", idle_s=PATIENT_S, connect_s=PATIENT_S),
    "name moves, old server ends": Fault(
        moves_and_ends, BROKEN | NOT_SENT, BROKEN, None, within_s=60, network="names", is_undone=moves_back
    ),
    "name moves, old server stays": Fault(moves, repeated=None, within_s=60, network="names", is_undone=moves_back),
}
