"""What callers see of each fault of fal's side, how soon it is over, and what of it stays in the service.

Strategy. The service is the command, and what stands in fal's place a process too (faulty.py). Some thirty callers make
short calls, long polls and event streams before a fault, during it and after it, each call with a number of its own, by
which what reached the upstream is known afterwards. Then the callers go, and the service must hold what it held before.
One service goes through all faults of its protocol, so that what one leaves behind would show in the next.

``recovery.py PROTOCOL FAULT...`` is a process of its own, which test_recovery.py starts, in a network of its own for
the faults that need one. It prints a line of JSON for each fault.

Where the service waits for tens of seconds it is told to wait for a few. With TORNADO_FAL_PROXY_REAL_TIME=1 its own
times count, and all of it takes minutes.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from caller import Caller, call
from faulty import EVENT, EVENTS
from running import TIMEOUT_S, Running
from strangers import lift_loopback
from upstream import Authority
from wire import DEVICE, FAR, NEAR, Wire

__all__ = ["FAULTS", "REAL_TIME", "Fault", "Report"]

REAL_TIME = bool(os.environ.get("TORNADO_FAL_PROXY_REAL_TIME"))
# Seconds without a byte, after which a call is ended.
IDLE_S = 40 if REAL_TIME else 3
# For so long at most a connection takes new calls, where a fault does not say otherwise.
LIFETIME_S = 1
HASTE = """
import tornado_fal_proxy.upstream as upstream
upstream.CONNECTION_LIFETIME_S, upstream.ADDRESS_LIFETIME_S = %d, 1
"""
# Enough for a slow machine to greet all callers at once, which is how they come back from some faults.
CONNECT_S = 5
# Where packets get lost the same one may be lost three times.
PATIENT_S = 30
# How long it may take until all is as it was: pooled connections that are too many are closed when they are old.
REST_S = 75 if REAL_TIME else 30
# For all faults of a protocol; far more than they take.
MOST_S = 1800 if REAL_TIME else 180

# Callers of each kind, and how long those with short calls wait between two.
KINDS = {"short POST": 8, "short GET": 6, "poll POST": 4, "poll GET": 4, "stream": 6}
LEAST_PAUSE_S, MOST_PAUSE_S = 0.1, 0.3
BOTH = ("h2", "http/1.1")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Call:
    """A call of the load: what became of it, the server that answered it, and when."""

    kind: str
    number: int
    what: str
    by: str
    began: float
    ended: float

    @property
    def seen(self) -> str:
        """As it is counted: ``POST 500``, ``GET 502``, ``stream cut``."""
        return f"{self.kind.split()[-1]} {self.what}"


@dataclass
class Report:
    """What came of a fault. ``before`` and ``after`` are what the service held when there was nothing to do."""

    fault: str
    protocol: str
    seen: dict[str, int] = field(default_factory=dict)
    recovered_s: float = 0.0
    slowest_s: float = 0.0
    twice: list[int] = field(default_factory=list)  # POSTs that reached the upstream more than once
    deceived: list[str] = field(default_factory=list)  # POSTs that did and whose caller is told to repeat them
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    how: str = ""
    error: str = ""


class Load:
    """The callers, and all calls that they have made. Stop it to let each finish its call."""

    def __init__(self, port: int) -> None:
        self.calls: list[Call] = []
        self.body = b"{}"
        self._port = port
        self._stopped = False
        self._numbers = iter(range(time.monotonic_ns() // 1000, sys.maxsize))
        self._tasks = [asyncio.create_task(self._life(kind)) for kind, callers in KINDS.items() for _ in range(callers)]

    async def until(self, holds: Callable[[], Any], seconds: float = TIMEOUT_S) -> None:
        async with asyncio.timeout(seconds):
            while not holds():
                await asyncio.sleep(0.02)

    async def more(self, count: int) -> None:
        """Until so many more calls have ended."""
        wanted = len(self.calls) + count
        await self.until(lambda: len(self.calls) >= wanted)

    async def each_kind(self, since: float, by: str, seconds: float) -> None:
        """Until callers of each kind have had a right answer from that server, to a call made since then."""
        await self.until(
            lambda: {call.kind for call in self.calls if call.began >= since and is_right(call, by)} == set(KINDS),
            seconds,
        )

    async def goes_wrong(self) -> None:
        """Until callers of each kind have felt the fault."""
        await self.until(
            lambda: {call.kind for call in self.calls if call.what != "200"} == set(KINDS), IDLE_S + TIMEOUT_S
        )

    async def stop(self) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _life(self, kind: str) -> None:
        caller: Caller | None = None
        while not self._stopped:
            if caller is not None and caller.reader.at_eof():  # closed between two calls, as may always be
                await caller.close()
                caller = None
            if caller is None:
                caller = await Caller.open(self._port)
            number, began = next(self._numbers), time.monotonic()
            what, by, keep = await self._call(caller, kind, number)
            self.calls.append(Call(kind, number, what, by, began, time.monotonic()))
            if not keep:
                caller.leave()
                caller = None
            if kind.startswith("short") or what != "200":
                await asyncio.sleep(random.uniform(LEAST_PAUSE_S, MOST_PAUSE_S))
        if caller is not None:
            await caller.close()

    async def _call(self, caller: Caller, kind: str, number: int) -> tuple[str, str, bool]:
        path = kind.split()[0]
        try:
            async with asyncio.timeout(IDLE_S + PATIENT_S + TIMEOUT_S):
                await caller.send(
                    "GET" if kind.endswith("GET") else "POST", self.body, target=f"https://fal.run/{path}?id={number}"
                )
                answer = await caller.head()
        except TimeoutError:
            return "without end", "", False
        except (OSError, EOFError) as exc:
            return f"without answer ({exc!r})", "", False
        by = answer.header("x-served-by") or ""
        try:
            async with asyncio.timeout(IDLE_S + PATIENT_S + TIMEOUT_S):
                await caller.rest(answer)
        except TimeoutError:
            return "without end", by, False
        except (OSError, EOFError, ValueError):
            return "cut", by, False
        right = b"".join(EVENT % n for n in range(EVENTS)) if path == "stream" else b"[%d]" % number
        if answer.status == 200 and answer.body != right:
            return f"wrong ({answer.body!r})", by, False
        return str(answer.status), by, answer.header("connection") != "close"


def is_right(call: Call, by: str) -> bool:
    return call.what == "200" and call.by == by


class Server:
    """A process in fal's place. It keeps its port when it is started again."""

    def __init__(self, stand: "Stand", host: str, port: int = 0) -> None:
        self.host = host
        self.port = port
        self._stand = stand

    async def start(self) -> None:
        stand = self._stand
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, HERE / "faulty.py", stand.certificate, self.host, str(self.port)),
            *(stand.protocol, stand.executed),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.port = int(await self._says())

    async def do(self, mode: str) -> None:
        """What it does from now on: one of faulty.MODES."""
        assert self._process.stdin is not None
        self._process.stdin.write(mode.encode() + b"\n")
        assert await self._says() == mode

    async def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it. Its exit code says whether anything was wrong with it, or with the HTTP that it was spoken to."""
        self.signal(number)
        assert await self._process.wait() == (0 if number == signal.SIGTERM else -number)

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _says(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(TIMEOUT_S):
            return (await self._process.stdout.readline()).decode().strip()


class Stand:
    """The service, and in front of it one server, or two and a network of their own."""

    service: Running
    server: Server
    other: Server
    wire: Wire | None = None
    load: Load
    rest: dict[str, int]

    def __init__(self, protocol: str, directory: Path) -> None:
        self.protocol = protocol
        self.certificate = directory / "certificate.pem"
        self.executed = directory / "executed"
        self._authority = Authority(directory)
        self._authority.write_certificate(self.certificate)
        self._hosts = directory / "hosts"
        self._sitecustomize = directory / "sitecustomize.py"
        self._directory = directory
        self.wanted = ""  # the server that ought to answer
        self.recovery_began: float | None = None
        self.how = ""

    @classmethod
    @asynccontextmanager
    async def set_up(cls, protocol: str, fault: "Fault") -> AsyncIterator["Stand"]:
        with tempfile.TemporaryDirectory() as directory:
            stand = cls(protocol, Path(directory))
            network = bool(fault.network)
            if network:
                await stand._set_up_network()
            else:
                stand.server = Server(stand, "127.0.0.1")
            await stand.server.start()
            stand.wanted = stand.server.host
            stand._sitecustomize.write_text("" if REAL_TIME else HASTE % fault.lifetime_s)
            await stand._start_service(
                *(() if network else (f"--connect-to=127.0.0.1:{stand.server.port}",)),
                f"--idle-timeout-s={fault.idle_s}",
                f"--connect-timeout-s={fault.connect_s}",
            )
            try:
                await stand._warm_up()
                yield stand
            finally:
                await stand._tear_down(network)

    async def _set_up_network(self) -> None:
        lift_loopback()
        near = "127.0.0.1"
        if os.access(DEVICE, os.R_OK | os.W_OK):
            near, self.wire = NEAR, Wire(443)
        self.server, self.other = Server(self, near, 443), Server(self, "127.0.0.2", 443)
        await self.other.start()
        self.name(FAR if self.wire else near)
        subprocess.run(["mount", "--bind", self._hosts, "/etc/hosts"], check=True)

    def name(self, address: str) -> None:
        """fal.run is at that address from now on."""
        self._hosts.write_text(f"127.0.0.1 localhost\n{address} fal.run\n")

    def home(self) -> None:
        """Where it was in the beginning."""
        self.name(FAR if self.wire else self.server.host)

    async def _start_service(self, *argv: str) -> None:
        self.service = await Running.start(
            *argv,
            f"--ca-certs={self._authority.ca_file}",
            "--authorize=inside:authorize",
            cwd=HERE,
            FAL_KEY="key",
            PYTHONPATH=str(self._directory),
        )
        self._log: list[bytes] = []
        self._reading = asyncio.create_task(self._read_log())

    async def _read_log(self) -> None:
        assert self.service.process.stderr is not None
        async for line in self.service.process.stderr:
            self._log.append(line)

    async def _warm_up(self) -> None:
        self.load = Load(self.service.port)
        await self.load.each_kind(0, self.wanted, TIMEOUT_S)
        await self.load.more(60)
        await self.load.stop()
        assert all(is_right(call, self.wanted) for call in self.load.calls), self.load.calls
        async with asyncio.timeout(REST_S):
            while (rest := await self.holds())["connections"] > 1:
                await asyncio.sleep(0.1)
        self.rest = rest

    async def _tear_down(self, network: bool) -> None:
        self.load.cancel()
        self.service.process.terminate()
        await self.service.process.wait()
        await self._reading
        for server in (self.server, self.other) if network else (self.server,):
            server.signal(signal.SIGCONT)
            await server.end()
        if network:
            subprocess.run(["umount", "/etc/hosts"], check=True)
        if self.wire is not None:
            self.wire.close()
        log = b"".join(self._log).decode()
        assert "Traceback" not in log, log

    async def serves(self) -> str | None:
        """The server that answers now."""
        return (await call(self.service.port, target="https://fal.run/short?id=0")).header("x-served-by")

    async def holds(self) -> dict[str, int]:
        """What the service holds, just after a call, with which libcurl closes what is too old."""
        port, pid = self.service.port, self.service.pid
        assert (await call(port, "GET", target="https://fal.run/short?id=0")).status == 200
        inside = json.loads((await call(port, "GET", target="https://fal.run/inside")).message)
        links = list(files(pid))
        status = Path(f"/proc/{pid}/status").read_text()
        return {
            **inside,
            "files": len(links),
            "connections": len(connections(pid, self.server.port, links)),
            "kb": int(status.partition("VmRSS:")[2].split()[0]),
        }

    async def suffer(self, name: str) -> Report:
        """Go through that fault."""
        fault = FAULTS[name]
        report = Report(name, self.protocol, before=self.rest)
        self.recovery_began, self.how = None, ""
        load = self.load = Load(self.service.port)
        await load.each_kind(0, self.wanted, TIMEOUT_S)
        await fault.happens(self)
        since = self.recovery_began or time.monotonic()
        await load.each_kind(since, self.wanted, fault.within_s + TIMEOUT_S)
        # Whatever was on its way then has ended when each caller has made another call.
        await load.more(3 * sum(KINDS.values()))
        await load.stop()
        report.recovered_s = recovery(load.calls, since, self.wanted)
        report.seen = dict(Counter(call.seen for call in load.calls))
        report.slowest_s = max(call.ended - call.began for call in load.calls)
        report.how = self.how
        if fault.is_undone is not None:
            await fault.is_undone(self)
        self._judge(report, load.calls)
        report.after = await self._come_to_rest()
        return report

    def _judge(self, report: Report, calls: list[Call]) -> None:
        lines = [line.split() for line in self.executed.read_text().splitlines()]
        executed = Counter(int(number) for method, number in lines if method == "POST")
        posts = [call for call in calls if not call.kind.endswith("GET")]
        report.twice = [call.number for call in posts if executed[call.number] > 1]
        # An event stream that broke off after its head is not repeated by fal's clients.
        final = ("200", "413", "500")
        report.deceived = [
            f"{call.kind} {call.number}: {call.what}"
            for call in posts
            if executed[call.number] and call.what not in final and (call.kind, call.what) != ("stream", "cut")
        ]

    async def _come_to_rest(self) -> dict[str, int]:
        give_up = time.monotonic() + REST_S
        while not is_at_rest(after := await self.holds(), self.rest) and time.monotonic() < give_up:
            await asyncio.sleep(0.1)
        return after


def is_at_rest(now: dict[str, int], before: dict[str, int]) -> bool:
    """Whether nothing is held that was not, but for what memory is kept for the next calls."""
    return all(now[what] <= before[what] for what in ("tasks", "calls", "transfers", "waiting", "files", "connections"))


def files(pid: int) -> Iterator[str]:
    """What that process has open."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            yield os.readlink(link)


