"""The command at work: what it serves, and how it ends."""

import asyncio
import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.logs import Logs
from tests.support.proxy import KEY, ROUTE, SECRET, Setup
from tests.support.raw_client import TARGET, RawClient, Response, call, request
from tests.support.scripted_upstream import Exchange
from tests.support.service_process import COMMAND, WITH_KEY, ServiceProcess, connects, environment
from tests.support.stub_handlers import silent
from tests.support.tools import unused_port
from tests.support.waiting import arrived
from tornado_fal_proxy import ProxyConfig
from tornado_fal_proxy.service.application import make_application
from tornado_fal_proxy.service.server import CLOSE_POLL_S


@pytest.mark.gen_test
async def test_it_serves_its_route_and_its_health() -> None:
    """It serves the URL in the start line and nothing else. An option wins over its variable, and it logs to stderr."""
    running = await ServiceProcess.start("--route=/here", FAL_PROXY_ROUTE="/there", FAL_PROXY_PORT="1", FAL_KEY=KEY)
    assert running.line.endswith(f" listens on http://127.0.0.1:{running.port}/here\n")

    health = await call(running.port, "GET", path="/healthz")
    assert (health.status, health.body, health.header("cache-control")) == (200, b'{"status": "ok"}', "no-store")
    client = await RawClient.open(running.port)
    await client.send("HEAD", path="/healthz")
    assert (await client.head()).status == 200
    await client.close()

    for path in ("/", "/there", "/here/", "/hereafter", ROUTE, "/healthz/", "/Healthz"):
        for method in ("GET", "POST", "DELETE"):
            response = await call(running.port, method, path=path)
            assert (response.status, response.message) == (404, "Not found.")
    assert (await call(running.port, "GET", path="/here", target=None)).status == 400

    stdout, stderr = await running.end()
    assert [line.partition(": ")[0] for line in stdout.splitlines()] == ["open", "closed", "limited"]
    assert "WARNING tornado_fal_proxy: open to all: anyone who can reach this proxy may call every model (" in stderr
    assert "error=NotFound" in stderr


RULES = """
async def authorize(handler, target):
    return handler.request.headers.get("x-token") == target.path

def resolve_key(handler, target):
    return "tenant:" + handler.request.headers["x-token"]
"""


@pytest.mark.gen_test
async def test_rules_without_python(setup: Setup, tmp_path: Path) -> None:
    """Options alone restrict it. The operator's functions are found in the working directory, and no key is needed."""

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.respond(200, exchange.header("authorization") or b"", [("content-type", "application/json")])

    upstream = await setup.upstream(respond)
    (tmp_path / "my_rules.py").write_text(RULES)
    config = setup.config(upstream)
    running = await ServiceProcess.start(
        *("--authorize=my_rules:authorize", "--resolve-key=my_rules:resolve_key", "--allow-cancel"),
        cwd=tmp_path,
        FAL_PROXY_ALLOWED_ENDPOINTS="fal-ai/flux/**",
        FAL_PROXY_CA_CERTS=str(config.ca_certs),
        FAL_PROXY_CONNECT_TO=str(config.connect_to),
    )
    token = "x-token: /fal-ai/flux/dev"
    allowed = await call(running.port, headers=[token])
    assert (allowed.status, allowed.body) == (200, b"Key tenant:/fal-ai/flux/dev")
    assert (await call(running.port, headers=["x-token: /other"])).status == 401
    refused = await call(running.port, target="https://fal.run/fal-ai/other", headers=[token])
    assert (refused.status, "allowed_endpoints" in refused.message) == (403, True)
    assert (await call(running.port, "PUT", headers=[token])).header("allow") == "GET, POST"
    stdout, stderr = await running.end()
    assert "if authorize accepts them, may call fal-ai/flux/** and cancel jobs\n" in stdout
    assert "open to all" not in stderr
    assert "tenant:" not in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.gen_test
