"""Decide about a client's request, and relay it to fal: the class that an application mounts.

Strategy. ``prepare()`` decides everything that the head of a request can decide, and answers a refused call there, so
no body is buffered for it. The body is collected up to its limit, the call goes to
:class:`~tornado_fal_proxy.upstream.client.UpstreamClient`, and the response leaves in one of two ways
(:mod:`~tornado_fal_proxy.relay.response`):

* whole: whatever is complete already, and every plain result of a paid call that fits ``response_buffer_bytes``. fal's
  SDKs send such a call again, and pay again, when its response breaks off; so it must not break off.
* as a stream: event streams, and the responses of calls that may be repeated.

The handler changes nothing global and nothing of the application's.
"""

from __future__ import annotations

import asyncio
import io
import logging
from typing import Any

from tornado.iostream import StreamClosedError
from tornado.web import stream_request_body

from tornado_fal_proxy._tasks import EagerTask
from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.credentials import authorization_line
from tornado_fal_proxy.errors import (
    AccessRefused,
    BodyTooLarge,
    BuffersFull,
    ClientDisconnected,
    ConnectionLost,
    KeyMissing,
    Misconfigured,
    OriginNotAllowed,
    ProxyError,
    TargetMissing,
    Unauthorized,
    UpstreamError,
)
from tornado_fal_proxy.relay.backend import Backend, shared_backend
from tornado_fal_proxy.relay.diagnostics import diagnose
from tornado_fal_proxy.relay.hooks import result_of
from tornado_fal_proxy.relay.paying import PayingResponse
from tornado_fal_proxy.rules.cors import CorsRules
from tornado_fal_proxy.rules.diagnostics import Diagnostic, diagnostic_of
from tornado_fal_proxy.rules.excerpt import excerpt
from tornado_fal_proxy.rules.headers import request_headers
from tornado_fal_proxy.rules.policy import decide
from tornado_fal_proxy.rules.target import Target
from tornado_fal_proxy.upstream.body import HIGH_WATER_BYTES
from tornado_fal_proxy.upstream.budget import BufferBudget
from tornado_fal_proxy.upstream.transfer import Transfer

__all__ = ["FalProxyHandler"]

logger = logging.getLogger("tornado_fal_proxy")

_DEFAULT_CONFIG = ProxyConfig()


