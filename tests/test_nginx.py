"""nginx on both sides of the proxy: in front of it, with the file that README.md recommends, and in fal's place.

nginx runs as in its own upgrades: it takes over a socket that is listening already, so there is no port to race for,
and no readiness to wait for. Its access log comes as datagrams.
"""

import asyncio
import itertools
import json
import os
import pwd
import re
import signal
import socket
import ssl
import sys
import tempfile
from asyncio.subprocess import DEVNULL, create_subprocess_exec
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pycurl
import pytest
import trustme
from caller import Caller as PlainCaller
from caller import call
from conftest import KEY, ROUTE, Setup, tool, unused_port
from load import ROUNDS, Load, answer
from running import ACTIVATE, COMMAND, Running, environment
from tornado.curl_httpclient import CurlAsyncHTTPClient, CurlError
from tornado.httpclient import HTTPResponse
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.web import Application, RequestHandler
from upstream import FAL_NAMES, Exchange, Gone

from tornado_fal_proxy import FalProxyHandler, Target
from tornado_fal_proxy.errors import BodyTooLarge, Unauthorized
from tornado_fal_proxy.sandbox import Sandbox

FILES = Path(__file__).parents[1] / "deploy/nginx"
DEPLOYED = FILES / "tornado-fal-proxy.conf"
NAME = "fal-proxy.example.com"
RUN = "https://fal.run/fal-ai/flux/dev"
QUEUE = "https://queue.fal.run/fal-ai/flux/dev"
JSON = [("content-type", "application/json")]
EVENTS = [("content-type", "text/event-stream")]
DIE, LIVE = b'{"die": 1}', b"{}"
# One of the file's seconds, where a test has no time for them; nginx's own default for its time limits, so scaled.
SCALED_MS = 10
DEFAULT_TIMEOUT_S = 60

AROUND = """
daemon off;
error_log errors warn;
worker_processes 1;
pid nginx.pid;
events {{ worker_connections 2048; }}
http {{
    log_format test '$server_protocol $connection $status $request_method $host $uri';
    access_log syslog:server=unix:{directory}/log,nohostname test;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    scgi_temp_path scgi;
    uwsgi_temp_path uwsgi;
    proxy_read_timeout {default_ms}ms;
    proxy_send_timeout {default_ms}ms;
    send_timeout {default_ms}ms;
    {servers}
}}
"""

FAL = """
server {{
    listen {listen} ssl http2;
    ssl_certificate {certificate};
    ssl_certificate_key {key};
    location / {{
        proxy_pass https://{behind};
        proxy_http_version 1.1;
        proxy_set_header Host $host;
        proxy_ssl_verify off;
        proxy_buffering off;
    }}
}}
"""


class Nginx:
    """A running nginx."""

    def __init__(self, address: str, ca_certs: str, log: socket.socket, errors: Path, command: list[str]) -> None:
        self.address = address
        self.errors = errors
        self.ca_certs = ca_certs
        self._log = log
        self._command = command

    async def reload(self) -> None:
        """What an operator does after a change."""
        process = await create_subprocess_exec(*self._command, "-s", "reload")
        assert await process.wait() == 0

    async def logged(self) -> list[str]:
        """The next line of the access log: protocol, number of the connection, status, method, host, path."""
        datagram = await asyncio.get_running_loop().sock_recv(self._log, 65_536)
        return datagram.decode().partition("nginx: ")[2].split()


