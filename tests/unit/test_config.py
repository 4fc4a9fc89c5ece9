"""ProxyConfig: the values it refuses, the problems it names, where values come from, and where the key appears."""

import contextlib
import dataclasses
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import Authority
from tests.support.proxy import KEY
from tornado_fal_proxy import ConfigError, ProxyConfig, credentials
from tornado_fal_proxy.config import ENV_PREFIX, relay_options
from tornado_fal_proxy.credentials import key_from_env, key_from_file
from tornado_fal_proxy.errors import KeyMissing
from tornado_fal_proxy.spending.stores import ALLOWED

NAN, INFINITY = float("nan"), float("inf")

SECONDS_GOOD = [0.001, 0.5, 1, 10.0, 86_400]
SECONDS_BAD = [0, -1, -0.0, 0.0004, 86_401, 1e300, NAN, INFINITY, -INFINITY, True, "10", "", None, b"1", 1j, [1]]
COUNT_GOOD = [1, 2, 2**31 - 1]
COUNT_BAD = [0, -1, 2**31, 10**30, 1.0, 1.5, NAN, True, False, "1", "", None, [1]]

SWITCH_BAD = [None, "yes", "", 0, 1, [True]]
LIST_BAD = ["", "fal-ai/flux", b"fal-ai/flux", 1, True, {"fal-ai/flux"}, (1,), [None], ((),), ("",), ["a b"]]
LIMIT_BAD = ["", "5", "5/week", "/day", "x/day", "5/day,6/day", "5/day,", 5, b"5/day", True, ["5/day"]]
FUNCTION_BAD = ["", "os:getcwd", 1, True, ("os", "getcwd")]


def allow(handler: object, target: object) -> bool:
    return True


