"""Nobody reads the log: calls go on, lines are lost and counted. With --log-format=json every line is JSON."""

import asyncio
import fcntl
import json
import os
import pty
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.metrics import started, until
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, call
from tests.support.service_process import COMMAND, WITH_KEY, environment, shell
from tests.support.stub_handlers import as_asked
from tests.support.tools import ROOT, unused_port
from tests.support.waiting import TIMEOUT_S, eventually
from tornado_fal_proxy.service.log_output import Output

# Calls whose lines fill a pipe or a socket several times.
CALLS = 3000


class Unread:
    """A pipe, socket or terminal for the service's log, and its other end, which the test reads late."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if kind == "socket":
            ours, theirs = socket.socketpair()
            self.ours, self.theirs = ours.detach(), theirs.detach()
        else:
            self.ours, self.theirs = pty.openpty() if kind == "terminal" else os.pipe()
        os.set_blocking(self.ours, False)
        self.text = b""

    def read(self) -> bytes:
        """Read what there is, and return all that was read."""
        try:
            while data := os.read(self.ours, 65536):
                self.text += data
        except OSError:  # nothing more for now; or the terminal was closed
            pass
        return self.text.replace(b"\r\n", b"\n")

    def close(self) -> None:
        os.close(self.ours)


@pytest.fixture(params=["pipe", "socket", "terminal"])
def unread(request: pytest.FixtureRequest) -> Iterator[Unread]:
    unread = Unread(request.param)
    yield unread
    unread.close()


async def run(unread: Unread, stdout: int, stderr: int, *argv: str) -> asyncio.subprocess.Process:
    """Start the command with an output that nobody reads."""
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, *argv), stdout=stdout, stderr=stderr, env=environment(WITH_KEY)
    )
    os.close(unread.theirs)
    return process


@pytest.mark.gen_test
async def test_nobody_reads_stderr(unread: Unread, processes: str) -> None:
    """Calls and health checks get responses. A later reader finds whole lines, and how many are missing."""
    port, admin = unused_port(), unused_port()
    argv = (f"--port={port}", f"--admin-port={admin}", processes)
    process = await run(unread, subprocess.DEVNULL, unread.theirs, *argv)
    async with asyncio.timeout(TIMEOUT_S):
        while not process.returncode and not await is_ready(admin):
            await asyncio.sleep(0.05)
    clients = [await RawClient.open(port) for _ in range(10)]
    for _ in range(CALLS // 10):
        for client in clients:
            await client.send("GET", path="/nowhere")
        for client in clients:
            assert (await client.response()).status == 404
    for client in clients:
        await client.close()
    assert (await call(port, "GET", path="/healthz")).status == 200
    scrape = await until(admin, lambda scrape: scrape.total("fal_proxy_log_lines_lost_total") > CALLS / 10)

    def lost() -> int:
        return sum(map(int, re.findall(rb"log: (\d+) lines lost", unread.read())))

    await eventually(lambda: lost() + unread.text.count(b" tornado_fal_proxy.access: ") == CALLS)
    scrape = await until(admin, lambda scrape: scrape.total("fal_proxy_log_lines_lost_total") == lost())
    assert scrape.total("fal_proxy_calls_total") == CALLS
    process.terminate()
    async with asyncio.timeout(TIMEOUT_S):
        while process.returncode is None:
            unread.read()  # or a terminal is full, and the last lines are lost
            await asyncio.sleep(0.01)
    assert process.returncode == 0
    *lines, end = unread.read().decode().split("\n")
    assert end == ""
    whole = (
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (\[\d+\] )?[A-Z]+ tornado_fal_proxy(\.access: client=.* detail=\S+|: .*)"
    )
    if (unread.kind, processes) != ("terminal", "--processes=2"):  # on a terminal the lines of two processes may mix
        assert [line for line in lines if not re.fullmatch(whole, line)] == []
    assert [line for line in lines if "drain: " in line]


async def is_ready(admin: int) -> bool:
    try:
        return (await call(admin, "GET", target=None, path="/readyz")).status == 200
    except ConnectionRefusedError:
        return False


@pytest.mark.gen_test
async def test_nobody_reads_stdout(processes: str) -> None:
    """The start does not wait for room to say where it listens."""
    unread = Unread("pipe")
    os.write(unread.theirs, bytes(fcntl.fcntl(unread.theirs, fcntl.F_GETPIPE_SZ)))
    port = unused_port()
    argv = (f"--port={port}", "--admin-port=0", processes)
    process = await run(unread, unread.theirs, subprocess.DEVNULL, *argv)

    async def healthy() -> bool:
        try:
            return (await call(port, "GET", path="/healthz")).status == 200
        except ConnectionRefusedError:
            return False

    async with asyncio.timeout(TIMEOUT_S):
        while not await healthy():
            await asyncio.sleep(0.05)
    process.terminate()
    assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == 0
    unread.close()


@pytest.mark.parametrize(
    ("unread", "reopened"),
    [("pipe", True), ("pipe", False), ("socket", True), ("terminal", True)],
    indirect=["unread"],
)
def test_a_long_line_is_finished_before_the_next(
    unread: Unread, reopened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that did not fit is finished when there is room. Until then others are lost. The flag is not shared."""

    def refuse(*_: Any) -> int:
        raise PermissionError

    if not reopened:
        monkeypatch.setattr(os, "open", refuse)
    stream = os.fdopen(unread.theirs, "w")
    output = Output(stream)
    monkeypatch.undo()
    long = b"a" * 1_000_000 + b"\n"
    assert output.write(long)
    assert output.is_blocked
    assert not output.write(b"lost\n")
    assert os.get_blocking(unread.theirs)
    while not output.finish():
        unread.read()
    assert not output.is_blocked
    assert output.write(b"next\n")
    assert unread.read() == long + b"next\n"
    output.close()
    stream.close()


