"""Processes that the benchmark starts: the upstream, and one peer at a time or several.

Each is the head of a process group of its own, which ends with it. Its output goes to a file, which is shown if it does
not start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

__all__ = ["KEY", "CannotStart", "Server", "Upstream", "free_port", "make_certificates", "server", "upstream"]

HERE = Path(__file__).parent
HOST = "127.0.0.1"
KEY = "benchmark-id:benchmark-secret"
START_TIMEOUT_S = 60.0


class CannotStart(Exception):
    """This machine cannot run a server."""


@dataclass(frozen=True)
class Server:
    """A running server: the process at the head of its tree, and its port."""

    pid: int
    port: int


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def make_certificates(directory: Path) -> None:
    """Make a CA and a certificate for fal's names, as ``ca.pem``, ``cert.pem`` and ``key.pem``."""
    authority = trustme.CA()
    leaf = authority.issue_cert("fal.run", "*.fal.run", "*.fal.ai")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    leaf.private_key_pem.write_to_path(directory / "key.pem")
    for certificate in leaf.cert_chain_pems:
        certificate.write_to_path(directory / "cert.pem", append=True)


@contextlib.contextmanager
def _process(
    command: Sequence[str], env: Mapping[str, str], log: Path, cpus: set[int], **pipes: Any
) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=env,
            stderr=output,
            start_new_session=True,
            text=True,
            **({"stdout": output, "stdin": subprocess.DEVNULL} | pipes),
        )
    try:
        os.sched_setaffinity(process.pid, cpus)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.asynccontextmanager
async def server(
    command: Sequence[str], env: Mapping[str, str], port: int, log: Path, cpus: set[int]
) -> AsyncIterator[Server]:
    """Start a server, and wait until it listens on ``port``. Raise CannotStart."""
    with _process(command, env, log, cpus) as process:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex((HOST, port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise CannotStart(f"{command[0]} did not start: {log.read_text()[-1000:].strip()}")
            await asyncio.sleep(0.05)
        yield Server(process.pid, port)


class Upstream:
    """The running stand-in for fal."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lock = asyncio.Lock()
        self.port: int = json.loads(self._line())["port"]

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CannotStart("the upstream has ended")
        return line

    async def ask(self, command: str) -> dict[str, int]:
        """Send a command to upstream.mjs, and return its reply."""
        assert self._process.stdin is not None
        async with self._lock:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            reply: dict[str, int] = json.loads(await asyncio.to_thread(self._line))
            return reply

    async def wait_for(self, name: str, count: int, timeout_s: float) -> int:
        """Wait until that number in ``stats`` is ``count``, at most ``timeout_s``. Return the last value."""
        deadline = time.monotonic() + timeout_s
        while True:
            reached = (await self.ask("stats"))[name]
            if reached == count or time.monotonic() > deadline:
                return reached
            await asyncio.sleep(0.02)


@contextlib.contextmanager
def upstream(directory: Path, port: int, cpus: set[int]) -> Iterator[Upstream]:
    """Start the upstream on ``port``, with the certificates in ``directory``. Raise CannotStart."""
    node = shutil.which("node")
    if node is None:
        raise CannotStart("the upstream needs node in PATH: install Node 20 or newer")
    files = [str(directory / "cert.pem"), str(directory / "key.pem")]
    command = [node, str(HERE / "upstream.mjs"), str(port), *files, f"Key {KEY}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with _process(command, os.environ, directory / "upstream.log", cpus, **pipes) as process:
        yield Upstream(process)