async def test_a_signal_ends_it_and_every_call_is_answered(setup: Setup, protocol: str, number: signal.Signals) -> None:
    """A POST in flight is answered 500, because it may have run, and a GET 502. The exit code is 3.

    This is also the end of calls that are not finished when --drain-timeout-s is over.
    """
    upstream = await setup.upstream(silent, protocol)
    running = await ServiceProcess.in_front_of(setup, upstream, "--drain-timeout-s=0.3")
    idle = await RawClient.open(running.port)
    waiting = [asyncio.create_task(call(running.port, method)) for method in ("POST", "GET", "POST", "GET")]
    await arrived(upstream, len(waiting))
    running.process.send_signal(number)
    _, stderr = await running.ended(3)
    assert "drain: 4 calls aborted" in stderr
    responses = [await task for task in waiting]
    assert [response.status for response in responses] == [500, 502, 500, 502]
    broken = "The connection to fal's server broke before the response was complete."
    perhaps = " The job may have run: check before sending it again."
    assert [response.message for response in responses] == [broken + perhaps, broken] * 2
    assert await idle.reader.read() == b""
    await idle.close()


@pytest.mark.gen_test
async def test_a_response_that_is_being_written_when_it_ends_leaves_whole(setup: Setup) -> None:
    """A client that has the head of a paid result and still reads gets the rest of it."""
    result = b"x" * 8_000_000

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.respond(200, result, [("content-type", "application/json")])

    running = await ServiceProcess.in_front_of(setup, await setup.upstream(respond))
    client = await RawClient.open(running.port, receive_buffer=65_536)
    await client.send("POST")
    head = await client.head()
    assert head.status == 200
    running.process.send_signal(signal.SIGTERM)
    # No new connection is accepted once it is ending.
    while connects(running.port):
        await asyncio.sleep(0.005)
    await asyncio.sleep(10 * CLOSE_POLL_S)  # a client that takes its time, within CLOSE_GRACE_S
    assert await client.reader.readexactly(len(result)) == result
    await client.close()
    await running.ended()