# A field, the values that it may have, and those that it may not.
FIELDS: dict[str, tuple[list[Any], list[Any]]] = {
    "key": (
        [None, "a", KEY, "!#~"],
        ["", " ", "a b", " a", "a ", "a\n", "a\r\nx: y", "a\0", "a\x7f", "cl\xe9", "\u212aey", b"a", 1, ["a"], True],
    ),
    "connect_timeout_s": (SECONDS_GOOD, SECONDS_BAD),
    "idle_timeout_s": (SECONDS_GOOD, SECONDS_BAD),
    "max_body_bytes": (COUNT_GOOD, COUNT_BAD),
    "max_in_flight": (COUNT_GOOD, COUNT_BAD),
    "response_buffer_bytes": (COUNT_GOOD, COUNT_BAD),
    "max_buffered_bytes": ([None, 1024 * 1024, 2**40], [0, -1, 1024 * 1024 - 1, 2e6, True, "2000000", "", [2**20]]),
    "event_streams_over_http1": ([True, False], SWITCH_BAD),
    "set_fal_headers": (
        [None, (), ("x-fal-store-io: 0", "X-App-Fal-A:b, c")],
        [*LIST_BAD, ("x-fal-a",), ("cookie: a",), ("x-fal-a: 1", "x-fal-a: 2"), ("x-fal-target-url: a",)],
    ),
    "withhold_headers": ([None, (), ("alt-svc", "X-Any")], [*LIST_BAD, ("a b",), ("Content-Type",), ("",)]),
    "failover": ([True, False], SWITCH_BAD),
    "ca_certs": ([None], ["", "no-such-file.pem", "a\0b", "\ud800", ".", b"ca.pem", 1, True, ["ca.pem"]]),
    "connect_to": (
        [None, "localhost:1", "127.0.0.1:65535", "[::1]:443", "a-b.example:8443"],
        [
            *(
                "",
                "localhost",
                ":443",
                "localhost:",
                "localhost:0",
                "localhost:65536",
                "localhost:-1",
                "localhost:http",
            ),
            *(
                "::1:443",
                "[::1]",
                "[::1]:",
                "a b:1",
                "a:1\n",
                "a:1,b",
                "a:1,b:0",
                "a:1,",
                "a:1,b:2",  # needs failover
                "a:1,b:2,c:3",
                "a/b:1",
                "http://a:1",
                "user@a:1",
                "a:\u0661",
            ),
            *(b"a:1", 1, True),
        ],
    ),
    "allowed_endpoints": (
        [None, ("fal-ai/flux/**",), ("a/b", "*/c")],
        [*LIST_BAD, (), ("a/b", "fal-ai"), ("a/{b}",)],
    ),
    "allow_uploads": ([True, False], SWITCH_BAD),
    "max_token_expiration_s": ([1, 300, 86_400], [0, -1, 86_401, 1.0, "1", None, True, NAN, [1]]),
    "allowed_hosts": ([None, ("fal.run",), ("*.fal.run", "rest.fal.ai")], [*LIST_BAD, (), ("evil.com",), ("*",)]),
    "allow_cancel": ([True, False], SWITCH_BAD),
    "allowed_webhooks": (
        [None, (), ("https://hooks.example",), ("https://a.example:8443",)],
        [
            *LIST_BAD,
            ("http://a.example",),
            ("https://*.a.example",),
            ("https://a.example/",),
            ("https://a.example:443",),
        ],
    ),
    "allowed_fal_headers": (
        [None, (), ("*",), ("x-fal-*", "x-app-fal-a")],
        [*LIST_BAD, ("cookie",), ("X-Fal-A",), ("x-fal-",), ("",)],
    ),
    "authorize": ([None, allow, os.getcwd, str], FUNCTION_BAD),
    "resolve_key": ([None, allow, os.getcwd, str], FUNCTION_BAD),
    "allowed_origins": (
        [None, ("https://a.example", "http://localhost:3000", "http://[::1]:3000"), ("https://*.a.example",)],
        [*LIST_BAD, (), ("*",), ("null",), ("https://a.example/",), ("https://*.com",), ("http://*.a.example",)],
    ),
    "expose_headers": ([None, (), ("X-Any",)], [*LIST_BAD, ("a b",), ("",)]),
    "allow_credentials": ([False], SWITCH_BAD),
    "allow_diagnostics": ([True, False], SWITCH_BAD),
    "identify": ([None, allow, os.getcwd, str], FUNCTION_BAD),
    "jobs_per_user": ([None, "5/minute,20/day", "0/month", "1/hour"], LIMIT_BAD),
    "unfinished_jobs_per_user": ([None, 1, 1_000_000], [0, -1, 1_000_001, 1.0, "", "x", True, [1]]),
    "budget_per_user": ([None], [*LIMIT_BAD, "1.0000001/day", "-1/day", ".5/day"]),
    "jobs": ([None, "100/day"], LIMIT_BAD),
    "budget": ([None], LIMIT_BAD),
    "count": (["calls", "units"], ["", "jobs", None, 1, ["calls"]]),
    "prices": (
        [None, (("a/b", 1),), (("a/*", "0.025"), ("**", (("price", 0.07), ("units", 5))))],
        [
            *("no-such-file.toml", "a\0b", 1, b"prices.toml", True, ()),
            *((("a/b", -1),), (("a/b", "x"),), (("a/b", None),), (("a/b", True),), (("a", 1),), ((1, 1),)),
            *((("a/b", (("units", 1),)),), (("a/b", (("price", 1), ("unit", 1))),), (("a/b", float("inf")),)),
        ],
    ),
    "input_units": ([None, allow, os.getcwd, str], FUNCTION_BAD),
    "check_input": ([None, allow, os.getcwd, str], FUNCTION_BAD),
    "plans": (
        [None, (), (("free", ()),), (("free", (("jobs_per_user", "1/day"), ("unfinished_jobs_per_user", "none"))),)],
        [
            *("free", 1, True, (("free", 1),), ((1, ()),), (("", ()),), (("free", (("job", "1/day"),)),)),
            *((("free", (("jobs_per_user", "1/week"),)),), (("free", (("unfinished_jobs_per_user", "x"),)),)),
            (("free", (("allowed_endpoints", "a"),)),),
        ],
    ),
    "store": (
        [None, "memory", "sqlite:/tmp/spent.db", "redis://localhost", "rediss://:secret@localhost/1"],
        ["", "mysql://x", "spent.db", 1, True, ["memory"]],
    ),
    "on_store_failure": (["refuse", "allow"], ["", "ask", None, 1, True, ["allow"]]),
    "own_jobs_only": ([True, False], SWITCH_BAD),
    "tag_users": ([True, False], SWITCH_BAD),
    "job_lifetime_s": ([1, 604_800], [0, -1, 604_801, 1.0, "1", None, True, NAN, [1]]),
    "account_days": ([1, 3660], [0, -1, 3661, 1.0, "1", None, True, NAN, [1]]),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_takes_values_that_can_work(name: str) -> None:
    """A field takes each value that can work, and keeps it unchanged."""
    for value in FIELDS[name][0]:
        config = ProxyConfig(**{name: value})
        assert getattr(config, name) == value


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_refuses_values_that_cannot_work(name: str) -> None:
    """Any other value is one problem, which begins with the field's name and shows the value unless it is the key."""
    for value in FIELDS[name][1]:
        with pytest.raises(ConfigError) as caught:
            ProxyConfig(**{name: value})
        (problem,) = caught.value.problems
        assert problem.startswith(f"{name}: ")
        if name == "store":
            assert problem == f"store: must be {ALLOWED}"
        elif name in ("prices", "plans") and isinstance(value, tuple) and value:
            assert repr(value) in problem or str(value[0][0]) in problem  # the entry that is wrong
        elif name == "key":
            assert problem == "key: must be printable ASCII without spaces, as shown on fal's page of keys"
        else:
            item = value[-1] if isinstance(value, tuple | list) and value else value
            assert repr(value) in problem or repr(item) in problem or repr((item,)) in problem


def test_a_list_may_be_any_sequence_of_texts() -> None:
    """A list becomes a tuple, which makes equal configurations one key, and which nobody can change later."""
    patterns = ["fal-ai/flux/**"]
    config = ProxyConfig(allowed_endpoints=patterns, allowed_webhooks=[], allowed_origins=["https://a.example"])
    patterns.append("**")
    assert config.allowed_endpoints == ("fal-ai/flux/**",)
    assert config.allowed_webhooks == ()
    same = ProxyConfig(
        allowed_endpoints=("fal-ai/flux/**",), allowed_webhooks=(), allowed_origins=("https://a.example",)
    )
    assert {config: 1}[same] == 1


@pytest.mark.parametrize("origins", [None, ("https://*.a.example",), ("https://a.example", "https://*.b.example")])
def test_credentials_need_exact_origins(origins: tuple[str, ...] | None) -> None:
    """Credentials need exact origins, because a page of a forgotten sub-domain could otherwise call as its visitor."""
    with pytest.raises(ConfigError, match=r"\Aallow_credentials: "):
        ProxyConfig(allow_credentials=True, allowed_origins=origins)
    assert ProxyConfig(allow_credentials=True, allowed_origins=("https://a.example",)).cors is not None


@pytest.mark.parametrize("address", ["a:1,b:2", "[::1]:1,[::1]:2"])
def test_a_second_address_needs_failover(address: str) -> None:
    """Without failover nothing connects to the address of the backup domain, and the problem names both options."""
    assert ProxyConfig(connect_to=address, failover=True).connect_to == address
    with pytest.raises(ConfigError) as caught:
        ProxyConfig(connect_to=address)
    assert caught.value.problems == (
        f"connect_to: the second address of '{address}' is for fal's backup domain: set failover too, or leave it out",
    )


def test_without_rules_nothing_is_compiled() -> None:
    """Without rules a call costs no more than to read two attributes that are None."""
    assert (ProxyConfig().access, ProxyConfig().cors) == (None, None)


def test_the_table_covers_all_fields() -> None:
    """A new field needs its good and bad values here."""
    assert list(FIELDS) == [field.name for field in dataclasses.fields(ProxyConfig)]


def test_all_problems_are_named_at_once() -> None:
    """All problems are named in the order of the fields, and the error's text has all of them."""
    with pytest.raises(ConfigError) as caught:
        ProxyConfig(**{name: bad[0] for name, (_, bad) in FIELDS.items()})
    assert [problem.partition(":")[0] for problem in caught.value.problems] == list(FIELDS)
    assert str(caught.value) == "; ".join(caught.value.problems)


def test_a_misspelled_field_is_refused() -> None:
    """A misspelled field is a TypeError, as with any function, and so is a positional value."""
    with pytest.raises(TypeError, match="max_inflight"):
        ProxyConfig(max_inflight=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        ProxyConfig("key")  # type: ignore[call-arg]


def test_a_configuration_is_one_frozen_value() -> None:
    """Equal configurations are one key of a dictionary, and a changed one is another that is checked again."""
    config = ProxyConfig(key=KEY, max_in_flight=7)
    assert {config: 1}[ProxyConfig(key=KEY, max_in_flight=7)] == 1
    assert config != ProxyConfig(key="another", max_in_flight=7)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.key = "another"  # type: ignore[misc]
    with pytest.raises(ConfigError):
        dataclasses.replace(config, max_in_flight=0)


def test_no_text_of_a_configuration_shows_the_key() -> None:
    """The key is in no repr of a configuration and in no error, whether the key is valid or not."""
    assert KEY not in f"{ProxyConfig(key=KEY)!r} {ProxyConfig(key=KEY)!s}"
    for key in (KEY, f"{KEY} \n"):
        with pytest.raises(ConfigError) as caught:
            ProxyConfig(key=key, max_in_flight=0)
        assert KEY not in f"{caught.value!r} {caught.value!s}"


# Files of certificates.


def test_ca_certs_is_a_readable_file_of_certificates(authority: Authority) -> None:
    """The file of certificates may be given as text or as a path."""
    assert ProxyConfig(ca_certs=authority.ca_file).ca_certs == authority.ca_file
    ProxyConfig(ca_certs=Path(authority.ca_file))  # type: ignore[arg-type]


# The content of the file (None: it is a directory), and the problem before and after the file's name.
BAD_FILES = [
    (None, "cannot read", "Is a directory"),
    (b"", "", "holds no PEM certificates"),
    (b"hello\n", "", "holds no PEM certificates"),
    (b"\x00\xff" * 100, "", "holds no PEM certificates"),
    (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "", "holds no PEM certificates"),
]


@pytest.mark.parametrize(("content", "before", "after"), BAD_FILES)
def test_another_file_is_refused_with_its_name(tmp_path: Path, content: bytes | None, before: str, after: str) -> None:
    """A file without certificates is refused, and the problem names the file and what is wrong with it."""
    path = tmp_path / "ca.pem"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        ProxyConfig(ca_certs=str(path))
    (problem,) = caught.value.problems
    assert problem.startswith(f"ca_certs: {before}".rstrip() + f" {str(path)!r}")
    assert problem.endswith(after)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, authority: Authority) -> None:
    """A file that may not be read is refused with the system's reason."""
    path = tmp_path / "ca.pem"
    path.write_bytes(Path(authority.ca_file).read_bytes())
    path.chmod(0)
    if os.access(path, os.R_OK):
        path = tmp_path / "loop.pem"  # root may read everything, but not this
        path.symlink_to(path)
    with pytest.raises(ConfigError, match=r"cannot read .*: (Permission denied|Too many levels of symbolic links)"):
        ProxyConfig(ca_certs=str(path))


def test_the_check_of_certificates_depends_on_them_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, authority: Authority
) -> None:
    """A variable for debugging TLS that names a file which cannot be written does not disturb the check."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "none" / "keys.log"))
    ProxyConfig(ca_certs=authority.ca_file)


# The key.

HALVES = (["FAL_KEY_ID"], ["FAL_KEY_SECRET"])
# The environment, and the key that fal's tools find in it.
ENVIRONMENTS: list[tuple[dict[str, str], str | None]] = [
    ({}, None),
    ({"FAL_KEY": "a:b"}, "a:b"),
    ({"FAL_KEY": ""}, None),
    ({"FAL_KEY": " \n"}, None),
    ({"FAL_KEY": " a:b\r\n"}, "a:b"),
    ({"FAL_KEY_ID": "a", "FAL_KEY_SECRET": "b"}, "a:b"),
    ({"FAL_KEY_ID": " a\n", "FAL_KEY_SECRET": "\tb "}, "a:b"),
    ({"FAL_KEY_ID": "a"}, None),
    ({"FAL_KEY_SECRET": "b"}, None),
    ({"FAL_KEY_ID": "a", "FAL_KEY_SECRET": " "}, None),
    ({"FAL_KEY_ID": "", "FAL_KEY_SECRET": "b"}, None),
    ({"FAL_KEY": "c:d", "FAL_KEY_ID": "a", "FAL_KEY_SECRET": "b"}, "c:d"),
    ({"FAL_KEY": " ", "FAL_KEY_ID": "a", "FAL_KEY_SECRET": "b"}, "a:b"),
    ({"fal_key": "a:b", "FAL_KEYS": "a:b"}, None),
]


@pytest.mark.parametrize(("environ", "key"), ENVIRONMENTS)
def test_the_key_is_found_as_fals_tools_find_it(environ: dict[str, str], key: str | None) -> None:
    """The key is FAL_KEY, else FAL_KEY_ID and FAL_KEY_SECRET together, without white space around them.

    It is read so for each call. A start is stricter, where some are set that could be forgotten (test_environment).
    """
    assert key_from_env(environ) == key
    if len(environ) < 3 and [name for name, text in environ.items() if text.strip()] not in HALVES:
        assert ProxyConfig.from_env(environ).key == key


KEY_FILES: list[tuple[bytes, str | None]] = [
    (b"a:b", "a:b"),
    (b" a:b\r\n", "a:b"),
    (b"", None),
    (b"\n", None),
    (b"a b", None),
    (b"a:b\nc:d\n", None),
    (b"a:\xff", None),
    (b"\0" * 20_000, None),
    (b"a" * 20_000, None),
]


@pytest.mark.parametrize(("content", "key"), KEY_FILES)
def test_the_key_may_be_in_a_file(content: bytes, key: str | None, tmp_path: Path) -> None:
    """FAL_KEY_FILE names a file with the key. No problem shows the file's content."""
    file = tmp_path / "key"
    file.write_bytes(content)
    environ = {"FAL_KEY_FILE": str(file)}
    if key is None:
        with pytest.raises(ConfigError) as caught:
            key_from_file(environ)
        assert caught.value.problems == (f"FAL_KEY_FILE: {str(file)!r} holds no key",)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
    else:
        assert (key_from_file(environ), ProxyConfig.from_env(environ).key) == (key, key)
    assert key_from_file({"FAL_KEY_FILE": ""}) is None


