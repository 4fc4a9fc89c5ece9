"""The doctor in front of real ones: the command, nginx with the file of deploy/, and nginx as people write it.

A new fault in front of the proxy is a row of ``FRONTS``.
"""

import asyncio
import json
import os
import re
import sys
import time
from asyncio.subprocess import PIPE, create_subprocess_exec
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import pytest

from tests.support.logs import Logs
from tests.support.nginx import NAME, deployed, nginx
from tests.support.pages import Page
from tests.support.proxy import KEY, ROUTE, SECRET, Setup
from tests.support.scripted_upstream import Exchange
from tests.support.service_process import COMMAND, ServiceProcess, environment
from tests.support.stub_handlers import JSON
from tests.support.tools import unused_port
from tornado_fal_proxy.doctor.checks import check_events, check_retries
from tornado_fal_proxy.doctor.findings import OK, WRONG, Finding, shown
from tornado_fal_proxy.doctor.route import check_reachable
from tornado_fal_proxy.doctor.visitor import Seen, Visitor

PAGE, DEPLOY = Page("docs/troubleshoot.md"), Page("docs/deploy.md")

ORIGIN = "https://app.example.com"
URL = f"https://{NAME}{ROUTE}"


class Report(NamedTuple):
    """What a doctor printed."""

    code: int
    findings: dict[str, tuple[str, str, str]]
    output: str

    @property
    def results(self) -> dict[str, str]:
        return {check: result for check, (result, _, _) in self.findings.items()}

    def told(self, check: str) -> str:
        """Return the words for a check, and the change."""
        return " ".join(self.findings[check][1:])


async def doctor(*argv: str, variables: dict[str, str] | None = None) -> Report:
    """Run the command, and return what it printed, which never has the key."""
    process = await create_subprocess_exec(
        *(*COMMAND, "doctor", *argv, "--format=json"), stdout=PIPE, stderr=PIPE, env=environment(variables or {})
    )
    stdout, stderr = (text.decode() for text in await process.communicate())
    assert stderr == ""
    assert SECRET not in stdout
    findings = [(f["check"], (f["result"], f["text"], f["change"])) for f in json.loads(stdout)["findings"]]
    assert process.returncode is not None
    return Report(process.returncode, dict(findings), stdout)


def no_such_job(exchange: Exchange) -> Any:
    return exchange.respond(404, b'{"detail": "Request not found"}', JSON)


ALL_WELL = {
    **dict.fromkeys(("reachable", "tls", "http version", "route", "cors", "events", "body size", "retries"), "ok"),
    **dict.fromkeys(("time-outs", "fal"), "ok"),
}


@pytest.mark.gen_test
async def test_the_file_of_deploy(setup: Setup) -> None:
    """Nothing is wrong with the file of deploy/ in front of the command, which allows diagnostics."""
    upstream = await setup.upstream(no_such_job)
    options = ("--allow-diagnostics", f"--allowed-origins={ORIGIN}")
    service = await ServiceProcess.in_front_of(setup, upstream, *options)
    async with nginx((NAME,), deployed(service.port)) as front:
        where = (f"--connect-to={front.address}", f"--ca-certs={front.ca_certs}")
        report = await doctor(URL, *where, f"--origin={ORIGIN}", "--wait-s=1")
    await service.end()
    assert report.results == ALL_WELL, report.output
    assert report.code == 0


@pytest.mark.gen_test
async def test_an_application_without_anything_in_front(setup: Setup) -> None:
    """An embedded handler without diagnostics and CORS: the doctor says what it did not look at, and how it could."""
    port = setup.proxy(await setup.upstream(no_such_job))
    report = await doctor(f"http://127.0.0.1:{port}{ROUTE}")
    assert report.code == 0
    well = dict.fromkeys(("reachable", "route", "events", "body size", "fal"), "ok")
    assert report.results == {**well, **dict.fromkeys(("cors", "retries", "time-outs"), "skipped")}
    assert "--allow-diagnostics" in report.told("retries")
    assert "--origin" in report.told("cors")
    assert "--wait-s" in report.told("time-outs")


