"""What the flags of any command share: a frozen dataclass with a field for each, checked when it is made."""

import hashlib
import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import Field, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from .errors import RunError
from .registry import unknown_name

AUTO = "auto"  # of a number: chosen on held-out calibration windows

# What a person is doing, in the order of --help and of docs/flags.md.
GROUPS = ("model", "method", "training", "calibration", "text", "evaluation", "output", "large models")


def flag(default, text: str, *, group: str, **metadata):
    """A field that is a flag: its default, its help, the one of GROUPS that it belongs to, and what else holds of it.

    choices  gives the words that it may be
    flags    further spellings; the first is the one that messages use
    least    a number must be finite and at least this
    above    or finite and above this
    within   or between these two, which are allowed
    auto     whether the word `auto` may stand for the number
    read     reads the file that it names, and raises RunError where it cannot
    when     the field or property without which it is not read
    shown    the default in words, where it is none that the field could have
    metavar  what --help calls its value, where the last word of its name does not say
    option   the Option that declared it, of a parameter of an allocation, a pruner or a metric
    before   what runs did before there was the flag: of that value it is no part of their names
    """
    return field(default=default, metadata={"help": text, "group": group, **metadata})


def flag_of(item: Field) -> str:
    """The spelling of a field's flag that messages use: the published one."""
    return spellings(item)[0]


def spellings(item: Field) -> list[str]:
    """All spellings of a field's flag, the published one first."""
    return list(dict.fromkeys([*item.metadata.get("flags", ()), f"--{item.name}"]))


def default_of(item: Field) -> str:
    """A flag's default for people: as it would be given, or in words; empty where there is none."""
    if "shown" in item.metadata:
        return item.metadata["shown"]
    if isinstance(item.default, tuple):
        return " ".join(item.default)
    if isinstance(item.default, float):
        return f"{item.default:g}"
    return "" if item.default is None else str(item.default)


def fields_of(kind: type) -> dict[str, Field]:
    """The fields of a configuration by their names."""
    return {item.name: item for item in fields(kind)}


