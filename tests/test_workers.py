"""Several processes, a restart and an end that lose no call, and what systemd is told. On real processes, under load.

The tests under load run few rounds each. ``TORNADO_FAL_PROXY_ROUNDS=20 pytest -s -k load`` runs more of them, and of
the restarts behind nginx.
"""

import asyncio
import logging
import os
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from caller import Caller, call
from conftest import KEY, Setup, tool, unused_port
from load import ROUNDS, Load, answer
from running import COMMAND, TIMEOUT_S, WITH_KEY, Running, alive, arrived, connects, environment, eventually, serving
from upstream import Exchange

from tornado_fal_proxy.server import fair_share
from tornado_fal_proxy.workers import GIVE_UP_AFTER

JSON = [("content-type", "application/json")]


@pytest.fixture(params=["1", "2"])
def processes(request: pytest.FixtureRequest) -> str:
    """Runs the test once with a single process, and once with two workers."""
    return f"--processes={request.param}"


class Gate:
    """An upstream's handler that answers what it holds when it is opened."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.body()
        await self.open.wait()
        await exchange.respond(200, b"{}", JSON)


# Who takes a connection.

SHARES = [
    # mine, fewest of the others, how many may be taken
    (0, None, 128),
    (500, None, 128),
    (0, 0, 1),
    (1, 0, 0),
    (1, 1, 1),
    (8, 8, 3),
    (10, 8, 1),
    (11, 8, 0),
    (11, 9, 1),
    (0, 4000, 128),
]


@pytest.mark.parametrize(("mine", "fewest", "share"), SHARES)
def test_share(mine: int, fewest: int | None, share: int) -> None:
    """A worker takes a quarter more than the one that has fewest, and one; alone it takes what comes."""
    assert max(0, fair_share(mine, fewest)) == share


@pytest.mark.gen_test
async def test_connections_spread(setup: Setup) -> None:
    """Of 64 callers that connect at once each of two workers has 35 to 65 %, a new one as well as an old one."""
    running = await Running.start("--processes=2", FAL_KEY=KEY)
    for _ in range(2):
        callers = await asyncio.gather(*(Caller.open(running.port) for _ in range(64)))
        counts = {pid: len(serving(pid, running.port)) for pid in running.workers()}
        while sum(counts.values()) < 64:
            await asyncio.sleep(0.01)
            counts = {pid: len(serving(pid, running.port)) for pid in running.workers()}
        assert len(counts) == 2
        assert min(counts.values()) >= 0.35 * 64
        for caller in callers:
            await caller.close()
        victim = min(counts)
        os.kill(victim, signal.SIGKILL)
        await eventually(lambda victim=victim: len(set(running.workers()) - {victim}) == 2)  # type: ignore[misc]
        # It serves when it takes a connection that comes while the other has more.
        await new_worker_serves(running, set(counts))
    await running.end()


async def new_worker_serves(running: Running, old: set[int]) -> None:
    callers = []
    async with asyncio.timeout(TIMEOUT_S):
        while not any(serving(pid, running.port) for pid in running.workers() if pid not in old):
            callers.append(await Caller.open(running.port))
            await asyncio.sleep(0.05)
    for caller in callers:
        await caller.close()


def test_workers_that_die_at_start_end_the_service(tmp_path: Path) -> None:
    """With exit code 4 and a last line that says so, after a few tries; the log has the reason."""
    (tmp_path / "sitecustomize.py").write_text(
        "import tornado_fal_proxy.service as service\n"
        "async def _serve(*_): raise RuntimeError('no way')\n"
        "service._serve = _serve\n"
    )
    ended = subprocess.run(
        [*COMMAND, "--port=0", "--processes=2"],
        env=environment(WITH_KEY | {"PYTHONPATH": str(tmp_path)}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (4, "")
    assert re.fullmatch(
        rf"tornado-fal-proxy: {GIVE_UP_AFTER} worker processes in a row ended before they were ready; "
        r"the last with exit code 1; the log says why",
        ended.stderr.splitlines()[-1],
    )
    assert "RuntimeError: no way" in ended.stderr


# The end.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.gen_test
async def test_a_drain_finishes_what_it_has(setup: Setup, processes: str, number: signal.Signals) -> None:
    """Calls in flight are answered, with connection: close; the port is free at once; the exit code is 0."""
    gate = Gate()
    upstream = await setup.upstream(gate)
    running = await Running.before(setup, upstream, processes)
    callers = [await Caller.open(running.port) for _ in range(4)]
    for caller in callers:
        await caller.send()
    await arrived(upstream, len(callers))
    running.process.send_signal(number)
    await eventually(lambda: not connects(running.port))
    with socket.create_server(("127.0.0.1", running.port)):
        pass
    gate.open.set()
    for caller in callers:
        got = await caller.answer()
        assert (got.status, got.body, got.header("connection")) == (200, b"{}", "close")
        assert await caller.reader.read() == b""
        await caller.close()
    await running.ended()


@pytest.mark.gen_test
async def test_a_drain_serves_kept_connections(setup: Setup, processes: str) -> None:
    """A request on a connection that was kept is served, with connection: close; one that stays idle is closed."""
    gate = Gate()
    gate.open.set()
    upstream = await setup.upstream(gate)
    running = await Running.before(setup, upstream, processes, "--drain-timeout-s=3600")
    used, idle, fresh = [await Caller.open(running.port) for _ in range(3)]
    for caller in (used, idle):
        await caller.send()
        assert (await caller.answer()).header("connection") is None
    running.process.terminate()
    await eventually(lambda: not connects(running.port))
    await used.send()
    await fresh.send()
    for caller in (used, fresh):
        got = await caller.answer()
        assert (got.status, got.header("connection")) == (200, "close")
    assert await idle.reader.read() == b""
    for caller in (used, idle, fresh):
        await caller.close()
    await running.ended()


@pytest.mark.gen_test
async def test_a_stream_is_finished_in_a_drain(setup: Setup, processes: str) -> None:
    """One whose head has left long ago, too."""
    goes_on = asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.start(200, [("content-type", "text/event-stream")])
        await exchange.send(b"data: 1\n\n")
        await goes_on.wait()
        await exchange.send(b"data: 2\n\n")
        await exchange.end()

    running = await Running.before(setup, await setup.upstream(stream), processes)
    caller = await Caller.open(running.port)
    await caller.send()
    await caller.head()
    assert await caller.chunk() == b"data: 1\n\n"
    running.process.terminate()
    await eventually(lambda: not connects(running.port))
    goes_on.set()
    assert [await caller.chunk() for _ in range(2)] == [b"data: 2\n\n", b""]
    await caller.close()
    await running.ended()


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGQUIT, None)])
@pytest.mark.gen_test
async def test_a_second_signal_cuts(
    setup: Setup, processes: str, first: signal.Signals, second: signal.Signals | None
) -> None:
    """At once, and SIGQUIT does so by itself: a held POST is answered 500, and the exit code is 3."""
    upstream = await setup.upstream(Gate())
    running = await Running.before(setup, upstream, processes)
    held = [asyncio.create_task(call(running.port)) for _ in range(4)]
    await arrived(upstream, len(held))
    running.process.send_signal(first)
    await eventually(lambda: not connects(running.port))
    if second is not None:
        running.process.send_signal(second)
    assert [(await task).status for task in held] == [500] * 4
    await running.ended(3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.gen_test
async def test_a_signal_to_the_group_counts_once(setup: Setup, processes: str, number: signal.Signals) -> None:
    """Ctrl-C in a terminal and systemd's KillMode=control-group reach the workers as well, and still drain."""
    gate = Gate()
    upstream = await setup.upstream(gate)
    running = await Running.before(setup, upstream, processes)
    held = [asyncio.create_task(call(running.port)) for _ in range(4)]
    await arrived(upstream, len(held))
    os.killpg(running.pid, number)
    await eventually(lambda: not connects(running.port))
    gate.open.set()
    assert [(await task).status for task in held] == [200] * 4
    await running.ended()


