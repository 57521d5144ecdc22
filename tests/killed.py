"""Runs main.py and kills the process at its N-th event, with SIGKILL, as a crash would.

    python tests/killed.py N FILE main.py's flags ...

Events are, in the order in which a run meets them: a spectrum, a block called, a loss computed, and of each file
written three: before, half way, and after it has its name. With N = 0 nothing is killed and FILE gets the names of all
events.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import main
from lib import blockwise, cli, esd, evaluate, results
from lib.results import cache, checkpoint, files, journal, report, run

EVENTS: list[str] = []


def happened(name: str, at: int) -> None:
    EVENTS.append(name)
    if len(EVENTS) == at:
        os.kill(os.getpid(), signal.SIGKILL)


def watch(module, name: str, at: int) -> None:
    original = getattr(module, name)

    def wrapper(*args, **kwargs):
        happened(name, at)
        return original(*args, **kwargs)

    setattr(module, name, wrapper)


def watch_writes(at: int) -> None:
    original = files.write_file

    def write_file(path, write):
        def half(temporary):
            write(temporary)
            content = temporary.read_bytes()
            temporary.write_bytes(content[: len(content) // 2])
            happened(f"half of {path.name}", at)
            temporary.write_bytes(content)

        happened(f"before {path.name}", at)
        original(path, half)
        happened(f"after {path.name}", at)

    for module in (files, journal):
        module.write_file = write_file
    for module in (cache, checkpoint, journal, report, run):
        for name in ("write_bytes", "write_text"):
            assert getattr(module, name, None) in (None, getattr(files, name))


if __name__ == "__main__":
    at, names = int(sys.argv[1]), Path(sys.argv[2])
    watch(esd, "squared_singular_values", at)
    watch(blockwise.BlockwisePass, "leaves", at)
    watch(evaluate, "_losses", at)
    watch_writes(at)
    status = cli.main(lambda config: results.summary(main.run(config)), sys.argv[3:])
    names.write_text("\n".join(EVENTS))
    sys.exit(status)
