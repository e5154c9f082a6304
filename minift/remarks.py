"""One encoded data set: its examples, the rows they come from, categories, and remarks about rows that look wrong."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any, Generic, Literal, TypeVar

import numpy

from minift.errors import UserError
from minift.prompts import Template, is_text_row, question_fields, question_of, uses_template
from minift.tokenizer import Special, Tokenizer

NAMED_LOCATIONS = 5  # how many rows a message names
UNMARKED = "dropped: the response template is not in the text"
JOINED = (
    "where one token spans prompt and completion: answers get worse, as generation starts from ids that were not "
    "trained on; move the blanks between the two to the completion's start"
)
# Fields that often hold a part of the question and are not read. An "input" belongs to an instruction, not to a prompt.
UNREAD = ("system", "system_prompt", "context", "question", "query", "history", "input", "messages", "conversations")
MAX_CATEGORIES = 20  # with more distinct values, the field is not a category

Item = TypeVar("Item")


@dataclass(frozen=True)
class Mapped(Sequence[Any]):
    """The items with some numbers; an item is made when it is asked for, so that only those in use take memory."""

    make: Callable[[int], Any]
    numbers: Sequence[int] | numpy.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        found: Any = self.numbers[index]
        return [self.make(int(number)) for number in found] if isinstance(index, slice) else self.make(int(found))


@dataclass
class Encoded(Generic[Item]):
    """One encoded data set: examples or rankings, the rows they come from, and remarks about rows.

    `source` is what messages call the data set, usually its file. `remarks` maps a remark to the locations ("line 17")
    of the rows it applies to. The lists are `Mapped` in a data set that `files.encoded` maps.
    """

    source: str
    noun: Literal["row", "pair", "ranking"]
    num_rows: int  # before any was dropped
    examples: list[Item] = field(default_factory=list)
    rows: list[Mapping[str, Any]] = field(default_factory=list)  # those that were kept
    indices: list[int] = field(default_factory=list)  # of the kept rows in the data set
    tokens: int = 0
    supervised_tokens: int | None = None
    remarks: dict[str, list[str]] = field(default_factory=dict)
    unmarked: list[tuple[str, str, str]] = field(default_factory=list)  # location, text, marker of the first without it

    @property
    def categories(self) -> list[str | None]:
        """Return the category of each kept row. Equal ones are one object: rows read from disk have one each."""
        distinct: dict[str | None, str | None] = {}
        return [distinct.setdefault(category, category) for category in map(category_of, self.rows)]

    @property
    def summary(self) -> str:
        """Return a line of totals, then `remark_lines`."""
        totals = f"{self.source}: {len(self.examples):,} of {self.num_rows:,} {self.noun}s kept, {self.tokens:,} tokens"
        if self.supervised_tokens is not None:
            percent = f" ({self.supervised_tokens / self.tokens:.0%})" if self.tokens else ""
            totals += f", {self.supervised_tokens:,} of them supervised{percent}"
        return "\n".join([totals, *self.remark_lines])

    @property
    def causes(self) -> list[str]:
        """Return a line for each of `unmarked`: likely reasons why the marker is not in the text."""
        causes = [
            f"{location}: {text[:60]!r}: {likely_cause(text, marker)}" for location, text, marker in self.unmarked
        ]
        return [causes[0] + "; name another one with --response-template", *causes[1:]] if causes else []

    @property
    def remark_lines(self) -> list[str]:
        """Return a line for each remark, then likely causes."""
        lines = []
        for remark, locations in self.remarks.items():
            noun = self.noun + ("s" if len(locations) > 1 else "")
            lines.append(f"  {len(locations):,} {noun} {remark} ({name_first(locations)})")
        return [*lines, *(f"    {cause}" for cause in self.causes)]

    def keep(self, item: Item, row: Mapping[str, Any], index: int, remarks: Iterable[str] = ()) -> None:
        """Add a row's example or ranking, the row, its index in the data set, and remarks about it."""
        self.examples.append(item)
        self.rows.append(row)
        self.indices.append(index)
        for remark in remarks:
            self.remark(remark, location_of(row, index))

    def remark(self, remark: str, location: str) -> None:
        """Note that a remark applies to the row at a location."""
        self.remarks.setdefault(remark, []).append(location)

    def drop_unmarked(self, text: str, marker: str, location: str) -> None:
        """Note that a `text` row lacks its marker."""
        self.remark(UNMARKED, location)
        if len(self.unmarked) < NAMED_LOCATIONS:
            self.unmarked.append((location, text, marker))

    def check_any_kept(self) -> None:
        """Raise UserError if every row was dropped."""
        if self.num_rows and not self.examples:
            wanted = "has a supervised token" if self.noun == "row" else "can be learned from"
            reasons = "; ".join(line.strip() for line in self.remark_lines[: len(self.remarks) + 1])  # and one cause
            raise UserError(f"{self.source}: none of its {self.num_rows:,} {self.noun}s {wanted}: {reasons}")


