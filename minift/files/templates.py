"""Prompt templates: built in, in a file of the user's, or beside the model that was trained with one."""

import re
import sys
from pathlib import Path

from minift.errors import UserError
from minift.files.text import read_json, read_text, say, write_json
from minift.prompts import TEMPLATES, Template

TEMPLATE_FILE = "template.json"  # beside a model: the template that it was trained with
LONGEST = 100_000  # characters of a form: with a longer one, no row fits into a model's positions
FORMS = ("with_input", "without_input")


def template_of(name_or_path: str | None, folder: Path, default: str, flag: str = "--template") -> Template:
    """Return the named template, else that of the model in `folder`, else `default`. Raises like `load_template`."""
    own = folder / TEMPLATE_FILE
    if name_or_path is not None:
        return load_template(name_or_path, flag)
    if own.is_file():
        return load_template(str(own), flag="")
    if (folder / "run.json").is_file():  # a run of a version that did not write the file
        problem = f"no {TEMPLATE_FILE}, so the template is {default}"
        say(
            f"{folder}: {problem}: if it was trained with another one (see run.json), name that with {flag}", sys.stderr
        )
    return TEMPLATES[default]


def load_template(name_or_path: str, flag: str = "--template") -> Template:
    """Return one of `TEMPLATES` by its name, or read a template from a file.

    A file ending in .json holds an object with both forms, "with_input" and "without_input". Any other file is the form
    with input. The other form lacks {input} and the blanks before it, or after it at the start of the file. The line
    end at the end of the file does not belong to it. Raises UserError, which begins with `flag`: unknown name or file,
    not exactly one {response}, no {instruction} before it.
    """
    if name_or_path in TEMPLATES:
        return TEMPLATES[name_or_path]
    expected = f"one of {', '.join(TEMPLATES)}, or a file"
    try:
        if name_or_path.endswith(".json"):
            forms = read_json(name_or_path, expected)
        else:
            text = read_text(name_or_path, expected).replace("\r\n", "\n").removesuffix("\n")
            forms = dict(zip(FORMS, (text, re.sub(r"^\{input\}\s*|\s*\{input\}", "", text)), strict=True))
    except UserError as error:
        raise UserError(f"{flag} {error}".lstrip()) from None
    subject = f"{flag} {name_or_path}".lstrip()
    if sorted(forms) != sorted(FORMS) or not all(isinstance(form, str) for form in forms.values()):
        raise UserError(f'{subject}: expected a JSON object of two strings, "with_input" and "without_input"')
    for form in forms.values():
        if len(form) > LONGEST:
            raise UserError(f"{subject}: {len(form):,} characters, expected a prompt format of at most {LONGEST:,}")
        before, *after = form.split("{response}")
        if len(after) != 1:
            raise UserError(f"{subject}: expected {{response}} once, found it {len(after)} times")
        if "{instruction}" not in before or "{instruction}" in after[0] or "{input}" in after[0]:
            raise UserError(f"{subject}: expected {{instruction}} and any {{input}} before {{response}}, not after it")
    # Both forms are the same text where a text file without {input} made them: it is for rows without an input.
    if forms["with_input"] != forms["without_input"] and "{input}" not in forms["with_input"]:
        raise UserError(f'{subject}: "with_input" has no {{input}}')
    return Template(name_or_path, **forms)


def save_template(template: Template, folder: Path) -> None:
    """Write a template beside its model, in the format that `load_template` reads."""
    write_json(folder / TEMPLATE_FILE, {name: getattr(template, name) for name in FORMS})
