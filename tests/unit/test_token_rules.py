"""The operator's rules for tokens: the body that asks for one, allowed beside refused."""

import json
from typing import Any

import pytest

from tests.support.access_rules import RUN, refusal, rules
from tornado_fal_proxy.errors import (
    TokenNotAllowed,
)
from tornado_fal_proxy.rules.access import AccessRules
from tornado_fal_proxy.rules.target import Target, parse_target

TOKEN_URLS = tuple(
    f"https://{host}{path}"
    for host in ("rest.fal.ai", "rest.alpha.fal.ai")
    for path in ("/tokens/", "/tokens/realtime")
)
TOKENS, PATH_TOKENS = (parse_target(url) for url in TOKEN_URLS[:2])
TOKEN_PATTERNS = (
    "fal-ai/whole/**",
    "fal-ai/app",
    "fal-ai/flux/dev",
    "*/any-owner",
    "workflows/me/flow/**",
    "fal-ai/Mixed",
    "my-team/*",
    "other-*/**",
    "**/endings",
)
TOKENS_GIVEN = [
    b'{"allowed_apps":["whole"],"token_expiration":120}',
    b' { "token_expiration" : 300 , "allowed_apps" : [ "app" , "any-owner" , "flow" ] } \r\n',
    b'{"allowed_apps":["Mixed"],"token_expiration":1}',
]
TOKENS_REFUSED = [
    # Apps that are not allowed as such: of fal-ai/flux only a part is.
    *(
        json.dumps({"allowed_apps": apps, "token_expiration": 120}).encode()
        for apps in (
            *(
                ["flux"],
                ["other"],
                ["whole", "other"],
                ["fal-ai"],
                ["me"],
                ["dev"],
                ["mixed"],
                ["workflows"],
                ["WHOLE"],
                ["my-app"],
                ["my-team"],
                ["other-1"],
                ["endings"],
            ),
            *(
                [],
                [""],
                ["*"],
                ["**"],
                ["fal-ai/whole"],
                ["whole/**"],
                [" whole"],
                ["whole\n"],
                ["whole\0"],
                [None],
                [1],
            ),
            *([["whole"]], "whole", {"whole": 1}, None, True, ["wh\u00f6le"], ["w\u212ahole"]),
        )
    ),
    # Its life.
    *(
        b'{"allowed_apps":["whole"],"token_expiration":%s}' % text
        for text in (
            *(
                b"301",
                b"0",
                b"-1",
                b"120.0",
                b"1e2",
                b"1E400",
                b"NaN",
                b"Infinity",
                b"-Infinity",
                b"true",
                b"null",
                b'"120"',
            ),
            *(b"9" * 30, b"9" * 3900, b"0120", b"+120", b"0x78", b"[120]", b"-0", b""),
        )
    ),
    # Bodies that two parsers could read differently, or that are no such request.
    b'{"allowed_apps":["whole"],"token_expiration":120,"token_expiration":9999}',
    b'{"allowed_apps":["other"],"allowed_apps":["whole"],"token_expiration":120}',
    b'{"allowed_apps":["whole"],"\\u0061llowed_apps":["other"],"token_expiration":120}',
    b'{"allowed_apps":["wh\\u006fle"],"token_expiration":120}',
    b'{"allowed_apps":["\\ud800"],"token_expiration":120}',
    b'{"allowed_apps":["whole"],"token_expiration":120,"x":1}',
    b'{"allowed_apps":["whole"],"token_expiration":120,"Allowed_Apps":["other"]}',
    b'{"allowed_apps":["whole"],"token_expiration":120,}',
    b'{"allowed_apps":["whole",],"token_expiration":120}',
    b'{"allowed_apps":["whole"],"token_expiration":120}{}',
    b'{"allowed_apps":["whole"],"token_expiration":120}\0',
    b'{"allowed_apps":["whole"]/**/,"token_expiration":120}',
    b'\xef\xbb\xbf{"allowed_apps":["whole"],"token_expiration":120}',
    b'{"allowed_apps":["whole\xff"],"token_expiration":120}',
    b'{"allowed_apps":["wh\xc3\xb6le"],"token_expiration":120}',
    '{"allowed_apps":["whole"],"token_expiration":120}'.encode("utf-16"),
    b"{'allowed_apps':['whole'],'token_expiration':120}",
    b'{"allowed_apps":["whole"]}',
    b'{"token_expiration":120}',
    b'[{"allowed_apps":["whole"],"token_expiration":120}]',
    b"{}",
    b"null",
    b"1",
    b'"x"',
    b"",
    b"[" * 4000,
    b'{"a":' * 800,
    b'{"allowed_apps":["whole"],"token_expiration":120}' + b" " * 4096,
]