@pytest.mark.gen_test
async def test_a_call_that_comes_while_it_ends_is_sent_to_another(setup: Setup, logs: Logs) -> None:
    """It is answered 503 on a connection that is still open. Nothing reached fal, so the client may repeat it."""
    application = make_application(ProxyConfig(key=KEY), ROUTE)
    port = setup.serve(application)
    application.closing = True
    for path in (ROUTE, "/healthz", "/"):
        response = await call(port, path=path)
        assert (response.status, response.message) == (503, "The proxy is closing; try again.")
        assert response.header("connection") == "close"


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
@pytest.mark.gen_test
async def test_without_a_stdout_it_serves_all_the_same(redirection: str) -> None:
    """Only the start line is lost."""
    port = unused_port()
    argv = ["sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND, f"--port={port}"]
    process = await asyncio.create_subprocess_exec(*argv, env=environment(WITH_KEY), stderr=subprocess.PIPE)
    while not connects(port):
        await asyncio.sleep(0.01)
    assert (await call(port, "GET", path="/healthz")).status == 200
    process.send_signal(signal.SIGTERM)
    _, stderr = await process.communicate()
    assert b"Traceback" not in stderr
    assert process.returncode == 0


# The key.


@pytest.mark.gen_test
async def test_the_key_goes_to_fal_and_nowhere_else(setup: Setup, protocol: str) -> None:
    """The key is in no log, even at level debug, in no list of processes and in no response, however the call ends."""

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        if exchange.target == b"/lost":
            exchange.abort_connection()
        elif exchange.target == b"/odd":
            await exchange.respond(200, b"not gzip", [("content-encoding", "gzip")])
        else:
            await exchange.respond(200, b"{}", [("content-type", "application/json")])

    upstream = await setup.upstream(respond, protocol)
    running = await ServiceProcess.in_front_of(setup, upstream, "--log-level=debug")
    calls: list[tuple[str, dict[str, Any], int]] = [
        ("POST", {}, 200),
        ("GET", {}, 200),
        ("POST", {"target": "https://fal.run/lost"}, 500),
        ("GET", {"target": "https://fal.run/lost"}, 500),
        ("POST", {"target": "https://fal.run/odd"}, 500),
        ("POST", {"target": "https://untrusted.example.fal.run/"}, 502),
        ("POST", {"target": "https://evil.com/"}, 412),
        ("POST", {"target": None}, 400),
        ("PUT", {}, 405),
        ("POST", {"headers": ["content-type: text/plain"]}, 415),
        ("POST", {"path": "/elsewhere"}, 404),
    ]
    responses: list[Response] = [await call(running.port, method, **more) for method, more, _ in calls]
    assert [response.status for response in responses] == [status for *_, status in calls]
    assert {exchange.header("authorization") for exchange in upstream.exchanges} == {f"Key {KEY}".encode()}

    command_line = Path(f"/proc/{running.process.pid}/cmdline").read_bytes()
    stdout, stderr = await running.end()
    assert b"tornado_fal_proxy" in command_line
    assert "ConnectionLost" in stderr
    for text in (repr(command_line), running.line, stdout, stderr, repr(responses)):
        assert SECRET not in text
        assert "Key " not in text


@pytest.mark.gen_test
async def test_the_sandbox_runs_with_neither_key_nor_network() -> None:
    """A call as fal's SDKs make it succeeds, and the sandbox ends with the service."""
    running = await ServiceProcess.start("--sandbox")
    response = await call(running.port, body=b'{"prompt": "a lighthouse"}')
    assert response.status == 200
    stdout, _ = await running.end()
    assert f"http://127.0.0.1:{running.port}/" in stdout


@pytest.mark.gen_test
async def test_an_outage_of_the_sandbox() -> None:
    """Its usual hosts can be switched off, and calls go on by the backup domain. Another site's page cannot do that."""
    running = await ServiceProcess.start("--sandbox", "--failover")

    async def switch(body: bytes, *headers: str, method: str = "POST") -> tuple[int, bytes]:
        path = "/sandbox/primary"
        response = await call(running.port, method, body, target=None, path=path, headers=headers)
        return response.status, response.body

    assert await switch(b"", method="GET") == (200, b"on\n")
    assert (await switch(b"off", "Sec-Fetch-Site: cross-site"))[0] == 403
    assert (await switch(b"perhaps"))[0] == 400
    for state in (b"off", b"off", b"on", b"off"):
        assert await switch(state) == (200, state + b"\n")
    for target in (TARGET, "https://queue.fal.run/fal-ai/flux/dev"):
        assert (await call(running.port, target=target, body=b'{"sandbox": {"think_s": 0}}')).status == 200
    assert await switch(b"", method="GET") == (200, b"off\n")
    _, stderr = await running.end()
    assert len(re.findall("failover: (?:queue.)?fal.run cannot be reached", stderr)) == 2


# A Host header, and the beginning of the picture's URL: None for the address that the service itself knows.
HOSTS = [
    ("192.0.2.7:8080", "http://192.0.2.7:8080/sandbox/"),
    ("laptop.local", "http://laptop.local/sandbox/"),
    ("[2001:db8::7]:8080", "http://[2001:db8::7]:8080/sandbox/"),
    ("me@evil.example", None),
    ("evil.example/x?", None),
    ("a b", None),
    ('"><script>', None),
    ("evil.example:port", None),
    ("", None),
]


@pytest.mark.gen_test
async def test_pictures_of_the_sandbox_follow_the_browsers_address() -> None:
    """A phone that calls this machine by its address gets pictures from there, and no odd Host header gets anywhere."""
    running = await ServiceProcess.start("--sandbox", "--address=0.0.0.0", "--log-level=error")
    own = f"http://127.0.0.1:{running.port}/sandbox/"
    for host, begin in HOSTS:
        client = await RawClient.open(running.port)
        body = b'{"sandbox": {"think_s": 0}}'
        sent = request(body=body, headers=["x-fal-sandbox-host: forged.example"])
        client.writer.write(sent.replace(b"app.example", host.encode()))
        response = await client.response()
        await client.close()
        if response.status != 400:  # Tornado refuses some by itself
            url = json.loads(response.body)["images"][0]["url"]
            assert url.startswith(begin or own), url
            picture = await call(running.port, "GET", target=None, path=f"/sandbox/{url.partition('/sandbox/')[2]}")
            assert (picture.status, picture.header("content-type")) == (200, "image/png")
        else:
            assert begin is None
    await running.end()


@pytest.mark.parametrize(("text", "status"), [("", 202), ("yes", 202), ("no", 405)])
@pytest.mark.gen_test
async def test_the_sandbox_cancels(text: str, status: int) -> None:
    """The page cancels jobs, so PUT passes in sandbox mode, unless the variable says no."""
    running = await ServiceProcess.start("--sandbox", FAL_PROXY_ALLOW_CANCEL=text)
    job = json.loads((await call(running.port, target="https://queue.fal.run/a/b")).body)
    assert (await call(running.port, "PUT", target=job["cancel_url"])).status == status
    await running.end()
