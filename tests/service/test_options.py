"""Each option, its variable, its help, and the line that lists what is open."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import Authority
from tests.support.proxy import SECRET
from tests.support.service_process import WITH_KEY, shell
from tornado_fal_proxy import ConfigError, ProxyConfig, __version__
from tornado_fal_proxy.rules.trusted_proxies import TrustedProxies
from tornado_fal_proxy.service.arguments import COMMANDS, GROUPS, make_parser
from tornado_fal_proxy.service.describe import describe, is_open_to_all
from tornado_fal_proxy.service.options import parse_settings

# Each option that takes a value: two texts, and the value of the first.
OPTIONS: dict[str, tuple[str, str, Any]] = {
    "address": ("::1", "0.0.0.0", "::1"),
    "port": ("0", "9000", 0),
    "route": ("/a", "/b", "/a"),
    "connect_timeout_s": ("1.5", "2", 1.5),
    "idle_timeout_s": ("60", "61", 60.0),
    "max_body_bytes": ("1024", "2", 1024),
    "max_in_flight": ("5", "6", 5),
    "response_buffer_bytes": ("7", "8", 7),
    "max_buffered_bytes": ("2000000", "3000000", 2_000_000),
    "set_fal_headers": ("x-fal-a: b", "x-fal-b: c", ("x-fal-a: b",)),
    "withhold_headers": ("alt-svc", "x-a", ("alt-svc",)),
    "ca_certs": ("{ca}", "", "{ca}"),
    "connect_to": ("localhost:1", "localhost:2", "localhost:1"),
    "allowed_endpoints": ("fal-ai/flux/**,a/b", "**", ("fal-ai/flux/**", "a/b")),
    "max_token_expiration_s": ("60", "61", 60),
    "allowed_hosts": ("fal.run", "*.fal.run", ("fal.run",)),
    "allowed_webhooks": ("none", "https://a.example", ()),
    "allowed_fal_headers": ("x-fal-*", "x-fal-a", ("x-fal-*",)),
    "authorize": ("os.path:exists", "os.path:isfile", os.path.exists),
    "resolve_key": ("os.path:join", "os.path:isfile", os.path.join),
    "allowed_origins": ("https://a.example", "https://b.example", ("https://a.example",)),
    "expose_headers": ("x-a", "x-b", ("x-a",)),
    "identify": ("os.path:exists", "os.path:isfile", os.path.exists),
    "jobs_per_user": ("5/minute,20/day", "1/hour", "5/minute,20/day"),
    "unfinished_jobs_per_user": ("2", "3", 2),
    "budget_per_user": ("1.00/day", "2/month", "1.00/day"),
    "jobs": ("5/minute,20/day", "1/hour", "5/minute,20/day"),
    "budget": ("1.00/day", "2/month", "1.00/day"),
    "count": ("UNITS", "calls", "units"),
    "prices": ("{prices}", "", "{prices}"),
    "input_units": ("os.path:exists", "os.path:isfile", os.path.exists),
    "check_input": ("os.path:exists", "os.path:isfile", os.path.exists),
    "store": ("memory", "sqlite:spent.db", "memory"),
    "on_store_failure": ("Allow", "refuse", "allow"),
    "job_lifetime_s": ("60", "61", 60),
    "account_days": ("30", "31", 30),
    "processes": ("3", "2", 3),
    "drain_timeout_s": ("0", "1.5", 0.0),
    "worker_timeout_s": ("0", "1.5", 0.0),
    "log_level": ("WARNING", "debug", "warning"),
    "log_format": ("JSON", "text", "json"),
    "trusted_proxies": ("10.0.0.0/8, unix", "::1", TrustedProxies(("10.0.0.0/8", "unix"))),
    "admin_port": ("0", "9000", 0),
    "admin_address": ("::1", "0.0.0.0", "::1"),
    "config": ("{config}", "", "{config}"),
    "env_file": ("{config}", "", "{config}"),
    "user_header": ("X-Forwarded-User", "x-user", "X-Forwarded-User"),
}
SWITCHES = (
    *("event_streams_over_http1", "failover", "allow_uploads", "allow_cancel", "allow_credentials"),
    *("allow_diagnostics", "own_jobs_only", "tag_users"),
)
NO_DEFAULT = (
    "max_buffered_bytes",
    *("ca_certs", "connect_to", "authorize", "resolve_key", "trusted_proxies"),
    *("allowed_endpoints", "allowed_hosts", "allowed_webhooks", "allowed_origins"),
    *("identify", "jobs_per_user", "unfinished_jobs_per_user", "budget_per_user", "jobs", "budget"),
    *("prices", "input_units", "check_input", "store", "config", "env_file", "user_header"),
    *("set_fal_headers", "withhold_headers", "allowed_fal_headers", "expose_headers"),
)


def test_the_table_has_every_option() -> None:
    """The table above has every option, so the tests below cover a new one."""
    actions = {action.dest for action in make_parser()._actions}
    assert actions - {"help", "help_all", "version", "sandbox", *SWITCHES} == set(OPTIONS)
    relayed = {field.name for field in dataclasses.fields(ProxyConfig)} - {"key", "plans", *SWITCHES}
    assert relayed < set(OPTIONS)


def test_help_fits_on_a_screen() -> None:
    """``--help`` has every option and command by their groups, in 40 lines of 100 characters at most."""
    ended = shell("", "--help", COLUMNS="20")
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    names = ["--" + name.replace("_", "-") for name in [*OPTIONS, *SWITCHES, "sandbox"]]
    assert sorted(word for line in lines if line.startswith("  ") for word in line.split()) == sorted(names)
    for text in (*GROUPS, *COMMANDS, "FAL_KEY", "--help=access", "--help-all", "--max-in-flight as FAL_PROXY_MAX_IN_"):
        assert text in ended.stdout
    assert shell("", "-h").stdout == ended.stdout


def test_help_of_a_group() -> None:
    """``--help=GROUP`` explains the options of that group and no other."""
    ended = shell("", "--help=processes", COLUMNS="200")
    assert (ended.returncode, ended.stderr) == (0, "")
    options = re.findall(r"^  (--[a-z-]+)", ended.stdout, re.MULTILINE)
    assert options == ["--help-all", "--version", "--processes", "--drain-timeout-s", "--worker-timeout-s"]


def test_help_explains_every_option() -> None:
    """``--help-all`` has options in groups with unit or form and default, and tells of the key and the variables."""
    ended = shell("", "--help-all", COLUMNS="200")
    assert (ended.returncode, ended.stderr) == (0, "")
    text = ended.stdout.replace("\n" + 24 * " ", " ")  # text that argparse put on a line of its own
    assert [line for line in text.splitlines() if line.endswith(":")] == ["options:", *(f"{name}:" for name in GROUPS)]
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


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_also_a_variable_and_wins_over_it(authority: Authority, tmp_path: Path, name: str) -> None:
    """--max-in-flight 5, --max-in-flight=5 and FAL_PROXY_MAX_IN_FLIGHT=5 are the same; the option wins."""
    prices = tmp_path / "prices.toml"
    prices.write_text('"**" = 1\n')
    file = tmp_path / "options.toml"
    file.write_text("")
    files = {"{ca}": authority.ca_file, "{prices}": str(prices), "{config}": str(file)}
    text, other, value = (files.get(item, item) if isinstance(item, str) else item for item in OPTIONS[name])
    needed = {"FAL_PROXY_PRICES": str(prices)} if name.startswith("budget") else {}
    if name == "user_header":
        needed = {"FAL_PROXY_TRUSTED_PROXIES": "unix"}
    option, variable = "--" + name.replace("_", "-"), "FAL_PROXY_" + name.upper()

    def parsed(argv: list[str], environ: dict[str, str]) -> Any:
        settings = parse_settings(argv, WITH_KEY | needed | environ)
        assert settings.relay is not None
        return getattr(settings, name, None) if hasattr(settings, name) else getattr(settings.relay, name)

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
    """The sandbox is an option without value, or a variable that means yes or no. It needs no key, and uses none."""
    assert parse_settings(["--sandbox"], {}).sandbox
    settings = parse_settings([], WITH_KEY | {"FAL_PROXY_SANDBOX": text})
    assert settings.sandbox is on
    assert (settings.relay is None) is on


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
        assert getattr(settings.relay, name) is on


def test_with_resolve_key_no_key_is_needed() -> None:
    """Each call has a key of its own then, and a key that is given all the same is checked."""
    settings = parse_settings(["--resolve-key=os.path:join"], {})
    assert settings.relay is not None
    assert settings.relay.resolve_key is os.path.join
    with pytest.raises(ConfigError, match="FAL_KEY: must be"):
        parse_settings(["--resolve-key=os.path:join"], {"FAL_KEY": "a b"})


# Options, and what the lines of the start say: the clients, what they may do, and the limits. The first leave the key
# to everyone.
HERE, ADVICE = (
    "anyone on this machine",
    " (restrict it with --allowed-endpoints or --authorize, see docs/secure.md)",
)
IF = "if authorize accepts them,"
AT_ONCE = "20000 calls at once"
NOTHING = f"nothing that users spend (see --jobs-per-user); {AT_ONCE}"
PRICES = "--prices={prices}"
OPEN: list[tuple[list[str], str, str]] = [
    ([], f"{HERE} may call every model and upload files{ADVICE}", NOTHING),
    (
        ["--allow-cancel", "--allowed-hosts=fal.run", "--address=0.0.0.0"],
        f"anyone who can reach this machine may call every model on fal.run, upload files and cancel jobs{ADVICE}",
        NOTHING,
    ),
    (
        ["--allowed-hosts=*.api.fal.ai,api.fal.ai", "--authorize=os.path:exists", "--address=a.example"],
        (
            f"clients who can reach a.example, {IF} may call every model on *.api.fal.ai and api.fal.ai, upload files "
            "and use the key's account on api.fal.ai"
        ),
        NOTHING,
    ),
    (
        ["--allowed-hosts=api.fal.ai", "--allowed-endpoints=a/b", "--address=::1", "--max-in-flight=5"],
        f"{HERE} may call a/b on api.fal.ai",
        "nothing that users spend (see --jobs-per-user); 5 calls at once",
    ),
    (
        ["--allowed-endpoints=fal-ai/flux/**,a/b", "--allow-uploads", "--trusted-proxies=::1", "--processes=3"],
        f"{HERE}, and clients of a proxy in front, may call fal-ai/flux/** and a/b and upload files",
        f"{NOTHING} in each of 3 processes",
    ),
    (
        ["--authorize=os.path:exists", "--allowed-webhooks=none", "--allowed-origins=https://a.example"],
        (
            f"clients on this machine, {IF} also from pages of https://a.example, may call every model, upload files "
            "and have results sent to no webhook"
        ),
        NOTHING,
    ),
    (
        ["--allowed-endpoints=a/b", "--jobs-per-user=5/minute,20/hour", "--unfinished-jobs-per-user=2", "--jobs=9/day"],
        f"{HERE} may call a/b",
        (
            "each user: 5 paid calls a minute, 20 paid calls an hour, 2 unfinished at once; all together: 9 paid calls "
            f"a day; {AT_ONCE}"
        ),
    ),
    (
        [PRICES, "--allowed-endpoints=a/b", "--budget-per-user=0.50/day", "--budget=9/month", "--count=units"],
        f"{HERE} may call a/b",
        f"each user: $0.50 a day; all together: $9.00 a month; {AT_ONCE}",
    ),
    (
        ["--config={plans}", "--allowed-endpoints=a/b"],
        f"{HERE} may call a/b",
        f"users of the plans pro and trial: as the plan says; {AT_ONCE}",
    ),
    (
        ["--own-jobs-only", "--allowed-endpoints=a/b", f"--store=redis://:{SECRET}@h"],
        f"{HERE} may call a/b",
        f"nothing that users spend, which is counted all the same; {AT_ONCE}",
    ),
]


@pytest.mark.parametrize(("argv", "opened", "limited"), OPEN)
def test_what_is_open(tmp_path: Path, argv: list[str], opened: str, limited: str) -> None:
    """The start tells what is open to whom and what is limited, and how to close what lets unknown clients in."""
    (tmp_path / "prices.toml").write_text('"**" = 1\n')
    (tmp_path / "plans.toml").write_text('[plans.pro]\njobs_per_user = "9/day"\n[plans.trial]\n')
    argv = [text.replace("{", f"{tmp_path}/").replace("}", ".toml") for text in argv]
    settings = parse_settings(argv, WITH_KEY)
    assert settings.relay is not None
    lines = describe(settings, [settings.address])
    assert lines.pop("open") == opened
    assert lines.pop("limited") == limited
    assert is_open_to_all(settings.relay) is opened.endswith(ADVICE)
    if "account" not in opened:
        assert lines.pop("closed") == "the key's account; a key should have the scope API all the same, not ADMIN"
    assert not lines
    assert SECRET not in opened + limited
    assert describe(parse_settings(["--sandbox"], {}), ["::1"]) == {}


@pytest.mark.parametrize(
    ("argv", "environ", "warned"),
    [
        ([], {"FAL_KEY": SECRET}, True),
        ([], {"FAL_KEY_FILE": "{dir}/half"}, True),
        ([], WITH_KEY, False),
        ([], {"FAL_KEY_ID": "a", "FAL_KEY_SECRET": SECRET}, False),
        (["--resolve-key=os.path:join"], {}, False),
        (["--sandbox"], {"FAL_KEY": SECRET}, False),
    ],
)
def test_half_a_key(tmp_path: Path, argv: list[str], environ: dict[str, str], warned: bool) -> None:
    """A key without a colon is no error, and the start, ``check`` and a reload warn of it without its text."""
    (tmp_path / "half").write_text(SECRET)
    settings = parse_settings(argv, {name: text.format(dir=tmp_path) for name, text in environ.items()})
    lines = describe(settings, ["::1"])
    assert lines.get("key", "").startswith("FAL_KEY, or the file of FAL_KEY_FILE, has no colon") is warned
    assert SECRET not in str(lines)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--store=sqlite:{dir}/a.db", "--jobs-per-user=5/day"], None),
        (["--store=sqlite:{dir}/no/a.db"], "'{dir}/no' is no folder: "),
        (["--jobs-per-user=5/day"], None),  # the default's folder is made
        (["--store=redis://:{secret}@h", "--jobs-per-user=5/day"], None),
        (["--store=sqlite:{dir}/no/a.db", "--jobs-per-user=5/day"], "'{dir}/no' is no folder: "),
    ],
)
def test_a_store_without_a_folder(tmp_path: Path, argv: list[str], line: str | None) -> None:
    """The start, and ``check``, say that the folder of the store's file is missing, which the first call would find."""
    argv = [text.format(dir=tmp_path, secret=SECRET) for text in argv]
    lines = describe(parse_settings(argv, WITH_KEY), ["::1"])
    if line is None:
        assert "store" not in lines
    else:
        assert lines["store"].startswith(line.format(dir=tmp_path))


