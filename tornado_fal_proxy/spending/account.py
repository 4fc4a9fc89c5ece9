"""The account as people ask for it: a period, rows added up by one dimension, and their sum.

Strategy. A store adds up, so that no more than the rows that are shown leaves it. The command and the page of the admin
port show the same :class:`Report`.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

from tornado_fal_proxy.spending.limits import MILLION, dollars
from tornado_fal_proxy.spending.store import DIMENSIONS, Account, Usage

__all__ = ["DEFAULT_SINCE", "DIMENSIONS", "Report", "first_day", "make_report"]

# The period that is shown where nobody names one.
DEFAULT_SINCE = "7d"
# Limits a period: longer than any account is kept.
MAX_DAYS = 3660

_DAYS = re.compile(r"([0-9]{1,4})d")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

Ask = Callable[..., Awaitable[Account]]


@dataclass(frozen=True, slots=True)
class Report:
    """The account from day ``since`` to day ``until``, added up by ``by``."""

    since: str
    until: str
    by: str
    account: Account

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the columns."""
        return (self.by, "jobs", "refused", "units", "cost")

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows that are shown as texts."""
        return [self._cells(getattr(row, self.by), row) for row in self.account.rows]

    @property
    def sums(self) -> list[tuple[str, ...]]:
        """Return the sums below the rows: of those that are left out, if there are any, and of all."""
        account = self.account
        left_out = [self._cells(f"{account.left_out} more", account.rest)] if account.left_out else []
        return [*left_out, self._cells("total", account.total)]

    @staticmethod
    def _cells(first: str, row: Usage) -> tuple[str, ...]:
        """Return a row as texts: the units as a number, and the cost in dollars."""
        return (first, str(row.jobs), str(row.refused), units_text(row.units), dollars(row.cost))

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON has it."""

        def numbers(row: Usage) -> dict[str, Any]:
            amounts = {"units": row.units / MILLION, "cost": row.cost / MILLION}
            return {"jobs": row.jobs, "refused": row.refused, **amounts}

        account = self.account
        return {
            "since": self.since,
            "until": self.until,
            "by": self.by,
            "rows": [{self.by: getattr(row, self.by), **numbers(row)} for row in account.rows],
            "others": {"rows": account.left_out, **numbers(account.rest)},
            "total": numbers(account.total),
        }


async def make_report(ask: Ask, since: str, by: str, now: float, most: int | None = None) -> Report:
    """Return the report since a day, as :func:`first_day` reads it. ``ask`` is a store's usage().

    ``most`` limits the rows to those of the highest cost. Raise StoreFailed, and ValueError where a text is wrong.
    """
    if by not in DIMENSIONS:
        raise ValueError(f"must be one of {', '.join(DIMENSIONS)}, not {by!r}")
    first, last = first_day(since, now), datetime.fromtimestamp(now, UTC).date().isoformat()
    account = await ask(first, last, (by,), most)
    if by == "day":
        account = replace(account, rows=sorted(account.rows, key=lambda row: row.day))
    return Report(first, last, by, account)


def first_day(since: str, now: float) -> str:
    """Return the first day of a period such as ``7d`` (today is one of the seven) or ``2026-11-01``, in UTC.

    Raise ValueError, which says what is allowed.
    """
    today = datetime.fromtimestamp(now, UTC).date()
    if (match := _DAYS.fullmatch(since)) and 1 <= int(match[1]) <= MAX_DAYS:
        return (today - timedelta(days=int(match[1]) - 1)).isoformat()
    try:
        if _DATE.fullmatch(since):
            return date.fromisoformat(since).isoformat()
    except ValueError:
        pass
    raise ValueError(f"must be a number of days such as {DEFAULT_SINCE}, or a day such as {today}, not {since!r}")


def units_text(units: int) -> str:
    """Return millionths of a unit as a number without needless zeros."""
    return f"{(Decimal(units) / MILLION).normalize():f}"
