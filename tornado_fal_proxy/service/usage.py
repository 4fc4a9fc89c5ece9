"""The command ``tornado-fal-proxy usage``: who has spent how much, read from the store of the service.

Strategy. Reading makes nothing: a file that is not there is an error. Ids of users come from outside, so a table shows
none of their control characters, and a CSV cell never begins as a spreadsheet's formula does.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import io
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from tornado_fal_proxy.config import ENV_PREFIX
from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.service.env_file import environment
from tornado_fal_proxy.service.options import config_file
from tornado_fal_proxy.service.settings import PROGRAM
from tornado_fal_proxy.spending.account import DEFAULT_SINCE, DIMENSIONS, Report, first_day, make_report
from tornado_fal_proxy.spending.store import Store, StoreFailed

__all__ = ["print_usage", "usage_parser"]

FORMATS = ("table", "csv", "json")
EXIT_OK, EXIT_FAILED = 0, 1
# The beginnings of a cell that spreadsheets take for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class _Parser(argparse.ArgumentParser):
    """Raises an error instead of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"usage: {message}"])


def run_usage(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[int, str]:
    """Return the exit code and the text of the report, or of the error. Raise ConfigError for wrong arguments."""
    given = usage_parser().parse_args(argv)
    now = time.time()
    try:
        first_day(given.since, now)
    except ValueError as exc:
        raise ConfigError([f"--since: {exc}"]) from None
    store = _store(given, environ)
    try:
        report = asyncio.run(_read(store, given, now))
    except StoreFailed as exc:
        return EXIT_FAILED, f"--store: {exc}"
    return EXIT_OK, shown(report, given.format)


def usage_parser(**more: Any) -> _Parser:
    """Return the parser of the arguments."""
    parser = _Parser(prog=f"{PROGRAM} usage", allow_abbrev=False, description="Show who has spent how much.", **more)
    parser.add_argument("--since", default=DEFAULT_SINCE, metavar="PERIOD", help="days (7d) or a day (2026-11-01), UTC")
    parser.add_argument("--by", default="user", choices=DIMENSIONS, help="what to add up by (default: user)")
    parser.add_argument("--rows", type=_count, metavar="N", help="how many rows to show, of the highest cost (all)")
    parser.add_argument("--format", default="table", choices=FORMATS, help="form of the report (default: table)")
    parser.add_argument("--store", metavar="STORE", help="the store of the service (default: as the service has it)")
    parser.add_argument("--config", metavar="FILE", help="the TOML file of the service, which may name the store")
    parser.add_argument("--env-file", metavar="FILE", help="the file of variables of the service, likewise")
    return parser


def _count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, not {text!r}")
    return int(text)


def _store(given: argparse.Namespace, environ: Mapping[str, str]) -> Store:
    """Return the store that the service with these arguments and variables uses. Raise ConfigError."""
    from tornado_fal_proxy.spending.stores import parse_store, path_of  # costs memory

    environ = environment(given.env_file, environ).variables
    text = given.store
    if text is None:
        text = environ.get(ENV_PREFIX + "STORE") or None
    if text is None:
        options = config_file(given.config, environ)
        if options.problems:
            raise ConfigError(options.problems)
        text = options.texts.get("store")
    try:
        store = parse_store(text)
    except ValueError as exc:
        raise ConfigError([f"--store: {exc}"]) from None
    if text == "memory":
        raise ConfigError(["--store: memory is inside the service: see /usage on its admin port"])
    file = path_of(text)
    if file is not None and not file.exists():
        raise ConfigError([f"--store: there is no account yet: {file} does not exist"])
    return store


async def _read(store: Store, given: argparse.Namespace, now: float) -> Report:
    try:
        await store.open()
        return await make_report(store.usage, given.since, given.by, now, given.rows)
    finally:
        await store.close()


def shown(report: Report, form: str) -> str:
    """Return the report in one of FORMATS."""
    return {"table": _table, "csv": _csv, "json": _json}[form](report)


def _table(report: Report) -> str:
    """Return the report as columns for a terminal."""
    rows = [report.names, *report.rows, *report.sums]
    texts = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in texts
    ]
    return "\n".join([f"{report.since} to {report.until} (UTC), cost in dollars", "", *lines])


def _plain(text: str) -> str:
    """Return a text without what a terminal would not show as it stands: controls, and marks of direction."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _csv(report: Report) -> str:
    """Return the rows as CSV (RFC 4180), without the sums below them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(report.names)
    writer.writerows([_harmless(row[0]), *row[1:]] for row in report.rows)
    return text.getvalue().removesuffix("\r\n")


def _harmless(cell: str) -> str:
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def _json(report: Report) -> str:
    return json.dumps(report.as_json(), indent=2)


def print_usage(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print the report, and return the exit code. Raise ConfigError for wrong arguments."""
    code, text = run_usage(argv, environ)
    stream: Any = sys.stdout if code == EXIT_OK else sys.stderr
    stream.write((text if code == EXIT_OK else f"{PROGRAM}: {text}") + "\n")
    return code