def test_check(tmp_path: Path) -> None:
    """``check`` prints what the start would, or what is wrong with it, and neither listens nor makes a file."""
    argv = ("check", "--port=1", "--route=/x", "--admin-port=9464", "--jobs-per-user=5/day", "--address=::")
    ended = shell("", *argv, **WITH_KEY, XDG_STATE_HOME=str(tmp_path / "state"))
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert lines[0] == f"tornado-fal-proxy {__version__} would listen on http://[::]:1/x"
    assert lines[1].startswith("open: anyone who can reach this machine may call every model and upload files (")
    assert [line.partition(": ")[0] for line in lines[1:]] == ["open", "closed", "limited", "admin"]
    assert lines[-1].startswith("admin: http://127.0.0.1:9464 has a status page, /metrics, ")
    assert list(tmp_path.iterdir()) == []
    in_json = shell("", *argv, "--log-format=json", **WITH_KEY)
    entry = json.loads(in_json.stdout)
    assert entry["message"] == lines[0]
    assert [f"{label}: {entry[label]}" for label in ("open", "closed", "limited", "admin")] == lines[1:]


def test_the_settings_show_no_key() -> None:
    """The key is not in their repr."""
    assert SECRET not in repr(parse_settings([], WITH_KEY))


def test_several_problems_are_a_tuple() -> None:
    """A program that handles the error gets each problem by itself."""
    with pytest.raises(ConfigError) as caught:
        parse_settings(["--port=x", "--route=x", "--log-level=x", "--max-in-flight=x"], {})
    names = ["--port: ", "--route: ", "--log-level: ", "no key: ", "--max-in-flight: "]
    assert len(caught.value.problems) == len(names)
    assert all(map(str.startswith, caught.value.problems, names))