@pytest.mark.gen_test
async def test_nohup(processes: str) -> None:
    """Where SIGHUP was ignored at the start it is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        running = await Running.start(processes, FAL_KEY=KEY)
    finally:
        signal.signal(signal.SIGHUP, before)
    running.process.send_signal(signal.SIGHUP)
    os.killpg(running.pid, signal.SIGHUP)
    assert (await call(running.port, "GET", path="/healthz")).status == 200
    await running.end()


@pytest.mark.gen_test
async def test_no_orphans(setup: Setup) -> None:
    """When the parent is killed with -9, the workers finish what they have, take nothing more, and end."""
    gate = Gate()
    upstream = await setup.upstream(gate)
    running = await Running.before(setup, upstream, "--processes=2")
    held = [asyncio.create_task(call(running.port)) for _ in range(4)]
    await arrived(upstream, len(held))
    workers = running.workers()
    assert len(workers) == 2
    running.process.kill()
    await eventually(lambda: not connects(running.port))
    assert all(map(alive, workers))
    gate.open.set()
    assert [(await task).status for task in held] == [200] * 4
    await eventually(lambda: not any(map(alive, workers)))
    await running.process.communicate()


@pytest.mark.gen_test
async def test_a_worker_that_is_told_to_end_is_replaced(setup: Setup) -> None:
    """SIGTERM to one worker: it finishes its calls, and another takes its place."""
    gate = Gate()
    upstream = await setup.upstream(gate)
    running = await Running.before(setup, upstream, "--processes=2")
    held = [asyncio.create_task(call(running.port)) for _ in range(4)]
    await arrived(upstream, len(held))
    before = set(running.workers())
    os.kill(min(before), signal.SIGTERM)
    gate.open.set()
    assert [(await task).status for task in held] == [200] * 4
    await running.said("ended with exit code 0 and is replaced")
    await new_worker_serves(running, before)
    await running.end()


@pytest.mark.gen_test
async def test_a_worker_that_hangs_in_the_drain_is_killed(setup: Setup) -> None:
    """The service ends all the same, with exit code 3."""
    running = await Running.start("--processes=2", "--drain-timeout-s=0", FAL_KEY=KEY)
    os.kill(min(running.workers()), signal.SIGSTOP)
    running.process.terminate()
    await running.ended(3)


# Under load.


@pytest.mark.gen_test(timeout=60 + 20 * ROUNDS)
async def test_load_restarts(setup: Setup) -> None:
    """With a socket that stays open no call fails however often the service is restarted, one after the other."""
    upstream = await setup.upstream(answer)
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        port = listener.getsockname()[1]
        running = await Running.before(setup, upstream, "--processes=2", listener=listener)
        async with Load(lambda _: Caller.open(port)) as load:
            for _ in range(ROUNDS):
                await load.more(200)
                await running.end()
                running = await Running.before(setup, upstream, "--processes=2", listener=listener)
            await load.more(200)
        assert load.failures == []
        await running.end()
        print(f"{load.done} calls, {ROUNDS} restarts")  # noqa: T201  (for who runs more rounds)


@pytest.mark.gen_test(timeout=60 + 20 * ROUNDS)
async def test_load_killed_worker(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a worker is killed with -9 its calls fail and no other, and a new one serves within 2 s."""
    monkeypatch.setattr(logging.getLogger("asyncio"), "disabled", True)  # the upstream still writes to the dead
    upstream = await setup.upstream(answer)
    running = await Running.before(setup, upstream, "--processes=2", "--log-level=error")
    times = []
    lost = 0
    async with Load(lambda _: Caller.open(running.port)) as load:
        for _ in range(ROUNDS):
            await load.more(200)
            before = set(running.workers())
            victim = min(before)
            os.kill(victim, signal.SIGSTOP)  # from here on it takes no connection
            its_callers = serving(victim, running.port)
            failed = len(load.failures)
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            await eventually(
                lambda before=before: any(  # type: ignore[misc]
                    serving(pid, running.port) for pid in running.workers() if pid not in before
                )
            )
            times.append(time.monotonic() - killed)
            await load.more(200)
            failures = load.failures[failed:]
            assert its_callers
            assert [failure for failure in failures if failure.port not in its_callers] == []
            lost += len(failures)
    assert load.failures[:lost] == load.failures
    assert max(times) < 2
    await running.end()
    print(f"{load.done} calls, {lost} lost to {ROUNDS} kills, slowest replacement {max(times):.2f} s")  # noqa: T201