class Front(NamedTuple):
    """A server { } of nginx, and what the doctor must say of it."""

    location: str
    check: str
    result: str
    words: str
    listen: str = "ssl http2"
    around: str = ""
    argv: tuple[str, ...] = ()


PASS = "proxy_pass http://proxy;"
COMPRESSING = "gzip on; gzip_types text/event-stream; gzip_min_length 0; gzip_proxied any; gzip_http_version 1.0;"
FRONTS = {
    "naive, events": Front(PASS, "events", "ok", "when it was sent"),
    "naive, body": Front(PASS, "body size", "wrong", "client_max_body_size 32m;"),
    "naive, lost POST": Front(PASS, "retries", "wrong", "error_page 502 504"),
    "naive, fal": Front(PASS, "fal", "ok", "takes its key"),
    "buffering": Front(
        f"{PASS} proxy_ignore_headers X-Accel-Buffering;", "events", "wrong", "proxy_buffering off; in nginx's location"
    ),
    "compression": Front(f"{PASS} {COMPRESSING}", "events", "note", "gzip_types"),
    "compression that buffers": Front(
        f"{PASS} {COMPRESSING} proxy_ignore_headers X-Accel-Buffering;", "events", "wrong", "gzip off;"
    ),
    "http2 off": Front(PASS, "http version", "note", "http2", listen="ssl"),
    "tiny bodies": Front(f"{PASS} client_max_body_size 1k;", "body size", "wrong", "1048576 bytes too"),
    "large bodies": Front(f"{PASS} client_max_body_size 32m;", "body size", "ok", "33554432"),
    "retries": Front(
        f"{PASS} proxy_next_upstream error timeout http_500 non_idempotent;", "retries", "wrong", "sent 2 times"
    ),
    "short time-out": Front(
        f"{PASS} proxy_read_timeout 1s;", "time-outs", "wrong", "proxy_read_timeout 960s;", argv=("--wait-s=4",)
    ),
    "no CORS": Front(
        PASS, "cors", "wrong", "--allowed-origins=https://other.example", argv=("--origin=https://other.example",)
    ),
    "CORS": Front(PASS, "cors", "ok", "may call", argv=(f"--origin={ORIGIN}",)),
    "CORS twice": Front(
        f"{PASS} add_header Access-Control-Allow-Origin $http_origin always;",
        "cors",
        "wrong",
        "remove add_header",
        argv=(f"--origin={ORIGIN}",),
    ),
    "preflight stopped": Front(
        f"if ($request_method = OPTIONS) {{ return 401; }} {PASS}",
        "cors",
        "wrong",
        "preflight",
        argv=(f"--origin={ORIGIN}",),
    ),
    "preflight without headers": Front(
        "if ($request_method = OPTIONS) { add_header Access-Control-Allow-Origin $http_origin; return 204; } " + PASS,
        "cors",
        "wrong",
        "x-fal-target-url",
        argv=(f"--origin={ORIGIN}",),
    ),
    "header dropped": Front(f'{PASS} proxy_set_header x-fal-target-url "";', "route", "wrong", "does not arrive"),
    "diagnostic dropped": Front(
        f'{PASS} proxy_set_header x-fal-proxy-diagnostic "";', "events", "skipped", "x-fal-proxy-diagnostic"
    ),
    "nobody behind": Front("proxy_pass http://nobody;", "route", "wrong", "start tornado-fal-proxy"),
    "no route": Front("return 404;", "route", "wrong", f"--route={ROUTE}"),
    "redirect": Front(
        "return 301 https://www.example.com$uri;", "route", "wrong", "https://www.example.com/api/fal/proxy"
    ),
    "page": Front('default_type text/html; return 200 "<html>";', "route", "wrong", "it is a page"),
    "login": Front("return 401;", "route", "wrong", "--header"),
    "rate limit": Front("return 429;", "route", "wrong", "too many calls"),
}


