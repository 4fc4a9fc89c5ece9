"""Python's own fal-client through the proxy, with the transport of examples/fal_client_transport.py."""

import asyncio
import runpy
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from tests.support.raw_client import call
from tests.support.service_process import ServiceProcess
from tests.support.tools import ROOT

EXAMPLE = ROOT / "examples/fal_client_transport.py"


async def run(*argv: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *argv), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    return stdout.decode()


@pytest.mark.gen_test
async def test_example() -> None:
    """The example runs a model, queues a job, reads its status and its result, streams, and uploads."""
    service = await ServiceProcess.start("--sandbox", "--allow-uploads", "--allowed-endpoints=fal-ai/flux/dev")
    url = f"http://127.0.0.1:{service.port}/api/fal/proxy"
    lines = (await run(str(EXAMPLE), url)).splitlines()
    names = [line.partition(":")[0] for line in lines]
    assert names == ["run", "status", "result", *["event"] * 12, "upload"]
    uploaded = urlsplit(lines[-1].partition(" ")[2])
    assert (await call(service.port, "GET", path=uploaded.path)).body == b"a text"
    # fal-client's first choice for uploads goes to fal's CDN, which the sandbox is not; its token comes by the proxy.
    client = runpy.run_path(str(EXAMPLE))["ProxiedClient"](url)
    token = await asyncio.to_thread(client._token_manager.get_token)
    assert token.token_type == "Bearer"
    client._client.close()
    await service.end()