@asynccontextmanager
async def nginx(
    names: tuple[str, ...], servers: Callable[[str, dict[str, str]], str], *, second_ms: int = 1000
) -> AsyncIterator[Nginx]:
    """nginx with a certificate for ``names``. ``servers`` makes its configuration of an address to listen on and files.

    ``second_ms`` is how long a second of nginx's own defaults for time limits is. nginx never runs as root, as whom
    tests may run.
    """
    program = tool("nginx")
    with tempfile.TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        path = Path(directory)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        authority = trustme.CA()
        authority.cert_pem.write_to_path(path / "ca.pem")
        certificate = authority.issue_cert(*names)
        certificate.private_key_and_cert_chain_pem.write_to_path(path / "server.pem")
        files = dict.fromkeys(("certificate", "key"), f"{directory}/server.pem")
        (path / "nginx.conf").write_text(
            AROUND.format(
                directory=directory, servers=servers(address, files), default_ms=DEFAULT_TIMEOUT_S * second_ms
            )
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
            log.setblocking(False)
            log.bind(f"{directory}/log")
            identity: dict[str, Any] = {}
            if os.geteuid() == 0:
                nobody = pwd.getpwnam("nobody")
                identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
                for file in (path, *path.iterdir()):
                    os.chown(file, nobody.pw_uid, nobody.pw_gid)
            errors = path / "errors"
            command = [program, "-p", directory, "-c", "nginx.conf", "-e", "errors"]
            process = await create_subprocess_exec(
                *command,
                stdin=DEVNULL,
                pass_fds=[listener.fileno()],
                env={"NGINX": f"{listener.fileno()};"},
                **identity,
            )
            listener.close()
            try:
                yield Nginx(address, f"{directory}/ca.pem", log, errors, command)
            finally:
                if process.returncode is None:
                    process.send_signal(signal.SIGTERM)
                code = await process.wait()
                said = errors.read_text() if errors.exists() else ""
            assert code == 0, said
            assert not re.search(r"\[(?:emerg|alert|crit)\]", said), said


def deployed(*ports: int, second_ms: int = 1000, auth: int | None = None) -> Callable[[str, dict[str, str]], str]:
    """The file of deploy/, with nothing but its addresses, name and certificate replaced.

    ``ports`` are where proxies are. A second lasts ``second_ms``. With ``auth``, the service on that port is asked who
    may call.
    """

    def servers(listen: str, files: dict[str, str]) -> str:
        text = replaced(
            DEPLOYED,
            {
                "listen 443 ": f"listen {listen} ",
                "server 127.0.0.1:8080;": "\n".join(f"server 127.0.0.1:{port};" for port in ports),
                f"/etc/ssl/{NAME}/fullchain.pem": files["certificate"],
                f"/etc/ssl/{NAME}/privkey.pem": files["key"],
            },
        )
        if auth is not None:
            asks = replaced(FILES / "auth-request.conf", {"127.0.0.1:9000": f"127.0.0.1:{auth}"})
            text, count = re.subn(r"# include /etc/nginx/tornado-fal-proxy-auth\.conf;.*", lambda _: asks, text)
            assert count == 1
        return re.sub(r"(?<=_timeout )(\d+)s;", lambda time: f"{int(time[1]) * second_ms}ms;", text)

    return servers


def replaced(file: Path, texts: dict[str, str]) -> str:
    """What the file says, with each of ``texts``, which it says once, replaced."""
    text = file.read_text()
    for old, new in texts.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


async def two_workers(setup: Setup, upstream: Any) -> Running:
    """The real command, as it is deployed."""
    return await Running.before(setup, upstream, "--processes=2")


class Caller:
    """A caller of nginx, over HTTP/2 or HTTP/1.1: Tornado's own curl client, as it comes."""

    def __init__(self, front: Nginx, version: str) -> None:
        self._front = front
        self._version = version
        self._client = CurlAsyncHTTPClient(force_instance=True)
        self._sockets: list[socket.socket] = []

    async def call(
        self,
        method: str = "POST",
        body: bytes | None = b"{}",
        *,
        path: str = ROUTE,
        target: str = RUN,
        headers: Any = (),
        **more: Any,
    ) -> HTTPResponse:
        """One call, whatever its status, with more ``headers``. Raises CurlError when the answer breaks off."""
        status_lines: list[str] = []

        def prepare(curl: pycurl.Curl) -> None:
            h2, h1 = pycurl.CURL_HTTP_VERSION_2TLS, pycurl.CURL_HTTP_VERSION_1_1
            curl.setopt(pycurl.HTTP_VERSION, h2 if self._version == "HTTP/2" else h1)
            curl.setopt(pycurl.CONNECT_TO, [f"::{self._front.address}"])
            curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open)

        def header(line: str) -> None:
            if line.startswith("HTTP/"):
                status_lines.append(line)

        response = await self._client.fetch(
            f"https://{NAME}{path}",
            raise_error=False,
            method=method,
            headers=HTTPHeaders({"x-fal-target-url": target, "content-type": "application/json"} | dict(headers)),
            body=None if method in ("GET", "OPTIONS") else body,
            ca_certs=self._front.ca_certs,
            prepare_curl_callback=prepare,
            header_callback=header,
            request_timeout=50,
            **more,
        )
        assert status_lines
        assert status_lines[-1].startswith(self._version + " ")
        return response

    def _open(self, _purpose: int, address: tuple[int, int, int, tuple[str, int]]) -> socket.socket:
        self._sockets.append(socket.socket(*address[:3]))
        return self._sockets[-1]

    def leave(self) -> None:
        """Shut down all connections at once, whatever is going on there."""
        for opened in self._sockets:
            opened.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Call it when no call is running."""
        self._client.close()
        for opened in self._sockets:
            opened.close()


@pytest.fixture(params=["HTTP/2", "HTTP/1.1"])
def version(request: pytest.FixtureRequest) -> str:
    """Runs the test once for callers of each protocol."""
    return str(request.param)


@contextmanager
def calling(front: Nginx, version: str) -> Iterator[Caller]:
    with closing(Caller(front, version)) as caller:
        yield caller


async def tls_caller(front: Nginx, address: str, receive_buffer: int | None = None) -> PlainCaller:
    """A caller over HTTP/1.1 whose own address is that one."""
    host, port = front.address.split(":")
    connected = socket.socket()
    if receive_buffer is not None:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connected.setblocking(False)
    connected.bind((address, 0))
    caller = PlainCaller()
    try:
        await asyncio.get_running_loop().sock_connect(connected, (host, int(port)))
        caller.reader, caller.writer = await asyncio.open_connection(
            sock=connected, ssl=ssl.create_default_context(cafile=front.ca_certs), server_hostname=NAME
        )
    except OSError:
        connected.close()
        raise
    return caller


def message(response: HTTPResponse) -> str:
    """The message of an answer that the proxy or nginx made by itself."""
    assert response.headers.get_list("content-type") == ["application/json"]
    content = json.loads(response.body)
    assert list(content) == ["message"]
    return str(content["message"])


@pytest.mark.gen_test
async def test_results(setup: Setup, version: str) -> None:
    """A POST's result and a body of 20 MB pass as they are; one that is larger than allowed is answered 413 in JSON."""

    async def size(exchange: Exchange) -> None:
        await exchange.respond(201, b'{"size": %d}' % len(await exchange.body()), [*JSON, ("x-fal-request-id", "7")])

    upstream = await setup.upstream(size)
    running = await two_workers(setup, upstream)
    async with nginx((NAME,), deployed(running.port)) as front:
        with calling(front, version) as caller:
            for length in (2, 20_000_000):
                response = await caller.call(body=b'"' + b"x" * (length - 2) + b'"')
                assert (response.code, json.loads(response.body)) == (201, {"size": length})
                assert response.headers["x-fal-request-id"] == "7"
            response = await caller.call(body=b"x" * (32 * 1024 * 1024 + 1))
            assert (response.code, message(response)) == (413, BodyTooLarge.message)
            assert len(upstream.exchanges) == 2
    await running.end()


