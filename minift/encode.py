"""Rows to ids and labels: the only place that decides what is supervised."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from minift.errors import UserError
from minift.prompts import Template, render, render_prompt
from minift.tokenizer import Special, Tokenizer

UNSUPERVISED = -100
MOST_MARGIN = 1_000_000  # of rewards, which are a few units apart: no loss could ever meet more
NAMED_PLACES = 5  # how many rows of each sort a report names


class Example(NamedTuple):
    """A row as a model sees it: two lists of one length. `labels` is `input_ids` where supervised, -100 elsewhere.

    Unshifted: labels[t] is what the hidden state at t - 1 should predict.
    """

    input_ids: list[int]
    labels: list[int]


class Ranking(NamedTuple):
    """Two or more responses to one prompt, best first, each the ids of its whole row: a pair is (chosen, rejected)."""

    responses: list[list[int]]
    margin: float
    best_only: bool = False  # the first is better than each of the others, of which nothing else is known


@dataclass
class Report:
    """What became of some rows or pairs. `befell` has the places ("line 17") of those that the same thing befell."""

    source: str
    noun: str
    rows: int
    kept: int = 0
    tokens: int = 0
    supervised_tokens: int | None = None
    befell: dict[str, list[str]] = field(default_factory=dict)
    causes: list[str] = field(default_factory=list)

    def tell(self, what: str, place: str) -> None:
        self.befell.setdefault(what, []).append(place)

    def lines(self) -> list[str]:
        """The report for people: a line of totals, then one for each thing that befell a row, then likely causes."""
        totals = f"{self.source}: {self.kept:,} of {self.rows:,} {self.noun}s kept, {self.tokens:,} tokens"
        if self.supervised_tokens is not None:
            share = f" ({self.supervised_tokens / self.tokens:.0%})" if self.tokens else ""
            totals += f", {self.supervised_tokens:,} of them supervised{share}"
        lines = [totals]
        for what, places in self.befell.items():
            named = ", ".join(places[:NAMED_PLACES]) + (", …" if len(places) > NAMED_PLACES else "")
            lines.append(f"  {len(places):,} {self.noun}{'s' if len(places) > 1 else ''} {what} ({named})")
        return [*lines, *(f"    {cause}" for cause in self.causes)]

    def check_any_kept(self, wanted: str) -> None:
        if not self.kept:
            reasons = "; ".join(line.strip() for line in self.lines()[1:])
            raise UserError(f"{self.source}: none of its {self.rows} {self.noun}s {wanted}: {reasons}")


def encode_rows(
    rows: Sequence[Mapping[str, str]],
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int | None,
    positions: int | None = None,
    response_template: str | None = None,
    supervise: Literal["completion", "all"] = "completion",
    source: str = "rows",
) -> tuple[list[Example], list[int], Report]:
    """Encode rows: the examples that can be learned from, their indices in `rows`, and a report on all rows.

    Longer rows keep their first `max_length` tokens; with None none may be longer than `positions`, the model's. A row
    with nothing left to predict is dropped and reported. `response_template` is for `text` rows and defaults to the
    template's own. `supervise="all"` makes every token but the first count, the prompt's too: plain language modelling,
    to compare with. `source` is what messages call the rows, usually their file.

    Raises UserError if no row is left, a row is longer than the model's positions or can't be encoded, or `text` rows
    come without a response template.
    """
    if max_length is not None and positions is not None and max_length > positions:
        raise UserError(f"--max-length {max_length}: more than the model's {positions} positions")
    report = Report(source, "row", len(rows))
    within = "after its first" if max_length is None else f"within the first {max_length} tokens"
    examples: list[Example] = []
    kept: list[int] = []
    for index, row in enumerate(rows):
        place = getattr(row, "place", f"row {index + 1}")
        # "all" has no need to find the response. The empty template is in every text.
        wanted = "" if supervise == "all" else _wanted_template(row, template, response_template)
        pieces = split_row(row, tokenizer, template, wanted)
        if pieces is None:
            report.tell("dropped: the response template is not in the text", place)
            if len(report.causes) < NAMED_PLACES:
                report.causes.append(f"{place}: {row['text'][:60]!r}: {likely_cause(row['text'], wanted)}")
            continue
        try:
            if supervise == "all":
                example, merged = encode_all(*pieces, tokenizer), False
            elif is_text_row(row):
                example, merged = encode_text(*pieces, tokenizer)
            else:
                example, merged = encode_completion(*pieces, tokenizer)
        except ValueError as error:
            raise UserError(f"{source}: {place}: {error}") from None
        length = len(example.input_ids)
        if max_length is None and positions is not None and length > positions:
            raise UserError(
                f"{source}: {place}: {length} tokens, more than the model's {positions} positions; "
                f"cut such rows with --max-length {positions}, or take them out"
            )
        cut = Example(example.input_ids[:max_length], example.labels[:max_length])
        # The label of the first token is never predicted: there is nothing before it.
        if not any(label != UNSUPERVISED for label in cut.labels[1:]):
            report.tell(f"dropped: no supervised token {within}", place)
            continue
        if len(cut.input_ids) < length:
            report.tell(f"cut at {max_length} tokens, end token lost", place)
        if sum(label != UNSUPERVISED for label in example.labels) == 1:
            report.tell("with an empty completion: only the end token is supervised", place)
        if merged:
            report.tell("where one token joins prompt and completion: generating starts from other ids", place)
        if _spells_special(pieces, tokenizer):
            report.tell("that spell a special token in their text: it stays text", place)
        examples.append(cut)
        kept.append(index)
    report.kept = len(kept)
    report.tokens = sum(len(example.input_ids) for example in examples)
    report.supervised_tokens = sum(label != UNSUPERVISED for example in examples for label in example.labels)
    report.check_any_kept("has a supervised token")
    return examples, kept, report


def encode_completion(prompt: Sequence[str], completion: Sequence[str], tokenizer: Tokenizer) -> tuple[Example, bool]:
    """A prompt and its completion, supervised from where their ids part from the prompt's own: trl 1.16's rule.

    They are tokenised together, so that the ids are those of the whole text (SFTTrainer._prepare_dataset). The second
    value tells whether a token joins the prompt's end to the completion, so that the ids of the prompt alone, which
    generation starts from, are no beginning of these.

    >>> encode_completion(["### Response:\n"], ["Hi", Special("</s>")], opt_tokenizer)
    (Example(input_ids=[2, 48134, 19121, 35, 50118, 30086, 2], labels=[-100, -100, -100, -100, -100, 30086, 2]), False)
    """
    prompt_ids = tokenizer.encode(prompt)
    input_ids = tokenizer.encode([*prompt, *completion])
    pairs = zip(prompt_ids, input_ids, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return Example(input_ids, [UNSUPERVISED] * shared + input_ids[shared:]), shared < len(prompt_ids)


def encode_text(prompt: Sequence[str], completion: Sequence[str], tokenizer: Tokenizer) -> tuple[Example, bool]:
    """A `text` row, cut in two by `split_row`: supervised where a token holds any character of the second part.

    Characters, not tokens, are what is compared: a response that begins with a line end is supervised from its first
    character although BPE may join that to the template's own last one. The second value as in `encode_completion`.
    """
    start = len(prompt[0])
    ids, offsets = tokenizer.encode_with_offsets(prompt[0] + completion[0])
    labels = [token if end > start else UNSUPERVISED for token, (_, end) in zip(ids, offsets, strict=True)]
    merged = any(begin < start < end for begin, end in offsets)
    return Example([*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]), merged


def encode_all(prompt: Sequence[str], completion: Sequence[str], tokenizer: Tokenizer) -> Example:
    """A prompt and its completion, every token of both supervised but the first, which nothing comes before."""
    input_ids = tokenizer.encode([*prompt, *completion])
    return Example(input_ids, [UNSUPERVISED, *input_ids[1:]])


def split_row(
    row: Mapping[str, str], tokenizer: Tokenizer, template: Template, response_template: str
) -> tuple[list[str], list[str]] | None:
    """The pieces of a row's prompt and of its completion, which ends in the EOS, added unless it is there.

    An EOS spelled out at the very end counts as one; anywhere else it is text. A `text` row is cut after the last
    `response_template` in it; None if it has none.
    """
    if not is_text_row(row):
        prompt, completion = render(row, template, tokenizer.eos_token, tokenizer.bos_token)
        if isinstance(completion[-1], Special) and completion[-1] == tokenizer.eos_token:
            completion = completion[:-1]
        *pieces, last = completion
        return prompt, [*pieces, last.removesuffix(tokenizer.eos_token), Special(tokenizer.eos_token)]
    text = row["text"].removesuffix(tokenizer.eos_token)
    found = text.rfind(response_template)
    if found < 0:
        return None
    start = found + len(response_template)
    return [text[:start]], [text[start:], Special(tokenizer.eos_token)]


def prompt_ids_and_reference(
    row: Mapping[str, str], tokenizer: Tokenizer, template: Template, response_template: str | None = None
) -> tuple[list[int], str]:
    """The ids that generation starts from for a row, and the text a model ought to answer with.

    Raises UserError for a `text` row that the response template is not in.
    """
    wanted = _wanted_template(row, template, response_template)
    pieces = split_row(row, tokenizer, template, wanted)
    if pieces is None:
        raise UserError(
            f"--response-template {wanted!r}: not in {row['text'][:60]!r}: {likely_cause(row['text'], wanted)}"
        )
    prompt, completion = pieces
    return tokenizer.encode(prompt), "".join(piece for piece in completion if not isinstance(piece, Special))


def encode_rankings(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int,
    positions: int,
    margin_field: str | None = None,
    source: str = "rows",
) -> tuple[list[Ranking], list[int], Report]:
    """Encode pairs and rankings (`datasets.PAIR_KINDS`): those that can be learned from, their indices in `rows`, and a
    report on all rows.

    Equal sides teach nothing, and of a side over `max_length` the end, where its reward is read, would be missing: such
    rows are dropped and reported. `margin_field` names the field of a row's margin, 0 without one.

    Raises UserError if no row is left, `max_length` is more than the model's `positions`, or a margin is no number.
    """
    if max_length > positions:
        raise UserError(f"--max-length {max_length}: more than the model's {positions} positions")
    report = Report(source, "pair", len(rows))
    rankings: list[Ranking] = []
    kept: list[int] = []
    for index, row in enumerate(rows):
        place = getattr(row, "place", f"row {index + 1}")
        responses = responses_of(row)
        try:
            sides = [encode_response(row.get("prompt"), response, tokenizer, template) for response in responses]
        except ValueError as error:
            raise UserError(f"{source}: {place}: {error}") from None
        margin = 0.0 if margin_field is None else _margin(row, margin_field, f"{source}: {place}")
        if len({tuple(side) for side in sides}) < len(sides):
            report.tell("dropped: its sides are equal", place)
        elif max(map(len, sides)) > max_length:
            is_filled = min(map(len, sides)) > max_length and _prompt_length(row, tokenizer, template) >= max_length
            what = f"the prompt alone fills the {max_length}" if is_filled else f"a side is longer than {max_length}"
            report.tell(f"dropped: {what} tokens", place)
        else:
            if "" in responses:
                report.tell("with an empty response: its reward is that of the end token", place)
            rankings.append(Ranking(sides, margin))
            kept.append(index)
    report.kept = len(kept)
    report.tokens = sum(len(side) for ranking in rankings for side in ranking.responses)
    report.check_any_kept("can be learned from")
    return rankings, kept, report


def group_by_chosen(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Pairs of one prompt and chosen response (and margin) as one ranking of that response over all rejected ones.

    Together they share what they begin with, so a batch of as many tokens compares more; and a prompt is seen once an
    epoch, not once for each of its pairs, which overfits (Ouyang et al. 2022, arXiv 2203.02155, section 3.5).
    """
    groups: dict[tuple, Ranking] = {}
    for number, ranking in enumerate(rankings):
        best, *others = ranking.responses
        key = (tuple(best), ranking.margin) if len(others) == 1 else (number,)
        group = groups.setdefault(key, Ranking([best], ranking.margin, len(others) == 1))
        # The same rejected answer twice would be two rows of one text.
        group.responses.extend(other for other in others if other not in group.responses)
    return [*groups.values()]


