"""Calls of all kinds at a steady rate: how each ended, and which did not end as they must."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence

from soak.calls import BROKEN, KINDS, Call, Unwanted
from soak.processes import Service
from tests.support.raw_client import RawClient

__all__ = ["Load"]

# Far more than there are at the default rate. When everything hangs, no more are made.
MOST_AT_ONCE = 400
# Longer than any right call takes on a machine that is busy.
CALL_TIMEOUT_S = 40.0
MOST_IDLE = 30
# Until what the service logs of a call has come.
LOG_S = 0.2
MOST_NOTED = 20


class Load:
    """The calls. ``ended`` counts them by kind and end, ``bad`` those that did not end as they must; ``noted`` tells of
    the first of these.

    ``trouble`` are the times, of time.monotonic(), between which any call may fail. None may ever be answered wrongly.
    """

    def __init__(self, service: Service, seed: int, trouble: Sequence[tuple[float, float]]) -> None:
        self.ended: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self.bad = 0
        self.noted: list[str] = []
        self.to_repeat: set[int] = set()
        self.made = 0
        self.most_at_once = 0
        self._service, self._seed, self._trouble = service, seed, trouble
        self._idle: list[RawClient] = []
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, rate: float, seconds: float, stop: asyncio.Event) -> None:
        """Make ``rate`` calls a second, and return when the last has ended."""
        dice = random.Random(self._seed)
        kinds, often = list(KINDS), [often for _, often in KINDS.values()]
        self._began = due = time.monotonic()
        end = due + seconds
        while due < end and not stop.is_set():
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due = max(due, time.monotonic() - 1) + dice.expovariate(rate)  # after a halt not all at once
            if len(self._running) >= MOST_AT_ONCE:
                continue
            self.made += 1
            call = Call(
                self.made, self._service.port, random.Random(f"{self._seed}/{self.made}"), self._idle, self.to_repeat
            )
            task = asyncio.create_task(self._make(dice.choices(kinds, often)[0], call))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            self.most_at_once = max(self.most_at_once, len(self._running))
        while self._running:
            await asyncio.wait(self._running)
        for caller in self._idle:
            caller.leave()

    async def _make(self, kind: str, call: Call) -> None:
        began = time.monotonic()
        problem = ""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                end = await KINDS[kind][0](call)
        except (Unwanted, TimeoutError, *BROKEN) as exc:
            end = "in trouble"
            if not any(began <= until and since <= time.monotonic() for since, until in self._trouble):
                problem = repr(exc)
        except Exception as exc:  # noqa: BLE001  (whatever the answer was, it could not be understood)
            problem = repr(exc)
        finally:
            call.leave()
        if problem:
            end = "bad"
            self.bad += 1
            if len(self.noted) < MOST_NOTED:
                await asyncio.sleep(LOG_S)
                log = "; ".join(self._service.said(rf"/{call.number}\d/"))
                self.noted.append(f"call {call.number}, {kind}, {began - self._began:.0f} s: {problem} ({log})")
        self.ended[kind][end] += 1
        while len(self._idle) > MOST_IDLE:
            self._idle.pop(0).leave()
