"""How the service writes its log: as text or JSON, and a caller can put no control character into it.

Strategy: what Tornado and libcurl log may hold what a caller or a server has sent, down to every byte from 0x80 on.
Some of these are control characters (C1, such as NEL, a line's end to many readers, and CSI, which begins an order to a
terminal). The formatters show all of them as escapes; they say nothing themselves and leave the root logger's level
alone.

A line of the access log is one :class:`Fields`. One by one, through all that logging does for a record, these lines
would cost a fifth of what a relay costs. So they wait for a moment, and a record has several of them: :class:`Lines`,
which is text to whoever formats it as such.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from tornado_fal_proxy.telemetry import Call

__all__ = ["AccessLog", "Fields", "JsonFormatter", "Lines", "PlainFormatter"]

# How long a line waits for others. Under full load that makes some hundred.
DELAY_S = 0.02
# Lines in a record, and so in one write: as many of the longest, as JSON, as fit into the 4096 bytes (PIPE_BUF) that
# processes which share a pipe write in one piece.
LINES_AT_ONCE = 3

# All but the tab and the line feed. Line feeds are in tracebacks, and in nothing that a caller sends.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN = re.compile(r"[!#-~]+")


class Fields(dict[str, Any]):
    """A message that is names and values; as text ``name=value``, with ``-`` for None, quoted where need be."""

    def __str__(self) -> str:
        texts = ["-" if value is None else str(value) for value in self.values()]
        if not _PLAIN.fullmatch("".join(texts)):
            texts = [text if _PLAIN.fullmatch(text) else _as_json(text) for text in texts]
        return " ".join(map("=".join, zip(self, texts, strict=True)))


class Lines(list[tuple[float, Fields]]):
    """Some lines of the access log, each with its time."""

    def __str__(self) -> str:
        return "\n".join(str(fields) for _, fields in self)

    def records(self, record: logging.LogRecord) -> Iterator[logging.LogRecord]:
        """What ``record`` would be for each of them; it is good until the next."""
        record = copy.copy(record)
        for record.created, record.msg in self:
            record.msecs = int(record.created % 1 * 1000)
            yield record


class AccessLog:
    """A line for each call that is over, soon after it. What a process that is killed has not written yet is lost."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._waiting: list[tuple[float, Call, str]] = []

    def add(self, call: Call, caller: str) -> None:
        """Write its line soon. Call it in the running loop."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(DELAY_S, self.write)
        self._waiting.append((time.time(), call, caller))

    def write(self) -> None:
        """Write what waits."""
        waiting, self._waiting = self._waiting, []
        for n in range(0, len(waiting), LINES_AT_ONCE):
            some = waiting[n : n + LINES_AT_ONCE]
            lines = Lines((at, Fields(call.fields(caller))) for at, call, caller in some)
            # What logger.info(lines) comes to, without its search for the line of code that says it.
            self._logger.handle(self._logger.makeRecord(self._logger.name, logging.INFO, "", 0, lines, (), None))


class PlainFormatter(logging.Formatter):
    """A formatter whose lines are plain text, whatever is logged."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.msg, Lines):
            return "\n".join(map(super().format, record.msg.records(record)))  # which are plain by themselves
        text = super().format(record)
        if (request_id := getattr(record, "request_id", None)) is not None:
            text += f" [request_id {request_id}]"
        return _CONTROLS.sub(lambda control: ascii(control[0])[1:-1], text)


class JsonFormatter(logging.Formatter):
    """A formatter whose lines are one JSON object each: time (UTC), level, logger and process, then the message.

    A line of the access log has its fields instead of ``message``.
    """

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.msg, Lines):
            return "\n".join(map(self._object, record.msg.records(record)))
        return self._object(record)

    def _object(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
        }
        if isinstance(record.msg, Fields):
            line.update(record.msg)
        else:
            line["message"] = record.getMessage()
            if (request_id := getattr(record, "request_id", None)) is not None:
                line["request_id"] = request_id
            if record.exc_info:
                line["exception"] = self.formatException(record.exc_info)
        return _as_json(line)


def _as_json(value: Any) -> str:
    """In ASCII, without the one control character that JSON lets stand."""
    return json.dumps(value).replace("\x7f", "\\u007f")
