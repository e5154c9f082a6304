"""One encoded data set: its examples, the rows they come from, remarks about rows, and categories."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from minift.errors import UserError

NAMED_LOCATIONS = 5  # how many rows a summary names for each remark
MAX_CATEGORIES = 20  # with more distinct values, the field is not a category

Item = TypeVar("Item")


@dataclass
class Encoded(Generic[Item]):
    """One encoded data set: examples or rankings, the rows they come from, and remarks about rows.

    `source` is what messages call the data set, usually its file. `remarks` maps a remark to the locations ("line 17")
    of the rows it applies to.
    """

    source: str
    noun: Literal["row", "pair"]
    num_rows: int  # before any was dropped
    examples: list[Item] = field(default_factory=list)
    rows: list[Mapping[str, Any]] = field(default_factory=list)  # those that were kept
    numbers: list[int] = field(default_factory=list)  # index of each kept row in the data set
    tokens: int = 0
    supervised_tokens: int | None = None
    remarks: dict[str, list[str]] = field(default_factory=dict)
    causes: list[str] = field(default_factory=list)

    @property
    def categories(self) -> list[str | None]:
        """Return the category of each kept row."""
        return [category_of(row) for row in self.rows]

    @property
    def summary(self) -> str:
        """Return a line of totals, then one for each remark, then likely causes."""
        totals = f"{self.source}: {len(self.examples):,} of {self.num_rows:,} {self.noun}s kept, {self.tokens:,} tokens"
        if self.supervised_tokens is not None:
            percent = f" ({self.supervised_tokens / self.tokens:.0%})" if self.tokens else ""
            totals += f", {self.supervised_tokens:,} of them supervised{percent}"
        return "\n".join([totals, *self.notes])

    @property
    def notes(self) -> list[str]:
        """Return a line for each remark, then likely causes."""
        lines = []
        for remark, locations in self.remarks.items():
            named = ", ".join(locations[:NAMED_LOCATIONS]) + (", …" if len(locations) > NAMED_LOCATIONS else "")
            lines.append(f"  {len(locations):,} {self.noun}{'s' if len(locations) > 1 else ''} {remark} ({named})")
        return [*lines, *(f"    {cause}" for cause in self.causes)]

    def keep(self, item: Item, row: Mapping[str, Any], number: int) -> None:
        """Add a row's example or ranking, the row, and its index in the data set."""
        self.examples.append(item)
        self.rows.append(row)
        self.numbers.append(number)

    def remark(self, remark: str, location: str) -> None:
        """Note that a remark applies to the row at a location."""
        self.remarks.setdefault(remark, []).append(location)

    def check_any_kept(self, wanted: str) -> None:
        """Raise UserError if every row was dropped; `wanted` completes the message."""
        if self.num_rows and not self.examples:
            reasons = self.notes[: len(self.remarks)] + self.causes[:1]
            listed = "; ".join(reason.strip() for reason in reasons)
            raise UserError(f"{self.source}: none of its {self.num_rows} {self.noun}s {wanted}: {listed}")


def location_of(row: Mapping[str, Any], number: int) -> str:
    """Return where a row is in its file ("line 17"), or its number, counted from 1, if it does not have a file."""
    return getattr(row, "location", f"row {number}")


def category_of(row: Mapping[str, Any]) -> str | None:
    """Return a row's category: its field "kind", if that is a string."""
    category = row.get("kind")
    return category if isinstance(category, str) else None


def by_category(items: Sequence[Item], categories: Sequence[str | None]) -> dict[str, list[Item]]:
    """Group items: all of them under "all", then those of each category, sorted by name.

    With more than `MAX_CATEGORIES` distinct values the field is not a category, and "all" is the only group.

    >>> by_category([1, 2, 3], ["loop", None, "loop"])
    {'all': [1, 2, 3], 'loop': [1, 3]}
    """
    names = sorted({name for name in categories if name is not None} - {"all"})
    groups = {"all": list(items)}
    for name in names if len(names) <= MAX_CATEGORIES else []:
        groups[name] = [item for item, category in zip(items, categories, strict=True) if category == name]
    return groups
