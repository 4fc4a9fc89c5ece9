"""The request handler that an application mounts: from the caller's request to the caller's answer.

Strategy. ``prepare()`` decides everything that the head of a request can decide and answers a refused call there, so
that no body is buffered for it. The body is collected up to its bound, the call goes to
:class:`~tornado_fal_proxy.upstream.UpstreamClient`, and the answer goes out in one of two ways:

* in one write, with ``content-length``: whatever is complete already, and every plain result of a POST that fits
  ``hold_bytes``. fal's clients send a POST again, and pay again, when its body breaks off; so it must not.
* as a stream: event streams, and the answers of GETs. The head at once, then each piece as it came, and libcurl is
  paused while the caller does not read. A stream that breaks upstream is broken off here, never ended cleanly.

The handler touches nothing global and nothing of the application's: every answer it makes by itself is
``{"message": ...}``, whatever the application's settings or base classes say about errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import socket
import struct
import sys
import traceback
import weakref
from collections.abc import Callable
from functools import partial
from http.client import responses
from typing import Any

from tornado.http1connection import HTTP1Connection
from tornado.httputil import HTTPHeaders, ResponseStartLine
from tornado.iostream import IOStream, StreamClosedError
from tornado.web import Application, Finish, HTTPError, RequestHandler, stream_request_body

from tornado_fal_proxy.config import ProxyConfig, authorization_line
from tornado_fal_proxy.cors import CORS_PREFIX, CorsRules, vary
from tornado_fal_proxy.errors import (
    AccessRefused,
    BodyTooLarge,
    BodyTooSlow,
    CallerGone,
    KeyMissing,
    MethodNotAllowed,
    Misconfigured,
    OriginNotAllowed,
    ProxyError,
    Unauthorized,
    UpstreamError,
)
from tornado_fal_proxy.hangup import HangupWatch
from tornado_fal_proxy.policy import ResponseHead, Target, decide, request_headers
from tornado_fal_proxy.telemetry import REQUEST_ID, Call
from tornado_fal_proxy.transfer import HIGH_WATER_BYTES, Transfer
from tornado_fal_proxy.upstream import UpstreamClient

__all__ = ["FalProxyHandler", "close_upstreams", "upstreams"]

logger = logging.getLogger("tornado_fal_proxy")

# How long the rest of a refused request's body is read and thrown away. Closing at once would reset the connection
# under a caller that is still sending, who then never sees the answer.
LINGER_S = 5.0
# Of a body that is on its way this much must come in this long, again and again, or the call is answered 408: else a
# caller would hold a place with nothing. It outlasts a change from one network to another, and is less than a phone
# sends over EDGE.
BODY_WINDOW_S, BODY_WINDOW_BYTES = 30.0, 128 * 1024
# How often that is looked at, while there is such a body.
BODY_SWEEP_S = 5.0

_DEFAULT_CONFIG = ProxyConfig()

# From Python 3.12 on a task can take its first step when it is made.
_EagerTask: Callable[..., asyncio.Task[None]] = (
    partial(asyncio.Task, eager_start=True) if sys.version_info >= (3, 12) else asyncio.Task
)


class _Backend:
    """What the handlers of one configuration share on one loop: connections to fal, and a watch over their callers.

    Bytes of a caller's that nobody reads yet, such as its next request, keep Tornado from seeing that it leaves. And
    Tornado waits for the rest of a body for as long as the connection lives.
    """

    def __init__(self, config: ProxyConfig) -> None:
        self.client = UpstreamClient(force_instance=True, config=config)
        self._loop = asyncio.get_running_loop()
        self._watch = HangupWatch()
        self._callers: dict[int, weakref.ref[IOStream]] = {}
        # Handlers whose body is on its way, with the time and what had come when that was looked at last.
        self.arriving: dict[FalProxyHandler, tuple[float, int]] = {}
        self._sweep: asyncio.TimerHandle | None = None
        if (fd := self._watch.fileno()) is not None:
            self._loop.add_reader(fd, self._close_left)

    def watch(self, caller: IOStream) -> None:
        """From now on close ``caller`` as soon as its peer leaves, and so tell the handler that serves it then."""
        fd = caller.socket.fileno()
        known = self._callers.get(fd)
        if known is None or known() is not caller:
            self._callers[fd] = weakref.ref(caller)
            self._watch.add(fd)

    def _close_left(self) -> None:
        for fd in self._watch.hung_up():
            caller = self._callers.pop(fd)()
            if caller is not None:
                caller.close()

    def expect_body(self, handler: FalProxyHandler) -> None:
        """From now on the body must come, until ``handler`` is taken out of :attr:`arriving`."""
        self.arriving[handler] = self._loop.time(), 0
        if self._sweep is None:
            self._sweep = self._loop.call_later(BODY_SWEEP_S, self._end_slow_bodies)

    def _end_slow_bodies(self) -> None:
        now = self._loop.time()
        for handler, (since, size) in list(self.arriving.items()):
            received = handler.received_so_far()
            if received is None:
                del self.arriving[handler]
            elif now - since >= BODY_WINDOW_S:
                self.arriving[handler] = now, received
                if received - size < BODY_WINDOW_BYTES:
                    handler.give_up_body()
        self._sweep = self._loop.call_later(BODY_SWEEP_S, self._end_slow_bodies) if self.arriving else None

    def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        self.arriving.clear()
        if (fd := self._watch.fileno()) is not None:
            self._loop.remove_reader(fd)
        self._watch.close()
        self.client.close()


_backends: weakref.WeakKeyDictionary[Application, dict[tuple[ProxyConfig, Any], _Backend]] = weakref.WeakKeyDictionary()


def close_upstreams(application: Application) -> None:
    """End all upstream transfers of ``application`` and close its connections to fal.

    For the end of an application's life, after its server has stopped; a call that comes later opens new ones.
    """
    for backend in _backends.pop(application, {}).values():
        backend.close()


def upstreams(application: Application) -> list[UpstreamClient]:
    """The clients of ``application`` that were made so far: one for each configuration and loop."""
    return [backend.client for backend in _backends.get(application, {}).values()]


@stream_request_body
class FalProxyHandler(RequestHandler):
    """Relays ``GET`` and ``POST`` to the URL in ``x-fal-target-url``, with the key added.

    Mount it as ``(r"/api/fal/proxy", FalProxyHandler)``, with ``{"config": ProxyConfig(...)}`` as third element to
    configure it. Subclasses may override :meth:`authorize` and :meth:`resolve_key`, as coroutines or plain methods;
    those that override :meth:`prepare` must ``await super().prepare()``.

    Source: fal's "server-side integration" page, "the proxy formula".
    """

    def initialize(self, config: ProxyConfig | None = None, **unknown: object) -> None:
        # Tornado calls this for every request, and an exception here would close the connection without an answer.
        self._config = config or _DEFAULT_CONFIG
        self._misconfigured = ""
        if unknown:
            self._misconfigured = f"FalProxyHandler takes the keyword config, not {', '.join(sorted(unknown))}"
        elif not isinstance(self._config, ProxyConfig):
            self._misconfigured = f"FalProxyHandler's config must be a ProxyConfig, not {type(config).__name__}"
        self._cors: CorsRules | None = None if self._misconfigured else self._config.cors
        if self._cors is not None:
            self._add_cors_headers(self._cors)  # for answers that are the subclass's own
        self._target: Target | None = None
        self._lines: list[bytes] = []
        self._backend: _Backend | None = None
        self._transfer: Transfer | None = None
        self._body: list[bytes] = []
        self._body_size = 0
        self._answered = False
        self._streaming = False
        self._linger: asyncio.TimerHandle | None = None
        #: What is known of this call so far, for logs; see :meth:`on_call_end`.
        self.call = Call(self.request.method or "", self.request.headers.get(REQUEST_ID))
        self._over = False
        self._headers[REQUEST_ID] = self.call.request_id

    # The way in.

    def _execute(self, transforms: list[Any], *args: bytes, **kwargs: bytes) -> Any:
        """As Tornado's, but its first step is taken at once, and not in the loop's next turn."""
        call = super()._execute(transforms, *args, **kwargs)
        return _EagerTask(call, loop=asyncio.get_running_loop())

    async def prepare(self) -> None:
        """Decide whether the call may pass, before its body is read; a refused call is answered here."""
        # data_received keeps the bound, and answers; Tornado's own cuts the connection.
        self._connection.set_max_body_size(2**62)
        try:
            if self._misconfigured:
                raise Misconfigured(self._misconfigured)
            config = self._config
            self._pairs = [(name.lower(), value) for name, value in self.request.headers.get_all()]
            if self._cors is not None and self._is_preflight():
                self._answer_preflight(self._cors)
                return
            target = decide(
                self.request.method or "", self._pairs, max_body_bytes=config.max_body_bytes, access=config.access
            )
            self.call.target = target
            backend = self._shared_backend()
            if config.authorize is not None or type(self).authorize is not FalProxyHandler.authorize:
                backend.watch(self._connection.stream)
                if not await self._ask(self.authorize, target):
                    raise Unauthorized
            if config.resolve_key is not None or type(self).resolve_key is not FalProxyHandler.resolve_key:
                backend.watch(self._connection.stream)
                authorization = _authorization(await self._ask(self.resolve_key, target))
            else:
                authorization = config.authorization()
            self._lines, self._pairs = request_headers(self._pairs, authorization), []
            # Nothing is awaited from here on, so a place that is taken is always given back.
            backend.client.admit()
            self._backend = backend
            self._target = target
            headers = self.request.headers
            if "Content-Length" in headers or "Transfer-Encoding" in headers:
                backend.expect_body(self)
        except CallerGone:
            self._answered = True
            self._caller_has_gone()
        except ProxyError as exc:
            self._refuse(exc)

    async def authorize(self, target: Target) -> Any:
        """Whether the caller may make this call, which the rules allow: a false result is answered 401.

        Called before the body is read. To refuse in another way, raise :class:`tornado.web.HTTPError`: its status and
        reason are the answer. Asks ``ProxyConfig.authorize``; without one everybody may.
        """
        authorize = self._config.authorize
        return authorize is None or await _result(authorize(self, target))

    async def resolve_key(self, target: Target) -> Any:
        """The key for this call, as ``ProxyConfig.resolve_key`` or else the configuration has it; None: it has none."""
        resolve_key = self._config.resolve_key
        return self._config.any_key() if resolve_key is None else await _result(resolve_key(self, target))

    async def _ask(self, function: Any, target: Target) -> Any:
        """What the operator's function says. Raises CallerGone, and Misconfigured for an exception of its own.

        Of that the log gets the kind and the place. Its text might hold a key, or what a caller has sent.
        """
        try:
            result = await _result(function(target))
        except (HTTPError, Finish, ProxyError):
            raise
        except Exception as exc:  # noqa: BLE001  (the operator's code may raise anything; it is logged)
            raise Misconfigured(_raised(getattr(function, "__name__", "a function"), exc)) from None
        if self._finished or self._connection.stream.closed():
            raise CallerGone  # or it has its answer already, from that function
        return result

    def data_received(self, chunk: bytes) -> None:
        if self._answered:
            return  # lingering
        self._body_size = self.call.received_bytes = self._body_size + len(chunk)
        if self._body_size > self._config.max_body_bytes:
            self._body.clear()
            self._refuse(BodyTooLarge())
        else:
            self._body.append(chunk)

    def received_so_far(self) -> int | None:
        """How much of the body has come; None when all of it has."""
        return None if self.request._body_future.done() else self._body_size

    def give_up_body(self) -> None:
        """Answer a caller whose body does not come, and give back its place."""
        self._body.clear()
        self._refuse(BodyTooSlow())

    async def get(self, *_args: str, **_kwargs: str) -> None:
        await self._relay()

    async def post(self, *_args: str, **_kwargs: str) -> None:
        target = self._target
        if self._answered or target is None:
            pass
        elif (access := self._config.access) is not None and access.judges_body(target):
            try:
                access.check_body(b"".join(self._body))
            except AccessRefused as exc:
                self._refuse(exc)
        await self._relay()

    async def put(self, *_args: str, **_kwargs: str) -> None:
        """A queued job's cancel, where ``allow_cancel`` is set; prepare() has answered all else."""
        await self._relay()

    async def _refused(self, *_args: str, **_kwargs: str) -> None:
        """Every other method was answered by prepare(), and its body has been read away by now."""

    head = patch = delete = options = _refused

    # Pages of other origins.

    def _is_preflight(self) -> bool:
        names = {name for name, _ in self._pairs}
        return self.request.method == "OPTIONS" and {"origin", "access-control-request-method"} <= names

    def _answer_preflight(self, cors: CorsRules) -> None:
        if not cors.allows(self._origin()):
            raise OriginNotAllowed
        for name, value in cors.preflight_headers(self.request.headers.get("Access-Control-Request-Headers")):
            self.set_header(name, value)
        self._set_vary("Origin", "Access-Control-Request-Method", "Access-Control-Request-Headers")
        self._answered = True
        self.set_status(204)
        self._end_call()
        self._send(b"")

    def _add_cors_headers(self, cors: CorsRules) -> None:
        """Say who may read the answer, whatever it says of that by itself."""
        for name in [name for name in self._headers if name.lower().startswith(CORS_PREFIX)]:
            del self._headers[name]
        for name, value in cors.answer_headers(self._origin()):
            self._headers[name] = value
        self._set_vary("Origin")

    def _set_vary(self, *names: str) -> None:
        first, *more = vary(self._headers.get_list("Vary"), *names)
        self._headers["Vary"] = first
        for line in more:
            self._headers.add("Vary", line)

    def _origin(self) -> str | None:
        origins = self.request.headers.get_list("Origin")
        return origins[0] if len(origins) == 1 else None

    # The relay.

    def clear(self) -> None:
        """As Tornado's, but without its Server, Date and Content-Type: here the target's stand, or none."""
        self._headers = HTTPHeaders()
        self.set_default_headers()
        self._write_buffer = []
        self._status_code, self._reason = 200, responses[200]

    async def _relay(self) -> None:
        if self._answered:
            return
        if self._target is None or self._backend is None:
            raise RuntimeError("FalProxyHandler.prepare() did not run: a subclass must await super().prepare()")
        self._backend.arriving.pop(self, None)
        caller = self._connection.stream
        if caller.closed():
            self._caller_has_gone()
            return
        call = self.call
        post = self.request.method == "POST"
        body = b"".join(self._body)
        self._body.clear()
        try:
            transfer = self._transfer = self._backend.client.start(
                self.request.method or "",
                self._target,
                self._lines,
                body,
                high_water=self._config.hold_bytes if post else HIGH_WATER_BYTES,
            )
            self._lines = []
            call.relayed = True
            self._backend.watch(caller)
            head = await transfer.read_head()
            held = (post and not head.event_stream) or not head.has_body
            whole = (held or transfer.complete) and await transfer.hold()
            self._copy_head(head)
            call.head = head
            call.answer_begins()
            if whole:
                await self._write_whole(head, transfer.take())
            else:
                await self._write_stream(head, transfer)
            self._end_call()
        except (CallerGone, StreamClosedError) as exc:
            exc.__traceback__ = None  # it holds the frames that hold the future that holds it
            self._caller_has_gone()
        except UpstreamError as exc:
            self._log_upstream_error(exc)
            if self._streaming:
                self._break_off(exc)
            else:
                self._refuse(exc)
        finally:
            if self._transfer is not None:
                self._transfer.cancel()
            if self._finished:
                self._end_call()

    def _copy_head(self, head: ResponseHead) -> None:
        self.set_status(head.status, responses.get(head.status, "Unknown"))
        # parse_response_head has checked names and values. The target's headers win over the application's.
        headers = self._headers
        names = set()
        for name, value in head.headers:
            if name in names:
                headers.add(name, value)
            else:
                names.add(name)
                headers[name] = value
        headers[REQUEST_ID] = self.call.request_id
        if self._cors is not None:
            self._add_cors_headers(self._cors)

    async def _write_whole(self, head: ResponseHead, body: bytes) -> None:
        self.call.sent_bytes = len(body)
        if not head.has_body:
            # finish() alone would strip headers that describe the representation, such as a 304's content-type.
            self.flush(include_footers=True)
        if not body or self._transforms or self._headers_written or hasattr(self, "_new_cookie"):
            await self._delivered(self.finish(body or None))
        else:
            await self._delivered(self._finish_with(body))

    def _finish_with(self, body: bytes) -> asyncio.Future[None]:
        """As Tornado's ``finish(body)``, for an answer of which nothing is to be changed or found out any more."""
        connection = self._connection
        connection.set_close_callback(None)
        self._headers["Content-Length"] = str(len(body))
        self._headers_written = True
        start_line = ResponseStartLine("", self._status_code, self._reason)
        written = connection.write_headers(start_line, self._headers, body)
        connection.finish()
        self._log()
        self._finished = True
        self.on_finish()
        self._break_cycles()
        return written

    async def _write_stream(self, head: ResponseHead, transfer: Transfer) -> None:
        if head.length is not None:
            self.set_header("Content-Length", head.length)
        if head.event_stream:
            self._headers["X-Accel-Buffering"] = "no"  # nginx, which buffers answers by default, takes it out again
        self._streaming = True
        self._connection.stream.set_nodelay(True)
        await self._delivered(self.flush())
        undecoded = b""
        while chunk := await transfer.read():
            if head.event_stream:
                # fal's client decodes each chunk by itself and breaks where a character is cut in two.
                chunk, undecoded = split_utf8(undecoded + transfer.read_rest_of_line(chunk))
            else:
                chunk = transfer.read_rest(chunk)
            if chunk:
                self.call.sent_bytes += len(chunk)
                self.write(chunk)
                await self._delivered(self.flush())
        if undecoded:
            self.call.sent_bytes += len(undecoded)
            self.write(undecoded)
        self._streaming = False
        await self._delivered(self.finish())
        if self.request.version == "HTTP/1.0" and head.length is None:
            # Only closing ends such an answer, and Tornado keeps the connection when the caller asked for keep-alive.
            self._connection.close()

    async def _delivered(self, written: asyncio.Future[None]) -> None:
        """Wait while the caller's end is full. Raises CallerGone after ``idle_timeout_s`` of that."""
        if self._connection.stream.writing():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(written, self._config.idle_timeout_s)
                stream = self._connection.stream
                if stream.closed() and stream._total_write_done_index < stream._total_write_index:
                    raise CallerGone  # Tornado says of this too that it was written
                return
            # Not where the time-out is caught: that would hold this frame, which holds what is raised.
            self._break_off(CallerGone("the caller stopped reading"))
            raise CallerGone

    # Answers of our own.

    def _refuse(self, error: ProxyError) -> None:
        """Answer with ``error``, and leave the connection in a state in which the caller sees it."""
        level = logging.ERROR if error.status == 500 else logging.INFO
        if not isinstance(error, UpstreamError):
            logger.log(
                level, "%d %s: %s", error.status, self.request.method, error.detail or error.message, extra=self._extra
            )
        self._answer(error.status, error.message, error.headers, error)

    def _answer(
        self,
        status: int,
        message: str,
        headers: tuple[tuple[str, str], ...] = (),
        error: BaseException | None = None,
    ) -> None:
        self._answered = True
        self._release()
        super().clear()
        self.set_status(status)
        for name, value in headers:
            self.set_header(name, value)
        if self._cors is not None:
            self._add_cors_headers(self._cors)
        self.set_header("Content-Type", "application/json")
        self._headers[REQUEST_ID] = self.call.request_id
        body = json.dumps({"message": message}).encode()
        self.call.sent_bytes = len(body)
        self.call.answer_begins()
        self._end_call(error)
        self._send(body)

    def _send(self, body: bytes) -> None:
        """Finish an answer of our own, while the request may still be coming."""
        if self.request._body_future.done() or "Expect" in self.request.headers:
            self.finish(body or None)
            return
        # The answer is complete with this. To finish() now would close the connection, a body being on its way or not;
        # that follows when the body was read away or LINGER_S are over.
        if body:
            self.set_header("Content-Length", len(body))
            self.write(body)
        self.flush()
        self._linger = asyncio.get_running_loop().call_later(LINGER_S, self._end_linger)
        self.request._body_future.add_done_callback(self._end_linger)

    def _end_linger(self, body_is_read: asyncio.Future[None] | None = None) -> None:
        if body_is_read is not None and body_is_read.exception() is not None:
            return  # the caller has left
        if not self._finished:
            self.finish()

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        """Answer an exception (an HTTPError of a subclass or of Tornado, or a bug) as fal's clients expect it."""
        exception = kwargs.get("exc_info", (None, None, None))[1]
        if self._streaming:
            self._break_off(exception)
        elif not self._answered:
            reason = exception.reason if isinstance(exception, HTTPError) else None
            headers = MethodNotAllowed.headers if status_code == 405 else ()
            self._answer(status_code, reason or responses.get(status_code, "Unknown"), headers, exception)

    # The way out.

    def on_connection_close(self) -> None:
        prepared = self._prepared_future is not None and self._prepared_future.done()
        waits_for_body = prepared and not self.request._body_future.done()
        super().on_connection_close()
        self._body.clear()
        if waits_for_body:
            # Nothing of this handler will run but Tornado's wait, which raises what the future holds, in a frame that
            # holds the handler. With another future in its place, and without ui, no cycle is left.
            self.request._body_future = asyncio.get_running_loop().create_future()
            self.request._body_future.set_result(None)
            self._break_cycles()
        if self._transfer is not None:
            self._transfer.cancel()
        self._caller_has_gone()
        self.on_finish()

    def on_finish(self) -> None:
        if not self.call.relayed:
            self._end_call()  # an answer of a subclass's own
        self._release()
        if self._linger is not None:
            self._linger.cancel()

    def _release(self) -> None:
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.arriving.pop(self, None)
            backend.client.release()

    def _caller_has_gone(self) -> None:
        self.set_status(CallerGone.status)  # for logs; nobody reads it
        self._end_call(CallerGone())

    def _end_call(self, error: BaseException | None = None) -> None:
        if self._over:
            return
        self._over = True
        self.call.ends(self._status_code, error)
        try:
            self.on_call_end(self.call)
        except Exception as exc:  # noqa: BLE001  (nobody's answer shall depend on what is told of it)
            logger.error("%s", _raised("on_call_end", exc), extra=self._extra)

    def on_call_end(self, call: Call) -> None:
        """Called once for each call when it is over, for logs and metrics: override it. It must not wait.

        The caller has its answer, or has left, or is sent the last of a refusal.
        """

    def _break_off(self, error: BaseException | None) -> None:
        """End the connection so that the caller cannot take what it has for a complete answer."""
        self._end_call(error)
        connection = self._connection
        if self.request.version == "HTTP/1.0" and not connection.stream.closed():
            # Here a clean close may be the mark of a complete answer. A reset is not.
            connection.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    # Ours against the application's settings.

    def check_xsrf_cookie(self) -> None:
        """Nothing: fal's clients send no token, and no cross-site form can send ``x-fal-target-url``."""

    def compute_etag(self) -> None:
        """None: the answer is the target's, and so is its validator."""

    def check_etag_header(self) -> bool:
        """False: only the target may answer 304."""
        return False

    # Helpers.

    @property
    def _connection(self) -> HTTP1Connection:
        connection = self.request.connection
        assert isinstance(connection, HTTP1Connection)  # the only kind that Tornado has
        return connection

    def _shared_backend(self) -> _Backend:
        """The backend of this configuration on the running loop: made on the first call, so after any fork."""
        backends = _backends.setdefault(self.application, {})
        key = (self._config, asyncio.get_running_loop())
        backend = backends.get(key)
        if backend is None:
            backend = backends[key] = _Backend(self._config)
        return backend

    def _log_upstream_error(self, error: UpstreamError) -> None:
        assert self._target is not None
        logger.warning(
            "%d %s https://%s%s: %s (%s)%s%s",
            self.get_status() if self._streaming else error.status,
            self.request.method,
            self._target.host,
            self._target.path,
            error.detail,
            type(error).__name__,
            "; the job may have run" if error.may_have_run else "",
            "; the answer was broken off" if self._streaming else "",
            extra=self._extra,
        )

    @property
    def _extra(self) -> dict[str, str]:
        """What formatters may show beside the message."""
        return {"request_id": self.call.request_id}


async def _result(value: Any) -> Any:
    """``value``, or what it becomes when it is awaited."""
    return await value if inspect.isawaitable(value) else value


def _raised(name: str, exc: Exception) -> str:
    """What to log of an exception of the operator's code: not its text, which may hold anything."""
    return f"{name} raised {type(exc).__name__}\n{''.join(traceback.format_tb(exc.__traceback__)).rstrip()}"


def _authorization(key: object) -> bytes:
    """The header line for a key that the operator's function gave. Raises KeyMissing."""
    if not key:
        raise KeyMissing("resolve_key gave no key for this call")
    if not isinstance(key, str):
        raise KeyMissing(f"resolve_key gave a {type(key).__name__}, not a key")
    return authorization_line(key, "the key that resolve_key gave")


def split_utf8(data: bytes) -> tuple[bytes, bytes]:
    """``data`` without a character that is cut off at its end, and that beginning of a character (3 bytes at most)."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte < 0x80:
            break
        if 0xC0 <= byte < 0xF8:  # the first byte of a character of 2, 3 or 4 bytes
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            if needed > back:
                return data[:-back], data[-back:]
            break
    return data, b""
