"""Calls for the key's account are refused without any rule of the operator, and models stay open."""

import pytest

from tests.support.access_rules import QUEUE, RUN, refusal
from tornado_fal_proxy.errors import (
    AccountNotAllowed,
    EndpointNotAllowed,
    HostNotAllowed,
    MethodNotAllowed,
    ProxyError,
    TargetMissing,
    TargetRefused,
    UnsupportedMediaType,
)
from tornado_fal_proxy.rules.access import access_rules
from tornado_fal_proxy.rules.endpoints import is_account_call
from tornado_fal_proxy.rules.policy import decide
from tornado_fal_proxy.rules.target import parse_target

REST = "https://rest.fal.ai"
ACCOUNT = [
    *(f"https://api.fal.ai{path}" for path in ("", "/", "/v1/keys", "/v1/models/usage?x=1", "/tokens/", "/storage/x")),
    *(f"https://{host}.fal.ai/v1/keys" for host in ("api.alpha", "api.beta", "v2.api", "a.api.b")),
    "https://api.fal.run/v1/keys",
    *(f"https://{host}/keys/" for host in ("rest.fal.ai", "rest.alpha.fal.ai", "rest.beta.fal.ai", "rest.fal.run")),
    *(
        f"{REST}{path}"
        for path in ("", "/", "//", "?storage", "/?/tokens/", "/keys", "/billing/user_details", "/users/")
    ),
    *(f"{REST}{path}" for path in ("/health", "/.well-known/jwks.json", "/applications/", "/tokensx/", "/storages/x")),
    # Other spellings, and ways out of what is open.
    *(f"{REST}/{path}" for path in ("/keys", "/tokens/", "./tokens/", "../tokens/", "Tokens/", "TOKENS/", "STORAGE/x")),
    *(f"{REST}/tokens{path}" for path in ("/../keys/", "/..", "//keys", "//", "/./x", "/%2e%2e/keys", "%2F..%2Fkeys")),
    *(
        f"{REST}/storage{path}"
        for path in ("/../keys", "/%2E%2E/keys", "/x/../../keys", "/..;/keys", ";/../keys", "%00")
    ),
    *(
        f"{REST}/{path}"
        for path in ("%6beys/", "%74okens/", "tokens;x/", "tokens,/", "x/tokens/", "keys/storage/upload")
    ),
    f"{REST}:443/keys/",
    f"{REST}/keys/#/tokens/",
    f"{REST}/storage/{'a' * 600}",
]
MODELS = [
    f"{RUN}/fal-ai/flux/dev",
    f"{RUN}/",
    f"{RUN}/api/keys",
    f"{RUN}/a/../b%2f",
    f"{QUEUE}/rest/api?fal_webhook=https://api.fal.ai",
    f"{QUEUE}//keys",
    "https://fal.ai/",
    "https://wma.fal.run/session",
    "https://110602490-lora.fal.run/",
    "https://my-api.fal.run/keys",
    "https://restful.fal.run/keys",
    "https://gateway.alpha.fal.ai/keys",
    *(f"https://{host}/tokens{end}" for host in ("rest.fal.ai", "rest.alpha.fal.ai") for end in ("/", "", "/realtime")),
    f"{REST}/tokens/?x=/../keys",
    f"{REST}/storage/upload/initiate?storage_type=fal-cdn-v3",
    f"{REST}/storage/upload/initiate-multipart?storage_type=fal-cdn-v3",
    f"{REST}/storage/auth/token?storage_type=fal-cdn-v3",
    "https://rest.alpha.fal.ai/storage/upload/initiate",
]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("url", ACCOUNT)
def test_the_account_is_closed(method: str, url: str) -> None:
    """Without rules, and with rules that do not name the host, calls for the account are answered 403."""
    assert refusal(None, method, url) is AccountNotAllowed
    assert refusal(access_rules(allow_cancel=True), method, url) is AccountNotAllowed
    everything = ("*.fal.ai", "*.fal.run", "fal.ai", "fal.run", "*.alpha.fal.ai")
    assert refusal(access_rules(allowed_hosts=everything), method, url) is AccountNotAllowed
    assert refusal(access_rules(allowed_hosts=("fal.run",)), method, url) is HostNotAllowed
    assert refusal(access_rules(allowed_webhooks=()), method, url) is AccountNotAllowed


@pytest.mark.parametrize("url", MODELS)
def test_models_stay_open(url: str) -> None:
    """Endpoints, realtime tokens, uploads, and hosts whose meaning is not known pass as the formula has it."""
    assert refusal(None, "GET", url) is None
    assert refusal(access_rules(allow_cancel=True), "POST", url) is None


@pytest.mark.parametrize("url", ACCOUNT)
def test_only_the_exact_name_opens_a_host(url: str) -> None:
    """allowed_hosts opens the account on the hosts that it names, and never by a wildcard."""
    host = parse_target(url).host
    assert refusal(access_rules(allowed_hosts=(host,)), "GET", url) is None
    assert refusal(access_rules(allowed_hosts=("*.fal.ai", "*.fal.run", host)), "GET", url) is None
    below = host.partition(".")[2]
    assert refusal(access_rules(allowed_hosts=(f"*.{below}",)), "GET", url) is AccountNotAllowed


def test_restricted_endpoints_open_no_account() -> None:
    """Where endpoints are restricted, allowed_hosts opens nothing beside them."""
    access = access_rules(allowed_hosts=("api.fal.ai", "fal.run"), allowed_endpoints=("**",), allow_uploads=True)
    assert refusal(access, "GET", "https://api.fal.ai/v1/keys") is EndpointNotAllowed


def test_the_order_of_the_refusals() -> None:
    """The account is refused after a wrong method and a wrong target (405, 400, 412), and before the body (415)."""
    body = [("content-type", "text/plain"), ("content-length", "1")]
    steps: list[tuple[str, str | None, type[ProxyError]]] = [
        ("DELETE", "https://api.fal.ai/v1/keys", MethodNotAllowed),
        ("PUT", "https://rest.fal.ai/keys/", MethodNotAllowed),
        ("POST", None, TargetMissing),
        ("POST", "http://api.fal.ai/v1/keys", TargetRefused),
        ("POST", "https://api.fal.ai./v1/keys", TargetRefused),
        ("POST", "https://API.fal.ai/v1/keys", TargetRefused),
        ("POST", "https://api.fal.ai/v1/keys", AccountNotAllowed),
        ("POST", RUN, UnsupportedMediaType),
    ]
    for method, url, error in steps:
        with pytest.raises(ProxyError) as caught:
            decide(method, [*body, *([("x-fal-target-url", url)] if url else [])], max_body_bytes=1)
        assert type(caught.value) is error
    assert AccountNotAllowed.status == 403
    assert "allowed_hosts" in AccountNotAllowed.message


def test_the_hosts_of_models_cost_no_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call to fal.run or queue.fal.run is never split into segments."""
    monkeypatch.setattr("tornado_fal_proxy.rules.endpoints.canonical_segments", None)
    for url in MODELS[:6]:
        assert not is_account_call(parse_target(url))
    with pytest.raises(TypeError):
        is_account_call(parse_target(f"{REST}/tokens/"))
