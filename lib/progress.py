"""One progress bar for every long step: on a terminal only, and not with --quiet."""

import logging
from collections.abc import Iterable

from tqdm import tqdm

from . import ranks

log = logging.getLogger(__name__)


def progress(steps: Iterable | None, what: str, unit: str, total: int | None = None) -> tqdm:
    """A tqdm bar over `steps` (or to be advanced by hand to `total`) saying what is being done."""
    return tqdm(steps, desc=what, unit=unit, total=total, disable=bar_disabled())


def bar_disabled() -> bool | None:
    """tqdm's `disable` here: None, which shows a bar on a terminal only, or True."""
    return None if log.isEnabledFor(logging.INFO) and ranks.is_main() else True
