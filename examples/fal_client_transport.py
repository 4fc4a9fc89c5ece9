"""Use Python's fal-client through the proxy, without a key: ``python examples/fal_client_transport.py PROXY_URL``.

fal-client has no setting for a proxy, so this client gives it a transport that sends each request for fal to the proxy.
Uploads go on past the proxy, to the address that fal has given for them.
"""

import sys
from datetime import datetime
from functools import cached_property

import fal_client
import httpx
from fal_client.client import CDNToken, CDNTokenManager


class ProxyTransport(httpx.HTTPTransport):
    """Send requests for fal to ``proxy_url``, with their real address in x-fal-target-url, and others where they go."""

    def __init__(self, proxy_url: str) -> None:
        super().__init__()
        self._proxy_url = httpx.URL(proxy_url)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if not request.url.host.endswith((".fal.run", ".fal.ai", "fal.run")):
            return super().handle_request(request)
        headers = request.headers.copy()
        headers.pop("authorization", None)
        headers["host"] = self._proxy_url.netloc.decode()
        headers["x-fal-target-url"] = str(request.url)
        return super().handle_request(
            httpx.Request(
                request.method,
                self._proxy_url,
                headers=headers,
                stream=request.stream,
                extensions=request.extensions,
            )
        )


class ProxiedTokens(CDNTokenManager):
    """Ask for the token of an upload through the proxy."""

    def __init__(self, client: "ProxiedClient") -> None:
        super().__init__(client._auth)
        self._client = client._client

    def _refresh_token(self) -> CDNToken:
        response = self._client.post(self._url, json={})
        response.raise_for_status()
        fields = response.json()
        expires_at = datetime.fromisoformat(fields["expires_at"])
        return CDNToken(fields["token"], fields["token_type"], fields["base_url"], expires_at)


class ProxiedClient(fal_client.SyncClient):
    """A client of fal's whose calls all go through the proxy at ``proxy_url``."""

    def __init__(self, proxy_url: str) -> None:
        super().__init__(key="kept by the proxy")
        object.__setattr__(self, "_proxy_url", proxy_url)  # fal's class is frozen

    @cached_property
    def _client(self) -> httpx.Client:
        return httpx.Client(transport=ProxyTransport(self._proxy_url), timeout=self.default_timeout)

    @cached_property
    def _token_manager(self) -> CDNTokenManager:
        return ProxiedTokens(self)


def main(proxy_url: str) -> None:
    client = ProxiedClient(proxy_url)
    model, arguments = "fal-ai/flux/dev", {"prompt": "a lighthouse"}
    print("run:", client.run(model, arguments)["images"][0]["url"])
    job = client.submit(model, arguments)
    print("status:", type(job.status()).__name__)
    print("result:", job.get()["images"][0]["url"])
    for event in client.stream(model, arguments):
        print("event:", ", ".join(event))
    print("upload:", client.upload(b"a text", "text/plain", "text.txt", repository="fal"))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/api/fal/proxy")
