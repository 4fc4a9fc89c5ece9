"""Starts that cannot work: one line that names what to change, and an exit code."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.proxy import KEY, SECRET
from tests.support.service_process import COMMAND, WITH_KEY, Ended, environment, shell
from tests.support.waiting import TIMEOUT_S
from tornado_fal_proxy import __version__

# Starts that fail. In the texts {taken} is a port in use, {dir} a directory, {shim} one that hides the packages
# trustme, redis and shtab, {secret} a part of the key.


@dataclasses.dataclass(frozen=True)
class Start:
    """A start that fails. The one line on stderr must match each of ``match``, and ``code`` is the exit code."""

    argv: tuple[str, ...]
    environ: dict[str, str]
    match: tuple[str, ...]
    code: int = 2


def start(*argv: str, match: str | tuple[str, ...], code: int = 2, environ: dict[str, str] | None = None) -> Start:
    return Start(argv, environ or {}, (match,) if isinstance(match, str) else match, code)


# How to install an extra, from what the operator has.
INSTALL = r"pip install '\.\[{0}\]' in .* or pip install 'FILE\.whl\[{0}\]' with its wheel\Z"

FAILS = [
    # The key.
    start(match=r"no key: set FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET"),
    start(match=r"no key", environ={"FAL_KEY": " "}),
    start(match=r"no key: FAL_KEY_ID is set without FAL_KEY_SECRET", environ={"FAL_KEY_ID": "a"}),
    start(
        match=r"\Atornado-fal-proxy: FAL_KEY and FAL_KEY_FILE are both set: unset one of them\Z",
        environ={"FAL_KEY_FILE": "{dir}/empty.pem", **WITH_KEY},
    ),
    start(
        match=r"FAL_KEY and FAL_KEY_ID with FAL_KEY_SECRET are set, to different keys",
        environ={"FAL_KEY_ID": "a", "FAL_KEY_SECRET": SECRET, **WITH_KEY},
    ),
    # Variables.
    start(
        match=r": unknown variable FAL_PROXY_ALLOWED_ENDPOINT, did you mean FAL_PROXY_ALLOWED_ENDPOINTS\?\Z",
        environ={"FAL_PROXY_ALLOWED_ENDPOINT": "a/b", **WITH_KEY},
    ),
    start("--sandbox", match=r"unknown variable FAL_PROXY_SANDBX, did you mean", environ={"FAL_PROXY_SANDBX": ""}),
    start(match=r"FAL_KEY: must be printable ASCII", environ={"FAL_KEY": f"{KEY} {KEY}"}),
    start(match=r"FAL_KEY_FILE: cannot read '.*/none': No such", environ={"FAL_KEY_FILE": "{dir}/none"}),
    start(match=r"FAL_KEY_FILE: cannot read '.*': Is a directory", environ={"FAL_KEY_FILE": "{dir}"}),
    start(match=r"FAL_KEY_FILE: '.*empty.pem' holds no key", environ={"FAL_KEY_FILE": "{dir}/empty.pem"}),
    start(match=r"FAL_KEY_FILE: cannot read '.*/fifo': its end did not", environ={"FAL_KEY_FILE": "{dir}/fifo"}),
    start(match=r"FAL_KEY_FILE: '/dev/zero' holds no key", environ={"FAL_KEY_FILE": "/dev/zero"}),
    # A key that is passed as an option must not get into the machine's log.
    start(f"--key={KEY}", match=r"unknown: --key; .*FAL_KEY"),
    start("--key", KEY, match=r"unknown: --key, an argument; .*FAL_KEY"),
    start(f"--fal-key={KEY}", "--nope", match=r"unknown: --fal-key, --nope; "),
    start(f"-k{KEY}", match=r"unknown: an argument; "),
    start(f"-k={KEY}", match=r"unknown: an argument; "),
    start(KEY, match=r"unknown: an argument; "),
    # Options.
    start("--nope", match=r"unknown: --nope; --help shows"),
    start("--help", KEY, match=r": argument -h/--help: must be one of listening, "),
    start("chekc", match=r"unknown: an argument \(did you mean check\?\); "),
    start("--port=1", "check", match=r"unknown: an argument \(check must stand before all options\); "),
    start("sandbox", match=r"unknown: an argument \(did you mean --sandbox\?\); "),
    start("completion", KEY, match=r"completion: takes the name of a shell, one of bash, zsh, fish\Z"),
    start(
        *("completion", "bash"),
        match=r"completion needs shtab: " + INSTALL.format("completion"),
        environ={"PYTHONPATH": "{shim}"},
    ),
    start("--por=1", match=r"unknown: --por \(did you mean --port\?\); "),
    start("check", "--port=x", match=r"\Atornado-fal-proxy: --port: must be .*'x'\Z", environ=WITH_KEY),
    start("check", "--sandbox", match=r"--sandbox needs more packages", environ={"PYTHONPATH": "{shim}"}),
    start("--port", match=r"argument --port: expected one argument"),
    start("--port=http", match=r"--port: must be a number from 0 to 65535, not 'http'", environ=WITH_KEY),
    start("--port=65536", match=r"--port: must be .*65536", environ=WITH_KEY),
    start("--port=-1", match=r"--port: must be .*-1", environ=WITH_KEY),
    start(
        match=r"FAL_PROXY_PORT: must be .*'tcp://10.0.0.1:8080'",
        environ={"FAL_PROXY_PORT": "tcp://10.0.0.1:8080", **WITH_KEY},
    ),
    start("--route=api", match=r"--route: must be a path such as /api/fal/proxy.*'api'", environ=WITH_KEY),
    start("--route=/(a|b)", match=r"--route: must be a path", environ=WITH_KEY),
    start("--route=/healthz", match=r"--route: .*none of /, /healthz", environ=WITH_KEY),
    start("--log-level=loud", match=r"--log-level: must be one of debug, info, .*'loud'", environ=WITH_KEY),
    start(
        "--connect-timeout-s=never",
        match=r"--connect-timeout-s: must be a number of seconds.*'never'",
        environ=WITH_KEY,
    ),
    start(match=r"FAL_PROXY_IDLE_TIMEOUT_S: must be .*'0x1'", environ={"FAL_PROXY_IDLE_TIMEOUT_S": "0x1", **WITH_KEY}),
    start("--max-body-bytes=32M", match=r"--max-body-bytes: must be a whole number.*'32M'", environ=WITH_KEY),
    start("--max-in-flight=0", match=r"--max-in-flight: must be .*not 0", environ=WITH_KEY),
    start("--response-buffer-bytes=1.5", match=r"--response-buffer-bytes: must be .*'1.5'", environ=WITH_KEY),
    start("--ca-certs={dir}/none.pem", match=r"--ca-certs: cannot read .*none.pem': No such file", environ=WITH_KEY),
    start("--ca-certs={dir}/fifo", match=r"--ca-certs: '.*/fifo' is no regular file", environ=WITH_KEY),
    start("--ca-certs={dir}", match=r"--ca-certs: cannot read .*: Is a directory", environ=WITH_KEY),
    start(
        match=r"FAL_PROXY_CA_CERTS: .*empty.pem' holds no PEM",
        environ={"FAL_PROXY_CA_CERTS": "{dir}/empty.pem", **WITH_KEY},
    ),
    start(
        "--connect-to=nowhere",
        match=r"--connect-to: must be HOST:PORT or HOST:PORT,HOST:PORT, not 'nowhere'",
        environ=WITH_KEY,
    ),
    start(
        "--connect-to=a:1,b:2",
        match=r"--connect-to: the second address of 'a:1,b:2' is for fal's backup domain: set failover too",
        environ=WITH_KEY,
    ),
    # The file of options; tests/unit/test_config_file.py has the rest.
    start("--config={dir}/none", match=r": --config: cannot read '.*/none': No such file or directory\Z"),
    # The key in the place of another option.
    *(
        start(match=rf"FAL_PROXY_{name}: .*\*\*\*", environ={f"FAL_PROXY_{name}": KEY, "FAL_KEY": "a:b"})
        for name in ("PORT", "ALLOWED_ENDPOINTS", "AUTHORIZE", "MAX_BODY_BYTES", "CONNECT_TO")
    ),
    start(match=r": FAL_PROXY_CONFIG: cannot read '.*': Is a directory\Z", environ={"FAL_PROXY_CONFIG": "{dir}"}),
    start("--config={dir}/fifo", match=r"--config: cannot read '.*/fifo': it is no regular file"),
    start("--config={dir}/key", match=r"--config: '.*/key' is no TOML: Expected '=' after a key"),
    start(
        "--config={dir}/wrong.toml",
        match=(
            r": /.*/wrong.toml line 2: max_in_fligth: unknown, did you mean max_in_flight\?; ",
            r"; /.*/wrong.toml line 5: plans.free.jobs_per_user: must be a number of jobs and a period, .*'5/week'\Z",
        ),
        environ=WITH_KEY,
    ),
    start("--config={dir}/with_key.toml", match=r"with_key.toml line 1: fal_key: the key for fal must not stand in"),
    # The file of variables; tests/unit/test_env_file.py has the rest.
    start("--env-file={dir}/none", match=r": --env-file: cannot read '.*/none': No such file or directory\Z"),
    start(match=r": FAL_PROXY_ENV_FILE: cannot read '.*': Is a dir", environ={"FAL_PROXY_ENV_FILE": "{dir}"}),
    start("--env-file={dir}/key", match=r": /.*/key line 1: must be NAME=value, in one line"),
    start("usage", "--env-file={dir}/key", match=r": /.*/key line 1: must be NAME=value, in one line"),
    # Spending.
    start("--store=redis://:{secret}@h:x", match=r"--store: must be sqlite:PATH, redis://", environ=WITH_KEY),
    start(
        match=r"FAL_PROXY_STORE: needs more packages for Redis: " + INSTALL.format("redis"),
        environ={"FAL_PROXY_STORE": "redis://:{secret}@h", "PYTHONPATH": "{shim}", **WITH_KEY},
    ),
    start("--user-header=X-User", match=r": --user-header: needs --trusted-proxies", environ=WITH_KEY),
    # Access.
    start("--allowed-endpoints=fal-ai", match=r"--allowed-endpoints: 'fal-ai' has too few segments", environ=WITH_KEY),
    start(
        "--allowed-endpoints=a/b,,c/{d}",
        match=("--allowed-endpoints: '' may have", r"--allowed-endpoints: 'c/\{d\}' may have"),
        environ=WITH_KEY,
    ),
    start("--allowed-endpoints=none", match=r"--allowed-endpoints: must be a list of patterns", environ=WITH_KEY),
    start("--allowed-hosts=evil.com", match=r"--allowed-hosts: 'evil.com' must be a host of fal's", environ=WITH_KEY),
    start(match=r"FAL_PROXY_ALLOW_CANCEL: must be .*'maybe'", environ={"FAL_PROXY_ALLOW_CANCEL": "maybe", **WITH_KEY}),
    start("--allow-uploads=1", match=r"argument --allow-uploads: ", environ=WITH_KEY),
    start("--max-token-expiration-s=1h", match=r"--max-token-expiration-s: must be .*'1h'", environ=WITH_KEY),
    start(
        "--allowed-webhooks=https://a.example/hook,https://b.example",
        match=r"--allowed-webhooks: 'https://a.example/hook' must be an origin",
        environ=WITH_KEY,
    ),
    start("--allowed-origins=*", match=r"--allowed-origins: '\*' must be an origin", environ=WITH_KEY),
    start("--allow-credentials", match=r"--allow-credentials: needs allowed_origins", environ=WITH_KEY),
    start("--authorize=rules", match=r"--authorize: must be package.module:function, not 'rules'", environ=WITH_KEY),
    start(
        "--authorize=rules:f",
        match=(
            r"--authorize: cannot import 'rules:f': ModuleNotFoundError: No module named 'rules'",
            r" \(neither in the working directory '/.*' nor among the installed packages\)\Z",
        ),
        environ=WITH_KEY,
    ),
    start("--authorize=os:sep", match=r"--authorize: must be a function, not '/'", environ=WITH_KEY),
    start("--resolve-key=os:none", match=r"--resolve-key: cannot import 'os:none': AttributeError"),
    start("--log-format=xml", match=r"--log-format: must be one of text, json, not 'xml'", environ=WITH_KEY),
    start(
        "--admin-port=on", match=r"--admin-port: must be a number from 0 to 65535, or none, not 'on'", environ=WITH_KEY
    ),
    start(
        "--port=0",
        "--admin-port=0",
        "--admin-address=203.0.113.1",
        match=r"203.0.113.1 port 0: .*; see --admin-address",
        environ=WITH_KEY,
    ),
    start(
        "--trusted-proxies=10.0.0.0/8,nginx",
        match=r"--trusted-proxies: 'nginx' is no address, no network such as 10.0.0.0/8, and not unix",
        environ=WITH_KEY,
    ),
    start("--processes=-1", match=r"--processes: must be a number from 0 to 256, not '-1'", environ=WITH_KEY),
    start("--processes=257", match=r"--processes: must be .*'257'", environ=WITH_KEY),
    start("--processes=two", match=r"--processes: must be .*'two'", environ=WITH_KEY),
    start("--drain-timeout-s=long", match=r"--drain-timeout-s: must be a number of seconds.*'long'", environ=WITH_KEY),
    start("--drain-timeout-s=86401", match=r"--drain-timeout-s: must be .*'86401'", environ=WITH_KEY),
    start(
        "--worker-timeout-s=0.5",
        match=r"--worker-timeout-s: must be 0, or a number of seconds from 1 to 86400, not '0.5'",
        environ=WITH_KEY,
    ),
    # Several problems are one line.
    start(
        "--port=x",
        "--connect-to=\n\n",
        match=(
            "--port: must be",
            "no key: set FAL_KEY",
            "FAL_PROXY_RESPONSE_BUFFER_BYTES: must be",
            "--connect-to: must be",
            "; .*; .*; ",
        ),
        environ={"FAL_PROXY_RESPONSE_BUFFER_BYTES": "many\nlines"},
    ),
    # The address. No name here needs a resolver.
    start(
        "--port={taken}",
        match=r"cannot listen on 127.0.0.1 port \d+: .*in use; choose another --port",
        code=1,
        environ=WITH_KEY,
    ),
    start(
        "--address=203.0.113.1", match=r"cannot listen on 203.0.113.1 port 8080: .*; see --address", environ=WITH_KEY
    ),
    start("--address=a..b", match=r"cannot listen on a..b port 8080: .*; see --address", environ=WITH_KEY),
    start("--address=" + "a" * 64, match=r"cannot listen on a{64} port 8080: .*; see --address", environ=WITH_KEY),
    start(
        match=r"cannot listen on a ..b port 8080: .*; see --address",
        environ={"FAL_PROXY_ADDRESS": "a\n..b", **WITH_KEY},
    ),
    # The sandbox.
    start(
        "--sandbox",
        match=r"--sandbox needs more packages \(.*trustme.*\): " + INSTALL.format("sandbox"),
        environ={"PYTHONPATH": "{shim}"},
    ),
    start("--sandbox", "--connect-to=a:1", match=r"--connect-to: the sandbox sets it"),
    start("--sandbox", "--ca-certs=a", "--port=x", match=("--ca-certs: the sandbox sets it", "--port: must be")),
    start("--sandbox", "--max-in-flight=x", match=r"--max-in-flight: must be"),
    start("--sandbox", "--processes=2", match=r"--processes: the sandbox runs in one"),
    start("--sandbox=1", match=r"argument --sandbox: "),
    start(match=r"FAL_PROXY_SANDBOX: must be one of .*'maybe'", environ={"FAL_PROXY_SANDBOX": "maybe", **WITH_KEY}),
]

WITHOUT_EXTRAS = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in ("trustme", "redis", "shtab"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Ended]]:
    """Run all of FAILS side by side, and return how each ended, by its number."""
    directory = tmp_path_factory.mktemp("service")
    (directory / "empty.pem").touch()
    os.mkfifo(directory / "fifo")
    (directory / "key").write_text(KEY)
    (directory / "wrong.toml").write_text('\nmax_in_fligth = 1\n\n[plans.free]\njobs_per_user = "5/week"\n')
    (directory / "with_key.toml").write_text(f'fal_key = "{KEY}"\n')
    (directory / "shim").mkdir()
    (directory / "shim" / "sitecustomize.py").write_text(WITHOUT_EXTRAS)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        texts = {"{taken}": str(taken.getsockname()[1]), "{dir}": str(directory), "{shim}": str(directory / "shim")}
        texts["{secret}"] = SECRET

        def filled(text: str) -> str:
            for name, value in texts.items():
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
    """The line on stderr names what to change, and the exit code is that of its kind. The key is not shown."""
    wanted, ended = FAILS[number], failed[number]
    assert ended.returncode == wanted.code
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("tornado-fal-proxy: ")
    for pattern in wanted.match:
        assert re.search(pattern, line), line
    assert "Traceback" not in line
    assert SECRET not in line


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_without_a_stderr_the_exit_code_stays(redirection: str) -> None:
    """The exit code is as usual, and the line does not go to stdout instead."""
    ended = shell(redirection, "--port=x")
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "")


def test_version() -> None:
    """The version is one line on stdout."""
    ended = shell("", "--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"tornado-fal-proxy {__version__}\n", "")


@pytest.mark.parametrize("variable", [None, "timeout:9"])
def test_lookups_are_short_unless_the_operator_says_otherwise(variable: str | None) -> None:
    """The service shortens the C library's lookups, and leaves RES_OPTIONS alone where it is set."""
    program = (
        "import os, sys\n"
        "from tornado_fal_proxy.service import command\n"
        "command._run = lambda context: print(os.environ['RES_OPTIONS'])\n"
        "sys.exit(command.main(['--port=0', '--log-level=error']))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(WITH_KEY | ({} if variable is None else {"RES_OPTIONS": variable})),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.stdout == f"{variable or 'timeout:2 attempts:2'}\n", ended.stderr