LATE = "its end did not come within 0.3 s"
# A command whose output is the pipe, and the problem behind the pipe's name. None: the key is read.
KEY_PIPES: list[tuple[str, str | None]] = [
    ("printf a:b", None),
    ("printf a; sleep 0.1; echo :b", None),
    ("sleep 0.1; echo a:b", None),
    ("exec >&-; exec sleep 60", LATE),
    ("exec sleep 60", LATE),
    ("printf a:b; exec sleep 60", LATE),
    ("exec cat /dev/zero", "holds no key"),
    ("printf 'a b'", "holds no key"),
]


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("command", "problem"), KEY_PIPES)
def test_the_key_may_come_through_a_pipe(
    command: str, problem: str | None, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key may come from a shell's ``<(command)`` or a FIFO. One that brings no key in time ends the start."""
    if problem == LATE:
        monkeypatch.setattr(credentials, "_KEY_FILE_TIMEOUT_S", 0.3)
    with contextlib.ExitStack() as stack:
        if named:
            path = str(tmp_path / "fifo")
            os.mkfifo(path)
            command = f"exec >{path}; {command}"
        writer = stack.enter_context(subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE))
        stack.callback(writer.kill)
        assert writer.stdout is not None
        environ = {"FAL_KEY_FILE": path if named else f"/dev/fd/{writer.stdout.fileno()}"}
        if problem is None:
            assert key_from_file(environ) == "a:b"
        else:
            with pytest.raises(ConfigError, match=re.escape(problem)):
                key_from_file(environ)