def connections(pid: int, port: int, links: list[str]) -> list[str]:
    """Connections to that port among the files of a process."""
    remote = f":{port:04X}"
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [fields[9] for fields in lines if fields[2].endswith(remote) and f"socket:[{fields[9]}]" in links]


def recovery(calls: list[Call], since: float, wanted: str) -> float:
    """How long after that time the last call ended that went wrong, or the first right one of the slowest kind."""
    later = [call for call in calls if call.began >= since]
    wrong = [call.ended for call in later if not is_right(call, wanted)]
    short = [kind for kind in KINDS if kind.startswith("short")]
    first = [min(call.ended for call in later if call.kind == kind and is_right(call, wanted)) for kind in short]
    return round(max(wrong + first) - since, 2)


# The faults.

FAULT_S = 1.5


async def is_killed(stand: Stand) -> None:
    await stand.server.end(signal.SIGKILL)
    await stand.load.more(40)
    await stand.server.start()


async def is_restarted(stand: Stand) -> None:
    await stand.server.end()
    await stand.server.start()


async def is_stopped(stand: Stand) -> None:
    stand.server.signal(signal.SIGSTOP)
    await stand.load.goes_wrong()
    stand.server.signal(signal.SIGCONT)


def does(mode: str, count: int = 0, body: bytes = b"{}") -> Callable[[Stand], Awaitable[None]]:
    """The server misbehaves in that way for a while, and until so many calls have ended."""

    async def happens(stand: Stand) -> None:
        stand.load.body = body
        await stand.server.do(mode)
        await asyncio.sleep(FAULT_S)
        await stand.load.more(count)
        stand.load.body = b"{}"
        await stand.server.do("fine")

    return happens


