"""The handlers of fal's own hosts: run, stream, queue, tokens, storage. Their paths are in ``server``."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
import time
import uuid
from datetime import UTC, datetime
from http.client import responses
from typing import Any

from tornado.iostream import StreamClosedError
from tornado.web import RequestHandler

from tornado_fal_proxy.sandbox.jobs import (
    EVENT_GAP_S,
    EVENTS,
    LIFE,
    QUEUE_S,
    RUN_S,
    SAMPLE,
    Fault,
    Job,
    invalid,
    refuse,
    text_of,
)
from tornado_fal_proxy.sandbox.state import SandboxState, file_url

# The longest time until a stream of statuses notices that its job was cancelled: a moment for the person who cancelled.
CANCEL_NOTICE_S = 0.25
# A name or an address, and a port: nothing else that a Host header may have belongs into a URL.
_HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[1-9][0-9]{0,4})?")


class FalHandler(RequestHandler):
    """The base of all endpoints: it checks the key, reads and writes JSON, and adds a request id."""

    def initialize(self, state: SandboxState) -> None:
        self.state = state

    def set_default_headers(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.set_header("X-Fal-Request-Id", str(uuid.uuid4()))

    def prepare(self) -> None:
        call = asyncio.current_task()
        if call:
            self.state.calls.add(call)
            call.add_done_callback(self.state.calls.discard)
        given = self.request.headers.get("Authorization", "")
        if not given:
            refuse(401, "Authentication is required to access this application.")
        if not hmac.compare_digest(given.encode(), f"Key {self.state.key}".encode()):
            refuse(401, "No user found for Key ID and Secret")

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs["exc_info"][1]
        self.respond(error.body if isinstance(error, Fault) else {"detail": self._reason}, status_code)

    def respond(self, body: object, status: int = 200) -> None:
        """Finish the response with a JSON body."""
        self.set_status(status, responses.get(status, "Unknown"))
        self.finish(json.dumps(body))

    def bill(self, job: Job) -> None:
        """Add the bill to a response, as fal does to a result."""
        self.set_header("X-Fal-Billable-Units", str(job.units))

    def public_url(self) -> str:
        """Return where the client of this call reaches the application of the proxy; an empty text if nobody knows."""
        host = self.request.headers.get(self.state.host_header, "")
        return f"http://{host}" if _HOST.fullmatch(host) else self.state.public_url

    def fields(self) -> dict[str, Any]:
        """Return the input: the JSON body, or the query of a GET."""
        try:
            if self.request.method == "GET":
                query: dict[str, Any] = {name: self.get_query_argument(name) for name in self.request.query_arguments}
                return {**query, "sandbox": json.loads(query["sandbox"])} if "sandbox" in query else query
            body = json.loads(self.request.body or b"{}")
        except (ValueError, RecursionError) as error:
            invalid("json_invalid", ["body", getattr(error, "pos", 0)], "JSON decode error")
        if not isinstance(body, dict):
            invalid("dict_type", ["body"], "Input should be a valid dictionary")
        return body

    def job(self, app: str, request_id: str) -> Job:
        """Return the queued job, or raise a 404, also if the id exists under another application's name."""
        job = self.state.jobs.get(request_id)
        if job is None or job.app != app:
            raise Fault(404, {"detail": "Request not found", "status": "NOT_FOUND"})
        self.set_header("X-Fal-Request-Id", job.id)
        return job

    def logs_from(self) -> int | None:
        """Return the step at which the job's log begins, 0, or None without ``?logs=1``."""
        return 0 if self.get_query_argument("logs", "0") == "1" else None

    async def event(self, data: object) -> None:
        """Send one event of a stream at once. Raise StreamClosedError if the client has disconnected."""
        self.set_header("Content-Type", "text/event-stream; charset=utf-8")
        self.set_header("Cache-Control", "no-cache")
        self.write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n")
        await self.flush()


class Unknown(FalHandler):
    """Any other host or path: a 404."""

    def prepare(self) -> None:
        super().prepare()
        refuse(404, f"Path {self.request.path} not found")


class Run(FalHandler):
    """fal.run/{id}: the result, after a while."""

    async def post(self, app: str) -> None:
        job = self.state.accept(app, self.fields(), RUN_S)
        self.set_header("X-Fal-Request-Id", job.id)
        await self.state.sleep(job.duration_s)
        self.bill(job)
        self.respond(self.state.result(job, self.public_url()))

    get = post


