"""Parameters of allocations, pruners and metrics: declared beside what reads them, and thereby flags."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, make_dataclass

from .flags import AUTO, Flags, fields_of, flag
from .registry import Registry


@dataclass(frozen=True)
class Option:
    """A number that an allocation, a pruner or a metric takes; with `read`, a file that an allocation does.

    name     of the flag, without its dashes
    help     what it means, one sentence; the default is added
    within   the least and the largest value, both allowed
    above    what it must be above
    auto     what the word `auto` tries on windows held out, of an allocation's; empty where it is not allowed
    label    what the names of runs call it; `name` where nothing is said
    read     of a file: reads it, and raises RunError for what cannot be honoured; such a file has to be given
    """

    name: str
    default: float | None
    help: str
    within: tuple[float, float] | None = None
    above: float | None = None
    auto: tuple[float, ...] = ()
    label: str | None = None
    read: Callable[[str], object] | None = None

    def part(self, value: float | str) -> str:
        """What it is called in a run's name at that value."""
        return f"{self.label or self.name}{value if value == AUTO else f'{value:g}'}"

    @property
    def kind(self) -> object:
        """The type of its field."""
        if self.read:
            return str | None
        return float | str if self.auto else float

    def field(self):
        """Its field in a configuration."""
        holds = {"within": self.within, "above": self.above, "auto": bool(self.auto), "read": self.read}
        holds = {key: value for key, value in holds.items() if value is not None and value is not False}
        if self.read:
            holds |= {"before": self.default, "metavar": "FILE"}
        return flag(self.default, self.help, group="method", option=self, **holds)


def no_auto(options: Iterable[Option]) -> None:
    """Raises ValueError for an option that `auto` would choose, which is for allocations: a programming error."""
    if any(option.auto for option in options):
        raise ValueError("`auto` chooses parameters of allocations")


def multiples(default: float) -> tuple[float, ...]:
    """What `auto` tries of a parameter with that default, unless its file says otherwise; 0 is uniform."""
    return tuple(round(factor * default, 6) for factor in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0))


def options_of(*registries: Registry) -> dict[str, Option]:
    """Every option that the entries declare, by its name; two entries may share one.

    Raises ValueError for two that differ under one name: a programming error.
    """
    found: dict[str, Option] = {}
    for option in (option for registry in registries for _, entry in registry.items() for option in entry.options):
        if found.setdefault(option.name, option) != option:
            raise ValueError(f"--{option.name} is declared twice, and not alike")
    return found


def with_options(*registries: Registry) -> Callable[[type[Flags]], type[Flags]]:
    """A decorator that gives a configuration a field for each option that it does not have yet.

    Raises ValueError for an option that has the name of another flag: a programming error.
    """

    def extend(kind: type[Flags]) -> type[Flags]:
        known, added = fields_of(kind), []
        for name, option in options_of(*registries).items():
            if name not in known:
                added.append((name, option.kind, option.field()))
            elif known[name].metadata.get("option") != option:
                raise ValueError(f"--{name} is a flag already")
        made = make_dataclass(kind.__name__, added, bases=(kind,), frozen=True)
        made.__module__, made.__qualname__, made.__doc__ = kind.__module__, kind.__qualname__, kind.__doc__
        return made

    return extend