def responses_of(row: Mapping[str, Any]) -> list[str]:
    """The responses of a pair or a ranking, best first."""
    return row["responses"] if "responses" in row else [row["chosen"], row["rejected"]]


def encode_response(prompt: str | None, response: str, tokenizer: Tokenizer, template: Template) -> list[int]:
    """The ids of a response after its prompt, which goes through the template as an instruction, and an EOS.

    Without a prompt the response is a whole dialogue, used as it is.

    >>> encode_response("Hi", "Yo", opt_tokenizer, TEMPLATES["dialogue"])  # "\n\nHuman: Hi\n\nAssistant: Yo"
    [2, 50118, 50118, 33837, 35, 12289, 50118, 50118, 46184, 35, 17514, 2]
    """
    fields = {"prompt": "", "completion": response} if prompt is None else {"instruction": prompt, "output": response}
    before, after = split_row(fields, tokenizer, template, "")
    return tokenizer.encode([*before, *after])


def _margin(row: Mapping[str, Any], name: str, where: str) -> float:
    margin = row.get(name)
    # The comparison is false for NaN, and no whole number is too large for it.
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= MOST_MARGIN:
        what = f"{margin!r:.40}, expected a number of at most {MOST_MARGIN:,}" if name in row else "missing"
        raise UserError(f"{where}: field '{name}', its --margin-field, is {what}")
    return float(margin)