async def vanishes(stand: Stand) -> None:
    assert stand.wire is not None
    stand.recovery_began = time.monotonic()
    stand.wire.cut()


async def is_far_and_lossy(stand: Stand) -> None:
    assert stand.wire is not None
    stand.how = stand.wire.be_bad(0.2, 0.02)
    since = time.monotonic()
    await stand.load.each_kind(since, stand.wanted, TIMEOUT_S)
    await stand.load.more(100)
    stand.wire.be_good()


async def is_near_again(stand: Stand) -> None:
    if stand.wire is not None:
        stand.wire.be_good()


async def moves(stand: Stand) -> None:
    stand.recovery_began = time.monotonic()
    stand.wanted = stand.other.host
    stand.name(stand.other.host)


async def moves_and_ends(stand: Stand) -> None:
    await moves(stand)
    await stand.server.end()


async def moves_back(stand: Stand) -> None:
    await stand.server.end()
    await stand.server.start()
    stand.wanted = stand.server.host
    stand.home()
    async with asyncio.timeout(REST_S):
        while await stand.serves() != stand.wanted:
            await asyncio.sleep(0.1)


@dataclass(frozen=True)
class Fault:
    """``bad`` is what callers may see of it, ``felt`` that of which they do see some; all else is answered rightly.

    ``within_s`` is how soon it is over. Then ``is_undone`` makes things as they were, where that is needed.
    """

    happens: Callable[[Stand], Awaitable[None]]
    bad: frozenset[str] = frozenset()
    felt: frozenset[str] = frozenset()
    within_s: float = 2.0
    protocols: tuple[str, ...] = BOTH
    network: str = ""  # of its own, and what must be there: "names" or "wire"
    idle_s: int = IDLE_S
    connect_s: int = CONNECT_S
    lifetime_s: int = LIFETIME_S
    is_undone: Callable[[Stand], Awaitable[None]] | None = None


