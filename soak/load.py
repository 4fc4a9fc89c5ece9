"""Calls of all kinds at a steady rate: how each ended, and which did not end as it must."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence

from soak.calls import ABORTED, KINDS, SoakCall, UnexpectedEnd
from soak.processes import Service
from tests.support.raw_client import RawClient

__all__ = ["Load"]

# Limits the calls at once when everything hangs: far more than there are at the default rate.
MAX_AT_ONCE = 400
# Limits one call: longer than any right call takes on a busy machine.
CALL_TIMEOUT_S = 40.0
# Limits the connections that wait for their next call: enough for most calls to use one again.
MAX_IDLE = 30
# The time until the lines that the service logs of a call have arrived.
LOG_DELAY_S = 0.2
# Limits the calls that are described in the report: enough to find a pattern.
MAX_DETAILS = 20


class Load:
    """The calls. ``ended`` counts them by kind and end, and ``bad`` counts those that did not end as they must.

    ``details`` describes the first of the bad ones. ``trouble`` has pairs of times, of time.monotonic(), between which
    any call may fail. No call may ever get a wrong response.
    """

    def __init__(self, service: Service, seed: int, trouble: Sequence[tuple[float, float]]) -> None:
        self.ended: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self.bad = 0
        self.details: list[str] = []
        self.to_repeat: set[int] = set()
        self.made = 0
        self.max_at_once = 0
        self._service, self._seed, self._trouble = service, seed, trouble
        self._idle: list[RawClient] = []
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, rate: float, seconds: float, stop: asyncio.Event) -> None:
        """Make ``rate`` calls a second, and return when the last has ended."""
        dice = random.Random(self._seed)
        kinds, weights = list(KINDS), [weight for _, weight in KINDS.values()]
        self._began = due = time.monotonic()
        end = due + seconds
        while due < end and not stop.is_set():
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due = max(due, time.monotonic() - 1) + dice.expovariate(rate)  # after a pause not all at once
            if len(self._running) >= MAX_AT_ONCE:
                continue
            self.made += 1
            call = SoakCall(
                self.made, self._service.port, random.Random(f"{self._seed}/{self.made}"), self._idle, self.to_repeat
            )
            task = asyncio.create_task(self._make(dice.choices(kinds, weights)[0], call))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            self.max_at_once = max(self.max_at_once, len(self._running))
        while self._running:
            await asyncio.wait(self._running)
        for client in self._idle:
            client.leave()

    async def _make(self, kind: str, call: SoakCall) -> None:
        began = time.monotonic()
        problem = ""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                end = await KINDS[kind][0](call)
        except (UnexpectedEnd, TimeoutError, *ABORTED) as exc:
            end = "in trouble"
            if not any(began <= until and since <= time.monotonic() for since, until in self._trouble):
                problem = repr(exc)
        except Exception as exc:  # noqa: BLE001  (the response could not be understood)
            problem = repr(exc)
        finally:
            call.close()
        if problem:
            end = "bad"
            self.bad += 1
            if len(self.details) < MAX_DETAILS:
                await asyncio.sleep(LOG_DELAY_S)
                log = "; ".join(self._service.log_lines_with(rf"/{call.number}\d/"))
                self.details.append(f"call {call.number}, {kind}, {began - self._began:.0f} s: {problem} ({log})")
        self.ended[kind][end] += 1
        while len(self._idle) > MAX_IDLE:
            self._idle.pop(0).leave()