def test_nothing_else_than_a_file_or_a_pipe_holds_up_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO without a writer, a device or a socket as the file of the key is a problem, and so is one of certificates.

    /dev/zero has no end, and fills no memory.
    """
    monkeypatch.setattr(credentials, "_KEY_FILE_TIMEOUT_S", 0.05)
    os.mkfifo(tmp_path / "fifo")
    terminal, other_end = os.openpty()
    with socket.socket(socket.AF_UNIX) as listener, open(terminal, "rb"), open(other_end, "rb"):
        listener.bind(str(tmp_path / "socket"))
        for path, problem in {
            str(tmp_path / "fifo"): "its end did not come within 0.05 s",
            str(tmp_path / "socket"): "No such device or address",
            os.ttyname(other_end): "its end did not come within 0.05 s",
            "/dev/zero": "holds no key",
            "/dev/null": "holds no key",
            str(tmp_path): "Is a directory",
        }.items():
            with pytest.raises(ConfigError, match=problem):
                key_from_file({"FAL_KEY_FILE": path})
            with pytest.raises(ConfigError, match="Is a directory" if path == str(tmp_path) else "is no regular file"):
                ProxyConfig(ca_certs=path)


def test_a_key_in_the_environment_is_read_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """An application may set the key in the environment after the handler was mounted, and may change it."""
    config = ProxyConfig()
    with pytest.raises(KeyMissing) as caught:
        config.authorization()
    assert caught.value.status == 500
    assert "FAL_KEY" in caught.value.detail
    for key in ("a:b", "c:d"):
        monkeypatch.setenv("FAL_KEY", key)
        assert config.authorization() == f"authorization: Key {key}".encode()


def test_a_configured_key_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configured key is used also where the environment's is not a key at all."""
    monkeypatch.setenv("FAL_KEY", "not a key")
    assert ProxyConfig(key=KEY).authorization() == f"authorization: Key {KEY}".encode()