@pytest.mark.gen_test
async def test_only_the_route_is_public(setup: Setup) -> None:
    """nginx passes on no other path, whatever it looks like."""
    upstream = await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON))
    port = setup.proxy(upstream)
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, "HTTP/2") as caller:
            for path in ("/", "/healthz", "/readyz", "/metrics", ROUTE + "/", ROUTE + "x", "/api/fal", "/x" + ROUTE):
                response = await caller.call(path=path)
                assert response.code == 404, path
                assert b"nginx" in response.body, path
            assert not upstream.exchanges
            assert (await caller.call()).code == 200


@pytest.mark.gen_test
async def test_events(setup: Setup, version: str) -> None:
    """Each event reaches the caller before the next one is sent, whatever the answer says of buffering."""
    arrived: asyncio.Queue[bytes] = asyncio.Queue()
    events = [b'data: {"n": %d}\n\n' % number for number in range(20)]

    async def stream(exchange: Exchange) -> None:
        await exchange.start(200, [*EVENTS, ("x-accel-buffering", "yes")])
        for event in events:
            await exchange.send(event)
            assert await arrived.get() == event
        await exchange.end()

    running = await two_workers(setup, await setup.upstream(stream))
    async with nginx((NAME,), deployed(running.port)) as front:
        with calling(front, version) as caller:
            for method in ("POST", "GET"):
                response = await caller.call(method, target=RUN + "/stream", streaming_callback=arrived.put_nowait)
                assert response.code == 200
                assert response.headers["content-type"] == "text/event-stream"
                assert "x-accel-buffering" not in response.headers
    await running.end()


