"""nginx in fal's place: HTTP/2 with a server that is not ours."""

import asyncio
import json
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from tests.support.certificates import FAL_NAMES
from tests.support.nginx import RUN, nginx
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, call
from tornado_fal_proxy.sandbox import Sandbox

QUEUE = "https://queue.fal.run/fal-ai/flux/dev"

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


def in_fals_place(behind: str) -> Callable[[str, dict[str, str]], str]:
    """Return a function that makes the configuration of a server over HTTP/2 for the sandbox at ``behind``."""
    return lambda listen, files: FAL.format(listen=listen, behind=behind, **files)


@pytest.mark.gen_test
async def test_http2_to_fal(setup: Setup) -> None:
    """Calls of every kind go over HTTP/2 to a server that is not ours, over one connection to each name."""
    sandbox = Sandbox(pace=0.01)
    sandbox.start()
    try:
        async with nginx(FAL_NAMES, in_fals_place(sandbox.address)) as fal:
            port = setup.proxy(fal.address, key=sandbox.key, ca_certs=fal.ca_certs)
            connections: dict[str, set[str]] = {}

            async def served(status: int, method: str, url: str) -> None:
                """Check that the next call that nginx logs is that one, over HTTP/2."""
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
                response = await call(port, "GET", target=url)
                await served(200, "GET", url)
                assert response.status == 200
            assert json.loads(response.body)["images"]

            stream = await call(port, target=f"{RUN}/stream")
            await served(200, "POST", f"{RUN}/stream")
            assert stream.header("content-type") == "text/event-stream; charset=utf-8"
            assert stream.body.count(b"data: ") == 12

            client = await RawClient.open(port)
            body = json.dumps({"sandbox": {"think_s": 600, "tag": "left"}}).encode()
            await client.send(body=body, target=f"{RUN}/slow")
            while not sandbox.executions["left"]:
                await asyncio.sleep(0.001)
            client.leave()
            await served(499, "POST", f"{RUN}/slow")

            # Some kernels keep no more than ten datagrams until they are read.
            for response in await asyncio.gather(*(call(port) for _ in range(8))):
                assert response.status == 200
                await served(200, "POST", RUN)

            assert {host: len(numbers) for host, numbers in connections.items()} == {"fal.run": 1, "queue.fal.run": 1}
    finally:
        await sandbox.close()
