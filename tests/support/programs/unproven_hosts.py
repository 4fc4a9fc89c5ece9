"""Measure which calls wait while name servers fail or hang. Run by test_unproven_hosts.py in a network of its own.

Here fal.run and new.fal.run are 127.0.0.1, where the test's upstream listens on port 443. Names below fail.fal.run do
not exist, and the name server does not respond to questions about names below hang.fal.run. The program prints its
result as JSON.
"""

import asyncio
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.support.certificates import FAL_NAMES, Authority
from tests.support.namespaces import lift_loopback
from tests.support.raw_client import call
from tests.support.scripted_upstream import Exchange, Upstream
from tests.support.service_process import ServiceProcess

UNPROVEN_HOSTS, PACE_S = 2000, 0.004
LOOKUP_S = 1  # the time-out in resolv.conf


def use_name_server(directory: str) -> None:
    """Send each lookup to 127.0.0.1, once and with a short time-out."""
    for path, text in (
        ("/etc/resolv.conf", f"nameserver 127.0.0.1\noptions timeout:{LOOKUP_S} attempts:1\n"),
        ("/etc/hosts", "127.0.0.1 localhost\n"),
        ("/etc/nsswitch.conf", "hosts: files dns\n"),
    ):
        file = Path(directory, Path(path).name)
        file.write_text(text)
        subprocess.run(["mount", "--bind", file, os.path.realpath(path)], check=True)


class NameServer(asyncio.DatagramProtocol):
    """As much of a name server as the resolver needs. ``asked`` counts the questions."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {"hang": 0, "fail": 0, "other": 0}

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        labels, position = [], 12
        while length := data[position]:
            labels.append(data[position + 1 : position + 1 + length].decode())
            position += 1 + length
        question = data[12 : position + 5]
        kind = labels[-3] if labels[-3:-2] and labels[-3] in ("hang", "fail") else "other"
        self.asked[kind] += 1
        if kind == "hang":
            return
        is_a = question[-4:-2] == b"\0\1"
        records = 1 if is_a and kind == "other" else 0
        head = data[:2] + struct.pack(">HHHHH", 0x8580 | (3 if kind == "fail" else 0), 1, records, 0, 0)
        record = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4" + socket.inet_aton("127.0.0.1")
        self._transport.sendto(head + question + record * records, address)


async def fine(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(200, b"{}", [("content-type", "application/json")])


def usage(pid: int) -> dict[str, int]:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    return {
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "kb": int(status["VmRSS"].split()[0]),
    }


async def timed(port: int, host: str = "fal.run") -> float:
    began = time.monotonic()
    assert (await call(port, target=f"https://{host}/tokens/")).status == 200
    return time.monotonic() - began


async def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        authority = Authority(Path(directory))
        upstream = Upstream(fine, ssl_context=authority.context(*FAL_NAMES), port=443)
        await upstream.start()
        server = NameServer()
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: server, local_addr=("127.0.0.1", 53)
        )
        running = await ServiceProcess.start(
            FAL_KEY="key",
            FAL_PROXY_CA_CERTS=authority.ca_file,
            FAL_PROXY_CONNECT_TIMEOUT_S="2",
            RES_OPTIONS=f"timeout:{LOOKUP_S} attempts:1",
        )
        port = running.port

        async def drain() -> None:
            assert running.process.stderr is not None
            while await running.process.stderr.read(65_536):
                pass

        draining = asyncio.create_task(drain())
        for _ in range(5):
            await timed(port)
        before = [await timed(port) for _ in range(100)]
        at_rest = usage(running.pid)

        crowd = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.programs.unproven_hosts", str(port), stdout=asyncio.subprocess.PIPE
        )  # a process of its own, because the crowd would delay the calls that are timed here
        answered = asyncio.create_task(crowd.communicate())
        during: list[float] = []
        await asyncio.sleep(UNPROVEN_HOSTS * PACE_S / 2)
        cold = [await timed(port, host) for host in ("queue.fal.run", "rest.fal.ai", "rest.alpha.fal.ai")]
        while not answered.done():
            during.append(await timed(port))
            await asyncio.sleep(0.02)
        unproven = await call(port, "GET", target="https://new.fal.run/x")
        after = [await timed(port) for _ in range(20)]
        await asyncio.sleep(LOOKUP_S)
        result = {
            "before_ms": spread(before),
            "during_ms": spread(during),
            "cold_ms": spread(cold),
            "after_ms": spread(after),
            "calls_during": len(during),
            "answered": json.loads((await answered)[0]),
            "asked": server.asked,
            "at_rest": at_rest,
            "afterwards": usage(running.pid),
            "unproven": unproven.status,
        }
        running.process.terminate()
        await running.process.wait()
        draining.cancel()
        transport.close()
        await upstream.close()
        return result


async def call_all(port: int) -> dict[int, int]:
    """Call every unproven host. Return how many responses had which status."""

    async def one(number: int) -> int:
        await asyncio.sleep(number * PACE_S)
        kind = ("hang", "fail")[number % 2]
        return (await call(port, "GET", target=f"https://s{number}.{kind}.fal.run/x")).status

    return Counter(await asyncio.gather(*map(one, range(UNPROVEN_HOSTS))))


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(seconds) * 1000, 1), "max": round(max(seconds) * 1000, 1)}


if __name__ == "__main__" and sys.argv[1:]:
    sys.stdout.write(json.dumps(asyncio.run(call_all(int(sys.argv[1])))))
elif __name__ == "__main__":
    lift_loopback()
    with tempfile.TemporaryDirectory() as directory:
        use_name_server(directory)
        sys.stdout.write(json.dumps(asyncio.run(measure())))
        for path in ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"):
            subprocess.run(["umount", os.path.realpath(path)], check=True)
