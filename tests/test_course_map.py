"""README, "The course, point by point": each row's words, files, functions, test and stop of the tour exist."""

import importlib
import re
from functools import reduce
from typing import NamedTuple

import pytest

import minift.commands.tour  # noqa: F401  (fills STOPS)
from minift.commands.notebook import STOPS
from tests.runs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
HEADING = "| the course says | here | instead of | test | stop |\n"
WORDS = """\
expert-curated data
instructions and answers
instruction, input, output
prompt format and the tokenizer
instruction masking
loading CodeAlpaca 20k
`formatting_prompts_func`
prompts with and without the response
fine-tuning facebook/opt-350m
`DataCollatorForCompletionOnlyLM`
`SFTTrainer`
the text-generation pipeline
BLEU
a reward model (prompt and response in, number out)
why reward models (guiding optimisation)
the scoring function that appends the response to the query
synthetic-instruct-gptj-pairwise
`preprocess_function()`
`TrainingArguments`
`RewardTrainer`'s train, save, evaluate
tokenizing, scores and the win rate of two
training the scoring function
contextual embeddings → reward
the Bradley–Terry loss and where it comes from""".split("\n")


class Point(NamedTuple):
    """One row of the table."""

    words: str
    here: str
    replaced: str
    test: str
    stops: str


def points(readme: str) -> list[Point]:
    lines = readme[readme.index(HEADING) :].split("\n\n")[0].split("\n")[2:]
    return [Point(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]


def check(point: Point) -> None:
    """Fail if something that the row names does not exist, or no stop of its shows a function of its files."""
    files = re.findall(r"\[`(\S+)`\]\((\S+)\): ((?:`[\w.]+`(?:, )?)+)", point.here)
    assert files and len(files) == point.here.count("](")
    functions = []
    for name, path, names in files:
        assert (ROOT / path).is_file() and path.removeprefix("minift/") == name
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        functions += [reduce(getattr, each.split("."), module) for each in re.findall(r"`([\w.]+)`", names)]
    assert point.replaced
    [(file, function)] = re.findall(r"^`(test_\w+\.py)::(test_\w+)`$", point.test)
    assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")
    stops = [STOPS[int(number) - 1] for number in point.stops.split(", ") if 1 <= int(number) <= len(STOPS)]
    assert len(stops) == len(point.stops.split(", "))
    modules = {function.__module__ for function in functions if hasattr(function, "__module__")}
    for stop in stops:
        assert modules & {function.__module__ for function in stop.functions}, (point.words, stop.title)


def test_the_table_has_every_point_in_the_course_s_order() -> None:
    assert [point.words for point in points(README)] == WORDS and len(STOPS) == 10


@pytest.mark.parametrize("point", points(README), ids=lambda point: point.words)
def test_what_a_row_names_exists(point: Point) -> None:
    check(point)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(minift/encode.py)", "(minift/masks.py)"),
        ("[`encode.py`]", "[`prompts.py`]"),
        ("`encode_completion`", "`encode_prompts`"),
        ("test_encode.py", "test_masks.py"),
        ("::test_supervised", "::test_masked"),
        (" 2 |", " 11 |"),
        (" 2 |", " 0 |"),
        (" 2 |", " 10 |"),
        (" 2 |", " |"),
    ],
)
def test_a_row_that_names_something_else_is_noticed(old: str, new: str) -> None:
    [line] = re.findall(r"^\| instruction masking .*$", README, re.MULTILINE)
    assert old in line
    [point] = points(f"{HEADING}|---|\n{line.replace(old, new)}\n\n")
    with pytest.raises((AssertionError, AttributeError, ImportError, OSError, ValueError)):
        check(point)


def test_course_model_data_and_papers_are_linked_once() -> None:
    section = README[README.index("## The course, point by point") :].split("\n## ")[0]
    links = re.findall(r"\]\((https://\S+?)\)", section)
    assert len(links) >= 10 and all(README.count(link) == 1 for link in links)
    for name in ("coursera.org/learn", "co/facebook/opt-350m", "CodeAlpaca-20k", "synthetic-instruct-gptj-pairwise"):
        assert any(name in link for link in links), name
