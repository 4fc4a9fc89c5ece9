"""The environment: unknown variables, two keys, and no help text that shows any of it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.proxy import KEY
from tests.support.service_process import WITH_KEY, environment
from tests.support.waiting import TIMEOUT_S
from tornado_fal_proxy import ConfigError, ProxyConfig
from tornado_fal_proxy.config import ENV_PREFIX, SERVICE_OPTIONS
from tornado_fal_proxy.service.settings import Settings

# Variables that are none, each with the problem.
UNKNOWN = {
    "FAL_PROXY_ALLOWED_ENDPOINT": "FAL_PROXY_ALLOWED_ENDPOINT, did you mean FAL_PROXY_ALLOWED_ENDPOINTS?",
    "FAL_PROXY_ALOWED_HOSTS": "FAL_PROXY_ALOWED_HOSTS, did you mean FAL_PROXY_ALLOWED_HOSTS?",
    "FAL_PROXY_ENDPOINTS": "FAL_PROXY_ENDPOINTS, did you mean FAL_PROXY_ALLOWED_ENDPOINTS?",
    "FAL_PROXY_AUTHORISE": "FAL_PROXY_AUTHORISE, did you mean FAL_PROXY_AUTHORIZE?",
    "FAL_PROXY_PROCESS": "FAL_PROXY_PROCESS, did you mean FAL_PROXY_PROCESSES?",
    "fal_proxy_allowed_endpoints": "fal_proxy_allowed_endpoints, did you mean FAL_PROXY_ALLOWED_ENDPOINTS?",
    "FALPROXY_ALLOWED_ENDPOINTS": "FALPROXY_ALLOWED_ENDPOINTS, did you mean FAL_PROXY_ALLOWED_ENDPOINTS?",
    "FAL_PROXY_ALLOWED-ENDPOINTS": "FAL_PROXY_ALLOWED-ENDPOINTS, did you mean FAL_PROXY_ALLOWED_ENDPOINTS?",
    "FAL_PROXY_ALLOWED_ENDPOINTS ": "FAL_PROXY_ALLOWED_ENDPOINTS , did you mean FAL_PROXY_ALLOWED_ENDPOINTS?",
    "FAL_PROXY_ALLOWED_ENDPOINTS\n": "FAL_PROXY_ALLOWED_ENDPOINTS\\n, did you mean FAL_PROXY_ALLOWED_ENDPOINTS?",
    "FAL_PROXY_KEY": "FAL_PROXY_KEY, did you mean FAL_KEY?",
    "FAL_PROXY_KEYFILE": "FAL_PROXY_KEYFILE, did you mean FAL_KEY_FILE?",
    "FAL_PROXY_URL": "FAL_PROXY_URL; docs/reference.md lists the variables",
    "FAL_PROXY_": "FAL_PROXY_; docs/reference.md lists the variables",
}


@pytest.mark.parametrize(("name", "problem"), UNKNOWN.items())
def test_an_unknown_variable_is_a_problem(name: str, problem: str) -> None:
    """A variable with a misspelled name would leave everything open. The problem does not show its value."""
    for text in ("a-secret", ""):
        with pytest.raises(ConfigError) as caught:
            ProxyConfig.from_env({name: text, "FAL_KEY": KEY, "FAL_PROXY_MAX_IN_FLIGHT": "0"})
        assert caught.value.problems[0] == f"unknown variable {problem}"
        assert caught.value.problems[1].startswith("max_in_flight: ")
        assert "a-secret" not in str(caught.value)


def test_variables_of_others_are_no_problem() -> None:
    """The command's variables, those of Kubernetes for a Service named fal-proxy, and those of other programs pass."""
    names = [ENV_PREFIX + name.upper() for name in SERVICE_OPTIONS if name not in ("config", "env_file")]
    names += ["FAL_PROXY_SERVICE_HOST", "FAL_PROXY_SERVICE_PORT", "FAL_PROXY_SERVICE_PORT_HTTP"]
    names += ["FAL_PROXY_PORT_80_TCP", "FAL_PROXY_PORT_80_TCP_ADDR", "FAL_PROXY_PORT_80_TCP_PROTO"]
    names += ["FAL_RUN_HOST", "FAL_LOG_LEVEL", "MY_FAL_PROXY_URL", "TORNADO_FAL_PROXY_ROUNDS"]
    assert ProxyConfig.from_env(dict.fromkeys(names, "tcp://10.0.0.1:80")) == ProxyConfig()


@pytest.mark.parametrize("name", ["CONFIG", "ENV_FILE"])
def test_the_commands_files_are_a_problem(name: str) -> None:
    """An application that shares the command's variables would have none of the limits in its files."""
    with pytest.raises(ConfigError, match=rf"\AFAL_PROXY_{name}: only the command reads it; give the options to"):
        ProxyConfig.from_env(WITH_KEY | {ENV_PREFIX + name: "options"})
    assert ProxyConfig.from_env(WITH_KEY | {ENV_PREFIX + name: ""}).key == KEY


