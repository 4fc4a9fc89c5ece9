"""Everything that the sandbox keeps, within bounds: jobs, files, counts of executions and failures.

Handlers receive a :class:`SandboxState` and nothing else of the server. The state never opens a socket or a file. The
bounds let a sandbox run for weeks without growing: beyond each of them the oldest entry is dropped.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import secrets
import time
import uuid
from collections import Counter
from http.client import responses
from typing import Any

from tornado_fal_proxy.sandbox.jobs import (
    MAX_PICTURES,
    PICTURE_SIZE,
    Job,
    Scenario,
    invalid,
    picture,
    refuse,
    text_of,
    trim,
)

__all__ = ["SandboxState", "file_url"]

# Queued jobs: far more than one person or one test has under way.
MAX_JOBS = 500
# Tags in each of the counts; a test that gives every call a tag of its own still finds all of them.
MAX_TAGS = 10_000
# Files, pictures and uploads together: one picture for each job.
MAX_FILES = 500
# The bytes of all files together: room for two of the largest uploads.
MAX_STORE_BYTES = 256 * 1024 * 1024


class SandboxState:
    """The state of one sandbox.

    Attributes:
        host_header: the header that has the Host header of the client's own request. The application of the proxy adds
            it, and the proxy relays a header with such a name.
        pace: the factor for every simulated delay.
        key: the only key that is accepted; any other call gets a 401.
        public_url: where browsers reach the application of the proxy, e.g. ``http://127.0.0.1:8080``. Set it once that
            application listens. A call's own ``host_header`` wins, because a browser on another machine has another
            address for this one. Without either pictures become ``data:`` URLs and uploads get a 503.
        executions: how many jobs were accepted and executed, by tag.
        jobs: the queued jobs by id.
        files: the files by name, each with its content type.
        calls: the tasks of the handlers that are running.
        sessions: the ids of the sessions of realtime video that are open.
        closing: set when the sandbox closes, to wake up the handlers that sleep.
    """

    host_header = "X-Fal-Sandbox-Host"

    def __init__(self, pace: float = 1.0) -> None:
        self.pace = pace
        self.key = f"sandbox-{secrets.token_hex(8)}:{secrets.token_hex(16)}"
        self.public_url = ""
        self.executions: Counter[str] = Counter()
        self.jobs: dict[str, Job] = {}
        self.files: dict[str, tuple[str, bytes]] = {}
        self.calls: set[asyncio.Task[Any]] = set()
        self.sessions: set[str] = set()
        self._failures: Counter[tuple[str, str]] = Counter()
        self.closing = asyncio.Event()

    async def sleep(self, seconds: float) -> bool:
        """Sleep, but not past the close of the sandbox, which waits for all handlers. Return False when it closes."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.closing.wait(), seconds)
        return not self.closing.is_set()

    def accept(self, app: str, fields: dict[str, Any], simulated_s: float) -> Job:
        """Count and return a new job, or raise the error that its scenario asks for."""
        scenario = Scenario.parse(fields.get("sandbox", {}))
        self.fail(scenario, "call")
        self.executions[scenario.tag] += 1
        trim(self.executions, MAX_TAGS)
        seed = fields["seed"] if isinstance(fields.get("seed"), int) else secrets.randbelow(1 << 32)
        duration_s = simulated_s * self.pace if scenario.think_s is None else scenario.think_s
        prompt = text_of(fields.get("prompt"), "(no prompt)")
        asked = fields.get("num_images")
        units = asked if isinstance(asked, int) and 1 <= asked <= MAX_PICTURES else 1
        return Job(str(uuid.uuid4()), app, prompt, seed, scenario, time.time(), duration_s, units)

    def enqueue(self, job: Job) -> None:
        """Keep a job for later calls that name its id."""
        self.jobs[job.id] = job
        trim(self.jobs, MAX_JOBS)

    def fail(self, scenario: Scenario, step: str) -> None:
        """Raise the error that the scenario asks for at this step, until it was raised ``times`` times."""
        if scenario.error is None or scenario.at != step:
            return
        self._failures[scenario.tag, step] += 1
        trim(self._failures, MAX_TAGS)
        if scenario.times is not None and self._failures[scenario.tag, step] > scenario.times:
            return
        if scenario.error == 422:
            invalid("value_error", ["body", "prompt"], "This error was asked for")
        refuse(scenario.error, f"This error was asked for: {responses.get(scenario.error, scenario.error)}")

    def result(self, job: Job, public_url: str) -> dict[str, object]:
        """Return the result of an image model; the picture is drawn again if it was dropped."""
        name = f"{job.id}.png"
        _, png = self.files.get(name) or self.keep(name, "image/png", picture(job.prompt, job.seed))
        url = file_url(public_url, name) if public_url else "data:image/png;base64," + base64.b64encode(png).decode()
        image = {"url": url, "width": PICTURE_SIZE[0], "height": PICTURE_SIZE[1], "content_type": "image/png"}
        return {
            "images": [image] * job.units,
            "timings": {"inference": round(job.duration_s, 3)},
            "seed": job.seed,
            "has_nsfw_concepts": [False],
            "prompt": job.prompt,
        }

    def keep(self, name: str, content_type: str, body: bytes) -> tuple[str, bytes]:
        """Keep and return a file as the newest; the oldest files make room for it."""
        self.files.pop(name, None)
        self.files[name] = (content_type, body)
        trim(self.files, MAX_FILES)
        while sum(len(kept) for _, kept in self.files.values()) > MAX_STORE_BYTES:
            trim(self.files, len(self.files) - 1)
        return content_type, body


def file_url(public_url: str, name: str) -> str:
    """Return the URL at which browsers find that file."""
    return f"{public_url}/sandbox/files/{name}"
