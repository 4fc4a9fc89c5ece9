"""Make the scripts with which a shell completes the command's options: ``tornado-fal-proxy completion bash``.

Strategy. shtab makes them of the arguments' parsers. Nothing else imports shtab, and a script runs nothing of this
package.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from tornado_fal_proxy._extras import install
from tornado_fal_proxy.doctor.command import doctor_parser
from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.service.arguments import COMMANDS, make_parser
from tornado_fal_proxy.service.settings import PROGRAM
from tornado_fal_proxy.service.usage import usage_parser

__all__ = ["completion"]

SHELLS = ("bash", "zsh", "fish")


def completion(argv: Sequence[str]) -> str:
    """Return the script for the shell that the arguments name. Raise ConfigError."""
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise ConfigError([f"completion: takes the name of a shell, one of {', '.join(SHELLS)}"])
    try:
        import shtab  # needs an extra
    except ImportError:
        raise ConfigError([f"completion needs shtab: {install('completion')}"]) from None
    parser = make_parser()
    commands: Any = parser.add_subparsers()
    about = {name: text for name, (_, text) in COMMANDS.items()}
    check = commands.add_parser("check", help=about["check"], parents=[make_parser()], add_help=False)
    usage = commands.add_parser("usage", help=about["usage"], parents=[usage_parser(add_help=False)])
    commands.add_parser("completion", help=about["completion"]).add_argument("shell", choices=SHELLS)
    parents = [doctor_parser(PROGRAM, add_help=False)]
    doctor = commands.add_parser("doctor", help=about["doctor"], parents=parents)
    for each in (parser, check, usage, doctor):
        _complete_files(each, shtab.FILE)
    return str(shtab.complete(parser, argv[0]))


def _complete_files(parser: argparse.ArgumentParser, how: object) -> None:
    for action in parser._actions:
        if action.metavar == "FILE":
            action.complete = how  # type: ignore[attr-defined]
