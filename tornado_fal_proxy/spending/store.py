"""The interface of a store: what was reserved, by whom, and what was spent.

Strategy. A store does five things to a job, each of them at once for all processes that share it: it *reserves* the
job, *renames* it when fal has given it an id, *settles* it when its bill is known, *ends* it when it runs no more, and
*gives it back* if it certainly did not run. Each operation can come twice, late, or never, because processes crash. So
an operation on a job that the store does not know does nothing, and so does a second one of a kind. A caller who is
cancelled does not know whether the operation was done, so a caller who may be cancelled shields it.

Whoever calls knows limits, prices and the time. A store knows none of them: it compares numbers and adds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from time import gmtime
from typing import NamedTuple, Protocol

__all__ = [
    "COUNTER_KEPT_S",
    "DIMENSIONS",
    "END",
    "GIVE_BACK",
    "JOB_KEPT_S",
    "RENAME",
    "SETTLE",
    "UNFINISHED",
    "Account",
    "Counter",
    "Note",
    "Reservation",
    "Standing",
    "Store",
    "StoreFailed",
    "Usage",
    "day_of",
    "first_without_room",
]

# The dimensions of the account, by which rows may be added up.
DIMENSIONS = ("day", "user", "endpoint")
# Limits, in seconds, for how long a job is kept after its reservation: a late result settles it, its user may read it.
JOB_KEPT_S = 7 * 86_400
# Limits, in seconds, for how long a counter is kept after its window has ended. No reservation asks for it then, except
# after a clock was set back. A day of this is enough, and a user who calls all day has 1,440 counters of minutes in it.
COUNTER_KEPT_S = 86_400
# The kinds of a Note, by what they do.
SETTLE, END, GIVE_BACK, RENAME = "settle", "end", "give_back", "rename"
# The place in Standing.refused_by of the limit of unfinished jobs.
UNFINISHED = -1


class StoreFailed(Exception):
    """Report that the store could not do what was asked. The text is for the operator, and has no password."""


class Counter(NamedTuple):
    """One number that a job adds to: of one user or of all, in one window.

    ``key`` names it, and no other counter has that key. The number never exceeds ``limit`` by a reservation. It may be
    forgotten COUNTER_KEPT_S after ``ends``, in seconds since 1970.
    """

    key: str
    limit: int
    ends: int


class Note(NamedTuple):
    """A change of a job: the arguments of Store.settle, end, give_back or rename, whichever is its ``kind``."""

    kind: str
    job_id: str
    units: int = 0
    cost: int | None = None
    new_id: str = ""


@dataclass(slots=True, kw_only=True)
class Reservation:
    """A job before it runs. Nobody changes it; to freeze it would cost as much as to make it.

    ``id`` is random. A refusal is accounted under ``refused_as`` in place of ``endpoint``, which a client may have
    invented. ``at`` is the time in seconds since 1970. ``jobs`` is added to each of ``job_counters``, and
    ``cost``, the estimate in millionths of a dollar, to each of ``cost_counters``. ``units`` is the estimate in
    millionths of a unit. The job counts as unfinished until it has ended, or up to ``unfinished_until``; where
    ``max_unfinished`` is not None, the user may have so many of them.
    """

    id: str
    user: str
    endpoint: str
    refused_as: str
    at: int
    jobs: int
    units: int
    cost: int
    job_counters: Sequence[Counter]
    cost_counters: Sequence[Counter]
    max_unfinished: int | None
    unfinished_until: int


@dataclass(slots=True)
class Standing:
    """Tell how much is used up: after a reservation, or as it is where there is no room for one.

    ``used`` has the numbers of the job counters, then of the cost counters, in the reservation's order. ``unfinished``
    counts the user's unfinished jobs, and is 0 for a reservation without a limit of them. ``refused_by`` is None where
    the job was reserved, else the index in ``used`` of the first counter that has no room, or UNFINISHED.
    """

    used: Sequence[int]
    unfinished: int
    refused_by: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    """A row of the account: what one user did with one endpoint on one day (``2026-11-26``, in UTC).

    ``units`` and ``cost`` are millionths, and an estimate as long as a job is not settled.
    """

    day: str
    user: str
    endpoint: str
    jobs: int
    refused: int
    units: int
    cost: int


@dataclass(frozen=True, slots=True)
class Account:
    """The account of some days: ``rows``, and the sums of the rows that are ``left_out`` and of all.

    ``left_out`` is a number, ``rest`` the sum of these, and ``total`` that of all. Sums have no dimensions.
    """

    rows: Sequence[Usage]
    left_out: int
    rest: Usage
    total: Usage


class Store(Protocol):
    """Keep jobs, counters and the account. Every method raises StoreFailed."""

    async def open(self) -> None:
        """Connect, and make what is missing. Needs the loop on which the store is used from then on.

        After StoreFailed the store is open nevertheless: each operation tries to connect.
        """

    async def close(self) -> None:
        """Finish what was asked, and disconnect."""

    def reserve(self, job: Reservation) -> Awaitable[Standing]:
        """Add the job to all its counters, the account and the unfinished jobs; or, where one has no room, to none.

        A refusal is counted in the account. A cost of 0, or a number of jobs of 0, has room everywhere. A job that is
        reserved already is not reserved again. After StoreFailed the job is not reserved, or is given back as soon as
        the store can.
        """

    async def rename(self, job_id: str, new_id: str) -> None:
        """Give a job the id that fal knows it by, unless another job has it."""

    async def settle(self, job_id: str, units: int, cost: int | None) -> None:
        """Replace the estimate of a job that is not settled, in its cost counters and in the account. Ends it too.

        Without a ``cost``, because no price is known any more, the estimate of the cost stays.
        """

    async def end(self, job_id: str) -> None:
        """Count the job as unfinished no more. The estimate stays."""

    async def give_back(self, job_id: str) -> None:
        """Take the job, unless it is settled, out of its counters, the account and the unfinished jobs; forget it."""

    def note(self, notes: Sequence[Note], done: Callable[[StoreFailed | None], None]) -> None:
        """Do all of these, in order and before anything that is asked later; then call ``done``, maybe at once.

        It gets None, or the failure of one of them at least. Nothing is raised.
        """

    async def owner(self, job_id: str) -> str | None:
        """Return the user who reserved the job; None where it is not known, or not any more."""

    async def endpoint(self, job_id: str) -> str | None:
        """Return the endpoint of a job, whose price a bill needs; None where the job is not known, or not any more."""

    async def usage(self, since: str, until: str, by: Collection[str] = DIMENSIONS, most: int | None = None) -> Account:
        """Return the account from day ``since`` to day ``until``, both included. Calls do not wait for it.

        Rows that agree in the dimensions ``by`` are added up, and their other dimensions are empty. The
        highest cost comes first, and among equals the most jobs, and then day, user and endpoint. ``most`` limits their
        number.
        """

    async def prune(self, now: int, account_days: int) -> None:
        """Forget jobs after JOB_KEPT_S, counters after COUNTER_KEPT_S, days of the account after ``account_days``."""


def day_of(at: int) -> str:
    """Return the day of a time as the account names it, in UTC."""
    return "{:04}-{:02}-{:02}".format(*gmtime(at)[:3])


def first_without_room(job: Reservation, used: Sequence[int], unfinished: int) -> int | None:
    """Return Standing.refused_by for a job, where so much is used up."""
    index = 0
    for add, counters in ((job.jobs, job.job_counters), (job.cost, job.cost_counters)):
        for counter in counters:
            if add and used[index] + add > counter.limit:
                return index
            index += 1
    if job.max_unfinished is not None and unfinished >= job.max_unfinished:
        return UNFINISHED
    return None