BROKEN = frozenset({"POST 500", "GET 502", "stream 500", "stream cut"})
NOT_SENT = frozenset({"POST 502", "stream 502"})
TOO_SLOW = frozenset({"POST 500", "POST 504", "GET 504", "stream 500", "stream 504", "stream cut"})

FAULTS = {
    "killed": Fault(is_killed, BROKEN | NOT_SENT, NOT_SENT),
    "restarted": Fault(is_restarted, BROKEN | NOT_SENT, BROKEN),
    "stopped": Fault(is_stopped, TOO_SLOW, frozenset({"POST 500", "GET 504"})),
    "every third connection reset": Fault(does("connection resets", 120), BROKEN, BROKEN),
    "GOAWAY, streams go on": Fault(does("goaway"), protocols=("h2",)),
    "GOAWAY and close": Fault(does("goaway and close"), BROKEN, BROKEN, protocols=("h2",)),
    "RST_STREAM for every third": Fault(
        does("stream resets", 40), BROKEN, frozenset({"POST 500", "stream cut"}), protocols=("h2",)
    ),
    "one stream at a time": Fault(does("one stream", 40), protocols=("h2",)),
    "a byte a second": Fault(does("trickle")),
    "answer before the body": Fault(
        does("early answer", 40, b"{%b}" % (b" " * 400_000)),
        # Over HTTP/1.1 the answer is lost when the connection is reset before libcurl has read it.
        frozenset({"POST 413", "POST 500", "POST 502", "stream 413", "stream 500", "stream 502"}),
        frozenset({"POST 413"}),
    ),
    # The connection would take calls for far longer than it may, were it not ended.
    "half-open": Fault(
        vanishes,
        BROKEN | TOO_SLOW,
        frozenset({"POST 500"}),
        40 if REAL_TIME else 10,
        network="wire",
        lifetime_s=20,
        is_undone=is_near_again,
    ),
    "200 ms and 2 % loss": Fault(is_far_and_lossy, within_s=5, network="wire", idle_s=PATIENT_S, connect_s=PATIENT_S),
    "name moves, old server ends": Fault(
        moves_and_ends, BROKEN | NOT_SENT, BROKEN, 60, network="names", is_undone=moves_back
    ),
    "name moves, old server stays": Fault(moves, within_s=60, network="names", is_undone=moves_back),
}


async def main(protocol: str, names: list[str]) -> None:
    waiting = list(names)
    while waiting:
        async with Stand.set_up(protocol, FAULTS[names[0]]) as stand:
            while waiting:
                name = waiting.pop(0)
                try:
                    report = await stand.suffer(name)
                except Exception:  # noqa: BLE001  (the test says it; the other faults have a stand of their own)
                    report = Report(name, protocol, error=traceback.format_exc())
                    report.seen = dict(Counter(call.seen for call in stand.load.calls))
                print(json.dumps(asdict(report)), flush=True)  # noqa: T201
                if report.error:
                    break


if __name__ == "__main__":
    asyncio.run(asyncio.wait_for(main(sys.argv[1], sys.argv[2:]), MOST_S))
