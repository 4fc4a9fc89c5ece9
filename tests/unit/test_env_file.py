"""Variables in a file: which lines are variables, which source wins, and no value in an error."""

from pathlib import Path

import pytest

from tests.support.proxy import KEY, SECRET
from tornado_fal_proxy import ConfigError
from tornado_fal_proxy.service.env_file import environment
from tornado_fal_proxy.service.options import log_format_of, parse_settings
from tornado_fal_proxy.service.settings import Settings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "proxy.env"


def parsed(path: Path, text: str, *argv: str, **environ: str) -> Settings:
    path.write_text(text)
    return parse_settings([f"--env-file={path}", *argv], environ)


def problems_of(path: Path, text: str, *argv: str, **environ: str) -> list[str]:
    """Return the problems of a start with that file, in which the name of the file is FILE."""
    with pytest.raises(ConfigError) as caught:
        parsed(path, text, *argv, **environ)
    assert SECRET not in str(caught.value)
    return [problem.replace(str(path), "FILE") for problem in caught.value.problems]


# Lines, and the value of FAL_PROXY_ROUTE that they give.
LINES = {
    "FAL_PROXY_ROUTE=/a": "/a",
    "FAL_PROXY_ROUTE=/a\r\n": "/a",
    "  FAL_PROXY_ROUTE=/a  ": "/a",
    'FAL_PROXY_ROUTE="/a b"': "/a b",
    "FAL_PROXY_ROUTE='/a \"b'": '/a "b',
    "FAL_PROXY_ROUTE=/a=b#c 'd'": "/a=b#c 'd'",
    "FAL_PROXY_ROUTE=": "",
    'FAL_PROXY_ROUTE=""': "",
    "FAL_PROXY_ROUTE=/a\nFAL_PROXY_ROUTE=/b": "/b",
    "# a comment\n; another\n\n \t\nFAL_PROXY_ROUTE=/a\n": "/a",
    "PATH=/bin\nFAL_OTHER=x\nFAL_PROXY_ROUTE=/a": "/a",
    "\ufeffFAL_PROXY_ROUTE=/a": "/a",
}


@pytest.mark.parametrize(("text", "value"), LINES.items())
def test_lines(path: Path, text: str, value: str) -> None:
    """A line has a variable, whose value may stand in quotes; variables of others do not count."""
    path.write_bytes(text.encode())
    found = environment(str(path), {})
    assert found.variables == {"FAL_PROXY_ROUTE": value}


# Lines that Docker and systemd do not both read, or not in the same way.
WRONG = [
    *("FAL_KEY", f"FAL_KEY {SECRET}", f"FAL_KEY : {SECRET}", f"{KEY}", f"export FAL_KEY={SECRET}", f"FAL-KEY={SECRET}"),
    *(f'FAL_KEY="{SECRET}', f"FAL_KEY='{SECRET}\"", f'FAL_KEY="{SECRET}" x', f'FAL_KEY="{SECRET}\\"" x'),
    *(f'FAL_KEY="a"{SECRET}"', f"FAL_KEY={SECRET}\\", f"FAL_KEY =  {SECRET}", f"1={SECRET}"),
]


@pytest.mark.parametrize("line", WRONG)
def test_a_line_that_is_no_variable(path: Path, line: str) -> None:
    """It ends the start, and the error has its number and nothing of its text."""
    assert problems_of(path, f"\n{line}\nFAL_PROXY_PORT=1\n") == [
        "FILE line 2: must be NAME=value, in one line; quotes only around all of the value"
    ]


def test_problems_name_the_line(path: Path) -> None:
    """An unknown variable, a wrong value and a wrong key file are named by file, line and name."""
    assert problems_of(path, f"FAL_KEY={SECRET}\nFAL_PROXY_PROCESS={SECRET}\nFAL_PROXY_ENV_FILE={SECRET}") == [
        "FILE line 2: unknown variable FAL_PROXY_PROCESS, did you mean FAL_PROXY_PROCESSES?",
        "FILE line 3: FAL_PROXY_ENV_FILE cannot stand in such a file",
    ]
    text = f'FAL_KEY="{KEY} {KEY}"\nFAL_PROXY_PORT=x\nFAL_PROXY_MAX_IN_FLIGHT=y\n'
    assert [problem.partition(": must")[0] for problem in problems_of(path, text)] == [
        "FILE line 2: FAL_PROXY_PORT",
        "FILE line 1: FAL_KEY",
        "FILE line 3: FAL_PROXY_MAX_IN_FLIGHT",
    ]
    (problem,) = problems_of(path, "FAL_KEY_FILE=/none/key\n")
    assert problem == "FILE line 1: FAL_KEY_FILE: cannot read '/none/key': No such file or directory"