@pytest.mark.gen_test
async def test_all_else_is_buffered(setup: Setup) -> None:
    """A result leaves the proxy at once though its caller does not read; with events the proxy goes at his pace."""
    size = 7_000_000  # less than goes into nginx's file, and more than into its memory

    async def answer(exchange: Exchange) -> None:
        if exchange.target.endswith(b"/stream"):
            await exchange.start(200, EVENTS)
            with suppress(Gone):
                while True:
                    await exchange.send(b"data: " + b"x" * 60_000 + b"\n\n")
        elif exchange.target.endswith(b"/result"):
            await exchange.respond(200, b'"' + b"x" * (size - 2) + b'"', JSON)
        else:
            await exchange.respond(200, b"{}", JSON)

    port = setup.proxy(await setup.upstream(answer), max_in_flight=1)

    async def place_is_free() -> None:
        async with asyncio.timeout(20):
            while (await call(port)).status != 200:
                await asyncio.sleep(0.01)

    async with nginx((NAME,), deployed(port)) as front:
        slow = await tls_caller(front, "127.0.0.1", receive_buffer=16_384)
        await slow.send("GET", target=f"{RUN}/stream")
        await slow.head()
        await asyncio.sleep(0.2)
        assert (await call(port)).status == 503
        assert "temporary file" not in front.errors.read_text()
        slow.leave()
        await place_is_free()

        slow = await tls_caller(front, "127.0.0.1", receive_buffer=16_384)
        await slow.send("GET", target=f"{RUN}/result")
        assert (await slow.head()).header("content-length") == str(size)
        await place_is_free()
        assert front.errors.read_text().count("an upstream response is buffered to a temporary file") == 1
        assert len(await slow.reader.readexactly(size)) == size
        slow.leave()


@pytest.mark.gen_test
async def test_long_poll(setup: Setup, version: str) -> None:
    """A call that is silent for half as long again as nginx allows by default is answered."""

    async def poll(exchange: Exchange) -> None:
        seconds = json.loads(await exchange.body())["s"]
        await asyncio.sleep(seconds * SCALED_MS / 1000)
        await exchange.respond(200, b"{}", JSON)

    running = await two_workers(setup, await setup.upstream(poll))
    front_of = nginx((NAME,), deployed(running.port, second_ms=SCALED_MS), second_ms=SCALED_MS)
    async with front_of as front:
        with calling(front, version) as caller:
            assert (await caller.call(body=b'{"s": %d}' % (1.5 * DEFAULT_TIMEOUT_S))).code == 200
    await running.end()


