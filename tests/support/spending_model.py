"""A plain model of a store of what is spent, and a machine that compares a store with it.

The machine does operations in any order, several at once, twice, late or never, through two stores that share what they
have, and closes and opens them in between. It has a loop of its own.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from tornado_fal_proxy.spending.limits import Window
from tornado_fal_proxy.spending.store import (
    DIMENSIONS,
    END,
    GIVE_BACK,
    RENAME,
    SETTLE,
    Account,
    Counter,
    Note,
    Reservation,
    Standing,
    Store,
    StoreFailed,
    Usage,
    day_of,
    first_without_room,
)

__all__ = ["NOON", "Model", "StoreMachine", "added_up", "reservation"]

# Near the end of a month, that its turn is among what happens.
NOON = 1_798_718_400  # 2026-12-31 12:00
USERS = ("ann", "b\u00f6b", "c d:e\n\u2028\"'\\\x00")
MODELS = ("fal-ai/flux/dev", "owner/app")
JOBS_LIMITS = {"minute": 2, "day": 4, "month": 9}
BUDGET = 30


def reservation(
    id: str,
    user: str = "ann",
    *,
    endpoint: str = MODELS[0],
    at: int = NOON,
    jobs: int = 1,
    cost: int = 5,
    limit: int | None = None,
    max_unfinished: int | None = None,
) -> Reservation:
    """Return a reservation with limits per minute, day and month, and budgets of the user and of all."""
    job_counters = []
    for period, amount in JOBS_LIMITS.items():
        window = Window.around(period, at)
        key = f"{user}:{period}:{window.begins}"
        job_counters.append(Counter(key, amount if limit is None else limit, window.ends))
    day = Window.around("day", at)
    budgets = (
        Counter(f"{user}:budget:{day.begins}", BUDGET if limit is None else limit * cost, day.ends),
        Counter(f"budget:{day.begins}", 2 * BUDGET if limit is None else limit * cost, day.ends),
    )
    return Reservation(
        id=id,
        user=user,
        endpoint=endpoint,
        refused_as=f"{endpoint}/**",
        at=at,
        jobs=jobs,
        units=1_000_000 * jobs,
        cost=cost,
        job_counters=job_counters,
        cost_counters=budgets,
        max_unfinished=max_unfinished,
        unfinished_until=at + 3600,
    )


def added_up(rows: Iterable[Usage], by: Collection[str], most: int | None) -> Account:
    """Return rows of the account as Store.usage does."""

    def add(first: Usage, *others: Usage) -> Usage:
        numbers = (sum(getattr(row, name) for row in (first, *others)) for name in ("jobs", "refused", "units", "cost"))
        return Usage(first.day, first.user, first.endpoint, *numbers)

    sums: dict[tuple[str, str, str], Usage] = {}
    for row in rows:
        key = (row.day * ("day" in by), row.user * ("user" in by), row.endpoint * ("endpoint" in by))
        row = Usage(*key, row.jobs, row.refused, row.units, row.cost)
        sums[key] = add(row, sums[key]) if key in sums else row
    found = sorted(sums.values(), key=lambda row: (-row.cost, -row.jobs, row.day, row.user, row.endpoint))
    shown, others = found[:most], found[len(found[:most]) :]
    nothing = Usage("", "", "", 0, 0, 0, 0)
    return Account(shown, len(others), add(nothing, *others), add(nothing, *found))


@dataclass
class Job:
    """A job that was reserved."""

    reserved: Reservation
    units: int
    cost: int
    ended: bool = False
    settled: bool = False


class Model:
    """The jobs, from which every sum follows."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.refused: list[Reservation] = []

    def used(self, counter: Counter) -> int:
        """Return what is used of a counter."""
        of_jobs = (job.reserved.jobs for job in self.jobs.values() if counter in job.reserved.job_counters)
        of_cost = (job.cost for job in self.jobs.values() if counter in job.reserved.cost_counters)
        return sum(of_jobs) + sum(of_cost)

    def unfinished(self, user: str, now: int) -> int:
        """Return the number of the user's jobs that have not ended."""
        return sum(
            job.reserved.user == user and not job.ended and job.reserved.unfinished_until > now
            for job in self.jobs.values()
        )

    def standing(self, job: Reservation, refused_by: int | None) -> Standing:
        """Return how things stand."""
        used = [self.used(counter) for counter in (*job.job_counters, *job.cost_counters)]
        return Standing(used, 0 if job.max_unfinished is None else self.unfinished(job.user, job.at), refused_by)

    def reserve(self, job: Reservation) -> Standing:
        """Reserve a job if there is room."""
        refused_by = None
        if job.id not in self.jobs:
            standing = self.standing(job, None)
            refused_by = first_without_room(job, standing.used, standing.unfinished)
            if refused_by is None:
                self.jobs[job.id] = Job(job, job.units, job.cost)
            else:
                self.refused.append(job)
        return self.standing(job, refused_by)

    def rename(self, job_id: str, new_id: str) -> None:
        """Give a job another id."""
        if job_id in self.jobs and new_id not in self.jobs:
            self.jobs[new_id] = self.jobs.pop(job_id)

    def settle(self, job_id: str, units: int, cost: int | None) -> None:
        """Note the bill of a job."""
        if (job := self.jobs.get(job_id)) is not None and not job.settled:
            job.units, job.cost = units, job.cost if cost is None else cost
            job.settled = job.ended = True

    def end(self, job_id: str) -> None:
        """End a job."""
        if job_id in self.jobs:
            self.jobs[job_id].ended = True

    def give_back(self, job_id: str) -> None:
        """Forget a job that did not run."""
        if job_id in self.jobs and not self.jobs[job_id].settled:
            del self.jobs[job_id]

    def note(self, note: Note) -> None:
        """Note what became of a job."""
        if note.kind == SETTLE:
            self.settle(note.job_id, note.units, note.cost)
        elif note.kind == END:
            self.end(note.job_id)
        elif note.kind == RENAME:
            self.rename(note.job_id, note.new_id)
        else:
            self.give_back(note.job_id)

    def usage(self) -> list[Usage]:
        """Return the account."""
        rows: dict[tuple[str, str, str], Usage] = {}

        def add(job: Reservation, jobs: int = 0, refused: int = 0, units: int = 0, cost: int = 0) -> None:
            place = day_of(job.at), job.user, job.refused_as if refused else job.endpoint
            row = rows.get(place) or Usage(*place, 0, 0, 0, 0)
            rows[place] = replace(
                row,
                jobs=row.jobs + jobs,
                refused=row.refused + refused,
                units=row.units + units,
                cost=row.cost + cost,
            )

        for job in self.jobs.values():
            add(job.reserved, jobs=job.reserved.jobs, units=job.units, cost=job.cost)
        for refused in self.refused:
            add(refused, refused=1)
        rows = {place: row for place, row in rows.items() if (row.jobs, row.refused, row.units, row.cost) != (0,) * 4}
        return [rows[place] for place in sorted(rows)]


