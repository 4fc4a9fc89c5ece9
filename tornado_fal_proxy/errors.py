"""Define every way in which a call can end without the target's response, on one screen.

A :class:`ProxyError` carries what the client gets (``status``, the stable sentence ``message``, ``headers``)
and, apart from it, what the log gets (``detail``). Neither ever holds the key.

::

    ProxyError
    ├── ClientDisconnected    the client left before it had its response
    ├── MethodNotAllowed      405
    ├── TargetMissing         400   no x-fal-target-url, or several
    ├── TargetRefused         412   not a URL of fal's
    ├── AccessRefused         403   a rule that the operator has set
    │   ├── HeaderNotAllowed
    │   ├── HostNotAllowed
    │   ├── AccountNotAllowed also where the operator has set no rule
    │   ├── WebhookNotAllowed
    │   ├── EndpointNotAllowed
    │   ├── UploadNotAllowed
    │   ├── TokenNotAllowed
    │   ├── PriceUnknown      a budget applies, and no price
    │   ├── DiagnosticNotAllowed
    │   └── OriginNotAllowed
    ├── JobNotFound           404   a queued job of another user, or of nobody
    ├── SpendingRefused             a limit on paid calls
    │   ├── LimitReached      429   too many jobs in a minute or an hour, or at once
    │   └── QuotaUsedUp       402   the jobs of a day or month, or a budget; fal's SDKs do not repeat it
    ├── TooManyDiagnostics    429   a doctor asked too often
    ├── UnsupportedMediaType  415   a body that is not JSON
    ├── BodyTooLarge          413
    ├── BodyTooSlow           408   the body stopped coming, or comes too slowly
    ├── Unauthorized          401   authorize did not let the client in
    ├── KeyMissing            500   the operator has set no key
    ├── HeadersTooLarge       431   the headers that would go to fal
    ├── Misconfigured         500   the operator gave the handler wrong arguments
    ├── TooManyCalls          503   max_in_flight is reached; nothing was sent, so the client may repeat the call
    ├── BuffersFull           503   max_buffered_bytes is reached; likewise
    ├── StoreUnavailable      503   the store of what was spent failed; likewise
    └── UpstreamError         502, or 500 where a repetition could be billed twice
        ├── NameNotFound
        ├── ConnectFailed
        ├── TlsFailed
        ├── ConnectionLost
        ├── MalformedResponse
        └── UpstreamTimeout   504, or 500 likewise

Each status is chosen by what it makes fal's SDKs do: they repeat 502, 503 and 504, and never 500.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AccessRefused",
    "AccountNotAllowed",
    "BodyTooLarge",
    "BodyTooSlow",
    "BuffersFull",
    "ClientDisconnected",
    "ConfigError",
    "ConnectFailed",
    "ConnectionLost",
    "DiagnosticNotAllowed",
    "EndpointNotAllowed",
    "HeaderNotAllowed",
    "HeadersTooLarge",
    "HostNotAllowed",
    "JobNotFound",
    "KeyMissing",
    "LimitReached",
    "MalformedResponse",
    "MethodNotAllowed",
    "Misconfigured",
    "NameNotFound",
    "OriginNotAllowed",
    "PriceUnknown",
    "ProxyError",
    "QuotaUsedUp",
    "SpendingRefused",
    "StoreUnavailable",
    "TargetMissing",
    "TargetRefused",
    "TlsFailed",
    "TokenNotAllowed",
    "TooManyCalls",
    "TooManyDiagnostics",
    "Unauthorized",
    "UnsupportedMediaType",
    "UploadNotAllowed",
    "UpstreamError",
    "UpstreamTimeout",
    "WebhookNotAllowed",
]


class ConfigError(ValueError):
    """Reject a configuration that cannot work. ``problems`` names every fault found, not only the first."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class ProxyError(Exception):
    """Say why a call ends without the target's response."""

    status = 500
    message = "The proxy failed."
    headers: tuple[tuple[str, str], ...] = ()

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail or self.message)
        self.detail = detail


class ClientDisconnected(ProxyError):
    status = 499  # the status that nginx logs for it; no client ever receives it
    message = "The client disconnected."


class MethodNotAllowed(ProxyError):
    status = 405
    message = "Only GET and POST are allowed."
    headers = (("Allow", "GET, POST"),)

    def __init__(self, detail: str = "", *, may_put: bool = False, needs_cancel: bool = False) -> None:
        super().__init__(detail)
        if needs_cancel:
            self.message = (
                "Only GET and POST are allowed; a PUT that cancels a queued job needs this proxy's allow_cancel."
            )
        if may_put:
            self.message = "Only GET, POST and PUT are allowed."
            self.headers = (("Allow", "GET, POST, PUT"),)


class TargetMissing(ProxyError):
    status = 400
    message = "Exactly one x-fal-target-url header with a URL is needed."