@pytest.mark.parametrize(("method", "headers"), [("POST", EVENTS), ("GET", EVENTS), ("GET", JSON)])
@pytest.mark.gen_test
async def test_broken_stream(
    setup: Setup, version: str, logs: Any, method: str, headers: list[tuple[str, str]]
) -> None:
    """A stream that breaks at fal breaks for the caller, and does not end as if it were complete; buffered or not."""
    arrived = asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.start(200, headers)
        await exchange.send(b"data: {}\n\n" * 20_000)
        await arrived.wait()
        exchange.reset()

    logs.expect("the answer was broken off")
    port = setup.proxy(await setup.upstream(stream))
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, version) as caller:
            with pytest.raises(CurlError):
                await caller.call(method, streaming_callback=lambda chunk: arrived.set())
            assert arrived.is_set()


@pytest.mark.gen_test
async def test_caller_leaves(setup: Setup, version: str) -> None:
    """A caller that goes away ends its call at fal."""
    arrived, gone = asyncio.Event(), asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.start(200, [("content-type", "text/event-stream")])
        await exchange.send(b"data: {}\n\n")
        await exchange.gone.wait()
        gone.set()

    port = setup.proxy(await setup.upstream(stream))
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, version) as caller:
            call = asyncio.create_task(caller.call(streaming_callback=lambda chunk: arrived.set()))
            await arrived.wait()
            caller.leave()
            await gone.wait()
            with pytest.raises(CurlError):
                await call


@pytest.mark.gen_test
async def test_post_is_sent_once(version: str) -> None:
    """When the proxy ends under a POST nginx does not repeat it, and the answer is none that clients repeat.

    On a fresh connection and on a used one. A GET is sent once more where the connection was a used one.
    """
    received: list[tuple[int, str]] = []  # the number of the connection, and the method
    connections = itertools.count(1)

    async def dying_proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(connections)
        with suppress(asyncio.IncompleteReadError), closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                assert "\r\nconnection:" not in head
                length = re.search(r"content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                method = head.split()[0]
                received.append((number, method))
                if body == DIE or method == "get":
                    return
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    server = await asyncio.start_server(dying_proxy, "127.0.0.1", 0)
    async with server, nginx((NAME,), deployed(server.sockets[0].getsockname()[1])) as front:
        with calling(front, version) as caller:
            for body in (DIE, LIVE, DIE, LIVE):
                response = await caller.call(body=body)
                assert response.code == (500 if body == DIE else 200)
                assert body == LIVE or "may have run" in message(response)
            response = await caller.call("GET")
            assert (response.code, message(response)) == (502, "The proxy did not answer.")
    assert received == [(1, "post"), (2, "post"), (2, "post"), (3, "post"), (3, "get"), (4, "get")]


@pytest.mark.gen_test
async def test_proxies_that_are_down(setup: Setup) -> None:
    """While one is up calls fail on none that is down; when all are, clients may send a POST again: it went nowhere."""
    upstream = await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON))
    down = [unused_port(), unused_port()]
    async with nginx((NAME,), deployed(*down, setup.proxy(upstream))) as front:
        with calling(front, "HTTP/2") as caller:
            for method in ("POST", "GET") * 5:
                assert (await caller.call(method)).code == 200
    assert len(upstream.exchanges) == 10
    async with nginx((NAME,), deployed(*down)) as front:
        with calling(front, "HTTP/2") as caller:
            for method in ("POST", "GET"):
                response = await caller.call(method)
                assert (response.code, message(response)) == (502, "The proxy did not answer.")


