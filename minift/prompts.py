"""A row → its prompt and completion, as pieces of text. Ids are made in encode.py.

A template is plain text with the placeholders {instruction} {input} {response} {bos} {eos}. The text before {response}
is the prompt; the text after it belongs to the completion, and so do blanks right before it: " Hi" is one token, so a
prompt that ends in the blank would be ids that no training row begins with. Every other brace, in the template or in a
row, is ordinary text, because rows are code and code is full of braces.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minift.errors import UserError
from minift.tokenizer import Special

WRAPPED_AGAIN = "whose question is a prompt already (Human: … Assistant:): the template wraps it a second time"
PLACEHOLDER = re.compile(r"(\{(?:instruction|input|response|bos|eos)\})")


@dataclass(frozen=True)
class Template:
    """A prompt format: one text for rows with an input, one for rows without (or with an empty one)."""

    name: str
    with_input: str
    without_input: str

    @property
    def response_template(self) -> str:
        r"""Return the text between last field and {response}: "### Response:\n" in `course`; "" if there is none."""
        return PLACEHOLDER.split(self.without_input.split("{response}")[0])[-1].lstrip()


def trailing_blanks(text: str) -> str:
    """Return the blanks at a text's end, which BPE may join to what follows; a single line end is none of them."""
    blanks = text[len(text.rstrip()) :]
    return "" if blanks == "\n" else blanks


TEMPLATES = {
    # The course's. A preamble would not help a small model.
    "course": Template(
        "course",
        with_input="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{response}",
        without_input="### Instruction:\n{instruction}\n\n### Response:\n{response}",
    ),
    # Stanford Alpaca's train.py. Nothing follows "Response:", not even a line end.
    "alpaca": Template(
        "alpaca",
        with_input="Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:{response}",
        without_input="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:{response}",
    ),
    # The reward model's default.
    "dialogue": Template(
        "dialogue",
        with_input="\n\nHuman: {instruction}\n\n{input}\n\nAssistant: {response}",
        without_input="\n\nHuman: {instruction}\n\nAssistant: {response}",
    ),
    "none": Template("none", with_input="{instruction}\n\n{input}{response}", without_input="{instruction}{response}"),
}


def render_prompt(row: Mapping[str, Any], template: Template, eos_token: str, bos_token: str | None) -> list[str]:
    """Return the pieces of a row's prompt: `Special` pieces for {bos} and {eos}, plain text otherwise.

    A row with an "instruction" goes through the template. A row with a "prompt" is used as it is.
    Raises UserError if the row has an input and the template no {input}, or if the template has {bos} and the tokenizer
    does not name a BOS token.
    """
    if not _uses_template(row):
        return [row["prompt"]]
    before, _ = _form(row, template).split("{response}")
    return _fill(before.removesuffix(trailing_blanks(before)), row, template, eos_token, bos_token)


def render(
    row: Mapping[str, Any], template: Template, eos_token: str, bos_token: str | None
) -> tuple[list[str], list[str]]:
    """Return the pieces of a row's prompt and of its completion.

    The completion is the "output" of an instruction, after the template's blanks, else the row's "completion" or
    "response". The EOS is added later, by encode.py. Raises UserError like `render_prompt`.
    """
    prompt = render_prompt(row, template, eos_token, bos_token)
    if not _uses_template(row):
        return prompt, [row["completion"] if "completion" in row else row["response"]]
    before, after = _form(row, template).split("{response}")
    return prompt, [trailing_blanks(before) + row["output"], *_fill(after, row, template, eos_token, bos_token)]


def leading_blanks(row: Mapping[str, Any], template: Template, response_template: str) -> str:
    """Return the blanks that a row's completion begins with because they end the template."""
    if is_text_row(row):
        return trailing_blanks(response_template)
    return trailing_blanks(_form(row, template).split("{response}")[0]) if _uses_template(row) else ""


def question_fields(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields that hold a row's question: the instruction and its input, the prompt, or none.

    Some data sets keep rendered copies of their instructions under "prompt". Of a row that has both, the instruction is
    used if its "output" is there too, otherwise the prompt. All commands follow this rule.
    """
    if "instruction" in row and ("output" in row or "prompt" not in row):
        return ("instruction", "input")
    return ("prompt",) if "prompt" in row else ()


def question_of(row: Mapping[str, Any]) -> dict[str, str] | None:
    """Return a row's question as an instruction for a template, or None: the row is a whole dialogue.

    >>> question_of({"prompt": "Add.", "chosen": "3", "rejected": "4"})
    {'instruction': 'Add.'}
    """
    question = {name: row[name] for name in question_fields(row) if name in row}
    return {"instruction": question["prompt"]} if "prompt" in question else question or None


def has_turns(question: Mapping[str, str], template: Template) -> bool:
    """Return whether a question already looks like a prompt, so that the template wraps it a second time."""
    text, marker = question["instruction"], template.response_template.strip()
    dialogue = r"Human:(?s:.*)Assistant:"
    own = rf"(?m:^\s*{re.escape(marker)})" if re.search(r"\w", marker) else dialogue
    return bool(marker and (re.search(own, text) or re.search(dialogue, text)))


def is_text_row(row: Mapping[str, Any]) -> bool:
    """Return whether to use the row's "text": some data sets also keep rendered copies of their instructions there."""
    return "text" in row and not any(name in row for name in ("instruction", "prompt"))


def likely_cause(text: str, response_template: str) -> str:
    """Return a likely reason, in one line, why a text does not contain a response template."""
    unescaped = response_template.replace("\\n", "\n").replace("\\t", "\t")
    if unescaped != response_template and unescaped in text:
        return (
            "the template has a backslash and a letter where the row has a line end or tab; in a shell, write $'…\\n'"
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
            # One more character on either side, to show the space or colon that makes the difference.
            around = text[max(found[-1].start() - 1, 0) : found[-1].end() + 1]
            return (
                f"it differs in {difference}: the row has {around[:80]!r}, the template is {response_template[:80]!r}"
            )
    lines = [line for line in text.splitlines() if line.strip()]
    close = difflib.get_close_matches(response_template.strip(), lines, n=1, cutoff=0.6)
    return (
        f"the nearest line is {close[0][:80]!r}" if close else f"none of its lines is like {response_template[:80]!r}"
    )


def _uses_template(row: Mapping[str, Any]) -> bool:
    return "instruction" in question_fields(row)


def _form(row: Mapping[str, Any], template: Template) -> str:
    if not row.get("input"):
        return template.without_input
    if "{input}" not in template.with_input:
        raise UserError(
            f"--template {template.name}: it has no {{input}}, and a row has an input: {row['input'][:40]!r}; "
            "put {input} into the template, or leave such rows out with --no-input-only"
        )
    return template.with_input


def _fill(text: str, row: Mapping[str, Any], template: Template, eos_token: str, bos_token: str | None) -> list[str]:
    # The template is split at its placeholders before they are filled, so braces in a row's text stay text.
    pieces: list[str] = []
    for part in PLACEHOLDER.split(text):
        if part == "{instruction}":
            pieces.append(row["instruction"])
        elif part == "{input}":
            pieces.append(row.get("input", ""))
        elif part == "{eos}":
            pieces.append(Special(eos_token))
        elif part == "{bos}":
            if bos_token is None:
                raise UserError(f"--template {template.name}: it has {{bos}}, but this tokenizer has no BOS token")
            pieces.append(Special(bos_token))
        elif part:
            pieces.append(part)
    return pieces
