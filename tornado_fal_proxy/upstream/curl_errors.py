"""Translate libcurl's error numbers into ours, in one table."""

from __future__ import annotations

import pycurl

from tornado_fal_proxy.errors import (
    ConnectFailed,
    ConnectionLost,
    MalformedResponse,
    NameNotFound,
    TlsFailed,
    UpstreamError,
    UpstreamTimeout,
)

__all__ = ["HTTP2_STREAM_ERROR", "upstream_error"]

# Error numbers of libcurl (include/curl/curl.h) to which pycurl gives no name.
HTTP2_STREAM_ERROR, _E_PROXY, _E_TOO_LARGE = 92, 97, 100

# A number that is not listed means a broken connection, the case that is handled with the most caution.
_ERRORS: dict[int, type[UpstreamError]] = {
    pycurl.E_COULDNT_RESOLVE_HOST: NameNotFound,
    pycurl.E_COULDNT_RESOLVE_PROXY: NameNotFound,
    pycurl.E_COULDNT_CONNECT: ConnectFailed,
    _E_PROXY: ConnectFailed,
    pycurl.E_SSL_CONNECT_ERROR: TlsFailed,
    pycurl.E_PEER_FAILED_VERIFICATION: TlsFailed,
    pycurl.E_SSL_CACERT_BADFILE: TlsFailed,
    pycurl.E_SSL_CERTPROBLEM: TlsFailed,
    pycurl.E_SSL_CIPHER: TlsFailed,
    pycurl.E_SSL_ISSUER_ERROR: TlsFailed,
    pycurl.E_OPERATION_TIMEDOUT: UpstreamTimeout,
    pycurl.E_UNSUPPORTED_PROTOCOL: MalformedResponse,
    pycurl.E_FTP_WEIRD_SERVER_REPLY: MalformedResponse,
    _E_TOO_LARGE: MalformedResponse,
}


def upstream_error(number: int, text: str, *, may_have_run: bool) -> UpstreamError:
    """Return libcurl's error as ours. The text goes to the log; it holds names and reasons, never a header."""
    return _ERRORS.get(number, ConnectionLost)(f"curl error {number}: {text}", may_have_run=may_have_run)
