"""Faults on fal's side: each is over soon for clients, and nothing of it stays in the service.

``pytest tests/service/test_recovery.py -s`` prints the rows of the table in docs/faults.md.
relay/test_faults.py tests single calls; tests.support.recovery explains how these tests work.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support.recovery.faults import FAULTS
from tests.support.recovery.stand import Report, is_at_rest
from tests.support.tools import ROOT, isolated, tool
from tests.support.wire import DEVICE
from tornado_fal_proxy.upstream.handles import ADDRESS_LIFETIME_S, CONNECTION_LIFETIME_S

CASES = [(name, protocol) for name, fault in FAULTS.items() for protocol in fault.protocols]

Find = Callable[[str, str], Report]


def start(prefix: list[str], protocol: str, names: list[str]) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-m", "tests.support.programs.recovery", protocol, *names]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def find() -> Find:
    """Return a function that finds the report on a fault. The first call runs all faults side by side."""
    reports: dict[tuple[str, str], Report] = {}
    started: set[bool] = set()

    def run_all(network: bool) -> None:
        """Run faults of one protocol one after the other if they can share a service."""
        shared: dict[tuple[str, int, int], list[str]] = {}
        for name, protocol in CASES:
            fault = FAULTS[name]
            if bool(fault.network) == network and is_possible(name):
                shared.setdefault((protocol, fault.idle_s, fault.lifetime_s), []).append(name)
        prefix = isolated() if network else []
        running = [start(prefix, protocol, names) for (protocol, *_), names in shared.items()]
        for process in running:
            stdout, stderr = process.communicate()
            for line in stdout.splitlines():
                report = Report(**json.loads(line))
                reports[report.fault, report.protocol] = report
            assert process.returncode == 0, stderr

    def find(name: str, protocol: str) -> Report:
        network = bool(FAULTS[name].network)
        if network not in started:
            started.add(network)
            run_all(network)
        return reports[name, protocol]

    return find


def is_possible(name: str) -> bool:
    """Return whether this machine has what the fault needs."""
    return FAULTS[name].network != "wire" or os.access(DEVICE, os.R_OK | os.W_OK)


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_recovery(find: Find, name: str, protocol: str) -> None:
    """No POST runs twice, none that ran is reported as not run, calls succeed again soon, and nothing of it stays."""
    fault = FAULTS[name]
    if fault.network:
        tool("ip"), tool("tc")
    if not is_possible(name):
        tool(DEVICE)
    report = find(name, protocol)
    print("\n" + row(report))  # noqa: T201  (shown with -s)
    assert report.error == ""
    assert report.twice == [], "executed more than once"
    assert report.deceived == [], "a client may repeat a job that was executed"
    seen = set(report.seen) - {"POST 200", "GET 200", "stream 200"}
    assert seen <= fault.bad
    assert seen & fault.felt or not fault.felt, "it was no fault"
    assert fault.repeated is None or report.repeated <= fault.repeated
    assert is_at_rest(report.after, report.before), report


def test_a_name_that_moves_is_followed_within_a_minute() -> None:
    """The tests above run with shorter times; these are the real ones."""
    assert CONNECTION_LIFETIME_S + ADDRESS_LIFETIME_S < 60


def row(report: Report) -> str:
    """Return a row of the table."""
    seen = ", ".join(f"{count} x {what}" for what, count in sorted(report.seen.items()))
    rest = ", ".join(f"{what} {report.before.get(what)} -> {count}" for what, count in report.after.items())
    how = f" ({report.how})" if report.how else ""
    return (
        f"| {report.fault}{how} | {report.protocol} | {seen} | {report.recovered_s:g} s "
        f"| slowest {report.slowest_s:.1f} s | {rest} |"
    )
