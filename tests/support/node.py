"""Run the Node scripts of external/node, and serve what they call.

Each script is started once, makes all its calls, and prints one line of JSON, which the tests check.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tornado.web import Application

from tests.support.logs import Logs
from tests.support.proxy import ROUTE, Setup
from tests.support.tools import ROOT, tool
from tornado_fal_proxy import FalProxyHandler
from tornado_fal_proxy.sandbox import Sandbox

__all__ = ["RULES_ROUTE", "WRONG_KEY_ROUTE", "find_node", "run_script", "serve_sandbox"]

SCRIPTS = ROOT / "tests/external/node"
# Limits a script: the longest takes a few seconds, and a script that hangs fails under its own name.
SCRIPT_TIMEOUT_S = 40.0
WRONG_KEY_ROUTE = "/wrong-key"
RULES_ROUTE = "/rules"
RULES: dict[str, Any] = {"allow_cancel": True, "allowed_endpoints": ("fal-ai/flux/**", "fal-ai/fast-lcm-diffusion")}


def find_node() -> str:
    """Return the path of Node. Skip the test without it, or without the packages of the scripts (``npm ci``)."""
    for package in ("@fal-ai/client", "axe-core"):
        tool(package, path=SCRIPTS / "node_modules" / package)
    return tool("node")


async def run_script(name: str, *args: str) -> Any:
    """Run the script, and return the JSON that it printed."""
    node = find_node()
    process = await asyncio.create_subprocess_exec(node, SCRIPTS / name, *args, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(SCRIPT_TIMEOUT_S):
            printed, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, f"{name} failed"
    return json.loads(printed)


@asynccontextmanager
async def serve_sandbox(setup: Setup, pace: float, **fields: Any) -> AsyncIterator[Sandbox]:
    """Serve the sandbox and the proxy in front of it, as the command does, at the sandbox's ``public_url``.

    The proxy at ``WRONG_KEY_ROUTE`` has a key that the sandbox refuses, and the one at ``RULES_ROUTE`` has ``RULES``.
    ``fields`` are more of the first one's configuration. No warning or error may be logged.
    """
    logs = Logs()
    logging.getLogger().addHandler(logs)
    sandbox = Sandbox(pace=pace)
    sandbox.start()
    try:
        right = {"key": sandbox.key, "ca_certs": sandbox.ca_certs}
        config = setup.config(sandbox.address, **right, **fields)
        restricted = setup.config(sandbox.address, **right, **RULES)
        wrong = setup.config(sandbox.address, ca_certs=sandbox.ca_certs)
        rules: list[Any] = [
            (ROUTE, FalProxyHandler, {"config": config}),
            (WRONG_KEY_ROUTE, FalProxyHandler, {"config": wrong}),
            (RULES_ROUTE, FalProxyHandler, {"config": restricted}),
            *sandbox.page_rules(ROUTE),
        ]
        port = setup.serve(Application(rules, log_function=lambda handler: None))
        sandbox.public_url = f"http://127.0.0.1:{port}"
        yield sandbox
    finally:
        await setup.close()
        await sandbox.close()
        logging.getLogger().removeHandler(logs)
    logs.check()
