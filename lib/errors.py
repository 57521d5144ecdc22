"""The one exception that stands for a problem the user can act on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RunError(Exception):
    """Ends the command with this one line on stderr and exit status 2, without a traceback.

    The message names the flag (or the matrix), what was wrong and what would be right.
    Everything else that is raised is a bug and keeps its traceback.
    """


def reason_of(error: BaseException) -> str:
    """What another library's error says, whole, in one line; of one that says nothing its kind."""
    return " ".join((str(error).strip() or type(error).__name__).split())


@contextmanager
def linalg_errors() -> Iterator[None]:
    """What cuSOLVER fails at, of which torch makes a plain RuntimeError, is a torch.linalg.LinAlgError as on a CPU."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("cusolver error"):
            raise
        raise torch.linalg.LinAlgError(str(error)) from error
