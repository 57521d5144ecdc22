"""What the flags of any command share: a frozen dataclass with a field for each, checked when it is made."""

import hashlib
import json
import math
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import ClassVar

from .errors import RunError
from .registry import unknown_name


def flag(default, text: str, **metadata):
    """A field that is a flag: its default, its help, and its choices and further spellings."""
    return field(default=default, metadata={"help": text, **metadata})


def flag_of(item) -> str:
    """The spelling of a field's flag that messages use: the published one."""
    return item.metadata.get("flags", (f"--{item.name}",))[0]


class Flags:
    """What the configurations of all commands share; each is a frozen dataclass with a field for every flag.

    command  the script that is run
    purpose  the first line of its help
    apart    fields that do not decide the result
    in_parts whether the model is read in parts
    """

    command: ClassVar[str]
    purpose: ClassVar[str]
    apart: ClassVar[tuple[str, ...]]
    in_parts = False

    @classmethod
    def recorded(cls, values: dict):
        """The configuration of a run that was recorded, which is not checked again."""
        config = object.__new__(cls)
        for item in fields(cls):
            value = values.get(item.name, item.default)
            object.__setattr__(config, item.name, tuple(value) if isinstance(value, list) else value)
        return config

    def make_tuples(self, *names: str) -> None:
        """Make tuples, each member once, of flags that take one or more words."""
        for name in names:
            given = getattr(self, name)
            given = (given,) if isinstance(given, str) else given
            object.__setattr__(self, name, tuple(dict.fromkeys(given)))

    def check_given(self, *required: str) -> None:
        """Raises RunError for a flag that is required and missing, empty, or none of its choices."""
        for name in required:
            if not getattr(self, name):
                raise RunError(f"--{name}: is missing")
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata.get("choices")
            if value in ("", ("",)) and item.default != "":  # of a shell's variable that is not set
                raise RunError(f"{flag_of(item)}: is empty")
            for one in value if isinstance(value, tuple) else [value]:
                if choices and one != item.default and one not in choices():
                    raise unknown_name(flag_of(item), one, choices())

    def check_named(self, name: str) -> None:
        """Raises RunError for a flag that takes one word or more and has none."""
        if not getattr(self, name):
            spelling = next(flag_of(item) for item in fields(self) if item.name == name)
            raise RunError(f"{spelling}: is missing; name at least one")

    def check_least(self, **least: int) -> None:
        """Raises RunError for a number, where there is one, below the least that it may be, or that is not finite."""
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not bound <= value < math.inf:
                given = f"{value:g}" if isinstance(value, float) else value
                raise RunError(f"--{name} {given}: must be at least {bound}{' and finite' if value > bound else ''}")

    def check_above_zero(self, *names: str) -> None:
        """Raises RunError for a number that is not above 0 and finite."""
        for name in names:
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise RunError(f"--{name} {value:g}: must be above 0{' and finite' if value > 0 else ''}")

    def window(self, limit: int | None, usual: int = 2048) -> int:
        """Tokens a window for a model made for at most `limit`; `usual` where the flag says nothing."""
        if self.seqlen is None:
            return min(usual, limit or usual)
        if limit and self.seqlen > limit:
            raise RunError(f"--seqlen {self.seqlen}: the model's limit is {limit}")
        return self.seqlen

    def unread(self) -> set[str]:
        """Fields that this run does not read."""
        return set()

    def result_flags(self) -> dict:
        """The flags that decide a run's result."""
        flags = {name: value for name, value in asdict(self).items() if name not in self.apart}
        if Path(self.model).exists():
            flags["model"] = str(Path(self.model).resolve())
        return flags

    @property
    def digest(self) -> str:
        """Of the flags that decide the result: the end of the run's name."""
        return hashlib.sha256(json.dumps(self.result_flags(), sort_keys=True).encode()).hexdigest()[:8]
