"""Try the properties with inputs that atheris makes up: ``python -m fuzz [--seconds=5] [TARGET ...]``.

Each target runs in a process of its own, one after the other, from its inputs in ``corpus``. ``--seconds=260`` for each
of the seven takes half an hour. A finding is kept as ``fuzz/found/TARGET-crash-...``, and makes the exit code 1;
``python -m fuzz TARGET --replay=FILE`` shows it again. When the fault is mended the file belongs in the corpus.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FOUND = HERE / "found"
# Limits the length of an input: far longer than a fault needs to show itself.
MAX_BYTES = 2048
# Limits how much of the end of atheris' output is shown: the traceback, the input and the file's name fit.
MAX_SHOWN_CHARS = 8000


def main() -> int:
    names = sorted(path.name for path in (HERE / "corpus").iterdir())
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Try the properties with made-up inputs.")
    parser.add_argument("targets", metavar="TARGET", nargs="*", help=f"one of {', '.join(names)} (default: all)")
    parser.add_argument("--seconds", type=int, default=5, help="for each target (default: 5)")
    parser.add_argument("--replay", metavar="FILE", help="try only the input in this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.targets) - set(names):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if options.child:
        fuzz_here(options.targets[0], options.seconds, options.replay)
    return max(run(name, options.seconds, options.replay) for name in options.targets or names)


def run(name: str, seconds: int, replay: str | None) -> int:
    """Fuzz one target in a process of its own. Return 1 when it found something, else 0."""
    command = [sys.executable, "-m", "fuzz", "--child", f"--seconds={seconds}", name]
    if replay:
        command.append(f"--replay={replay}")
    process = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    code = process.wait()
    inputs, edges = (re.findall(r"^#(\d+)\s.*?cov: (\d+)", output, re.MULTILINE) or [("no", "no")])[-1]
    print(f"{name}: {inputs} inputs, {edges} edges{'' if code == 0 else ', FAILED'}", flush=True)
    if code:
        print(output[-MAX_SHOWN_CHARS:])
    return 0 if code == 0 else 1


def entry(word: bytes) -> str:
    """Return a line of libFuzzer's dictionary."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n'


def fuzz_here(name: str, seconds: int, replay: str | None) -> None:
    """Fuzz in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["tornado_fal_proxy"]):
        from fuzz.targets import TARGETS
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as directory:
        words = Path(directory, "words")
        words.write_text("".join(map(entry, target.words)))
        FOUND.mkdir(exist_ok=True)
        arguments = [
            f"-max_total_time={seconds}",
            f"-max_len={MAX_BYTES}",
            f"-dict={words}",
            f"-artifact_prefix={FOUND}/{name}-",
        ]
        new = Path(directory, "new")
        new.mkdir()
        inputs = [replay] if replay else [str(new), str(HERE / "corpus" / name)]
        atheris.Setup([sys.argv[0], *arguments, *inputs], target.run)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
