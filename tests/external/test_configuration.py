"""docs/configuration.md is true: its file and function limit what users may do, and its problems are the command's."""

import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.proxy import KEY, Setup
from tests.support.raw_client import call
from tests.support.service_process import COMMAND, WITH_KEY, ServiceProcess, environment
from tests.support.stub_handlers import fine
from tests.support.tools import ROOT
from tornado_fal_proxy.service.options import parse_settings

PAGE = (ROOT / "docs/configuration.md").read_text("utf-8")
SCHNELL, DEV, VIDEO = (
    f"https://fal.run/fal-ai/{app}" for app in ("flux/schnell", "flux/dev", "kling-video/v2/master/text-to-video")
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def block(language: str) -> str:
    (found,) = blocks(language)
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory with the files that the page shows."""
    for language, comment in (("toml", "# options.toml\n"), ("python", "# accounts.py\n")):
        text = block(language)
        assert text.startswith(comment)
        (tmp_path / comment.strip("# \n")).write_text(text)
    (tmp_path / "fal_key").write_text(KEY)
    return tmp_path


# The token of a user, the model, and the statuses of calls one after the other. Limits of a minute are not reached.
USERS = [
    ("token-of-tim", SCHNELL, [200, 402]),
    ("token-of-tim", DEV, [403]),
    ("token-of-ann", VIDEO, [200] * 3),
    ("token-of-bob", DEV, [200]),
    ("nobody", DEV, [200]),
    ("nobody", "https://fal.run/fal-ai/other", [403]),
]


@pytest.mark.gen_test
async def test_the_file(setup: Setup, directory: Path) -> None:
    """The command starts with the file and the key that it names, and each plan has its own limits."""
    upstream = await setup.upstream(fine)
    config = setup.config(upstream)
    running = await ServiceProcess.start(
        "--config=options.toml",
        "--processes=2",
        cwd=directory,
        FAL_PROXY_CA_CERTS=str(config.ca_certs),
        FAL_PROXY_CONNECT_TO=str(config.connect_to),
        XDG_STATE_HOME=str(directory),
    )
    assert len(running.workers()) == 2
    for token, target, statuses in USERS:
        for status in statuses:
            response = await call(running.port, target=target, headers=[f"x-app-token: {token}"])
            assert response.status == status, (token, target, response.body)
    assert upstream.exchanges[0].header("authorization") == f"Key {KEY}".encode()
    assert (directory / "tornado-fal-proxy/spending.sqlite").is_file()
    running.process.send_signal(signal.SIGHUP)
    shown, _, _ = blocks("console")[1].partition("...")
    assert shown in await running.log_line("reload")
    await running.end()


def test_the_values(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans and prices are those that the page tells of, in the sandbox too."""
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(str(directory))
    relay = parse_settings(["--config=options.toml"], {}).relay
    assert relay is not None
    rules = relay.spending
    assert rules is not None
    assert {name: len(plan.jobs) for name, plan in rules.plans.items()} == {"pro": 1, "trial": 1, "staff": 0}
    assert [plan.max_unfinished for plan in rules.plans.values()] == [4, 2, 2]
    price = rules.price(VIDEO.partition("run/")[2])
    assert price is not None
    assert (price.units, price.cost(price.units)) == (5_000_000, 350_000)
    assert parse_settings(["--config=options.toml", "--sandbox"], {}).sandbox


def test_check(directory: Path) -> None:
    """The lines that are shown are those of ``check`` with the file."""
    ended = subprocess.run(
        [*COMMAND, "check", "--config=options.toml"],
        cwd=directory,
        env=environment({"XDG_STATE_HOME": str(directory)}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == blocks("console")[0]


def test_the_file_of_variables(tmp_path: Path) -> None:
    """The file that is shown has a key and a list."""
    (tmp_path / "proxy.env").write_text(block("ini"))
    relay = parse_settings([f"--env-file={tmp_path / 'proxy.env'}"], {}).relay
    assert relay is not None
    assert (relay.key, relay.allowed_endpoints) == ("ab12:cd34", ("fal-ai/flux/**", "fal-ai/fast-sdxl"))


def test_the_problems(tmp_path: Path) -> None:
    """The line that is shown is that of a start with these faults."""
    (line,) = block("text").splitlines()
    (tmp_path / "options.toml").write_text('\nmax_in_fligth = 5\n\n[plans.pro]\njobs_per_user = "5/week"\n')
    ended = subprocess.run(
        [*COMMAND, "--config=options.toml"],
        cwd=tmp_path,
        env=environment(WITH_KEY | {"FAL_PROXY_ROUTE": "api"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    found = ended.stderr.removeprefix("tornado-fal-proxy: ").strip().split("; ")
    assert sorted(found) == sorted(line.removeprefix("tornado-fal-proxy: ").split("; "))
