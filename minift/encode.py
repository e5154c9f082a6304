"""Text → ids and labels: what is supervised in instruction tuning.

`encode_completion` makes the mask: a row's prompt and completion are tokenised together, and only the tokens of the
completion, and the EOS, get a label. remarks.py keeps the encoded rows and the remarks about them.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from minift.errors import UserError
from minift.prompts import Template, end_with_eos, is_text_row, render, render_prompt, trailing_blanks, turns_of
from minift.remarks import JOINED, Encoded, about_completion, location_of
from minift.tokenizer import Special, Tokenizer

IGNORE_INDEX = -100  # the label of a token that does not count in the loss


class Example(NamedTuple):
    """One row as a model sees it: two lists of equal length. A label is the id if supervised, else IGNORE_INDEX.

    Labels are not shifted: labels[t] is what the hidden state at t - 1 should predict.
    """

    input_ids: list[int]
    labels: list[int]


def encode_completion(prompt: Sequence[str], completion: Sequence[str], tokenizer: Tokenizer) -> tuple[Example, bool]:
    r"""Encode prompt and completion together; supervise every token after the longest prefix shared with the prompt.

    Encoded together, they get the ids of the whole text, as in trl 1.16 (`SFTTrainer._prepare_dataset`). The second
    value is True if one token spans the end of the prompt and the start of the completion.

    >>> encode_completion(["### Response:\n"], ["Hi", Special("</s>")], tokenizer)
    (Example(input_ids=[2, 452, 6, 884, 442, 1666, 29, 202, 43, 76, 2],
             labels=[-100, -100, -100, -100, -100, -100, -100, -100, 43, 76, 2]), False)
    """
    prompt_ids = tokenizer.encode(prompt)
    input_ids = tokenizer.encode([*prompt, *completion])
    shared = sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], zip(prompt_ids, input_ids, strict=False)))
    return Example(input_ids, [IGNORE_INDEX] * shared + input_ids[shared:]), shared < len(prompt_ids)


def encode_turns(row: Mapping[str, Any], tokenizer: Tokenizer, template: Template) -> tuple[Example, bool]:
    r"""Encode a row after its history; supervise the completion and EOS of every turn, and no question.

    A turn gets the ids and labels that it has as a row of its own, but only the first has a BOS. trl 1.16 makes the
    same mask with `assistant_only_loss`, if its chat template spells the BOS and this template and has {% generation %}
    around each completion and its EOS. There, text that spells a special token becomes one.

    >>> from minift.prompts import TEMPLATES  # "HiYo</s>ByeOk</s>"
    >>> row = {"history": [["Hi", "Yo"]], "instruction": "Bye", "output": "Ok"}
    >>> encode_turns(row, tokenizer, TEMPLATES["none"])
    (Example(input_ids=[2, 43, 76, 60, 82, 2, 37, 92, 72, 50, 78, 2],
             labels=[-100, -100, -100, 60, 82, 2, -100, -100, -100, 50, 78, 2]), False)
    """
    whole, is_joined = Example([], []), False
    before: list[str] = []  # the EOS of the turn before; after it no BOS is added, and BPE joins nothing across it
    for turn in turns_of(row):
        prompt, completion = render(turn, template, tokenizer)
        example, joined = encode_completion([*before, *prompt], end_with_eos(completion, tokenizer), tokenizer)
        start = len(tokenizer.encode(before)) if before else 0
        whole = Example(whole.input_ids + example.input_ids[start:], whole.labels + example.labels[start:])
        is_joined |= joined
        before = [Special(tokenizer.eos_token)]
    return whole, is_joined


def encode_text(prompt: Sequence[str], completion: Sequence[str], tokenizer: Tokenizer) -> tuple[Example, bool]:
    """Encode a `text` row that `split_row` has cut in two; supervise each token with a character of the response.

    BPE may join the marker's last character to the response's first: this token counts; the second value is then True.
    """
    start = len(prompt[0])
    ids, offsets = tokenizer.encode_with_offsets(prompt[0] + completion[0])
    labels = [token if end > start else IGNORE_INDEX for token, (_, end) in zip(ids, offsets, strict=True)]
    is_joined = any(begin < start < end for begin, end in offsets)
    return Example([*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]), is_joined


def encode_all(prompt: Sequence[str], completion: Sequence[str], tokenizer: Tokenizer) -> tuple[Example, bool]:
    """Encode prompt and completion; supervise both, except the first token, which nothing predicts."""
    input_ids = tokenizer.encode([*prompt, *completion])
    return Example(input_ids, [IGNORE_INDEX, *input_ids[1:]]), False


def encode_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template: Template, *, max_length: int | None,
    response_template: str | None = None, supervise: Literal["completion", "all"] = "completion", source: str = "rows",
    may_be_empty: bool = False,
) -> Encoded[Example]:  # fmt: skip
    """Encode rows of an instruction, a prompt or a text; drop those without a supervised token and say so.

    Longer rows keep their first `max_length` tokens. `response_template` is for `text` rows and defaults to the
    template's own. `supervise="all"` is plain language modelling, for comparison.

    Raises UserError if every row is dropped (unless `may_be_empty`), if one cannot be encoded, and for `text` rows
    without a response template.
    """
    encoded: Encoded[Example] = Encoded(source, "row", len(rows))
    within = "after the first one" if max_length is None else f"within the first {max_length} tokens"
    for index, row in enumerate(rows):
        location = location_of(row, index)
        # "all" does not look for the response: with the marker "", a `text` row is cut at its end.
        marker = "" if supervise == "all" else marker_of(row, template, response_template)
        pieces = split_row(row, tokenizer, template, marker)
        if pieces is None:
            encoded.drop_unmarked(row["text"], marker, location)
            continue
        try:
            whole, remarks = encode_row(row, pieces, tokenizer, template, marker, supervise)
        except ValueError as error:
            raise UserError(f"{source}: {location}: {error}") from None
        example = Example(whole.input_ids[:max_length], whole.labels[:max_length])
        if count_supervised(example.labels) == 0:
            encoded.remark(f"dropped: no supervised token {within}", location)
            continue
        if len(example.input_ids) < len(whole.input_ids):
            encoded.remark(f"cut at {max_length} tokens, end token lost", location)
        encoded.keep(example, row, index, remarks)
    encoded.tokens = sum(len(example.input_ids) for example in encoded.examples)
    encoded.supervised_tokens = sum(count_supervised(example.labels) for example in encoded.examples)
    if not may_be_empty:
        encoded.check_any_kept()
    return encoded


def encode_row(
    row: Mapping[str, Any], pieces: tuple[list[str], list[str]], tokenizer: Tokenizer, template: Template, marker: str,
    supervise: str,
) -> tuple[Example, list[str]]:  # fmt: skip
    """Encode one whole row, given its pieces by `split_row`; return it with the remarks about it.

    Raises ValueError for text that cannot be encoded.
    """
    if supervise == "all":
        example, is_joined = encode_all(*pieces, tokenizer)
    elif is_text_row(row):
        example, is_joined = encode_text(*pieces, tokenizer)
    else:
        example, is_joined = encode_turns(row, tokenizer, template)
    remarks: list[str] = []
    if example.labels.count(IGNORE_INDEX) == len(example.labels) - 1:
        remarks.append("with an empty completion: only the end token is supervised")
    if is_joined:
        remarks.append(JOINED)
    return example, [*remarks, *about_completion(row, pieces, tokenizer, template, marker)]


def split_row(
    row: Mapping[str, Any], tokenizer: Tokenizer, template: Template, marker: str
) -> tuple[list[str], list[str]] | None:
    """Return the pieces of a row's prompt and of its completion, which ends with the EOS.

    A `text` row is cut after the last marker in it, before the blanks that end it; return None if it has none.
    """
    if not is_text_row(row):
        prompt, completion = render(row, template, tokenizer)
        return prompt, end_with_eos(completion, tokenizer)
    text = row["text"].removesuffix(tokenizer.eos_token)
    found = text.rfind(marker)
    if found < 0:
        return None
    start = found + len(marker) - len(trailing_blanks(marker))
    return [text[:start]], [text[start:], Special(tokenizer.eos_token)]


def encode_prompt(row: Mapping[str, Any], tokenizer: Tokenizer, template: Template) -> list[int]:
    """Return the ids that generation starts from. Raises ValueError for text that cannot be encoded."""
    return tokenizer.encode(render_prompt(row, template, tokenizer))


def marker_of(row: Mapping[str, Any], template: Template, response_template: str | None) -> str:
    """Return the text before the response of a `text` row; raise UserError if such a row has none."""
    marker = template.marker if response_template is None else response_template
    if is_text_row(row) and not marker:
        raise UserError(f"--response-template: `text` rows need one, and --template {template.name} does not have one")
    return marker


def count_supervised(labels: Sequence[int]) -> int:
    """Return how many labels count in the loss. The first token's never does: nothing predicts it."""
    return sum(label != IGNORE_INDEX for label in labels[1:])
