"""Run thirty clients, and record all calls that they make."""

import asyncio
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.programs.faulty_upstream import EVENT, EVENTS
from tests.support.raw_client import RawClient
from tests.support.waiting import TIMEOUT_S

__all__ = ["IDLE_S", "KINDS", "PATIENT_S", "REAL_TIME", "Load", "LoadCall", "is_right", "recovery", "repeated"]

REAL_TIME = bool(os.environ.get("TORNADO_FAL_PROXY_REAL_TIME"))
# Limits the time without a byte, after which the service ends a call.
IDLE_S = 40 if REAL_TIME else 3
# Limits the same where packets get lost: the same packet may be lost three times.
PATIENT_S = 30
# Clients of each kind, and the pause of clients with short calls between two of these.
KINDS = {"short POST": 8, "short GET": 6, "poll POST": 4, "poll GET": 4, "stream": 6}
MIN_PAUSE_S, MAX_PAUSE_S = 0.1, 0.3


@dataclass(frozen=True)
class LoadCall:
    """A call of the load: its client, its ``result``, the server that responded (``by``), and its times."""

    client: int
    kind: str
    number: int
    result: str
    by: str
    began: float
    ended: float

    @property
    def seen(self) -> str:
        """Return the name under which the call is counted: ``POST 500``, ``GET 502``, ``stream aborted``."""
        return f"{self.kind.split()[-1]} {self.result}"


class Load:
    """The clients, and all calls that they have made."""

    def __init__(self, port: int) -> None:
        self.calls: list[LoadCall] = []
        self.body = b"{}"
        self._port = port
        self._stopped = False
        self._numbers = iter(range(time.monotonic_ns() // 1000, sys.maxsize))
        kinds = [kind for kind, clients in KINDS.items() for _ in range(clients)]
        self._tasks = [asyncio.create_task(self._life(number, kind)) for number, kind in enumerate(kinds)]

    async def until(self, condition: Callable[[], Any], seconds: float = TIMEOUT_S) -> None:
        """Wait until ``condition()`` is true."""
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.02)

    async def more(self, count: int) -> None:
        """Wait until so many more calls have ended."""
        wanted = len(self.calls) + count
        await self.until(lambda: len(self.calls) >= wanted)

    async def each_kind(self, since: float, by: str, seconds: float) -> None:
        """Wait until clients of each kind have had a right response from that server, to a call begun since then."""
        await self.until(
            lambda: {call.kind for call in self.calls if call.began >= since and is_right(call, by)} == set(KINDS),
            seconds,
        )

    async def goes_wrong(self) -> None:
        """Wait until a call of each kind has failed."""
        await self.until(
            lambda: {call.kind for call in self.calls if call.result != "200"} == set(KINDS), IDLE_S + TIMEOUT_S
        )

    async def stop(self) -> None:
        """Let each client finish its call and stop."""
        self._stopped = True
        await asyncio.gather(*self._tasks)

    def cancel(self) -> None:
        """Stop all clients at once."""
        for task in self._tasks:
            task.cancel()

    async def _life(self, client_number: int, kind: str) -> None:
        client: RawClient | None = None
        while not self._stopped:
            if client is not None and client.reader.at_eof():  # closed between two calls, as may always be
                await client.close()
                client = None
            if client is None:
                client = await RawClient.open(self._port)
            number, began = next(self._numbers), time.monotonic()
            result, by, keep = await self._call(client, kind, number)
            self.calls.append(LoadCall(client_number, kind, number, result, by, began, time.monotonic()))
            if not keep:
                client.leave()
                client = None
            if kind.startswith("short") or result != "200":
                await asyncio.sleep(random.uniform(MIN_PAUSE_S, MAX_PAUSE_S))
        if client is not None:
            await client.close()

    async def _call(self, client: RawClient, kind: str, number: int) -> tuple[str, str, bool]:
        path = kind.split()[0]
        try:
            async with asyncio.timeout(IDLE_S + PATIENT_S + TIMEOUT_S):
                await client.send(
                    "GET" if kind.endswith("GET") else "POST", self.body, target=f"https://fal.run/{path}?id={number}"
                )
                response = await client.head()
        except TimeoutError:
            return "without end", "", False
        except (OSError, EOFError) as exc:
            return f"no response ({exc!r})", "", False
        by = response.header("x-served-by") or ""
        try:
            async with asyncio.timeout(IDLE_S + PATIENT_S + TIMEOUT_S):
                await client.rest(response)
        except TimeoutError:
            return "without end", by, False
        except (OSError, EOFError, ValueError):
            return "aborted", by, False
        right = b"".join(EVENT % n for n in range(EVENTS)) if path == "stream" else b"[%d]" % number
        if response.status == 200 and response.body != right:
            return f"wrong ({response.body!r})", by, False
        return str(response.status), by, response.header("connection") != "close"


def is_right(call: LoadCall, by: str) -> bool:
    """Tell whether that server gave the call the right response."""
    return call.result == "200" and call.by == by


def repeated(calls: list[LoadCall], since: float, wanted: str) -> int:
    """Return the largest number of failed calls of one client among those that began after ``since``."""
    wrong = Counter(call.client for call in calls if call.began >= since and not is_right(call, wanted))
    return max(wrong.values(), default=0)


def recovery(calls: list[LoadCall], since: float, wanted: str) -> float:
    """Return the seconds from ``since`` to the end of the last call that failed.

    If a kind of short calls had its first right response later, that moment counts.
    """
    later = [call for call in calls if call.began >= since]
    wrong = [call.ended for call in later if not is_right(call, wanted)]
    short = [kind for kind in KINDS if kind.startswith("short")]
    first = [min(call.ended for call in later if call.kind == kind and is_right(call, wanted)) for kind in short]
    return round(max(wrong + first) - since, 2)
