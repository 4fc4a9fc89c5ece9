"""Run 200 clients of every kind at once, and collect which of their calls failed.

A third sends short calls, a third long polls of 2 s (POSTs and GETs in turn), a third reads event streams. Each client
checks every response, and keeps its connection for the next call as long as the proxy keeps it.
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

# Limits how often a test under load repeats its action: each time takes seconds.
ROUNDS = int(os.environ.get("TORNADO_FAL_PROXY_ROUNDS", "2"))
CLIENTS = 200
POLL_S = 2.0
EVENTS, EVENT_S = 8, 0.15
# The pause between two short calls of a client: all clients together leave a small machine time for the proxy.
MIN_PAUSE_S, MAX_PAUSE_S = 0.2, 0.6

EVENT = b'data: {"n": %d}\n\n'


async def respond(exchange: Exchange) -> None:
    """Respond as fal does in the tests that use a load."""
    body = await exchange.body()
    if exchange.target.endswith(b"/stream"):
        await exchange.start(200, [("content-type", "text/event-stream")])
        for number in range(EVENTS):
            await exchange.send(EVENT % number)
            await asyncio.sleep(EVENT_S)
        await exchange.end()
        return
    if exchange.target.startswith(b"/poll"):
        await asyncio.sleep(POLL_S)
    await exchange.respond(200, b"[%b]" % body, JSON)


@dataclass(frozen=True)
class Failure:
    """A call whose response was wrong or missing, and the port of the client's connection."""

    port: int
    number: int
    kind: str
    what: str


class Load:
    """The clients. At the end of the context each of them finishes its call and stops."""

    def __init__(self, call_of: Callable[[int], Any], *, kept_may_close: bool = False) -> None:
        """Make connections with ``call_of``.

        ``kept_may_close``: a server in front closes kept connections, as a reloading nginx does, and may do so at the
        moment in which a request arrives. A call that gets no byte on one is no failure, because browsers send it once
        more. It is listed in ``unread``, and must not have reached fal.
        """
        self.failures: list[Failure] = []
        self.unread: list[Failure] = []
        self._kept_may_close = kept_may_close
        self.done = 0
        self._call_of = call_of  # makes a new connection
        self._stopped = False

    async def __aenter__(self) -> Self:
        kinds = (self._short, self._poll, self._stream)
        self._tasks = [asyncio.create_task(self._life(number, kinds[number % 3])) for number in range(CLIENTS)]
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)

    async def more(self, count: int) -> None:
        """Wait until so many more calls have ended."""
        wanted = self.done + count
        async with asyncio.timeout(TIMEOUT_S):
            while self.done < wanted:
                await asyncio.sleep(0.01)

    async def _life(self, number: int, call: Callable[[RawClient, int], Any]) -> None:
        client: RawClient | None = None
        port = turn = responses = 0
        while not self._stopped:
            turn += 1
            if client is not None and client.reader.at_eof():  # closed between two calls, as may always be
                await client.close()
                client = None
            call_number = number * 1_000_000 + turn
            try:
                if client is None:
                    client = await self._call_of(number)
                    port, responses = client.writer.get_extra_info("sockname")[1], 0
                keep = await call(client, call_number)
                responses += 1
            except (OSError, EOFError, AssertionError, asyncio.LimitOverrunError, ValueError) as exc:
                ended = isinstance(exc, ConnectionError) or (
                    isinstance(exc, asyncio.IncompleteReadError) and not exc.partial
                )
                unread = responses > 0 and ended and client is not None and not client.began
                failures = self.unread if self._kept_may_close and unread else self.failures
                failures.append(Failure(port, call_number, call.__name__, repr(exc)[:300]))
                keep = False
                await asyncio.sleep(0.05)
            self.done += 1
            if not keep and client is not None:
                client.leave()
                client = None
            if call == self._short:
                await asyncio.sleep(random.uniform(MIN_PAUSE_S, MAX_PAUSE_S))
        if client is not None:
            await client.close()

    async def _short(self, client: RawClient, number: int, target: str = "https://fal.run/short") -> bool:
        await client.send(body=b"%d" % number, target=target)
        got = await client.response()
        assert (got.status, got.body) == (200, b"[%d]" % number), got
        return got.header("connection") != "close"

    async def _poll(self, client: RawClient, number: int) -> bool:
        if number % 2:
            return await self._short(client, number, "https://fal.run/poll")
        await client.send("GET", target=f"https://queue.fal.run/poll?{number}")
        got = await client.response()
        assert (got.status, got.body) == (200, b"[]"), got
        return got.header("connection") != "close"

    async def _stream(self, client: RawClient, number: int) -> bool:
        await client.send(body=b"%d" % number, target="https://fal.run/stream")
        got = await client.response()
        assert (got.status, got.body) == (200, b"".join(EVENT % n for n in range(EVENTS))), got
        return got.header("connection") != "close"
