"""Write data/pairs.jsonl and data/heldout_pairs.jsonl: prompts with a right answer (chosen) and a wrong one (rejected).

    python -m data.make.pairs [--seed 0] [--out data] [--ask-base-model] [--ask-tuned-model FOLDER]

A row has prompt, chosen, rejected (the fields of synthetic-instruct-gptj-pairwise) and `kind`: the category, which says
what is wrong with the rejected answer. Prompts are rows of data.make.instructions: of its training split in
pairs.jsonl, of both held-out splits in heldout_pairs.jsonl. An input follows its instruction after a blank line. Every
chosen answer has passed the checks of its row; every rejected answer has failed them. The chosen answer is the row's
own, or a sample of the tuned model that passes.

The seed and the counts in `CATEGORIES` determine everything except the answers of the two models, the untuned one in
data/model and the one that `make sft` makes of it with the flags in data/README.md. Machines round floating-point sums
differently, so these answers may differ a little between machines. They are made once, with --ask-base-model and
--ask-tuned-model. Without these flags they are read from the files in --out before these are replaced: the run needs no
model and reproduces the files byte for byte. The models must be asked again after new instructions, after new
pre-training, or to raise their counts; all other counts can change without that.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

from data.make.families.common import LETTERS, NUMBER_LISTS, SAMPLE_WORDS, SEPARATORS, WORD_LISTS, Check
from data.make.instructions import DATA, Row, generate, passes
from minift.commands.cli import CommandParser, run_command
from minift.errors import UserError
from minift.files.text import read_json_lines, write_text
from minift.files.tokenizer import load_tokenizer
from minift.files.weights import load_model
from minift.generate import Options
from minift.generate import generate as complete
from minift.prompts import TEMPLATES, render_prompt

FILES = {"training": "pairs.jsonl", "held out": "heldout_pairs.jsonl"}


class Count(NamedTuple):
    """The number of pairs of one category."""

    training: int
    held_out: int
    each: int = 1  # pairs of one training prompt


CATEGORIES = {
    # A model learns the first three slowly, by comparing answer and prompt; the others are visible in the answer alone.
    "subtle bug": Count(3300, 110, each=2),  # the chosen code after one small edit
    "other task": Count(1900, 110),  # the right answer to another instruction
    "tuned model": Count(2000, 110, each=2),  # a sample of the tuned model
    "cut off": Count(300, 110),  # a prefix of the chosen code
    "base model": Count(150, 110),  # the answer of the untuned model
    "rambling": Count(150, 110),  # prose around the task
}


class Pair(NamedTuple):
    """A row of the shipped pairs; the field names are those of the files."""

    prompt: str
    chosen: str
    rejected: str
    kind: str


def prompt_of(row: Row) -> str:
    return f"{row.instruction}\n\n{row.input}" if row.input else row.instruction


def is_value(row: Row) -> bool:
    """Return True if the answer is a value, not code: in a value a bug is not visible."""
    return all(check.expression == "ANSWER" for check in row.checks)


def runs(code: str, checks: list[Check]) -> bool:
    """Return True if the code parses without a warning and its top level runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", SyntaxWarning)
        try:
            compile(code, "<answer>", "exec")
        except (SyntaxError, ValueError):
            return False
    return passes(code, [Check("True", True, before) for before in dict.fromkeys(check.before for check in checks)])


# ---------------------------------------------------------------- subtle bugs: each rule lists edits of the whole code

