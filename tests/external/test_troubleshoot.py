"""docs/troubleshoot.md is true: its commands are run in each trouble, and the log has the lines that it shows."""

import asyncio
import re
import shlex
import subprocess

import pytest

from tests.support.metrics import started
from tests.support.pages import Page
from tests.support.proxy import Setup
from tests.support.raw_client import call
from tests.support.scripted_upstream import Exchange
from tests.support.service_process import COMMAND, ServiceProcess, environment
from tests.support.stub_handlers import EVENT, EVENT_STREAM, JSON
from tests.support.tools import ROOT, tool
from tornado_fal_proxy import errors

PAGE = Page("docs/troubleshoot.md")
TARGET = "https://fal.run/fal-ai/flux/dev"
ORIGIN = "https://app.example.com"


class Fal:
    """Answer as fal does to an unknown job, with a stream, or as the body asks: refuse the key, limit, or break."""

    def __init__(self) -> None:
        self.last_event = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        body = await exchange.body()
        if b"key" in body:
            await exchange.respond(401, b'{"detail": "No user found"}', JSON)
        elif b"limit" in body:
            await exchange.respond(429, b"{}", JSON)
        elif b"break" in body:
            exchange.reset()
        elif b"/requests/" in exchange.target:
            await exchange.respond(404, b'{"detail": "Request not found"}', JSON)
        else:
            await exchange.start(200, EVENT_STREAM)
            await exchange.send(EVENT)
            await self.last_event.wait()
            await exchange.end()


async def run(line: str, port: int, admin: int = 0) -> asyncio.subprocess.Process:
    """Run a command of the page against the service on these ports."""
    tool("curl")
    line = line.replace(":8080", f":{port}").replace(":9464", f":{admin}").replace("curl ", "curl -s --noproxy '*' ")
    return await asyncio.create_subprocess_shell(line, stdout=asyncio.subprocess.PIPE)


async def output(line: str, port: int, admin: int = 0) -> str:
    """Return the output of a command of the page."""
    return (await (await run(line, port, admin)).communicate())[0].decode()


def in_order(text: str, *lines: str) -> bool:
    """Tell whether each of the lines is a part of the text."""
    return all(line in text for line in lines)


@pytest.mark.gen_test
async def test_the_log(setup: Setup) -> None:
    """The log has the line that each section shows, and the commands get the responses that they list."""
    upstream = await setup.upstream(fal := Fal())
    running, admin = await started(setup, upstream, "--allowed-endpoints=fal-ai/flux/**,fal-ai/any-llm")
    port = running.port
    probe = await output(PAGE.command("probe"), port)
    assert probe.startswith("HTTP/1.1 404 ")
    assert '"detail"' in probe
    stream = await run(PAGE.command("events"), port)
    assert stream.stdout is not None
    assert PAGE.part("events").strip() in (await stream.stdout.readuntil(EVENT.strip())).decode()
    fal.last_event.set()
    await stream.communicate()
    assert (await output(PAGE.command("preflight"), port)).startswith("HTTP/1.1 405 ")
    in_flight = await output(PAGE.command("in-flight"), 0, admin)
    assert re.search(r"^fal_proxy_max_in_flight\S* 20000", in_flight, re.MULTILINE)
    for body, status in ((b"key", 401), (b"limit", 429), (b"break", 500)):
        assert (await call(port, "POST", b'"' + body + b'"', target=TARGET)).status == status
    refused = await call(port, target="https://fal.run/fal-ai/other")
    assert refused.status == 403
    _, log = await running.end()
    shown = subprocess.run(
        ["sh", "-c", PAGE.command("log").partition("|")[2]], input=log, capture_output=True, text=True
    )
    assert "outcome=refused" in shown.stdout
    no_origin, wrong_origin = PAGE.part("preflight").splitlines()
    names = ("key-refused", "limited-by-fal", "may-have-run", "refused")
    assert in_order(log, no_origin, *(PAGE.part(name).strip() for name in names))
    assert "; the job may have run [request_id " in log

    restricted = await ServiceProcess.in_front_of(setup, "127.0.0.1:1", "--allowed-origins=https://other.example.com")
    assert (await output(PAGE.command("preflight"), restricted.port)).startswith("HTTP/1.1 403 ")
    assert (await call(restricted.port, target=TARGET)).status == 502
    _, log = await restricted.end()
    assert in_order(log, wrong_origin, PAGE.part("upstream-error").strip(), "(ConnectFailed)")


@pytest.mark.gen_test
async def test_allowed_page(setup: Setup) -> None:
    """With the option that is named the preflight is answered as the table says."""
    running = await ServiceProcess.in_front_of(setup, "127.0.0.1:1", f"--allowed-origins={ORIGIN}")
    response = await output(PAGE.command("preflight"), running.port)
    assert in_order(response, "HTTP/1.1 204 ", f"Access-Control-Allow-Origin: {ORIGIN}")
    await running.end()


def test_the_start() -> None:
    """A start with a misspelled variable ends with the line that is shown, and a taken port with exit code 1."""
    variable, _ = shlex.split(PAGE.command("start"))
    name, _, value = variable.partition("=")
    ended = subprocess.run(COMMAND, env=environment({name: value}), capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert PAGE.part("start").strip() in ended.stderr


def test_names() -> None:
    """The errors, lines and messages that the tables name are the code's."""
    files = [*(ROOT / "tornado_fal_proxy").rglob("*.py"), ROOT / "deploy/nginx/tornado-fal-proxy.conf"]
    code = "".join(file.read_text("utf-8") for file in files)
    named = re.findall(r"`(?:error=|\()([A-Z]\w+)\)?`", PAGE.text)
    assert len(named) > 10
    assert set(named) <= set(errors.__all__)
    for text in re.findall(r"^\| `([\w ']+)[`;.,:]", PAGE.text, re.MULTILINE):
        assert re.sub(r" process 123.*", "", text) in code, text
    for words in ("Too many calls from your address; try again.", "The proxy did not answer.", "unfinished"):
        assert words in code


def test_way_to_fal() -> None:
    """The commands that need a network, or journald, are commands of the shell that ask for fal's hosts or our unit."""
    for name, word in (("way-to-fal", "queue.fal.run"), ("log", "tornado-fal-proxy")):
        subprocess.run(["sh", "-n", "-c", PAGE.command(name)], check=True)
        assert word in PAGE.command(name)
