"""200 callers of every kind at once, and which of their calls failed.

A third sends short calls, a third long polls of 2 s (POSTs and GETs in turn), a third reads event streams. Each keeps
its connection for the next call, as long as the proxy does, and checks every answer.
"""

import asyncio
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from tests.support.raw_client import RawClient
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import JSON
from tests.support.waiting import TIMEOUT_S

__all__ = ["ROUNDS", "Failure", "Load", "respond"]

# How often a test under load does what it does.
ROUNDS = int(os.environ.get("TORNADO_FAL_PROXY_ROUNDS", "2"))
CALLERS = 200
POLL_S = 2.0
EVENTS, EVENT_S = 8, 0.15
# Between two short calls of a caller, so that all of them take but a part of a small machine.
LEAST_PAUSE_S, MOST_PAUSE_S = 0.2, 0.6

EVENT = b'data: {"n": %d}\n\n'


async def respond(exchange: Exchange) -> None:
    """What fal does in the tests that use a load."""
    body = await exchange.body()
    if exchange.target.endswith(b"/stream"):
        await exchange.start(200, [("content-type", "text/event-stream")])
        for number in range(EVENTS):
            await exchange.send(EVENT % number)
            await asyncio.sleep(EVENT_S)
        await exchange.end()
        return
    if exchange.target.endswith(b"/poll"):
        await asyncio.sleep(POLL_S)
    await exchange.respond(200, b"[%b]" % body, JSON)


@dataclass(frozen=True)
class Failure:
    """A call that was not answered rightly, and the port of the caller's connection."""

    port: int
    kind: str
    what: str


class Load:
    """The callers. Leave the context to let each finish its call and stop."""

    def __init__(self, call_of: Callable[[int], Any]) -> None:
        self.failures: list[Failure] = []
        self.done = 0
        self._call_of = call_of  # makes a new connection
        self._stopped = False

    async def __aenter__(self) -> Self:
        kinds = (self._short, self._poll, self._stream)
        self._tasks = [asyncio.create_task(self._life(number, kinds[number % 3])) for number in range(CALLERS)]
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)

    async def more(self, count: int) -> None:
        """Until so many more calls have been answered."""
        wanted = self.done + count
        async with asyncio.timeout(TIMEOUT_S):
            while self.done < wanted:
                await asyncio.sleep(0.01)

    async def _life(self, number: int, call: Callable[[RawClient, int], Any]) -> None:
        caller: RawClient | None = None
        port = turn = 0
        while not self._stopped:
            turn += 1
            if caller is not None and caller.reader.at_eof():  # closed between two calls, as may always be
                await caller.close()
                caller = None
            try:
                if caller is None:
                    caller = await self._call_of(number)
                    port = caller.writer.get_extra_info("sockname")[1]
                keep = await call(caller, number * 1_000_000 + turn)
            except (OSError, EOFError, AssertionError, asyncio.LimitOverrunError, ValueError) as exc:
                self.failures.append(Failure(port, call.__name__, repr(exc)[:300]))
                keep = False
                await asyncio.sleep(0.05)
            self.done += 1
            if not keep and caller is not None:
                caller.leave()
                caller = None
            if call == self._short:
                await asyncio.sleep(random.uniform(LEAST_PAUSE_S, MOST_PAUSE_S))
        if caller is not None:
            await caller.close()

    async def _short(self, caller: RawClient, number: int, target: str = "https://fal.run/short") -> bool:
        await caller.send(body=b"%d" % number, target=target)
        got = await caller.response()
        assert (got.status, got.body) == (200, b"[%d]" % number), got
        return got.header("connection") != "close"

    async def _poll(self, caller: RawClient, number: int) -> bool:
        if number % 2:
            return await self._short(caller, number, "https://fal.run/poll")
        await caller.send("GET", target="https://queue.fal.run/poll")
        got = await caller.response()
        assert (got.status, got.body) == (200, b"[]"), got
        return got.header("connection") != "close"

    async def _stream(self, caller: RawClient, number: int) -> bool:
        await caller.send(body=b"%d" % number, target="https://fal.run/stream")
        got = await caller.response()
        assert (got.status, got.body) == (200, b"".join(EVENT % n for n in range(EVENTS))), got
        return got.header("connection") != "close"
