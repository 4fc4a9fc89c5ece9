"""HTTP/2: h2's state machine, and the exchanges by stream."""

import asyncio
from typing import TYPE_CHECKING

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
from hyperframe.frame import GoAwayFrame

from tests.support.scripted_upstream.exchange import Exchange, Headers, content_length, header_fields

if TYPE_CHECKING:
    from tests.support.scripted_upstream.connection import Connection

__all__ = ["Http2"]


class Http2:
    """One HTTP/2 connection: h2's state machine, and the exchanges by stream."""

    def __init__(self, connection: "Connection", max_concurrent_streams: int) -> None:
        self.connection = connection
        self.state = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=False,
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.state.initiate_connection()
        self._exchanges: dict[int, Http2Exchange] = {}
        self._last_stream_id: int | None = None  # once GOAWAY was sent
        # Sent as an update, because h2 enforces the limit only once the client has acknowledged it.
        self.limit_streams(max_concurrent_streams)

    def receive(self, data: bytes) -> None:
        for event in self.state.receive_data(data):
            self._take(event)
        self.flush()

    def flush(self) -> None:
        # Behind a lost connection asyncio warns of each write.
        if not self.connection.transport.is_closing():
            self.connection.transport.write(self.state.data_to_send())

    def goaway(self, last_stream_id: int | None, code: int) -> None:
        # By hand, because h2's close_connection() does not let the open streams finish.
        self._last_stream_id = self.state.highest_inbound_stream_id if last_stream_id is None else last_stream_id
        frame = GoAwayFrame(last_stream_id=self._last_stream_id, error_code=code)
        self.connection.transport.write(frame.serialize())

    def limit_streams(self, count: int) -> None:
        self.state.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: count})
        self.flush()

    def _take(self, event: h2.events.Event) -> None:  # noqa: C901  (one case for each kind)
        match event:
            case h2.events.RequestReceived(stream_id=stream_id):
                if self._last_stream_id is None or stream_id <= self._last_stream_id:
                    self._exchanges[stream_id] = exchange = Http2Exchange(self, event)
                    self.connection.begin(exchange)
            case h2.events.DataReceived(stream_id=stream_id, data=data, flow_controlled_length=length):
                self.state.acknowledge_received_data(length, stream_id)
                if stream_id in self._exchanges:
                    self._exchanges[stream_id].receive(data)
            case h2.events.StreamEnded(stream_id=stream_id) if stream_id in self._exchanges:
                self._exchanges[stream_id].receive_end()
            case h2.events.StreamReset(stream_id=stream_id) if stream_id in self._exchanges:
                exchange = self._exchanges[stream_id]
                if exchange in self.connection.unfinished:
                    self.connection.finish(exchange)
                    exchange.leave()
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                for exchange in self._exchanges.values():
                    exchange.window_changed.set()
            case h2.events.ConnectionTerminated():
                self.connection.leave()
                self.connection.transport.abort()


class Http2Exchange(Exchange):
    protocol = "h2"

    def __init__(self, codec: Http2, request: h2.events.RequestReceived) -> None:
        fields = [(bytes(name), bytes(value)) for name, value in request.headers]
        pseudo = dict(field for field in fields if field[0].startswith(b":"))
        headers = [field for field in fields if not field[0].startswith(b":")]
        authority = pseudo.get(b":authority", b"").decode()
        super().__init__(codec.connection, pseudo[b":method"].decode(), pseudo[b":path"], authority, headers)
        self.window_changed = asyncio.Event()
        self._codec = codec
        self._stream_id = request.stream_id

    async def respond(self, status: int, body: bytes = b"", headers: Headers = ()) -> None:
        self._queue_head(status, header_fields(headers, content_length(status, body)))
        await self._send(body, end=True)
        self._connection.finish(self)

    async def informational(self, status: int, headers: Headers = ()) -> None:
        self._queue_head(status, header_fields(headers))
        await self._flush()

    async def start(self, status: int, headers: Headers = (), length: int | None = None) -> None:
        self._queue_head(status, header_fields(headers, length))
        await self._flush()

    async def send(self, data: bytes) -> None:
        await self._send(data, end=False)

    async def end(self, trailers: Headers = ()) -> None:
        self._check_present()
        if fields := header_fields(trailers):
            self._codec.state.send_headers(self._stream_id, fields, end_stream=True)
        else:
            self._codec.state.end_stream(self._stream_id)
        self._connection.finish(self)
        self._codec.flush()
        await self._connection.drain()

    def reset(self, code: int = h2.errors.ErrorCodes.INTERNAL_ERROR) -> None:
        self._check_present()
        self._codec.state.reset_stream(self._stream_id, code)
        self._codec.flush()
        self._connection.finish(self)

    def goaway(self, last_stream_id: int | None = None, code: int = 0) -> None:
        self._codec.goaway(last_stream_id, code)

    def limit_streams(self, count: int) -> None:
        self._codec.limit_streams(count)

    def leave(self) -> None:
        super().leave()
        self.window_changed.set()

    def _queue_head(self, status: int, fields: list[tuple[bytes, bytes]]) -> None:
        self._check_present()
        self._codec.state.send_headers(self._stream_id, [(b":status", b"%d" % status), *fields])

    async def _send(self, data: bytes, *, end: bool) -> None:
        state, rest = self._codec.state, memoryview(data)
        while True:
            self._check_present()
            size = min(len(rest), state.local_flow_control_window(self._stream_id), state.max_outbound_frame_size)
            if rest and size <= 0:
                self.window_changed.clear()
                await self._flush()
                await self.window_changed.wait()
                continue
            last = size == len(rest)
            state.send_data(self._stream_id, bytes(rest[:size]), end_stream=end and last)
            rest = rest[size:]
            await self._flush()
            if last:
                return

    async def _flush(self) -> None:
        self._codec.flush()
        await self._connection.drain()
        self._check_present()