def token_rules(**more: Any) -> AccessRules:
    return rules(allowed_endpoints=TOKEN_PATTERNS, **more)


@pytest.mark.parametrize("url", TOKEN_URLS)
def test_a_token_is_judged_by_its_body(url: str) -> None:
    """The head passes. The body must be checked where endpoints are restricted, and nowhere else."""
    access = token_rules()
    assert refusal(access, "POST", url) is None
    assert access.needs_body(parse_target(url))
    assert not access.needs_body(parse_target(f"{RUN}/fal-ai/app"))
    assert not rules(allowed_hosts=("rest.fal.ai",)).needs_body(parse_target(url))


@pytest.mark.parametrize("body", TOKENS_GIVEN)
def test_token_given(body: bytes) -> None:
    """A token is given for apps that are allowed as a whole, with a life that is allowed."""
    token_rules().check_body(TOKENS, body)


@pytest.mark.parametrize("body", TOKENS_REFUSED)
def test_token_refused(body: bytes) -> None:
    """Any other token is refused, and the refusal shows nothing of the body."""
    with pytest.raises(TokenNotAllowed) as caught:
        token_rules().check_body(TOKENS, body)
    assert caught.value.status == 403
    for word in ("whole", "other", "fal-ai"):
        assert word not in f"{caught.value.message} {caught.value.detail}"


PATHS_ALLOWED = [
    ["fal-ai/whole"],
    ["fal-ai/whole/any/path"],
    ["fal-ai/app"],
    ["fal-ai/flux/dev"],
    ["some-one/any-owner", "fal-ai/app"],
    ["workflows/me/flow", "workflows/me/flow/part"],
    ["fal-ai/Mixed"],
]
PATHS_REFUSED = [
    ["fal-ai/flux"],
    ["fal-ai/flux/dev/realtime"],
    ["fal-ai/other"],
    ["fal-ai/whole", "fal-ai/other"],
    ["whole"],
    ["fal-ai/app/path"],
    ["fal-ai/mixed"],
    ["my-team/any"],  # an operator who writes * has not named it
    ["any/other-1"],
    ["a/endings"],
    ["/fal-ai/whole"],
    ["fal-ai/whole/"],
    ["fal-ai//whole"],
    ["fal-ai/whole/../other"],
    ["fal-ai/whole/**"],
    [],
    [""],
    [None],
    "fal-ai/whole",
]


def path_token(apps: object, seconds: object = 120) -> bytes:
    return json.dumps({"allowed_apps": apps, "duration": seconds}).encode()


@pytest.mark.parametrize("apps", PATHS_ALLOWED)
def test_token_for_paths_given(apps: list[str]) -> None:
    """A token for whole paths is given where a pattern names each of them, or all of its app."""
    token_rules().check_body(PATH_TOKENS, path_token(apps))


@pytest.mark.parametrize("apps", PATHS_REFUSED)
def test_token_for_paths_refused(apps: object) -> None:
    """A token for any other path is refused."""
    with pytest.raises(TokenNotAllowed):
        token_rules().check_body(PATH_TOKENS, path_token(apps))


@pytest.mark.parametrize(
    ("target", "body"),
    [
        (TOKENS, path_token(["whole"])),
        (PATH_TOKENS, b'{"allowed_apps":["fal-ai/whole"],"token_expiration":120}'),
        (PATH_TOKENS, b'{"allowed_apps":["fal-ai/whole"],"duration":120,"token_expiration":120}'),
        (PATH_TOKENS, b'{"allowed_apps":["fal-ai/whole"]}'),
        *((PATH_TOKENS, path_token(["fal-ai/whole"], seconds)) for seconds in (0, 301, 1.5, True, "120", None)),
    ],
)
def test_each_kind_of_token_has_its_own_name_for_the_time(target: Target, body: bytes) -> None:
    """The time stands under the name that the path has, and is held against the same limit."""
    with pytest.raises(TokenNotAllowed):
        token_rules().check_body(target, body)


def test_the_life_of_a_token_can_be_set() -> None:
    """The longest life of a token is max_token_expiration_s."""
    for longest in (1, 60, 86_400):
        access = token_rules(max_token_expiration_s=longest)
        access.check_body(TOKENS, b'{"allowed_apps":["app"],"token_expiration":%d}' % longest)
        with pytest.raises(TokenNotAllowed):
            access.check_body(TOKENS, b'{"allowed_apps":["app"],"token_expiration":%d}' % (longest + 1))
