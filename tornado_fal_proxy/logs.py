"""How the service writes its log: as text or JSON, and a caller can put no control character into it.

Strategy: what Tornado and libcurl log may hold what a caller or a server has sent, down to every byte from 0x80 on.
Some of these are control characters (C1, such as NEL, a line's end to many readers, and CSI, which begins an order to a
terminal). The formatters show all of them as escapes; they say nothing themselves and leave the root logger's level
alone.

A line of the access log is one :class:`Fields`, which is text to whoever formats it as such.
"""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any

__all__ = ["Fields", "JsonFormatter", "PlainFormatter", "log_fields"]

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


def log_fields(logger: logging.Logger, fields: Fields) -> None:
    """As ``logger.info(fields)``, without the search for the line of code that says it: half of what that takes."""
    logger.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, fields, (), None))


class PlainFormatter(logging.Formatter):
    """A formatter whose lines are plain text, whatever is logged."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if isinstance(record.msg, Fields):
            return text  # which is plain by itself
        if (request_id := getattr(record, "request_id", None)) is not None:
            text += f" [request_id {request_id}]"
        return _CONTROLS.sub(lambda control: ascii(control[0])[1:-1], text)


class JsonFormatter(logging.Formatter):
    """A formatter whose lines are one JSON object each: time (UTC), level, logger and process, then the message.

    A line of the access log has its fields instead of ``message``.
    """

    def format(self, record: logging.LogRecord) -> str:
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
