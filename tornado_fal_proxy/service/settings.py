"""The settings of the command: its own options, each with its help text, its group and its parser.

Strategy. An option is a field whose metadata :func:`~tornado_fal_proxy.option_fields.option` makes, so that arguments,
variables, the file of options and the texts of ``--help`` come from one place. The other options are the fields of
:class:`~tornado_fal_proxy.config.ProxyConfig`. This module reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tornado_fal_proxy.config import DEFAULT_ROUTE, ProxyConfig, relay_options
from tornado_fal_proxy.option_fields import NUMBER, option
from tornado_fal_proxy.rules.trusted_proxies import TrustedProxies
from tornado_fal_proxy.service import option_texts
from tornado_fal_proxy.service.user_header import as_user_header

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_DRAIN_TIMEOUT_S",
    "DEFAULT_PORT",
    "DEFAULT_PROCESSES",
    "PROGRAM",
    "Settings",
    "all_options",
    "service_options",
]

PROGRAM = "tornado-fal-proxy"

# The address to listen on: of this machine only, because a paid key is exposed to the world only if somebody asks.
DEFAULT_ADDRESS = "127.0.0.1"
# The port to listen on: the usual one of a service that no user types, and open to programs without privileges.
DEFAULT_PORT = 8080
# The texts that --log-level and --log-format accept, in any case of letters.
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
# The processes that serve: the sandbox, or a first try, needs no more than one.
DEFAULT_PROCESSES = 1
# Limits a drain: the time that Kubernetes gives a pod, and longer than most models run. Endless streams reach it.
DEFAULT_DRAIN_TIMEOUT_S = 30.0
# Limits the time without a heartbeat after which a worker is replaced. Its clients wait for so long, and no sound
# worker takes so long for one turn of its loop, even on a machine that swaps.
DEFAULT_WORKER_TIMEOUT_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of the service, checked. The fields with metadata are its own options.

    ``processes`` is how many serve, at least one. ``admin_port`` is None if there is none. ``relay`` is None in sandbox
    mode, where the sandbox decides it. ``texts`` has the text of every option, None where none was given, and ``more``
    what else :meth:`ProxyConfig.from_texts` gets. ``files`` were read: those of variables, options, the key and prices.
    """

    address: str = option(DEFAULT_ADDRESS, "address or host name to listen on", "ADDRESS", group="listening")
    port: int = option(
        DEFAULT_PORT, "port to listen on; 0 takes a free one", "PORT", option_texts.port, group="listening"
    )
    route: str = option(
        DEFAULT_ROUTE, "path that fal's SDKs get as proxyUrl", "PATH", option_texts.route, group="listening"
    )
    processes: int = option(
        DEFAULT_PROCESSES,
        "processes that serve; 0 starts one for each core",
        "NUMBER",
        option_texts.processes,
        group="processes",
    )
    drain_timeout_s: float = option(
        DEFAULT_DRAIN_TIMEOUT_S,
        "time that calls in flight get when the service ends, before they are aborted",
        "SECONDS",
        option_texts.seconds,
        group="processes",
    )
    worker_timeout_s: float = option(
        DEFAULT_WORKER_TIMEOUT_S,
        "with several processes: time without a sign of life after which one is killed and replaced; 0: never",
        "SECONDS",
        option_texts.worker_timeout_s,
        group="processes",
    )
    log_level: str = option(
        "info",
        f"lowest level to log: {', '.join(LOG_LEVELS)}",
        "LEVEL",
        option_texts.one_of(*LOG_LEVELS),
        group="watching",
    )
    log_format: str = option(
        "text", f"how to log: {', '.join(LOG_FORMATS)}", "FORMAT", option_texts.one_of(*LOG_FORMATS), group="watching"
    )
    trusted_proxies: TrustedProxies = option(  # noqa: RUF009  (it is a field)
        TrustedProxies(),
        "proxies in front whose X-Forwarded-For is believed: addresses, networks, unix for a socket file",
        "ADDRESS,...",
        option_texts.trusted_proxies,
        group="watching",
    )
    admin_port: int | None = option(
        None,
        f"port for a status page, /metrics, /readyz and /healthz; 0 takes a free one (default: {option_texts.NO_PORT})",
        "PORT",
        option_texts.admin_port,
        group="watching",
        form=NUMBER,
    )
    admin_address: str = option(DEFAULT_ADDRESS, "address for these", "ADDRESS", group="watching")
    sandbox: bool = option(
        False,
        "relay to a stand-in for fal on this machine: needs neither key nor network; / shows a page to try it",
        parse=option_texts.switch,
        group="other",
    )
    config: str | None = option(
        None, "TOML file with options, [plans.NAME] and [prices]; arguments and variables win", "FILE", group="other"
    )
    env_file: str | None = option(
        None, "file with lines NAME=value for FAL_KEY and FAL_PROXY_...; the environment wins", "FILE", group="other"
    )
    user_header: str | None = option(
        None,
        "header in which a trusted proxy names the user, such as X-Forwarded-User",
        "NAME",
        as_user_header,
        group="spending",
    )
    relay: ProxyConfig | None = None
    texts: Mapping[str, str | None] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()


def service_options() -> tuple[Any, ...]:
    """Return the dataclass fields that are the command's own options."""
    return tuple(entry for entry in fields(Settings) if entry.metadata)


def all_options() -> tuple[Any, ...]:
    """Return the dataclass fields of all options."""
    return (*service_options(), *relay_options())
