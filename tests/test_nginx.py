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
from conftest import ROUTE, Setup, tool
from load import ROUNDS, Load, answer
from running import Running
from tornado.curl_httpclient import CurlAsyncHTTPClient, CurlError
from tornado.httpclient import HTTPResponse
from upstream import FAL_NAMES, Exchange

from tornado_fal_proxy.errors import BodyTooLarge
from tornado_fal_proxy.sandbox import Sandbox

DEPLOYED = Path(__file__).parents[1] / "deploy/nginx/tornado-fal-proxy.conf"
NAME = "fal-proxy.example.com"
RUN = "https://fal.run/fal-ai/flux/dev"
QUEUE = "https://queue.fal.run/fal-ai/flux/dev"
JSON = [("content-type", "application/json")]
DIE, LIVE = b'{"die": 1}', b"{}"

AROUND = """
daemon off;
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

    def __init__(self, address: str, ca_certs: str, log: socket.socket) -> None:
        self.address = address
        self.ca_certs = ca_certs
        self._log = log

    async def logged(self) -> list[str]:
        """The next line of the access log: protocol, number of the connection, status, method, host, path."""
        datagram = await asyncio.get_running_loop().sock_recv(self._log, 65_536)
        return datagram.decode().partition("nginx: ")[2].split()


@asynccontextmanager
async def nginx(names: tuple[str, ...], servers: Callable[[str, dict[str, str]], str]) -> AsyncIterator[Nginx]:
    """nginx with a certificate for ``names``. ``servers`` makes its configuration of an address to listen on and files.

    nginx never runs as root, as whom tests may run.
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
        (path / "nginx.conf").write_text(AROUND.format(directory=directory, servers=servers(address, files)))
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
            process = await create_subprocess_exec(
                *(program, "-p", directory, "-c", "nginx.conf", "-e", "errors"),
                stdin=DEVNULL,
                pass_fds=[listener.fileno()],
                env={"NGINX": f"{listener.fileno()};"},
                **identity,
            )
            listener.close()
            try:
                yield Nginx(address, f"{directory}/ca.pem", log)
            finally:
                if process.returncode is None:
                    process.send_signal(signal.SIGTERM)
                code = await process.wait()
                said = errors.read_text() if errors.exists() else ""
            assert code == 0, said
            assert not re.search(r"\[(?:emerg|alert|crit)\]", said), said


def deployed(port: int) -> Callable[[str, dict[str, str]], str]:
    """The file of deploy/, with nothing but its addresses, name and certificate replaced."""

    def servers(listen: str, files: dict[str, str]) -> str:
        text = DEPLOYED.read_text()
        for old, new in (
            ("listen 443 ", f"listen {listen} "),
            ("server 127.0.0.1:8080;", f"server 127.0.0.1:{port};"),
            (f"/etc/ssl/{NAME}/fullchain.pem", files["certificate"]),
            (f"/etc/ssl/{NAME}/privkey.pem", files["key"]),
        ):
            assert text.count(old) == 1
            text = text.replace(old, new)
        return text

    return servers


class Caller:
    """A caller of nginx, over HTTP/2 or HTTP/1.1: Tornado's own curl client, as it comes."""

    def __init__(self, front: Nginx, version: str) -> None:
        self._front = front
        self._version = version
        self._client = CurlAsyncHTTPClient(force_instance=True)
        self._sockets: list[socket.socket] = []

    async def call(
        self, method: str = "POST", body: bytes | None = b"{}", *, path: str = ROUTE, target: str = RUN, **more: Any
    ) -> HTTPResponse:
        """One call, whatever its status. Raises CurlError when the answer breaks off."""
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
            headers={"x-fal-target-url": target, "content-type": "application/json"},
            body=None if method == "GET" else body,
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
    port = setup.proxy(upstream)
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, version) as caller:
            for length in (2, 20_000_000):
                response = await caller.call(body=b'"' + b"x" * (length - 2) + b'"')
                assert (response.code, json.loads(response.body)) == (201, {"size": length})
                assert response.headers["x-fal-request-id"] == "7"
            response = await caller.call(body=b"x" * (32 * 1024 * 1024 + 1))
            assert (response.code, message(response)) == (413, BodyTooLarge.message)
            assert len(upstream.exchanges) == 2


