"""Text → ids and labels: the only file that decides what is supervised.

`encode_completion` makes the mask: a row's prompt and completion are tokenised together, and only the tokens of the
completion, and the EOS, get a label. encoded.py keeps the encoded rows and the remarks about them.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from minift.encoded import NAMED_LOCATIONS, Encoded, location_of
from minift.errors import UserError
from minift.prompts import (
    WRAPPED_AGAIN,
    Template,
    has_turns,
    is_text_row,
    leading_blanks,
    likely_cause,
    question_fields,
    render,
    render_prompt,
)
from minift.tokenizer import Special, Tokenizer

# Parts of a question in other data sets. An "input" belongs to an instruction, not to a prompt.
UNREAD = ("system", "system_prompt", "context", "question", "query", "history", "input")
IGNORE_INDEX = -100  # the label of a token that does not count in the loss
JOINED = (
    "where one token spans prompt and completion: answers get worse, as generation starts from ids that were not "
    "trained on; move the blanks between the two to the completion's start"
)


class Example(NamedTuple):
    """One row as a model sees it: two lists of equal length. `labels` is `input_ids` where supervised, else -100.

    Labels are not shifted: labels[t] is what the hidden state at t - 1 should predict.
    """

    input_ids: list[int]
    labels: list[int]


def encode_completion(prompt: Sequence[str], completion: Sequence[str], tokenizer: Tokenizer) -> tuple[Example, bool]:
    r"""Encode prompt and completion together; supervise every token after the longest prefix shared with the prompt.

    They are tokenised together so that the ids are those of the whole text, as trl 1.16 does it
    (`SFTTrainer._prepare_dataset`). The second value is True if one token spans the end of the prompt and the start of
    the completion. Generation then starts from ids that were not trained on: the prompt's own.

    >>> encode_completion(["### Response:\n"], ["Hi", Special("</s>")], tokenizer)
    (Example(input_ids=[2, 452, 6, 884, 442, 1666, 29, 202, 43, 76, 2],
             labels=[-100, -100, -100, -100, -100, -100, -100, -100, 43, 76, 2]), False)
    """
    prompt_ids = tokenizer.encode(prompt)
    input_ids = tokenizer.encode([*prompt, *completion])
    pairs = zip(prompt_ids, input_ids, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return Example(input_ids, [IGNORE_INDEX] * shared + input_ids[shared:]), shared < len(prompt_ids)


def encode_text(prompt: Sequence[str], completion: Sequence[str], tokenizer: Tokenizer) -> tuple[Example, bool]:
    """Encode a `text` row that `split_row` has cut in two; supervise tokens with a character of the second part.

    Characters are compared, not tokens, because BPE may join the template's last character to the response's first: a
    response that begins with a line end is supervised from that line end on. The second value is True if a token spans
    both parts.
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
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int | None,
    max_positions: int | None = None,
    response_template: str | None = None,
    supervise: Literal["completion", "all"] = "completion",
    source: str = "rows",
) -> Encoded[Example]:
    """Encode rows (`datasets.TRAINING_SCHEMAS`); drop and report those without a supervised token.

    Longer rows keep their first `max_length` tokens. With `max_length=None` a row longer than the model's
    `max_positions` is an error. `response_template` is for `text` rows and defaults to the template's own.
    `supervise="all"` supervises every token but the first, the prompt's too: plain language modelling, for comparison.

    Raises UserError if every row is dropped, a row is longer than `max_positions` or cannot be encoded, or if there are
    `text` rows and no response template.
    """
    check_max_length(max_length, max_positions)
    encoded: Encoded[Example] = Encoded(source, "row", len(rows), supervised_tokens=0)
    within = "after the first one" if max_length is None else f"within the first {max_length} tokens"
    for number, row in enumerate(rows, start=1):
        location = location_of(row, number)
        # "all" does not need to find the response; the empty text is found in every row.
        marker = "" if supervise == "all" else _response_marker(row, template, response_template)
        pieces = split_row(row, tokenizer, template, marker)
        if pieces is None:
            encoded.remark("dropped: the response template is not in the text", location)
            if len(encoded.causes) < NAMED_LOCATIONS:
                hint = "" if encoded.causes else "; name another one with --response-template"
                encoded.causes.append(f"{location}: {row['text'][:60]!r}: {likely_cause(row['text'], marker)}{hint}")
            continue
        encode = encode_all if supervise == "all" else encode_text if is_text_row(row) else encode_completion
        try:
            whole, is_joined = encode(*pieces, tokenizer)
        except ValueError as error:
            raise UserError(f"{source}: {location}: {error}") from None
        length = len(whole.input_ids)
        if max_length is None and max_positions is not None and length > max_positions:
            raise UserError(
                f"{source}: {location}: {length} tokens, more than the model's {max_positions} positions; "
                f"cut such rows with --max-length {max_positions}, or remove them"
            )
        example = Example(whole.input_ids[:max_length], whole.labels[:max_length])
        # The label of the first token is never predicted: there is nothing before it.
        if _count_supervised(example.labels[1:]) == 0:
            encoded.remark(f"dropped: no supervised token {within}", location)
            continue
        if len(example.input_ids) < length:
            encoded.remark(f"cut at {max_length} tokens, end token lost", location)
        if _count_supervised(whole.labels) == 1:
            encoded.remark("with an empty completion: only the end token is supervised", location)
        if is_joined:
            encoded.remark(JOINED, location)
        for remark in _about_question(row, template, marker):
            encoded.remark(remark, location)
        if _contains_special(pieces, tokenizer):
            encoded.remark("whose text has the name of a special token: it stays text", location)
        encoded.keep(example, row, number - 1)
    encoded.tokens = sum(len(example.input_ids) for example in encoded.examples)
    encoded.supervised_tokens = sum(_count_supervised(example.labels) for example in encoded.examples)
    encoded.check_any_kept("has a supervised token")
    return encoded


