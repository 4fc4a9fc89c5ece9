"""docs/secure.md is true: its commands start with these options, and its function decides as it says."""

import shlex
from pathlib import Path

import pytest

from tests.support.pages import Page
from tests.support.proxy import Setup
from tests.support.raw_client import call
from tests.support.service_process import WITH_KEY
from tests.support.stub_handlers import fine
from tornado_fal_proxy.service.options import parse_settings

PAGE = Page("docs/secure.md")


@pytest.mark.gen_test
async def test_the_checklist(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options exist, and the function lets in those whom it names."""
    PAGE.write_module("my_rules", tmp_path, monkeypatch)
    argv = [shlex.split(PAGE.command(name)) for name in ("endpoints", "authorize")]
    assert [words[0] for words in argv] == ["tornado-fal-proxy"] * 2
    relay = parse_settings([words[1] for words in argv], WITH_KEY).relay
    assert relay is not None
    port = setup.proxy(await setup.upstream(fine), authorize=relay.authorize, allowed_endpoints=relay.allowed_endpoints)
    token = ["x-app-token: token-of-ann"]
    assert (await call(port)).status == 401
    assert (await call(port, headers=["x-app-token: other"])).status == 401
    assert (await call(port, headers=token)).status == 200
    assert (await call(port, target="https://fal.run/fal-ai/other", headers=token)).status == 403


def test_options() -> None:
    """Each option that the page names exists, with such a value."""
    inline = [option for option in PAGE.text.split("`") if option.startswith("--") and "MODULE" not in option]
    settings = parse_settings([], WITH_KEY)
    for option in inline:
        (word,) = shlex.split(option)
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        assert name in settings.texts, option
