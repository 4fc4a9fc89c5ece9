"""Notifications to systemd, and sockets that it passes to the service."""

import asyncio
import os
import re
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.proxy import KEY, Setup
from tests.support.raw_client import call
from tests.support.service_process import COMMAND, WITH_KEY, ServiceProcess, connects, environment, listening
from tests.support.stub_handlers import Gate
from tests.support.systemd import notification, notified, within
from tests.support.tools import tool, unused_port
from tests.support.waiting import TIMEOUT_S, arrived, eventually


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.gen_test
async def test_readiness(setup: Setup, tmp_path: Path, processes: str, abstract: bool) -> None:
    """READY=1 is sent once calls are served, STOPPING=1 when the drain begins, and no WATCHDOG=1 without a watchdog."""
    upstream = await setup.upstream(gate := Gate())
    async with notified(tmp_path, abstract) as (name, manager):
        running = await ServiceProcess.in_front_of(setup, upstream, processes, NOTIFY_SOCKET=name)
        assert await notification(manager) == "READY=1"
        waiting = asyncio.create_task(call(running.port))
        await arrived(upstream, 1)
        running.process.terminate()
        assert await notification(manager) == "STOPPING=1"
        gate.open.set()
        assert (await waiting).status == 200
        await running.ended()
        with pytest.raises(BlockingIOError):
            manager.recv(4096)


@pytest.mark.gen_test
async def test_watchdog(tmp_path: Path, processes: str) -> None:
    """WATCHDOG=1 comes several times in its period, as long as all loops run and the parent replaces nobody."""
    async with notified(tmp_path) as (name, manager):
        environ: dict[str, Any] = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "200000", "FAL_KEY": KEY}
        running = await ServiceProcess.start(processes, "--worker-timeout-s=0", **environ)
        counts = Counter([await notification(manager) for _ in range(10)])
        assert counts.keys() == {"READY=1", "WATCHDOG=1"}
        victim = max(running.workers(), default=running.pid)
        os.kill(victim, signal.SIGSTOP)
        async with asyncio.timeout(TIMEOUT_S):
            while await within(0.6, manager) is not None:
                pass
        os.kill(victim, signal.SIGCONT)
        assert await notification(manager) == "WATCHDOG=1"
        await running.end()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.mark.gen_test
async def test_activated(listener: socket.socket, processes: str) -> None:
    """A socket that is open already is served, and wins over --address and --port, which is logged."""
    port = listener.getsockname()[1]
    running = await ServiceProcess.start(processes, "--port=1", listener=listener, FAL_PROXY_ADDRESS="::1", FAL_KEY=KEY)
    assert running.port == port
    await running.log_line("--address and --port not used: the listening sockets come from systemd")
    assert (await call(port, "GET", path="/healthz")).status == 200
    variables = Path(f"/proc/{running.pid}/environ").read_bytes()
    assert b"LISTEN_FDS=1" in variables
    await running.end()
    assert connects(port)


@pytest.mark.parametrize(
    ("environ", "redirection", "match"),
    [
        ({"LISTEN_FDS": "1", "LISTEN_FDNAMES": "http"}, "3</dev/null", r"descriptor 3 \(http\) from LISTEN_FDS is no"),
        ({"LISTEN_FDS": "1"}, "3<&-", r"descriptor 3 \(unknown\) from LISTEN_FDS is no listening stream socket"),
    ],
)
@pytest.mark.gen_test
async def test_not_a_listening_socket(environ: dict[str, str], redirection: str, match: str) -> None:
    """The start ends with one line that names the descriptor, and with exit code 1."""
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", f'export LISTEN_PID=$$; exec "$@" {redirection}', "sh", *COMMAND),
        env=environment(WITH_KEY | environ),
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await process.communicate()
    (line,) = stderr.decode().splitlines()
    assert process.returncode == 1
    assert re.search(match, line), line


@pytest.mark.gen_test
async def test_variables_of_another_process(processes: str) -> None:
    """LISTEN_FDS and WATCHDOG_USEC that name another process are ignored."""
    running = await ServiceProcess.start(
        processes, LISTEN_FDS="1", LISTEN_PID="1", WATCHDOG_USEC="1", WATCHDOG_PID="1", FAL_KEY=KEY
    )
    assert (await call(running.port, "GET", path="/healthz")).status == 200
    await running.end()


@pytest.mark.gen_test
async def test_systemd_socket_activate(processes: str) -> None:
    """systemd's own tool opens the socket and starts the service at the first connection, which is served."""
    program = tool("systemd-socket-activate")
    port = unused_port()  # it takes no 0
    process = await asyncio.create_subprocess_exec(
        *(program, f"--listen=127.0.0.1:{port}", "-E", "FAL_KEY", "-E", "PYTHONPATH", *COMMAND, processes),
        env=environment(WITH_KEY),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    await eventually(lambda: port in listening(process.pid))
    health = await call(port, "GET", path="/healthz")
    assert health.status == 200
    assert process.stdout is not None
    # A worker may serve before the parent, which waits for all of them, announces the URL.
    assert f"listens on http://127.0.0.1:{port}/".encode() in await process.stdout.readline()
    process.terminate()
    await process.communicate()
    assert process.returncode == 0
