"""The command: what it says when it cannot start, what it serves when it can, and how it ends. Run as a process."""

import asyncio
import dataclasses
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from caller import Answer, Caller, call
from conftest import KEY, ROUTE, Logs, Setup, unused_port
from running import COMMAND, TIMEOUT_S, WITH_KEY, Running, arrived, connects, environment, silent
from upstream import Authority, Exchange

from tornado_fal_proxy import ConfigError, ProxyConfig, __version__
from tornado_fal_proxy.callers import TrustedProxies
from tornado_fal_proxy.options import _parser, parse_settings
from tornado_fal_proxy.server import CLOSE_POLL_S
from tornado_fal_proxy.service import make_application, what_is_open

SECRET = KEY.partition(":")[2]


# Starts that fail. In the texts {taken} is a port in use, {dir} a directory, {shim} one that hides the package trustme.


@dataclasses.dataclass(frozen=True)
class Start:
    """``says`` are regular expressions that the one line on stderr must match, ``code`` the exit code."""

    argv: tuple[str, ...]
    environ: dict[str, str]
    says: tuple[str, ...]
    code: int = 2


def start(*argv: str, says: str | tuple[str, ...], code: int = 2, environ: dict[str, str] | None = None) -> Start:
    return Start(argv, environ or {}, (says,) if isinstance(says, str) else says, code)