@pytest.mark.gen_test
async def test_unix_socket(setup: Setup) -> None:
    """nginx reaches the command over a Unix socket that systemd holds, which takes no ports."""
    config = setup.config(await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON)))
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        os.chmod(directory, 0o711)
        listener.bind(path := f"{directory}/socket")
        listener.listen()
        os.chmod(path, 0o777)  # nginx is somebody else, where tests are root
        process = await create_subprocess_exec(
            *(sys.executable, "-c", ACTIVATE, str(listener.fileno()), *COMMAND),
            env=environment({"FAL_KEY": KEY, "FAL_PROXY_CONNECT_TO": str(config.connect_to)})
            | {"FAL_PROXY_CA_CERTS": str(config.ca_certs), "FAL_PROXY_LOG_LEVEL": "error"},
            pass_fds=[listener.fileno()],
            stdout=DEVNULL,
        )
        try:
            port = unused_port()
            servers = deployed(port)
            over = lambda listen, files: servers(listen, files).replace(f"127.0.0.1:{port};", f"unix:{path};")  # noqa: E731
            async with nginx((NAME,), over) as front:
                with calling(front, "HTTP/2") as caller:
                    assert (await caller.call()).code == 200
        finally:
            process.terminate()
        assert await process.wait() == 0


@pytest.mark.gen_test
async def test_who_calls(setup: Setup) -> None:
    """The proxy is told the address that nginx sees, once, and nothing that the caller says of itself; fal is not."""
    told: list[tuple[str, str]] = []

    class Handler(FalProxyHandler):
        async def authorize(self, target: Target) -> bool:
            told.append((str(self.request.remote_ip), self.request.protocol))
            headers = self.request.headers
            for name in ("x-forwarded-for", "x-real-ip"):
                assert headers.get_list(name) == ["127.0.0.1"]
            assert (headers["host"], "forwarded" in headers) == (NAME, False)
            return True

    upstream = await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON))
    rule = (ROUTE, Handler, {"config": setup.config(upstream)})
    port = setup.serve(Application([rule], log_function=lambda handler: None), xheaders=True)
    spoofed = dict.fromkeys(("x-forwarded-for", "x-real-ip", "X-Client-IP", "true-client-ip"), "203.0.113.9")
    spoofed |= {"forwarded": "for=203.0.113.9", "x-scheme": "http", "x-forwarded-proto": "http"}
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, "HTTP/1.1") as caller:
            for headers in ({}, spoofed):
                assert (await caller.call(headers=headers)).code == 200
    assert told == [("127.0.0.1", "https")] * 2
    for exchange in upstream.exchanges:
        assert not [name for name, _ in exchange.headers if b"forwarded" in name or b"-ip" in name]


@pytest.mark.gen_test
async def test_who_calls_is_logged(setup: Setup) -> None:
    """The service's log has the address that nginx sees, and the id that the caller was told."""
    upstream = await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON))
    running = await Running.before(setup, upstream, "--trusted-proxies=127.0.0.1")
    async with nginx((NAME,), deployed(running.port)) as front:
        caller = await tls_caller(front, "127.0.0.9")
        await caller.send(headers=["x-forwarded-for: 203.0.113.9"])
        answer = await caller.answer()
        await caller.close()
    assert answer.status == 200
    _, log = await running.end()
    (line,) = (line for line in log.splitlines() if " tornado_fal_proxy.access: " in line)
    assert " caller=127.0.0.9 " in line.replace("access:", " ")
    assert f" request_id={answer.header('x-request-id')} " in line


PAGE, STRANGE_PAGE = "https://app.example.com", "https://evil.example"


@pytest.mark.parametrize(("origin", "allowed"), [(PAGE, PAGE), (STRANGE_PAGE, None), (None, None)])
@pytest.mark.gen_test
async def test_pages(setup: Setup, origin: str | None, allowed: str | None) -> None:
    """An allowed page may read what nginx answers by itself, and the proxy's answers say who may read them once."""
    upstream = await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON))
    port = setup.proxy(upstream, allowed_origins=[PAGE], allow_credentials=True)
    headers = {} if origin is None else {"origin": origin}
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, "HTTP/2") as caller:
            for code, body in ((413, b"x" * (32 * 1024 * 1024 + 1)), (200, b"{}")):
                response = await caller.call(body=body, headers=headers)
                assert response.code == code
                assert response.headers.get_list("access-control-allow-origin") == ([allowed] if allowed else [])
                assert response.headers.get_list("access-control-allow-credentials") == (["true"] if allowed else [])
                assert response.headers.get_list("vary") == ["Origin"]