def test_the_commands_options_are_known() -> None:
    """The list of the command's options, which the configuration cannot import, is complete."""
    assert set(SERVICE_OPTIONS) == {entry.name for entry in dataclasses.fields(Settings) if entry.metadata}


PAIR = {"FAL_KEY_ID": "a", "FAL_KEY_SECRET": "secret"}
# Environments with two keys or half of one, each with the problems.
AMBIGUOUS: list[tuple[dict[str, str], list[str]]] = [
    ({"FAL_KEY": "c:secret", "FAL_KEY_FILE": "{file}"}, ["FAL_KEY and FAL_KEY_FILE are both set: unset one of them"]),
    ({"FAL_KEY": "x:secret", "FAL_KEY_FILE": "{file}"}, ["FAL_KEY and FAL_KEY_FILE are both set: unset one of them"]),
    ({"FAL_KEY": "c:secret", "FAL_KEY_FILE": "/none"}, ["FAL_KEY and FAL_KEY_FILE are both set: unset one of them"]),
    (PAIR | {"FAL_KEY_FILE": "{file}"}, ["FAL_KEY_ID and FAL_KEY_FILE are both set: unset one of them"]),
    (
        PAIR | {"FAL_KEY": "c:secret"},
        ["FAL_KEY and FAL_KEY_ID with FAL_KEY_SECRET are set, to different keys: unset one of them"],
    ),
    ({"FAL_KEY_ID": "secret"}, ["no key: FAL_KEY_ID is set without FAL_KEY_SECRET"]),
    ({"FAL_KEY_SECRET": "secret"}, ["no key: FAL_KEY_SECRET is set without FAL_KEY_ID"]),
    ({"FAL_KEY": "c:secret", "FAL_KEY_SECRET": "secret"}, ["no key: FAL_KEY_SECRET is set without FAL_KEY_ID"]),
    (
        {"FAL_KEY_SECRET": "secret", "FAL_KEY_FILE": "{file}"},
        [
            "no key: FAL_KEY_SECRET is set without FAL_KEY_ID",
            "FAL_KEY_SECRET and FAL_KEY_FILE are both set: unset one of them",
        ],
    ),
]


@pytest.mark.parametrize(("environ", "problems"), AMBIGUOUS)
def test_two_keys_are_a_problem(environ: dict[str, str], problems: list[str], tmp_path: Path) -> None:
    """None of two keys wins silently, even if they are the same in the file, and no problem shows one."""
    file = tmp_path / "key"
    file.write_text("x:secret")
    with pytest.raises(ConfigError) as caught:
        ProxyConfig.from_env({name: text.replace("{file}", str(file)) for name, text in environ.items()})
    assert list(caught.value.problems) == problems
    assert "secret" not in str(caught.value)


def test_one_key_in_two_forms() -> None:
    """FAL_KEY beside FAL_KEY_ID and FAL_KEY_SECRET is no problem if they are one key, and blanks are no key."""
    assert ProxyConfig.from_env(PAIR | {"FAL_KEY": "a:secret"}).key == "a:secret"
    assert ProxyConfig.from_env(PAIR | {"FAL_KEY": " ", "FAL_KEY_FILE": ""}).key == "a:secret"


SHOW = """
import contextlib, importlib, inspect, io, pkgutil, pydoc
import tornado_fal_proxy

modules = [tornado_fal_proxy]
for found in pkgutil.walk_packages(tornado_fal_proxy.__path__, "tornado_fal_proxy."):
    if not found.name.endswith("__main__"):
        modules.append(importlib.import_module(found.name))
shown = io.StringIO()
with contextlib.redirect_stdout(shown):
    for module in modules:
        for name, value in [(module.__name__, module), *vars(module).items()]:
            print(name)
            if not name.startswith("__") and not inspect.ismodule(value):
                print(repr(value))
            if inspect.isclass(value) or inspect.isroutine(value):
                with contextlib.suppress(TypeError, ValueError):
                    print(inspect.signature(value))
            if value is module or str(getattr(value, "__module__", "")).startswith("tornado_fal_proxy"):
                print(pydoc.render_doc(value))
    print(repr(tornado_fal_proxy.ProxyConfig.from_env()), tornado_fal_proxy.ProxyConfig())
print(len(shown.getvalue()), len(modules), "ProxyConfig" in shown.getvalue(), "THE_VALUE" in shown.getvalue())
"""


@pytest.mark.slow
def test_no_help_text_shows_the_environment() -> None:
    """No repr, signature or help text of any object of the package has a variable's value, the key least of all."""
    environ = environment({"FAL_KEY": "id:THE_VALUE", "OTHER": "THE_VALUE"})
    ended = subprocess.run(
        [sys.executable, "-c", SHOW], env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    chars, modules, complete, shows = ended.stdout.split()
    assert int(chars) > 100_000
    assert int(modules) > 40
    assert (complete, shows) == ("True", "False")
