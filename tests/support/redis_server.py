"""Run Debian's redis-server on a free port, without files."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.support.tools import tool, unused_port
from tests.support.waiting import TIMEOUT_S

__all__ = ["RedisServer", "running_redis"]


class RedisServer:
    """A server. It keeps its port when it is killed and started again, and forgets everything."""

    def __init__(self, directory: str, *options: str) -> None:
        self.port = unused_port()
        self._directory, self._options = directory, options
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def url(self, *, password: str = "", database: int = 0) -> str:
        """Return the URL of a database of the server."""
        return f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server, and wait until it responds."""
        self._process = subprocess.Popen(
            [
                *(tool("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self._directory),
                *("--save", "", "--appendonly", "no", "--daemonize", "no", "--loglevel", "warning", *self._options),
            ],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S) as client:
                client.sendall(b"PING\r\n")
                if client.recv(100).startswith((b"+PONG", b"-NOAUTH")):
                    return
            assert self._process.poll() is None, "redis-server has ended"
            assert time.monotonic() < deadline, "redis-server does not respond"
            time.sleep(0.01)

    def signal(self, number: signal.Signals) -> None:
        """Send the server a signal. SIGKILL also waits for its end."""
        assert self._process is not None
        os.kill(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()

    def command(self, *words: str) -> str:
        """Do a command with redis-cli, which comes with the server, and return its output."""
        done = subprocess.run(
            [tool("redis-cli"), "-p", str(self.port), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=TIMEOUT_S,
        )
        return done.stdout.strip()


@contextmanager
def running_redis(*options: str) -> Iterator[RedisServer]:
    """Run a server while the block lasts."""
    tool("redis-server")
    with tempfile.TemporaryDirectory() as directory:
        server = RedisServer(directory, *options)
        try:
            yield server
        finally:
            with suppress(ProcessLookupError):
                server.signal(signal.SIGKILL)
