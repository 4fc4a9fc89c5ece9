"""Let the disk of a service's store become full, and give it room again. Run by test_spending_faults.py.

It runs in its own network, and gets the folder where a small disk of its own is mounted.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from tests.support.certificates import Authority
from tests.support.namespaces import lift_loopback
from tests.support.proxy import Setup
from tests.support.suffering import suffer

BLOCK = bytes(4096)


def fill(folder: Path) -> None:
    """Write until there is no room for a page."""
    try:
        with (folder / "large").open("wb", buffering=0) as file:
            while file.write(BLOCK):
                pass
    except OSError:
        return


async def main(disk: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        setup = Setup(Authority(Path(directory)))
        store = f"sqlite:{disk}/spending.sqlite"
        await suffer(setup, store, lambda: fill(disk), (disk / "large").unlink, r"spending\.sqlite: the disk is full")
        await setup.close()


if __name__ == "__main__":
    lift_loopback()
    asyncio.run(main(Path(sys.argv[1])))