# Not the tokenize module: its tokens for f-strings changed with Python 3.12.
TOKEN = re.compile(r'(?P<text>f?"""[^"]*"""|f?"[^"]*")|(?P<name>[A-Za-z_]\w*)|(?P<number>\d+(?:\.\d+)?)')
OPERATOR = re.compile(r" (<=|>=|==|!=|<|>|\+=|-=|\*=|//=|\+|-|\*\*|\*|//|/|%|and|or|not in|in) ")
COMPARISONS = {">": "< >= <=", "<": "> <= >=", ">=": "> < <=", "<=": "< > >=", "==": "!= >", "!=": "== <"}
ARITHMETIC = {
    "+": "- *", "-": "+", "*": "+ /", "/": "* //", "//": "/ %", "%": "// /", "**": "* +",
    "+=": "-= *=", "-=": "+=", "*=": "+=", "//=": "-=", "and": "or", "or": "and",
}  # fmt: skip
WORDS = {
    "upper": "lower capitalize", "lower": "upper strip", "capitalize": "upper lower", "strip": "lower split",
    "startswith": "endswith", "endswith": "startswith", "isupper": "islower", "find": "count", "rfind": "find",
    "replace": "count", "split": "strip", "join": "split", "append": "remove", "setdefault": "get", "get": "pop",
    "items": "values keys", "values": "keys items", "keys": "values", "count": "index", "max": "min sum len",
    "min": "max sum len", "sum": "max len", "len": "max sum str", "any": "all", "all": "any", "abs": "int",
    "sorted": "list set", "set": "list", "list": "set tuple", "tuple": "list", "int": "float str", "float": "int",
    "str": "int", "True": "False", "False": "True", "ValueError": "TypeError KeyError", "RuntimeError": "ValueError",
    "yield": "return", "enumerate": "zip", "zip": "enumerate", "isinstance": "issubclass",
    "dataclass": "property", "property": "staticmethod", "round": "abs", "None": "0", "break": "continue",
}  # fmt: skip
WRAPPER = re.compile(r"\b(?:len|sorted|sum|abs|str|int|float|list|set|max|min|round)\(([^()]+)\)")
STEP = re.compile(r" [-+*/%]+ \w+|\.\w+\([^()]*\)|\[[^][\n]*:[^][\n]*\]|self\.|return (?=\S)| \+ \"[^\"]*\"")


def edited(code: str, match: re.Match, new: str, group: int = 0) -> str:
    return code[: match.start(group)] + new + code[match.end(group) :]


def tokens(code: str, group: str) -> list[re.Match]:
    return [match for match in TOKEN.finditer(code) if match.lastgroup == group]


def names_in(code: str) -> set[str]:
    """Return the variables, arguments, attributes of `self`, functions and classes that the code defines."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            names.add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return {name for name in names if name != "self" and not name.startswith("__")}


def wrong_number(code: str, prompt: str, rng: Random) -> Iterator[str]:
    in_prompt = re.findall(r"\d+", prompt)
    for match in tokens(code, "number"):
        if "." in match[0]:
            continue
        value = int(match[0])
        others = [value + rng.choice([-10, -3, -2, -1, 1, 2, 3, 10]), rng.randrange(2, 99), int(match[0][::-1])]
        others += [int(rng.choice(in_prompt))] if in_prompt else []
        yield edited(code, match, str(max(0, rng.choice(others))))


def wrong_text(code: str, prompt: str, rng: Random) -> Iterator[str]:
    for match in tokens(code, "text"):
        prefix, quotes, inner = re.match(r'(f?)("""|")(.*)\2$', match[0], re.DOTALL).groups()
        parts = re.split(r"(\{[^}]*\})", inner) if prefix else [inner]
        plain = [index for index, part in enumerate(parts) if part and not part.startswith("{")]
        fields = [index for index, part in enumerate(parts) if part.startswith("{")] if prefix else []
        if plain:
            index = rng.choice(plain)
            changed = parts[:index] + [other_text(parts[index], prompt, rng)] + parts[index + 1 :]
            yield edited(code, match, prefix + quotes + "".join(changed) + quotes)
        if len(fields) > 1:
            first, second = fields[:2]
            parts[first], parts[second] = parts[second], parts[first]
            yield edited(code, match, prefix + quotes + "".join(parts) + quotes)