@pytest.mark.gen_test
async def test_limits(setup: Setup) -> None:
    """An address has a burst of calls and so many at once; beyond is 429, and fal hears nothing. Others have theirs."""
    text = DEPLOYED.read_text()
    (burst,), (at_once,) = re.findall(r"burst=(\d+) ", text), re.findall(r"limit_conn \w+ (\d+);", text)
    release = asyncio.Event()

    async def held(exchange: Exchange) -> None:
        await exchange.body()
        await release.wait()
        await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(held)
    async with nginx((NAME,), deployed(setup.proxy(upstream))) as front:
        one, other = [[await tls_caller(front, f"127.0.0.{n}") for _ in range(int(at_once) + 1)] for n in (2, 3)]
        for caller in one:
            await caller.send()
        done, waiting = await asyncio.wait(
            [asyncio.create_task(caller.answer()) for caller in one], return_when=asyncio.FIRST_COMPLETED
        )
        refused = [task.result() for task in done]
        assert [(got.status, got.message, got.header("retry-after")) for got in refused] == [
            (429, "Too many calls from your address; try again.", "1")
        ]
        await other[0].send()
        release.set()
        assert (await other[0].answer()).status == 200
        assert {(await task).status for task in waiting} == {200}

        statuses = []
        for _ in range(2 * int(burst)):
            await one[0].send()
            statuses.append((await one[0].answer()).status)
        assert set(statuses) == {200, 429}
        await other[0].send()
        assert (await other[0].answer()).status == 200
        assert len(upstream.exchanges) == int(at_once) + 2 + statuses.count(200)
        for caller in (*one, *other):
            caller.leave()


@pytest.mark.gen_test
async def test_auth_request(setup: Setup) -> None:
    """With auth-request.conf a service says who may call, is asked with cookie and target, and sees no body."""
    asked: list[HTTPServerRequest] = []
    answers = {"let me in": 204, "out": 401, "never": 403, "fall over": 502}

    class Session(RequestHandler):
        def get(self) -> None:
            asked.append(self.request)
            self.set_status(answers[self.get_cookie("user", "out") or ""])

    upstream = await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON))
    auth = setup.serve(Application([("/session", Session)], log_function=lambda handler: None))
    port = setup.proxy(upstream, allowed_origins=[PAGE])
    async with nginx((NAME,), deployed(port, auth=auth)) as front:
        with calling(front, "HTTP/2") as caller:
            assert (await caller.call(headers={"cookie": "user=let me in"})).code == 200
            for user, code in (("out", 401), ("never", 403)):
                response = await caller.call(headers={"cookie": f"user={user}", "origin": PAGE})
                assert (response.code, message(response)) == (code, Unauthorized.message)
                assert response.headers["access-control-allow-origin"] == PAGE
            response = await caller.call(headers={"cookie": "user=fall over"})
            assert (response.code, message(response)) == (500, "The proxy failed.")
            assert len(upstream.exchanges) == 1
            for request in asked:
                assert (request.method, request.body, request.headers["x-fal-target-url"]) == ("GET", b"", RUN)
                assert request.headers.get_list("x-forwarded-for") == ["127.0.0.1"]
            asked.clear()
            may = {"origin": PAGE, "access-control-request-method": "POST"}
            assert (await caller.call("OPTIONS", headers=may)).code == 204
            assert (await caller.call(path="/auth")).code == 404
            assert not asked


