"""The floor: a Tornado handler that responds with 200 bytes and relays nothing. Arguments: PORT.

It responds to a long poll after the time of the poll, to compare a crowd of them too.
"""

import asyncio
import sys
from urllib.parse import parse_qs, urlsplit

from tornado.web import Application, RequestHandler

from benchmarks.calls import FLOOR_RESPONSE, ROUTE


class Floor(RequestHandler):
    async def post(self) -> None:
        query = parse_qs(urlsplit(self.request.headers["x-fal-target-url"]).query)
        if seconds := query.get("s"):
            await asyncio.sleep(float(seconds[0]))
        self.set_header("Content-Type", "application/json")
        self.finish(FLOOR_RESPONSE)


async def main() -> None:
    Application([(ROUTE, Floor)]).listen(int(sys.argv[1]), "127.0.0.1", backlog=4096)
    await asyncio.Event().wait()


asyncio.run(main())
