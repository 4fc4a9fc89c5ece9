"""Collect all that is logged during a test."""

import logging
import re

from tests.support.proxy import KEY

__all__ = ["Logs"]


class Logs(logging.Handler):
    """All that is logged during a test. Lines of level WARNING and above must be expected. No line may have the key."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self._expected: list[re.Pattern[str]] = []
        self._allowed: list[re.Pattern[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def lines(self) -> list[str]:
        return [self.format(record) for record in self.records]

    def expect(self, pattern: str) -> None:
        """Expect lines that match. When the test ends there must be at least one."""
        self._expected.append(re.compile(pattern))

    def allow(self, pattern: str) -> None:
        """Expect no line, and allow those that match: which come depends on how busy the machine is."""
        self._allowed.append(re.compile(pattern))

    def check(self) -> None:
        """Fail if a line is missing, is not expected, or has the key."""
        lines = self.lines
        assert not [line for line in lines if KEY.partition(":")[2] in line]
        missing = [wanted.pattern for wanted in self._expected if not any(map(wanted.search, lines))]
        assert not missing, f"not logged: {missing} in {lines}"
        loud = [self.format(record) for record in self.records if record.levelno >= logging.WARNING]
        known = [*self._expected, *self._allowed]
        unexpected = [line for line in loud if not any(pattern.search(line) for pattern in known)]
        assert not unexpected