def written(front: Front, port: int, address: str, files: dict[str, str]) -> str:
    """Return the servers of a naive nginx."""
    return f"""
    upstream proxy {{ server 127.0.0.1:{port} max_fails=0; server localhost:{port} max_fails=0; }}
    upstream nobody {{ server 127.0.0.1:{unused_port()}; }}
    {front.around}
    server {{
        listen {address} {front.listen};
        ssl_certificate {files["certificate"]};
        ssl_certificate_key {files["key"]};
        proxy_connect_timeout 5s;
        proxy_read_timeout 60s;
        location / {{ {front.location} }}
    }}
    """


@pytest.mark.parametrize("name", FRONTS)
@pytest.mark.gen_test
async def test_fronts(setup: Setup, name: str) -> None:
    """The doctor finds what is wrong with something in front, and names the line to change."""
    front = FRONTS[name]
    upstream = await setup.upstream(no_such_job)
    port = setup.proxy(upstream, allow_diagnostics=True, allowed_origins=[ORIGIN])
    async with nginx((NAME,), lambda listen, files: written(front, port, listen, files)) as running:
        report = await doctor(URL, f"--connect-to={running.address}", f"--ca-certs={running.ca_certs}", *front.argv)
    assert report.findings[front.check][0] == front.result, report.output
    assert front.words in report.told(front.check), report.output
    assert report.code == (1 if "wrong" in report.results.values() else 0)


@pytest.mark.gen_test
async def test_connections_that_fail(setup: Setup) -> None:
    """Without a connection there is one finding, which says why."""
    listen = deployed(unused_port())
    async with nginx((NAME,), listen) as front:
        to = f"--connect-to={front.address}"
        rows: list[tuple[tuple[str, ...], str]] = [
            ((URL, to), "ssl_certificate"),
            ((f"https://other.example{ROUTE}", to, f"--ca-certs={front.ca_certs}"), "ssl_certificate"),
            ((f"http://127.0.0.1:{unused_port()}{ROUTE}",), "nothing accepts connections"),
            ((f"https://no-such-name.invalid{ROUTE}",), "the DNS record of no-such-name.invalid"),
        ]
        for argv, words in rows:
            report = await doctor(*argv)
            assert (report.code, list(report.results)) == (1, ["reachable"])
            assert words in report.told("reachable")