class TargetRefused(ProxyError):
    status = 412
    message = "The x-fal-target-url header must be an https URL of fal.ai, fal.run or a sub-domain of theirs."


class AccessRefused(ProxyError):
    """Refuse a call by a rule of the operator. The message names the rule, and nothing of its contents."""

    status = 403
    message = "This call is not allowed by this proxy."


class HostNotAllowed(AccessRefused):
    message = "This host is not allowed by this proxy's allowed_hosts."


class AccountNotAllowed(AccessRefused):
    message = "Calls for fal's account are not allowed: this proxy's allowed_hosts does not name their host."


class WebhookNotAllowed(AccessRefused):
    message = "This fal_webhook is not allowed by this proxy's allowed_webhooks."


class EndpointNotAllowed(AccessRefused):
    message = "This endpoint is not allowed by this proxy's allowed_endpoints."


class HeaderNotAllowed(AccessRefused):
    message = "A header of this request is not allowed by this proxy's allowed_fal_headers."


class UploadNotAllowed(AccessRefused):
    message = "Uploads are not allowed by this proxy's allow_uploads."


class TokenNotAllowed(AccessRefused):
    message = "This realtime token is not allowed by this proxy's allowed_endpoints and max_token_expiration_s."


class PriceUnknown(AccessRefused):
    message = "This endpoint is not allowed because a budget applies, and this proxy's prices do not name it."


class DiagnosticNotAllowed(AccessRefused):
    message = "This diagnostic is not allowed by this proxy's allow_diagnostics."


class OriginNotAllowed(AccessRefused):
    message = "Pages of this origin are not allowed by this proxy's allowed_origins."


class JobNotFound(ProxyError):
    status = 404
    message = "No job of yours has this id."


class SpendingRefused(ProxyError):
    """Refuse a paid call by a limit. The message names the limit and when it opens again."""

    def __init__(self, message: str, headers: tuple[tuple[str, str], ...], detail: str) -> None:
        super().__init__(detail)
        self.message = message
        self.headers = headers


class LimitReached(SpendingRefused):
    status = 429


class QuotaUsedUp(SpendingRefused):
    status = 402


class TooManyDiagnostics(ProxyError):
    status = 429
    message = "This proxy makes no more diagnostic responses at the moment; try again in a minute."
    headers = (("Retry-After", "60"),)


class UnsupportedMediaType(ProxyError):
    status = 415
    message = "The body must be JSON: content-type application/json, without content-encoding."


class BodyTooLarge(ProxyError):
    status = 413
    message = "The body is larger than this proxy accepts."


class BodyTooSlow(ProxyError):
    """Refuse a body that takes too long. Nothing was sent to fal, so a browser may repeat the call by itself."""

    status = 408
    message = "The body of the request took too long to arrive."


class Unauthorized(ProxyError):
    """Refuse a client that ``authorize`` did not let in. RFC 9110 section 15.5.2 requires a challenge."""

    status = 401
    message = "This proxy does not let you in."
    headers = (("WWW-Authenticate", "Bearer"),)  # makes no browser ask for a password


class KeyMissing(ProxyError):
    message = "The proxy is not configured: it has no fal.ai key."


class HeadersTooLarge(ProxyError):
    status = 431
    message = "The headers for fal are larger than this proxy accepts."


class Misconfigured(ProxyError):
    message = "The proxy is not configured correctly."


class TooManyCalls(ProxyError):
    status = 503
    message = "The proxy is serving as many calls as it may; try again."
    headers = (("Retry-After", "1"),)


class BuffersFull(ProxyError):
    status = 503
    message = "The proxy is buffering as many bytes as it may; try again."
    headers = (("Retry-After", "1"),)


class StoreUnavailable(ProxyError):
    status = 503
    message = "The proxy cannot count this call at the moment; try again."
    headers = (("Retry-After", "2"),)


class UpstreamError(ProxyError):
    """Report that no usable response came from fal.

    ``may_have_run`` is true for a paid call that may have reached fal. It is answered 500, which fal's SDKs do not
    repeat, because a repeated ``run`` or ``submit`` would be executed, and paid, twice.
    """

    status = 502

    def __init__(self, detail: str = "", *, may_have_run: bool = False) -> None:
        super().__init__(detail)
        self.may_have_run = may_have_run
        if may_have_run:
            self.status = 500
            self.message = f"{self.message} The job may have run: check before sending it again."


class NameNotFound(UpstreamError):
    message = "The name of fal's server could not be looked up."


class ConnectFailed(UpstreamError):
    message = "No connection to fal's server could be made."


class TlsFailed(UpstreamError):
    message = "The TLS connection to fal's server could not be trusted or set up."


class ConnectionLost(UpstreamError):
    message = "The connection to fal's server broke before the response was complete."


class MalformedResponse(UpstreamError):
    message = "The response of fal's server could not be understood."


class UpstreamTimeout(UpstreamError):
    status = 504
    message = "fal's server took too long."
