"""libcurl requests an accepted target from that target's host, and from no other.

A server shows both: the request that really arrives, and the name in the TLS handshake.
"""

import asyncio
import ssl
from collections.abc import Iterator

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from tornado.platform.asyncio import AsyncIOLoop

from fuzz import properties
from tests.support.certificates import Authority
from tests.support.proxy import KEY
from tests.support.scripted_upstream import Exchange, Upstream
from tests.support.strategies import examples, mutated_urls
from tornado_fal_proxy import ProxyConfig
from tornado_fal_proxy.rules.headers import request_headers
from tornado_fal_proxy.rules.target import Target
from tornado_fal_proxy.upstream.client import UpstreamClient


class Wire:
    """libcurl, driven as the handler drives it, in front of a server that notes the names of TLS handshakes."""

    def __init__(self, loop: asyncio.AbstractEventLoop, authority: Authority, protocol: str) -> None:
        # A wildcard certificate is valid for one label only, so each name gets a certificate of its own.
        self.names: list[str | None] = []
        self.known: set[str] = set()
        self._authority, self._loop = authority, loop
        self._contexts: dict[str, ssl.SSLContext] = {}
        self.protocol = protocol
        context = authority.context()
        context.sni_callback = self._note_name
        self.upstream = Upstream(respond, ssl_context=context, protocols=[protocol])
        loop.run_until_complete(self.upstream.start())
        self._client = loop.run_until_complete(self._make_client())

    def _note_name(self, connection: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        self.names.append(name)
        if name is not None and name not in self._contexts:
            self._contexts[name] = self._authority.context(name)
            self._contexts[name].set_alpn_protocols([self.protocol])
        if name is not None:
            connection.context = self._contexts[name]

    async def _make_client(self) -> UpstreamClient:
        config = ProxyConfig(key=KEY, ca_certs=self._authority.ca_file, connect_to=self.upstream.address)
        return UpstreamClient(force_instance=True, config=config)

    def request(self, method: str, target: Target) -> tuple[Exchange, list[str | None]]:
        """Request ``target`` with libcurl. Return the request that arrived, and the names in the handshakes for it."""
        del self.names[:]
        self.upstream.exchanges.clear()
        self._loop.run_until_complete(self._relay(method, target))
        (exchange,) = self.upstream.exchanges
        return exchange, self.names

    async def _relay(self, method: str, target: Target) -> None:
        transfer = self._client.start(method, target, request_headers([], b"authorization: Key a:b"), b"")
        head = await transfer.read_head()
        assert head.status == 200

    def close(self) -> None:
        async def close() -> None:
            self._client.close()
            await self.upstream.close()

        self._loop.run_until_complete(close())


async def respond(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(200)


@pytest.fixture
def wire(io_loop: AsyncIOLoop, authority: Authority, protocol: str) -> Iterator[Wire]:
    wire = Wire(io_loop.asyncio_loop, authority, protocol)
    yield wire
    wire.close()


@pytest.mark.slow
@examples(150)
@given(url=mutated_urls(), method=st.sampled_from(["GET", "POST"]))
def test_libcurl_asks_that_host_for_that_target(wire: Wire, url: str, method: str) -> None:
    """The name in the TLS handshake and in Host or :authority is the target's, and the request target its bytes."""
    target = properties.target(url)
    event("accepted" if target else "refused")
    if target is None:
        return
    exchange, names = wire.request(method, target)
    assert (exchange.method, exchange.authority) == (method, target.host)
    assert exchange.target == target.request_target.encode("ascii")
    # Over HTTP/2 libcurl may use a connection again, but only for the same name. Over HTTP/1 it serves one call.
    assert names == ([] if target.host in wire.known and wire.protocol == "h2" else [target.host])
    wire.known.add(target.host)
    assert properties.is_fals(exchange.authority)