def check_max_length(max_length: int | None, max_positions: int | None) -> None:
    """Raise UserError if rows of `max_length` tokens do not fit into the model's positions."""
    if max_length is not None and max_positions is not None and max_length > max_positions:
        raise UserError(f"--max-length {max_length}: more than the model's {max_positions} positions")


def split_row(
    row: Mapping[str, Any], tokenizer: Tokenizer, template: Template, response_template: str
) -> tuple[list[str], list[str]] | None:
    """Return the pieces of a row's prompt and of its completion, which ends with the EOS.

    If the completion's text ends with the name of the EOS, it becomes the EOS; anywhere else it stays text. A `text`
    row is cut after the last `response_template` in it, before blanks that end it; return None if it has none.
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
    start = found + len(response_template) - len(leading_blanks(row, template, response_template))
    return [text[:start]], [text[start:], Special(tokenizer.eos_token)]


def encode_prompt(
    row: Mapping[str, Any], tokenizer: Tokenizer, template: Template, response_template: str | None = None
) -> list[int]:
    """Return the ids that generation starts from for a row.

    Raises UserError for a `text` row without the response template, and ValueError for text that cannot be encoded.
    """
    if is_text_row(row):
        prompt, _ = _split_or_raise(row, tokenizer, template, response_template)
        return tokenizer.encode(prompt)
    return tokenizer.encode(render_prompt(row, template, tokenizer.eos_token, tokenizer.bos_token))


def reference_of(
    row: Mapping[str, Any], tokenizer: Tokenizer, template: Template, response_template: str | None = None
) -> str:
    """Return the text that a model should answer a training row with. Raises UserError like `encode_prompt`."""
    _, completion = _split_or_raise(row, tokenizer, template, response_template)
    text = "".join(piece for piece in completion if not isinstance(piece, Special))
    return text.removeprefix(blanks_of(row, template, response_template))


def blanks_of(row: Mapping[str, Any], template: Template, response_template: str | None = None) -> str:
    """Return the template's blanks before the response, with which a completion begins and an answer's text does not.

    Raises UserError for a `text` row without a response template.
    """
    return leading_blanks(row, template, _response_marker(row, template, response_template))


def _split_or_raise(
    row: Mapping[str, Any], tokenizer: Tokenizer, template: Template, response_template: str | None
) -> tuple[list[str], list[str]]:
    marker = _response_marker(row, template, response_template)
    pieces = split_row(row, tokenizer, template, marker)
    if pieces is None:
        text = row["text"]
        raise UserError(f"--response-template {marker!r}: not in {text[:60]!r}: {likely_cause(text, marker)}")
    return pieces


def _response_marker(row: Mapping[str, Any], template: Template, response_template: str | None) -> str:
    """Return the text before the response of a `text` row; raise UserError if such a row has none."""
    marker = template.response_template if response_template is None else response_template
    if is_text_row(row) and not marker:
        raise UserError(f"--response-template: `text` rows need one, and --template {template.name} does not have one")
    return marker


def _about_question(row: Mapping[str, Any], template: Template, marker: str) -> Iterator[str]:
    """Yield remarks about what is not supervised, not read, or wrapped twice."""
    if is_text_row(row):
        if marker and row["text"].count(marker) > 1:
            yield "with several responses, of which only the last is supervised"
        return
    read = question_fields(row)
    if "instruction" in read and has_turns(row, template):
        yield WRAPPED_AGAIN
    yield from (f"whose {name!r} is not read" for name in UNREAD if name not in read and row.get(name))


def _count_supervised(labels: Sequence[int]) -> int:
    return sum(label != IGNORE_INDEX for label in labels)


def _contains_special(pieces: tuple[list[str], list[str]], tokenizer: Tokenizer) -> bool:
    names = [name for name in (tokenizer.eos_token, tokenizer.bos_token) if name is not None]
    plain = [piece for part in pieces for piece in part if not isinstance(piece, Special)]
    return any(name in piece for piece in plain for name in names)
