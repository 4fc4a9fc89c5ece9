"""The faults: what happens, what clients may see of it, and how soon it is over."""

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
# For so long at most a connection takes new calls, where a fault does not say otherwise.
LIFETIME_S = 1
HASTE = """
import tornado_fal_proxy.upstream as upstream
upstream.CONNECTION_LIFETIME_S, upstream.ADDRESS_LIFETIME_S = %d, 1
"""
# Enough for a slow machine to greet all callers at once, which is how they come back from some faults.
CONNECT_S = 5
# How long a server misbehaves, at least.
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
    """The server misbehaves in that way for a while, and until so many calls have ended."""

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
    stand.wire.cut()


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
    """``bad`` is what callers may see of it, ``felt`` that of which they do see some; all else is answered rightly.

    ``within_s`` is how soon it is over. Then ``is_undone`` makes things as they were, where that is needed.
    """

    happens: Callable[[Stand], Awaitable[None]]
    bad: frozenset[str] = frozenset()
    felt: frozenset[str] = frozenset()
    within_s: float = 2.0
    protocols: tuple[str, ...] = BOTH
    network: str = ""  # of its own, and what must be there: "names" or "wire"
    idle_s: int = IDLE_S
    connect_s: int = CONNECT_S
    lifetime_s: int = LIFETIME_S
    is_undone: Callable[[Stand], Awaitable[None]] | None = None


BROKEN = frozenset({"POST 500", "GET 502", "stream 500", "stream cut"})
NOT_SENT = frozenset({"POST 502", "stream 502"})
TOO_SLOW = frozenset({"POST 500", "POST 504", "GET 504", "stream 500", "stream 504", "stream cut"})

FAULTS = {
    "killed": Fault(is_killed, BROKEN | NOT_SENT, NOT_SENT),
    "restarted": Fault(is_restarted, BROKEN | NOT_SENT, BROKEN),
    "stopped": Fault(is_stopped, TOO_SLOW, frozenset({"POST 500", "GET 504"})),
    "every third connection reset": Fault(does("connection resets", 120), BROKEN, BROKEN),
    "GOAWAY, streams go on": Fault(does("goaway"), protocols=("h2",)),
    "GOAWAY and close": Fault(does("goaway and close"), BROKEN, BROKEN, protocols=("h2",)),
    "RST_STREAM for every third": Fault(
        does("stream resets", 40), BROKEN, frozenset({"POST 500", "stream cut"}), protocols=("h2",)
    ),
    "one stream at a time": Fault(does("one stream", 40), protocols=("h2",)),
    "a byte a second": Fault(does("trickle")),
    "answer before the body": Fault(
        does("early answer", 40, b"{%b}" % (b" " * 400_000)),
        # Over HTTP/1.1 the answer is lost when the connection is reset before libcurl has read it.
        frozenset({"POST 413", "POST 500", "POST 502", "stream 413", "stream 500", "stream 502"}),
        frozenset({"POST 413"}),
    ),
    # The connection would take calls for far longer than it may, were it not ended.
    "half-open": Fault(
        vanishes,
        BROKEN | TOO_SLOW,
        frozenset({"POST 500"}),
        40 if REAL_TIME else 10,
        network="wire",
        lifetime_s=20,
        is_undone=is_near_again,
    ),
    "200 ms and 2 % loss": Fault(is_far_and_lossy, within_s=5, network="wire", idle_s=PATIENT_S, connect_s=PATIENT_S),
    "name moves, old server ends": Fault(
        moves_and_ends, BROKEN | NOT_SENT, BROKEN, 60, network="names", is_undone=moves_back
    ),
    "name moves, old server stays": Fault(moves, within_s=60, network="names", is_undone=moves_back),
}
