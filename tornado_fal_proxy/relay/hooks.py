"""Ask the operator's functions: authorize, resolve_key, identify, check_input, input_units.

Strategy. Each may be plain or a coroutine, and may raise HTTPError to refuse a call. Anything else that it raises, and
any result that nobody could use, is a fault of the configuration. So is an awaitable that a coroutine has returned
without awaiting it, which would pass for a yes.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from tornado.web import Finish, HTTPError

from tornado_fal_proxy.errors import ClientDisconnected, Misconfigured, ProxyError
from tornado_fal_proxy.relay.response import RelayResponse, describe_exception

__all__ = ["HookedResponse", "result_of"]

logger = logging.getLogger("tornado_fal_proxy")


class HookedResponse(RelayResponse):
    """Ask functions of the operator's about a call."""

    async def _ask(self, function: Any, *args: Any) -> Any:
        """Return the result of the operator's function. Raise ClientDisconnected, and Misconfigured if it fails.

        The log gets the kind and the place of its exception, because its text might hold a key or a client's data.
        """
        try:
            result = await result_of(function(*args))
            bool(result)  # raises here what the operator's object raises when somebody asks whether it is true
        except (HTTPError, Finish, ProxyError):
            raise
        except Exception as exc:  # noqa: BLE001  (the operator's code may raise anything; it is logged)
            name = getattr(function, "__name__", "a function")
            raise Misconfigured(describe_exception(name, exc)) from None
        if self._finished:  # the function has responded by itself
            self._end_call()
        elif self._headers_written:
            name = getattr(function, "__name__", "a function")
            error = Misconfigured(f"{name} has sent a part of a response, and has not finished it")
            logger.error("refused: 500 %s: %s", self.request.method, error.detail, extra=self._extra)
            self._abort(error)
        if self._finished or self._connection.stream.closed():
            raise ClientDisconnected
        return result


async def result_of(value: Any) -> Any:
    """Return ``value``, or what it becomes when it is awaited. Raise Misconfigured where that is awaitable again."""
    if inspect.isawaitable(value):
        value = await value
        if inspect.isawaitable(value):
            if inspect.iscoroutine(value):
                value.close()  # else Python warns that nobody awaited it, without a name that the operator knows
            raise Misconfigured("a function that is async returned an awaitable: an await is missing in it")
    return value