@pytest.mark.gen_test
async def test_answers_give_no_orders(setup: Setup) -> None:
    """nginx does not obey an answer's X-Accel headers, which come from whoever runs the model."""
    orders = [("x-accel-redirect", "/"), ("x-accel-limit-rate", "1"), ("x-accel-charset", "koi8-r")]
    port = setup.proxy(await setup.upstream(lambda exchange: exchange.respond(200, b"{}" * 5000, [*JSON, *orders])))
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, "HTTP/2") as caller:
            response = await caller.call()
            assert (response.code, len(response.body)) == (200, 10_000)
            assert response.headers["content-type"] == "application/json"


@pytest.mark.gen_test(timeout=60 + 20 * ROUNDS)
async def test_restart_under_load(setup: Setup) -> None:
    """No call fails while the proxy is restarted behind nginx, and nginx takes its file anew: none 502, none broken."""
    upstream = await setup.upstream(answer)
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        running = await Running.before(setup, upstream, "--processes=2", listener=listener)
        async with nginx((NAME,), deployed(listener.getsockname()[1])) as front:
            async with Load(lambda number: tls_caller(front, f"127.0.1.{number % 250 + 1}")) as load:
                for _ in range(ROUNDS):
                    await load.more(200)
                    await running.end()
                    running = await Running.before(setup, upstream, "--processes=2", listener=listener)
                    await front.reload()
                await load.more(200)
            assert load.failures == []
        await running.end()


def in_fals_place(behind: str) -> Callable[[str, dict[str, str]], str]:
    """A server that speaks HTTP/2 for the sandbox at ``behind``."""
    return lambda listen, files: FAL.format(listen=listen, behind=behind, **files)


@pytest.mark.gen_test
async def test_http2_to_fal(setup: Setup) -> None:
    """Calls of every kind go over HTTP/2 to a server that is not of our making, one connection to each name."""
    sandbox = Sandbox(pace=0.01)
    sandbox.start()
    try:
        async with nginx(FAL_NAMES, in_fals_place(sandbox.address)) as fal:
            port = setup.proxy(fal.address, key=sandbox.key, ca_certs=fal.ca_certs)
            connections: dict[str, set[str]] = {}

            async def served(status: int, method: str, url: str) -> None:
                """The next call that nginx logs is that one, over HTTP/2."""
                protocol, connection, *rest = await fal.logged()
                host, path = urlsplit(url)[1:3]
                assert [protocol, *rest] == ["HTTP/2.0", str(status), method, host, path]
                connections.setdefault(host, set()).add(connection)

            run = await call(port)
            await served(200, "POST", RUN)
            assert json.loads(run.body)["images"]

            job = json.loads((await call(port, target=QUEUE)).body)
            await served(200, "POST", QUEUE)
            for url in (job["status_url"] + "/stream?logs=1", job["status_url"], job["response_url"]):
                answer = await call(port, "GET", target=url)
                await served(200, "GET", url)
                assert answer.status == 200
            assert json.loads(answer.body)["images"]

            stream = await call(port, target=f"{RUN}/stream")
            await served(200, "POST", f"{RUN}/stream")
            assert stream.header("content-type") == "text/event-stream; charset=utf-8"
            assert stream.body.count(b"data: ") == 12

            caller = await PlainCaller.open(port)
            body = json.dumps({"sandbox": {"think_s": 600, "tag": "left"}}).encode()
            await caller.send(body=body, target=f"{RUN}/slow")
            while not sandbox.executions["left"]:
                await asyncio.sleep(0.001)
            caller.leave()
            await served(499, "POST", f"{RUN}/slow")

            # Some kernels keep no more than ten datagrams until they are read.
            for answer in await asyncio.gather(*(call(port) for _ in range(8))):
                assert answer.status == 200
                await served(200, "POST", RUN)

            assert {host: len(numbers) for host, numbers in connections.items()} == {"fal.run": 1, "queue.fal.run": 1}
    finally:
        await sandbox.close()