def name_first(locations: Sequence[str]) -> str:
    """Return the first locations as text, with … if there are more."""
    return ", ".join([*locations[:NAMED_LOCATIONS], *(["…"] if len(locations) > NAMED_LOCATIONS else [])])


def location_of(row: Mapping[str, Any], index: int) -> str:
    """Return where a row is in its file ("line 17", by `files.datasets.Row`), or "row 17" for any other mapping."""
    return getattr(row, "location", f"row {index + 1}")


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


# ---- why a row looks wrong ----


def about_completion(
    row: Mapping[str, Any], pieces: tuple[list[str], list[str]], tokenizer: Tokenizer, template: Template, marker: str
) -> Iterator[str]:
    """Yield remarks about a training row: what is not supervised, not read, wrapped twice, or not a special token."""
    if not is_text_row(row):
        if remark := wraps_again(row, template):
            yield remark
        yield from unread(row)
    elif marker and row["text"].count(marker) > 1:
        yield "with several responses, of which only the last is supervised"
    names = [name for name in (tokenizer.eos_token, tokenizer.bos_token) if name is not None]
    plain = [piece for part in pieces for piece in part if not isinstance(piece, Special)]
    if any(name in piece for piece in plain for name in names):
        yield "whose text has the name of a special token: it stays text"


def about_preferences(
    row: Mapping[str, Any], sequences: Sequence[list[int]], tokenizer: Tokenizer, template: Template
) -> Iterator[str]:
    """Yield remarks about a row for a reward model: what is not read, wrapped twice, or without a question.

    `sequences` are the ids of the question with each response.
    """
    read = {*question_fields(row), "chosen", "rejected", "response", "responses", "kind"}
    texts = [name for name, value in row.items() if isinstance(value, str) and value and name not in {*read, *UNREAD}]
    yield from unread(row)
    yield from (f"whose {name!r} is not read" for name in texts)
    if remark := wraps_again(question_of(row) or {}, template):
        yield remark
    if len(sequences) > 1 and set(commonprefix(sequences)) <= {tokenizer.bos_token_id}:
        yield "whose sides share nothing but the BOS: no question is in them"


def unread(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield a remark for each field that probably is a part of the question and is not read."""
    read = question_fields(row)
    yield from (f"whose {name!r} is not read" for name in UNREAD if name not in read and row.get(name))


def wraps_again(row: Mapping[str, Any], template: Template) -> str | None:
    """Return a remark if a row's instruction looks like a prompt already, so that the template wraps it once more."""
    marker = template.marker.strip()
    if not marker or not uses_template(row):
        return None
    if re.search(r"Human:(?s:.*)Assistant:", row["instruction"]):
        found = "Human: … Assistant:"
    elif re.search(r"\w", marker) and re.search(rf"(?m:^\s*{re.escape(marker)})", row["instruction"]):
        found = marker
    else:
        return None
    return f"whose question is a prompt already ({found}): the template wraps it a second time"


def likely_cause(text: str, marker: str) -> str:
    """Return a likely reason, in one line, why a text does not contain a marker."""
    unescaped = marker.replace("\\n", "\n").replace("\\t", "\t")
    if unescaped != marker and unescaped in text:
        seen = "the template has a backslash and a letter where the row has a line end or tab"
        return f"{seen}; in a shell, write $'…\\n'"
    words = marker.split()
    bare_words = re.findall(r"\w+", marker)
    for pattern, flags, difference in (
        (re.escape(marker), re.IGNORECASE, "upper and lower case"),
        (r"\s*".join(map(re.escape, words)), 0, "spaces or line ends"),
        (r"\s*".join(map(re.escape, words)), re.IGNORECASE, "case and in spaces or line ends"),
        (r"\W*".join(bare_words), re.IGNORECASE, "punctuation"),
    ):
        found = list(re.finditer(pattern, text, flags)) if pattern else []
        if found:
            # One more character on either side, to show the space or colon that makes the difference.
            around = text[max(found[-1].start() - 1, 0) : found[-1].end() + 1]
            return f"it differs in {difference}: the row has {around[:80]!r}, the template is {marker[:80]!r}"
    lines = [line for line in text.splitlines() if line.strip()]
    close = difflib.get_close_matches(marker.strip(), lines, n=1, cutoff=0.6)
    return f"the nearest line is {close[0][:80]!r}" if close else f"none of its lines is like {marker[:80]!r}"