@pytest.mark.gen_test
async def test_plain_http_and_a_silent_server(setup: Setup) -> None:
    """Calls without TLS are wrong, except on this machine. A server that only closes is named."""

    async def close(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    port = setup.proxy(await setup.upstream(no_such_job))
    report = await doctor(f"http://{NAME}{ROUTE}", f"--connect-to=127.0.0.1:{port}")
    assert report.results["tls"] == "wrong"
    server = await asyncio.start_server(close, "127.0.0.1", 0)
    async with server:
        closing = server.sockets[0].getsockname()[1]
        report = await doctor(f"http://127.0.0.1:{closing}{ROUTE}")
    assert "closes the connection" in report.told("reachable")


HEAD = b"HTTP/1.1 400 Bad\r\ncontent-type: application/json\r\n"
ODD_SERVERS = {
    "no HTTP": (b"\x00\xff hello\r\n\r\n", 1, "reachable", "HTTP/0.9"),
    "a head without end": (b"HTTP/1.1 400 Bad\r\n" + b"x-a: y\r\n" * 100_000, 1, "reachable", "not whole"),
    "a body without end": (HEAD + b"\r\n" + b"y" * 60_000, 100, "reachable", "more than 1048576 bytes"),
    "a body that is cut": (HEAD + b'content-length: 500\r\n\r\n{"message": "x"}', 1, "reachable", "not whole"),
    "deep JSON": (HEAD + b"content-length: 60000\r\n\r\n" + b"[" * 60_000, 1, "route", "no proxy for fal"),
    "an odd status": (b"HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n", 1, "route", "999"),
    "controls": (b"HTTP/1.1 302 F\r\nlocation: /\x1b[31m\r\ncontent-length: 0\r\n\r\n", 1, "route", "redirects"),
}


@pytest.mark.parametrize("name", ODD_SERVERS)
@pytest.mark.gen_test
async def test_odd_servers(name: str) -> None:
    """Whatever a server sends, the doctor ends soon, says what came, and sends what it was given to nobody else."""
    piece, times, check, words = ODD_SERVERS[name]

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(times):
                writer.write(piece)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{ROUTE}"
        report = await doctor(url, "--header=cookie: session=a-secret")
    assert (report.code, report.results[check]) == (1, "wrong")
    assert words in report.told(check)
    assert "a-secret" not in report.output


@pytest.mark.gen_test
async def test_a_proxy_that_hangs() -> None:
    """A proxy that stops to answer is no proxy that repeats calls."""
    statuses = {b"DELETE": 405, b"POST": 412, b"GET": 400, b"OPTIONS": 405}

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                if b"diagnostic" not in head:
                    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 16\r\n\r\n" % statuses[head.split()[0]])
                    writer.write(b'{"message": "m"}')
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with server:
        visitor = Visitor(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{ROUTE}")
        visitor.timeout_s = 2
        findings = await asyncio.to_thread(lambda: [*check_events(visitor), *check_retries(visitor)])
        visitor.close()
    assert [(finding.check, finding.result) for finding in findings] == [("events", "wrong"), ("retries", "skipped")]


REFUSED = {"detail": "Cannot access application"}


@pytest.mark.parametrize(
    ("respond", "result", "words"),
    [
        (no_such_job, "ok", "takes"),
        (lambda exchange: exchange.respond(401, json.dumps(REFUSED).encode(), JSON), "wrong", "FAL_KEY"),
        (lambda exchange: exchange.respond(503, b"{}", JSON), "wrong", "503"),
    ],
)
@pytest.mark.gen_test
async def test_the_key(setup: Setup, respond: Callable[[Exchange], Any], result: str, words: str) -> None:
    """The doctor says, through the proxy and with the key of this machine, whether fal takes it. Nothing is paid."""
    upstream = await setup.upstream(respond)
    config = setup.config(upstream)
    variables = {
        "FAL_KEY": KEY,
        "FAL_PROXY_CONNECT_TO": str(config.connect_to),
        "FAL_PROXY_CA_CERTS": str(config.ca_certs),
    }
    report = await doctor(f"http://127.0.0.1:{setup.proxy(upstream)}{ROUTE}", "--key", variables=variables)
    for check in ("fal", "key"):
        assert report.findings[check][0] == result, report.output
        assert words in report.told(check)
    assert {exchange.target.rpartition(b"/")[2] for exchange in upstream.exchanges} == {b"status"}
    assert [exchange.header("authorization") for exchange in upstream.exchanges] == [f"Key {KEY}".encode()] * 2


@pytest.mark.gen_test
async def test_fal_out_of_reach(setup: Setup, logs: Logs) -> None:
    """The doctor says on which machine fal is not reached, and names a rule that keeps it from looking."""
    logs.expect("upstream error: 502")
    nowhere = f"127.0.0.1:{unused_port()}"
    variables = {"FAL_KEY": KEY, "FAL_PROXY_CONNECT_TO": nowhere}
    url = f"http://127.0.0.1:{setup.proxy(nowhere)}{ROUTE}"
    report = await doctor(url, "--key", variables=variables)
    assert (report.results["fal"], report.results["key"]) == ("wrong", "wrong")
    assert "No connection to fal's server" in report.told("fal")
    url = f"http://127.0.0.1:{setup.proxy(nowhere, allowed_endpoints=['fal-ai/veo3'])}{ROUTE}"
    assert "--endpoint" in (await doctor(url)).told("fal")


WRONG_ARGUMENTS = [
    ((), "URL"),
    (("app.example.com",), "http or https URL"),
    ((f"https://user:{SECRET}@app.example.com/",), "without a user or a password"),
    (("https://app.example.com:99999/",), "http or https URL"),
    (("https://a.example/", "--origin=a.example"), "must be an origin"),
    (("https://a.example/", f"--header={SECRET}"), "must be a header line"),
    (("https://a.example/", "--wait-s=301"), "from 1 to 300"),
    (("https://a.example/", "--endpoint=../x"), "must be an endpoint"),
    (("https://a.example/", "--connect-to=here"), "HOST:PORT"),
    (("https://a.example/", "--ca-certs=/no/file"), "/no/file"),
    (("https://a.example/", "--format=xml"), "invalid choice"),
    (("https://a.example/", "--env-file=x"), "is read with --key only"),
    (("https://a.example/", "--key"), "no key: set FAL_KEY"),
    (("https://a.example/", "--sandbox"), "--sandbox"),
]


@pytest.mark.parametrize(("argv", "words"), WRONG_ARGUMENTS)
@pytest.mark.gen_test
async def test_wrong_arguments(argv: tuple[str, ...], words: str) -> None:
    """One line says what to change, and shows nothing that may be secret."""
    process = await create_subprocess_exec(
        *(*COMMAND, "doctor", *argv), stdout=PIPE, stderr=PIPE, env=environment({"PATH": os.environ["PATH"]})
    )
    stdout, stderr = (text.decode() for text in await process.communicate())
    assert (process.returncode, stdout, stderr.count("\n")) == (2, "", 1)
    assert words in stderr
    assert SECRET not in stderr


@pytest.mark.gen_test
async def test_the_page(setup: Setup) -> None:
    """docs/troubleshoot.md shows the lines that its command prints, of a page whose origin is not allowed."""
    command = PAGE.command("doctor")
    assert command == DEPLOY.command("doctor").strip()
    words = command.replace("PROXY.NAME", NAME).replace("PAGE.NAME", "page.name").split()[1:]
    port = setup.proxy(await setup.upstream(no_such_job), allowed_origins=[ORIGIN])
    async with nginx((NAME,), deployed(port)) as front:
        process = await create_subprocess_exec(
            *(*COMMAND, *words, f"--connect-to={front.address}", f"--ca-certs={front.ca_certs}"),
            stdout=PIPE,
            env=environment({}),
        )
        stdout, _ = await process.communicate()
    assert process.returncode == 1
    printed = re.sub(r"valid for \d+", "valid for 61", stdout.decode()).replace("page.name", "PAGE.NAME")
    at = 0
    for line in PAGE.part("doctor").splitlines():
        at = printed.index(line + "\n", at)


def test_text() -> None:
    """A line is at most as wide as a page of text, and a server's control characters cannot reach a terminal."""
    long = "a word of a server's \x1b[31m " * 10
    text = shown("https://a.example/", [Finding("route", WRONG, long, long), Finding("tls", OK, "well")], "text")
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[-1] == "1 ok, 0 note, 1 wrong"


@pytest.mark.parametrize(("days", "result"), [(13, WRONG), (15, OK)])
def test_certificates_end(days: int, result: str) -> None:
    """A certificate that ends within two weeks was not renewed as it should be."""
    ends = time.strftime("%b %d %H:%M:%S %Y GMT", time.gmtime(time.time() + days * 86_400 + 60))
    seen = Seen(status=400, version="HTTP/2", expires=ends)
    finding = next(finding for finding in check_reachable(seen, URL) if finding.check == "tls")
    assert (finding.result, f"for {days} more days" in finding.text) == (result, True)


@pytest.mark.gen_test
async def test_for_people(setup: Setup) -> None:
    """The text has a line for each finding, and no control character of a server's."""
    port = setup.proxy(await setup.upstream(no_such_job))
    process = await create_subprocess_exec(
        *(sys.executable, "-m", "tornado_fal_proxy", "doctor", f"http://127.0.0.1:{port}{ROUTE}"),
        stdout=PIPE,
        env=environment({}),
    )
    stdout, _ = await process.communicate()
    first, *lines, last = stdout.decode().splitlines()
    assert first == f"http://127.0.0.1:{port}{ROUTE}"
    assert last == "5 ok, 0 note, 0 wrong"
    assert all(len(line) <= 100 for line in lines)
