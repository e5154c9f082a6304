"""A row → its prompt and completion, as pieces of text. Ids are made in encode.py.

A template is plain text with the placeholders {instruction} {input} {response} {bos} {eos}. The text before {response}
is the prompt; the text after it belongs to the completion. Every other brace, in the template or in a row, stays text:
rows are code, and code is full of braces.

Blanks right before {response} belong to the completion too. BPE joins them to the next word (" Hi" is one token), so a
prompt that kept them would start generation from ids that were never trained on.

A conversation is an instruction with a "history" of earlier turns. Each turn is what a row of its own would be, prompt,
completion and EOS, and the turns are put end to end.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minift.errors import UserError
from minift.tokenizer import Special, Tokenizer

PLACEHOLDER = re.compile(r"(\{(?:instruction|input|response|bos|eos)\})")


@dataclass(frozen=True)
class Template:
    """A prompt format in two forms: one for rows with an input, one for rows without (or with an empty one)."""

    name: str
    with_input: str
    without_input: str

    @property
    def marker(self) -> str:
        r"""Return the text, left-stripped, from the last placeholder to {response}: "### Response:\n" in `course`."""
        return PLACEHOLDER.split(self.without_input.split("{response}")[0])[-1].lstrip()

    def cut(self, row: Mapping[str, Any]) -> tuple[str, str, str]:
        """Return a row's form in three parts: the prompt, the blanks between it and {response}, and what follows.

        Raises UserError if the row has an input and the form no {input}.
        """
        form = self.with_input if row.get("input") else self.without_input
        if row.get("input") and "{input}" not in form:
            raise UserError(
                f"--template {self.name}: it has no {{input}}, and a row has an input: {row['input'][:40]!r}; "
                "put {input} into the template, or leave such rows out with --no-input-only"
            )
        before, after = form.split("{response}")
        blanks = trailing_blanks(before)
        return before.removesuffix(blanks), blanks, after


def trailing_blanks(text: str) -> str:
    r"""Return the blanks at a text's end that BPE may join to what follows.

    A single "\n" before a word is always a token of its own, so for it this is "".
    """
    blanks = text[len(text.rstrip()) :]
    return "" if blanks == "\n" else blanks


TEMPLATES = {
    "course": Template(  # without a preamble, which would not help a small model
        "course",
        with_input="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{response}",
        without_input="### Instruction:\n{instruction}\n\n### Response:\n{response}",
    ),
    "alpaca": Template(  # Stanford Alpaca's train.py; nothing follows "Response:", not even a line end
        "alpaca",
        with_input="Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:{response}",
        without_input="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:{response}",
    ),
    "dialogue": Template(  # the reward model's default
        "dialogue",
        with_input="\n\nHuman: {instruction}\n\n{input}\n\nAssistant: {response}",
        without_input="\n\nHuman: {instruction}\n\nAssistant: {response}",
    ),
    "none": Template("none", with_input="{instruction}\n\n{input}{response}", without_input="{instruction}{response}"),
}


def render_prompt(row: Mapping[str, Any], template: Template, tokenizer: Tokenizer) -> list[str]:
    """Return the pieces of a row's prompt: `Special` pieces for {bos} and {eos}, plain text otherwise.

    A row with an "instruction" goes through the template, after the turns of its "history". A row with a "prompt" is
    used as it is, unlike in `question_of`. Raises UserError like `Template.cut`, and for {bos} if the tokenizer does
    not name a BOS token.
    """
    if not uses_template(row):
        return [row["prompt"]]
    pieces: list[str] = []
    *earlier, _ = turns_of(row)
    for turn in earlier:
        prompt, completion = render(turn, template, tokenizer)
        pieces += [*prompt, *end_with_eos(completion, tokenizer)]
    before, _, _ = template.cut(row)
    return [*pieces, *_fill(before, row, template, tokenizer)]


def render(row: Mapping[str, Any], template: Template, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Return the pieces of a row's prompt and of its completion, without the EOS. Raises like `render_prompt`.

    The completion is the row's "completion", or for an instruction the template's blanks and the row's "output".
    """
    prompt = render_prompt(row, template, tokenizer)
    if not uses_template(row):
        return prompt, [row["completion"]]
    _, blanks, after = template.cut(row)
    return prompt, [blanks + row["output"], *_fill(after, row, template, tokenizer)]


def end_with_eos(pieces: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Add the EOS. The name of the EOS at the end becomes the token; anywhere else it stays text."""
    pieces, eos = [*pieces], Special(tokenizer.eos_token)
    if isinstance(pieces[-1], Special) and pieces[-1] == eos:
        pieces.pop()
    if not isinstance(pieces[-1], Special):
        pieces[-1] = pieces[-1].removesuffix(eos)
    return [*pieces, eos]


def _fill(text: str, row: Mapping[str, Any], template: Template, tokenizer: Tokenizer) -> list[str]:
    # The template is split at its placeholders before they are filled, so braces in a row's text stay text.
    texts: dict[str, str] = {"{instruction}": row["instruction"], "{input}": row.get("input", "")}
    filled = texts | {"{bos}": Special(tokenizer.bos_token or ""), "{eos}": Special(tokenizer.eos_token)}
    pieces: list[str] = []
    for part in PLACEHOLDER.split(text):
        if part == "{bos}" and tokenizer.bos_token is None:
            raise UserError(f"--template {template.name}: it has {{bos}}, but this tokenizer has no BOS token")
        if part:
            pieces.append(filled.get(part, part))
    return pieces


def blanks_of(row: Mapping[str, Any], template: Template, marker: str = "") -> str:
    """Return the blanks of the template, or of a `text` row's marker: they begin completions, and answers lose them."""
    if is_text_row(row):
        return trailing_blanks(marker)
    return template.cut(row)[1] if uses_template(row) else ""


def question_fields(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields that hold a row's question: the instruction, its input and its history, the prompt, or none.

    A row with an instruction and a prompt is an instruction if it has an "output", else a prompt: some data sets keep
    rendered copies of their instructions under "prompt".
    """
    if "instruction" in row and ("output" in row or "prompt" not in row):
        return ("instruction", "input", "history")
    return ("prompt",) if "prompt" in row else ()


def question_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a row's question as an instruction for a template, or None: the row is a whole dialogue.

    A "prompt" is an instruction here, as in all that a reward model reads. `render_prompt` uses it as it is.

    >>> question_of({"prompt": "Add.", "chosen": "3", "rejected": "4"})
    {'instruction': 'Add.'}
    """
    question = {name: row[name] for name in question_fields(row) if name in row}
    return {"instruction": question["prompt"]} if "prompt" in question else question or None


def turns_of(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield each turn of a row as a row without a history: those of its history, then itself."""
    for instruction, output in row.get("history", ()) if uses_template(row) else ():
        yield {"instruction": instruction, "output": output}
    yield {name: value for name, value in row.items() if name != "history"}


def uses_template(row: Mapping[str, Any]) -> bool:
    """Return whether a row is an instruction, which goes through the template."""
    return "instruction" in question_fields(row)


def is_text_row(row: Mapping[str, Any]) -> bool:
    """Return whether to use the row's "text": some data sets also keep rendered copies of their instructions there."""
    return "text" in row and not any(name in row for name in ("instruction", "prompt"))
