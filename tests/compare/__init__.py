"""minift and the reference, side by side: `make compare`.

Each module of this package but `__main__`, `page`, `training` and `faults` is a section: its `compare(setting)` yields
what was compared, on how much, and the largest difference.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Check(NamedTuple):
    """One line of the table."""

    section: str
    what: str
    on: str  # how much it was compared on
    difference: float  # the largest one; where things must be equal, the number of those that are not
    tolerance: float  # 0 where things must be equal
    note: str = ""

    @property
    def agrees(self) -> bool:
        return self.difference <= self.tolerance  # NaN agrees with nothing


class Setting(NamedTuple):
    """What is compared on what."""

    model: Path  # folder of an OPT language model
    data: Path  # rows for instruction tuning
    pairs: Path  # rows for reward modelling
    quick: bool  # as few rows and steps as still exercise everything: what `make test` runs
    scratch: Path  # a folder that is removed afterwards
    progress: Callable[[str], None]
    curves: dict[str, dict[str, list[float]]]  # for the page: title → whose → losses, a step each
