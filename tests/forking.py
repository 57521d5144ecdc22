"""`python SCRIPT ARGUMENTS`, forked from a process with the libraries imported: that is most of a short run's time."""

import functools
import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from types import MappingProxyType
from unittest import mock

from shared import ROOT

HOME = tempfile.TemporaryDirectory()
CONTEXT = multiprocessing.get_context("forkserver")
# Not datasets, which reads when it is imported whether it may show bars.
CONTEXT.set_forkserver_preload(["main", "transformers.models.llama.modeling_llama"])


def environment(**more: str) -> dict[str, str]:
    """One thread, and a hub that nobody's settings or downloads reach."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    return env | {"HF_HOME": HOME.name, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def run(
    script: str,
    arguments: Sequence[str],
    *,
    file_size: int | None = None,
    timeout: float = 200,
    more: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess:
    """The finished process of a script of the project's; no file it writes passes `file_size` bytes.

    `more` is added to its environment, for what is read later than at an import.
    """
    _start()
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=_run, args=(script, arguments, said, file_size, dict(more)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([script, *arguments], timeout)
        return subprocess.CompletedProcess([script, *arguments], process.exitcode, *map(Path.read_text, said))


def run_ranks(count: int, script: str, arguments: Sequence[str]) -> subprocess.CompletedProcess:
    """`count` processes that are ranks of one group, as a launcher starts them; what they say is joined."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    of_rank = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    with ThreadPoolExecutor(count) as pool:
        done = list(pool.map(lambda more: run(script, arguments, more=more), of_rank))
    status = next((one.returncode for one in done if one.returncode), 0)
    said = ("".join(one.stdout for one in done), "".join(one.stderr for one in done))
    return subprocess.CompletedProcess([script, *arguments], status, *said)


@functools.cache
def _start() -> None:
    """Once: what libraries read of the environment they read when they are imported, and threads share it."""
    with mock.patch.dict(os.environ, environment(), clear=True):
        forkserver.ensure_running()


def _run(
    script: str, arguments: Sequence[str], said: Sequence[Path], file_size: int | None, more: dict[str, str]
) -> None:
    os.environ.update(more)
    for descriptor, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), descriptor)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