class Stream(FalHandler):
    """fal.run/{id}/stream: a text that grows, as a language model's does."""

    async def post(self, app: str) -> None:
        job = self.state.accept(app, self.fields(), EVENT_GAP_S)
        self.set_header("X-Fal-Request-Id", job.id)
        text = text_of(job.scenario.text, f"{SAMPLE}({job.prompt})")
        await self.state.sleep(job.duration_s)
        self.bill(job)
        try:
            for index in range(1, EVENTS + 1):
                await self.event({"output": text[: len(text) * index // EVENTS], "partial": index < EVENTS})
                if index < EVENTS and not await self.state.sleep(EVENT_GAP_S * self.state.pace):
                    return
        except StreamClosedError:
            return


class Submit(FalHandler):
    """queue.fal.run/{id}: a new job in the queue."""

    def post(self, app: str) -> None:
        job = self.state.accept(app, self.fields(), QUEUE_S)
        self.state.enqueue(job)
        self.set_header("X-Fal-Request-Id", job.id)
        self.respond(job.status(0, None))


class Status(FalHandler):
    """queue.fal.run/{id}/requests/{request_id}/status: the status, which clients poll."""

    def get(self, app: str, request_id: str) -> None:
        job = self.job(app, request_id)
        self.state.fail(job.scenario, "status")
        self.respond(job.status(job.step(time.time()), self.logs_from()))


class StatusStream(FalHandler):
    """.../requests/{request_id}/status/stream: an event for each step, with only the new lines of the log."""

    async def get(self, app: str, request_id: str) -> None:
        job = self.job(app, request_id)
        self.state.fail(job.scenario, "status")
        logs_from = self.logs_from()
        try:
            while True:
                step = job.step(time.time())
                await self.event(job.status(step, logs_from))
                if step == len(LIFE) - 1:
                    return
                logs_from = None if logs_from is None else step + 1
                while job.step(time.time()) == step:  # a timer may fire a moment too early
                    rest_s = max(0.001, job.begins(step + 1) - time.time())
                    if not await self.state.sleep(min(rest_s, CANCEL_NOTICE_S)):
                        return
        except StreamClosedError:
            return


class Result(FalHandler):
    """.../requests/{request_id}: the result, once the job has completed."""

    def get(self, app: str, request_id: str) -> None:
        job = self.job(app, request_id)
        if job.cancelled:
            refuse(499, "Request was cancelled")
        if job.step(time.time()) < len(LIFE) - 1:
            refuse(400, "Request is still in progress")
        self.state.fail(job.scenario, "result")
        self.bill(job)
        self.respond(self.state.result(job, self.public_url()))


class Cancel(FalHandler):
    """.../requests/{request_id}/cancel: the end of a job that has not completed."""

    def put(self, app: str, request_id: str) -> None:
        job = self.job(app, request_id)
        if job.step(time.time()) == len(LIFE) - 1:
            raise Fault(400, {"status": "ALREADY_COMPLETED"})
        job.cancelled = True
        self.respond({"status": "CANCELLATION_REQUESTED"}, 202)


def token() -> str:
    """Return a text that looks like a token."""
    return ".".join(secrets.token_urlsafe(size) for size in (27, 60, 32))


class Tokens(FalHandler):
    """rest.fal.ai/tokens/: a token for a WebSocket, which the sandbox does not serve. SDKs read a bare JSON string."""

    def post(self) -> None:
        if not isinstance(self.fields().get("allowed_apps"), list):
            invalid("missing", ["body", "allowed_apps"], "Field required")
        self.respond(token())


class PathTokens(FalHandler):
    """rest.fal.ai/tokens/realtime: the same for whole paths of endpoints, in an object."""

    def post(self) -> None:
        fields = self.fields()
        for name, kind in (("allowed_apps", list), ("duration", int)):
            if not isinstance(fields.get(name), kind):
                invalid("missing", ["body", name], "Field required")
        self.respond({"token": token()})


class UploadToken(FalHandler):
    """rest.fal.ai/storage/auth/token: a token for uploads, which the stand-in of the CDN does not ask for."""

    def post(self) -> None:
        expires_at = datetime.fromtimestamp(time.time() + 3600, UTC).isoformat()
        base_url = f"{self.public_url()}/sandbox"
        self.respond({"token": token(), "token_type": "Bearer", "base_url": base_url, "expires_at": expires_at})


class Ice(FalHandler):
    """wma.fal.run/ice and fal.run/{id}/ice: the servers through which media find their way."""

    def post(self, *_app: str) -> None:
        self.respond({"ice_servers": [{"urls": ["stun:stun.example.com:3478"]}]})


class Session(FalHandler):
    """wma.fal.run/session: the answer to an offer of media, which stays open until the client leaves."""

    _has_left = False

    def on_connection_close(self) -> None:
        self._has_left = True

    async def post(self) -> None:
        app = self.fields().get("app_id")
        if not isinstance(app, str):
            invalid("missing", ["body", "app_id"], "Field required")
        session = self.state.accept(text_of(app, ""), {}, 0).id
        self.state.sessions.add(session)
        try:
            self.write(json.dumps({"session_id": session, "sdp": "v=0\r\n", "type": "answer"}) + "\n")
            await self.flush()
            while await self.state.sleep(CANCEL_NOTICE_S) and not self._has_left:
                pass
        except StreamClosedError:
            pass
        finally:
            self.state.sessions.discard(session)


class Heartbeat(FalHandler):
    """wma.fal.run/session/heartbeat: whether a session is open."""

    def post(self) -> None:
        self.respond({"alive": self.fields().get("session_id") in self.state.sessions})


class Initiate(FalHandler):
    """rest.fal.ai/storage/upload/initiate and initiate-multipart: the URL of a new empty file for an upload."""

    def post(self) -> None:
        fields = self.fields()
        public_url = self.public_url()
        if not public_url:
            refuse(503, "Uploads need the address of the proxy: set Sandbox.public_url")
        kind = str(fields.get("content_type", ""))
        if not re.fullmatch(r"[\w.+-]+/[\w.+;= -]+", kind, re.ASCII):
            kind = "application/octet-stream"
        plain = re.sub(r"[^\w.-]+", "_", str(fields.get("file_name", "file")), flags=re.ASCII)[-80:]
        name = f"{secrets.token_hex(8)}_{plain}"
        self.state.keep(name, kind, b"")
        self.respond(dict.fromkeys(("upload_url", "file_url"), file_url(public_url, name)))
