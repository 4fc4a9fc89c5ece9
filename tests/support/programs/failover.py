"""Call fal through the proxy while one of its domains cannot be reached. Run by test_failover.py in its own network.

Here fal.run is 127.0.0.1 and falrun.com is 127.0.0.2, both on port 443, and an outage is caused there. The program
gets a protocol and prints what was seen, as JSON, by the names of OUTAGES.
"""

import asyncio
import json
import logging
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.certificates import Authority
from tests.support.logs import Logs
from tests.support.namespaces import lift_loopback
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, call
from tests.support.scripted_upstream import Exchange, Upstream
from tests.support.waiting import eventually
from tornado_fal_proxy.relay.backend import Backend
from tornado_fal_proxy.upstream import failover

PRIMARY, BACKUP = ("fal.run", "queue.fal.run"), ("falrun.com", "queue.falrun.com")
NEAR, FAR = "127.0.0.1", "127.0.0.2"
CROWD = 200
HOSTS = f"127.0.0.1 localhost\n{FAR} {' '.join(BACKUP)}\n"


class Stand:
    """Both domains, and a proxy in front of them."""

    def __init__(self, directory: Path, protocol: str) -> None:
        self.authority = Authority(directory)
        self.hosts = directory / "hosts"
        self.protocol = protocol
        self.setup = Setup(self.authority)
        self.names(NEAR)
        subprocess.run(["mount", "--bind", self.hosts, "/etc/hosts"], check=True)

    def names(self, address: str | None) -> None:
        """Give the usual domain an address, or none."""
        self.hosts.write_text(HOSTS + (f"{address} {' '.join(PRIMARY)}\n" if address else ""))

    @asynccontextmanager
    async def server(self, host: str, *names: str) -> AsyncIterator[Upstream]:
        """Serve one of the domains."""

        async def respond(exchange: Exchange) -> None:
            body = await exchange.body()
            await exchange.respond(200, b'{"by": "%b", "body": %b}' % (host.encode(), body or b"null"))

        context = self.authority.context(*names)
        upstream = Upstream(respond, ssl_context=context, protocols=[self.protocol], host=host, port=443)
        await upstream.start()
        yield upstream
        await upstream.close()

    def proxy(self) -> tuple[int, Callable[[], Backend]]:
        """Serve a proxy with nothing remembered. Its time-out is short, because some outages last until then."""
        return self.setup.proxy_and_backend("", connect_to=None, failover=True, connect_timeout_s=1.5)


def down(backend: Callable[[], Backend]) -> list[str]:
    """Return the hosts whose calls go to a backup."""
    return list(backend().client.down)


@asynccontextmanager
async def not_found(stand: Stand) -> AsyncIterator[None]:
    stand.names(None)
    yield
    stand.names(NEAR)


@asynccontextmanager
async def refused(stand: Stand) -> AsyncIterator[None]:
    yield  # nobody listens


@asynccontextmanager
async def unreachable(stand: Stand) -> AsyncIterator[None]:
    stand.names("192.0.2.1")
    yield
    stand.names(NEAR)


@asynccontextmanager
async def silent(stand: Stand) -> AsyncIterator[None]:
    """A queue of connections that is full: the kernel does not respond to more."""
    with socket.create_server((NEAR, 443), backlog=0) as listener:
        full = [socket.socket() for _ in range(4)]
        for client in full:
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield
        for client in full:
            client.close()


@asynccontextmanager
async def no_handshake(stand: Stand) -> AsyncIterator[None]:
    """A server that takes connections and says nothing."""
    with socket.create_server((NEAR, 443), backlog=4096):
        yield


OUTAGES: dict[str, Callable[[Stand], AbstractAsyncContextManager[None]]] = {
    "name not found": not_found,
    "refused": refused,
    "unreachable": unreachable,
    "silent": silent,
    "no handshake": no_handshake,
}


async def statuses(port: int, method: str, count: int = 1, host: str = "fal.run") -> dict[str, int]:
    """Call so often at once. Return how many responses had which status and came from which server."""

    async def one(number: int) -> str:
        path = "/a/b" if method == "POST" else f"/a/b/requests/{number}"
        response = await call(port, method, b'{"number": %d}' % number, target=f"https://{host}{path}")
        content = json.loads(response.body)
        if method == "POST" and response.status == 200:
            assert content["body"] == {"number": number}
        return f"{response.status} {content.get('by', '')}".strip()

    return Counter(await asyncio.gather(*map(one, range(count))))


async def suffer(stand: Stand, outage: Callable[[Stand], AbstractAsyncContextManager[None]]) -> dict[str, Any]:
    """Call during an outage and after it."""
    port, backend = stand.proxy()
    async with outage(stand):
        async with stand.server(FAR, *BACKUP) as backup:
            seen: dict[str, Any] = {
                "crowd": await statuses(port, "POST", CROWD),
                "reads": await statuses(port, "GET", 3, "queue.fal.run"),
                "down": down(backend),
                "keys": len({exchange.header("authorization") for exchange in backup.exchanges}),
                "authorities": sorted({exchange.authority for exchange in backup.exchanges}),
                "connections": backup.connections,
                "received": len(backup.exchanges),
            }
        seen["both down"] = await statuses(port, "POST", 20)
    async with stand.server(NEAR, *PRIMARY), stand.server(FAR, *BACKUP):
        await eventually(lambda: not down(backend))
        seen["afterwards"] = await statuses(port, "POST", 20)
    return seen


async def never(stand: Stand) -> dict[str, Any]:
    """Cause what is no outage: a wrong certificate, a call that has left, a client that has left."""
    seen: dict[str, Any] = {}
    async with stand.server(FAR, *BACKUP) as backup:
        port, backend = stand.proxy()
        async with stand.server(NEAR, "other.example"):
            seen["wrong certificate"] = await statuses(port, "POST")
        async with stand.server(NEAR, *PRIMARY) as primary:

            async def breaks(exchange: Exchange) -> None:
                await exchange.body()
                exchange.abort_connection()

            primary.handler = breaks
            seen["broken"] = await statuses(port, "POST")
        port, backend = stand.proxy()
        async with silent(stand):
            client = await RawClient.open(port)
            await client.send("POST", target="https://fal.run/a/b")
            await asyncio.sleep(0.2)  # the proxy connects
            assert backend().slots.in_use
            client.leave()
            await eventually(lambda: not backend().slots.in_use)
            await asyncio.sleep(2)
        seen["received"] = len(backup.exchanges)
        seen["target"] = (await call(port, target="https://falrun.com/a/b")).status
    return seen


async def main(protocol: str) -> dict[str, Any]:
    failover.PROBE_INTERVAL_S = 0.5
    logs = Logs()
    logging.getLogger().addHandler(logs)
    with tempfile.TemporaryDirectory() as directory:
        stand = Stand(Path(directory), protocol)
        try:
            seen: dict[str, Any] = {}
            for name, outage in OUTAGES.items():
                del logs.records[:]
                seen[name] = await suffer(stand, outage)
                seen[name]["log"] = [line for line in logs.lines if "failover: " in line]
                await stand.setup.close()
                stand.setup = Setup(stand.authority)
            seen["never"] = await never(stand)
            await stand.setup.close()
        finally:
            subprocess.run(["umount", "/etc/hosts"], check=True)
    return seen


if __name__ == "__main__":
    lift_loopback()
    sys.stdout.write(json.dumps(asyncio.run(main(sys.argv[1]))))
