"""nginx in front of the proxy: addresses of clients, limits, authorization, and proxies that are down."""

import asyncio
import os
import re
import socket
import sys
import tempfile
from asyncio.subprocess import DEVNULL, create_subprocess_exec

import pytest
from tornado.httputil import HTTPServerRequest
from tornado.web import Application, RequestHandler

from tests.support.load import ROUNDS, Load, respond
from tests.support.nginx import DEPLOYED, NAME, RUN, calling, deployed, message, nginx, tls_client
from tests.support.proxy import KEY, ROUTE, Setup
from tests.support.raw_client import RESULT
from tests.support.scripted_upstream import Exchange
from tests.support.service_process import ACTIVATE, COMMAND, ServiceProcess, environment
from tests.support.stub_handlers import JSON
from tests.support.tools import ROOT, unused_port
from tornado_fal_proxy import FalProxyHandler, Target
from tornado_fal_proxy.errors import Unauthorized


@pytest.mark.gen_test
async def test_proxies_that_are_down(setup: Setup) -> None:
    """No POST and no poll fails while one proxy is up. If all are down SDKs may repeat any call: it went nowhere.

    A GET that may run a model is tried at one proxy only, and SDKs may repeat it too.
    """
    upstream = await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON))
    down = [unused_port(), unused_port()]
    calls = [("POST", RUN), ("GET", RESULT)]
    async with nginx((NAME,), deployed(*down, setup.proxy(upstream))) as front:
        with calling(front, "HTTP/2") as client:
            response = await client.call("GET")
            assert (response.code, message(response)) == (502, "The proxy did not answer.")
            for method, target in calls * 5:
                assert (await client.call(method, target=target)).code == 200
            assert (await client.call("GET")).code == 200
    assert len(upstream.exchanges) == 11
    async with nginx((NAME,), deployed(*down)) as front:
        with calling(front, "HTTP/2") as client:
            for method, target in (*calls, ("GET", RUN)):
                response = await client.call(method, target=target)
                assert (response.code, message(response)) == (502, "The proxy did not answer.")


@pytest.mark.gen_test
async def test_unix_socket(setup: Setup) -> None:
    """nginx reaches the command over a Unix socket that systemd has opened, which takes no ports."""
    config = setup.config(await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON)))
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        os.chmod(directory, 0o711)
        listener.bind(path := f"{directory}/socket")
        listener.listen()
        os.chmod(path, 0o777)  # nginx is another user if the tests are root
        process = await create_subprocess_exec(
            *(sys.executable, "-c", ACTIVATE, str(listener.fileno()), *COMMAND),
            env=environment({"FAL_KEY": KEY, "FAL_PROXY_CONNECT_TO": str(config.connect_to)})
            | {"FAL_PROXY_CA_CERTS": str(config.ca_certs), "FAL_PROXY_LOG_LEVEL": "error"},
            pass_fds=[listener.fileno()],
            stdout=DEVNULL,
        )
        try:
            port = unused_port()
            servers = deployed(port)
            over = lambda listen, files: servers(listen, files).replace(f"127.0.0.1:{port};", f"unix:{path};")  # noqa: E731
            async with nginx((NAME,), over) as front:
                with calling(front, "HTTP/2") as client:
                    assert (await client.call()).code == 200
        finally:
            process.terminate()
        assert await process.wait() == 0


@pytest.mark.gen_test
async def test_the_proxy_gets_the_clients_address(setup: Setup) -> None:
    """The proxy gets the address that nginx sees, once, and nothing that the client claims. fal gets no address."""
    seen: list[tuple[str, str]] = []

    class Handler(FalProxyHandler):
        async def authorize(self, target: Target) -> bool:
            seen.append((str(self.request.remote_ip), self.request.protocol))
            headers = self.request.headers
            for name in ("x-forwarded-for", "x-real-ip"):
                assert headers.get_list(name) == ["127.0.0.1"]
            assert (headers["host"], "forwarded" in headers) == (NAME, False)
            return True

    upstream = await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON))
    rule = (ROUTE, Handler, {"config": setup.config(upstream)})
    port = setup.serve(Application([rule], log_function=lambda handler: None), xheaders=True)
    spoofed = dict.fromkeys(("x-forwarded-for", "x-real-ip", "X-Client-IP", "true-client-ip"), "203.0.113.9")
    spoofed |= {"forwarded": "for=203.0.113.9", "x-scheme": "http", "x-forwarded-proto": "http"}
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, "HTTP/1.1") as client:
            for headers in ({}, spoofed):
                assert (await client.call(headers=headers)).code == 200
    assert seen == [("127.0.0.1", "https")] * 2
    for exchange in upstream.exchanges:
        assert not [name for name, _ in exchange.headers if b"forwarded" in name or b"-ip" in name]


