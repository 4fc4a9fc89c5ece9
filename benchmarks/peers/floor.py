"""The floor: a Tornado handler that answers 200 bytes and relays nothing. Arguments: PORT.

A long poll is answered after its time, so that a crowd of them can be compared too.
"""

import asyncio
import sys
from urllib.parse import parse_qs, urlsplit

from tornado.web import Application, RequestHandler

from benchmarks.calls import FLOOR_ANSWER, ROUTE


class Floor(RequestHandler):
    async def post(self) -> None:
        query = parse_qs(urlsplit(self.request.headers["x-fal-target-url"]).query)
        if seconds := query.get("s"):
            await asyncio.sleep(float(seconds[0]))
        self.set_header("Content-Type", "application/json")
        self.finish(FLOOR_ANSWER)


async def main() -> None:
    Application([(ROUTE, Floor)]).listen(int(sys.argv[1]), "127.0.0.1", backlog=4096)
    await asyncio.Event().wait()


asyncio.run(main())
