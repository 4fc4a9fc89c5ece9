"""Measure which calls wait while name servers fail or hang. Run by test_unproven_hosts.py in a network of its own.

Here fal.run and new.fal.run are 127.0.0.1, where the test's upstream listens on port 443. Names below fail.fal.run do
not exist, and the name server does not respond to questions about names below hang.fal.run. The program prints its
result as JSON.
"""

import asyncio
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.support.certificates import FAL_NAMES, Authority
from tests.support.namespaces import lift_loopback
from tests.support.raw_client import call
from tests.support.scripted_upstream import Upstream
from tests.support.service_process import ServiceProcess
from tests.support.stub_handlers import fine
from tests.support.waiting import eventually

UNPROVEN_HOSTS, PACE_S = 2000, 0.004
# The unproven hosts whose calls wait when calls to well-known hosts begin, and the number of the latter.
CROWD, CALLS = 100, 100
# Limits of a lookup that hangs, and of a call that waits for its turn: much longer than the calls above take.
LOOKUP_S, CONNECT_S = 5, 6
# The hosts that are called beside the crowd's, and what may be left of the crowd's memory.
HOSTS, MAX_GROWTH_KB = 5, 40_000
# Limits the threads of libcurl's pool, which stay after lookups.
POOL_THREADS = 20


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


def usage(pid: int) -> dict[str, int]:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    return {
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "kb": int(status["VmRSS"].split()[0]),
    }


def is_at_rest(now: dict[str, int], before: dict[str, int]) -> bool:
    """Tell whether only connections to the hosts that were called are left, libcurl's pool of threads, and no crowd.

    There may be two to a host, because a paid call avoids one that may be about to be closed.
    """
    return (
        now["files"] <= before["files"] + 2 * HOSTS
        and now["threads"] <= before["threads"] + POOL_THREADS
        and now["kb"] < before["kb"] + MAX_GROWTH_KB
    )


async def called(port: int, host: str = "fal.run") -> None:
    assert (await call(port, target=f"https://{host}/tokens/")).status == 200


async def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        authority = Authority(Path(directory))
        upstream = Upstream(fine, ssl_context=authority.context(*FAL_NAMES), port=443)
        await upstream.start()
        server = NameServer()
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: server, local_addr=("127.0.0.1", 53)
        )
        service = await ServiceProcess.start(
            f"--connect-timeout-s={CONNECT_S}",
            FAL_KEY="key",
            FAL_PROXY_CA_CERTS=authority.ca_file,
            RES_OPTIONS=f"timeout:{LOOKUP_S} attempts:1",
        )
        draining = asyncio.create_task(drain(service))
        for _ in range(100):
            await called(service.port)
        at_rest = usage(service.pid)
        result = await among_a_crowd(service.port)
        await called(service.port, "new.fal.run")
        # Lookups may outlive their calls, and connections of clients that have left may not be closed yet.
        await eventually(lambda: is_at_rest(usage(service.pid), at_rest))
        result |= {"asked": server.asked, "at_rest": at_rest, "afterwards": usage(service.pid)}
        service.process.terminate()
        await service.process.wait()
        draining.cancel()
        transport.close()
        await upstream.close()
        return result


async def drain(service: ServiceProcess) -> None:
    assert service.process.stderr is not None
    while await service.process.stderr.read(65_536):
        pass


async def among_a_crowd(port: int) -> dict[str, Any]:
    """Call well-known hosts while a crowd waits for unproven ones. Return how many responses each of them got."""
    # The crowd is a process of its own, because it would delay the calls that are counted here.
    crowd = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.programs.unproven_hosts", str(port)), stdout=asyncio.subprocess.PIPE
    )
    assert crowd.stdout is not None
    assert await crowd.stdout.readline() == b"waiting\n"
    first = asyncio.create_task(crowd.stdout.readline())
    for host in ("queue.fal.run", "rest.fal.ai", "rest.alpha.fal.ai", *["fal.run"] * CALLS):
        await called(port, host)
    crowd_waits = not first.done()
    assert await first == b"answered\n"
    answered = asyncio.create_task(crowd.stdout.read())
    calls = 0
    while not answered.done():
        await called(port)
        calls += 1
        await asyncio.sleep(0.02)
    await crowd.wait()
    return {"crowd_waits": crowd_waits, "calls_during": calls, "answered": json.loads(answered.result())}


async def call_all(port: int) -> dict[int, int]:
    """Call every unproven host. Return how many responses had which status.

    Print a line when a crowd waits, and one when the first call whose lookup hangs has a response.
    """
    printed = False

    async def one(number: int) -> int:
        nonlocal printed
        await asyncio.sleep(number * PACE_S)
        if number == CROWD:
            print("waiting", flush=True)  # noqa: T201
        kind = ("hang", "fail")[number % 2]
        status = (await call(port, "GET", target=f"https://s{number}.{kind}.fal.run/x")).status
        if kind == "hang" and not printed:
            printed = True
            print("answered", flush=True)  # noqa: T201
        return status

    return Counter(await asyncio.gather(*map(one, range(UNPROVEN_HOSTS))))


if __name__ == "__main__" and sys.argv[1:]:
    sys.stdout.write(json.dumps(asyncio.run(call_all(int(sys.argv[1])))))
elif __name__ == "__main__":
    lift_loopback()
    with tempfile.TemporaryDirectory() as directory:
        use_name_server(directory)
        sys.stdout.write(json.dumps(asyncio.run(measure())))
        for path in ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"):
            subprocess.run(["umount", os.path.realpath(path)], check=True)