def test_a_file_keeps_its_end(tmp_path: Path) -> None:
    """Lines are appended to a file, also behind those of another program."""
    file = tmp_path / "log"
    with file.open("a") as stream, file.open("ab", buffering=0) as other:
        output = Output(stream)
        assert output.write(b"one\n")
        other.write(b"two\n")
        assert output.write(b"three\n")
        output.close()
    assert file.read_bytes() == b"one\ntwo\nthree\n"


def test_without_a_reader() -> None:
    """A pipe whose reader has gone, a full disk, and a stream that is closed lose lines and raise nothing."""
    ours, theirs = os.pipe()
    os.close(ours)
    with open("/dev/full", "w") as full, os.fdopen(theirs, "w") as broken:
        for output in (Output(full), Output(broken), Output(None)):
            assert not output.write(b"lost\n")
            assert not output.is_blocked
            output.close()


# JSON.

RULES = """
import threading, warnings
class Odd:
    def __del__(self): raise ValueError("of no consequence")
def authorize(handler, target):
    warnings.warn("outdated")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    Odd()
    import logging
    logging.getLogger("mine").warning("%d", "no number")
    return True
"""


@pytest.mark.gen_test
async def test_every_line_is_json(setup: Setup, tmp_path: Path, processes: str) -> None:
    """The start's lines on stdout are JSON too, and so are warnings, and exceptions that nothing caught."""
    (tmp_path / "rules.py").write_text(RULES)
    running, _ = await started(
        *(setup, await setup.upstream(as_asked), "--log-format=json", "--authorize=rules:authorize", processes),
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )
    assert json.loads(running.line)["level"] == "info"
    assert (await call(running.port)).status == 200
    assert running.process.stderr is not None
    running.process.terminate()
    lines = [json.loads(line) for line in (await running.process.stderr.read()).decode().splitlines()]
    assert await running.process.wait() == 0
    found = {(entry["logger"], entry.get("message", "").split("\n")[0].partition(" <")[0]) for entry in lines}
    assert ("tornado_fal_proxy", "crash: ZeroDivisionError was not caught") in found
    assert any(name == "py.warnings" and "outdated" in message for name, message in found)
    assert any(message.startswith("exception ignored: ") for _, message in found)
    assert any(message.endswith("could not be formatted") for _, message in found)


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        (["--log-format=json", "--port=x"], {}),
        (["--port=x", "--log-format", "JSON"], {}),
        (["--port=x"], {"FAL_PROXY_LOG_FORMAT": "json"}),
        (["--log-format=json", "--nope"], {}),
    ],
)
def test_a_wrong_option_in_json(argv: list[str], environ: dict[str, str]) -> None:
    """The one line of a start that fails is JSON too, if the format is known."""
    ended = shell("", *argv, **WITH_KEY, **environ)
    assert ended.returncode == 2
    entry = json.loads(ended.stderr)
    assert entry["level"] == "critical"
    assert re.search("--port: must be|unknown: --nope", entry["message"])


def test_a_crash_of_the_parent_in_json(tmp_path: Path) -> None:
    """The traceback is in a line of the log."""
    (tmp_path / "sitecustomize.py").write_text(
        "from tornado_fal_proxy.service import supervisor\nsupervisor.Supervisor.run = lambda self: 1 / 0\n"
    )
    ended = shell("", "--port=0", "--processes=2", "--log-format=json", **WITH_KEY, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert ended.returncode == 1
    *_, last = [json.loads(line) for line in ended.stderr.splitlines()]
    assert last["message"] == "crash: ZeroDivisionError was not caught"
    assert "ZeroDivisionError: division by zero" in last["exception"]
