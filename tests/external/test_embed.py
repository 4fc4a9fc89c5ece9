"""docs/embed.md is true: each application that it shows works, and so does examples/embed.py."""

import asyncio
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tornado.httpserver import HTTPServer
from tornado.web import Application, create_signed_value

import tornado_fal_proxy
from tests.support.pages import Page
from tests.support.proxy import KEY, ROUTE, Setup
from tests.support.raw_client import call
from tests.support.scripted_upstream import Exchange
from tests.support.service_process import COMMAND, environment
from tests.support.stub_handlers import Gate
from tests.support.tools import ROOT, unused_port
from tornado_fal_proxy import FalProxyHandler, handler
from tornado_fal_proxy.sandbox import Sandbox

PAGE = Page("docs/embed.md")


async def respond(exchange: Exchange) -> None:
    assert exchange.header("authorization") == f"Key {KEY}".encode()
    await exchange.body()
    await exchange.respond(200, b'{"ok": 1}', [("content-type", "application/json")])


@pytest.mark.gen_test
async def test_embedding(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest example works."""
    monkeypatch.setattr(handler, "_DEFAULT_CONFIG", setup.config(await setup.upstream(respond)))
    names = PAGE.run("shortest.py")
    assert (await call(setup.serve(names["application"]))).status == 200


@pytest.mark.gen_test
async def test_embedding_with_rules(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second example serves signed-in users, even with xsrf_cookies, and answers others in JSON."""
    upstream = await setup.upstream(respond)
    monkeypatch.setattr(
        tornado_fal_proxy, "ProxyConfig", lambda **fields: setup.config(upstream, **fields), raising=True
    )
    names = PAGE.run("guarded.py")
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
    assert len([line for line in PAGE.file("limited.py").splitlines() if line]) <= 15
    upstream = await setup.upstream(respond)
    store = f"sqlite:{tmp_path / 'spent.sqlite'}"
    monkeypatch.setattr(
        tornado_fal_proxy, "ProxyConfig", lambda **fields: setup.config(upstream, store=store, **fields), raising=True
    )
    names = PAGE.run("limited.py")
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
    (setting,) = re.findall(r'give it\s+`("disable_existing_loggers": \w+)`', PAGE.text)

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


@pytest.mark.gen_test
async def test_the_end(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the end that is shown, the command that is shown reads what was spent."""
    store = tmp_path / "spending.sqlite"
    config = setup.config(await setup.upstream(respond), store=f"sqlite:{store}", jobs_per_user="9/day")
    application = Application([(ROUTE, FalProxyHandler, {"config": config})], log_function=lambda handler: None)
    server = HTTPServer(application)
    port = unused_port()
    server.listen(port, "127.0.0.1")
    assert (await call(port)).status == 200
    await PAGE.run("ending.py")["end"](server, application)
    argv = shlex.split(PAGE.command("usage").replace("/var/lib/my-app/spending.sqlite", str(store)))
    assert argv[0] == "tornado-fal-proxy"
    shown = await asyncio.to_thread(subprocess.check_output, [*COMMAND, *argv[1:]], env=environment({}), text=True)
    assert re.search(r"^address:127\.0\.0\.1 +1 ", shown, re.MULTILINE), shown
