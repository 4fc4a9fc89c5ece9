"""The access log has a line for each call, and for the last one too."""

import asyncio
import json
import logging
import re
from typing import Any

import pytest

from tests.support.logs import Logs
from tests.support.metrics import ended_lines, started
from tests.support.proxy import Setup
from tests.support.raw_client import call
from tests.support.service_process import ServiceProcess
from tests.support.stub_handlers import EVENT, Gate, as_asked
from tests.support.waiting import eventually
from tornado_fal_proxy.service.access_log import LINES_AT_ONCE, AccessLog
from tornado_fal_proxy.telemetry import Call


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.gen_test
async def test_access_log(setup: Setup, form: str) -> None:
    """Each call has one line with its facts, without the query of its target, and no client can forge a line."""
    upstream = await setup.upstream(as_asked)
    running, _ = await started(setup, upstream, f"--log-format={form}", "--trusted-proxies=127.0.0.1")
    port = running.port
    await call(port, headers=["x-request-id: first", "x-forwarded-for: 6.6.6.6, 203.0.113.7"])
    await call(port, "GET", target="https://fal.run/fal-ai/flux/stream?secret=1", headers=["x-request-id: second"])
    await call(port, target="https://evil.example/x", headers=["x-request-id: third"])
    await call(port, "GET", target=None, path="/nowhere%0aoutcome=ok", headers=["x-forwarded-for: \x85\x9b31m"])
    await call(port, "GET", target=None, path="/healthz")
    lines = await ended_lines(running)
    if form == "json":
        entries = [entry for entry in map(json.loads, lines) if entry["logger"] == "tornado_fal_proxy.access"]
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", entry["time"]) for entry in entries)
        assert all(json.loads(line)["level"] for line in lines)
    else:
        entries = []
        for line in lines:
            if " INFO tornado_fal_proxy.access: " in line:
                pairs = re.findall(r'([a-z0-9_]+)=("(?:[^"\\]|\\.)*"|\S+)', line.partition("access: ")[2])
                entries.append({name: None if value == "-" else value for name, value in pairs})
    assert not any("secret" in line for line in lines)
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert [(str(entry["status"]), entry["outcome"], entry["error"], entry["target"]) for entry in entries] == [
        ("200", "ok", None, "fal.run/fal-ai/flux/dev"),
        ("200", "ok", None, "fal.run/fal-ai/flux/stream"),
        ("412", "refused", "TargetRefused", None),
        ("404", "refused", "NotFound", None),
    ]
    first, second, third, fourth = entries
    assert (first["client"], first["request_id"], first["fal_request_id"]) == ("203.0.113.7", "first", "fal-7")
    assert (str(first["upstream_protocol"]), str(first["upstream_status"]), str(first["bytes"])) == ("2", "200", "3")
    assert 0 < float(first["first_byte_s"]) <= float(first["total_s"])
    assert (second["client"], second["method"], str(second["bytes"])) == ("127.0.0.1", "GET", str(len(EVENT)))
    assert (third["request_id"], third["upstream_status"]) == ("third", None)
    assert fourth["client"] == "127.0.0.1"
    assert (int(fourth["bytes"]), float(fourth["total_s"]) > 0) == (len(b'{"message": "Not found."}'), True)


@pytest.mark.gen_test
async def test_lines_are_written_together(logs: Logs) -> None:
    """Lines are written soon after the calls, in the order of these, a few in each record."""
    logger = logging.getLogger("tornado_fal_proxy.access")
    access_log = AccessLog(logger)
    for number in range(2 * LINES_AT_ONCE + 1):
        access_log.add(Call("POST", f"call-{number}"), "::1")
    await eventually(lambda: len(logs.records) == 3)
    messages: list[Any] = [record.msg for record in logs.records]
    written = [fields["request_id"] for lines in messages for _, fields in lines]
    assert written == [f"call-{number}" for number in range(2 * LINES_AT_ONCE + 1)]
    access_log.write()
    assert len(logs.records) == 3


@pytest.mark.gen_test
async def test_a_record_that_fails(logs: Logs) -> None:
    """A handler that fails once loses its record, and none of those behind it."""
    logger = logging.Logger("one")
    handled: list[Any] = []

    class Failing(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            handled.append(record)
            if len(handled) == 1:
                raise OSError
            return True

    logger.addHandler(Failing())
    logs.expect("ERROR asyncio: Exception in callback AccessLog._write_for_a_turn")
    access_log = AccessLog(logger)
    for turn in (2, 3):
        for number in range(LINES_AT_ONCE + 1):
            access_log.add(Call("POST", f"call-{number}"), "::1")
        await eventually(lambda turn=turn: len(handled) == 2 * (turn - 1))  # type: ignore[misc]


@pytest.mark.gen_test
async def test_the_last_call_is_logged(setup: Setup) -> None:
    """Its line is written although the service ends with it, and no other line follows."""
    gate = Gate()
    upstream = await setup.upstream(gate)
    running = await ServiceProcess.in_front_of(setup, upstream)
    waiting = asyncio.create_task(call(running.port))
    await eventually(lambda: upstream.exchanges)
    running.process.terminate()
    await running.log_line("drain: 1 calls in flight")
    gate.open.set()
    assert (await waiting).status == 200
    _, stderr = await running.ended()
    (line,) = (line for line in stderr.splitlines() if " tornado_fal_proxy.access: " in line)
    assert " status=200 " in line


@pytest.mark.gen_test
async def test_no_access_log(setup: Setup) -> None:
    """With --log-level=warning there is no access log."""
    running = await ServiceProcess.in_front_of(setup, await setup.upstream(as_asked), "--log-level=warning")
    assert (await call(running.port)).status == 200
    assert not [line for line in await ended_lines(running) if "access" in line]


PREFLIGHT = ["origin: https://app.example", "access-control-request-method: POST"]


@pytest.mark.parametrize(
    ("option", "preflight"),
    [
        ("--allowed-endpoints=a/b", "preflight of https://app.example: no origin is allowed without --allowed-origins"),
        ("--allowed-origins=https://other.example", "allowed_origins: https://app.example"),
    ],
)
@pytest.mark.gen_test
async def test_what_was_refused(setup: Setup, option: str, preflight: str) -> None:
    """The line of a refused call has the target, host or origin that was refused, and no control character or query."""
    options = (option, "--allowed-hosts=fal.run", "--log-format=json")
    running, _ = await started(setup, await setup.upstream(as_asked), *options)
    port = running.port
    calls: list[tuple[str, str | None, list[str], str]] = [
        ("OPTIONS", None, PREFLIGHT, preflight),
        ("POST", "https://me:hidden@fal.run/\x85\x9b31m?hidden", [], "x-fal-target-url: https://***@fal.run/"),
        ("POST", "https://ws.fal.run/x?hidden", [], "allowed_hosts: ws.fal.run/x"),
        ("POST", None, [], "no x-fal-target-url header"),
    ]
    for method, target, headers, _ in calls:
        assert (await call(port, method, target=target, headers=headers)).status in (400, 403, 405, 412)
    await call(port, "GET", target=None, path="/nowhere?hidden")
    lines = await ended_lines(running)
    entries = [entry for entry in map(json.loads, lines) if entry["logger"] == "tornado_fal_proxy.access"]
    for entry, detail in zip(entries, [*(case[3] for case in calls), "/nowhere"], strict=True):
        assert entry["detail"].startswith(detail)
        assert entry["detail"].isprintable()
    assert not any("hidden" in line for line in lines)
