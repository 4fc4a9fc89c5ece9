"""An application with a page of its own and the proxy beside it: ``FAL_KEY=... python examples/embed.py [PORT]``.

Then open http://127.0.0.1:8000/.
"""

import asyncio
import signal
import sys

from tornado.httpserver import HTTPServer
from tornado.web import Application, RequestHandler

from tornado_fal_proxy import FalProxyHandler, ProxyConfig, close_upstreams

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>A picture</title>
<form><input name="prompt" value="a lighthouse"> <button>Draw</button></form>
<p id="status"></p>
<img id="picture" alt="">
<script>
document.querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const show = (text) => { document.querySelector("#status").textContent = text; };
  show("Drawing ...");
  const response = await fetch("/api/fal/proxy", {
    method: "POST",
    headers: { "content-type": "application/json", "x-fal-target-url": "https://fal.run/fal-ai/flux/dev" },
    body: JSON.stringify({ prompt: event.target.elements.prompt.value }),
  });
  const result = await response.json();
  show(response.ok ? "" : result.message ?? JSON.stringify(result.detail));
  if (response.ok) document.querySelector("#picture").src = result.images[0].url;
});
</script>
"""


class Home(RequestHandler):
    def get(self) -> None:
        self.finish(PAGE)


def make_application(config: ProxyConfig) -> Application:
    return Application([(r"/", Home), (r"/api/fal/proxy", FalProxyHandler, {"config": config})])


async def main(port: int) -> None:
    application = make_application(ProxyConfig.from_env())
    server = HTTPServer(application)
    server.listen(port, "127.0.0.1")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    server.stop()
    close_upstreams(application)
    await server.close_all_connections()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000))
