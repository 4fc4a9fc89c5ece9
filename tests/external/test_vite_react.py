"""examples/vite-react, built by Vite, works in Chromium, through examples/embed_with_login.py and to the sandbox."""

import asyncio
import os
import re
import runpy
import signal
from itertools import pairwise

import pytest
from tornado.web import Application

from tests.support.logs import Logs
from tests.support.node import run_script
from tests.support.proxy import Setup
from tests.support.raw_client import call
from tests.support.tools import ROOT, tool, unused_port
from tornado_fal_proxy.sandbox import Sandbox

EXAMPLE = ROOT / "examples/vite-react"
PACE = 0.5  # a queued job takes 2 s: long enough to be cancelled on a busy machine


@pytest.mark.slow
@pytest.mark.gen_test
async def test_the_page_of_signed_in_users(setup: Setup, logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signed-in user draws, cancels, uploads and reads a stream, and the page shows what is left until nothing is."""
    tool("examples/vite-react's packages", path=EXAMPLE / "node_modules/vite")
    chromium = tool("chromium")
    sandbox = Sandbox(pace=PACE)
    sandbox.start()
    for line in ("401 POST /api/login", "401 POST /api/fal/proxy", "403 POST", "402 POST"):
        logs.expect(line)
    loop = asyncio.get_running_loop()
    port = unused_port()
    try:
        files = setup.serve(Application(list(sandbox.page_rules("/")), log_function=lambda handler: None))
        sandbox.public_url = f"http://127.0.0.1:{files}"
        environ = {"FAL_KEY": sandbox.key, "FAL_PROXY_CONNECT_TO": sandbox.address, "FAL_PROXY_STORE": "memory"}
        environ |= {"FAL_PROXY_CA_CERTS": sandbox.ca_certs, "BACKEND": f"http://127.0.0.1:{port}"}
        for name, text in environ.items():
            monkeypatch.setenv(name, text)
        running = asyncio.create_task(runpy.run_path(str(EXAMPLE.with_name("embed_with_login.py")))["main"](port))
        seen = await run_script("vite_react.mjs", str(EXAMPLE), chromium)
        built = await call(port, "GET", path="/")
        assert (built.status, b"/assets/index-" in built.body) == (200, True)
        os.kill(os.getpid(), signal.SIGTERM)
        await running
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        await sandbox.close()
    assert (seen["wrong"], seen["signedOut"]) == ("Wrong name or password.", 401)
    first, *_, last = seen["drawn"]["draw status"]
    assert (first, last) == ("Submitting …", "Done")
    assert seen["cancelled"]["draw alert"] == ["Cancelled."]
    assert [job.cancelled for job in sandbox.jobs.values()] == [False, True]
    texts = seen["described"]["describe output"]
    assert len(texts) > 2
    assert all(longer.startswith(text) for text, longer in pairwise(texts))
    assert [body for kind, body in sandbox.files.values() if body == b"PNG"]
    assert (seen["four"], seen["other"]) == (200, 403)
    (refusal,) = seen["refused"]["draw alert"]
    assert re.match(r"Your limit of 10 jobs a day is used up", refusal)
    assert seen["left"] == [f"{left} of 10 left today" for left in (9, 4, 3, 0)]
    assert seen["reloaded"].startswith("Signed in as ann.")
    assert seen["problems"] == []
