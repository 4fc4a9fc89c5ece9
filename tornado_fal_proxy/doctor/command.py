"""Read the arguments of ``tornado-fal-proxy doctor``, and print what was found.

Strategy. The checks run one after another, from the connection to the inside, and stop where the next could see
nothing. The exit code is 0 if nothing is wrong, 1 otherwise, and 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.doctor.checks import (
    check_body_size,
    check_cors,
    check_events,
    check_fal,
    check_retries,
    check_silence,
)
from tornado_fal_proxy.doctor.findings import FORMATS, WRONG, Finding, shown
from tornado_fal_proxy.doctor.inside import check_key
from tornado_fal_proxy.doctor.route import check_reachable, check_route
from tornado_fal_proxy.doctor.visitor import Visitor
from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.rules.cors import origin_problem
from tornado_fal_proxy.rules.diagnostics import MAX_SILENCE_S

__all__ = ["doctor_parser", "examine", "print_findings"]

EXIT_OK, EXIT_WRONG = 0, 1
# The endpoint whose status is asked for. It need not exist: the job does not either.
ENDPOINT = "fal-ai/flux"

_HEADER = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[ \t]*[^\r\n\0]*")
_ENDPOINT = re.compile(r"[\w-]+(?:/[\w.-]+)+", re.ASCII)
_ADDRESS = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")


class _Parser(argparse.ArgumentParser):
    """Raises an error instead of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"doctor: {message}"])


def doctor_parser(prog: str, **more: Any) -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    parser = _Parser(
        prog=f"{prog} doctor",
        allow_abbrev=False,
        description="Look at a proxy from outside, and say what is wrong and what to change.",
        **more,
    )
    an_url = "the proxyUrl of the client, such as https://app.example.com/api/fal/proxy"
    parser.add_argument("url", type=_url, metavar="URL", help=an_url)
    parser.add_argument("--origin", type=_origin, metavar="ORIGIN", help="look as a page of this origin too (CORS)")
    parser.add_argument(
        "--header", type=_header, action="append", default=[], metavar="LINE", help="send this too, such as a cookie"
    )
    parser.add_argument("--wait-s", type=_wait, metavar="SECONDS", help="look whether a call may be silent for so long")
    parser.add_argument("--endpoint", type=_endpoint, default=ENDPOINT, metavar="ID", help="an allowed endpoint")
    parser.add_argument(
        "--key", action="store_true", help="on the proxy's machine: ask fal, with the key in FAL_KEY or its file"
    )
    parser.add_argument("--env-file", metavar="FILE", help="with --key, the file of variables of the service")
    parser.add_argument("--config", metavar="FILE", help="with --key, the TOML file of the service")
    parser.add_argument("--ca-certs", type=_file, metavar="FILE", help="trust the certificates in this PEM file")
    parser.add_argument("--connect-to", type=_address, metavar="HOST:PORT", help="look there, whatever DNS says")
    parser.add_argument("--format", default=FORMATS[0], choices=FORMATS, help="form of the findings (default: text)")
    return parser


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and "@" not in parts.netloc
    except ValueError:
        usable = False
    if not usable or re.search(r"[\s\0]", text):
        raise argparse.ArgumentTypeError("must be an http or https URL, without a user or a password in it")
    return text


def _origin(text: str) -> str:
    if problem := origin_problem(text):
        raise argparse.ArgumentTypeError(f"{problem}, not {text!r}")
    return text


def _header(text: str) -> str:
    if not _HEADER.fullmatch(text):  # the error does not show it: it may be a secret
        raise argparse.ArgumentTypeError("must be a header line such as 'cookie: session=...'")
    return text


def _wait(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,3}", text) or int(text) > MAX_SILENCE_S:
        raise argparse.ArgumentTypeError(f"must be a number of seconds from 1 to {MAX_SILENCE_S}, not {text!r}")
    return int(text)


def _endpoint(text: str) -> str:
    if not _ENDPOINT.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be an endpoint such as {ENDPOINT}, not {text!r}")
    return text


def _address(text: str) -> str:
    if not _ADDRESS.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, not {text!r}")
    return text


def _file(text: str) -> str:
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return text


def examine(given: argparse.Namespace, config: ProxyConfig | None) -> Iterator[Finding]:
    """Yield the findings, as they are found. ``config`` has the key, where that is asked for. Raise ConfigError."""
    visitor = Visitor(given.url, headers=given.header, ca_certs=given.ca_certs, connect_to=given.connect_to)
    try:
        first = visitor.send()
        yield from check_reachable(first, given.url)
        is_proxy = False
        if first.status and not first.error:
            for finding in check_route(first, visitor):
                is_proxy = finding.result != WRONG
                yield finding
        if is_proxy:
            yield from check_cors(visitor, given.origin)
            yield from check_events(visitor)
            yield from check_body_size(visitor)
            yield from check_retries(visitor)
            yield from check_silence(visitor, given.wait_s)
            yield from check_fal(visitor, given.endpoint)
        if config is not None:
            yield from check_key(config, given.endpoint)
    finally:
        visitor.close()


def print_findings(argv: Sequence[str], prog: str, config_of: Callable[[argparse.Namespace], ProxyConfig]) -> int:
    """Print what was found, and return the exit code. Raise ConfigError for wrong arguments.

    ``config_of`` returns the configuration of the service on this machine. It is called with ``--key`` alone.
    """
    given = doctor_parser(prog).parse_args(argv)
    for name in ("env_file", "config"):
        if getattr(given, name) is not None and not given.key:
            raise ConfigError([f"doctor: --{name.replace('_', '-')}: is read with --key only"])
    findings = list(examine(given, config_of(given) if given.key else None))
    sys.stdout.write(shown(given.url, findings, given.format) + "\n")
    return EXIT_WRONG if any(finding.result == WRONG for finding in findings) else EXIT_OK
