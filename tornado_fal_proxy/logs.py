"""Format logs as text or JSON, without a control character that a client has sent.

Strategy: messages of Tornado and libcurl may contain any byte from 0x80 on that a client or a server has sent. Some of
these are control characters (C1, such as NEL, which many readers take for the end of a line, and CSI, which begins a
command to a terminal). The formatters write all of them as escapes. They log nothing themselves and leave the root
logger's level alone. An application that embeds the proxy may use them too.

The fields of a line in the access log are one :class:`Fields`. The message of a record may be several such lines,
:class:`Lines`, which other formatters write as text.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

__all__ = ["Fields", "JsonFormatter", "Lines", "PlainFormatter"]

# Every control character except the tab and the line feed. Line feeds are in tracebacks, and in nothing that a client
# sends.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN = re.compile(r"[!#-~]+")


class Fields(dict[str, Any]):
    """A message of names and values. As text it is ``name=value``, with ``-`` for None, quoted where necessary."""

    def __str__(self) -> str:
        texts = ["-" if value is None else str(value) for value in self.values()]
        if not _PLAIN.fullmatch("".join(texts)):
            texts = [text if _PLAIN.fullmatch(text) else _as_json(text) for text in texts]
        return " ".join(map("=".join, zip(self, texts, strict=True)))


class Lines(list[tuple[float, Fields]]):
    """Several lines of the access log, each with its time."""

    def __str__(self) -> str:
        return "\n".join(str(fields) for _, fields in self)

    def records(self, record: logging.LogRecord) -> Iterator[logging.LogRecord]:
        """Yield ``record`` as it would be for each line alone. Each is valid until the next."""
        record = copy.copy(record)
        for record.created, record.msg in self:
            record.msecs = int(record.created % 1 * 1000)
            yield record


class PlainFormatter(logging.Formatter):
    """A formatter whose lines are plain text, whatever is logged."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        if isinstance(record.msg, Lines):
            return "\n".join(map(super().format, record.msg.records(record)))  # Fields are plain already
        text = super().format(record)
        if (request_id := getattr(record, "request_id", None)) is not None:
            text += f" [request_id {request_id}]"
        return _CONTROLS.sub(lambda control: ascii(control[0])[1:-1], text)


class JsonFormatter(logging.Formatter):
    """A formatter whose lines are one JSON object each: time (UTC), level, logger and process, then the message.

    A line of the access log has its fields in place of ``message``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
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
    """Return JSON in ASCII. The one control character that JSON permits is escaped too."""
    return json.dumps(value).replace("\x7f", "\\u007f")
