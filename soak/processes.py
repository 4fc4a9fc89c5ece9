"""The two processes of a soak, what they say, and what the kernel and the service's window tell of them. Linux only."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path

from tests.support.tools import ROOT

__all__ = ["IDLE_TIMEOUT_S", "MAX_BODY_BYTES", "CannotStart", "Service", "Upstream"]

KEY = "id-of-a-soak:secret-of-a-soak"
IDLE_TIMEOUT_S = 4
MAX_BODY_BYTES = 2_000_000
START_S = 30.0
# Of the service's log so many lines are kept from where it says something that it must never say.
NOTED_LINES = 40
# And so many are remembered, for some seconds.
LAST_LINES = 500
_BAD = re.compile(rf"Traceback|Uncaught|{re.escape(KEY.partition(':')[2])}")
# Memory that belongs to processes alone: program text, which others on the machine share or not, would be noise.
_ANONYMOUS = re.compile(r"^Pss_Anon:\s+(\d+) kB", re.MULTILINE)


class CannotStart(Exception):
    """One of the processes does not."""


async def _start(*command: str, **environ: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *command),
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"} | environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=2**20,  # bytes in a line
        start_new_session=True,  # Ctrl-C is for the soak alone
    )


async def _first_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(START_S):
        if line := (await process.stdout.readline()).decode():
            return line
        raise CannotStart((await process.communicate())[1].decode().strip())


async def _kill(process: asyncio.subprocess.Process) -> None:
    """It and its workers, unless it has ended."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


class Upstream:
    """The stand-in for fal. ``executed`` counts how often each POST ran; ``failures`` is what it complains of.

    ``trouble`` are the times, of time.monotonic(), between which calls may fail, for it is not there, or was not.
    """

    def __init__(self, directory: Path) -> None:
        self.port = 0
        self.generation = 0
        self.executed = Counter[int]()
        self.failures: list[str] = []
        self.trouble: list[tuple[float, float]] = []
        self._directory = directory

    async def start(self) -> None:
        self._process = await _start("soak.upstream", str(self.port), str(self.generation), str(self._directory))
        self.port = int(await _first_line(self._process))
        self._readers = [asyncio.create_task(self._read_numbers()), asyncio.create_task(self._read_complaints())]

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        self._process.send_signal(how)
        await self._process.wait()
        await asyncio.gather(*self._readers)

    async def restart(self, how: signal.Signals, settle_s: float) -> None:
        """With that signal, and as another generation. Calls until so long afterwards may feel it."""
        gone, entry = time.monotonic(), len(self.trouble)
        self.trouble.append((gone, float("inf")))
        await self.stop(how)
        self.generation += 1
        await self.start()
        self.trouble[entry] = (gone, time.monotonic() + settle_s)

    async def kill(self) -> None:
        await _kill(self._process)

    async def _read_numbers(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if line.startswith(b"!"):
                self.failures.append(line.decode().strip()[1:])
            else:
                self.executed[int(line)] += 1

    async def _read_complaints(self) -> None:
        assert self._process.stderr is not None
        if complaints := (await self._process.stderr.read()).decode().strip():
            self.failures.append(complaints)


class Service:
    """The command under test. ``noted`` is where its log says what it must never say, with the lines that follow."""

    port: int

    def __init__(self, process: asyncio.subprocess.Process, window: Path, processes: int) -> None:
        self.noted: list[str] = []
        self.log_lines = 0
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._process, self._window, self._processes = process, window, processes
        self._reader = asyncio.create_task(self._read_log())

    @classmethod
    async def start(cls, upstream_port: int, processes: int, directory: Path) -> Service:
        process = await _start(
            *("soak.service", "--port=0", f"--processes={processes}", "--log-level=warning"),
            *(f"--idle-timeout-s={IDLE_TIMEOUT_S}", f"--max-body-bytes={MAX_BODY_BYTES}"),
            *(f"--connect-to=127.0.0.1:{upstream_port}", f"--ca-certs={directory / 'ca.pem'}"),
            FAL_KEY=KEY,
            SOAK_WINDOW=str(directory),
        )
        line = await _first_line(process)
        service = cls(process, directory, processes)
        service.port = int(line.rpartition(":")[2].partition("/")[0])
        return service

    @property
    def pid(self) -> int:
        return self._process.pid

    def serving(self) -> list[int]:
        """The processes that serve calls."""
        if self._processes == 1:
            return [self.pid]
        return list(map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()))

    async def counts(self) -> dict[str, int]:
        """What lives in the processes that serve, and the files that they have open, by kind."""
        total = Counter[str]()
        for pid in self.serving():
            path = self._window / str(pid)
            os.kill(pid, signal.SIGUSR2)
            async with asyncio.timeout(START_S):
                while not path.exists():
                    await asyncio.sleep(0.01)
            total.update(json.loads(path.read_text()))
            path.unlink()
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    name = os.readlink(file)
                    total["sockets" if name.startswith("socket:") else "other files"] += 1
        return dict(total)

    def memory_kb(self) -> int:
        """Of all its processes, without program text. What forked processes share counts once."""
        total = 0
        for pid in {self.pid, *self.serving()}:
            with suppress(OSError):  # it was killed just now
                match = _ANONYMOUS.search(Path(f"/proc/{pid}/smaps_rollup").read_text())
                total += int(match[1]) if match else 0
        return total

    def cpu_s(self) -> float:
        """What its processes, living and ended, have used."""
        ticks = 0
        for pid in {self.pid, *self.serving()}:
            # utime and stime, and the same of children that were waited for (proc_pid_stat(5)).
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def said(self, pattern: str) -> list[str]:
        """The last lines of the log that match."""
        return [line for line in self._last if re.search(pattern, line)]

    async def stop(self) -> int:
        """The exit code."""
        self._process.terminate()
        async with asyncio.timeout(START_S):
            code = await self._process.wait()
        await self._reader
        return code

    async def kill(self) -> None:
        await _kill(self._process)

    async def _read_log(self) -> None:
        assert self._process.stderr is not None
        wanted = 0
        async for data in self._process.stderr:
            line = data.decode(errors="replace").rstrip()
            self.log_lines += 1
            self._last.append(line)
            if _BAD.search(line) and len(self.noted) < 10 * NOTED_LINES:
                wanted = NOTED_LINES
            if wanted:
                wanted -= 1
                self.noted.append(line)
