"""The one exception that stands for a problem the user can act on."""


class RunError(Exception):
    """Ends the command with this one line on stderr and exit status 2, without a traceback.

    The message names the flag (or the matrix), what was wrong and what would be right.
    Everything else that is raised is a bug and keeps its traceback.
    """