@pytest.mark.parametrize("key", ["a\r\nx-injected: yes", "a b", "cl\xe9", "a\x7fb", "\u212a"])
def test_a_key_that_would_break_the_header_line_is_never_sent(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """A call with a key that would break the header line is answered 500, and the log does not get the key."""
    monkeypatch.setenv("FAL_KEY", key)
    with pytest.raises(KeyMissing) as caught:
        ProxyConfig().authorization()
    assert key not in f"{caught.value.detail} {caught.value.message}"
    with pytest.raises(ConfigError, match=r"\Akey: "):
        ProxyConfig.from_env(os.environ)


# Texts.


def test_each_field_except_the_key_is_an_option() -> None:
    """Each option has a help text, and a unit or form as its metavar. A mapping of plans has no text."""
    options = relay_options()
    assert [option.name for option in options] == [name for name in FIELDS if name not in ("key", "plans")]
    for option in options:
        assert option.metadata["help"]
        assert option.metadata["metavar"].isupper() or option.default is False


def test_from_env_reads_a_variable_for_each_field(authority: Authority, tmp_path: Path) -> None:
    """A variable is named after its field, and its text becomes the field's type. Other variables mean nothing."""
    prices = tmp_path / "prices.toml"
    prices.write_text('"fal-ai/*" = 0.025\n')
    texts = {
        "connect_timeout_s": ("1.5", 1.5),
        "idle_timeout_s": ("60", 60.0),
        "max_body_bytes": ("1024", 1024),
        "max_in_flight": (" 5 ", 5),
        "response_buffer_bytes": ("2048", 2048),
        "max_buffered_bytes": ("2000000", 2_000_000),
        "event_streams_over_http1": ("yes", True),
        "set_fal_headers": ("x-fal-a: 1, x-fal-b: c,d", ("x-fal-a: 1", "x-fal-b: c,d")),
        "withhold_headers": ("alt-svc, x-a", ("alt-svc", "x-a")),
        "failover": ("yes", True),
        "ca_certs": (authority.ca_file, authority.ca_file),
        "connect_to": ("localhost:1", "localhost:1"),
        "allowed_endpoints": ("fal-ai/flux/**, */b", ("fal-ai/flux/**", "*/b")),
        "allow_uploads": ("yes", True),
        "max_token_expiration_s": ("60", 60),
        "allowed_hosts": ("*.fal.run,fal.run", ("*.fal.run", "fal.run")),
        "allow_cancel": ("ON", True),
        "allowed_webhooks": (" None ", ()),
        "allowed_fal_headers": ("x-fal-a,x-fal-b-*", ("x-fal-a", "x-fal-b-*")),
        "authorize": (f"{__name__}:allow", allow),
        "resolve_key": ("os.path:join", os.path.join),
        "allowed_origins": ("https://a.example", ("https://a.example",)),
        "expose_headers": ("x-a, x-b", ("x-a", "x-b")),
        "allow_credentials": ("1", True),
        "allow_diagnostics": ("on", True),
        "identify": (f"{__name__}:allow", allow),
        "jobs_per_user": ("5/minute,20/day", "5/minute,20/day"),
        "unfinished_jobs_per_user": ("2", 2),
        "budget_per_user": ("1.00/day", "1.00/day"),
        "jobs": ("100/day", "100/day"),
        "budget": ("5/month", "5/month"),
        "count": ("Units", "units"),
        "prices": (str(prices), str(prices)),
        "input_units": (f"{__name__}:allow", allow),
        "check_input": (f"{__name__}:allow", allow),
        "store": ("memory", "memory"),
        "on_store_failure": ("allow", "allow"),
        "own_jobs_only": ("yes", True),
        "tag_users": ("yes", True),
        "job_lifetime_s": ("600", 600),
        "account_days": ("30", 30),
    }
    assert list(texts) == [option.name for option in relay_options()]
    environ = {ENV_PREFIX + name.upper(): text for name, (text, _) in texts.items()}
    config = ProxyConfig.from_env({**environ, "FAL_KEY": KEY, "FAL_PROXY_PORT": "x", "FAL_PROX": "1"})
    assert dataclasses.asdict(config) == {"key": KEY, "plans": None} | {
        name: value for name, (_, value) in texts.items()
    }
    for name, (_, value) in texts.items():
        assert type(getattr(config, name)) is type(value)


# Texts that name no function, and the problem.
IMPORTS = [
    ("allow", "must be package.module:function"),
    (":allow", "must be package.module:function"),
    ("os:", "must be package.module:function"),
    ("no.such.module:f", "cannot import 'no.such.module:f': ModuleNotFoundError"),
    (".relative:f", "cannot import '.relative:f': TypeError"),
    ("os:nothing", "cannot import 'os:nothing': AttributeError"),
    ("broken_module:f", "cannot import 'broken_module:f': ZeroDivisionError in '"),
    ("leaving_module:f", "cannot import 'leaving_module:f': SystemExit in '"),
    ("telling_module:f", "cannot import 'telling_module:f': ValueError in '"),
    ("os:sep", "must be a function, not '/'"),
]


@pytest.mark.parametrize(("text", "reason"), IMPORTS)
def test_a_function_that_cannot_be_found_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    """A function that cannot be found is a problem beside all others, whatever its module does on import.

    The text of an exception that the module raises is not shown, because it might hold a key.
    """
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    (tmp_path / "leaving_module.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "telling_module.py").write_text("raise ValueError('very-secret')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        ProxyConfig.from_texts({"authorize": text, "resolve_key": text, "max_in_flight": "0"}, key=None)
    problems = sorted(caught.value.problems)
    assert [problem.partition(":")[0] for problem in problems] == ["authorize", "max_in_flight", "resolve_key"]
    assert problems[0].startswith(f"authorize: {reason}")
    assert problems[2].startswith(f"resolve_key: {reason}")
    assert "very-secret" not in str(problems)


# Texts that name no function, and the end of the problem, in which DIR is the working directory.
NOT_FOUND = [
    (
        "no_module:f",
        "No module named 'no_module' (neither in the working directory 'DIR' nor among the installed packages)",
    ),
    ("here:f", "module 'here' has no attribute 'f' (in 'DIR/here.py')"),
    ("sys:f", "module 'sys' has no attribute 'f'"),
    ("needs:f", "No module named 'no_module'"),
]


@pytest.mark.parametrize(("text", "end"), NOT_FOUND)
def test_where_a_function_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, end: str) -> None:
    """A problem says where a module was looked for, or in which file a function; not for what a found module needs."""
    (tmp_path / "here.py").touch()
    (tmp_path / "needs.py").write_text("import no_module\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        ProxyConfig.from_texts({"authorize": text}, key=None)
    sys.modules.pop("here", None)
    (problem,) = caught.value.problems
    assert problem.partition("Error: ")[2] == end.replace("DIR", str(tmp_path))


def test_a_working_directory_that_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A problem does not name a working directory in which Python looks for no module."""
    (tmp_path / "removed").mkdir()
    for directory in (tmp_path, tmp_path / "removed"):
        monkeypatch.chdir(directory)
        if directory != tmp_path:
            directory.rmdir()
        with pytest.raises(ConfigError) as caught:
            ProxyConfig.from_texts({"authorize": "no_module:f"}, key=None)
        assert str(caught.value).endswith("No module named 'no_module' (not among the installed packages)")


def test_an_empty_text_is_the_default() -> None:
    """An empty text is the default, because a deployment unsets X with FAL_PROXY_X=."""
    names = [option.name for option in relay_options()]
    assert ProxyConfig.from_texts(dict.fromkeys(names, ""), key=None) == ProxyConfig()
    assert ProxyConfig.from_texts(dict.fromkeys(names), key=None) == ProxyConfig()
    assert ProxyConfig.from_texts({}, key=None) == ProxyConfig()
    assert ProxyConfig.from_env({ENV_PREFIX + name.upper(): "" for name in names}) == ProxyConfig()


@pytest.mark.parametrize(
    "text", ["ten", "10s", "1,5", "1 0", "nan", "inf", "-1", "0", " ", "1e999", "9" * 5000, "0x10"]
)
def test_a_text_that_is_no_such_number_is_a_problem_of_its_field(text: str) -> None:
    """All such problems are named at once, and none is an exception of another kind."""
    names = [option.name for option in relay_options() if type(option.default) in (int, float)]
    with pytest.raises(ConfigError) as caught:
        ProxyConfig.from_texts(dict.fromkeys(names, text), key=None)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == names