@stream_request_body
class FalProxyHandler(PayingResponse):
    """Relay ``GET`` and ``POST`` to the URL in ``x-fal-target-url``, with the key added.

    Mount it as ``(r"/api/fal/proxy", FalProxyHandler)``, with ``{"config": ProxyConfig(...)}`` as third element to
    configure it. Subclasses may override :meth:`authorize`, :meth:`resolve_key`, :meth:`identify` and
    :meth:`check_input`, as coroutines or plain methods; those that override :meth:`prepare` must
    ``await super().prepare()``.

    Source: fal's "server-side integration" page, "the proxy formula".
    """

    def initialize(self, config: ProxyConfig | None = None, **unknown: object) -> None:
        """Take the configuration. A wrong one is answered 500 later.

        Tornado calls this for every request, and an exception here would close the connection without a response.
        """
        config = config or _DEFAULT_CONFIG
        self._misconfigured = ""
        if unknown:
            self._misconfigured = f"FalProxyHandler takes the keyword config, not {', '.join(sorted(unknown))}"
        elif not isinstance(config, ProxyConfig):
            self._misconfigured = f"FalProxyHandler's config must be a ProxyConfig, not {type(config).__name__}"
        self._target: Target | None = None
        self._lines: list[bytes] = []
        self._diagnostic: Diagnostic | None = None
        self._shared: Backend | None = None
        self._backend: Backend | None = None  # as long as the call holds a slot there
        self._transfer: Transfer | None = None
        self._body = io.BytesIO()  # gives its bytes away without a copy
        self._body_size = 0
        self._counted = 0  # bytes of the body that the budget counts
        self._begin_response(config, None if self._misconfigured else config.cors)
        self._spending = None if self._misconfigured else config.spending or self._own_rules
        if self._spending is not None:
            self.call.accounted = True

    # The request's head.

    def _execute(self, transforms: list[Any], *args: bytes, **kwargs: bytes) -> Any:
        """Serve the request as Tornado's does, but take the first step at once, and not in the loop's next turn."""
        served = self._serve(super()._execute(transforms, *args, **kwargs))
        return EagerTask(served, loop=asyncio.get_running_loop())

    async def _serve(self, execution: Any) -> None:
        """Serve the request, and release what the call holds at its end.

        Not in ``on_finish``, which belongs to the application. Tornado does not call it for a client that left while
        its body was read, so it is called here: once for each request.
        """
        try:
            await execution
        except BaseException as exc:
            self._abort(exc)  # Tornado answers an Exception; with anything else the client would wait for ever
            raise
        finally:
            self._end_call()
            self._release()
            if not self._finished and self._linger is None:
                self.on_finish()

    async def prepare(self) -> None:
        """Decide whether the call may pass, before its body is read, and answer a refused call."""
        # data_received keeps the limit, and responds; Tornado's own limit closes the connection.
        self._connection.set_max_body_size(2**62)
        try:
            if self._misconfigured:
                raise Misconfigured(self._misconfigured)
            config = self._config
            self._pairs = [(name.lower(), value) for name, value in self.request.headers.get_all()]
            if self._cors is not None and self._is_preflight():
                self._answer_preflight(self._cors)
                return
            if self._connection.stream.closed():
                raise ClientDisconnected
            target = decide(
                self.request.method or "",
                self._pairs,
                max_body_bytes=config.max_body_bytes,
                access=config.access,
                header_rules=config.headers,
            )
            self.call.target = target
            backend = self._shared = shared_backend(self.application, config)
            if config.authorize is not None or type(self).authorize is not FalProxyHandler.authorize:
                backend.watch(self._connection.stream)
                await self._check_authorized(target)
            if self._spending is not None:
                await self._begin_spending(self._spending, backend, target)
            if config.resolve_key is not None or type(self).resolve_key is not FalProxyHandler.resolve_key:
                backend.watch(self._connection.stream)
                authorization = _authorization(await self._ask(self.resolve_key, target))
            else:
                authorization = config.authorization()
            self._make_lines(authorization)
            self._admit(backend, target)
        except ClientDisconnected:
            self._responded = True
            if not self._finished:  # else the operator's function has responded by itself
                self._end_disconnected()
        except ProxyError as exc:
            self._refuse_or_diagnose(exc)

    def _refuse_or_diagnose(self, error: ProxyError) -> None:
        """Answer a refused call, except a request without a target that a doctor has sent."""
        if isinstance(error, TargetMissing):
            self._diagnostic = diagnostic_of(self._pairs)
        if self._diagnostic is None:
            self._refuse(error)

    def _make_lines(self, authorization: bytes) -> None:
        """Make the header lines for fal. Raise HeadersTooLarge."""
        rules = self._config.headers
        if rules is not None:
            self._pairs = rules.without_own(self._pairs)
        self._lines, self._pairs = request_headers(self._pairs, authorization), []
        self._lines += self._tags
        if rules is not None:
            self._lines += rules.lines

    def _admit(self, backend: Backend, target: Target) -> None:
        """Acquire what the call needs. :meth:`_serve` releases it. Raise BuffersFull or TooManyCalls."""
        _check_budget(backend.client.budget)
        backend.slots.acquire()
        self._backend, self._budget, self._target = backend, backend.client.budget, target
        headers = self.request.headers
        if "Content-Length" in headers or "Transfer-Encoding" in headers:
            backend.expect_body(self)

    async def _check_authorized(self, target: Target) -> None:
        if not await self._ask(self.authorize, target):
            raise Unauthorized

    async def authorize(self, target: Target) -> Any:
        """Tell whether the client may make this call, which the rules allow: a false result is answered 401.

        Called before the body is read. To refuse in another way raise :class:`tornado.web.HTTPError`: its status and
        reason are the response. Calls ``ProxyConfig.authorize``; without one every client may call.
        """
        authorize = self._config.authorize
        return authorize is None or await result_of(authorize(self, target))

    async def resolve_key(self, target: Target) -> Any:
        """Return the key for this call, from ``ProxyConfig.resolve_key`` or else the configuration; None for no key."""
        resolve_key = self._config.resolve_key
        return self._config.any_key() if resolve_key is None else await result_of(resolve_key(self, target))

    def _is_preflight(self) -> bool:
        names = {name for name, _ in self._pairs}
        return self.request.method == "OPTIONS" and {"origin", "access-control-request-method"} <= names

    def _answer_preflight(self, cors: CorsRules) -> None:
        if not cors.allows(self._origin()):
            origins = ", ".join(self.request.headers.get_list("Origin"))
            raise OriginNotAllowed(f"allowed_origins: {excerpt(origins)}")
        for name, value in cors.preflight_headers(self.request.headers.get("Access-Control-Request-Headers")):
            self.set_header(name, value)
        self._set_vary("Origin", "Access-Control-Request-Method", "Access-Control-Request-Headers")
        self._responded = True
        self.set_status(204)
        self._end_call()
        self._send(b"")

    # The request's body.

    def data_received(self, chunk: bytes) -> None:
        """Collect a piece of the body, and answer 413 above ``max_body_bytes``."""
        if self._responded:
            return  # the rest of a refused request
        self._body_size = self.call.received_bytes = self._body_size + len(chunk)
        budget = self._budget
        if self._body_size > self._config.max_body_bytes:
            self._drop_body()
            self._refuse(BodyTooLarge())
        elif budget is None:
            return  # prepare() has not admitted the call
        else:
            try:
                _check_budget(budget)
            except BuffersFull as exc:
                self._drop_body()
                self._refuse(exc)
                return
            self._body.write(chunk)
            self._counted += len(chunk)
            budget.add(len(chunk))

    def _drop_body(self) -> None:
        self._body = io.BytesIO()

    def received_so_far(self) -> int | None:
        """Return how many bytes of the body have come; None when all of it has."""
        return None if self.request._body_future.done() else self._body_size

    def abort_body(self, error: ProxyError) -> None:
        """Answer a client whose body is waited for no longer, and release its slot."""
        self._drop_body()
        self._fail(error)

    # The relay.

    async def get(self, *_args: str, **_kwargs: str) -> None:
        """Relay a read."""
        await self._relay()

    async def post(self, *_args: str, **_kwargs: str) -> None:
        """Relay a call, after the check of its body where a rule needs one."""
        target = self._target
        if self._responded or target is None:
            pass
        elif (access := self._config.access) is not None and access.needs_body(target):
            try:
                access.check_body(target, self._body.getvalue())
            except AccessRefused as exc:
                self._refuse(exc)
        await self._relay()

    async def put(self, *_args: str, **_kwargs: str) -> None:
        """Relay the cancel of a queued job, where ``allow_cancel`` is set; prepare() has answered all else."""
        await self._relay()

    async def _refused(self, *_args: str, **_kwargs: str) -> None:
        """Do nothing: prepare() has answered every other method, and its body was read and thrown away."""

    head = patch = delete = options = _refused

    async def _relay(self) -> None:
        if self._responded:
            return
        if self._diagnostic is not None:
            await self._begin_diagnosis(self._diagnostic)
            return
        if self._target is None or self._backend is None:
            self._refuse(Misconfigured("prepare() did not run: a subclass's own must await super().prepare()"))
            return
        self._backend.body_arrived(self)
        stream = self._connection.stream
        if stream.closed():
            self._end_disconnected()
            return
        call = self.call
        body = self._body.getvalue()
        self._drop_body()
        transfer = None
        try:
            if self._payer is not None:
                await self._reserve(self._payer, self._backend, self._target, body)
            transfer = self._transfer = self._backend.client.start(
                self.request.method or "",
                self._target,
                self._lines,
                body,
                client=self.request.remote_ip or "",
            )
            del body  # libcurl keeps the only copy
            self._lines = []
            call.relayed = True
            self._backend.watch(stream)
            head = await transfer.read_head()
            call.failed_over = transfer.first_host is not None
            buffered = (not transfer.repeatable and not head.streams) or not head.has_body
            whole = (buffered or transfer.complete) and await transfer.buffer_whole()
            self._copy_head(head)
            call.head = head
            call.mark_first_byte()
            if whole and transfer.size <= HIGH_WATER_BYTES:
                await self._write_whole(head, b"".join(transfer.take()))
            else:
                await self._write_stream(head, transfer, transfer.size if whole else head.length)
            self._end_call()
        except (ProxyError, StreamClosedError) as exc:
            self._end_spending(transfer)  # first, because the response has what is left
            self._fail(exc)
        finally:
            if transfer is not None:
                transfer.cancel()
            self._end_spending(transfer)
            if self._finished:
                self._end_call()

    async def _begin_diagnosis(self, diagnostic: Diagnostic) -> None:
        """Respond to a doctor, in a slot as a relayed call has one, because a stop of the service waits for it too."""
        backend = self._shared = shared_backend(self.application, self._config)
        try:
            backend.slots.acquire()
            self._backend = backend
            backend.watch(self._connection.stream)
            await diagnose(self, diagnostic, backend.diagnostics)
        except (ProxyError, StreamClosedError) as exc:
            self._fail(exc)

    # Ends.

    def _on_disconnect(self) -> None:
        """Cancel the call at fal."""
        prepared = self._prepared_future is not None and self._prepared_future.done()
        waits_for_body = prepared and not self.request._body_future.done()
        super()._on_disconnect()
        self._drop_body()
        if waits_for_body:
            # Nothing of this handler will run except Tornado's wait, which raises what the future holds, in a frame
            # that holds the handler. With another future in its place, and without ui, no cycle is left.
            self.request._body_future = asyncio.get_running_loop().create_future()
            self.request._body_future.set_result(None)
            self._break_cycles()
        if self._transfer is not None:
            self._transfer.cancel()
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None

    def _reason_to_disconnect(self) -> ProxyError:
        if self._shared is not None and self._shared.is_closed:
            return ConnectionLost("the proxy is closing")
        return super()._reason_to_disconnect()

    def _release(self) -> None:
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.body_arrived(self)
            backend.slots.release()
        if self._budget is not None:
            self._budget.remove(self._counted)
            self._counted = 0

    def _fail(self, error: ProxyError | StreamClosedError) -> None:
        """Answer a call that cannot be relayed, or abort its response where that has begun."""
        if isinstance(error, UpstreamError):
            self._log_upstream_error(error)
        if isinstance(error, ClientDisconnected | StreamClosedError):
            error.__traceback__ = None  # it holds the frames that hold the future that holds it
            self._end_disconnected()
        elif self._streaming:
            self._abort(error)
        else:
            self._refuse(error)

    def _log_upstream_error(self, error: UpstreamError) -> None:
        assert self._target is not None
        logger.warning(
            "upstream error: %d %s https://%s%s: %s (%s)%s%s",
            self.get_status() if self._streaming else error.status,
            self.request.method,
            self._target.host,
            self._target.path,
            error.detail,
            type(error).__name__,
            "; the job may have run" if error.may_have_run else "",
            "; the response was aborted" if self._streaming else "",
            extra=self._extra,
        )


def _check_budget(budget: BufferBudget) -> None:
    """Raise BuffersFull where the budget is exhausted."""
    if budget.exhausted:
        raise BuffersFull(f"{budget.used} bytes buffered, of max_buffered_bytes={budget.limit}")


def _authorization(key: object) -> bytes:
    """Return the header line for a key that the operator's function returned. Raise KeyMissing."""
    if not key:
        raise KeyMissing("resolve_key returned no key for this call")
    if not isinstance(key, str):
        raise KeyMissing(f"resolve_key returned a {type(key).__name__}, not a key")
    return authorization_line(key, "the key that resolve_key returned")
