"""``recovery PROTOCOL FAULT...``: run these faults one after the other, and print a line of JSON for each.

Faults that need a network must run in one of their own. The strategy is in :mod:`tests.support.recovery`.
"""

import asyncio
import json
import sys
import traceback
from collections import Counter
from dataclasses import asdict

from tests.support.recovery.faults import FAULTS
from tests.support.recovery.load import REAL_TIME
from tests.support.recovery.stand import Report, Stand

# Limits all faults of a protocol together: far more than they take.
MAX_S = 1800 if REAL_TIME else 180


async def main(protocol: str, names: list[str]) -> None:
    waiting = list(names)
    while waiting:
        async with Stand.set_up(protocol, FAULTS[names[0]]) as stand:
            while waiting:
                name = waiting.pop(0)
                try:
                    report = await stand.suffer(name, FAULTS[name])
                except Exception:  # noqa: BLE001  (the test shows it; the other faults get a new stand)
                    report = Report(name, protocol, error=traceback.format_exc())
                    report.seen = dict(Counter(call.seen for call in stand.load.calls))
                print(json.dumps(asdict(report)), flush=True)  # noqa: T201
                if report.error:
                    break


if __name__ == "__main__":
    asyncio.run(asyncio.wait_for(main(sys.argv[1], sys.argv[2:]), MAX_S))