NO_KEY = "no key: set FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, or FAL_KEY_FILE (or try --sandbox)"
# Names in the file, and the name that was meant; None where no hint is given.
MEANT = {
    "FALKEY": "FAL_KEY",
    "FAL_API_KEY": "FAL_KEY",
    "FAL_KEYS": "FAL_KEY",
    "FAL_KYE": "FAL_KEY",
    "FAL_AI_API_KEY": "FAL_KEY",
    "FAL_TOKEN": "FAL_KEY",
    "fal_key": "FAL_KEY",
    "VITE_FAL_KEY": "FAL_KEY",
    "NEXT_PUBLIC_FAL_KEY": "FAL_KEY",
    "FAL_KEYFILE": "FAL_KEY_FILE",
    "FAL_KEY_SECRETS": "FAL_KEY_SECRET",
    "OPENAI_API_KEY": None,
    "FALCON_API_KEY": None,
    "KEY": None,
    "FAL_OTHER": None,
}


@pytest.mark.parametrize(("name", "meant"), MEANT.items())
def test_a_key_under_another_name(path: Path, name: str, meant: str | None) -> None:
    """Where no key is set the error has the name that was seen in the file or in the environment, and no value."""
    (problem,) = problems_of(path, f"# a key\n{name}={SECRET}\n")
    assert problem == NO_KEY + (f"; FILE line 2 has {name}, did you mean {meant}?" if meant else "")
    (problem,) = problems_of(path, "", **{name: SECRET})
    assert problem == NO_KEY + (f"; the environment has {name}, did you mean {meant}?" if meant else "")
    assert parsed(path, f"{name}={SECRET}\nFAL_KEY={KEY}\n").relay is not None


@pytest.mark.parametrize(
    ("text", "environ", "key"),
    [
        ("FAL_KEY=a:b", {}, "a:b"),
        ("FAL_KEY=a:b", {"FAL_KEY": ""}, "a:b"),
        ("FAL_KEY=a:b", {"FAL_KEY": "c:d"}, "c:d"),
        ("FAL_KEY_ID=a\nFAL_KEY_SECRET=b", {}, "a:b"),
        ("FAL_KEY_ID=a\nFAL_KEY_SECRET=b\nFAL_KEY_FILE=/none", {"FAL_KEY": "c:d"}, "c:d"),
    ],
)
def test_the_environment_wins(path: Path, text: str, environ: dict[str, str], key: str) -> None:
    """A key of the environment wins over every key of the file."""
    relay = parsed(path, text, **environ).relay
    assert relay is not None
    assert relay.key == key


def test_precedence(path: Path, tmp_path: Path) -> None:
    """An argument wins over a variable, a variable over the file of variables, and that over the file of options."""
    options = tmp_path / "options.toml"
    options.write_text("port = 1\n")
    text = f"FAL_KEY=a\nFAL_PROXY_CONFIG={options}\n"
    assert parsed(path, text).port == 1
    text += "FAL_PROXY_PORT=2\n"
    assert parsed(path, text).port == 2
    assert parsed(path, text, FAL_PROXY_PORT="").port == 2
    assert parsed(path, text, FAL_PROXY_PORT="3").port == 3
    assert parsed(path, text, "--port=4", FAL_PROXY_PORT="3").port == 4
    path.write_text("FAL_KEY=a\nFAL_PROXY_LOG_FORMAT=JSON\n")
    assert log_format_of([], {"FAL_PROXY_ENV_FILE": str(path)}) == "json"
    assert parse_settings(["--env-file="], {"FAL_KEY": "a", "FAL_PROXY_ENV_FILE": "/none"}).port == 8080
