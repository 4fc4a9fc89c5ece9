"""Whatever parse_target accepts, every other parser that will see it reads the same host and the same path.

Three of them are asked: urllib.parse, Ada (the WHATWG parser of Node.js, as `ada-url`), and libcurl, by what really
arrives at a server and by the name that its TLS handshake asked for.
"""

import asyncio
import ssl
import string
from collections.abc import Iterator

import pytest
from conftest import KEY
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tornado.platform.asyncio import AsyncIOLoop
from upstream import Authority, Exchange, Upstream

from fuzz import properties
from tornado_fal_proxy import ProxyConfig
from tornado_fal_proxy.errors import TargetRefused
from tornado_fal_proxy.policy import Target, parse_target, request_headers
from tornado_fal_proxy.upstream import UpstreamClient


def examples(count: int) -> settings:
    """The same so many examples in every run. A fixture serves all of them, and the suite has a deadline of its own."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


# Near misses: pieces that are right, pieces that look so, and what may be put anywhere.
GOOD_LABELS = st.from_regex(
    r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True, alphabet=string.ascii_lowercase + "0123456789-"
)
HOSTS = st.builds(
    lambda labels, apex: ".".join([*labels, apex]),
    st.lists(GOOD_LABELS, max_size=4),
    st.sampled_from(["fal.run", "fal.ai"]),
)
TAILS = st.text("abcAZ019-._~%2fFeE:/?#[]@!$&'()*+,;=\"<>^`{|}", max_size=24)
GOOD_URLS = st.builds(
    lambda host, port, path, query, fragment: f"https://{host}{port}{path}{query}{fragment}",
    HOSTS,
    st.sampled_from(["", "", "", ":443"]),
    st.just("")
    | TAILS.map(lambda text: "/" + text.replace("?", "").replace("#", ""))
    | st.sampled_from(["/a/../b", "//c", "/%2e%2E/"]),
    st.just("") | TAILS.map(lambda text: "?" + text.replace("#", "")),
    st.just("") | TAILS.map(lambda text: "#" + text),
)
INTRUDERS = st.sampled_from(
    [
        *"@:/\\?#[]%.-_;,&=*|\"' \t\n\r\0\x7f\xad。．／＃ａа",  # noqa: RUF001
        *("//", "\\\\", "..", "https://", "http://", "%2e", "%2f", "%00", "%40", "xn--", "xn--fal-"),
        *("@evil.com", ".evil.com", "evil.com/", "evil.com#", "evil.com?", "evil.com\\", "fal.run", ".fal.ai"),
        *(":80", ":443", ":0443", "[::1]", "127.0.0.1", "0x7f.1"),
    ]
)


@st.composite
def mutated_urls(draw: st.DrawFn) -> str:
    """A good URL of which up to three places were cut, replaced or added to."""
    url = draw(GOOD_URLS)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(url)))
        end = draw(st.integers(start, min(len(url), start + 3)))
        url = url[:start] + draw(INTRUDERS | st.just("") | st.characters()) + url[end:]
    return url


def accepted(url: str) -> Target | None:
    try:
        return parse_target(url)
    except TargetRefused:
        return None


@examples(2000)
@given(url=mutated_urls() | st.text() | TAILS.map("https://".__add__))
def test_other_parsers_read_the_same_host_and_path(url: str) -> None:
    """The caller's own string and the rebuilt URL, to urllib and to a WHATWG parser, are one and the same address."""
    event("accepted" if properties.target(url) else "refused")


@examples(1000)
@given(url=mutated_urls())
def test_what_is_accepted_is_rebuilt_into_itself(url: str) -> None:
    """The rebuilt URL is accepted again, as the same target: there is one spelling, and taking it apart finds it."""
    target = accepted(url)
    if target is not None:
        assert accepted(target.url) == target


class Wire:
    """libcurl, driven as the handler drives it, in front of a server that notes what it was asked for."""

    def __init__(self, loop: asyncio.AbstractEventLoop, authority: Authority, protocol: str) -> None:
        # Certificates for a wildcard hold for one label only. Which name was asked for is the test's to compare.
        self.names: list[str | None] = []
        self.known: set[str] = set()
        self._authority, self._loop = authority, loop
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._protocol = protocol
        context = authority.context()
        context.sni_callback = self._note_name
        self.upstream = Upstream(answer, ssl_context=context, protocols=[protocol])
        loop.run_until_complete(self.upstream.start())
        self._client = loop.run_until_complete(self._make_client())

    def _note_name(self, connection: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        self.names.append(name)
        if name is not None and name not in self._contexts:
            self._contexts[name] = self._authority.context(name)
            self._contexts[name].set_alpn_protocols([self._protocol])
        if name is not None:
            connection.context = self._contexts[name]

    async def _make_client(self) -> UpstreamClient:
        config = ProxyConfig(key=KEY, ca_certs=self._authority.ca_file, connect_to=self.upstream.address)
        return UpstreamClient(force_instance=True, config=config)

    def request(self, method: str, target: Target) -> tuple[Exchange, list[str | None]]:
        """What the server got when libcurl was given ``target``, and the names of the handshakes that this took."""
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


async def answer(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(200)


@pytest.fixture
def wire(io_loop: AsyncIOLoop, authority: Authority, protocol: str) -> Iterator[Wire]:
    wire = Wire(io_loop.asyncio_loop, authority, protocol)
    yield wire
    wire.close()


@examples(150)
@given(url=mutated_urls(), method=st.sampled_from(["GET", "POST"]))
def test_libcurl_asks_that_host_for_that_target(wire: Wire, url: str, method: str) -> None:
    """The name in the TLS handshake and in Host or :authority is the target's, and the request target its bytes."""
    target = accepted(url)
    event("accepted" if target else "refused")
    if target is None:
        return
    exchange, names = wire.request(method, target)
    assert (exchange.method, exchange.authority) == (method, target.host)
    assert exchange.target == target.request_target.encode("ascii")
    # One handshake for each host; libcurl may take a connection again, but only one to that name.
    assert names == ([] if target.host in wire.known else [target.host])
    wire.known.add(target.host)
    assert properties.is_fals(exchange.authority)
