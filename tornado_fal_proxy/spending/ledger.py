"""Stand between paid calls and the store: open it, keep what is asked of it in order, log its failures.

Strategy. A reservation is awaited, because a call must not leave without it. All else happens beside the calls, and a
response waits for it only a moment. A note that makes room for other calls is written at once, and the response waits,
so a client whose job has ended finds its place free, in every process. All other notes wait for company, for some
milliseconds: they go to the store with the next reservation, in one transaction. kill -9 loses them, and the estimates
stay. A store that hangs holds up no result.

A small memory of jobs saves the store from polls: it has who submitted a job, and whether it has ended already.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import Any

from tornado_fal_proxy._tasks import EagerTask
from tornado_fal_proxy.errors import StoreUnavailable
from tornado_fal_proxy.spending.plans import SpendingRules, Terms
from tornado_fal_proxy.spending.store import RENAME, Account, Note, Standing, Store, StoreFailed

__all__ = ["OPERATIONS", "KnownJob", "Ledger"]

logger = logging.getLogger("tornado_fal_proxy")

# The operations that a store can fail to do. "read" is whose job it is.
OPERATIONS = ("reserve", "rename", "settle", "end", "give_back", "read", "usage", "prune")
# Limits the jobs that are remembered: those of some minutes, at about 300 bytes each. Others cost a look at the store.
MAX_KNOWN_JOBS = 10_000
# Limits what waits for a store that hangs. Beyond it estimates stay as they are.
MAX_PENDING = 10_000
# Limits how long a response waits until its job's end is in the store.
MAX_WAIT_S = 1.0
# Limits how long a note that makes no room waits for company: a reservation comes sooner where many calls are paid.
NOTE_DELAY_S = 0.02
# Limits how long a shutdown waits for the store.
CLOSE_TIMEOUT_S = 5.0
# The time between two lines about a store that fails, and between two clean-ups of it.
LOG_INTERVAL_S, PRUNE_INTERVAL_S = 60.0, 6 * 3600.0


def _nothing() -> None:
    """Undo nothing."""


class KnownJob:
    """Remember a queued job: user, endpoint and bill where they are known, and what the store knows of its end."""

    __slots__ = ("cost", "ended", "endpoint", "settled", "user")

    def __init__(self, user: str | None = None, endpoint: str | None = None) -> None:
        self.user, self.endpoint = user, endpoint
        self.cost: int | None = None
        self.ended = self.settled = False


class Ledger:
    """Use one store on one loop. Its methods do not raise unless they say so.

    ``failures`` has how often each of OPERATIONS failed, and may be shared with other ledgers. The metrics take the
    numbers, and clear it.
    """

    def __init__(
        self,
        rules: SpendingRules,
        store: Store,
        now: Callable[[], float] = time.time,
        failures: Counter[str] | None = None,
    ) -> None:
        self.rules = rules
        self.now = now
        #: The paid calls that are not over yet. A shutdown waits for them.
        self.unfinished = 0
        self.failures: Counter[str] = Counter() if failures is None else failures
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._opened = self._closed = False
        self._opening = asyncio.Lock()
        self._pending: set[asyncio.Task[None]] = set()
        self._notes: list[Note] = []  # that wait for company
        self._writing: asyncio.TimerHandle | None = None
        self._written = 0  # notes that the store has, and has not reported yet
        self._waiters: deque[tuple[float, asyncio.Future[None]]] = deque()
        self._releasing: asyncio.TimerHandle | None = None
        self._known: OrderedDict[str, KnownJob] = OrderedDict()
        self._logged_at = self._prune_at = float("-inf")
        self._closing: asyncio.Task[None] | None = None

    # Awaited by calls.

    async def reserve(self, terms: Terms) -> Standing | None:
        """Return what the store says to a reservation; None where it fails and calls pass all the same.

        Raise StoreUnavailable where it fails and they do not.
        """
        try:
            if not self._opened or self._closed or time.monotonic() > self._prune_at:
                await self._open()
            if self._notes:
                self._write()  # the store does them together
            return await self._store.reserve(terms.reservation)
        except StoreFailed as exc:
            self.failures["reserve"] += 1
            if self.rules.refuses_on_failure:
                self._log(exc, "paid calls are answered 503")
                raise StoreUnavailable(f"store: {exc}") from None
            self._log(exc, "paid calls pass uncounted, because on_store_failure is allow")
            return None

    async def may_read(self, job_id: str, user: str) -> bool:
        """Return whether a queued job is one of this user's. Raise StoreUnavailable."""
        known = self.known(job_id)
        if known.user is None:
            try:
                await self._open()
                known.user = await self._store.owner(job_id)
            except StoreFailed as exc:
                self.failures["read"] += 1
                if self.rules.refuses_on_failure:
                    self._log(exc, "calls for jobs are answered 503")
                    raise StoreUnavailable(f"store: {exc}") from None
                self._log(exc, "anyone may read a job, because on_store_failure is allow")
                return True
        return known.user == user

    async def usage(self, *period: Any) -> Account:
        """Return what the store's usage() does. Raise StoreFailed."""
        try:
            await self._open()
            if self._notes:
                self._write()
            return await self._store.usage(*period)
        except StoreFailed:
            self.failures["usage"] += 1
            raise

    # Beside the calls.

    def note(self, note: Note) -> None:
        """Note what makes no room for other calls: at the next reservation, or after NOTE_DELAY_S."""
        if self._accepts(note):
            self._notes.append(note)
            if self._writing is None:
                self._writing = self._loop.call_later(NOTE_DELAY_S, self._write_late)

    def note_now(self, note: Note) -> asyncio.Future[None]:
        """Note what makes room for other calls, at once. Return a future that is done then, or after MAX_WAIT_S."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        if not self._accepts(note):
            waiter.set_result(None)
            return waiter
        self._notes.append(note)
        self._waiters.append((self._loop.time() + MAX_WAIT_S, waiter))
        if self._releasing is None:
            self._releasing = self._loop.call_later(MAX_WAIT_S, self._release)
        self._write(waiter)
        return waiter

    def submitted(self, id: str, job_id: str, user: str, endpoint: str) -> asyncio.Future[None]:
        """Note the id that fal has given a queued job, at once, because its polls may come to any process."""
        known = self.known(job_id)
        known.user, known.endpoint = user, endpoint
        return self.note_now(Note(RENAME, id, new_id=job_id))

    def _accepts(self, note: Note) -> bool:
        accepts = not self._closed and len(self._notes) + self._written < MAX_PENDING
        if not accepts:
            self.failures[note.kind] += 1
            self._log(StoreFailed("too much waits for it, or it is closed"), "an estimate is kept")
        return accepts

    def _write(self, waiter: asyncio.Future[None] | None = None) -> None:
        """Let the store do all notes that wait, and then end the wait for them."""
        notes, self._notes = self._notes, []
        self._written += len(notes)

        def done(failure: StoreFailed | None) -> None:
            self._written -= len(notes)
            if failure is not None:
                self.failures.update(note.kind for note in notes)
                self._log(failure, "an estimate is kept")
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

        self._store.note(notes, done)

    def _write_late(self) -> None:
        """Write what no reservation has taken along. A timer that comes early is cheaper than one for each note."""
        self._writing = None
        if self._notes:
            self._write()

    def _release(self) -> None:
        """End the waits that have taken too long. One timer does for all, because a timer for each costs more."""
        waiters, now = self._waiters, self._loop.time()
        while waiters and (waiters[0][1].done() or waiters[0][0] <= now):
            waiter = waiters.popleft()[1]
            if not waiter.done():
                waiter.set_result(None)
        self._releasing = self._loop.call_at(waiters[0][0], self._release) if waiters else None

    # Beside the calls, of queued jobs. Each returns a task, which ends even if the store fails.

    def end_job(self, job_id: str) -> asyncio.Future[None] | None:
        """Note that a queued job has ended; None where that is known."""
        known = self.known(job_id)
        if known.ended:
            return None

        def undo() -> None:
            known.ended = False

        known.ended = True
        return self._later("end", lambda: self._store.end(job_id), undo)

    def settle_job(self, job_id: str, units: int) -> asyncio.Future[None] | None:
        """Note fal's bill of a queued job; None where that is known."""
        known = self.known(job_id)
        if known.settled:
            return None

        async def settle() -> None:
            if known.endpoint is None:
                known.endpoint = await self._store.endpoint(job_id)
                known.user = await self._store.owner(job_id)
            if known.endpoint is not None:  # else the job is none of this proxy's
                price = self.rules.price(known.endpoint)
                known.cost = None if price is None else price.cost(units)
                await self._store.settle(job_id, units, known.cost)

        def undo(had_ended: bool = known.ended) -> None:
            known.ended, known.settled = had_ended, False

        known.ended = known.settled = True
        return self._later("settle", settle, undo)

    @staticmethod
    async def wait(task: asyncio.Future[None] | None) -> None:
        """Wait for one of these tasks for a moment, so that the client's next call finds it done."""
        if task is not None:
            await asyncio.wait((task,), timeout=MAX_WAIT_S)

    def known(self, job_id: str) -> KnownJob:
        """Return what is remembered of a queued job, which is remembered from now on."""
        known = self._known.get(job_id)
        if known is None:
            known = self._known[job_id] = KnownJob()
            if len(self._known) > MAX_KNOWN_JOBS:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(job_id)
        return known

    # The end.

    def close(self) -> None:
        """Begin to close: calls that are not over may still be noted, for CLOSE_TIMEOUT_S at most."""
        if self._closing is None and not self._loop.is_closed():
            self._closing = self._loop.create_task(self._close())

    @property
    def is_closed(self) -> bool:
        """Return whether nothing is left to wait for."""
        return self._closing is not None and self._closing.done()

    async def closed(self) -> None:
        """Close, and wait until it is done: for CLOSE_TIMEOUT_S, and the time that the store needs."""
        self.close()
        if self._closing is not None:
            await self._closing

    async def flush(self) -> None:
        """Wait until all that was noted is in the store, for CLOSE_TIMEOUT_S at most."""
        await self._quiet(time.monotonic() + CLOSE_TIMEOUT_S)

    async def _quiet(self, deadline: float) -> None:
        """Wait until nothing is to be noted, or until the deadline."""
        # Once in a process's life: no call pays for an event.
        while (self._notes or self._written or self._pending) and time.monotonic() < deadline:
            if self._notes:
                self._write()
            await asyncio.sleep(0.005)

    async def _close(self) -> None:
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        try:
            while self.unfinished and time.monotonic() < deadline:  # noqa: ASYNC110 likewise
                await asyncio.sleep(0.01)
            await self._quiet(deadline)
        finally:
            if self._notes:  # calls took all the time, and the last of them left these
                self._write()
            self._closed, pending = True, len(self._pending)
            for task in self._pending:
                task.cancel()
            for timer in (self._releasing, self._writing):
                if timer is not None:
                    timer.cancel()
            if self._opened:
                try:
                    await self._store.close()
                except StoreFailed as exc:
                    self._log(exc, "at the end")
            if left := self._written + pending:
                logger.warning("store: %d notes of calls are lost, because it does not respond", left)

    # Helpers.

    async def _open(self) -> None:
        """Open the store on its first use, and clean it up from time to time. Raise StoreFailed."""
        if self._closed:
            raise StoreFailed("the proxy is closing")
        if not self._opened:
            async with self._opening:
                if not self._opened:
                    self._opened = True  # also where it fails: then each operation tries to connect
                    await self._store.open()
        if (now := time.monotonic()) > self._prune_at:
            self._prune_at = now + PRUNE_INTERVAL_S
            self._later("prune", lambda: self._store.prune(int(self.now()), self.rules.account_days))

    def _later(
        self, name: str, operation: Callable[[], Awaitable[None]], undo: Callable[[], None] = _nothing
    ) -> asyncio.Future[None]:
        """Do an operation as a task. ``undo`` is called where it fails or is not begun: then the next may succeed."""
        if self._closed or len(self._pending) >= MAX_PENDING:
            self.failures[name] += 1
            self._log(StoreFailed("too much waits for it, or it is closed"), "an estimate is kept")
            undo()
            done: asyncio.Future[None] = self._loop.create_future()
            done.set_result(None)
            return done
        task = EagerTask(self._noted(name, operation, undo), loop=self._loop)
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        return task

    async def _noted(self, name: str, operation: Callable[[], Awaitable[None]], undo: Callable[[], None]) -> None:
        try:
            await self._open()
            await operation()
        except StoreFailed as exc:
            undo()
            self.failures[name] += 1
            self._log(exc, "an estimate is kept")

    def _log(self, exc: StoreFailed, consequence: str) -> None:
        """Log a failure, at most once in LOG_INTERVAL_S."""
        if (now := time.monotonic()) - self._logged_at >= LOG_INTERVAL_S:
            self._logged_at = now
            logger.warning("store failed: %s; %s", exc, consequence)