@pytest.mark.gen_test
async def test_the_clients_address_is_logged(setup: Setup) -> None:
    """The service's log has the address that nginx sees, and the id that the client gets."""
    upstream = await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON))
    running = await ServiceProcess.in_front_of(setup, upstream, "--trusted-proxies=127.0.0.1")
    async with nginx((NAME,), deployed(running.port)) as front:
        client = await tls_client(front, "127.0.0.9")
        await client.send(headers=["x-forwarded-for: 203.0.113.9"])
        response = await client.response()
        await client.close()
    assert response.status == 200
    _, log = await running.end()
    (line,) = (line for line in log.splitlines() if " tornado_fal_proxy.access: " in line)
    assert " client=127.0.0.9 " in line.replace("access:", " ")
    assert f" request_id={response.header('x-request-id')} " in line


PAGE, OTHER_PAGE = "https://app.example.com", "https://evil.example"


@pytest.mark.parametrize(("origin", "allowed"), [(PAGE, PAGE), (OTHER_PAGE, None), (None, None)])
@pytest.mark.gen_test
async def test_pages(setup: Setup, origin: str | None, allowed: str | None) -> None:
    """An allowed page may read responses that nginx makes by itself, and the proxy's have their CORS headers once."""
    upstream = await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON))
    port = setup.proxy(upstream, allowed_origins=[PAGE], allow_credentials=True)
    headers = {} if origin is None else {"origin": origin}
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, "HTTP/2") as client:
            by_nginx, by_proxy = ["Origin"], ["Origin, x-fal-target-url"]
            for code, body, vary in ((413, b"x" * (32 * 1024 * 1024 + 1), by_nginx), (200, b"{}", by_proxy)):
                response = await client.call(body=body, headers=headers)
                assert response.code == code
                assert response.headers.get_list("access-control-allow-origin") == ([allowed] if allowed else [])
                assert response.headers.get_list("access-control-allow-credentials") == (["true"] if allowed else [])
                assert response.headers.get_list("vary") == vary


@pytest.mark.gen_test
async def test_limits(setup: Setup) -> None:
    """An address may make a burst of calls, and so many at once. nginx answers 429 to more, and serves others."""
    text = DEPLOYED.read_text()
    (burst,), (at_once,) = re.findall(r"burst=(\d+) ", text), re.findall(r"limit_conn \w+ (\d+);", text)
    release = asyncio.Event()

    async def respond_later(exchange: Exchange) -> None:
        await exchange.body()
        await release.wait()
        await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(respond_later)
    async with nginx((NAME,), deployed(setup.proxy(upstream))) as front:
        one, other = [[await tls_client(front, f"127.0.0.{n}") for _ in range(int(at_once) + 1)] for n in (2, 3)]
        for client in one:
            await client.send()
        done, waiting = await asyncio.wait(
            [asyncio.create_task(client.response()) for client in one], return_when=asyncio.FIRST_COMPLETED
        )
        refused = [task.result() for task in done]
        assert [(got.status, got.message, got.header("retry-after")) for got in refused] == [
            (429, "Too many calls from your address; try again.", "1")
        ]
        await other[0].send()
        release.set()
        assert (await other[0].response()).status == 200
        assert {(await task).status for task in waiting} == {200}

        statuses = []
        for _ in range(2 * int(burst)):
            await one[0].send()
            statuses.append((await one[0].response()).status)
        assert set(statuses) == {200, 429}
        await other[0].send()
        assert (await other[0].response()).status == 200
        assert len(upstream.exchanges) == int(at_once) + 2 + statuses.count(200)
        for client in (*one, *other):
            client.leave()


@pytest.mark.gen_test
async def test_auth_request(setup: Setup) -> None:
    """With auth-request.conf a service decides who may call. It gets cookie and target, and no body."""
    asked: list[HTTPServerRequest] = []
    statuses = {"let me in": 204, "out": 401, "never": 403, "fall over": 502}

    class Session(RequestHandler):
        def get(self) -> None:
            asked.append(self.request)
            self.set_status(statuses[self.get_cookie("user", "out") or ""])

    upstream = await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON))
    auth = setup.serve(Application([("/session", Session)], log_function=lambda handler: None))
    port = setup.proxy(upstream, allowed_origins=[PAGE])
    async with nginx((NAME,), deployed(port, auth=auth)) as front:
        with calling(front, "HTTP/2") as client:
            assert (await client.call(headers={"cookie": "user=let me in"})).code == 200
            for user, code in (("out", 401), ("never", 403)):
                response = await client.call(headers={"cookie": f"user={user}", "origin": PAGE})
                assert (response.code, message(response)) == (code, Unauthorized.message)
                assert response.headers["access-control-allow-origin"] == PAGE
            response = await client.call(headers={"cookie": "user=fall over"})
            assert (response.code, message(response)) == (500, "The proxy failed.")
            assert len(upstream.exchanges) == 1
            for request in asked:
                assert (request.method, request.body, request.headers["x-fal-target-url"]) == ("GET", b"", RUN)
                assert request.headers.get_list("x-forwarded-for") == ["127.0.0.1"]
            asked.clear()
            may = {"origin": PAGE, "access-control-request-method": "POST"}
            assert (await client.call("OPTIONS", headers=may)).code == 204
            assert (await client.call(path="/auth")).code == 404
            assert not asked


