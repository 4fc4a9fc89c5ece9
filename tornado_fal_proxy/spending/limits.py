"""The limits of an operator: how many jobs, or how much money, in each minute, hour, day or month.

Strategy. Periods are those of the calendar in UTC, all of the same kind for all users. A user who sees "3 of 10 left
today" can know when the next ten come, and one number per period is all that a store has to keep. In return a limit per
minute lets twice as much through around the turn of a minute.

Money is a whole number of millionths of a dollar everywhere in this package: sums of them are exact, in SQLite's
integers and in Redis' (which are exact up to 2**53).

This module reads no clock.
"""

from __future__ import annotations

import re
from calendar import timegm
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from time import gmtime

__all__ = ["MAX_AMOUNT", "MILLION", "PERIODS", "Limit", "Window", "dollars", "millionths", "parse_budget", "parse_jobs"]

PERIODS = ("minute", "hour", "day", "month")
MILLION = 1_000_000
# Limits every sum: Redis' numbers are exact up to 2**53, and no budget has nine billion dollars.
MAX_AMOUNT = 2**53 - 1

_COUNT = re.compile(r"[0-9]{1,12}")
_DOLLARS = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,6})?")


@dataclass(frozen=True, slots=True)
class Limit:
    """Allow ``amount`` in each ``period``, one of PERIODS. An amount is a number of jobs, or millionths of a dollar."""

    amount: int
    period: str


@dataclass(frozen=True, slots=True)
class Window:
    """One period of the calendar, from ``begins`` up to ``ends``, in seconds since 1970."""

    begins: int
    ends: int

    @classmethod
    def around(cls, period: str, now: float) -> Window:
        """Return the window of that period (one of PERIODS) in which ``now`` lies."""
        seconds = int(now)
        if period == "month":
            year, month = gmtime(seconds)[:2]
            begins = timegm((year, month, 1, 0, 0, 0))
            return cls(begins, timegm((year + month // 12, month % 12 + 1, 1, 0, 0, 0)))
        size = {"minute": 60, "hour": 3600, "day": 86_400}[period]
        begins = seconds - seconds % size
        return cls(begins, begins + size)


def parse_jobs(text: str) -> tuple[Limit, ...]:
    """Return the limits in a text such as ``5/minute,20/day``. Raise ValueError, which says what is allowed."""
    return _parse(text, _COUNT, int, "a number of jobs and a period, such as 5/minute,20/day")


def parse_budget(text: str) -> tuple[Limit, ...]:
    """Return the limits in a text such as ``1.00/day``, in dollars. Raise ValueError, which says what is allowed."""
    return _parse(text, _DOLLARS, millionths, "dollars and a period, such as 1.00/day")


def _parse(text: str, pattern: re.Pattern[str], amount_of: type[int] | object, allowed: str) -> tuple[Limit, ...]:
    limits: dict[str, Limit] = {}
    for part in text.split(","):
        amount, _, period = part.strip().partition("/")
        if not pattern.fullmatch(amount) or period not in PERIODS:
            raise ValueError(f"must be {allowed} (one of {', '.join(PERIODS)}), not {text!r}")
        if period in limits:
            raise ValueError(f"has two limits for each {period}: {text!r}")
        limits[period] = Limit(amount_of(amount), period)  # type: ignore[operator]
    return tuple(limits.values())


def millionths(number: str | Decimal) -> int:
    """Return a decimal number as millionths, rounded up: a price is never counted as less than it is."""
    return int((Decimal(number) * MILLION).to_integral_value(ROUND_CEILING))


def dollars(amount: int) -> str:
    """Return millionths of a dollar as text, such as ``1.50`` or ``0.0035``."""
    whole, rest = divmod(amount, MILLION)
    digits = f"{rest:06d}".rstrip("0").ljust(2, "0")
    return f"{whole}.{digits}"
