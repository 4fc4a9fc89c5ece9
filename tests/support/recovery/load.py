"""Thirty clients, and all calls that they have made."""

import asyncio
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.programs.faulty_upstream import EVENT, EVENTS
from tests.support.raw_client import RawClient
from tests.support.waiting import TIMEOUT_S

__all__ = ["IDLE_S", "KINDS", "PATIENT_S", "REAL_TIME", "Call", "Load", "is_right", "recovery"]

REAL_TIME = bool(os.environ.get("TORNADO_FAL_PROXY_REAL_TIME"))
# Seconds without a byte, after which a call is ended.
IDLE_S = 40 if REAL_TIME else 3
# Where packets get lost the same one may be lost three times.
PATIENT_S = 30
# Callers of each kind, and how long those with short calls wait between two.
KINDS = {"short POST": 8, "short GET": 6, "poll POST": 4, "poll GET": 4, "stream": 6}
LEAST_PAUSE_S, MOST_PAUSE_S = 0.1, 0.3


@dataclass(frozen=True)
class Call:
    """A call of the load: what became of it, the server that answered it, and when."""

    kind: str
    number: int
    what: str
    by: str
    began: float
    ended: float

    @property
    def seen(self) -> str:
        """As it is counted: ``POST 500``, ``GET 502``, ``stream cut``."""
        return f"{self.kind.split()[-1]} {self.what}"


class Load:
    """The callers, and all calls that they have made. Stop it to let each finish its call."""

    def __init__(self, port: int) -> None:
        self.calls: list[Call] = []
        self.body = b"{}"
        self._port = port
        self._stopped = False
        self._numbers = iter(range(time.monotonic_ns() // 1000, sys.maxsize))
        self._tasks = [asyncio.create_task(self._life(kind)) for kind, callers in KINDS.items() for _ in range(callers)]

    async def until(self, holds: Callable[[], Any], seconds: float = TIMEOUT_S) -> None:
        async with asyncio.timeout(seconds):
            while not holds():
                await asyncio.sleep(0.02)

    async def more(self, count: int) -> None:
        """Until so many more calls have ended."""
        wanted = len(self.calls) + count
        await self.until(lambda: len(self.calls) >= wanted)

    async def each_kind(self, since: float, by: str, seconds: float) -> None:
        """Until callers of each kind have had a right answer from that server, to a call made since then."""
        await self.until(
            lambda: {call.kind for call in self.calls if call.began >= since and is_right(call, by)} == set(KINDS),
            seconds,
        )

    async def goes_wrong(self) -> None:
        """Until callers of each kind have felt the fault."""
        await self.until(
            lambda: {call.kind for call in self.calls if call.what != "200"} == set(KINDS), IDLE_S + TIMEOUT_S
        )

    async def stop(self) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _life(self, kind: str) -> None:
        caller: RawClient | None = None
        while not self._stopped:
            if caller is not None and caller.reader.at_eof():  # closed between two calls, as may always be
                await caller.close()
                caller = None
            if caller is None:
                caller = await RawClient.open(self._port)
            number, began = next(self._numbers), time.monotonic()
            what, by, keep = await self._call(caller, kind, number)
            self.calls.append(Call(kind, number, what, by, began, time.monotonic()))
            if not keep:
                caller.leave()
                caller = None
            if kind.startswith("short") or what != "200":
                await asyncio.sleep(random.uniform(LEAST_PAUSE_S, MOST_PAUSE_S))
        if caller is not None:
            await caller.close()

    async def _call(self, caller: RawClient, kind: str, number: int) -> tuple[str, str, bool]:
        path = kind.split()[0]
        try:
            async with asyncio.timeout(IDLE_S + PATIENT_S + TIMEOUT_S):
                await caller.send(
                    "GET" if kind.endswith("GET") else "POST", self.body, target=f"https://fal.run/{path}?id={number}"
                )
                answer = await caller.head()
        except TimeoutError:
            return "without end", "", False
        except (OSError, EOFError) as exc:
            return f"without answer ({exc!r})", "", False
        by = answer.header("x-served-by") or ""
        try:
            async with asyncio.timeout(IDLE_S + PATIENT_S + TIMEOUT_S):
                await caller.rest(answer)
        except TimeoutError:
            return "without end", by, False
        except (OSError, EOFError, ValueError):
            return "cut", by, False
        right = b"".join(EVENT % n for n in range(EVENTS)) if path == "stream" else b"[%d]" % number
        if answer.status == 200 and answer.body != right:
            return f"wrong ({answer.body!r})", by, False
        return str(answer.status), by, answer.header("connection") != "close"


def is_right(call: Call, by: str) -> bool:
    return call.what == "200" and call.by == by


def recovery(calls: list[Call], since: float, wanted: str) -> float:
    """How long after that time the last call ended that went wrong, or the first right one of the slowest kind."""
    later = [call for call in calls if call.began >= since]
    wrong = [call.ended for call in later if not is_right(call, wanted)]
    short = [kind for kind in KINDS if kind.startswith("short")]
    first = [min(call.ended for call in later if call.kind == kind and is_right(call, wanted)) for kind in short]
    return round(max(wrong + first) - since, 2)
