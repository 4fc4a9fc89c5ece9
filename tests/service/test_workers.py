"""Several processes: connections are spread over them, workers are replaced, and a shutdown loses no call."""

import asyncio
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.proxy import KEY, Setup
from tests.support.raw_client import RawClient, call, request
from tests.support.scripted_upstream import Exchange
from tests.support.service_process import COMMAND, WITH_KEY, ServiceProcess, alive, connects, environment, serving
from tests.support.stub_handlers import Gate
from tests.support.systemd import notification, notified
from tests.support.tools import ROOT, unused_port
from tests.support.waiting import TIMEOUT_S, arrived, eventually
from tornado_fal_proxy.service.supervisor import MAX_FAILED_STARTS

# Limits the crowds until one is spread evenly. On a busy machine one worker may get no CPU while a crowd comes.
MAX_ROUNDS = 5


async def spread(running: ServiceProcess, count: int) -> dict[int, int]:
    """Connect a crowd of clients, and return how many of them each worker accepted."""
    clients = await asyncio.gather(*(RawClient.open(running.port) for _ in range(count)))
    counts: dict[int, int] = {}
    while sum(counts.values()) < count:
        await asyncio.sleep(0.01)
        counts = {pid: len(serving(pid, running.port)) for pid in running.workers()}
    for client in clients:
        await client.close()
    while any(serving(pid, running.port) for pid in running.workers()):
        await asyncio.sleep(0.01)
    return counts


@pytest.mark.gen_test
async def test_connections_spread(setup: Setup) -> None:
    """Each of two workers gets 35 to 65 % of 64 clients that connect at once, a new worker as well as an old one."""
    running = await ServiceProcess.start("--processes=2", FAL_KEY=KEY)
    for _ in range(2):
        for _round in range(MAX_ROUNDS):
            counts = await spread(running, 64)
            assert len(counts) == 2
            if min(counts.values()) >= 0.35 * 64:
                break
        assert min(counts.values()) >= 0.35 * 64
        victim = min(counts)
        os.kill(victim, signal.SIGKILL)
        await eventually(lambda victim=victim: len(set(running.workers()) - {victim}) == 2)  # type: ignore[misc]
        # The new worker serves once it accepts a connection that comes while the other has more.
        await new_worker_serves(running, set(counts))
    await running.end()


async def new_worker_serves(running: ServiceProcess, old: set[int]) -> None:
    """Connect clients until a worker that is not in ``old`` accepts one."""
    clients = []
    async with asyncio.timeout(TIMEOUT_S):
        while not any(serving(pid, running.port) for pid in running.workers() if pid not in old):
            clients.append(await RawClient.open(running.port))
            await asyncio.sleep(0.05)
    for client in clients:
        await client.close()


