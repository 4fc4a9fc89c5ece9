"""``/usage`` and ``/usage.json`` on the admin port: who has spent how much.

Strategy. The store adds up, and only the rows that are shown leave it. The page is text, and bars that CSS draws: it
runs no script, and loads nothing. Everything from outside is escaped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from urllib.parse import urlencode

from tornado.escape import xhtml_escape

from tornado_fal_proxy.errors import StoreUnavailable
from tornado_fal_proxy.service.admin import AdminHandler
from tornado_fal_proxy.spending.account import DEFAULT_SINCE, DIMENSIONS, Ask, Report, make_report
from tornado_fal_proxy.spending.store import StoreFailed, Usage

__all__ = ["UsageHandler", "UsageJsonHandler"]

# Limits the rows that a page shows, which are those of the highest cost. Below them is the sum of the others.
MAX_ROWS = 200
PERIODS = ("1d", "7d", "30d", "365d")
OFF = "No limit on spending is set, so nothing is counted: see --jobs-per-user and --budget-per-user."
# Nothing may be loaded or run, whatever a user's id is.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; frame-ancestors 'none'"

STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
       color: light-dark(#1b1f27, #e7eaf0); background: light-dark(#fff, #14171c); }
h1 { margin: 0; font-size: 1.3rem; }
nav { margin: .5rem 0; }
a { color: light-dark(#2f5bd0, #86a8ff); margin-right: .75rem; }
a[aria-current] { color: inherit; font-weight: bold; text-decoration: none; }
p { color: light-dark(#566073, #9aa4b5); }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .4rem; text-align: right; border-bottom: 1px solid light-dark(#d5d9e0, #3a404b); }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
.bar { display: block; height: .35rem; min-width: 1px; background: light-dark(#2f5bd0, #86a8ff); border-radius: .2rem; }
@media (max-width: 480px) { th, td { padding: .3rem .15rem; font-size: .85rem; } }
"""


class _UsageBase(AdminHandler):
    def initialize(self, ask_of: Callable[[], Ask | None]) -> None:
        """Take what returns the store's usage() now, or None where nothing is counted."""
        self._ask = ask_of()

    async def get(self) -> None:
        """Respond with the report that the query asks for: ``since`` and ``by``."""
        if self._ask is None:
            self._refuse(404, OFF)
            return
        since, by = self.get_query_argument("since", DEFAULT_SINCE), self.get_query_argument("by", "user")
        try:
            report = await make_report(self._ask, since, by, time.time(), MAX_ROWS)
        except ValueError as exc:
            self._refuse(400, f"{'by' if by not in DIMENSIONS else 'since'}: {exc}")
        except (StoreFailed, StoreUnavailable) as exc:
            self._refuse(503, f"store: {exc}")
        else:
            self.show(report, since)

    head = get

    def show(self, report: Report, since: str) -> None:
        """Respond with the report."""
        raise NotImplementedError

    def _refuse(self, status: int, message: str) -> None:
        self.respond(status, json.dumps({"message": message}).encode())


class UsageJsonHandler(_UsageBase):
    """``GET /usage.json``: the report as JSON."""

    def show(self, report: Report, since: str) -> None:
        """Respond with the report."""
        self.respond(200, json.dumps(report.as_json()).encode())


class UsageHandler(_UsageBase):
    """``GET /usage``: the report as a page."""

    def show(self, report: Report, since: str) -> None:
        """Respond with the page."""
        self.set_header("Content-Security-Policy", POLICY)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")
        self.respond(200, page(report, since).encode(), "text/html; charset=utf-8")


def page(report: Report, since: str) -> str:
    """Return the page."""
    account = report.account
    most = max((row.cost for row in account.rows), default=0)
    size: Callable[[Usage], int] = (lambda row: row.cost) if most else (lambda row: row.jobs)
    most = most or max((row.jobs for row in account.rows), default=0) or 1
    head = "".join(f'<th scope="col">{name}</th>' for name in report.names)
    rows = "".join(_row(cells, size(row) / most) for cells, row in zip(report.rows, account.rows, strict=True))
    sums = "".join(_sums(cells) for cells in report.sums)
    query = xhtml_escape(urlencode({"since": since, "by": report.by}))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>Usage</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>'
        f"<h1>Usage by {report.by}</h1>"
        f"{_links('By', 'by', DIMENSIONS, report.by, since=since)}"
        f"{_links('Since', 'since', PERIODS, since, by=report.by)}"
        f"<p>{report.since} to {report.until} (UTC). Cost in dollars: fal's bill, or an estimate where it is not known."
        f' The same as <a href="usage.json?{query}">JSON</a></p>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
        f"<tfoot>{sums}</tfoot></table></body></html>"
    )


def _links(label: str, name: str, values: tuple[str, ...], current: str, **others: str) -> str:
    links = []
    for value in values:
        mark = ' aria-current="page"' if value == current else ""
        links.append(f'<a href="?{xhtml_escape(urlencode({name: value, **others}))}"{mark}>{value}</a>')
    return f"<nav>{label}: {''.join(links)}</nav>"


def _sums(cells: tuple[str, ...]) -> str:
    first, *others = map(xhtml_escape, cells)
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>'


def _row(cells: tuple[str, ...], share: float) -> str:
    first, *others = map(xhtml_escape, cells)
    bar = f'<span class="bar" style="width:{share * 100:.1f}%"></span>'
    return f"<tr><td>{first}{bar}</td>{''.join(f'<td>{cell}</td>' for cell in others)}</tr>"
