"""README.md is true: its commands, code and links, and its parts about nginx and the log."""

import asyncio
import contextlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tornado.web import Application, create_signed_value

import tornado_fal_proxy
from tests.support.certificates import Authority
from tests.support.proxy import KEY, ROUTE, Setup
from tests.support.raw_client import call
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import Gate
from tests.support.tools import ROOT, tool, unused_port
from tornado_fal_proxy import FalProxyHandler, ProxyConfig, close_upstreams, handler
from tornado_fal_proxy.sandbox import Sandbox
from tornado_fal_proxy.service.access_log import access_logger
from tornado_fal_proxy.telemetry import Call

README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """Return the code blocks of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def command(name: str) -> str:
    """Return the command that .ci/run finds by the same mark."""
    (found,) = re.findall(rf"^<!-- command: {name} -->\n```sh\n(.*)\n```$", README, re.MULTILINE)
    return str(found)


async def respond(exchange: Exchange) -> None:
    assert exchange.header("authorization") == f"Key {KEY}".encode()
    await exchange.body()
    await exchange.respond(200, b'{"ok": 1}', [("content-type", "application/json")])


def test_length() -> None:
    """It is short enough to be read to the end."""
    assert len(README.splitlines()) <= 300


def test_commands() -> None:
    """There are two commands, each one line that needs only Python at first, and .ci/run takes them from here."""
    assert re.findall(r"<!-- command: (\w+) -->", README) == ["sandbox", "test"]
    script = (ROOT / ".ci/run").read_text("utf-8")
    assert "<!-- command: $1 -->" in script
    for name in ("sandbox", "test"):
        assert command(name).startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert f"$(readme {name})" in script
        assert command(name) not in script


@pytest.mark.gen_test
async def test_curl() -> None:
    """The curl line is the one that the sandbox prints, and it makes a picture."""
    curl = tool("curl")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tornado_fal_proxy", "--sandbox", "--port=0"), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        lines = [(await process.stdout.readline()).decode() for _ in range(3)]
        (port,) = re.findall(r"listens on http://127\.0\.0\.1:(\d+)/api/fal/proxy$", lines[0].strip())
        (line,) = [block.strip() for block in blocks("sh") if block.startswith("curl ")]
        assert lines[2].strip() == line.replace(":8080", f":{port}")
        shown = await asyncio.create_subprocess_shell(
            f"{curl} --silent --noproxy '*'{lines[2].strip().removeprefix('curl')}", stdout=asyncio.subprocess.PIPE
        )
        assert json.loads((await shown.communicate())[0])["images"][0]["url"].startswith(f"http://127.0.0.1:{port}/")
    finally:
        process.terminate()
        assert await process.wait() == 0


@pytest.mark.gen_test
async def test_embedding(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest example works."""
    monkeypatch.setattr(handler, "_DEFAULT_CONFIG", setup.config(await setup.upstream(respond)))
    names = run_block(blocks("python")[0])
    assert (await call(setup.serve(names["application"]))).status == 200