def other_text(text: str, prompt: str, rng: Random) -> str:
    if len(text) == 1 and text.isalpha():
        return rng.choice(LETTERS)
    if not any(character.isalnum() for character in text):
        return rng.choice(SEPARATORS)
    index = rng.randrange(len(text))
    quoted = re.findall(r'"([^"\n]+)"', prompt)
    return rng.choice([
        text[:index] + text[index + 1 :],
        text.swapcase(),
        rng.choice(SAMPLE_WORDS),
        rng.choice(SAMPLE_WORDS),
        rng.choice(quoted or SAMPLE_WORDS),
    ])  # fmt: skip


def wrong_name(code: str, prompt: str, rng: Random) -> Iterator[str]:
    names = sorted(names_in(code))
    for match in tokens(code, "name"):
        name = match[0]
        if name not in names:
            continue
        others = [other for other in names if other != name]
        first, _, last = name.partition("_")
        others += [name[:-1] if name.endswith("s") else f"{name}s", rng.choice(NUMBER_LISTS)[:-1]]
        others += [f"{last}_{first}", f"{first}_{rng.choice(WORD_LISTS)}", last] if last else []
        yield edited(code, match, rng.choice(others))


def flipped_comparison(code: str, prompt: str, rng: Random) -> Iterator[str]:
    for match in OPERATOR.finditer(code):
        if match[1] in COMPARISONS:
            yield edited(code, match, rng.choice(COMPARISONS[match[1]].split()), 1)


def wrong_operator(code: str, prompt: str, rng: Random) -> Iterator[str]:
    for match in OPERATOR.finditer(code):
        if match[1] in ARITHMETIC:
            yield edited(code, match, rng.choice(ARITHMETIC[match[1]].split()), 1)


def negation(code: str, prompt: str, rng: Random) -> Iterator[str]:
    for match in re.finditer(r"\bif (?!not )|\bnot ", code):
        yield edited(code, match, "" if match[0] == "not " else "if not ")
    for match in re.finditer(r"return (?=[^\n]*(?: in |[<>=!]=|[<>]|with\(|\.is|any|all))", code):
        yield edited(code, match, "return not ")
    for match in OPERATOR.finditer(code):
        if match[1] in ("in", "not in"):
            yield edited(code, match, "in" if match[1] == "not in" else "not in", 1)


def wrong_word(code: str, prompt: str, rng: Random) -> Iterator[str]:
    defined = names_in(code)
    for match in tokens(code, "name"):
        if match[0] in WORDS and match[0] not in defined:
            new = rng.choice(WORDS[match[0]].split())
            yield edited(code, match, new)
    for match in re.finditer(r"\breturn ([^\n]+)", code):
        yield edited(code, match, f"print({match[1]})")


def swapped(code: str, prompt: str, rng: Random) -> Iterator[str]:
    """Swap two neighbouring tokens of one group on a line: the sides of a difference, two arguments."""
    names = names_in(code)
    for group in ("text", "name", "number"):
        found = [match for match in tokens(code, group) if group != "name" or match[0] in names]
        for left, right in zip(found, found[1:], strict=False):
            between = code[left.end() : right.start()]
            if left[0] != right[0] and "\n" not in between:
                yield code[: left.start()] + right[0] + between + left[0] + code[right.end() :]


def left_out(code: str, prompt: str, rng: Random) -> Iterator[str]:
    for match in STEP.finditer(code):
        yield edited(code, match, "")
    for start in re.finditer(r" if ", code):
        for end in re.finditer(r"[])}]", code[start.end() :].split("\n")[0]):
            yield code[: start.start()] + code[start.end() + end.start() :]
    for match in WRAPPER.finditer(code):
        yield edited(code, match, match[1])
    lines = code.split("\n")
    for index in range(1, len(lines)):
        yield "\n".join(lines[:index] + lines[index + 1 :])


