"""The service, and one server that goes through faults, or two servers in a network of their own."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.certificates import Authority
from tests.support.namespaces import lift_loopback
from tests.support.raw_client import call
from tests.support.recovery.load import KINDS, REAL_TIME, Load, LoadCall, is_right, recovery, repeated
from tests.support.service_process import ServiceProcess
from tests.support.tools import ROOT
from tests.support.waiting import TIMEOUT_S
from tests.support.wire import DEVICE, FAR, NEAR, Wire

if TYPE_CHECKING:
    from tests.support.recovery.faults import Fault

__all__ = ["REST_S", "Report", "Stand", "is_at_rest"]

# The sitecustomize.py of the service's process, which shortens two of the package's times.
SHORTER_TIMES = """
import tornado_fal_proxy.upstream.handles as handles
handles.CONNECTION_LIFETIME_S, handles.ADDRESS_LIFETIME_S = %d, 1
"""
# Limits how long the service takes to return to its former state: surplus pooled connections are closed when they are
# old.
REST_S = 75 if REAL_TIME else 30
# Limits how much memory the service keeps for the next calls. It has grown by more only until it gives memory back,
# which it does from 32 MB on, some seconds after a crowd has gone.
MAX_KB = 40_000


@dataclass
class Report:
    """The result of a fault. ``before`` and ``after`` count the service's resources while it had nothing to do."""

    fault: str
    protocol: str
    seen: dict[str, int] = field(default_factory=dict)
    recovered_s: float = 0.0
    slowest_s: float = 0.0
    repeated: int = 0  # failed calls of one client that began after the fault
    twice: list[int] = field(default_factory=list)  # POSTs that reached the upstream more than once
    deceived: list[str] = field(default_factory=list)  # POSTs that reached it, although the client may repeat them
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    how: str = ""
    error: str = ""


class Server:
    """A process in fal's place, which has the same port when it is started again."""

    def __init__(self, stand: "Stand", host: str, port: int = 0) -> None:
        self.host = host
        self.port = port
        self._stand = stand

    async def start(self) -> None:
        stand = self._stand
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.programs.faulty_upstream"),
            *(stand.certificate, self.host, str(self.port), stand.protocol, stand.executed),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.port = int(await self._read_line())

    async def do(self, mode: str) -> None:
        """Make the server act so from now on: ``mode`` is one of faulty_upstream.MODES."""
        assert self._process.stdin is not None
        self._process.stdin.write(mode.encode() + b"\n")
        assert await self._read_line() == mode

    async def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the process. Its exit code shows faults of its own, and of the HTTP that it received."""
        self.signal(number)
        assert await self._process.wait() == (0 if number == signal.SIGTERM else -number)

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _read_line(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(TIMEOUT_S):
            return (await self._process.stdout.readline()).decode().strip()


class Stand:
    """The service, and one server in fal's place, or two in a network of their own."""

    service: ServiceProcess
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
        self.wanted = ""  # the server that ought to respond
        self.recovery_began: float | None = None
        self.how = ""

    @classmethod
    @asynccontextmanager
    async def set_up(cls, protocol: str, fault: "Fault") -> AsyncIterator["Stand"]:
        """Start all that the fault needs, and end it with the context."""
        with tempfile.TemporaryDirectory() as directory:
            stand = cls(protocol, Path(directory))
            network = bool(fault.network)
            if network:
                await stand._set_up_network()
            else:
                stand.server = Server(stand, "127.0.0.1")
            await stand.server.start()
            stand.wanted = stand.server.host
            stand._sitecustomize.write_text("" if REAL_TIME else SHORTER_TIMES % fault.lifetime_s)
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
        """Give fal.run that address."""
        self._hosts.write_text(f"127.0.0.1 localhost\n{address} fal.run\n")

    def home(self) -> None:
        """Give fal.run its first address again."""
        self.name(FAR if self.wire else self.server.host)

    async def _start_service(self, *argv: str) -> None:
        self.service = await ServiceProcess.start(
            *argv,
            f"--ca-certs={self._authority.ca_file}",
            "--authorize=tests.support.programs.inside:authorize",
            FAL_KEY="key",
            PYTHONPATH=f"{self._directory}:{ROOT}",
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
            while (rest := await self.count_resources())["connections"] > 1:
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
        """Return the server that responds now."""
        return (await call(self.service.port, target="https://fal.run/short?id=0")).header("x-served-by")

    async def count_resources(self) -> dict[str, int]:
        """Count the service's resources just after a call, because libcurl closes old connections during calls."""
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

    async def suffer(self, name: str, fault: "Fault") -> Report:
        """Cause that fault, and report on it."""
        report = Report(name, self.protocol, before=self.rest)
        self.recovery_began, self.how = None, ""
        load = self.load = Load(self.service.port)
        await load.each_kind(0, self.wanted, TIMEOUT_S)
        await fault.happens(self)
        since = self.recovery_began or time.monotonic()
        await load.each_kind(since, self.wanted, fault.within_s + TIMEOUT_S)
        # All calls that were running at that time have ended when each client has made another call.
        await load.more(3 * sum(KINDS.values()))
        await load.stop()
        report.recovered_s = recovery(load.calls, since, self.wanted)
        report.repeated = repeated(load.calls, since, self.wanted)
        report.seen = dict(Counter(call.seen for call in load.calls))
        report.slowest_s = max(call.ended - call.began for call in load.calls)
        report.how = self.how
        if fault.is_undone is not None:
            await fault.is_undone(self)
        self._judge(report, load.calls)
        report.after = await self._come_to_rest()
        return report

    def _judge(self, report: Report, calls: list[LoadCall]) -> None:
        lines = [line.split() for line in self.executed.read_text().splitlines()]
        executed = Counter(int(number) for method, number in lines if method == "POST")
        posts = [call for call in calls if not call.kind.endswith("GET")]
        report.twice = [call.number for call in posts if executed[call.number] > 1]
        # fal's SDKs do not repeat an event stream that was aborted after its head.
        final = ("200", "413", "500")
        report.deceived = [
            f"{call.kind} {call.number}: {call.result}"
            for call in posts
            if executed[call.number] and call.result not in final and (call.kind, call.result) != ("stream", "aborted")
        ]

    async def _come_to_rest(self) -> dict[str, int]:
        give_up = time.monotonic() + REST_S
        while not is_at_rest(after := await self.count_resources(), self.rest) and time.monotonic() < give_up:
            await asyncio.sleep(0.1)
        return after


def is_at_rest(now: dict[str, int], before: dict[str, int]) -> bool:
    """Tell whether no resource has grown, except memory that is kept for the next calls."""
    counts = ("tasks", "calls", "transfers", "waiting", "files", "connections")
    return all(now[name] <= before[name] for name in counts) and now["kb"] <= before["kb"] + MAX_KB


def files(pid: int) -> Iterator[str]:
    """Return the files that the process has open."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            yield os.readlink(link)


def connections(pid: int, port: int, links: list[str]) -> list[str]:
    """Return the connections to that port among the files of a process."""
    remote = f":{port:04X}"
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [fields[9] for fields in lines if fields[2].endswith(remote) and f"socket:[{fields[9]}]" in links]