@pytest.mark.gen_test
async def test_users_of_oauth2_proxy(setup: Setup) -> None:
    """With the lines of docs/spending.md limits count the users of oauth2-proxy, whatever a client's header says."""

    class Auth(RequestHandler):
        """Answer as oauth2-proxy's /oauth2/auth does with --set-xauthrequest."""

        def get(self) -> None:
            user = self.get_cookie("_oauth2_proxy")
            self.set_status(202 if user else 401)
            if user:
                self.set_header("X-Auth-Request-User", user)

    text = (ROOT / "docs/spending.md").read_text("utf-8")
    words = " ".join(text.split())
    in_server, in_location = re.findall(r"^```nginx\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (argv,) = re.findall(r"^tornado-fal-proxy (--trusted-proxies=.*)$", text, re.MULTILINE)
    auth = setup.serve(Application([("/oauth2/auth", Auth)], log_function=lambda handler: None))
    upstream = await setup.upstream(lambda exchange: exchange.respond(200, b"{}", JSON))
    running = await ServiceProcess.in_front_of(
        setup, upstream, *argv.split(), "--store=memory", f"--allowed-origins={PAGE}"
    )
    make = deployed(running.port)

    def servers(listen: str, files: dict[str, str]) -> str:
        found = make(listen, files)
        assert "`location /api/fal/proxy { }`, the outer one of the three, behind `limit_conn_status 429;`" in words
        places = {"    location / { return 404; }": in_server, "        limit_conn_status 429;": in_location}
        for place, lines in places.items():
            assert found.count(place) == 1
            found = found.replace(place, f"{place}\n{lines.replace('127.0.0.1:4180', f'127.0.0.1:{auth}')}")
        return found

    async with nginx((NAME,), servers) as front:
        with calling(front, "HTTP/2") as client:

            async def codes(cookie: str, count: int, **headers: str) -> list[int]:
                given = {"cookie": f"_oauth2_proxy={cookie}"} | headers
                return [(await client.call(headers=given)).code for _ in range(count)]

            assert await codes("", 1, **{"X-Forwarded-User": "ann"}) == [401]
            assert await codes("ann", 11) == [200] * 10 + [402]
            assert await codes("ann", 1, **{"X-Forwarded-User": "bob"}) == [402]
            assert await codes("bob", 1, **{"X-Forwarded-User": "ann"}) == [200]
            # All other ways in. A GET that runs a model has a location of its own.
            forged = {"X-Forwarded-User": "bob", "X-Forwarded-For": "203.0.113.9", "cookie": ""}
            for method, body in (("GET", None), ("PUT", b""), ("HEAD", None)):
                assert (await client.call(method, body, headers=forged)).code == 401
            assert (await client.call("GET", None, headers=forged | {"cookie": "_oauth2_proxy=eve"})).code == 200
            may = {"origin": PAGE, "access-control-request-method": "POST"}
            assert (await client.call("OPTIONS", headers=may)).code == 204
    _, stderr = await running.end()
    assert stderr.count(" user=ann ") == 12
    assert stderr.count(" user=bob ") == 1
    assert stderr.count(" user=eve ") == 1
    assert "203.0.113.9" not in stderr
    assert "user=address:" not in stderr


@pytest.mark.gen_test
async def test_nginx_obeys_no_header_of_a_response(setup: Setup) -> None:
    """nginx does not obey a response's X-Accel headers, which come from the model."""
    orders = [("x-accel-redirect", "/"), ("x-accel-limit-rate", "1"), ("x-accel-charset", "koi8-r")]
    port = setup.proxy(await setup.upstream(lambda exchange: exchange.respond(200, b"{}" * 5000, [*JSON, *orders])))
    async with nginx((NAME,), deployed(port)) as front:
        with calling(front, "HTTP/2") as client:
            response = await client.call()
            assert (response.code, len(response.body)) == (200, 10_000)
            assert response.headers["content-type"] == "application/json"


@pytest.mark.gen_test(timeout=60 + 20 * ROUNDS)
async def test_restart_under_load(setup: Setup) -> None:
    """No call fails or breaks off while the proxy is restarted behind nginx, and nginx reloads its file."""
    upstream = await setup.upstream(respond)
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        running = await ServiceProcess.in_front_of(setup, upstream, "--processes=2", listener=listener)
        async with nginx((NAME,), deployed(listener.getsockname()[1])) as front:
            async with Load(
                lambda number: tls_client(front, f"127.0.1.{number % 250 + 1}"), kept_may_close=True
            ) as load:
                for _ in range(ROUNDS):
                    await load.more(200)
                    await running.end()
                    running = await ServiceProcess.in_front_of(setup, upstream, "--processes=2", listener=listener)
                    await front.reload()
                await load.more(200)
            reached = {await exchange.body() or exchange.target.partition(b"?")[2] for exchange in upstream.exchanges}
            assert load.failures == []
            assert [failure for failure in load.unread if b"%d" % failure.number in reached] == []
        await running.end()