@pytest.mark.gen_test
async def test_bounds_agree(setup: Setup) -> None:
    """The bounds in the file are those of the proxy's defaults."""
    text, config = DEPLOYED.read_text(), setup.config("127.0.0.1:1")
    (body,) = re.findall(r"client_max_body_size (\d+)m;", text)
    assert int(body) * 1024 * 1024 == config.max_body_bytes
    (read,) = re.findall(r"proxy_read_timeout (\d+)s;", text)
    (send,) = re.findall(r"send_timeout (\d+)s;", text.replace("proxy_send_timeout", ""))
    assert min(int(read), int(send)) > config.idle_timeout_s


@pytest.mark.gen_test
async def test_only_the_route_is_public(setup: Setup) -> None:
    """nginx passes on no other path, whatever it looks like."""
    upstream = await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON))
    port = setup.proxy(upstream)
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, "HTTP/2") as caller:
            for path in ("/", "/healthz", ROUTE + "/", ROUTE + "x", "/api/fal", "/x" + ROUTE):
                response = await caller.call(path=path)
                assert response.code == 404, path
                assert b"nginx" in response.body, path
            assert not upstream.exchanges
            assert (await caller.call()).code == 200


@pytest.mark.gen_test
async def test_events(setup: Setup, version: str) -> None:
    """Each event reaches the caller before the next one is sent."""
    arrived: asyncio.Queue[bytes] = asyncio.Queue()
    events = [b'data: {"n": %d}\n\n' % number for number in range(20)]

    async def stream(exchange: Exchange) -> None:
        await exchange.start(200, [("content-type", "text/event-stream")])
        for event in events:
            await exchange.send(event)
            assert await arrived.get() == event
        await exchange.end()

    port = setup.proxy(await setup.upstream(stream))
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, version) as caller:
            response = await caller.call(target=RUN + "/stream", streaming_callback=arrived.put_nowait)
            assert response.code == 200
            assert response.headers["content-type"] == "text/event-stream"


@pytest.mark.gen_test
async def test_broken_stream(setup: Setup, version: str, logs: Any) -> None:
    """A stream that breaks at fal breaks for the caller, and does not end as if it were complete."""
    arrived = asyncio.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.start(200, [("content-type", "text/event-stream")])
        await exchange.send(b"data: {}\n\n")
        await arrived.wait()
        exchange.reset()

    logs.expect("the answer was broken off")
    port = setup.proxy(await setup.upstream(stream))
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, version) as caller:
            with pytest.raises(CurlError):
                await caller.call(streaming_callback=lambda chunk: arrived.set())
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
    """When the proxy ends under a call nginx does not repeat it, and a POST's answer is none that clients repeat.

    On a fresh connection and on a used one, where nginx would repeat by default.
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
    assert received == [(1, "post"), (2, "post"), (2, "post"), (3, "post"), (3, "get")]


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
    """No call fails while the proxy is restarted behind nginx, which keeps connections to it: none 502, none broken."""
    upstream = await setup.upstream(answer)
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        running = await Running.before(setup, upstream, "--processes=2", listener=listener)
        async with nginx((NAME,), deployed(listener.getsockname()[1])) as front:
            context = ssl.create_default_context(cafile=front.ca_certs)
            host, port = front.address.split(":")

            async def connect(_number: int) -> PlainCaller:
                caller = PlainCaller()
                caller.reader, caller.writer = await asyncio.open_connection(
                    host, int(port), ssl=context, server_hostname=NAME
                )
                return caller

            async with Load(connect) as load:
                for _ in range(ROUNDS):
                    await load.more(200)
                    await running.end()
                    running = await Running.before(setup, upstream, "--processes=2", listener=listener)
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
