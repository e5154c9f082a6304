"""minift and the packages it replaces (the reference), side by side: `make compare`.

Each module here is a section, except `__main__`, `page`, `training`, `relu`, `faults` and `record_old_collator`. A
section's `compare(setting)` yields what was compared, on how much, and the largest difference.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple


class Check(NamedTuple):
    """One line of the table."""

    section: str
    what: str
    on: str  # how much was compared
    difference: float  # the largest one; for things that must be equal, the number of those that are not
    tolerance: float  # 0 for things that must be equal
    note: str = ""

    @property
    def agrees(self) -> bool:
        return self.difference <= self.tolerance  # NaN never agrees

    @property
    def cells(self) -> tuple[str, ...]:
        """Return the columns of the table, without the note."""
        difference = f"{self.difference:.1e}" if self.difference else "0"
        verdict = "agree" if self.agrees else "DISAGREE"
        return self.section, self.what, self.on, difference, f"{self.tolerance:.2g}", verdict


class Difference(NamedTuple):
    """One deliberate difference; `minift` and `reference` hold what was measured."""

    name: str
    minift: str
    reference: str
    reason: str


class Setting(NamedTuple):
    """The model and data to compare on."""

    model: Path  # folder of an OPT language model
    data: Path  # rows for instruction tuning
    pairs: Path  # rows for reward modelling
    quick: bool  # as few rows and steps as still exercise everything: this is what `make test` runs
    scratch: Path  # a folder that is removed afterwards
    progress: Callable[[str], None]
    curves: dict[str, dict[str, list[float]]]  # for the page: title → side → the loss of each step


def digest(rows: Sequence[Sequence]) -> str:
    """Return a digest of [[input_ids, labels], …]: record_old_collator.py records it, masks.py compares it."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
