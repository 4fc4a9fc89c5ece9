"""The account as it is shown: in a terminal, as CSV, as JSON, and on the admin port's page."""

import asyncio
import json
import re
from collections.abc import Collection

import pytest

from tests.support.spending_model import NOON, added_up
from tornado_fal_proxy import ConfigError
from tornado_fal_proxy.service.usage import FORMATS, run_usage, shown
from tornado_fal_proxy.service.usage_page import page
from tornado_fal_proxy.spending.account import Report, make_report
from tornado_fal_proxy.spending.store import DIMENSIONS, Account, Usage

ROWS = [
    Usage("2026-12-30", "ann", "fal-ai/flux/dev", 3, 1, 3_000_000, 75_000),
    Usage("2026-12-31", "ann", "fal-ai/fast-sdxl", 1, 0, 2_500_000, 2_750),
    Usage("2026-12-31", "=bob\x1b[31m", "fal-ai/flux/dev", 2, 0, 2_000_000, 50_000),
    Usage("2026-12-31", "eve", "fal-ai/flux/dev", 0, 7, 0, 0),
]


def report(by: str, most: int | None) -> Report:
    """Return a report, for which the store is asked once."""
    asked = []

    async def ask(since: str, until: str, by: Collection[str] = DIMENSIONS, most: int | None = None) -> Account:
        asked.append((since, until))
        return added_up(ROWS, by, most)

    made = asyncio.run(make_report(ask, "2d", by, NOON, most))
    assert asked == [("2026-12-30", "2026-12-31")]
    return made


TABLES = {
    ("user", None): """
2026-12-30 to 2026-12-31 (UTC), cost in dollars

user          jobs  refused  units     cost
ann              4        1    5.5  0.07775
=bob\\x1b[31m     2        0      2     0.05
eve              0        7      0     0.00
total            6        8    7.5  0.12775
""",
    ("user", 1): """
2026-12-30 to 2026-12-31 (UTC), cost in dollars

user    jobs  refused  units     cost
ann        4        1    5.5  0.07775
2 more     2        7      2     0.05
total      6        8    7.5  0.12775
""",
    ("day", None): """
2026-12-30 to 2026-12-31 (UTC), cost in dollars

day         jobs  refused  units     cost
2026-12-30     3        1      3    0.075
2026-12-31     3        7    4.5  0.05275
total          6        8    7.5  0.12775
""",
}


@pytest.mark.parametrize(("by", "most"), TABLES)
def test_table(by: str, most: int | None) -> None:
    """Rows that are left out are one row, below which the total is that of all."""
    assert f"\n{shown(report(by, most), 'table')}\n" == TABLES[by, most]


def test_csv() -> None:
    """The rows alone, none of which a spreadsheet takes for a formula."""
    assert shown(report("user", 2), "csv").split("\r\n") == [
        "user,jobs,refused,units,cost",
        "ann,4,1,5.5,0.07775",
        "'=bob\x1b[31m,2,0,2,0.05",
    ]


def test_json() -> None:
    """Numbers in place of texts, and always the same fields."""
    found = json.loads(shown(report("endpoint", 1), "json"))
    assert found == {
        "since": "2026-12-30",
        "until": "2026-12-31",
        "by": "endpoint",
        "rows": [{"endpoint": "fal-ai/flux/dev", "jobs": 5, "refused": 8, "units": 5.0, "cost": 0.125}],
        "others": {"rows": 1, "jobs": 1, "refused": 0, "units": 2.5, "cost": 0.00275},
        "total": {"jobs": 6, "refused": 8, "units": 7.5, "cost": 0.12775},
    }
    assert json.loads(shown(report("endpoint", None), "json"))["others"] == {
        "rows": 0,
        "jobs": 0,
        "refused": 0,
        "units": 0.0,
        "cost": 0.0,
    }
    assert FORMATS == ("table", "csv", "json")


def test_page() -> None:
    """The page has the same sums, and ids are text."""
    text = page(report("user", 2), "2d")
    assert "\x1b" not in re.sub("<td>=bob.*?<", "", text)
    foot = re.findall(r"<tfoot>(.*)</tfoot>", text)[0]
    assert re.sub(r"<[^>]*>", " ", foot).split() == [
        *("1", "more", "0", "7", "0", "0.00"),
        *("total", "6", "8", "7.5", "0.12775"),
    ]


@pytest.mark.parametrize("rows", ["0", "-1", "many", "1e3", "1" * 10])
def test_rows_that_cannot_be(rows: str) -> None:
    """A number of rows is one."""
    with pytest.raises(ConfigError, match="usage: argument --rows: must be a number from 1 on"):
        run_usage([f"--rows={rows}"], {})