FAILS = [
    # The key.
    start(says=r"no key: set FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET"),
    start(says=r"no key", environ={"FAL_KEY": " "}),
    start(says=r"no key", environ={"FAL_KEY_ID": "a"}),
    start(says=r"FAL_KEY: must be printable ASCII", environ={"FAL_KEY": f"{KEY} {KEY}"}),
    start(says=r"FAL_KEY_FILE: cannot read '.*/none': No such", environ={"FAL_KEY_FILE": "{dir}/none"}),
    start(says=r"FAL_KEY_FILE: cannot read '.*': Is a directory", environ={"FAL_KEY_FILE": "{dir}"}),
    start(says=r"FAL_KEY_FILE: '.*empty.pem' holds no key", environ={"FAL_KEY_FILE": "{dir}/empty.pem"}),
    # Whoever tries to pass it as an option must not find it in the log of the machine.
    start(f"--key={KEY}", says=r"unknown: --key; .*FAL_KEY"),
    start("--key", KEY, says=r"unknown: --key, an argument; .*FAL_KEY"),
    start(f"--fal-key={KEY}", "--nope", says=r"unknown: --fal-key, --nope; "),
    start(f"-k{KEY}", says=r"unknown: an argument; "),
    start(f"-k={KEY}", says=r"unknown: an argument; "),
    start(KEY, says=r"unknown: an argument; "),
    # Options.
    start("--nope", says=r"unknown: --nope; --help shows"),
    start("--por=1", says=r"unknown: --por; "),
    start("--port", says=r"argument --port: expected one argument"),
    start("--port=http", says=r"--port: must be a number from 0 to 65535, not 'http'", environ=WITH_KEY),
    start("--port=65536", says=r"--port: must be .*65536", environ=WITH_KEY),
    start("--port=-1", says=r"--port: must be .*-1", environ=WITH_KEY),
    start(
        says=r"--port: must be .*'tcp://10.0.0.1:8080'", environ={"FAL_PROXY_PORT": "tcp://10.0.0.1:8080", **WITH_KEY}
    ),
    start("--route=api", says=r"--route: must be a path such as /api/fal/proxy.*'api'", environ=WITH_KEY),
    start("--route=/(a|b)", says=r"--route: must be a path", environ=WITH_KEY),
    start("--route=/healthz", says=r"--route: .*none of /, /healthz", environ=WITH_KEY),
    start("--log-level=loud", says=r"--log-level: must be one of debug, info, .*'loud'", environ=WITH_KEY),
    start(
        "--connect-timeout-s=never", says=r"--connect-timeout-s: must be a number of seconds.*'never'", environ=WITH_KEY
    ),
    start(says=r"--idle-timeout-s: must be .*'0x1'", environ={"FAL_PROXY_IDLE_TIMEOUT_S": "0x1", **WITH_KEY}),
    start("--max-body-bytes=32M", says=r"--max-body-bytes: must be a whole number.*'32M'", environ=WITH_KEY),
    start("--max-in-flight=0", says=r"--max-in-flight: must be .*not 0", environ=WITH_KEY),
    start("--hold-bytes=1.5", says=r"--hold-bytes: must be .*'1.5'", environ=WITH_KEY),
    start("--ca-certs={dir}/none.pem", says=r"--ca-certs: cannot read .*none.pem': No such file", environ=WITH_KEY),
    start("--ca-certs={dir}", says=r"--ca-certs: cannot read .*: Is a directory", environ=WITH_KEY),
    start(says=r"--ca-certs: .*empty.pem' holds no PEM", environ={"FAL_PROXY_CA_CERTS": "{dir}/empty.pem", **WITH_KEY}),
    start("--connect-to=nowhere", says=r"--connect-to: must be HOST:PORT, not 'nowhere'", environ=WITH_KEY),
    # Access.
    start("--allowed-endpoints=fal-ai", says=r"--allowed-endpoints: 'fal-ai' has too few segments", environ=WITH_KEY),
    start(
        "--allowed-endpoints=a/b,,c/{d}",
        says=("--allowed-endpoints: '' may have", r"--allowed-endpoints: 'c/\{d\}' may have"),
        environ=WITH_KEY,
    ),
    start("--allowed-endpoints=none", says=r"--allowed-endpoints: must be a list of patterns", environ=WITH_KEY),
    start("--allowed-hosts=evil.com", says=r"--allowed-hosts: 'evil.com' must be a host of fal's", environ=WITH_KEY),
    start(says=r"--allow-cancel: must be .*'maybe'", environ={"FAL_PROXY_ALLOW_CANCEL": "maybe", **WITH_KEY}),
    start("--allow-uploads=1", says=r"argument --allow-uploads: ", environ=WITH_KEY),
    start("--max-token-expiration-s=1h", says=r"--max-token-expiration-s: must be .*'1h'", environ=WITH_KEY),
    start(
        "--allowed-webhooks=https://a.example/hook,https://b.example",
        says=r"--allowed-webhooks: 'https://a.example/hook' must be an origin",
        environ=WITH_KEY,
    ),
    start("--allowed-origins=*", says=r"--allowed-origins: '\*' must be an origin", environ=WITH_KEY),
    start("--allow-credentials", says=r"--allow-credentials: needs allowed_origins", environ=WITH_KEY),
    start("--authorize=rules", says=r"--authorize: must be package.module:function, not 'rules'", environ=WITH_KEY),
    start("--authorize=rules:f", says=r"--authorize: cannot import 'rules:f': ModuleNotFoundError", environ=WITH_KEY),
    start("--authorize=os:sep", says=r"--authorize: must be a function, not '/'", environ=WITH_KEY),
    start("--resolve-key=os:none", says=r"--resolve-key: cannot import 'os:none': AttributeError"),
    start("--log-format=xml", says=r"--log-format: must be one of text, json, not 'xml'", environ=WITH_KEY),
    start(
        "--admin-port=on", says=r"--admin-port: must be a number from 0 to 65535, or none, not 'on'", environ=WITH_KEY
    ),
    start(
        "--admin-port=0",
        "--admin-address=192.0.2.1",
        says=r"192.0.2.1 port 0: .*; see --admin-address",
        environ=WITH_KEY,
    ),
    start(
        "--trusted-proxies=10.0.0.0/8,nginx",
        says=r"--trusted-proxies: 'nginx' is no address, no network such as 10.0.0.0/8, and not unix",
        environ=WITH_KEY,
    ),
    start("--processes=-1", says=r"--processes: must be a number from 0 to 256, not '-1'", environ=WITH_KEY),
    start("--processes=257", says=r"--processes: must be .*'257'", environ=WITH_KEY),
    start("--processes=two", says=r"--processes: must be .*'two'", environ=WITH_KEY),
    start("--drain-timeout-s=long", says=r"--drain-timeout-s: must be a number of seconds.*'long'", environ=WITH_KEY),
    start("--drain-timeout-s=86401", says=r"--drain-timeout-s: must be .*'86401'", environ=WITH_KEY),
    # Several problems are one line.
    start(
        "--port=x",
        "--connect-to=\n\n",
        says=("--port: must be", "no key: set FAL_KEY", "--hold-bytes: must be", "--connect-to: must be", "; .*; .*; "),
        environ={"FAL_PROXY_HOLD_BYTES": "many\nlines"},
    ),
    # The address. (No name here is one that a resolver would have to be asked for.)
    start(
        "--port={taken}",
        says=r"cannot listen on 127.0.0.1 port \d+: .*in use; choose another --port",
        code=1,
        environ=WITH_KEY,
    ),
    start("--address=203.0.113.1", says=r"cannot listen on 203.0.113.1 port 8080: .*; see --address", environ=WITH_KEY),
    start("--address=a..b", says=r"cannot listen on a..b port 8080: .*; see --address", environ=WITH_KEY),
    start("--address=" + "a" * 64, says=r"cannot listen on a{64} port 8080: .*; see --address", environ=WITH_KEY),
    start(
        says=r"cannot listen on a ..b port 8080: .*; see --address", environ={"FAL_PROXY_ADDRESS": "a\n..b", **WITH_KEY}
    ),
    # The sandbox.
    start(
        "--sandbox",
        says=r"--sandbox needs more packages \(.*trustme.*\): pip install 'tornado-fal-proxy\[sandbox\]'",
        environ={"PYTHONPATH": "{shim}"},
    ),
    start("--sandbox", "--connect-to=a:1", says=r"--connect-to: the sandbox sets it"),
    start("--sandbox", "--ca-certs=a", "--port=x", says=("--ca-certs: the sandbox sets it", "--port: must be")),
    start("--sandbox", "--max-in-flight=x", says=r"--max-in-flight: must be"),
    start("--sandbox", "--processes=2", says=r"--processes: the sandbox runs in one"),
    start("--sandbox=1", says=r"argument --sandbox: "),
    start(says=r"--sandbox: must be one of .*'maybe'", environ={"FAL_PROXY_SANDBOX": "maybe", **WITH_KEY}),
]

