"""A row's prompt and completion, as pieces of text. Nothing here knows a token; see encode.py for those.

A template is plain text with the placeholders {instruction} {input} {response} {bos} {eos}. What stands before
{response} is the prompt, what follows belongs to the completion. Every other brace, in the template or in a row, is
text like any other: rows are code, and code is full of braces.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minift.errors import UserError
from minift.files import read_json, read_text
from minift.tokenizer import Special

PLACEHOLDER = re.compile(r"(\{(?:instruction|input|response|bos|eos)\})")


@dataclass(frozen=True)
class Template:
    """The same prompt in two forms: for rows with an input, and for those without (an empty one counts as none)."""

    name: str
    with_input: str
    without_input: str

    @property
    def response_template(self) -> str:
        """The text that the response follows, from the last field on: "### Response:\\n" in `course`; "" if none."""
        return PLACEHOLDER.split(self.without_input.split("{response}")[0])[-1].lstrip()


TEMPLATES = {
    # The course's. No word before the instruction: a small model has nothing to gain from a preamble.
    "course": Template(
        "course",
        with_input="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{response}",
        without_input="### Instruction:\n{instruction}\n\n### Response:\n{response}",
    ),
    # Stanford Alpaca's, train.py: nothing between "Response:" and the response.
    "alpaca": Template(
        "alpaca",
        with_input="Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:{response}",
        without_input="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:{response}",
    ),
    # The reward model's.
    "dialogue": Template(
        "dialogue",
        with_input="\n\nHuman: {instruction}\n\n{input}\n\nAssistant: {response}",
        without_input="\n\nHuman: {instruction}\n\nAssistant: {response}",
    ),
    "none": Template(
        "none",
        with_input="{instruction}\n\n{input}{response}",
        without_input="{instruction}{response}",
    ),
}


def template_of(name_or_path: str | None, folder: str | Path, otherwise: str, flag: str = "--template") -> Template:
    """The template so named; if None, the one that a run which left `folder` was trained with; else `otherwise`.

    A run keeps the text of its template in run.json: a file of that name may be gone, or another one by now. Raises
    UserError as `load_template` does, or for a run.json that has none.
    """
    folder = Path(folder).absolute()
    run = (folder.parents[1] if folder.parent.name == "checkpoints" else folder) / "run.json"
    if name_or_path is not None or not run.is_file():
        return load_template(name_or_path or otherwise, flag)
    try:
        return Template(**read_json(run, "a run's values")["template"])
    except (KeyError, TypeError):
        raise UserError(f"{run}: has no template of its run, expected one: name it with {flag}") from None


def load_template(name_or_path: str, flag: str = "--template") -> Template:
    """One of `TEMPLATES` by its name, or a template of one's own from a file.

    A file ending in .json holds an object with both forms, "with_input" and "without_input". Any other file is one form
    for all rows, where {input} may be empty; the line end that closes the file is not part of it.

    Raises UserError naming `flag`: no such name or file, no {instruction} before {response}, not one {response}.
    """
    if name_or_path in TEMPLATES:
        return TEMPLATES[name_or_path]
    what = f"{flag} {name_or_path}"
    try:
        text = read_text(name_or_path, f"one of {', '.join(TEMPLATES)}, or a file").replace("\r\n", "\n")
    except (UserError, ValueError) as error:  # ValueError: a path with NUL in it
        raise UserError(f"{flag} {error}") from None
    if name_or_path.endswith(".json"):
        forms = _read_forms(text, what)
    else:
        text = text.removesuffix("\n")
        forms = {"with_input": text, "without_input": text}
    for form in forms.values():
        _check_form(form, what)
    if name_or_path.endswith(".json") and "{input}" not in forms["with_input"]:
        raise UserError(f'{what}: "with_input" has no {{input}}')
    return Template(name_or_path, **forms)


def render_prompt(row: Mapping[str, str], template: Template, eos_token: str, bos_token: str | None) -> list[str]:
    """The pieces a model is given before it responds: `Special` ones for {bos} and {eos}, else plain text.

    A row with an "instruction" goes through the template; one with a "prompt" is used as it is.
    Raises UserError if the row has an input and the template no place for it, or if {bos} has no token to stand for.
    """
    if not _goes_through_template(row):
        return [row["prompt"]]
    before, _ = _form(row, template).split("{response}")
    return _fill(before, row, template, eos_token, bos_token)


def render(
    row: Mapping[str, str], template: Template, eos_token: str, bos_token: str | None
) -> tuple[list[str], list[str]]:
    """The pieces of a row's prompt and of its completion ("output" of an instruction; else "completion" or "response").

    Errors as `render_prompt`. Whether an EOS is still to be added is for encode.py to say.
    """
    prompt = render_prompt(row, template, eos_token, bos_token)
    if not _goes_through_template(row):
        return prompt, [row["completion"] if "completion" in row else row["response"]]
    _, after = _form(row, template).split("{response}")
    return prompt, [row["output"], *_fill(after, row, template, eos_token, bos_token)]


def _goes_through_template(row: Mapping[str, str]) -> bool:
    # Data sets keep rendered copies of their instructions under "prompt".
    return "instruction" in row and ("output" in row or "prompt" not in row)


def _form(row: Mapping[str, str], template: Template) -> str:
    if not row.get("input"):
        return template.without_input
    if "{input}" not in template.with_input:
        raise UserError(
            f"--template {template.name}: it has no {{input}}, and a row has an input: {row['input'][:40]!r}; "
            "put {input} into the template, or leave such rows out with --no-input-only"
        )
    return template.with_input


def _fill(text: str, row: Mapping[str, str], template: Template, eos_token: str, bos_token: str | None) -> list[str]:
    # The template is cut at its placeholders first, so a row's text is never searched for any.
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
                raise UserError(f"--template {template.name}: it has {{bos}}, but this tokenizer names no BOS token")
            pieces.append(Special(bos_token))
        elif part:
            pieces.append(part)
    return pieces


def _read_forms(text: str, flag: str) -> dict[str, str]:
    try:
        forms = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag}: not valid JSON: {error}") from None
    named = isinstance(forms, dict) and forms.keys() == {"with_input", "without_input"}
    if not named or not all(isinstance(form, str) for form in forms.values()):
        raise UserError(f'{flag}: expected a JSON object of two strings, "with_input" and "without_input"')
    return forms


def _check_form(form: str, flag: str) -> None:
    if form.count("{response}") != 1:
        raise UserError(f"{flag}: expected {{response}} once, found it {form.count('{response}')} times")
    before, after = form.split("{response}")
    if "{instruction}" not in before:
        raise UserError(f"{flag}: expected {{instruction}} before {{response}}")
    if "{instruction}" in after or "{input}" in after:
        raise UserError(f"{flag}: {{instruction}} and {{input}} belong before {{response}}, not after it")
