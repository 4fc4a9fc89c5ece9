"""Options in a TOML file: what each value means, which source wins, and the line that names what is wrong."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.proxy import KEY
from tests.support.service_process import WITH_KEY
from tornado_fal_proxy import ConfigError
from tornado_fal_proxy.config import ENV_PREFIX
from tornado_fal_proxy.option_fields import LIST, NUMBER, SWITCH, TEXT
from tornado_fal_proxy.service.config_file import MAX_BYTES
from tornado_fal_proxy.service.options import log_format_of, parse_settings
from tornado_fal_proxy.service.settings import Settings, all_options


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "options.toml"


def parsed(path: Path, text: str, *argv: str, **environ: str) -> Settings:
    path.write_text(text)
    return parse_settings([f"--config={path}", *argv], WITH_KEY | environ)


def problems_of(path: Path, text: str, *argv: str, **environ: str) -> list[str]:
    """Return the problems of a start with that file, in which the name of the file is FILE."""
    with pytest.raises(ConfigError) as caught:
        parsed(path, text, *argv, **environ)
    return [problem.replace(str(path), "FILE") for problem in caught.value.problems]


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


# The form of each option that is no text.
FORMS = {
    NUMBER: (
        *("port", "processes", "drain_timeout_s", "worker_timeout_s", "admin_port", "connect_timeout_s"),
        *("idle_timeout_s", "max_body_bytes", "max_in_flight", "response_buffer_bytes", "max_buffered_bytes"),
        *("max_token_expiration_s", "unfinished_jobs_per_user", "job_lifetime_s", "account_days"),
    ),
    SWITCH: (
        *("sandbox", "event_streams_over_http1", "failover", "allow_uploads", "allow_cancel", "allow_credentials"),
        *("allow_diagnostics", "own_jobs_only", "tag_users"),
    ),
    LIST: (
        *("trusted_proxies", "allowed_endpoints", "allowed_hosts", "allowed_webhooks", "allowed_origins"),
        *("set_fal_headers", "withhold_headers", "allowed_fal_headers", "expose_headers"),
    ),
}


def test_forms() -> None:
    """Each option has the form that its values have in TOML."""
    for entry in all_options():
        (form,) = [form for form, names in FORMS.items() if entry.name in names] or [TEXT]
        assert entry.metadata["form"] == form, entry.name


@pytest.mark.parametrize(
    ("argv", "variable", "port"),
    [
        (["--port=3"], "2", 3),
        (["--port=3"], "", 3),
        ([], "2", 2),
        ([], "", 1),  # an empty variable is none, and lifts nothing that the file has
        ([], None, 1),
        (["--port="], "2", 8080),  # an empty argument is the default
        (["--port="], None, 8080),
    ],
)
def test_precedence(path: Path, argv: list[str], variable: str | None, port: int) -> None:
    """An argument wins over a variable, and both over the file."""
    assert parsed(path, "port = 1", *argv, **({} if variable is None else {"FAL_PROXY_PORT": variable})).port == port


@pytest.mark.parametrize(
    ("argv", "environ", "cost"),
    [
        ([], {}, 500_000),
        ([], {"FAL_PROXY_PRICES": ""}, 500_000),
        ([], {"FAL_PROXY_PRICES": "{prices}"}, 1_000_000),
        (["--prices={prices}"], {}, 1_000_000),
        (["--prices="], {"FAL_PROXY_PRICES": "{prices}"}, None),
    ],
)
def test_precedence_of_prices(
    path: Path, tmp_path: Path, argv: list[str], environ: dict[str, str], cost: int | None
) -> None:
    """A file of prices that an argument or a variable names is in the place of the table [prices]."""
    other = tmp_path / "prices.toml"
    other.write_text('"**" = 1')
    argv = [text.replace("{prices}", str(other)) for text in argv]
    environ = {name: text.replace("{prices}", str(other)) for name, text in environ.items()}
    relay = parsed(path, 'jobs = "1/day"\n[prices]\n"**" = 0.5\n', *argv, **environ).relay
    assert relay is not None
    assert relay.spending is not None
    price = relay.spending.price("a/b")
    assert (None if price is None else price.cost(1_000_000)) == cost


def test_variable_names_the_file(path: Path, tmp_path: Path) -> None:
    """FAL_PROXY_CONFIG is the same as --config, which wins. An empty one names none."""
    path.write_text("port = 4")
    environ = WITH_KEY | {"FAL_PROXY_CONFIG": str(path)}
    assert parse_settings([], environ).port == 4
    other = tmp_path / "other.toml"
    other.write_text("\ufeffport = 5\r\n")
    assert parse_settings([f"--config={other}"], environ).port == 5
    assert parse_settings(["--config="], environ).port == 8080
    assert parse_settings([], WITH_KEY | {"FAL_PROXY_CONFIG": ""}).port == 8080


def test_sandbox_has_limits(path: Path) -> None:
    """All options of spending can be tried in the sandbox, which needs no key."""
    path.write_text("sandbox = true\n" + WHOLE)
    settings = parse_settings([f"--config={path}"], {})
    assert (settings.sandbox, settings.relay) == (True, None)
    assert settings.texts["jobs_per_user"] == "5/minute,20/day"
    assert set(settings.more) == {"plans", "prices"}


# A file, and the problems of the start.
PROBLEMS = [
    # Names.
    ("\nmax_in_fligth = 5", ["FILE line 2: max_in_fligth: unknown, did you mean max_in_flight?"]),
    ("max-in-flight = 5", ["FILE line 1: max-in-flight: unknown, did you mean max_in_flight?"]),
    ("FAL_PROXY_PORT = 5", ["FILE line 1: FAL_PROXY_PORT: unknown, did you mean port?"]),
    ("[plan.pro]", ["FILE line 1: plan: unknown, did you mean plans?"]),
    ("[price]", ["FILE line 1: price: unknown, did you mean prices?"]),
    ("key_file = '/x'", ["FILE line 1: key_file: unknown, did you mean fal_key_file?"]),
    ("[deeply.nested]", ["FILE line 1: deeply: unknown; --help lists the options"]),
    ('config = "x"', ["FILE line 1: config: unknown; --help lists the options"]),
    ('"a b\\n?" = 1', ['FILE: "a b\\n...": unknown; --help lists the options']),
    # Types.
    ("max_in_flight = '5'", ["FILE line 1: max_in_flight: must be a number, not a text"]),
    ("max_in_flight = true", ["FILE line 1: max_in_flight: must be a number, not true or false"]),
    ("port = 1979-05-27", ["FILE line 1: port: must be a number, not a date"]),
    ("port = {}", ["FILE line 1: port: must be a number, not a table"]),
    ("[port]\na = 1", ["FILE line 1: port: must be a number, not a table"]),
    ("allow_uploads = 'yes'", ["FILE line 1: allow_uploads: must be true or false, not a text"]),
    ("allow_uploads = 1", ["FILE line 1: allow_uploads: must be true or false, not a number"]),
    ("jobs_per_user = 5", ["FILE line 1: jobs_per_user: must be a text in quotes, not a number"]),
    ("jobs_per_user = ['5/day']", ["FILE line 1: jobs_per_user: must be a text in quotes, not a list"]),
    ("jobs_per_user = ' '", ["FILE line 1: jobs_per_user: must not be empty; leave it out to have none"]),
    (
        "allowed_endpoints = 'a/b'",
        ['FILE line 1: allowed_endpoints: must be a list of texts, such as ["a", "b"], not a text'],
    ),
    *(
        (
            f"allowed_endpoints = {value}",
            ['FILE line 1: allowed_endpoints: must be a list of texts, such as ["a", "b"], not a list of others, or'],
        )
        for value in ("[['a/b']]", "[1]", "['a/b', '']")
    ),
    ("plans = 1", ["FILE line 1: plans: must be tables such as [plans.free], not a number"]),
    ("[plans]\nfree = 1", ["FILE line 1: plans: free must be a table such as [plans.free]"]),
    ("prices = 1", ["FILE line 1: prices: must be a text in quotes, not a number"]),
    # Values.
    ("max_in_flight = 0", ["FILE line 1: max_in_flight: must be a whole number from 1 to 2147483647, not 0"]),
    ("max_in_flight = 1.5", ["FILE line 1: max_in_flight: must be a whole number from 1 to 2147483647, not '1.5'"]),
    ("idle_timeout_s = nan", ["FILE line 1: idle_timeout_s: must be a number of seconds from 0.001 to 86400, not nan"]),
    ("# a\n\nport = 70_000", ["FILE line 3: port: must be a number from 0 to 65535, not '70000'"]),
    ("allowed_endpoints = []", ["FILE line 1: allowed_endpoints: must be a list of patterns"]),
    ("allowed_endpoints = [\n  'a',\n]", ["FILE line 1: allowed_endpoints: 'a' has too few segments"]),
    ('jobs_per_user = "5/week"', ["FILE line 1: jobs_per_user: must be a number of jobs and a period, such as"]),
    ('budget = "1/day"', ["FILE line 1: budget: a budget needs prices (--prices=FILE, or [prices] in the file of"]),
    ("port = -1\nroute = 'x'", ["FILE line 1: port: must be", "FILE line 2: route: must be a path"]),
    ("prot = 1\nroute = 'x'", ["FILE line 1: prot: unknown, did you mean port?", "FILE line 2: route: must be a path"]),
    ("user_header = 'x-user'", ["FILE line 1: user_header: needs --trusted-proxies"]),
    # Tables.
    ("[plans.pro]\n\njobs_per_usr = 1", ["FILE line 3: plans.pro.jobs_per_usr: unknown, did you mean jobs_per_user?"]),
    ("[plans.pro]\nwhat = 1", ["FILE line 2: plans.pro.what: unknown, a plan has only jobs_per_user, "]),
    ("[plans.pro]\njobs_per_user = 5", ["FILE line 2: plans.pro.jobs_per_user: must be a number of jobs and a"]),
    ("[ plans . 'a b' ] # c\njobs_per_user = 5", ['FILE line 2: plans."a b".jobs_per_user: must be a number of']),
    ("plans.pro.unfinished_jobs_per_user = 0", ["FILE line 1: plans.pro.unfinished_jobs_per_user: must be a whole"]),
    ("[plans]\na = {jobs_per_user = 'x'}", ["FILE: plans.a.jobs_per_user: must be a number of jobs and a period"]),
    ("[plans.a]\n[plans.b]\nallowed_endpoints = ['c']", ["FILE line 3: plans.b.allowed_endpoints: 'c' has too few"]),
    ('[prices]\n"a/b" = 1\n"a" = 1', ["FILE line 3: prices.a: 'a' has too few segments"]),
    ('[prices]\n"a/b" = {prize = 1}', ["FILE line 2: prices.\"a/b\": 'a/b' must be a price in dollars, or "]),
    ("[prices]", ["FILE line 1: prices: names no endpoint"]),
    # No TOML.
    ("port = ", ["--config: 'FILE' is no TOML: Invalid value (at "]),
    ("port: 1", ["--config: 'FILE' is no TOML: Expected '=' after a key"]),
    ("port = 1\nport = 2", ["--config: 'FILE' is no TOML: "]),
    ("prices = 'x'\n[prices]", ["--config: 'FILE' is no TOML: "]),
    ("port = " + "1" * 5000, ["--config: 'FILE' is no TOML: "]),
    ("[" * 3000, ["--config: 'FILE' is no TOML: "]),
    ("#" * (MAX_BYTES + 1), ["--config: 'FILE' is longer than 1048576 bytes"]),
]


@pytest.mark.parametrize(("text", "problems"), PROBLEMS, ids=[text[:40] for text, _ in PROBLEMS])
def test_problems(path: Path, text: str, problems: list[str]) -> None:
    """Each problem names the file, the line and the key, and says what is meant or allowed."""
    found = problems_of(path, text)
    assert len(found) == len(problems)
    for one, beginning in zip(found, problems, strict=True):
        assert one.startswith(beginning), one


@pytest.mark.parametrize(
    "name", ["key", "fal_key", "FAL_KEY", "fal_key_id", "FAL_KEY_SECRET", "api_key", "token", "credentials"]
)
def test_no_key(path: Path, name: str) -> None:
    """The key belongs elsewhere, and is not repeated."""
    (problem,) = problems_of(path, f'{name} = "very-secret"')
    assert problem.startswith(f"FILE line 1: {name}: the key for fal must not stand in this file: set FAL_KEY, or ")
    assert "very-secret" not in problem


def test_key_file(path: Path, tmp_path: Path) -> None:
    """The file may name the file that has the key. A key in the environment wins."""
    secret = tmp_path / "key"
    secret.write_text("of:file\n")
    path.write_text(f"fal_key_file = '{secret}'")
    for environ, key in (
        ({}, "of:file"),
        ({"FAL_KEY": "", "FAL_KEY_FILE": ""}, "of:file"),
        (WITH_KEY, KEY),
        ({"FAL_KEY_ID": "a", "FAL_KEY_SECRET": "b"}, "a:b"),
    ):
        relay = parse_settings([f"--config={path}"], environ).relay
        assert relay is not None
        assert relay.key == key
    secret.write_text("very secret")
    assert problems_of(path, f"\nfal_key_file = '{secret}'", FAL_KEY="") == [
        f"FILE line 2: fal_key_file: '{secret}' holds no key"
    ]
    assert problems_of(path, "fal_key_file = ''", FAL_KEY="")[0].startswith("FILE line 1: fal_key_file: must not be ")


def test_a_key_instead_of_the_file_is_not_shown(path: Path) -> None:
    """A problem of a file that has no TOML does not show its contents: the path may be that of the key."""
    (problem,) = problems_of(path, KEY)
    assert problem.startswith("--config: 'FILE' is no TOML: ")
    assert KEY not in problem


@pytest.mark.parametrize("text", ["redsi://:very-secret@host", "redis://:very-secret@", "redis://:very-secret@h/x?a=b"])
def test_password_of_the_store_is_not_shown(path: Path, text: str) -> None:
    """The name of a store is checked as a whole at the start, and may have a password."""
    (problem,) = problems_of(path, f'store = "{text}"')
    assert problem.startswith("FILE line 1: store: must be sqlite:PATH, redis://")
    assert "very-secret" not in problem


UNREADABLE: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: None, "cannot read 'FILE': No such file or directory"),
    (lambda path: path.mkdir(), "cannot read 'FILE': Is a directory"),
    (os.mkfifo, "cannot read 'FILE': it is no regular file"),
    (lambda path: path.symlink_to("/dev/zero"), "cannot read 'FILE': it is no regular file"),
    (lambda path: path.symlink_to(path), "cannot read 'FILE': Too many levels of symbolic links"),
    (lambda path: path.write_bytes(b"a = 1\n# \xff"), "'FILE' is not UTF-8 in line 2"),
]


def test_a_key_instead_of_a_name_is_not_shown() -> None:
    """A key that is set where the name of its file belongs is in no problem."""
    for argv, environ in (
        ([f"--config={KEY}"], WITH_KEY),
        ([], WITH_KEY | {"FAL_PROXY_CONFIG": KEY}),
        ([], {"FAL_KEY_FILE": KEY}),
    ):
        with pytest.raises(ConfigError, match=r"must (be the name of|name) (a|the) file") as caught:
            parse_settings(argv, environ)
        assert KEY.partition(":")[2] not in str(caught.value)


@pytest.mark.parametrize(("make", "problem"), UNREADABLE)
def test_unreadable(path: Path, make: Callable[[Path], object], problem: str) -> None:
    """A file that cannot be read is named, with the option or the variable, and nothing hangs."""
    make(path)
    for argv, variable, place in (([f"--config={path}"], "", "--config"), ([], str(path), "FAL_PROXY_CONFIG")):
        with pytest.raises(ConfigError) as caught:
            parse_settings(argv, WITH_KEY | {"FAL_PROXY_CONFIG": variable})
        assert str(caught.value).replace(str(path), "FILE") == f"{place}: {problem}"


def test_places(path: Path) -> None:
    """A problem names what was written: the argument, the variable, or the file, its line and the key."""
    environ = {"FAL_PROXY_ROUTE": "y", "FAL_PROXY_MAX_IN_FLIGHT": "z"}
    found = problems_of(path, "max_in_flight = 0\nlog_level = 'x'\ncount = 'x'", "--port=x", **environ)
    places = {problem.partition(": must")[0] for problem in found}
    assert places == {
        *("--port", "FAL_PROXY_ROUTE", "FAL_PROXY_MAX_IN_FLIGHT"),
        *("FILE line 2: log_level", "FILE line 3: count"),
    }


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--prot=1"], "--prot (did you mean --port?)"),
        (["--jobs_per_user=5/day"], "--jobs_per_user (did you mean --jobs-per-user?)"),
        (["--job-per-user", "5/day"], "--job-per-user (did you mean --jobs-per-user?), an argument"),
        (["--plans=x", "--zzz"], "--plans, --zzz"),
        ([f"--key={KEY}", KEY], "--key, an argument"),
    ],
)
def test_unknown_options(argv: list[str], names: str) -> None:
    """An unknown option is named with the one that is meant, and never with its value."""
    with pytest.raises(ConfigError) as caught:
        parse_settings(argv, WITH_KEY)
    assert str(caught.value) == f"unknown: {names}; --help shows what there is (the key is read from FAL_KEY)"


@pytest.mark.parametrize(
    ("text", "argv", "variable", "form"),
    [
        ('log_format = "JSON"', [], "", "json"),
        ('log_format = "json"\nprot = 1', [], "", "json"),
        ('log_format = "json"', ["--log-format=text"], "json", "text"),
        ('log_format = "json"', [], "text", "text"),
        ("log_format = ", [], "", ""),
        ("", [], "", ""),
    ],
)
def test_log_format(path: Path, text: str, argv: list[str], variable: str, form: str) -> None:
    """The error of a start is a line of the log too, in the format that the file asks for."""
    path.write_text(text)
    assert log_format_of([f"--config={path}", *argv], {ENV_PREFIX + "LOG_FORMAT": variable}) == form


TRUSTED = "--trusted-proxies=unix"
TOGETHER = [
    (["--store=memory", "--processes=2"], ["--store: memory counts in one process alone"]),
    (["--user-header=X-User"], ["--user-header: needs --trusted-proxies"]),
    (["--user-header=X-User", "--trusted-proxies=none"], ["--user-header: needs --trusted-proxies"]),
    (["--user-header=X-User", "--trusted-proxies=x"], ["--trusted-proxies: 'x' is no address"]),
    (["--user-header=X-User", TRUSTED, "--identify=os.path:join"], ["--user-header: cannot stand beside --identify"]),
    *(
        ([f"--user-header={name}", TRUSTED], ["--user-header: must be the name of a header"])
        for name in (
            *("a b", "x:y", "x\n", "\xe9", "x" * 65, "x-fal-tags", "X-App-Fal-User", "X-Fal-Target-Url"),
            *("X-Forwarded-For", "host", "Authorization", "cookie", "User-Agent"),
        )
    ),
]


@pytest.mark.parametrize(("argv", "problems"), TOGETHER)
def test_together(argv: list[str], problems: list[str]) -> None:
    """Options that cannot stand together are refused. A user's header needs a proxy to trust, and a name of its own."""
    with pytest.raises(ConfigError) as caught:
        parse_settings(argv, WITH_KEY)
    found = caught.value.problems
    assert len(found) == len(problems)
    assert all(map(str.startswith, found, problems)), found
