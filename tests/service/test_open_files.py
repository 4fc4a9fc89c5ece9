"""The limit of open files is raised, and when it is reached calls are refused and nothing hangs."""

import asyncio
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.support.proxy import KEY, Setup
from tests.support.raw_client import RawClient, call
from tests.support.service_process import COMMAND, ServiceProcess, serving
from tests.support.stub_handlers import Gate
from tests.support.waiting import eventually


def limited(soft: int, hard: int) -> list[str]:
    """Return the command with that limit of open files."""
    return ["sh", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"', "sh", *COMMAND]


@pytest.mark.gen_test
async def test_the_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch, processes: str) -> None:
    """It is raised to the hard limit. If that is too low for max_in_flight, a warning names the values to set."""
    monkeypatch.setattr("tests.support.service_process.COMMAND", limited(64, 2000))
    running = await ServiceProcess.start(processes, "--max-in-flight=1900", FAL_KEY=KEY)
    for pid in (running.pid, *running.workers()):
        assert re.search(r"Max open files\s+2000\s+2000", Path(f"/proc/{pid}/limits").read_text())
    line = await running.log_line("limit of open files is 2000: --max-in-flight=1900 takes up to 2076 open files")
    assert re.search(r"LimitNOFILE=2076.* or set --max-in-flight=1824$", line.strip()), line
    await running.end()
    running = await ServiceProcess.start(processes, "--max-in-flight=1824", FAL_KEY=KEY)
    _, stderr = await running.end()
    assert "open files" not in stderr


@pytest.mark.gen_test
async def test_out_of_open_files(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections beyond the limit are answered 503, one line is logged, and the service recovers when others leave."""
    monkeypatch.setattr("tests.support.service_process.COMMAND", limited(64, 64))
    gate = Gate()
    gate.open.set()
    running = await ServiceProcess.in_front_of(setup, await setup.upstream(gate), "--max-in-flight=10")
    # More than are served, and few enough to leave files for a connection to fal.
    idle = [await RawClient.open(running.port) for _ in range(44)]
    statuses = Counter([(await call(running.port)).status for _ in range(10)])
    assert statuses == {503: 10}
    refused = await call(running.port)
    assert refused.message == "The proxy has no room for another connection; try again."
    assert refused.header("connection") == "close"
    # Calls on connections that were accepted are served.
    await idle[0].send()
    assert (await idle[0].response()).status == 200
    # Now there are more connections than it can even accept.
    more = [await RawClient.open(running.port) for _ in range(30)]
    for client in (*idle, *more):
        client.leave()
    await eventually(lambda: not serving(running.pid, running.port))
    assert (await call(running.port)).status == 200
    _, stderr = await running.end()
    assert len(re.findall("too few open files|cannot accept", stderr)) == 1, stderr


@pytest.mark.gen_test
async def test_out_of_open_files_over_http1(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """If each call needs a connection to fal as well, calls without one are answered 502 or 503. It recovers."""
    monkeypatch.setattr("tests.support.service_process.COMMAND", limited(64, 64))
    gate = Gate()
    upstream = await setup.upstream(gate, "http/1.1")
    running = await ServiceProcess.in_front_of(setup, upstream, "--log-level=error")
    calls = [asyncio.create_task(call(running.port)) for _ in range(80)]
    await eventually(lambda: sum(task.done() for task in calls) + len(upstream.exchanges) >= len(calls))
    gate.open.set()
    statuses = Counter([(await task).status for task in calls])
    assert set(statuses) <= {200, 502, 503}
    assert statuses[200] == len(upstream.exchanges)
    assert statuses[200] > 10
    assert statuses[503] > 5
    await eventually(lambda: not serving(running.pid, running.port))
    assert (await call(running.port)).status == 200
    await running.end()


@pytest.mark.gen_test
async def test_connections_to_fal_leave_files_to_answer_with(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that take files for their connections to fal leave some, so the next client gets 503 and does not wait."""
    monkeypatch.setattr("tests.support.service_process.COMMAND", limited(64, 64))
    gate = Gate()
    upstream = await setup.upstream(gate, "http/1.1")
    running = await ServiceProcess.in_front_of(setup, upstream)
    clients = [await RawClient.open(running.port) for _ in range(32)]
    for client in clients:
        await client.send()
    responses = [asyncio.create_task(client.response()) for client in clients]
    await eventually(lambda: sum(task.done() for task in responses) + len(upstream.exchanges) >= len(responses))
    assert (await call(running.port)).status == 503
    gate.open.set()
    assert Counter([(await task).status for task in responses]).keys() == {200, 502}
    for client in clients:
        await client.close()
    _, stderr = await running.end()
    assert "too few open files are left for a connection to fal (ConnectionLost)" in stderr
