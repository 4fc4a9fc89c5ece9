"""A store in a dictionary that a test can look into, and that fails or hangs as a test asks."""

import asyncio
from collections import Counter as Counts
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tornado_fal_proxy.spending.store import (
    DIMENSIONS,
    RENAME,
    SETTLE,
    Account,
    Note,
    Reservation,
    Standing,
    StoreFailed,
    Usage,
    first_without_room,
)

__all__ = ["FakeStore", "Kept"]


@dataclass
class Kept:
    """A job in the store."""

    job: Reservation
    cost: int
    units: int
    settled: bool = False
    ended: bool = False


class FakeStore:
    """A store. ``done`` has the names of all operations, ``failing`` the text with which they fail from now on."""

    def __init__(self) -> None:
        self.used: Counts[str] = Counts()
        self.jobs: dict[str, Kept] = {}
        self.refused = 0
        self.done: list[str] = []
        self.failing = ""
        self.gate: asyncio.Event | None = None
        self.is_open = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def _do(self, name: str) -> None:
        self.done.append(name)
        await asyncio.sleep(0)
        if self.gate is not None and name != "open":
            await self.gate.wait()
        if self.failing:
            raise StoreFailed(self.failing)

    async def open(self) -> None:
        await self._do("open")
        self.is_open = True

    async def close(self) -> None:
        if self.gate is None:
            await asyncio.gather(*self._tasks)  # as the stores do what waits
        self.is_open = False

    async def reserve(self, job: Reservation) -> Standing:
        for task in [*self._tasks]:
            await task  # what was asked before
        await self._do("reserve")
        counters = [*((each, job.jobs) for each in job.job_counters), *((each, job.cost) for each in job.cost_counters)]
        unfinished = self.unfinished(job.user)
        refused_by = first_without_room(job, [self.used[each.key] for each, _ in counters], unfinished)
        if refused_by is not None:
            self.refused += 1
            return Standing([self.used[each.key] for each, _ in counters], unfinished, refused_by)
        for each, add in counters:
            self.used[each.key] += add
        self.jobs[job.id] = Kept(job, job.cost, job.units)
        return Standing([self.used[each.key] for each, _ in counters], unfinished + 1, None)

    async def rename(self, job_id: str, new_id: str) -> None:
        await self._do("rename")
        if job_id in self.jobs and new_id not in self.jobs:
            self.jobs[new_id] = self.jobs.pop(job_id)

    async def settle(self, job_id: str, units: int, cost: int | None) -> None:
        await self._do("settle")
        kept = self.jobs.get(job_id)
        if kept is not None and not kept.settled:
            cost = kept.cost if cost is None else cost
            for counter in kept.job.cost_counters:
                self.used[counter.key] += cost - kept.cost
            kept.cost, kept.units, kept.settled, kept.ended = cost, units, True, True

    async def end(self, job_id: str) -> None:
        await self._do("end")
        if job_id in self.jobs:
            self.jobs[job_id].ended = True

    async def give_back(self, job_id: str) -> None:
        await self._do("give_back")
        kept = self.jobs.get(job_id)
        if kept is not None and not kept.settled:
            del self.jobs[job_id]
            for counter in kept.job.job_counters:
                self.used[counter.key] -= kept.job.jobs
            for counter in kept.job.cost_counters:
                self.used[counter.key] -= kept.cost

    def note(self, notes: Sequence[Note], done: Callable[[StoreFailed | None], None]) -> None:
        async def note_all() -> None:
            failure = None
            for note in notes:
                arguments: dict[str, tuple[Any, ...]] = {SETTLE: (note.units, note.cost), RENAME: (note.new_id,)}
                try:
                    await getattr(self, note.kind)(note.job_id, *arguments.get(note.kind, ()))
                except StoreFailed as exc:
                    failure = exc
            done(failure)

        task = asyncio.ensure_future(note_all())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def owner(self, job_id: str) -> str | None:
        await self._do("owner")
        return self.jobs[job_id].job.user if job_id in self.jobs else None

    async def endpoint(self, job_id: str) -> str | None:
        await self._do("endpoint")
        return self.jobs[job_id].job.endpoint if job_id in self.jobs else None

    async def usage(self, since: str, until: str, by: Collection[str] = DIMENSIONS, most: int | None = None) -> Account:
        await self._do("usage")
        return Account([], 0, Usage("", "", "", 0, 0, 0, 0), Usage("", "", "", 0, 0, 0, 0))

    async def prune(self, now: int, account_days: int) -> None:
        await self._do("prune")

    # For tests.

    def unfinished(self, user: str) -> int:
        """Return how many jobs of a user have not ended."""
        return sum(kept.job.user == user and not kept.ended for kept in self.jobs.values())

    def sums(self) -> tuple[int, int, int]:
        """Return the jobs and the cost of all, and how many jobs have not ended."""
        kept = self.jobs.values()
        return len(kept), sum(each.cost for each in kept), sum(not each.ended for each in kept)
