"""The handlers of fal's own hosts: run, stream, queue, tokens, storage. The paths stand in ``server``."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
import time
import uuid
from http.client import responses
from typing import TYPE_CHECKING, Any

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
    trim,
)

if TYPE_CHECKING:
    from tornado_fal_proxy.sandbox.server import Sandbox

MAX_JOBS = 500
CANCEL_NOTICE_S = 0.25  # within this a stream of statuses tells that its job was cancelled


class FalHandler(RequestHandler):
    """What all of fal's endpoints share: the key, JSON both ways, a request id."""

    def initialize(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    def set_default_headers(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.set_header("X-Fal-Request-Id", str(uuid.uuid4()))

    def prepare(self) -> None:
        call = asyncio.current_task()
        if call:
            self.sandbox.calls.add(call)
            call.add_done_callback(self.sandbox.calls.discard)
        given = self.request.headers.get("Authorization", "")
        if not given:
            refuse(401, "Authentication is required to access this application.")
        if not hmac.compare_digest(given.encode(), f"Key {self.sandbox.key}".encode()):
            refuse(401, "No user found for Key ID and Secret")

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs["exc_info"][1]
        self.answer(error.body if isinstance(error, Fault) else {"detail": self._reason}, status_code)

    def answer(self, body: object, status: int = 200) -> None:
        """End the call with a JSON body."""
        self.set_status(status, responses.get(status, "Unknown"))
        self.finish(json.dumps(body))

    def fields(self) -> dict[str, Any]:
        """The input: the JSON body, or the query of a GET."""
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
        """The queued job, or 404: also for a known id under another application's name."""
        job = self.sandbox.jobs.get(request_id)
        if job is None or job.app != app:
            raise Fault(404, {"detail": "Request not found", "status": "NOT_FOUND"})
        self.set_header("X-Fal-Request-Id", job.id)
        return job

    def logs_from(self) -> int | None:
        """Where the job's log is to begin: at its first step, or nowhere without ``?logs=1``."""
        return 0 if self.get_query_argument("logs", "0") == "1" else None

    async def event(self, data: object) -> None:
        """Send one event of a stream by itself. Raises StreamClosedError when the caller is gone."""
        self.set_header("Content-Type", "text/event-stream; charset=utf-8")
        self.set_header("Cache-Control", "no-cache")
        self.write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n")
        await self.flush()


class Unknown(FalHandler):
    """Any other host or path."""

    def prepare(self) -> None:
        super().prepare()
        refuse(404, f"Path {self.request.path} not found")


class Run(FalHandler):
    """fal.run/{id}: wait, then the result."""

    async def post(self, app: str) -> None:
        job = self.sandbox.accept(app, self.fields(), RUN_S)
        self.set_header("X-Fal-Request-Id", job.id)
        await self.sandbox.sleep(job.duration_s)
        self.answer(self.sandbox.result(job))

    get = post


class Stream(FalHandler):
    """fal.run/{id}/stream: a text that grows, as a language model's does."""

    async def post(self, app: str) -> None:
        job = self.sandbox.accept(app, self.fields(), EVENT_GAP_S)
        self.set_header("X-Fal-Request-Id", job.id)
        text = text_of(job.wish.text, f"{SAMPLE}({job.prompt})")
        await self.sandbox.sleep(job.duration_s)
        try:
            for index in range(1, EVENTS + 1):
                await self.event({"output": text[: len(text) * index // EVENTS], "partial": index < EVENTS})
                if index < EVENTS and not await self.sandbox.sleep(EVENT_GAP_S * self.sandbox.pace):
                    return
        except StreamClosedError:
            return


class Submit(FalHandler):
    """queue.fal.run/{id}: a job is born."""

    def post(self, app: str) -> None:
        job = self.sandbox.accept(app, self.fields(), QUEUE_S)
        self.sandbox.jobs[job.id] = job
        trim(self.sandbox.jobs, MAX_JOBS)
        self.set_header("X-Fal-Request-Id", job.id)
        self.answer(job.status(0, None))


class Status(FalHandler):
    """.../requests/{rid}/status, asked again and again."""

    def get(self, app: str, request_id: str) -> None:
        job = self.job(app, request_id)
        self.sandbox.fail(job.wish, "status")
        self.answer(job.status(job.step(time.time()), self.logs_from()))


class StatusStream(FalHandler):
    """.../requests/{rid}/status/stream: an event for each step, with only the new lines of the log."""

    async def get(self, app: str, request_id: str) -> None:
        job = self.job(app, request_id)
        self.sandbox.fail(job.wish, "status")
        logs_from = self.logs_from()
        try:
            while True:
                step = job.step(time.time())
                await self.event(job.status(step, logs_from))
                if step == len(LIFE) - 1:
                    return
                logs_from = None if logs_from is None else step + 1
                while job.step(time.time()) == step:  # a timer may fire a moment early
                    rest_s = max(0.001, job.begins(step + 1) - time.time())
                    if not await self.sandbox.sleep(min(rest_s, CANCEL_NOTICE_S)):
                        return
        except StreamClosedError:
            return


class Result(FalHandler):
    """.../requests/{rid}"""

    def get(self, app: str, request_id: str) -> None:
        job = self.job(app, request_id)
        if job.cancelled:
            refuse(499, "Request was cancelled")
        if job.step(time.time()) < len(LIFE) - 1:
            refuse(400, "Request is still in progress")
        self.sandbox.fail(job.wish, "result")
        self.answer(self.sandbox.result(job))


class Cancel(FalHandler):
    """.../requests/{rid}/cancel"""

    def put(self, app: str, request_id: str) -> None:
        job = self.job(app, request_id)
        if job.step(time.time()) == len(LIFE) - 1:
            raise Fault(400, {"status": "ALREADY_COMPLETED"})
        job.cancelled = True
        self.answer({"status": "CANCELLATION_REQUESTED"}, 202)


class Tokens(FalHandler):
    """rest.fal.ai/tokens/: a token for a WebSocket that nobody serves here; the client reads a bare JSON string."""

    def post(self) -> None:
        if not isinstance(self.fields().get("allowed_apps"), list):
            invalid("missing", ["body", "allowed_apps"], "Field required")
        self.answer(".".join(secrets.token_urlsafe(size) for size in (27, 60, 32)))


class Initiate(FalHandler):
    """rest.fal.ai/storage/upload/initiate and initiate-multipart: an empty file, which its upload fills."""

    def post(self) -> None:
        fields = self.fields()
        if not self.sandbox.public_url:
            refuse(503, "The sandbox does not know its public_url, so it has no place for uploads")
        kind = str(fields.get("content_type", ""))
        if not re.fullmatch(r"[\w.+-]+/[\w.+;= -]+", kind, re.ASCII):
            kind = "application/octet-stream"
        plain = re.sub(r"[^\w.-]+", "_", str(fields.get("file_name", "file")), flags=re.ASCII)[-80:]
        name = f"{secrets.token_hex(8)}_{plain}"
        self.sandbox.keep(name, kind, b"")
        self.answer(dict.fromkeys(("upload_url", "file_url"), self.sandbox.file_url(name)))