Operation = Callable[[Any], Any]


class StoreMachine(RuleBasedStateMachine):
    """Do operations on stores and on the model. A subclass tells how to make a store."""

    # Makes a store that shares what it has with the others of the machine.
    make: ClassVar[Callable[[], Store]]
    # False for a store in memory, which shares nothing and forgets all when it is closed.
    shared: ClassVar[bool] = True
    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.model, self.now, self.count = Model(), NOON, 0
        self.late: list[Operation] = []
        self.notes: list[Note] = []
        self.prepare()
        self.stores = [type(self).make() for _ in range(1 + self.shared)]
        for store in self.stores:
            self.run(store.open())

    def prepare(self) -> None:
        """Remove what an earlier machine has left."""

    @property
    def store(self) -> Store:
        """Return the store that is used at present."""
        return self.stores[0]

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Await something to its end."""

        async def run() -> Any:
            return await awaitable

        return self.runner.run(run())

    def both(self, operation: Operation, times: int) -> None:
        """Do an operation on the store and the model, once or more."""
        for _ in range(times):
            assert self.run(operation(self.store)) == operation(self.model)

    times = st.integers(1, 2)

    @rule(
        target=ids,
        users=st.lists(st.sampled_from(USERS), min_size=1, max_size=4),
        endpoint=st.sampled_from(MODELS),
        jobs=st.sampled_from((1, 1, 1, 0, 2)),
        cost=st.sampled_from((5, 0, 11)),
        max_unfinished=st.sampled_from((None, 0, 1, 2, 3)),
        times=times,
    )
    def reserve(
        self, users: list[str], endpoint: str, jobs: int, cost: int, max_unfinished: int | None, times: int
    ) -> Any:
        """Reserve several jobs at once: the store does them in the order in which they were asked."""
        asked = []
        for user in users:
            self.count += 1
            one = reservation(str(self.count), user, endpoint=endpoint, at=self.now, jobs=jobs, cost=cost)
            asked.append(replace(one, max_unfinished=max_unfinished))

        async def at_once() -> list[Standing]:
            return await asyncio.gather(*(self.store.reserve(job) for job in asked))

        for _ in range(times):
            assert self.run(at_once()) == [self.model.reserve(job) for job in asked]
        return multiple(*(job.id for job in asked))

    @rule(target=ids, id=ids, new=st.sampled_from(("fal-1", "fal-2", "fal-3")), times=times)
    def rename(self, id: str, new: str, times: int) -> str:
        self.both(lambda store: store.rename(id, new), times)
        return new

    @rule(id=ids, cost=st.none() | st.integers(0, 12), units=st.integers(0, 3_000_000), times=times, late=st.booleans())
    def settle(self, id: str, cost: int | None, units: int, times: int, late: bool) -> None:
        self.now_or_late(lambda store: store.settle(id, units, cost), times, late)

    @rule(id=ids, times=times, late=st.booleans())
    def end(self, id: str, times: int, late: bool) -> None:
        self.now_or_late(lambda store: store.end(id), times, late)

    @rule(id=ids, times=times, late=st.booleans())
    def give_back(self, id: str, times: int, late: bool) -> None:
        self.now_or_late(lambda store: store.give_back(id), times, late)

    def now_or_late(self, operation: Operation, times: int, late: bool) -> None:
        """Do an operation, or keep it to be done at another time, or never."""
        if late:
            self.late.append(operation)
        else:
            self.both(operation, times)

    @rule(
        id=ids,
        kind=st.sampled_from((SETTLE, END, GIVE_BACK, RENAME)),
        cost=st.none() | st.integers(0, 12),
        units=st.integers(0, 3_000_000),
        new=st.sampled_from(("fal-1", "fal-2")),
    )
    def note_later(self, id: str, kind: str, units: int, cost: int | None, new: str) -> None:
        """Keep a note of a job in this process, as the ledger does."""
        self.notes.append(Note(kind, id, units, cost, new))

    @rule(target=ids, again=st.none() | ids, new=st.booleans(), max_unfinished=st.sampled_from((None, 1, 2)))
    def write_notes(self, again: str | None, new: bool, max_unfinished: int | None) -> Any:
        """Write the notes together with reservations that are asked before and behind them, one of them a second time.

        The store does all of it at once, in order.
        """
        self.count += 1
        first = reservation(f"{self.count}-first", at=self.now)
        last = replace(reservation(f"{self.count}-last", at=self.now), max_unfinished=max_unfinished)
        notes = [*self.notes, *([Note(GIVE_BACK, first.id)] if new else [])]
        if again is not None:
            notes.append(Note(END, again))
        self.notes = []

        async def together() -> list[Standing]:
            failures: asyncio.Future[StoreFailed | None] = asyncio.get_running_loop().create_future()
            before = asyncio.ensure_future(self.store.reserve(first))
            await asyncio.sleep(0)  # it is asked
            self.store.note(notes, failures.set_result)
            after = asyncio.ensure_future(self.store.reserve(last))
            assert await failures is None
            return [await before, await after]

        standings = self.run(together())
        expected = [self.model.reserve(first)]
        for note in notes:
            self.model.note(note)
        assert standings == [*expected, self.model.reserve(last)]
        return multiple(first.id, last.id)

    @rule()
    def crash(self) -> None:
        """Lose what was not written, and what was to come: then the estimates stay."""
        self.notes, self.late = [], []
        self.restart()

    @rule()
    def catch_up(self) -> None:
        """Do what came late, all at once."""
        late, self.late = self.late, []

        async def at_once() -> None:
            await asyncio.gather(*(operation(self.store) for operation in late))

        self.run(at_once())
        for operation in late:
            operation(self.model)

    @rule(seconds=st.sampled_from((1, 60, 3600, 43_200)))
    def let_time_pass(self, seconds: int) -> None:
        if self.now < NOON + 4 * 86_400:  # nothing is forgotten yet
            self.now += seconds

    @rule()
    def use_the_other(self) -> None:
        self.stores.reverse()

    @rule()
    def restart(self) -> None:
        if self.shared:
            self.run(self.store.close())
            self.stores[0] = type(self).make()
            self.run(self.store.open())

    @rule()
    def prune(self) -> None:
        self.run(self.store.prune(self.now, 30))

    @rule(id=ids)
    def owner(self, id: str) -> None:
        job = self.model.jobs.get(id)
        assert self.run(self.store.owner(id)) == (None if job is None else job.reserved.user)
        assert self.run(self.store.endpoint(id)) == (None if job is None else job.reserved.endpoint)

    @invariant()
    def account(self) -> None:
        """The account is that of the model."""
        for by, most in ((DIMENSIONS, None), ((), None), (("user",), 1), (("endpoint", "day"), 2), (DIMENSIONS, 1)):
            expected = added_up(self.model.usage(), by, most)
            assert self.run(self.store.usage("2026-01-01", "2027-12-31", by, most)) == expected

    def teardown(self) -> None:
        for store in self.stores:
            self.run(store.close())
        self.runner.close()
