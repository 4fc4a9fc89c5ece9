"""The form of what a check has found, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from textwrap import wrap

__all__ = ["FORMATS", "NOTE", "OK", "SKIPPED", "WRONG", "Finding", "shown"]

OK, NOTE, WRONG, SKIPPED = "ok", "note", "wrong", "skipped"
FORMATS = ("text", "json")
# The columns of the text.
COLUMNS = 100


@dataclass(frozen=True)
class Finding:
    """Hold what one check has found, in words, and for what is wrong the line to change.

    ``result`` is ``ok``, ``note`` (works, and could be better), ``wrong``, or ``skipped``.
    """

    check: str
    result: str
    text: str
    change: str = ""


def shown(url: str, findings: Sequence[Finding], form: str) -> str:
    """Return the findings in one of FORMATS."""
    if form == "json":
        return json.dumps({"url": url, "findings": [asdict(finding) for finding in findings]}, indent=2)
    lines = [url]
    for finding in findings:
        result = finding.result.upper() if finding.result == WRONG else finding.result
        lines.extend(_wrapped(f"{result:<7}  {finding.check:<12}  ", finding.text))
        if finding.change:
            lines.extend(_wrapped(" " * 23, f"change: {finding.change}"))
    counts = [f"{sum(finding.result == result for finding in findings)} {result}" for result in (OK, NOTE, WRONG)]
    return "\n".join([*lines, ", ".join(counts)])


def _wrapped(label: str, text: str) -> list[str]:
    printable = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    first, *rest = wrap(printable, COLUMNS - 23, break_long_words=False, break_on_hyphens=False) or [""]
    return [label + first, *(" " * 23 + line for line in rest)]
