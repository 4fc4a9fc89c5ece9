"""Reserve jobs in a store, as a process that may be killed: ``spender.py STORE NAME LIMIT JOBS``.

Twenty clients of one user reserve JOBS jobs each, settle the odd ones, and end. Each id is written as soon as the store
has reported that it is reserved.
"""

import asyncio
import os
import sys

from tests.support.spending_model import reservation
from tornado_fal_proxy.spending.stores import parse_store

CLIENTS = 20


async def main(name: str, own: str, limit: int, jobs: int) -> None:
    """Run all clients to their end."""
    store = parse_store(name)
    await store.open()

    async def client(number: int) -> None:
        for i in range(jobs):
            job = reservation(f"{own}-{number}-{i}", cost=4, limit=limit)
            if (await store.reserve(job)).refused_by is None:
                os.write(1, f"{job.id}\n".encode())
                if i % 2:
                    await store.settle(job.id, 2_000_000, 3)

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
