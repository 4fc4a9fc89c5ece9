"""Limits as an operator writes them, the periods of the calendar, and money as a whole number."""

from calendar import timegm
from time import strptime

import pytest

from tornado_fal_proxy.spending.limits import PERIODS, Limit, Window, dollars, millionths, parse_budget, parse_jobs
from tornado_fal_proxy.spending.store import day_of

JOBS = {
    "5/minute": [Limit(5, "minute")],
    "5/minute,20/day": [Limit(5, "minute"), Limit(20, "day")],
    " 1/hour , 0/month ": [Limit(1, "hour"), Limit(0, "month")],
    "999999999999/day": [Limit(999_999_999_999, "day")],
}
NO_JOBS = {
    "": "must be a number of jobs and a period",
    "5": "must be a number",
    "5/": "must be a number",
    "/day": "must be a number",
    "5/week": "one of minute, hour, day, month",
    "5/Day": "must be",
    "5 /day": "must be",
    "-1/day": "must be",
    "+1/day": "must be",
    "1.5/day": "must be",
    "1e3/day": "must be",
    "1_000/day": "must be",
    "\u0661/day": "must be",
    "1000000000000/day": "must be",
    "5/day,": "must be",
    "5/day,6/day": "two limits for each day",
    "5/day/hour": "must be",
}
BUDGETS = {
    "1.00/day": [Limit(1_000_000, "day")],
    "0.000001/hour,5/month": [Limit(1, "hour"), Limit(5_000_000, "month")],
    "999999999.999999/month": [Limit(999_999_999_999_999, "month")],
    "0/day": [Limit(0, "day")],
}
NO_BUDGETS = {
    "$1/day": "must be dollars and a period, such as 1.00/day",
    ".5/day": "must be",
    "1./day": "must be",
    "1,00/day": "must be",
    "0.0000001/day": "must be",
    "1000000000/day": "must be",
    "nan/day": "must be",
    "1e-3/day": "must be",
    "1/day,2/day": "two limits",
}


@pytest.mark.parametrize("text", JOBS)
def test_jobs(text: str) -> None:
    """A text has limits of jobs for one period or several."""
    assert list(parse_jobs(text)) == JOBS[text]


@pytest.mark.parametrize("text", BUDGETS)
def test_budgets(text: str) -> None:
    """A text has budgets in dollars, down to a millionth."""
    assert list(parse_budget(text)) == BUDGETS[text]


@pytest.mark.parametrize("text", NO_JOBS)
def test_no_jobs(text: str) -> None:
    """Another text raises an error that has it, and tells what is allowed."""
    with pytest.raises(ValueError, match=NO_JOBS[text]) as caught:
        parse_jobs(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", NO_BUDGETS)
def test_no_budgets(text: str) -> None:
    """Another text raises an error that tells what is allowed."""
    with pytest.raises(ValueError, match=NO_BUDGETS[text]):
        parse_budget(text)


WINDOWS = [
    # period, a time in it, its beginning, its end
    ("minute", "2026-11-26 19:50:00", "2026-11-26 19:50:00", "2026-11-26 19:51:00"),
    ("minute", "2026-11-26 19:50:59", "2026-11-26 19:50:00", "2026-11-26 19:51:00"),
    ("hour", "2026-12-31 23:59:59", "2026-12-31 23:00:00", "2027-01-01 00:00:00"),
    ("day", "2026-03-29 01:30:00", "2026-03-29 00:00:00", "2026-03-30 00:00:00"),
    ("day", "2028-02-28 23:59:59", "2028-02-28 00:00:00", "2028-02-29 00:00:00"),
    ("month", "2026-11-01 00:00:00", "2026-11-01 00:00:00", "2026-12-01 00:00:00"),
    ("month", "2026-11-30 23:59:59", "2026-11-01 00:00:00", "2026-12-01 00:00:00"),
    ("month", "2026-12-01 00:00:00", "2026-12-01 00:00:00", "2027-01-01 00:00:00"),
    ("month", "2026-12-31 23:59:59", "2026-12-01 00:00:00", "2027-01-01 00:00:00"),
    ("month", "2028-02-29 12:00:00", "2028-02-01 00:00:00", "2028-03-01 00:00:00"),
    ("month", "2027-02-28 23:59:59", "2027-02-01 00:00:00", "2027-03-01 00:00:00"),
]


def seconds(text: str) -> int:
    """Return a time in UTC as seconds since 1970."""
    return timegm(strptime(text, "%Y-%m-%d %H:%M:%S"))


@pytest.mark.parametrize(("period", "now", "begins", "ends"), WINDOWS)
def test_windows(period: str, now: str, begins: str, ends: str) -> None:
    """A window is the period of the calendar around a time, in UTC, with its beginning and without its end."""
    window = Window(seconds(begins), seconds(ends))
    assert Window.around(period, seconds(now)) == window
    assert Window.around(period, seconds(now) + 0.999) == window


@pytest.mark.parametrize("period", PERIODS)
def test_windows_follow_each_other(period: str) -> None:
    """Where a window ends, the next one begins, through a leap year."""
    window = Window.around(period, seconds("2027-12-31 20:00:00"))
    for _ in range(800 if period == "day" else 100):
        following = Window.around(period, window.ends)
        assert following.begins == window.ends < following.ends
        assert Window.around(period, window.ends - 0.001) == window
        window = following


@pytest.mark.parametrize(
    ("number", "amount"),
    [("1", 1_000_000), ("0.0035", 3500), ("0.0000001", 1), ("1.0000005", 1_000_001), ("0", 0), ("2.5e-3", 2500)],
)
def test_millionths(number: str, amount: int) -> None:
    """A number is rounded up to the next millionth."""
    assert millionths(number) == amount


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0.00"),
        (1_500_000, "1.50"),
        (3500, "0.0035"),
        (1, "0.000001"),
        (12_000_000, "12.00"),
        (123_450_000, "123.45"),
    ],
)
def test_dollars(amount: int, text: str) -> None:
    """An amount has two decimals, or as many as it needs."""
    assert dollars(amount) == text
    assert millionths(text) == amount


def test_day_of() -> None:
    """A day is that of UTC."""
    assert day_of(seconds("2026-11-26 23:59:59")) == "2026-11-26"
    assert day_of(seconds("2026-11-27 00:00:00")) == "2026-11-27"