class Flags:
    """What the configurations of all commands share; each is a frozen dataclass with a field for every flag.

    command    the script that is run
    purpose    the first line of its help
    apart      fields that do not decide the result
    first      fields that stand first in their groups: the flags of the published command
    in_parts   whether the model is read in parts
    quiet      whether only what is asked for is printed
    contents   what the files that flags name held when the configuration was made
    """

    command: ClassVar[str]
    purpose: ClassVar[str]
    apart: ClassVar[tuple[str, ...]] = ()
    first: ClassVar[tuple[str, ...]] = ()
    in_parts = False
    quiet = False
    contents: ClassVar[Mapping[str, object]] = MappingProxyType({})

    @classmethod
    def groups(cls) -> dict[str, list[Field]]:
        """What a person is doing -> the flags for it."""
        known = fields_of(cls)
        ordered = [known[name] for name in dict.fromkeys([*cls.first, *known])]
        groups = {group: [item for item in ordered if item.metadata["group"] == group] for group in GROUPS}
        return {group: items for group, items in groups.items() if items}

    @classmethod
    def recorded(cls, values: dict):
        """The configuration of a run that was recorded, which is not checked again."""
        config = object.__new__(cls)
        for item in fields(cls):
            value = values.get(item.name, item.metadata.get("before", item.default))
            object.__setattr__(config, item.name, tuple(value) if isinstance(value, list) else value)
        return config

    def make_tuples(self) -> None:
        """Make tuples, each member once, of flags that take one or more words."""
        for item in fields(self):
            if isinstance(item.default, tuple):
                given = getattr(self, item.name)
                given = (given,) if isinstance(given, str) else given
                object.__setattr__(self, item.name, tuple(dict.fromkeys(given)))

    def check_each(self, *required: str) -> None:
        """Raises RunError for a flag that is required and missing, empty, none of its choices or out of its bounds, or
        for a file that cannot be read.
        """
        for name in required:
            if not getattr(self, name):
                raise RunError(f"{flag_of(fields_of(self)[name])}: is missing")
        for item in fields(self):
            self._check_words(item)
        for item in fields(self):
            self._check_number(item)
        files = [item for item in fields(self) if "read" in item.metadata and getattr(self, item.name) is not None]
        contents = {item.name: item.metadata["read"](getattr(self, item.name)) for item in files}
        object.__setattr__(self, "contents", contents)

    def _check_words(self, item: Field) -> None:
        value, choices = getattr(self, item.name), item.metadata.get("choices")
        if value in ("", ("",)) and item.default != "":  # of a shell's variable that is not set
            raise RunError(f"{flag_of(item)}: is empty")
        for one in value if isinstance(value, tuple) else [value]:
            if choices and one != item.default and one not in choices():
                raise unknown_name(flag_of(item), one, choices())

    def _check_number(self, item: Field) -> None:
        value, name, bounds = getattr(self, item.name), flag_of(item), item.metadata
        least, above, within = (bounds.get(key) for key in ("least", "above", "within"))
        auto = bounds.get("auto", False)
        if value is None or (auto and value == AUTO) or (least is None and above is None and within is None):
            return
        if not isinstance(value, numbers.Real):
            raise RunError(f"{name}: '{value}' is {f'neither a number nor {AUTO}' if auto else 'no number'}")
        given = f"{value:g}" if isinstance(value, float) else value
        if least is not None and not least <= value < math.inf:
            raise RunError(f"{name} {given}: must be at least {least}{' and finite' if value > least else ''}")
        if above is not None and not above < value < math.inf:
            raise RunError(f"{name} {given}: must be above {above}{' and finite' if value > above else ''}")
        if within is not None and not within[0] <= value <= within[1]:
            raise RunError(f"{name} {given}: must lie in [{within[0]:g}, {within[1]:g}]")

    def check_named(self, name: str) -> None:
        """Raises RunError for a flag that takes one word or more and has none."""
        if not getattr(self, name):
            raise RunError(f"{flag_of(fields_of(self)[name])}: is missing; name at least one")

    def window(self, limit: int | None, usual: int = 2048) -> int:
        """Tokens a window for a model made for at most `limit`; `usual` where the flag says nothing."""
        if self.seqlen is None:
            return min(usual, limit or usual)
        if limit and self.seqlen > limit:
            raise RunError(f"--seqlen {self.seqlen}: the model's limit is {limit}")
        return self.seqlen

    def unread(self) -> set[str]:
        """Fields that this run does not read."""
        needs = {item.name: item.metadata["when"] for item in fields(self) if "when" in item.metadata}
        return {name for name, when in needs.items() if not getattr(self, when)}

    def asks(self, switch: str) -> bool:
        """Whether a switch is on, and read by this run."""
        return getattr(self, switch) and switch not in self.unread()

    def effective(self) -> dict:
        """Each flag's value; of one that this run does not read, the default."""
        unread = self.unread()
        return {item.name: item.default if item.name in unread else getattr(self, item.name) for item in fields(self)}

    def result_flags(self) -> dict:
        """The flags that decide a run's result."""
        before = {item.name: item.metadata["before"] for item in fields(self) if "before" in item.metadata}
        unread = self.unread()
        flags = {
            name: value
            for name, value in self.effective().items()
            if name not in self.apart and not (name in before and (name in unread or value == before[name]))
        }
        if Path(self.model).exists():
            flags["model"] = str(Path(self.model).resolve())
        for name, content in self.contents.items():  # and not where it lay
            flags[name] = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
        return flags

    @property
    def digest(self) -> str:
        """Of the flags that decide the result: the end of the run's name."""
        return hashlib.sha256(json.dumps(self.result_flags(), sort_keys=True).encode()).hexdigest()[:8]