WITHOUT_TRUSTME = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "trustme":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""

Ended = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Ended]]:
    """All of FAILS, run side by side."""
    directory = tmp_path_factory.mktemp("service")
    (directory / "empty.pem").touch()
    (directory / "shim").mkdir()
    (directory / "shim" / "sitecustomize.py").write_text(WITHOUT_TRUSTME)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"{taken}": str(taken.getsockname()[1]), "{dir}": str(directory), "{shim}": str(directory / "shim")}

        def filled(text: str) -> str:
            for name, value in places.items():
                text = text.replace(name, value)
            return text

        def run_one(case: Start) -> Ended:
            return subprocess.run(
                [*COMMAND, *map(filled, case.argv)],
                env=environment({name: filled(text) for name, text in case.environ.items()}),
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield dict(enumerate(pool.map(run_one, FAILS)))


@pytest.mark.parametrize(
    "number", range(len(FAILS)), ids=lambda number: " ".join(FAILS[number].argv)[:30] or str(number)
)
def test_a_start_that_cannot_work_ends_with_one_line(failed: dict[int, Ended], number: int) -> None:
    """On stderr, naming what to change, with the exit code of its kind; no traceback, and nothing of the key."""
    wanted, ended = FAILS[number], failed[number]
    assert ended.returncode == wanted.code
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("tornado-fal-proxy: ")
    for pattern in wanted.says:
        assert re.search(pattern, line), line
    assert "Traceback" not in line
    assert SECRET not in line


def shell(redirection: str, *argv: str, **environ: str) -> Ended:
    """The command, to its end, under a shell that redirects its output."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND, *argv],
        env=environment(environ),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_without_a_stderr_the_exit_code_stays(redirection: str) -> None:
    """And the line does not go to stdout instead."""
    ended = shell(redirection, "--port=x")
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "")


def test_help_lists_every_option() -> None:
    """In groups, with its unit or form and its default, and says how the key and the variables are given."""
    ended = shell("", "--help", COLUMNS="200")
    assert (ended.returncode, ended.stderr) == (0, "")
    text = ended.stdout.replace("\n" + 24 * " ", " ")  # what argparse put on a line of its own
    assert [line for line in text.splitlines() if line.endswith(":")] == [
        "options:",
        "listening:",
        "relaying:",
        "access:",
        "processes:",
        "watching:",
        "other:",
    ]
    for name in [*OPTIONS, *SWITCHES, "sandbox"]:
        option = "--" + name.replace("_", "-")
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {option} ")]
        if name in SWITCHES:
            assert re.match(rf"  {option} .+ \(default: no\)\Z", line), line
        elif name not in (*NO_DEFAULT, "sandbox"):
            assert re.match(rf"  {option} [A-Z]+ .+ \(default: \S+\)\Z", line), line
    assert "FAL_KEY" in text
    assert "--max-in-flight is FAL_PROXY_MAX_IN_FLIGHT" in text
    assert "--key" not in text


def test_version() -> None:
    """One line on stdout."""
    ended = shell("", "--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"tornado-fal-proxy {__version__}\n", "")


# Each option that takes a value: two texts, and what the first one means.
OPTIONS: dict[str, tuple[str, str, Any]] = {
    "address": ("::1", "0.0.0.0", "::1"),
    "port": ("0", "9000", 0),
    "route": ("/a", "/b", "/a"),
    "connect_timeout_s": ("1.5", "2", 1.5),
    "idle_timeout_s": ("60", "61", 60.0),
    "max_body_bytes": ("1024", "2", 1024),
    "max_in_flight": ("5", "6", 5),
    "hold_bytes": ("7", "8", 7),
    "ca_certs": ("{ca}", "", "{ca}"),
    "connect_to": ("localhost:1", "localhost:2", "localhost:1"),
    "allowed_endpoints": ("fal-ai/flux/**,a/b", "**", ("fal-ai/flux/**", "a/b")),
    "max_token_expiration_s": ("60", "61", 60),
    "allowed_hosts": ("fal.run", "*.fal.run", ("fal.run",)),
    "allowed_webhooks": ("none", "https://a.example", ()),
    "authorize": ("os.path:exists", "os.path:isfile", os.path.exists),
    "resolve_key": ("os.path:join", "os.path:isfile", os.path.join),
    "allowed_origins": ("https://a.example", "https://b.example", ("https://a.example",)),
    "processes": ("3", "2", 3),
    "drain_timeout_s": ("0", "1.5", 0.0),
    "log_level": ("WARNING", "debug", "warning"),
    "log_format": ("JSON", "text", "json"),
    "trusted_proxies": ("10.0.0.0/8, unix", "::1", TrustedProxies(("10.0.0.0/8", "unix"))),
    "admin_port": ("0", "9000", 0),
    "admin_address": ("::1", "0.0.0.0", "::1"),
}
SWITCHES = ("allow_uploads", "allow_cancel", "allow_credentials")
NO_DEFAULT = (
    *("ca_certs", "connect_to", "authorize", "resolve_key", "trusted_proxies"),
    *("allowed_endpoints", "allowed_hosts", "allowed_webhooks", "allowed_origins"),
)


def test_the_table_has_every_option() -> None:
    """So that the two tests beside cover a new one."""
    actions = {action.dest for action in _parser()._actions}
    assert actions - {"help", "version", "sandbox", *SWITCHES} == set(OPTIONS)
    relayed = {field.name for field in dataclasses.fields(ProxyConfig)} - {"key", *SWITCHES}
    assert relayed < set(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_also_a_variable_and_wins_over_it(authority: Authority, name: str) -> None:
    """--max-in-flight 5, --max-in-flight=5 and FAL_PROXY_MAX_IN_FLIGHT=5 are the same."""
    text, other, value = (authority.ca_file if item == "{ca}" else item for item in OPTIONS[name])
    option, variable = "--" + name.replace("_", "-"), "FAL_PROXY_" + name.upper()

    def parsed(argv: list[str], environ: dict[str, str]) -> Any:
        settings = parse_settings(argv, WITH_KEY | environ)
        assert settings.config is not None
        return getattr(settings, name, None) if hasattr(settings, name) else getattr(settings.config, name)

    default = parsed([], {})
    assert parsed([option, text], {}) == value != default
    assert parsed([f"{option}={text}"], {}) == value
    assert parsed([], {variable: text}) == value
    assert parsed([option, text], {variable: other}) == value
    assert parsed([], {variable: ""}) == default


@pytest.mark.parametrize(
    ("text", "on"), [("1", True), ("TRUE", True), ("yes", True), ("0", False), ("off", False), ("", False)]
)
def test_the_sandbox_is_a_switch(text: str, on: bool) -> None:
    """An option without value, or a variable that says yes or no. It needs no key, and uses none."""
    assert parse_settings(["--sandbox"], {}).sandbox
    settings = parse_settings([], WITH_KEY | {"FAL_PROXY_SANDBOX": text})
    assert settings.sandbox is on
    assert (settings.config is None) is on


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_also_a_variable(name: str) -> None:
    """--allow-uploads and FAL_PROXY_ALLOW_UPLOADS=yes are the same; "no" and an empty text leave it off."""
    origins = {"FAL_PROXY_ALLOWED_ORIGINS": "https://a.example"}
    option, variable = "--" + name.replace("_", "-"), "FAL_PROXY_" + name.upper()
    for argv, environ, on in (
        ([], {}, False),
        ([option], {}, True),
        ([option], {variable: "no"}, True),
        ([], {variable: "yes"}, True),
        ([], {variable: "TRUE"}, True),
        ([], {variable: "off"}, False),
        ([], {variable: ""}, False),
    ):
        settings = parse_settings(argv, WITH_KEY | origins | environ)
        assert getattr(settings.config, name) is on


def test_with_resolve_key_no_key_is_needed() -> None:
    """Each call has its own, and a key that is there all the same is checked."""
    settings = parse_settings(["--resolve-key=os.path:join"], {})
    assert settings.config is not None
    assert settings.config.resolve_key is os.path.join
    with pytest.raises(ConfigError, match="FAL_KEY: must be"):
        parse_settings(["--resolve-key=os.path:join"], {"FAL_KEY": "a b"})


# Options, and what the line at the start says then; the first two leave the key to strangers.
OPEN = [
    ([], "open: every model, anyone: see README.md, 'Secure it'"),
    (
        ["--allow-cancel", "--allowed-hosts=fal.run"],
        "open: every model, only on fal.run, cancel, anyone: see README.md",
    ),
    (["--allowed-endpoints=fal-ai/flux/**,a/b"], "open: endpoints fal-ai/flux/**, a/b, anyone"),
    (["--allowed-endpoints=a/b", "--allow-uploads"], "open: endpoints a/b, uploads, anyone"),
    (["--authorize=os.path:exists"], "open: every model, whom authorize lets in"),
    (
        ["--authorize=os.path:exists", "--allowed-webhooks=none", "--allowed-origins=https://a.example"],
        "open: every model, webhooks to nobody, whom authorize lets in, pages of https://a.example",
    ),
]


@pytest.mark.parametrize(("argv", "line"), OPEN)
def test_what_is_open(argv: list[str], line: str) -> None:
    """In a line, which points to the README where nothing keeps strangers out."""
    config = parse_settings(argv, WITH_KEY).config
    assert config is not None
    restricted, said = what_is_open(config)
    assert said.startswith(line)
    assert restricted is ("README" not in said) is ("README" not in line)
    assert SECRET not in said


def test_the_settings_show_no_key() -> None:
    """To whoever prints them."""
    assert SECRET not in repr(parse_settings([], WITH_KEY))


def test_several_problems_are_a_tuple() -> None:
    """For a program that asks: each of them by itself."""
    with pytest.raises(ConfigError) as caught:
        parse_settings(["--port=x", "--route=x", "--log-level=x", "--max-in-flight=x"], {})
    names = ["--port: ", "--route: ", "--log-level: ", "no key: ", "--max-in-flight: "]
    assert len(caught.value.problems) == len(names)
    assert all(map(str.startswith, caught.value.problems, names))


# The process at work.


@pytest.mark.gen_test
async def test_it_serves_its_route_and_its_health() -> None:
    """Where the start line says, and nothing else; an option wins over its variable; it logs to stderr alone."""
    running = await Running.start("--route=/here", FAL_PROXY_ROUTE="/there", FAL_PROXY_PORT="1", FAL_KEY=KEY)
    assert running.line.endswith(f" listens on http://127.0.0.1:{running.port}/here\n")

    health = await call(running.port, "GET", path="/healthz")
    assert (health.status, health.body, health.header("cache-control")) == (200, b'{"status": "ok"}', "no-store")
    caller = await Caller.open(running.port)
    await caller.send("HEAD", path="/healthz")
    assert (await caller.head()).status == 200
    await caller.close()

    for path in ("/", "/there", "/here/", "/hereafter", ROUTE, "/healthz/", "/Healthz"):
        for method in ("GET", "POST", "DELETE"):
            answer = await call(running.port, method, path=path)
            assert (answer.status, answer.message) == (404, "Not found.")
    assert (await call(running.port, "GET", path="/here", target=None)).status == 400

    stdout, stderr = await running.end()
    assert stdout == ""
    assert "WARNING tornado_fal_proxy: open: every model, anyone: see README.md" in stderr
    assert "why=NotFound" in stderr


RULES = """
async def authorize(handler, target):
    return handler.request.headers.get("x-token") == target.path

def resolve_key(handler, target):
    return "tenant:" + handler.request.headers["x-token"]
"""


@pytest.mark.gen_test
async def test_rules_without_python(setup: Setup, tmp_path: Path) -> None:
    """Options alone restrict it; functions of the operator's are found in the working directory; no key is needed."""

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.respond(200, exchange.header("authorization") or b"", [("content-type", "application/json")])

    upstream = await setup.upstream(answer)
    (tmp_path / "my_rules.py").write_text(RULES)
    config = setup.config(upstream)
    running = await Running.start(
        *("--authorize=my_rules:authorize", "--resolve-key=my_rules:resolve_key", "--allow-cancel"),
        cwd=tmp_path,
        FAL_PROXY_ALLOWED_ENDPOINTS="fal-ai/flux/**",
        FAL_PROXY_CA_CERTS=str(config.ca_certs),
        FAL_PROXY_CONNECT_TO=str(config.connect_to),
    )
    token = "x-token: /fal-ai/flux/dev"
    answer_ = await call(running.port, headers=[token])
    assert (answer_.status, answer_.body) == (200, b"Key tenant:/fal-ai/flux/dev")
    assert (await call(running.port, headers=["x-token: /other"])).status == 401
    closed = await call(running.port, target="https://fal.run/fal-ai/other", headers=[token])
    assert (closed.status, "allowed_endpoints" in closed.message) == (403, True)
    assert (await call(running.port, "PUT", headers=[token])).header("allow") == "GET, POST"
    _, stderr = await running.end()
    assert "INFO tornado_fal_proxy: open: endpoints fal-ai/flux/**, cancel, whom authorize lets in" in stderr
    assert "tenant:" not in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.gen_test
async def test_a_signal_ends_it_and_every_call_is_answered(setup: Setup, protocol: str, number: signal.Signals) -> None:
    """A held POST with 500, for it may have run; a held GET with 502, which they repeat; the exit code is 3.

    So it is for calls that are not finished when --drain-timeout-s is over.
    """
    upstream = await setup.upstream(silent, protocol)
    running = await Running.before(setup, upstream, "--drain-timeout-s=0.3")
    idle = await Caller.open(running.port)
    held = [asyncio.create_task(call(running.port, method)) for method in ("POST", "GET", "POST", "GET")]
    await arrived(upstream, len(held))
    running.process.send_signal(number)
    _, stderr = await running.ended(3)
    assert "4 calls are cut" in stderr
    answers = [await task for task in held]
    assert [answer.status for answer in answers] == [500, 502, 500, 502]
    broken = "The connection to fal's server broke before the answer was complete."
    perhaps = " The job may have run: check before sending it again."
    assert [answer.message for answer in answers] == [broken + perhaps, broken] * 2
    assert await idle.reader.read() == b""
    await idle.close()


@pytest.mark.gen_test
async def test_an_answer_that_is_being_written_when_it_ends_leaves_whole(setup: Setup) -> None:
    """A caller that has the head of a paid result and still reads gets the rest of it."""
    result = b"x" * 8_000_000

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.respond(200, result, [("content-type", "application/json")])

    running = await Running.before(setup, await setup.upstream(answer))
    caller = await Caller.open(running.port, receive_buffer=65_536)
    await caller.send("POST")
    head = await caller.head()
    assert head.status == 200
    running.process.send_signal(signal.SIGTERM)
    # No new connection is accepted once it is ending.
    while connects(running.port):
        await asyncio.sleep(0.005)
    await asyncio.sleep(10 * CLOSE_POLL_S)  # a caller that takes its time, within CLOSE_GRACE_S
    assert await caller.reader.readexactly(len(result)) == result
    await caller.close()
    await running.ended()


@pytest.mark.gen_test
async def test_a_call_that_comes_while_it_ends_is_sent_to_another(setup: Setup, logs: Logs) -> None:
    """503 on a connection that is still open: nothing reached fal, so the caller may repeat it."""
    application = make_application(ProxyConfig(key=KEY), ROUTE)
    port = setup.serve(application)
    application.closing = True
    for path in (ROUTE, "/healthz", "/"):
        answer = await call(port, path=path)
        assert (answer.status, answer.message) == (503, "The proxy is closing; try again.")
        assert answer.header("connection") == "close"


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
    """Not to any log at its most talkative, the list of processes, or a caller, however the call ends."""

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        if exchange.target == b"/lost":
            exchange.abort_connection()
        elif exchange.target == b"/odd":
            await exchange.respond(200, b"not gzip", [("content-encoding", "gzip")])
        else:
            await exchange.respond(200, b"{}", [("content-type", "application/json")])

    upstream = await setup.upstream(answer, protocol)
    running = await Running.before(setup, upstream, "--log-level=debug")
    calls: list[tuple[str, dict[str, Any], int]] = [
        ("POST", {}, 200),
        ("GET", {}, 200),
        ("POST", {"target": "https://fal.run/lost"}, 500),
        ("GET", {"target": "https://fal.run/lost"}, 502),
        ("POST", {"target": "https://fal.run/odd"}, 500),
        ("POST", {"target": "https://untrusted.example.fal.run/"}, 502),
        ("POST", {"target": "https://evil.com/"}, 412),
        ("POST", {"target": None}, 400),
        ("PUT", {}, 405),
        ("POST", {"headers": ["content-type: text/plain"]}, 415),
        ("POST", {"path": "/elsewhere"}, 404),
    ]
    answers: list[Answer] = [await call(running.port, method, **more) for method, more, _ in calls]
    assert [answer.status for answer in answers] == [status for *_, status in calls]
    assert {exchange.header("authorization") for exchange in upstream.exchanges} == {f"Key {KEY}".encode()}

    command_line = Path(f"/proc/{running.process.pid}/cmdline").read_bytes()
    stdout, stderr = await running.end()
    assert b"tornado_fal_proxy" in command_line
    assert "ConnectionLost" in stderr
    for text in (repr(command_line), running.line, stdout, stderr, repr(answers)):
        assert SECRET not in text
        assert "Key " not in text


@pytest.mark.gen_test
async def test_the_sandbox_runs_with_neither_key_nor_network() -> None:
    """A call of fal's client to it succeeds, and it ends as the service does."""
    running = await Running.start("--sandbox")
    answer = await call(running.port, body=b'{"prompt": "a lighthouse"}')
    assert answer.status == 200
    stdout, _ = await running.end()
    assert f"http://127.0.0.1:{running.port}/" in stdout
