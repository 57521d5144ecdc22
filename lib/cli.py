"""The command line: flags out of a configuration's fields, one line for an error, the log on stderr."""

import argparse
import difflib
import functools
import logging
import os
import signal
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import Field

import torch
import transformers
from tqdm import tqdm
from transformers import modeling_gguf_pytorch_utils

from . import ranks
from .config import RunConfig
from .errors import RunError
from .flags import Flags, default_of, fields_of, spellings
from .memory import keep_freed_memory

FREED_BYTES, FREED_BYTES_STREAMING = 32 << 20, 1 << 20  # bytes of the largest tensors whose memory is used again


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, and not the usage as well."""
        raise RunError(message.removeprefix("argument "))


def parse(arguments: Sequence[str] | None = None, kind: type[Flags] = RunConfig) -> Flags:
    """The command line as a configuration of that kind. Raises RunError for anything that cannot be honoured."""
    parser = Parser(prog=kind.command, description=kind.purpose, allow_abbrev=False)
    types = typing.get_type_hints(kind)
    for title, items in kind.groups().items():
        group = parser.add_argument_group(title)
        for item in items:
            _add_flag(group, item, types[item.name])
    namespace, rest = parser.parse_known_args(arguments)
    if rest:
        flag = rest[0].partition("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        near = [option for option in known if option.startswith(flag)] or difflib.get_close_matches(flag, known, n=1)
        guess = f"did you mean {' or '.join(near)}?" if near and flag.startswith("-") else "see --help"
        raise RunError(f"{flag}: is no flag; {guess}")
    return kind(**vars(namespace))


def _add_flag(group, item: Field, declared) -> None:
    """A field as a flag of one of the parser's groups."""
    options = {"dest": item.name, "default": item.default, "help": item.metadata["help"].replace("%", "%%")}
    if declared is bool:
        options["action"] = argparse.BooleanOptionalAction if item.default else "store_true"
        options["help"] += " (default: on)" if item.default else ""
    else:
        options["type"] = _reader(declared)
        options["metavar"] = _metavar(item, options["type"])
        options["nargs"] = "+" if isinstance(item.default, tuple) else None
        if default := default_of(item):
            options["help"] += f" (default: {default})"
    if choices := item.metadata.get("choices"):
        options["help"] += f"; one of: {', '.join(choices())}"
    group.add_argument(*spellings(item), **options)


def _metavar(item: Field, kind: Callable) -> str:
    return item.metadata.get("metavar") or ("N" if kind is int else item.name.rpartition("_")[2].upper())


def _reader(declared) -> Callable[[str], object]:
    """What turns a flag's text into its field's type; of `float | str`, a number where the text is one."""
    kinds = [kind for kind in typing.get_args(declared) or [declared] if kind not in (type(None), ...)]
    if kinds != [float, str]:
        return kinds[0]

    def number_or_word(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    return number_or_word


class _TqdmHandler(logging.StreamHandler):
    """Log lines above the progress bar instead of across it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(quiet: bool) -> None:
    """The project's log on stderr and bars on a terminal; of the libraries no log, and bars where ours are shown."""
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger(__package__)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # imported later, and what fails there is our one line
    warnings.filterwarnings("ignore", category=FutureWarning)
    if quiet or not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        modeling_gguf_pytorch_utils.tqdm = functools.partial(tqdm, disable=True)  # it asks no setting of its library


def out_of_memory(error: torch.OutOfMemoryError, config: Flags) -> str:
    """What to say of a GPU that is full: at which stage, and what would help it."""
    stage = getattr(error, "stage", None)
    where = f" at the stage '{stage}'" if stage else ""
    return f"out of GPU memory{where}; try {config.relief(stage)} ({str(error).split('.')[0]})"


def take_interrupts() -> None:
    """Ctrl-C raises KeyboardInterrupt again, where a command has turned that off while libraries are imported."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main(run: Callable[[Flags], str], arguments: Sequence[str] | None = None, kind: type[Flags] = RunConfig) -> int:
    """Parse, run, print what `run` returns; the command's exit status.

    0 done, 2 a problem the user can act on, 130 interrupted, 141 nobody reads on; anything else keeps its traceback.
    """
    take_interrupts()
    try:
        config = parse(arguments, kind)
        keep_freed_memory(FREED_BYTES_STREAMING if config.in_parts else FREED_BYTES)
        ranks.join(config.device)
        set_up_logging(config.quiet or not ranks.is_main())
        said = run(config)
        if ranks.is_main():
            print(said, flush=True)
        ranks.leave()
    except RunError as error:
        who = "" if ranks.world_size() == 1 else f" on rank {ranks.rank()}"
        if ranks.reports_errors():
            print(f"{kind.command}: error{who}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"{kind.command}: error: {out_of_memory(error, config)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; what was finished is kept" if "save" in fields_of(kind) else ""
        print(f"{kind.command}: interrupted{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output reads no more of it, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still holds of it
        return 128 + signal.SIGPIPE
    return 0