def test_workers_that_die_at_start_end_the_service(tmp_path: Path) -> None:
    """The service ends after a few tries with exit code 4. The last line reports it, and the log has the reason."""
    (tmp_path / "sitecustomize.py").write_text(
        "from tornado_fal_proxy.service import process\n"
        "async def serve(*_): raise RuntimeError('no way')\n"
        "process.serve = serve\n"
    )
    ended = subprocess.run(
        [*COMMAND, "--port=0", "--processes=2"],
        env=environment(WITH_KEY | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (4, "")
    assert re.fullmatch(
        rf"tornado-fal-proxy: {MAX_FAILED_STARTS} worker processes in a row ended before they were ready "
        r"\(the last with exit code 1\); see the log for the reason",
        ended.stderr.splitlines()[-1],
    )
    assert re.search(
        r"worker failed: process \d+ ends with exit code 1\nTraceback (.*\n)*RuntimeError: no", ended.stderr
    )


# The shutdown.

# The second worker starts when the file "go" exists.
SECOND_STARTS_LATE = """
import pathlib, time
from tornado_fal_proxy.service import process
serve = process.serve
def start_late(context, worker):
    while worker.slot == 1 and not pathlib.Path("go").exists():
        time.sleep(0.01)
    return serve(context, worker)
process.serve = start_late
"""


@pytest.mark.gen_test
async def test_a_stop_during_the_start(tmp_path: Path) -> None:
    """A stop between the first worker's start and the second's ends with 0: nothing is announced, no READY=1 sent."""
    (tmp_path / "sitecustomize.py").write_text(SECOND_STARTS_LATE)
    port = unused_port()
    environ = WITH_KEY | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    async with notified(tmp_path) as (name, manager):
        process = await asyncio.create_subprocess_exec(
            *(*COMMAND, f"--port={port}", "--admin-port=0", "--processes=2"),
            cwd=tmp_path,
            env=environment(environ | {"NOTIFY_SOCKET": name}),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        await eventually(lambda: connects(port))
        assert (await call(port, "GET", path="/healthz")).status == 200
        process.terminate()
        assert await notification(manager) == "STOPPING=1"
        (tmp_path / "go").touch()
        stdout, stderr = await process.communicate()
        assert (process.returncode, stdout) == (0, b""), stderr.decode()
        assert b"Traceback" not in stderr
        with pytest.raises(BlockingIOError):
            manager.recv(4096)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.gen_test
async def test_a_drain_finishes_calls_in_flight(setup: Setup, processes: str, number: signal.Signals) -> None:
    """They are answered with ``connection: close``. The port is free at once, and the exit code is 0."""
    gate = Gate()
    upstream = await setup.upstream(gate)
    running = await ServiceProcess.in_front_of(setup, upstream, processes)
    clients = [await RawClient.open(running.port) for _ in range(4)]
    for client in clients:
        await client.send()
    await arrived(upstream, len(clients))
    running.process.send_signal(number)
    await eventually(lambda: not connects(running.port))
    with socket.create_server(("127.0.0.1", running.port)):
        pass
    gate.open.set()
    for client in clients:
        got = await client.response()
        assert (got.status, got.body, got.header("connection")) == (200, b"{}", "close")
        assert await client.reader.read() == b""
        await client.close()
    await running.ended()


@pytest.mark.gen_test
async def test_a_drain_serves_kept_connections(setup: Setup, processes: str) -> None:
    """A request on a kept connection is served with ``connection: close``, and one that stays idle is closed."""
    gate = Gate()
    gate.open.set()
    upstream = await setup.upstream(gate)
    running = await ServiceProcess.in_front_of(setup, upstream, processes, "--drain-timeout-s=3600")
    used, idle, fresh = [await RawClient.open(running.port) for _ in range(3)]
    for client in (used, idle):
        await client.send()
        assert (await client.response()).header("connection") is None
    running.process.terminate()
    await eventually(lambda: not connects(running.port))
    await used.send()
    await fresh.send()
    for client in (used, fresh):
        got = await client.response()
        assert (got.status, got.header("connection")) == (200, "close")
    assert await idle.reader.read() == b""
    for client in (used, idle, fresh):
        await client.close()
    await running.ended()


@pytest.mark.parametrize("stray", [b"\r\n", b"\n", b"\r", b"\r\n" * 500], ids=["CRLF", "LF", "CR", "many"])
@pytest.mark.gen_test
async def test_line_ends_behind_a_body_delay_no_drain(setup: Setup, processes: str, stray: bytes) -> None:
    """They are no request: the next one is served all the same, and a drain closes the connection as an idle one."""
    gate = Gate()
    gate.open.set()
    upstream = await setup.upstream(gate)
    running = await ServiceProcess.in_front_of(setup, upstream, processes, "--drain-timeout-s=3600")
    client = await RawClient.open(running.port)
    for _ in range(2):
        await client.send()
        client.writer.write(stray)
        assert (await client.response()).status == 200
    running.process.terminate()
    async with asyncio.timeout(TIMEOUT_S):
        assert await client.reader.read() == b""
    await client.close()
    await running.ended()


@pytest.mark.gen_test
async def test_a_part_of_a_head_in_a_drain(setup: Setup, processes: str) -> None:
    """The rest of the head may come, and the call is served. If it does not, the connection is closed."""
    gate = Gate()
    gate.open.set()
    upstream = await setup.upstream(gate)
    running = await ServiceProcess.in_front_of(setup, upstream, processes, "--drain-timeout-s=3600")
    ends, stops = [await RawClient.open(running.port) for _ in range(2)]
    head = request()
    for client in (ends, stops):
        client.writer.write(b"\r\n" + head[:50])
    running.process.terminate()
    await eventually(lambda: not connects(running.port))
    ends.writer.write(head[50:])
    got = await ends.response()
    assert (got.status, got.header("connection")) == (200, "close")
    async with asyncio.timeout(TIMEOUT_S):
        assert await stops.reader.read() == b""
    for client in (ends, stops):
        await client.close()
    await running.ended()


@pytest.mark.gen_test
async def test_a_flood_of_line_ends(setup: Setup) -> None:
    """More line ends than a client sends by mistake are answered 400."""
    running = await ServiceProcess.start(FAL_KEY=KEY)
    client = await RawClient.open(running.port)
    client.writer.write(b"\r\n" * 513)
    assert (await client.head()).status == 400
    await client.close()
    await running.end()


@pytest.mark.gen_test
async def test_a_stream_is_finished_in_a_drain(setup: Setup, processes: str) -> None:
    """A stream whose head was sent long ago is finished too."""
    goes_on = asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.start(200, [("content-type", "text/event-stream")])
        await exchange.send(b"data: 1\n\n")
        await goes_on.wait()
        await exchange.send(b"data: 2\n\n")
        await exchange.end()

    running = await ServiceProcess.in_front_of(setup, await setup.upstream(stream), processes)
    client = await RawClient.open(running.port)
    await client.send()
    await client.head()
    assert await client.chunk() == b"data: 1\n\n"
    running.process.terminate()
    await eventually(lambda: not connects(running.port))
    goes_on.set()
    assert [await client.chunk() for _ in range(2)] == [b"data: 2\n\n", b""]
    await client.close()
    await running.ended()


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGQUIT, None)])
@pytest.mark.gen_test
async def test_a_second_signal_aborts(
    setup: Setup, processes: str, first: signal.Signals, second: signal.Signals | None
) -> None:
    """It aborts at once, as SIGQUIT does by itself: a POST in flight is answered 500, and the exit code is 3."""
    upstream = await setup.upstream(Gate())
    running = await ServiceProcess.in_front_of(setup, upstream, processes)
    waiting = [asyncio.create_task(call(running.port)) for _ in range(4)]
    await arrived(upstream, len(waiting))
    running.process.send_signal(first)
    await eventually(lambda: not connects(running.port))
    if second is not None:
        running.process.send_signal(second)
    assert [(await task).status for task in waiting] == [500] * 4
    await running.ended(3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.gen_test
async def test_a_signal_to_the_group_counts_once(setup: Setup, processes: str, number: signal.Signals) -> None:
    """Ctrl-C in a terminal and systemd's KillMode=control-group signal the workers as well, and still drain."""
    gate = Gate()
    upstream = await setup.upstream(gate)
    running = await ServiceProcess.in_front_of(setup, upstream, processes)
    waiting = [asyncio.create_task(call(running.port)) for _ in range(4)]
    await arrived(upstream, len(waiting))
    os.killpg(running.pid, number)
    await eventually(lambda: not connects(running.port))
    gate.open.set()
    assert [(await task).status for task in waiting] == [200] * 4
    await running.ended()


@pytest.mark.parametrize("argv", [("--processes=1",), ("--processes=2",), ("--sandbox", "--config={dir}/options.toml")])
@pytest.mark.gen_test
async def test_a_hangup_that_ends_the_service(tmp_path: Path, argv: tuple[str, ...]) -> None:
    """Where SIGHUP reads no file again, one line of the log names the signal and says that the service ends."""
    (tmp_path / "options.toml").write_text("max_in_flight = 5\n")
    running = await ServiceProcess.start(*(text.format(dir=tmp_path) for text in argv), FAL_KEY=KEY)
    running.process.send_signal(signal.SIGHUP)
    _, stderr = await running.ended()
    line = "WARNING tornado_fal_proxy: SIGHUP: the service ends, because it has no file to read again (see --config)"
    assert stderr.count(line) == stderr.count("SIGHUP") == 1


@pytest.mark.gen_test
async def test_nohup(processes: str) -> None:
    """SIGHUP is ignored if it was ignored at the start."""
    running = await ServiceProcess.start(processes, nohup=True, FAL_KEY=KEY)
    running.process.send_signal(signal.SIGHUP)
    os.killpg(running.pid, signal.SIGHUP)
    assert (await call(running.port, "GET", path="/healthz")).status == 200
    await running.end()


@pytest.mark.gen_test
async def test_no_orphans(setup: Setup) -> None:
    """When the parent is killed with SIGKILL, the workers finish their calls, accept no more, and end."""
    gate = Gate()
    upstream = await setup.upstream(gate)
    running = await ServiceProcess.in_front_of(setup, upstream, "--processes=2")
    waiting = [asyncio.create_task(call(running.port)) for _ in range(4)]
    await arrived(upstream, len(waiting))
    workers = running.workers()
    assert len(workers) == 2
    running.process.kill()
    await eventually(lambda: not connects(running.port))
    assert all(map(alive, workers))
    gate.open.set()
    assert [(await task).status for task in waiting] == [200] * 4
    await eventually(lambda: not any(map(alive, workers)))
    await running.process.communicate()


@pytest.mark.gen_test
async def test_a_worker_that_is_stopped_is_replaced(setup: Setup) -> None:
    """A worker that gets SIGTERM finishes its calls, and another replaces it."""
    gate = Gate()
    upstream = await setup.upstream(gate)
    running = await ServiceProcess.in_front_of(setup, upstream, "--processes=2")
    waiting = [asyncio.create_task(call(running.port)) for _ in range(4)]
    await arrived(upstream, len(waiting))
    before = set(running.workers())
    os.kill(min(before), signal.SIGTERM)
    gate.open.set()
    assert [(await task).status for task in waiting] == [200] * 4
    await running.log_line(r"worker replaced: process \d+ ended with exit code 0")
    await new_worker_serves(running, before)
    await running.end()


@pytest.mark.gen_test
async def test_a_worker_that_hangs_in_the_drain_is_killed(setup: Setup) -> None:
    """The service ends all the same, with exit code 3."""
    running = await ServiceProcess.start("--processes=2", "--drain-timeout-s=0", FAL_KEY=KEY)
    os.kill(min(running.workers()), signal.SIGSTOP)
    running.process.terminate()
    await running.ended(3)
