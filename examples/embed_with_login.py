"""An application with a login: two models, and for each user ten pictures a day and two jobs at once.

``FAL_KEY=... python examples/embed_with_login.py [PORT]``. Its page is ``vite-react`` beside this file.
"""

import asyncio
import dataclasses
import hmac
import os
import secrets
import signal
import sys
from pathlib import Path
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.web import Application, HTTPError, RequestHandler, StaticFileHandler

from tornado_fal_proxy import FalProxyHandler, ProxyConfig, Target, close_upstreams, flush_spending

# Yours are in a database, with hashes of the passwords. Nobody may sign up at will, or a new name is ten more pictures.
PASSWORDS = {"ann": "lighthouse", "bob": "harbour"}


class Login(RequestHandler):
    def get(self) -> None:
        user = self.get_signed_cookie("user")
        self.finish({"user": user and user.decode()})

    def post(self) -> None:
        user, password = self.get_body_argument("user"), self.get_body_argument("password")
        if not hmac.compare_digest(PASSWORDS.get(user, "").encode(), password.encode()) or not password:
            raise HTTPError(401)
        # "lax" keeps pages of other sites from calling as this user. Add secure=True where the page comes by HTTPS.
        self.set_signed_cookie("user", user, httponly=True, samesite="lax")
        self.finish({"user": user})


class ForUsers(FalProxyHandler):
    def get_current_user(self) -> Any:
        return self.get_signed_cookie("user")

    def authorize(self, target: Target) -> bool:  # false is answered 401
        return self.current_user is not None

    def identify(self, target: Target) -> str:
        return str(self.current_user.decode())


def pictures(target: Target, body: dict[str, Any]) -> int:  # a call for four counts as four, and so does anything odd
    count = body.get("num_images", 1)
    return count if type(count) is int and 0 < count < 4 else 4


def make_application() -> Application:
    config = dataclasses.replace(
        ProxyConfig.from_env(),  # the key
        allowed_endpoints=("fal-ai/flux/dev", "fal-ai/any-llm/vision"),
        allow_uploads=True,
        allow_cancel=True,
        jobs_per_user="10/day",
        unfinished_jobs_per_user=2,
        count="units",
        input_units=pictures,
    )
    built = {"path": Path(__file__).with_name("vite-react") / "dist", "default_filename": "index.html"}
    rules: list[Any] = [
        ("/api/login", Login),
        ("/api/fal/proxy", ForUsers, {"config": config}),
        ("/(.*)", StaticFileHandler, built),
    ]
    # Without COOKIE_SECRET a restart signs everybody out.
    return Application(rules, cookie_secret=os.environ.get("COOKIE_SECRET") or secrets.token_hex())


async def main(port: int) -> None:
    application = make_application()
    server = HTTPServer(application)
    server.listen(port, "127.0.0.1")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    server.stop()
    close_upstreams(application)
    await flush_spending(application)
    await server.close_all_connections()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000))