def one_too_many(code: str, prompt: str, rng: Random) -> Iterator[str]:
    for match in re.finditer(r"(?:return|yield|^\w+ =) ([^\n]+)$", code, re.MULTILINE):
        n = rng.randrange(2, 30)
        ending = rng.choice([f" + {n}", f" - {n}", f" * {n}", " + 1", " - 1", "[1:]", "[::-1]", ".strip()", ".upper()"])
        yield code[: match.end()] + ending + code[match.end() :]
        yield edited(code, match, f"{rng.choice(['sorted', 'list', 'str', 'len', 'set', 'max'])}({match[1]})", 1)


# Rule -> weight, how often it is tried first. Most bugs are visible in the code alone, some only beside the prompt.
BUGS: dict[Callable[[str, str, Random], Iterator[str]], float] = {
    wrong_name: 6,
    wrong_word: 6,
    left_out: 5,
    one_too_many: 4,
    wrong_number: 1.5,
    wrong_text: 1.5,
    wrong_operator: 1,
    flipped_comparison: 1,
    swapped: 1,
    negation: 0.5,
}


def subtle_bug(row: Row, rows: list[Row], rng: Random) -> str | None:
    """Return the chosen code after one edit: it parses and runs, but fails the checks. None if no edit does that."""
    if is_value(row):
        return None
    # An unchanged input is such a bug too.
    if row.input and rng.random() < 0.05 and runs(row.input, row.checks) and not passes(row.input, row.checks):
        return row.input
    # Exponential draws with these rates: each rule is the smallest, and so the first, in proportion to its weight.
    for rule in sorted(BUGS, key=lambda rule: rng.expovariate(BUGS[rule])):
        candidates = list(rule(row.output, prompt_of(row), rng))
        rng.shuffle(candidates)
        for code in candidates:
            if code != row.output and runs(code, row.checks) and not passes(code, row.checks):
                return code
    return None


# ---------------------------------------------------------------- the other categories


def asked_names(code: str) -> tuple[str, list[str]]:
    """Return the first name that the code defines or sets ("" if none), and the arguments if it is a function."""
    tree = ast.parse(code)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            return node.name, [argument.arg for argument in node.args.args]
        if isinstance(node, ast.ClassDef):
            return node.name, []
    stored = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    return next((node.id for node in stored), ""), []


def other_task(row: Row, rows: list[Row], rng: Random) -> str | None:
    """Return the answer to another row, sometimes of the same family; mostly renamed as this row asks."""
    same_family = rng.random() < 0.15 and not is_value(row)
    pool = [other for other in rows if other.family == row.family] if same_family else rows
    for _ in range(200):
        other = rng.choice(pool)
        if is_value(other) != is_value(row) or (other.family == row.family and not same_family):
            continue
        code = other.output
        if not is_value(row) and rng.random() < 0.75:
            (old_name, old), (new_name, new) = asked_names(code), asked_names(row.output)
            renaming = {old_name: new_name or old_name}
            if len(old) == len(new) and rng.random() < 0.75:
                renaming |= dict(zip(old, new, strict=True))
            code = re.sub(r"\b[A-Za-z_]\w*", lambda name: renaming.get(name[0], name[0]), code)  # noqa: B023
        if code != row.output and not passes(code, row.checks):
            return code
    return None


