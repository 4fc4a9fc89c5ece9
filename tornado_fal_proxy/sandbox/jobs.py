"""What the sandbox knows of a job: a pure function of the time since it was accepted, and of what its caller wished.

No I/O here, and no state but that of the objects themselves. The package's docstring describes the wishes.
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

RUN_S = 1.2
QUEUE_S = 4.0
EVENT_GAP_S = 0.12
EVENTS = 12
# Bounds, so that a sandbox that is left running for weeks does not grow. The oldest goes first.
MAX_TEXT_CHARS = 10_000  # of a prompt; all that a job keeps of its input
MAX_THINK_S = 86_400
PICTURE_SIZE = (512, 384)
SAMPLE = "Grüße aus dem Sandkasten! 🌊 Übermut! 日本語のテキスト。 👩‍🚀 中文也可以。 Привет! Ça va? 🎉"
# A queued job's life: the share of its time at which a step begins, its place in the queue, what the runner logs.
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
    """An answer that is not a result: the status, and the whole JSON body."""

    def __init__(self, status: int, body: dict[str, object]) -> None:
        # Tornado knows no reason for 499, and would refuse to send a status without one.
        super().__init__(status, reason=responses.get(status, "Unknown"))
        self.body = body


def refuse(status: int, detail: object) -> NoReturn:
    """Raise the answer in fal's form, ``{"detail": ...}``."""
    raise Fault(status, {"detail": detail})


def invalid(kind: str, loc: list[str | int], msg: str) -> NoReturn:
    """Raise a 422 as fal's servers (FastAPI) word one."""
    refuse(422, [{"type": kind, "loc": loc, "msg": msg}])


def text_of(value: object, default: str) -> str:
    """A text field made printable: bounded, and without the lone surrogates that JSON allows and UTF-8 does not."""
    return str(value or default)[:MAX_TEXT_CHARS].encode("utf-8", "replace").decode()


def trim(mapping: MutableMapping[Any, Any], limit: int) -> None:
    """Drop the oldest entries beyond ``limit``."""
    while len(mapping) > limit:
        del mapping[next(iter(mapping))]


@dataclass(frozen=True)
class Wish:
    """What a caller asked of the sandbox; the fields are described in the module's docstring."""

    tag: str = ""
    error: int | None = None
    times: int | None = None
    at: str = "call"
    think_s: float | int | None = None
    text: str | None = None

    @classmethod
    def parse(cls, raw: object) -> Wish:
        """Check the input field ``sandbox``, or answer 422."""
        kinds = get_type_hints(cls)
        if isinstance(raw, dict) and all(isinstance(value, kinds.get(name, ())) for name, value in raw.items()):
            wish = cls(**raw)
            possible = (wish.error is None or 400 <= wish.error <= 599) and 0 <= (wish.think_s or 0) <= MAX_THINK_S
            if possible and wish.at in ("call", "status", "result"):
                return wish
        invalid("value_error", ["body", "sandbox"], f"Input should be an object of {', '.join(kinds)}")


@dataclass
class Job:
    """A call that was accepted. Times are seconds since the epoch; nothing but ``cancelled`` ever changes."""

    id: str
    app: str
    prompt: str
    seed: int
    wish: Wish
    accepted_at: float
    duration_s: float
    cancelled: bool = False

    def step(self, now: float) -> int:
        """The index into LIFE at that time."""
        share = (now - self.accepted_at) / self.duration_s if self.duration_s > 0 else 1.0
        return len(LIFE) - 1 if self.cancelled else max(0, bisect.bisect(LIFE, share, key=lambda step: step[0]) - 1)

    def begins(self, step: int) -> float:
        """When that step begins."""
        return self.accepted_at + LIFE[step][0] * self.duration_s

    def handle(self) -> dict[str, object]:
        """The id and the three addresses that every answer about a queued job carries."""
        url = f"https://queue.fal.run/{self.app}/requests/{self.id}"
        addresses = {"response_url": url, "status_url": f"{url}/status", "cancel_url": f"{url}/cancel"}
        return {"request_id": self.id, **addresses}

    def status(self, step: int, logs_from: int | None) -> dict[str, object]:
        """The status at that step, with the log since step ``logs_from`` (None: without)."""
        position = LIFE[step][1]
        if position is not None:
            return {"status": "IN_QUEUE", "queue_position": position, **self.handle()}
        lines: list[dict[str, str]] = []
        for index in range(step + 1 if logs_from is None or self.cancelled else logs_from, step + 1):
            if LIFE[index][2]:
                moment = datetime.fromtimestamp(self.begins(index), UTC).isoformat()
                lines.append({"message": LIFE[index][2], "level": "INFO", "source": "USER", "timestamp": moment})
        answer = {"status": "IN_PROGRESS", **self.handle(), "logs": lines}
        if step == len(LIFE) - 1:
            answer.update(status="COMPLETED", metrics={"inference_time": round(self.duration_s, 3)})
        return answer


def picture(prompt: str, seed: int) -> bytes:
    """A PNG: a gradient in a colour of the seed's, with the prompt on it."""
    hue = seed % 360
    dark, light = (f"hsv({hue}, 60%, 25%)", f"hsv({(hue + 50) % 360}, 60%, 80%)")
    image = ImageOps.colorize(Image.linear_gradient("L").resize(PICTURE_SIZE), dark, light)
    middle = (PICTURE_SIZE[0] / 2, PICTURE_SIZE[1] / 2)
    lines = "\n".join(textwrap.wrap(prompt, 30)[:7])
    ImageDraw.Draw(image).multiline_text(middle, lines, "white", ImageFont.load_default(28), "mm", 8, "center")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