# systemd.


@asynccontextmanager
async def notified(tmp_path: Path, abstract: bool = False) -> AsyncIterator[tuple[str, socket.socket]]:
    """What $NOTIFY_SOCKET is to be, and the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.setblocking(False)
        name = f"\0test-{os.getpid()}-{time.monotonic_ns()}" if abstract else str(tmp_path / "notify")
        manager.bind(name)
        yield name.replace("\0", "@"), manager


async def told(manager: socket.socket) -> str:
    async with asyncio.timeout(TIMEOUT_S):
        return (await asyncio.get_running_loop().sock_recv(manager, 4096)).decode()


async def within(seconds: float, manager: socket.socket) -> bytes | None:
    """What comes next, None when nothing does."""
    try:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(manager, 4096), seconds)
    except TimeoutError:
        return None


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.gen_test
async def test_readiness(setup: Setup, tmp_path: Path, processes: str, abstract: bool) -> None:
    """READY=1 once calls are served, STOPPING=1 when the drain begins, and no WATCHDOG=1 that nobody asked for."""
    upstream = await setup.upstream(gate := Gate())
    async with notified(tmp_path, abstract) as (name, manager):
        running = await Running.before(setup, upstream, processes, NOTIFY_SOCKET=name)
        assert await told(manager) == "READY=1"
        held = asyncio.create_task(call(running.port))
        await arrived(upstream, 1)
        running.process.terminate()
        assert await told(manager) == "STOPPING=1"
        gate.open.set()
        assert (await held).status == 200
        await running.ended()
        with pytest.raises(BlockingIOError):
            manager.recv(4096)


@pytest.mark.gen_test
async def test_watchdog(tmp_path: Path, processes: str) -> None:
    """WATCHDOG=1 comes several times in its period, as long as the loops of all workers turn."""
    async with notified(tmp_path) as (name, manager):
        running = await Running.start(processes, NOTIFY_SOCKET=name, WATCHDOG_USEC="200000", FAL_KEY=KEY)
        counts = Counter([await told(manager) for _ in range(10)])
        assert counts.keys() == {"READY=1", "WATCHDOG=1"}
        victim = max(running.workers(), default=running.pid)
        os.kill(victim, signal.SIGSTOP)
        async with asyncio.timeout(TIMEOUT_S):
            while await within(0.6, manager) is not None:
                pass
        os.kill(victim, signal.SIGCONT)
        assert await told(manager) == "WATCHDOG=1"
        await running.end()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.mark.gen_test
async def test_activated(listener: socket.socket, processes: str) -> None:
    """A socket that is open already is served, and wins over --address and --port, which is said."""
    port = listener.getsockname()[1]
    running = await Running.start(processes, "--port=1", listener=listener, FAL_PROXY_ADDRESS="::1", FAL_KEY=KEY)
    assert running.port == port
    await running.said("--address and --port not used: the listening sockets come from systemd")
    assert (await call(port, "GET", path="/healthz")).status == 200
    variables = Path(f"/proc/{running.pid}/environ").read_bytes()
    assert b"LISTEN_FDS=1" in variables
    await running.end()
    assert connects(port)


@pytest.mark.parametrize(
    ("environ", "redirection", "says"),
    [
        ({"LISTEN_FDS": "1", "LISTEN_FDNAMES": "http"}, "3</dev/null", r"descriptor 3 \(http\) from LISTEN_FDS is no"),
        ({"LISTEN_FDS": "1"}, "3<&-", r"descriptor 3 \(unknown\) from LISTEN_FDS is no listening stream socket"),
    ],
)
@pytest.mark.gen_test
async def test_not_a_listening_socket(environ: dict[str, str], redirection: str, says: str) -> None:
    """One line that names the descriptor, and exit code 1."""
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", f'export LISTEN_PID=$$; exec "$@" {redirection}', "sh", *COMMAND),
        env=environment(WITH_KEY | environ),
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await process.communicate()
    (line,) = stderr.decode().splitlines()
    assert process.returncode == 1
    assert re.search(says, line), line


@pytest.mark.gen_test
async def test_variables_of_another_process(processes: str) -> None:
    """LISTEN_FDS and WATCHDOG_USEC that name another process are not for this one."""
    running = await Running.start(
        processes, LISTEN_FDS="1", LISTEN_PID="1", WATCHDOG_USEC="1", WATCHDOG_PID="1", FAL_KEY=KEY
    )
    assert (await call(running.port, "GET", path="/healthz")).status == 200
    await running.end()


@pytest.mark.gen_test
async def test_systemd_socket_activate(processes: str) -> None:
    """systemd's own tool opens the socket and starts the service at the first connection, which is served."""
    program = tool("systemd-socket-activate")
    port = unused_port()
    process = await asyncio.create_subprocess_exec(
        *(program, f"--listen=127.0.0.1:{port}", "-E", "FAL_KEY", "-E", "PYTHONPATH", *COMMAND, processes),
        env=environment(WITH_KEY),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    await eventually(lambda: connects(port))
    health = await call(port, "GET", path="/healthz")
    assert health.status == 200
    process.terminate()
    stdout, _ = await process.communicate()
    assert f"listens on http://127.0.0.1:{port}/".encode() in stdout
    assert process.returncode == 0


# Open files.


def limited(soft: int, hard: int) -> list[str]:
    """The command with that limit of open files."""
    return ["sh", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"', "sh", *COMMAND]


@pytest.mark.gen_test
async def test_the_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch, processes: str) -> None:
    """To the hard limit; and where that is too low for max_in_flight, a warning says what to set."""
    monkeypatch.setattr("running.COMMAND", limited(64, 2000))
    running = await Running.start(processes, "--max-in-flight=1900", FAL_KEY=KEY)
    for pid in (running.pid, *running.workers()):
        assert re.search(r"Max open files\s+2000\s+2000", Path(f"/proc/{pid}/limits").read_text())
    line = await running.said("--max-in-flight=1900 takes up to 2076 open files")
    assert re.search(r"LimitNOFILE=2076.* or set --max-in-flight=1824$", line.strip()), line
    await running.end()
    running = await Running.start(processes, "--max-in-flight=1824", FAL_KEY=KEY)
    _, stderr = await running.end()
    assert "open files" not in stderr


def cpu_s(pid: int) -> float:
    """User and system time of that process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.gen_test
async def test_out_of_open_files(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections beyond the limit are answered 503, one line is logged, and it recovers when others leave."""
    monkeypatch.setattr("running.COMMAND", limited(64, 64))
    gate = Gate()
    gate.open.set()
    running = await Running.before(setup, await setup.upstream(gate), "--max-in-flight=10")
    idle = [await Caller.open(running.port) for _ in range(50)]
    statuses = Counter([(await call(running.port)).status for _ in range(10)])
    assert statuses == {503: 10}
    refused = await call(running.port)
    assert refused.message == "The proxy has no room for another connection; try again."
    assert refused.header("connection") == "close"
    # Calls on connections that it has are served.
    await idle[0].send()
    assert (await idle[0].answer()).status == 200
    # Now so many that it cannot even accept them.
    more = [await Caller.open(running.port) for _ in range(30)]
    used = cpu_s(running.pid)
    await asyncio.sleep(1)
    assert cpu_s(running.pid) - used < 0.5  # it does not try again and again
    for caller in (*idle, *more):
        caller.leave()
    await eventually(lambda: not serving(running.pid, running.port))
    assert (await call(running.port)).status == 200
    _, stderr = await running.end()
    assert len(re.findall("too few open files|cannot accept", stderr)) == 1, stderr


@pytest.mark.gen_test
async def test_out_of_open_files_over_http1(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each call also takes a connection to fal, those without one are answered 502 or 503; it recovers."""
    monkeypatch.setattr("running.COMMAND", limited(64, 64))
    gate = Gate()
    upstream = await setup.upstream(gate, "http/1.1")
    running = await Running.before(setup, upstream, "--log-level=error")
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
