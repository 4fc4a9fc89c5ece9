"""The two processes of a soak: their output, their counts from the service's window, and the kernel's. Linux only."""

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
# Limits each step of a process, such as its start: long enough for a busy machine.
STEP_TIMEOUT_S = 30.0
# Limits the lines that are kept from a line on that the log must never have: a traceback fits.
BAD_LINES = 40
# Limits the lines that are remembered to explain a bad call: those of some seconds.
LAST_LINES = 500
_BAD = re.compile(rf"Traceback|Uncaught|{re.escape(KEY.partition(':')[2])}")
# Memory that only these processes use. Program text, which others on the machine may share, would be noise.
_ANONYMOUS = re.compile(r"^Pss_Anon:\s+(\d+) kB", re.MULTILINE)


class CannotStart(Exception):
    """Report that one of the processes did not start."""


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
    async with asyncio.timeout(STEP_TIMEOUT_S):
        if line := (await process.stdout.readline()).decode():
            return line
        raise CannotStart((await process.communicate())[1].decode().strip())


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill the process and its workers, unless it has ended."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


class Upstream:
    """The stand-in for fal. ``executed`` counts how often each POST ran, and ``failures`` are its lines about errors.

    ``trouble`` has pairs of times, of time.monotonic(), between which calls may fail because it does not run, or did
    not run just before.
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
        self._readers = [asyncio.create_task(self._read_stdout()), asyncio.create_task(self._read_stderr())]

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        self._process.send_signal(how)
        await self._process.wait()
        await asyncio.gather(*self._readers)

    async def restart(self, how: signal.Signals, settle_s: float) -> None:
        """Stop it with that signal, and start its next generation. Calls may fail until ``settle_s`` later."""
        stopped, entry = time.monotonic(), len(self.trouble)
        self.trouble.append((stopped, float("inf")))
        await self.stop(how)
        self.generation += 1
        await self.start()
        self.trouble[entry] = (stopped, time.monotonic() + settle_s)

    async def kill(self) -> None:
        await _kill(self._process)

    async def _read_stdout(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if line.startswith(b"!"):
                self.failures.append(line.decode().strip()[1:])
            else:
                self.executed[int(line)] += 1

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        if text := (await self._process.stderr.read()).decode().strip():
            self.failures.append(text)


class Service:
    """The command under test. ``bad_lines`` are lines that its log must never have, with the lines behind them."""

    port: int

    def __init__(self, process: asyncio.subprocess.Process, window: Path, processes: int) -> None:
        self.bad_lines: list[str] = []
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
        """Return the ids of the processes that serve calls."""
        if self._processes == 1:
            return [self.pid]
        return list(map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()))

    async def counts(self) -> dict[str, int]:
        """Count the objects of the processes that serve, and the files that they have open, by kind."""
        total = Counter[str]()
        for pid in self.serving():
            path = self._window / str(pid)
            os.kill(pid, signal.SIGUSR2)
            async with asyncio.timeout(STEP_TIMEOUT_S):
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
        """Return the memory of all its processes, without program text. Pages that they share count once."""
        total = 0
        for pid in {self.pid, *self.serving()}:
            with suppress(OSError):  # it was killed just now
                match = _ANONYMOUS.search(Path(f"/proc/{pid}/smaps_rollup").read_text())
                total += int(match[1]) if match else 0
        return total

    def cpu_s(self) -> float:
        """Return the CPU time of its processes, also of those that have ended."""
        ticks = 0
        for pid in {self.pid, *self.serving()}:
            # utime and stime, and the same of children that were waited for (proc_pid_stat(5)).
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def log_lines_with(self, pattern: str) -> list[str]:
        """Return those of the last lines of the log in which ``pattern`` is found."""
        return [line for line in self._last if re.search(pattern, line)]

    async def stop(self) -> int:
        """Stop it, and return its exit code."""
        self._process.terminate()
        async with asyncio.timeout(STEP_TIMEOUT_S):
            code = await self._process.wait()
        await self._reader
        return code

    async def kill(self) -> None:
        await _kill(self._process)

    async def _read_log(self) -> None:
        assert self._process.stderr is not None
        remaining = 0
        async for data in self._process.stderr:
            line = data.decode(errors="replace").rstrip()
            self.log_lines += 1
            self._last.append(line)
            if _BAD.search(line) and len(self.bad_lines) < 10 * BAD_LINES:
                remaining = BAD_LINES
            if remaining:
                remaining -= 1
                self.bad_lines.append(line)