@pytest.mark.gen_test
async def test_embedding_with_rules(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second example serves signed-in users, even with xsrf_cookies, and answers others in JSON."""
    upstream = await setup.upstream(respond)
    monkeypatch.setattr(
        tornado_fal_proxy, "ProxyConfig", lambda **fields: setup.config(upstream, **fields), raising=True
    )
    names = run_block(blocks("python")[1])
    assert names["config"].max_in_flight == 500
    names["application"].settings["log_function"] = lambda handler: None
    port = setup.serve(names["application"])
    refused = await call(port)
    assert (refused.status, refused.message) == (401, "Sign in first.")
    assert not upstream.exchanges
    not_allowed = await call(port, target="https://fal.run/fal-ai/other")
    assert (not_allowed.status, "allowed_endpoints" in not_allowed.message) == (403, True)
    cookie = create_signed_value(names["application"].settings["cookie_secret"], "user", "somebody").decode()
    assert (await call(port, headers=[f"cookie: user={cookie}"])).status == 200


@pytest.mark.gen_test
async def test_embedding_with_limits(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third example, of 15 lines, gives each signed-in user ten pictures a day of two models, and two at once."""
    assert len([line for line in blocks("python")[2].splitlines() if line]) <= 15
    upstream = await setup.upstream(respond)
    store = f"sqlite:{tmp_path / 'spent.sqlite'}"
    monkeypatch.setattr(
        tornado_fal_proxy, "ProxyConfig", lambda **fields: setup.config(upstream, store=store, **fields), raising=True
    )
    names = run_block(blocks("python")[2])
    names["application"].settings["log_function"] = lambda handler: None
    port = setup.serve(names["application"])
    assert (await call(port)).status == 401
    for user in ("ann", "bob"):
        cookie = create_signed_value(names["application"].settings["cookie_secret"], "user", user).decode()
        seen = [(await call(port, headers=[f"cookie: user={cookie}"])).status for _ in range(11)]
        assert seen == [200] * 10 + [402]
    cookie = create_signed_value(names["application"].settings["cookie_secret"], "user", "eve").decode()
    headers = [f"cookie: user={cookie}"]
    for body, status in (
        (b'{"num_images": 3}', 200),
        (b'{"num_images": "4"}', 200),
        (b'{"num_images": 1e9}', 402),
        (b'{"num_images": true}', 402),
        (b'{"num_images": 2}', 200),
        (b'{"num_images": 2}', 402),
        (b"{}", 200),
        (b"{}", 402),
    ):
        assert (await call(port, "POST", body, headers=headers)).status == status, body
    assert (await call(port, target="https://fal.run/fal-ai/fast-sdxl", headers=headers)).status == 402
    assert (await call(port, target="https://fal.run/fal-ai/flux/schnell", headers=headers)).status == 403
    cookie = create_signed_value(names["application"].settings["cookie_secret"], "user", "max").decode()
    gate = upstream.handler = Gate()
    at_once = [asyncio.create_task(call(port, headers=[f"cookie: user={cookie}"])) for _ in range(3)]
    (first,), _ = await asyncio.wait(at_once, return_when=asyncio.FIRST_COMPLETED)
    assert first.result().status == 429
    gate.open.set()
    assert sorted([(await each).status for each in at_once]) == [200, 200, 429]


def run_block(code: str) -> dict[str, Any]:
    """Run a block as a program of its own would be run, and return its names."""
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    return names


LOGGING = """
import logging, logging.config, sys
import tornado_fal_proxy
config = {"version": 1, "handlers": {"out": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}}}
config |= {"root": {"level": "INFO", "handlers": ["out"]}, **eval(sys.argv[1])}
logging.config.dictConfig(config)
logging.getLogger("tornado_fal_proxy").error("seen")
"""


def test_logging() -> None:
    """dictConfig silences the proxy's logger after the import, and does not with the setting that is shown."""
    (setting,) = re.findall(r'give it\s+`("disable_existing_loggers": \w+)`', README)

    def printed(more: str) -> str:
        return subprocess.check_output([sys.executable, "-c", LOGGING, more], cwd=ROOT, text=True)

    assert printed("{}") == ""
    assert printed("{" + setting + "}") == "seen\n"


@pytest.mark.gen_test
async def test_example(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """examples/embed.py serves its page and the proxy, and ends at a signal."""
    sandbox = Sandbox(pace=0.01)
    sandbox.start()
    port = unused_port()
    loop = asyncio.get_running_loop()
    try:
        monkeypatch.setenv("FAL_KEY", sandbox.key)
        monkeypatch.setenv("FAL_PROXY_CONNECT_TO", sandbox.address)
        monkeypatch.setenv("FAL_PROXY_CA_CERTS", sandbox.ca_certs)
        example = runpy.run_path(str(ROOT / "examples/embed.py"))
        running = asyncio.create_task(example["main"](port))
        await asyncio.sleep(0)  # by then it listens
        page = await call(port, "GET", path="/")
        assert page.status == 200
        assert f'fetch("{ROUTE}"'.encode() in page.body
        picture = await call(port)
        assert picture.status == 200
        assert json.loads(picture.body)["images"]
        os.kill(os.getpid(), signal.SIGTERM)
        await running
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        await sandbox.close()


def test_nginx() -> None:
    """README.md agrees with nginx's file: names to change, and limits."""
    text = (ROOT / "deploy/nginx/tornado-fal-proxy.conf").read_text("utf-8")
    section = README.partition("## Put it behind nginx")[2].partition("\n## ")[0]
    (rate,), (burst,) = re.findall(r"rate=(\d+)r/s;", text), re.findall(r"burst=(\d+) nodelay;", text)
    (at_once,) = re.findall(r"limit_conn \w+ (\d+);", text)
    assert f"{rate} calls a second (bursts of {burst}) and have {at_once} calls open" in section
    names = set(re.findall(r"[\w.-]+\.example\.com", text.partition("upstream ")[2]))
    assert names == {"fal-proxy.example.com", "app.example.com"}


def test_log_line() -> None:
    """The line that is shown has the fields of the access log, in their order."""
    (line,) = blocks("text")
    logger, _, fields = line.partition(": ")
    assert logger.endswith(f" INFO {access_logger.name}")
    assert re.findall(r"(\w+)=\S+", fields) == list(Call("POST", None).fields(""))


def test_links() -> None:
    """Every relative link of the documents leads to a file."""
    for document in (
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*/README.md"),
    ):
        for link in re.findall(r"\]\((?!https://)([^)#]+)", document.read_text("utf-8")):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_threat_model() -> None:
    """Each test that docs/threat-model.md names exists, and each attack has one."""
    text = (ROOT / "docs/threat-model.md").read_text("utf-8")
    attacks = [row for row in text.splitlines() if row.count(" | ") == 3 and not row.startswith("| From ")]
    assert len(attacks) > 30
    for row in attacks:
        named = re.findall(r"(\w+/test_\w+)::(test_\w+)", row.rpartition(" | ")[2])
        assert named, row
        for module, function in named:
            code = (ROOT / "tests" / f"{module}.py").read_text("utf-8")
            assert re.search(rf"^(?:async )?def {function}\(", code, re.MULTILINE), f"{module}::{function}"


@pytest.mark.gen_test
async def test_egress_proxy(setup: Setup, authority: Authority, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """libcurl uses the proxy that https_proxy names, and that proxy gets the name of a host, no key and no path."""
    upstream = await setup.upstream(respond, protocol)
    asked: list[bytes] = []

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        onward, outward = await asyncio.open_connection("127.0.0.1", upstream.port)
        writer.write(b"HTTP/1.1 200 Connected\r\nx-of-the-tunnel: 1\r\n\r\n")
        await asyncio.gather(copy(reader, outward), copy(onward, writer))

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()

    for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with await asyncio.start_server(tunnel, "127.0.0.1", 0) as server:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        config = ProxyConfig(key=KEY, ca_certs=authority.ca_file)
        application = Application([(ROUTE, FalProxyHandler, {"config": config})], log_function=lambda handler: None)
        got = await call(setup.serve(application))
        assert (got.status, got.body, got.header("x-of-the-tunnel")) == (200, b'{"ok": 1}', None)
        close_upstreams(application)
    (head,) = asked
    assert head.startswith(b"CONNECT fal.run:443 HTTP/1.1\r\n")
    assert KEY.encode() not in head
    assert b"flux" not in head


@pytest.mark.gen_test
async def test_cross_site(setup: Setup) -> None:
    """The preflight of a browser for a script of another origin is answered 405, with no permission."""
    port = setup.proxy("127.0.0.1:1")
    asked = ["origin: https://evil.example", "access-control-request-headers: x-fal-target-url"]
    refused = await call(port, "OPTIONS", target=None, headers=asked)
    assert refused.status == 405
    assert not [name for name, _ in refused.headers if name.startswith("access-control-")]
