"""Run nginx with the files of deploy/nginx, and call it.

nginx starts as in its own upgrades: it takes over a socket that is listening already. So nothing else can take the
port, and no test has to wait until nginx is ready. Its access log arrives as datagrams.
"""

import asyncio
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
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pycurl
from tornado.curl_httpclient import CurlAsyncHTTPClient
from tornado.httpclient import HTTPResponse
from tornado.httputil import HTTPHeaders

from tests.support.certificates import Authority
from tests.support.proxy import ROUTE, Setup
from tests.support.raw_client import RawClient
from tests.support.service_process import ServiceProcess
from tests.support.tools import ROOT, tool

FILES = ROOT / "deploy/nginx"
DEPLOYED = FILES / "tornado-fal-proxy.conf"
NAME = "fal-proxy.example.com"
RUN = "https://fal.run/fal-ai/flux/dev"
# The length of a second of the file in tests that cannot wait for real ones; nginx's default for its time limits.
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


class Nginx:
    """A running nginx."""

    def __init__(self, address: str, ca_certs: str, log: socket.socket, errors: Path, command: list[str]) -> None:
        self.address = address
        self.errors = errors
        self.ca_certs = ca_certs
        self._log = log
        self._command = command

    async def reload(self) -> None:
        """Reload the configuration, as an operator does after a change."""
        process = await create_subprocess_exec(*self._command, "-s", "reload")
        assert await process.wait() == 0

    async def logged(self) -> list[str]:
        """Return the next line of the access log: protocol, number of the connection, status, method, host, path."""
        datagram = await asyncio.get_running_loop().sock_recv(self._log, 65_536)
        return datagram.decode().partition("nginx: ")[2].split()


@asynccontextmanager
async def nginx(
    names: tuple[str, ...], servers: Callable[[str, dict[str, str]], str], *, second_ms: int = 1000
) -> AsyncIterator[Nginx]:
    """Run nginx with a certificate for ``names``.

    ``servers`` makes its configuration from an address to listen on and the files of the certificate. ``second_ms`` is
    the length of a second in nginx's own defaults for time limits. nginx never runs as root, although tests may.
    """
    program = tool("nginx")
    with tempfile.TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        path = Path(directory)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        authority = Authority(path)
        authority.write_certificate(path / "server.pem", *names)
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
                yield Nginx(address, authority.ca_file, log, errors, command)
            finally:
                if process.returncode is None:
                    process.send_signal(signal.SIGTERM)
                code = await process.wait()
                error_log = errors.read_text() if errors.exists() else ""
            assert code == 0, error_log
            assert not re.search(r"\[(?:emerg|alert|crit)\]", error_log), error_log


def deployed(*ports: int, second_ms: int = 1000, auth: int | None = None) -> Callable[[str, dict[str, str]], str]:
    """Return a function that makes the file of deploy/ ready to run: only addresses, name and certificate are replaced.

    The proxies listen on ``ports``. A second of the file lasts ``second_ms``. With ``auth``, the service on that port
    decides which clients may call.
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
            included = replaced(FILES / "auth-request.conf", {"127.0.0.1:9000": f"127.0.0.1:{auth}"})
            text, count = re.subn(r"# include /etc/nginx/tornado-fal-proxy-auth\.conf;.*", lambda _: included, text)
            assert count == 1
        return re.sub(r"(?<=_timeout )(\d+)s;", lambda time: f"{int(time[1]) * second_ms}ms;", text)

    return servers


def replaced(file: Path, texts: dict[str, str]) -> str:
    """Return the text of the file with each of ``texts`` replaced, which must be there exactly once."""
    text = file.read_text()
    for old, new in texts.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


async def two_workers(setup: Setup, upstream: Any) -> ServiceProcess:
    """Start the real command with two workers, as it is deployed."""
    return await ServiceProcess.in_front_of(setup, upstream, "--processes=2")


class CurlClient:
    """A client of nginx over HTTP/2 or HTTP/1.1: Tornado's own curl client, unchanged."""

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
        """Make one call with more ``headers``, and return the response, whatever its status.

        Raise CurlError when the response ends too early.
        """
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
        """Shut down all connections at once, also those that carry a call."""
        for opened in self._sockets:
            opened.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close all connections, when no call is running."""
        self._client.close()
        for opened in self._sockets:
            opened.close()


@contextmanager
def calling(front: Nginx, version: str) -> Iterator[CurlClient]:
    with closing(CurlClient(front, version)) as client:
        yield client


async def tls_client(front: Nginx, address: str, receive_buffer: int | None = None) -> RawClient:
    """Connect a client over HTTP/1.1 whose own address is ``address``."""
    host, port = front.address.split(":")
    connected = socket.socket()
    if receive_buffer is not None:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connected.setblocking(False)
    connected.bind((address, 0))
    client = RawClient()
    try:
        await asyncio.get_running_loop().sock_connect(connected, (host, int(port)))
        client.reader, client.writer = await asyncio.open_connection(
            sock=connected, ssl=ssl.create_default_context(cafile=front.ca_certs), server_hostname=NAME
        )
    except OSError:
        connected.close()
        raise
    return client


def message(response: HTTPResponse) -> str:
    """Return the message of a response that the proxy or nginx made by itself."""
    assert response.headers.get_list("content-type") == ["application/json"]
    content = json.loads(response.body)
    assert list(content) == ["message"]
    return str(content["message"])
