"""A job of the sandbox, as a pure function of the time since it was accepted and of the scenario of its client.

No I/O here, and no state except that of the objects themselves. The package's docstring describes the scenarios.
"""

from __future__ import annotations

import bisect
import io
import textwrap
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import responses
from typing import Any, NoReturn, get_type_hints

from PIL import Image, ImageDraw, ImageFont, ImageOps
from tornado.web import HTTPError

# Seconds that a run, a queued job, and each event of a stream take at pace 1: long enough to see, short enough to wait.
RUN_S = 1.2
QUEUE_S = 4.0
EVENT_GAP_S = 0.12
# Events of a stream: a dozen show a text that grows.
EVENTS = 12
# The longest prompt or text that a job keeps of its input; nobody reads more of it in a picture or on a page.
MAX_TEXT_CHARS = 10_000
# The most pictures of a job, as many models of fal's have it.
MAX_PICTURES = 4
# The longest ``think_s``: a day, which is longer than every timeout of the proxy.
MAX_THINK_S = 86_400
PICTURE_SIZE = (512, 384)
SAMPLE = "Grüße aus dem Sandkasten! 🌊 Übermut! 日本語のテキスト。 👩‍🚀 中文也可以。 Привет! Ça va? 🎉"
# The life of a queued job: the share of its time at which a step begins, its position in the queue, the runner's log.
LIFE: tuple[tuple[float, int | None, str], ...] = (
    (0.00, 2, ""),
    (0.12, 1, ""),
    (0.24, 0, ""),
    (0.36, None, "Loading the model"),
    (0.52, None, "Step 1 of 3"),
    (0.68, None, "Step 2 of 3"),
    (0.84, None, "Step 3 of 3"),
    (1.00, None, "Done"),
)


class Fault(HTTPError):
    """A response that is not a result: the status, and the whole JSON body."""

    def __init__(self, status: int, body: dict[str, object]) -> None:
        # Tornado has no reason phrase for 499, and refuses to send a status without one.
        super().__init__(status, reason=responses.get(status, "Unknown"))
        self.body = body


def refuse(status: int, detail: object) -> NoReturn:
    """Raise the response in fal's form, ``{"detail": ...}``."""
    raise Fault(status, {"detail": detail})


def invalid(kind: str, loc: list[str | int], msg: str) -> NoReturn:
    """Raise a 422 in the words of fal's servers (FastAPI)."""
    refuse(422, [{"type": kind, "loc": loc, "msg": msg}])


def text_of(value: object, default: str) -> str:
    """Return printable, bounded text: without the lone surrogates that JSON allows and UTF-8 does not."""
    return str(value or default)[:MAX_TEXT_CHARS].encode("utf-8", "replace").decode()


def trim(mapping: MutableMapping[Any, Any], limit: int) -> None:
    """Drop the oldest entries beyond ``limit``."""
    while len(mapping) > limit:
        del mapping[next(iter(mapping))]


@dataclass(frozen=True)
class Scenario:
    """The course of a job as its client wants it; the package's docstring describes the fields."""

    tag: str = ""
    error: int | None = None
    times: int | None = None
    at: str = "call"
    think_s: float | int | None = None
    text: str | None = None

    @classmethod
    def parse(cls, raw: object) -> Scenario:
        """Return the input field ``sandbox``, checked. Raise a 422 if it is not valid."""
        kinds = get_type_hints(cls)
        if isinstance(raw, dict) and all(isinstance(value, kinds.get(name, ())) for name, value in raw.items()):
            scenario = cls(**raw)
            error, think_s = scenario.error, scenario.think_s or 0
            possible = (error is None or 400 <= error <= 599) and 0 <= think_s <= MAX_THINK_S
            if possible and scenario.at in ("call", "status", "result"):
                return scenario
        invalid("value_error", ["body", "sandbox"], f"Input should be an object of {', '.join(kinds)}")


@dataclass
class Job:
    """A call that was accepted. Times are seconds since the epoch; only ``cancelled`` ever changes.

    ``units`` are what it is billed as: pictures.
    """

    id: str
    app: str
    prompt: str
    seed: int
    scenario: Scenario
    accepted_at: float
    duration_s: float
    units: int = 1
    cancelled: bool = False

    def step(self, now: float) -> int:
        """Return the index into LIFE at that time."""
        share = (now - self.accepted_at) / self.duration_s if self.duration_s > 0 else 1.0
        return len(LIFE) - 1 if self.cancelled else max(0, bisect.bisect(LIFE, share, key=lambda step: step[0]) - 1)

    def begins(self, step: int) -> float:
        """Return the time at which that step begins."""
        return self.accepted_at + LIFE[step][0] * self.duration_s

    def handle(self) -> dict[str, object]:
        """Return the id and the three URLs that every response about a queued job carries."""
        url = f"https://queue.fal.run/{self.app}/requests/{self.id}"
        addresses = {"response_url": url, "status_url": f"{url}/status", "cancel_url": f"{url}/cancel"}
        return {"request_id": self.id, **addresses}

    def status(self, step: int, logs_from: int | None) -> dict[str, object]:
        """Return the status at that step, with the log since step ``logs_from`` (None: without a log)."""
        position = LIFE[step][1]
        if position is not None:
            return {"status": "IN_QUEUE", "queue_position": position, **self.handle()}
        lines: list[dict[str, str]] = []
        for index in range(step + 1 if logs_from is None or self.cancelled else logs_from, step + 1):
            if LIFE[index][2]:
                moment = datetime.fromtimestamp(self.begins(index), UTC).isoformat()
                lines.append({"message": LIFE[index][2], "level": "INFO", "source": "USER", "timestamp": moment})
        status = {"status": "IN_PROGRESS", **self.handle(), "logs": lines}
        if step == len(LIFE) - 1:
            status.update(status="COMPLETED", metrics={"inference_time": round(self.duration_s, 3)})
        return status


def picture(prompt: str, seed: int) -> bytes:
    """Return a PNG: a gradient in a color that the seed selects, with the prompt on it."""
    hue = seed % 360
    dark, light = (f"hsv({hue}, 60%, 25%)", f"hsv({(hue + 50) % 360}, 60%, 80%)")
    image = ImageOps.colorize(Image.linear_gradient("L").resize(PICTURE_SIZE), dark, light)
    middle = (PICTURE_SIZE[0] / 2, PICTURE_SIZE[1] / 2)
    lines = "\n".join(textwrap.wrap(prompt, 30)[:7])
    ImageDraw.Draw(image).multiline_text(middle, lines, "white", ImageFont.load_default(28), "mm", 8, "center")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