def _prompt_length(row: Mapping[str, Any], tokenizer: Tokenizer, template: Template) -> int:
    if row.get("prompt") is None:
        return 0
    pieces = render_prompt({"instruction": row["prompt"]}, template, tokenizer.eos_token, tokenizer.bos_token)
    return len(tokenizer.encode(pieces))


def is_text_row(row: Mapping[str, str]) -> bool:
    """Whether "text" is all that the row has: data sets also keep rendered copies of instructions under that name."""
    return "text" in row and not any(name in row for name in ("instruction", "prompt"))


def likely_cause(text: str, response_template: str) -> str:
    """Why a response template isn't in a text, as far as can be told: for people, on one line."""
    spelled_out = response_template.replace("\\n", "\n").replace("\\t", "\t")
    if spelled_out != response_template and spelled_out in text:
        return (
            "the template holds a backslash and a letter where the row has a line end or tab; in a shell, write $'…\\n'"
        )
    words = response_template.split()
    bare_words = re.findall(r"\w+", response_template)
    for pattern, flags, difference in (
        (re.escape(response_template), re.IGNORECASE, "upper and lower case"),
        (r"\s*".join(map(re.escape, words)), 0, "spaces or line ends"),
        (r"\s*".join(map(re.escape, words)), re.IGNORECASE, "case and in spaces or line ends"),
        (r"\W*".join(bare_words), re.IGNORECASE, "punctuation"),
    ):
        found = list(re.finditer(pattern, text, flags)) if pattern else []
        if found:
            # A character more on either side shows the space or colon that is at fault.
            around = text[max(found[-1].start() - 1, 0) : found[-1].end() + 1]
            return f"it differs in {difference}: the row has {around!r}, the template is {response_template!r}"
    lines = [line for line in text.splitlines() if line.strip()]
    close = difflib.get_close_matches(response_template.strip(), lines, n=1, cutoff=0.6)
    return f"the nearest line is {close[0]!r}" if close else f"no line of it is like {response_template!r}"


def _wanted_template(row: Mapping[str, str], template: Template, response_template: str | None) -> str:
    wanted = template.response_template if response_template is None else response_template
    if is_text_row(row) and not wanted:
        raise UserError(
            f"--response-template: rows of text need one, and --template {template.name} has none of its own"
        )
    return wanted


def _spells_special(pieces: tuple[list[str], list[str]], tokenizer: Tokenizer) -> bool:
    names = {tokenizer.eos_token, tokenizer.bos_token} - {None}
    plain = [piece for part in pieces for piece in part if not isinstance(piece, Special)]
    return any(name in piece for piece in plain for name in names)
