"""Options in a TOML file: what each value means, and the line that names what is wrong."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.service_process import WITH_KEY
from tornado_fal_proxy import ConfigError
from tornado_fal_proxy.service.config_file import MAX_BYTES
from tornado_fal_proxy.service.options import Settings, parse_settings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "options.toml"


def parsed(path: Path, text: str, *argv: str, **environ: str) -> Settings:
    path.write_text(text)
    return parse_settings([f"--config={path}", *argv], WITH_KEY | environ)


WHOLE = """
port = 9000
log_format = "json"
max_in_flight = 50
idle_timeout_s = 1.5
allow_uploads = true
allow_cancel = false
allowed_endpoints = ["fal-ai/flux/**", "me/app"]
allowed_webhooks = []
set_fal_headers = ["x-fal-tags: a=b,c=d", "x-fal-store-io: 0"]
trusted_proxies = ["10.0.0.0/8", "unix"]
jobs_per_user = "5/minute,20/day"
budget = "5.00/day"
store = "memory"

[plans.pro]
jobs_per_user = "100/day"
unfinished_jobs_per_user = 4
allowed_endpoints = ["fal-ai/flux/dev"]

[prices]
"fal-ai/flux/dev" = 0.025
"**" = {price = 0.1, units = 2}
"""


def test_whole_file(path: Path) -> None:
    """Numbers, switches, lists and tables become what the same options are as arguments."""
    settings = parsed(path, WHOLE)
    relay = settings.relay
    assert relay is not None
    assert (settings.port, settings.log_format) == (9000, "json")
    assert settings.trusted_proxies.texts == ("10.0.0.0/8", "unix")
    assert (relay.max_in_flight, relay.idle_timeout_s) == (50, 1.5)
    assert (relay.allow_uploads, relay.allow_cancel) == (True, False)
    assert (relay.allowed_endpoints, relay.allowed_webhooks) == (("fal-ai/flux/**", "me/app"), ())
    assert relay.set_fal_headers == ("x-fal-tags: a=b,c=d", "x-fal-store-io: 0")
    rules = relay.spending
    assert rules is not None
    assert set(rules.plans) == {"pro"}
    assert rules.plans["pro"].max_unfinished == 4
    price = rules.price("fal-ai/flux/dev")
    assert price is not None
    assert price.cost(1_000_000) == 25_000


def test_precedence(path: Path, tmp_path: Path) -> None:
    """An argument wins over a variable, and both over the file; an empty variable unsets what the file sets."""
    other = tmp_path / "prices.toml"
    other.write_text('"**" = 1')
    text = 'port = 1\naddress = "a"\nmax_in_flight = 3\n[prices]\n"**" = 0.5\n'
    variables = {"FAL_PROXY_PORT": "2", "FAL_PROXY_ADDRESS": "", "FAL_PROXY_PRICES": str(other)}
    settings = parsed(path, text, "--port=3", **variables)
    assert settings.relay is not None
    assert (settings.port, settings.address, settings.relay.max_in_flight) == (3, "127.0.0.1", 3)
    assert settings.relay.prices == str(other)
    assert parsed(path, text, FAL_PROXY_PORT="2").port == 2
    path.write_text("port = 4")
    assert parse_settings([], WITH_KEY | {"FAL_PROXY_CONFIG": str(path)}).port == 4


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("\nmax_in_fligth = 5", ["{path} line 2: max_in_fligth: is no option; did you mean max_in_flight?"]),
        ("max-in-flight = 5", ["{path} line 1: max-in-flight: is no option; did you mean max_in_flight?"]),
        ("FAL_PROXY_PORT = 5", ["{path} line 1: FAL_PROXY_PORT: is no option; did you mean port?"]),
        ("[plan.pro]", ["{path} line 1: plan: is no option; did you mean plans?"]),
        ("[deeply.nested]", ["{path} line 1: deeply: is no option; --help lists them"]),
        ('config = "x"', ["{path} line 1: config: is no option"]),
        ("max_in_flight = 0", ["{path} line 1: max_in_flight: must be a whole number from 1 to 2147483647, not 0"]),
        ('# a\n\nport = "x"', ["{path} line 3: port: must be a number from 0 to 65535, not 'x'"]),
        ("port = 1979-05-27", ["{path} line 1: port: must be a text, a number, true, false, or a list of texts"]),
        ("allowed_endpoints = [[1]]", ["{path} line 1: allowed_endpoints: must be a list of texts"]),
        ("port = {}", ["{path} line 1: port: must be a text, a number, true, false, or a list of texts"]),
        ("[plans.pro]\njobs = 1", ["{path} line 1: plans: pro: has no option 'jobs', only jobs_per_user, "]),
        ('[prices]\n"a" = 1', ["{path} line 1: prices: 'a' has too few segments"]),
        ('budget = "1/day"', ["{path} line 1: budget: a budget needs prices"]),
        ('port = -1\nroute = "x"', ["{path} line 1: port: must be", "{path} line 2: route: must be a path"]),
        ("port = ", ["--config: {path} is no TOML: Invalid value (at "]),
        ("port = 1\nport = 2", ["--config: {path} is no TOML: "]),
        ("[" * 3000, ["--config: {path} is no TOML: "]),
        ("#" * (MAX_BYTES + 1), ["--config: {path} is longer than 1048576 bytes"]),
    ],
)
def test_problems(path: Path, text: str, problems: list[str]) -> None:
    """Each problem names the file, the line and the key, and says what is meant or allowed."""
    with pytest.raises(ConfigError) as caught:
        parsed(path, text)
    assert len(caught.value.problems) == len(problems)
    for found, problem in zip(caught.value.problems, problems, strict=True):
        assert found.startswith(problem.format(path=path)), found


@pytest.mark.parametrize("name", ["key", "fal_key", "FAL_KEY", "fal_key_secret", "token", "credentials"])
def test_no_key(path: Path, name: str) -> None:
    """The key belongs elsewhere, and is not repeated."""
    with pytest.raises(ConfigError) as caught:
        parsed(path, f'{name} = "very-secret"')
    assert "FAL_KEY_FILE" in str(caught.value)
    assert "very-secret" not in str(caught.value)


def test_password_of_the_store_is_not_shown(path: Path) -> None:
    """A wrong name of a store may have a password, wherever it was written."""
    with pytest.raises(ConfigError, match=r"line 1: store: must be ") as caught:
        parsed(path, 'store = "redsi://:very-secret@host"')
    assert "very-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: None, "cannot read {path}: No such file or directory"),
        (lambda path: path.mkdir(), "cannot read {path}: it is no regular file"),
        (lambda path: os.mkfifo(path), "cannot read {path}: it is no regular file"),
        (lambda path: path.write_bytes(b"a = 1 # \xff"), "{path} is not UTF-8, at byte 8"),
    ],
)
def test_unreadable(path: Path, make: Any, problem: str) -> None:
    """A file that cannot be read is named, and nothing hangs."""
    make(path)
    with pytest.raises(ConfigError) as caught:
        parse_settings([f"--config={path}"], WITH_KEY)
    assert str(caught.value) == "--config: " + problem.format(path=path)


def test_places() -> None:
    """A problem names what was written: the argument, or the variable."""
    with pytest.raises(ConfigError) as caught:
        parse_settings(["--port=x"], WITH_KEY | {"FAL_PROXY_ROUTE": "y", "FAL_PROXY_MAX_IN_FLIGHT": "z"})
    places = [problem.partition(":")[0] for problem in caught.value.problems]
    assert places == ["--port", "FAL_PROXY_ROUTE", "FAL_PROXY_MAX_IN_FLIGHT"]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--store=memory", "--processes=2"], "--store: memory counts in one process alone"),
        (["--user-header=X-User"], "--user-header: needs --trusted-proxies"),
        (["--user-header=X-User", "--trusted-proxies=unix", "--identify=os.path:join"], "--user-header: cannot stand"),
        *(
            ([f"--user-header={name}", "--trusted-proxies=unix"], "--user-header: must be the name of a header")
            for name in ("a b", "x-fal-tags", "X-Forwarded-For", "host", "x:y")
        ),
    ],
)
def test_together(argv: list[str], problem: str) -> None:
    """Options that cannot work together are refused."""
    with pytest.raises(ConfigError) as caught:
        parse_settings(argv, WITH_KEY)
    [found] = caught.value.problems
    assert found.startswith(problem)