def cut_off(row: Row, rows: list[Row], rng: Random) -> str | None:
    if len(row.output) < 20:
        return None
    for _ in range(20):
        code = row.output[: rng.randrange(len(row.output) // 4, len(row.output))].rstrip()
        if not passes(code, row.checks):
            return code
    return None


# Held-out answers use every fourth sentence of each list, training answers the others.
OPENERS = """\
You want me to do the following: {instruction}
I'm sorry, but I can't do this right now.
That is a good question.
So the task says: "{instruction}"
Sure, I can help you with that!
Thank you for asking.
Sorry, I am not sure that I understand the question.
As a language model, I have no opinion about this.
There are many ways to do this in Python.
Let me think about it.
First of all, it is important to know what is meant by this.
Well, this one is easy.
To solve this, we have to write some Python code.
The following will be about `{name}`.
I have seen this one before, and it is always the same.
Great, let's talk about {topic}.""".split("\n")
MIDDLES = """\
The name `{name}` is a good one, because it says what it is.
Python is a popular language, and it was created in the early nineties.
We need to think about {topic} and about what {topic} means.
{instruction}
Many people use {topic} in their programs every day.
You can find more about this in the documentation of the `{module}` module.
A good program should be easy to read and easy to test.
One could write it in several ways, and each has its advantages.
The code should work for all inputs, and it should be fast.
It depends on what you want to do with {topic} later.
Before we begin, make sure that you have a recent version of Python.
I would start with the first step, and then do the next one.
And then it does what the task says, and this is what we want.
In general {topic} can be difficult for beginners, but don't worry.
You should also write a test, so that you know that it works.
When it is done, you can call it and look at the result.
There is also a library for this, but I don't remember its name.
The thing with {topic} is that there is a lot to say about it.
Some prefer loops, others prefer comprehensions, and both are right.
It is very, very important that the result is correct.
First we take {topic}, then we do something with it, and at the end we have it.
I could also use `{module}`, but that would be too much here.
This will return the right value if everything goes well.
Note that errors can occur, and that they should be handled.""".split("\n")
CLOSERS = """\
I hope this helps!
Let me know if you have any other questions.
Sorry that I can't say more about it.
Do you want me to write the code for you?
And that's it, you are done.
Please tell me more about {topic}.
Good luck with your project!
Maybe someone else knows a better answer.
In conclusion, it is a matter of taste.
The rest is left to the reader.
So this is how one could do it.
Have a nice day!""".split("\n")
MODULES = "os sys re json math random string itertools functools collections datetime pathlib typing".split()


def rambling(row: Row, rows: list[Row], rng: Random) -> str | None:
    """Return prose about the task, with or without a piece of code; that piece alone fails the checks too."""
    held_out = row.split != "training"
    name, arguments = ("", []) if is_value(row) else asked_names(row.output)
    name = name or "answer"
    slots = {
        "instruction": row.instruction,
        "name": name,
        "topic": rng.choice([*arguments, name.replace("_", " "), "functions", "the input", "Python code"]),
        "module": rng.choice(MODULES),
    }

    def say(sentences: list[str], count: int = 1) -> list[str]:
        known = [text for index, text in enumerate(sentences) if (index % 4 == 3) == held_out]
        return [text.format(**slots) for text in rng.sample(known, count)]

    form = rng.choice(["short", "prose", "prose", "repeated", "code within", "code within", "code first"])
    if form == "short":
        return say(rng.choice([OPENERS, MIDDLES, CLOSERS]))[0]
    if form == "repeated":
        return rng.choice([" ", "\n"]).join([*say(OPENERS), *say(MIDDLES) * rng.randrange(2, 5)])
    prose = say(OPENERS) * rng.randrange(2) + say(MIDDLES, rng.randrange(1, 4)) + say(CLOSERS) * rng.randrange(2)
    if form == "prose" or is_value(row):
        return rng.choice([" ", " ", "\n", "\n\n"]).join(prose)
    piece = piece_of_code(row, rows, rng)
    if passes(piece, row.checks):
        return None
    if rng.random() < 0.5:
        piece = f"```python\n{piece}\n```"
    index = 0 if form == "code first" else rng.randrange(1, len(prose) + 1)
    before, after = " ".join(prose[:index]), " ".join(prose[index:])
    return rng.choice(["\n", "\n\n"]).join(part for part in (before, piece, after) if part)


def piece_of_code(row: Row, rows: list[Row], rng: Random) -> str:
    name, arguments = asked_names(row.output)
    call = f"{name}({', '.join(arguments)})"
    stub = rng.choice(["pass", "...", "# your code here", "return None", "# TODO"])
    return rng.choice([
        row.output[: rng.randrange(len(row.output) // 3, len(row.output))].rstrip(),
        rng.choice(rows).output,
        f"def {call}:\n    {stub}" if arguments else f"class {name}:\n    {stub}",
        call,
    ])  # fmt: skip


# ---------------------------------------------------------------- the answers of the two models

MODEL = DATA / "model"
# (max_new_tokens, temperature). Several lengths, because the base model seldom generates EOS.
SETTINGS = [(max_new_tokens, temperature) for temperature in (0.0, 0.8) for max_new_tokens in (24, 48, 96)]
SAMPLES = Options(max_new_tokens=112, temperature=1.0, num_samples=4, batch_size=256)  # of the tuned model
Answers = dict[str, list[tuple[str, str]]]  # prompt -> a chosen and a rejected answer, several times


def ask(folder: Path, rows: list[Row], options: Options) -> list[list[str]]:
    """Return a model's answers to each row in the course's template, float32 on the CPU."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    fields = [{"instruction": row.instruction, "input": row.input} for row in rows]
    prompts = [tokenizer.encode(render_prompt(row, TEMPLATES["course"], tokenizer)) for row in fields]
    completions = complete(model, prompts, replace(options, eos_token_id=tokenizer.eos_token_id))
    return [[tokenizer.decode(ids).strip() for ids in samples] for samples in completions]


def ask_base_model(rows: list[Row], settings: list[tuple[int, float]] = SETTINGS) -> list[str]:
    """Return the base model's answers to `rows`; settings take turns."""
    answers = [""] * len(rows)
    for first, (max_new_tokens, temperature) in enumerate(settings):
        indices = range(first, len(rows), len(settings))
        options = Options(max_new_tokens=max_new_tokens, temperature=temperature)
        found = ask(MODEL, [rows[index] for index in indices], options)
        for index, (answer,) in zip(indices, found, strict=True):
            answers[index] = answer
    return answers


def base_model_answers(rows: list[Row]) -> Answers:
    answers = zip(rows, ask_base_model(rows), strict=True)
    return {prompt_of(row): [(row.output, answer)] for row, answer in answers}


def tuned_model_answers(rows: list[Row], folder: Path) -> Answers:
    """Return each failing sample beside a right answer.

    That is a sample that passes for every second prompt that has one, otherwise the row's own answer. If it were always
    the row's own, a judge could learn whose answer it is instead of which is right.
    """
    answers = {}
    for index, (row, samples) in enumerate(zip(rows, ask(folder, rows, SAMPLES), strict=True)):
        passed = {sample: passes(sample, row.checks) for sample in dict.fromkeys(samples)}
        right = [sample for sample in passed if passed[sample]] if index % 2 else []
        failing = [sample for sample in passed if sample and not passed[sample]]
        answers[prompt_of(row)] = [((right or [row.output])[0], sample) for sample in failing]
    return answers


def stored_answers(path: Path, category: str) -> Answers:
    """Return the model's answers of a category, from a file of pairs that this script wrote earlier."""
    if not path.exists():
        raise UserError(f"{path}: no such file to read the models' answers from; run with {FLAGS[category]}")
    answers: Answers = {}
    for _, pair in read_json_lines(path):
        if pair["kind"] == category:
            answers.setdefault(pair["prompt"], []).append((pair["chosen"], pair["rejected"]))
    return answers


# ---------------------------------------------------------------- pairs and files

MAKERS = {"subtle bug": subtle_bug, "other task": other_task, "cut off": cut_off, "rambling": rambling}


def shuffled(rows: list[Row], name: str) -> list[Row]:
    return Random(name).sample(rows, len(rows))


FLAGS = {"base model": "--ask-base-model", "tuned model": "--ask-tuned-model runs/sft-2000"}


def rows_to_ask(rows: list[Row], name: str, category: str, count: int) -> list[Row]:
    """Return the rows to ask a model: more than `count`, because some answers are empty, or right."""
    asked = count + count // 10 + 10 if category == "base model" else 2 * count
    return shuffled(rows, f"{name} {category}")[:asked]


def make_pairs(rows: list[Row], name: str, counts: dict[str, Count], stored: dict[str, Answers]) -> list[Pair]:
    """Return the pairs of all categories, shuffled, as many as `counts` says; `stored` has the models' answers.

    The training categories read the rows in the same order, so that many prompts have pairs of several categories. The
    two models are the exception, because they were asked about fixed rows. Each category draws from its own generator,
    so that the count of another one does not change its pairs.
    """
    is_training = name.endswith("training")
    pairs = []
    for category, (training, held_out, each) in counts.items():
        count, each = (training, each) if is_training else (held_out, 1)
        rng = Random(f"{name} {category} answers")
        found: dict[Pair, None] = {}  # a set that keeps the order
        for row in shuffled(rows, name if is_training and category not in stored else f"{name} {category}"):
            if category in stored:
                answers = sorted(stored[category].get(prompt_of(row), [])[:each])  # their order in the file is random
            else:
                answers = [(row.output, MAKERS[category](row, rows, rng)) for _ in range(each)]
            for chosen, rejected in answers:
                if not rejected or rejected == chosen or passes(rejected, row.checks):
                    continue
                if not passes(chosen, row.checks):
                    raise RuntimeError(f"the answer to {prompt_of(row)!r} fails its checks")
                found[Pair(prompt_of(row), chosen, rejected, category)] = None
            if len(found) >= count:
                break
        if len(found) < count:
            way_out = f"run with {FLAGS[category]}" if category in stored else "lower its count in CATEGORIES"
            raise UserError(f"{category}: found {len(found)} of {count} pairs; {way_out}")
        pairs += [*found][:count]
    return Random(name).sample(pairs, len(pairs))


def make_files(seed: int, stored: dict[str, dict[str, Answers]], rows: list[Row] | None = None) -> dict[str, str]:
    """Return file name -> text, given the models' answers by file name and category."""
    rows = rows or generate(seed)
    texts = {}
    for split, file in FILES.items():
        pairs = make_pairs(rows_of(rows, split), f"{seed} {split}", CATEGORIES, stored[file])
        texts[file] = "".join(json.dumps(pair._asdict(), ensure_ascii=False) + "\n" for pair in pairs)
    return texts


def rows_of(rows: list[Row], split: str) -> list[Row]:
    return [row for row in rows if (row.split == "training") == (split == "training")]


def main() -> None:
    parser = CommandParser("python -m data.make.pairs", description="Write pairs.jsonl and heldout_pairs.jsonl.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DATA, help="an existing directory")
    parser.add_argument("--ask-base-model", action="store_true", help="generate its answers instead of reading --out")
    parser.add_argument("--ask-tuned-model", type=Path, metavar="FOLDER", help="the same; FOLDER is that of `make sft`")
    arguments = parser.parse_args()
    ways: dict[str, Callable[[list[Row]], Answers] | None] = {
        "base model": base_model_answers if arguments.ask_base_model else None,
        "tuned model": arguments.ask_tuned_model and partial(tuned_model_answers, folder=arguments.ask_tuned_model),
    }
    rows = generate(arguments.seed)
    stored: dict[str, dict[str, Answers]] = {}
    for split, file in FILES.items():
        stored[file] = {}
        for category, way in ways.items():
            if way is None:
                stored[file][category] = stored_answers(arguments.out / file, category)
            else:
                count = CATEGORIES[category].training if split == "training" else CATEGORIES[category].held_out
                asked = rows_to_ask(rows_of(rows, split), f"{arguments.seed} {split}", category, count)
                stored[file][category] = way(asked)
    for file, text in make_files(arguments.seed, stored, rows).items():
        write_text(arguments.out / file, text)
        lines = text.count("\n")
        print(f"{lines} pairs written to {arguments.out / file}")


if __name__ == "__main__":
    run_command(main)
