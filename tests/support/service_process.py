"""Run the command as a process."""

import asyncio
import atexit
import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support import leftovers
from tests.support.proxy import KEY, Setup
from tests.support.tools import ROOT
from tests.support.waiting import TIMEOUT_S
from tornado_fal_proxy import __version__

__all__ = [
    "ACTIVATE",
    "COMMAND",
    "WITH_KEY",
    "Ended",
    "ServiceProcess",
    "alive",
    "connects",
    "environment",
    "listening",
    "serving",
    "shell",
    "text_of",
]

COMMAND = [sys.executable, "-m", "tornado_fal_proxy"]
WITH_KEY = {"FAL_KEY": KEY}
Ended = subprocess.CompletedProcess[str]
# Runs a command with a listening socket as its descriptor 3, as systemd does for a socket unit.
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def environment(given: dict[str, str]) -> dict[str, str]:
    """Return a new environment: no variable of the developer decides a test, and the package is this checkout's."""
    return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT)} | given


def shell(redirection: str, *argv: str, **environ: str) -> Ended:
    """Run the command to its end under a shell that redirects its output."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND, *argv],
        env=environment(environ),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


class ServiceProcess:
    """The command, started and listening on a free port. ``line`` is the first line of its output."""

    process: asyncio.subprocess.Process
    line: str
    port: int

    @classmethod
    async def start(
        cls,
        *argv: str,
        listener: socket.socket | None = None,
        cwd: Path | None = None,
        nohup: bool = False,
        **environ: str,
    ) -> "ServiceProcess":
        """Start the command in the directory ``cwd``. With ``listener`` pass that socket on, as systemd does.

        It ignores SIGHUP with ``nohup`` only, and not because the tests were started in that way.
        """
        running = cls()
        command = [*COMMAND, *([] if listener else ["--port=0"]), *argv]
        more: dict[str, Any] = {}
        if listener is not None:
            command = [sys.executable, "-c", ACTIVATE, str(listener.fileno()), *command]
            more = {"pass_fds": [listener.fileno()]}
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        try:
            running.process = await asyncio.create_subprocess_exec(
                *command,
                cwd=cwd,
                env=environment(environ),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a group that a test can signal
                **more,
            )
        finally:
            signal.signal(signal.SIGHUP, before)
        leftovers.add(running)
        atexit.register(running.kill)
        assert running.process.stdout is not None
        running.line = (await running.process.stdout.readline()).decode()
        match = re.fullmatch(
            rf"tornado-fal-proxy {re.escape(__version__)} listens on http://.*:([0-9]+)/.*", text_of(running.line)
        )
        if match is None:
            raise AssertionError((await running.process.communicate())[1].decode())
        running.port = int(match[1])
        return running

    @classmethod
    async def in_front_of(
        cls, setup: Setup, upstream: Any, *argv: str, listener: socket.socket | None = None, **environ: str
    ) -> "ServiceProcess":
        """Start the command with that upstream in fal's place."""
        config = setup.config(upstream)
        assert config.ca_certs is not None
        assert config.connect_to is not None
        return await cls.start(
            *argv,
            listener=listener,
            cwd=None,
            nohup=False,
            FAL_KEY=KEY,
            FAL_PROXY_CA_CERTS=config.ca_certs,
            FAL_PROXY_CONNECT_TO=config.connect_to,
            **environ,
        )

    async def admin_port(self) -> int:
        """Return the port for the operator's tools, which the last line of the start names."""
        line = json.loads(self.line)["admin"] if self.line.startswith("{") else ""
        while not line.startswith(("http", "admin: ")):
            assert self.process.stdout is not None
            line = (await self.process.stdout.readline()).decode()
            assert line
        (port,) = re.findall(r"http://127\.0\.0\.1:([0-9]+) has a status page", line)
        return int(port)

    async def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[str, str]:
        """Send the signal, require exit code 0, and return the rest of stdout and stderr."""
        self.process.send_signal(number)
        return await self.ended()

    async def ended(self, code: int = 0) -> tuple[str, str]:
        """Wait for the end, require that exit code, and return the rest of stdout and stderr."""
        async with asyncio.timeout(TIMEOUT_S):
            stdout, stderr = await self.process.communicate()
        assert "Traceback" not in stderr.decode(), stderr.decode()[-6000:]
        assert self.process.returncode == code, stderr.decode()
        return stdout.decode(), stderr.decode()

    def kill(self) -> None:
        """Kill the process and its workers if a test has left them running. Called also when the tests end."""
        with suppress(OSError):
            if f"PPid:\t{os.getpid()}\n" in Path(f"/proc/{self.pid}/status").read_text():
                os.killpg(self.pid, signal.SIGKILL)

    async def abandon(self) -> None:
        """Kill the process and its workers if they run, and close the pipes."""
        self.kill()
        await self.process.wait()
        self.process._transport.close()  # type: ignore[attr-defined]

    @property
    def pid(self) -> int:
        return self.process.pid

    def workers(self) -> list[int]:
        """Return the pids of the workers that are alive."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [pid for pid in map(int, children) if alive(pid)]

    async def log_line(self, pattern: str) -> str:
        """Return the next line on stderr that matches."""
        assert self.process.stderr is not None
        async with asyncio.timeout(TIMEOUT_S):
            while line := (await self.process.stderr.readline()).decode():
                if re.search(pattern, line):
                    return line
        raise AssertionError(f"the service ended without logging {pattern!r}")


def text_of(line: str) -> str:
    """Return the message of a line of the output, which may be JSON."""
    return str(json.loads(line)["message"]) if line.startswith("{") else line.rstrip("\n")


def connects(port: int) -> bool:
    """Tell whether a connection to that port succeeds."""
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def alive(pid: int) -> bool:
    """Tell whether that process exists and has not ended. A zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def serving(pid: int, port: int) -> set[int]:
    """Return the clients' ports of all connections to ``port`` that the process ``pid`` serves."""
    return {remote for local, remote in _sockets(pid) if local == port and remote}


def listening(pid: int) -> set[int]:
    """Return the TCP ports on which that process listens."""
    return {local for local, remote in _sockets(pid) if not remote}


def _sockets(pid: int) -> list[tuple[int, int]]:
    """Return the own and the remote port of each TCP socket over IPv4 of that process. 0 is no remote port."""
    files = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):
            files.add(os.readlink(link))
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [
        (int(fields[1].partition(":")[2], 16), int(fields[2].partition(":")[2], 16))
        for fields in lines
        if f"socket:[{fields[9]}]" in files
    ]
