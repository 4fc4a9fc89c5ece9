"""Measure how connections spread over two workers, in four ways to share a port: ``python -m benchmarks.spread``.

A crowd connects at once, or one after the other, and every connection stays open; each worker counts its own. The
workers serve nothing, because only the accepting is measured. ``stock`` is Tornado's own accept handler on a shared
socket, ``single`` one that accepts a single connection in each turn of the loop, ``reuseport`` a socket for each worker
with SO_REUSEPORT and Tornado's handler, ``ours`` that of the service. In the rows with "one busy" one of the two
workers is busy, in turns of 5 ms.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from tornado_fal_proxy.service.scoreboard import Scoreboard
from tornado_fal_proxy.service.server import Server
from tornado_fal_proxy.service.worker import Worker

HOST, WORKERS, ROUNDS, BUSY_S = "127.0.0.1", 2, 15, 0.005
WAYS = ("stock", "single", "reuseport", "ours")
CASES = (
    (64, "at once"),
    (64, "one by one"),
    (64, "at once, one busy"),
    (64, "one by one, one busy"),
    (1000, "at once"),
)


async def _work(way: str, listener: socket.socket, scoreboard: Scoreboard, slot: int, busy: bool) -> None:
    """Accept connections until the process is killed."""
    worker = Worker(slot, scoreboard, -1, -1)
    counting = Server(Application([])) if way == "ours" else HTTPServer(Application([]))
    if isinstance(counting, Server):
        counting.listen_on([listener], worker, set())
    elif way == "single":
        asyncio.get_running_loop().add_reader(listener, _accept_one, listener, counting)
    else:
        counting.add_sockets([listener])
    while True:
        if not isinstance(counting, Server):
            scoreboard.set_connections(slot, len(counting._connections))
        if busy:
            time.sleep(BUSY_S)
        await asyncio.sleep(0 if busy else 0.01)


def _accept_one(listener: socket.socket, server: Any) -> None:
    try:
        server._handle_connection(*listener.accept())
    except BlockingIOError:
        return


def _fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def _round(way: str, count: int, how: str) -> tuple[float, float]:
    """Return the share of the connections that the first worker has, and the milliseconds until all were accepted."""
    (first,) = bind_sockets(0, HOST, backlog=4096, reuse_port=way == "reuseport")
    port = first.getsockname()[1]
    listeners = [first] * WORKERS
    if way == "reuseport":
        listeners[1:] = [bind_sockets(port, HOST, backlog=4096, reuse_port=True)[0] for _ in range(WORKERS - 1)]
    scoreboard = Scoreboard(WORKERS)

    def connections() -> list[int]:
        """Return the connections of each worker, -1 for one that does not accept yet."""
        return [-1 if worker.connections is None else worker.connections for worker in scoreboard.workers()]

    busy = "busy" in how
    pids = [
        _fork(lambda slot=slot: asyncio.run(_work(way, listeners[slot], scoreboard, slot, busy and slot == 1)))  # type: ignore[misc]
        for slot in range(WORKERS)
    ]
    clients = []
    try:
        while min(connections()) < 0:
            time.sleep(0.01)
        time.sleep(0.05)
        start = time.perf_counter()
        for _ in range(count):
            clients.append(socket.create_connection((HOST, port)))
            if how.startswith("one by one"):
                time.sleep(0.003)
        deadline = time.monotonic() + 10
        while sum(connections()) < count and time.monotonic() < deadline:
            time.sleep(0.001)
        took = time.perf_counter() - start
        time.sleep(0.05)
        return connections()[0] / count, took * 1e3
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for opened in (*clients, *set(listeners)):
            opened.close()


def main() -> int:
    """Print a table of the larger share, median and worst of the rounds."""
    for count, how in CASES:
        for way in WAYS:
            rounds = [_round(way, count, how) for _ in range(ROUNDS)]
            larger = [max(share, 1 - share) * 100 for share, _ in rounds]
            took = statistics.median(ms for _, ms in rounds)
            sys.stdout.write(
                f"{count:5} {how:22} {way:10} larger share {statistics.median(larger):5.1f} %, "
                f"worst {max(larger):5.1f} %, {took:6.0f} ms\n"
            )
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
