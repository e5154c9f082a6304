"""The shipped pairs are executed and reproducible; held-out prompts are not trained on; length does not decide."""

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from data.make import pairs as make_pairs
from data.make.families.common import Check
from data.make.instructions import DATA, Row, generate, passes
from data.make.pairs import CATEGORIES, FILES, prompt_of

FILE_NAMES = list(FILES.values())


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return generate(0)


@pytest.fixture(scope="module")
def row_of(rows: list[Row]) -> dict[str, Row]:
    return {prompt_of(row): row for row in rows}


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[dict]]:
    lines = {file: (DATA / file).read_text(encoding="utf-8").split("\n") for file in FILE_NAMES}
    return {file: [json.loads(line) for line in lines[file] if line] for file in FILE_NAMES}


@pytest.mark.parametrize("file", FILE_NAMES)
def test_chosen_answers_pass_and_rejected_ones_fail(file: str, pairs: dict, row_of: dict) -> None:
    """Test 550 pairs of each file, as each answer starts a process; the script, which is run below, tests them all."""
    for pair in pairs[file][:: len(pairs[file]) // 550]:
        checks = row_of[pair["prompt"]].checks
        assert passes(pair["chosen"], checks), pair
        assert not passes(pair["rejected"], checks), pair


@pytest.mark.parametrize("file", FILE_NAMES)
def test_code_inside_prose_fails_by_itself(file: str, pairs: dict, row_of: dict) -> None:
    found = 0
    for pair in pairs[file]:
        if pair["kind"] != "rambling":
            continue
        # Every run of lines that a reader could take for the code.
        lines = pair["rejected"].split("\n")
        runs = ["\n".join(lines[i:j]) for i in range(len(lines)) for j in range(i + 1, len(lines) + 1)]
        found += any("def " in run or "class " in run for run in runs)
        assert not any(passes(run, row_of[pair["prompt"]].checks) for run in runs), pair
    assert found > 0.1 * CATEGORIES["rambling"].held_out


@pytest.mark.parametrize("file", FILE_NAMES)
def test_bugs_and_other_answers_are_code_that_runs(file: str, pairs: dict, row_of: dict) -> None:
    for pair in pairs[file][:: len(pairs[file]) // 550]:
        row = row_of[pair["prompt"]]
        if pair["kind"] == "subtle bug":
            befores = {check.before for check in row.checks}
            assert passes(pair["rejected"], [Check("True", True, before) for before in befores]), pair
        elif pair["kind"] == "other task" and row.checks[0].expression != "ANSWER":
            ast.parse(pair["rejected"])


@pytest.mark.parametrize("file", FILE_NAMES)
def test_fields_and_counts(file: str, pairs: dict) -> None:
    for pair in pairs[file]:
        assert list(pair) == ["prompt", "chosen", "rejected", "kind"]
        assert all(isinstance(text, str) and text.strip() for text in pair.values())
        assert pair["chosen"] != pair["rejected"]
    split = 0 if file == FILES["training"] else 1
    assert Counter(pair["kind"] for pair in pairs[file]) == {name: count[split] for name, count in CATEGORIES.items()}
    assert len({tuple(pair.values()) for pair in pairs[file]}) == len(pairs[file])


def test_at_least_six_categories_with_a_hundred_held_out_pairs_each() -> None:
    assert len(CATEGORIES) >= 6
    assert min(count.held_out for count in CATEGORIES.values()) >= 100


def test_held_out_prompts_are_held_out_instructions(pairs: dict) -> None:
    """They come from both categories of SFT's held-out file; neither SFT nor the reward model trains on them."""
    splits = {}
    for file in ("instructions.jsonl", "heldout.jsonl"):
        for line in (DATA / file).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            prompt = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
            splits[prompt] = (row.get("kind", "training"), row["output"])
    for pair in pairs[FILES["training"]]:
        split, output = splits[pair["prompt"]]
        assert split == "training" and (pair["chosen"] == output or pair["kind"] == "tuned model")
    held_out = Counter(splits[pair["prompt"]][0] for pair in pairs[FILES["held out"]])
    assert set(held_out) == {"new combination", "new family"}
    assert min(held_out.values()) > 0.2 * held_out.total()
    assert not {pair["prompt"] for pair in pairs[FILES["training"]]} & {
        pair["prompt"] for pair in pairs[FILES["held out"]]
    }


def test_held_out_rambling_uses_no_sentence_of_the_training_pairs(pairs: dict) -> None:
    for sentences in (make_pairs.OPENERS, make_pairs.MIDDLES, make_pairs.CLOSERS):
        for index, sentence in enumerate(sentences):
            constant = max(re.split(r"\{\w+\}", sentence), key=len)
            if len(constant) < 15:
                continue
            used_in = {
                file
                for file in FILE_NAMES
                for pair in pairs[file]
                if pair["kind"] == "rambling" and constant in pair["rejected"]
            }
            assert used_in == {FILES["held out" if index % 4 == 3 else "training"]}, sentence


@pytest.mark.parametrize("category", ["subtle bug", "other task"])
def test_length_does_not_decide(category: str, pairs: dict) -> None:
    """Neither "the longer one" nor "the shorter one" is right much more often than chance."""
    both = [pair for file in FILE_NAMES for pair in pairs[file] if pair["kind"] == category]
    longer = sum((len(p["chosen"]) > len(p["rejected"])) + 0.5 * (len(p["chosen"]) == len(p["rejected"])) for p in both)
    assert 0.4 < longer / len(both) < 0.6


def test_the_files_are_small_and_have_one_object_a_line() -> None:
    texts = [(DATA / file).read_bytes() for file in FILE_NAMES]
    assert sum(map(len, texts)) < 3_000_000
    for split, text in enumerate(texts):
        assert text.endswith(b"\n") and b"\r" not in text
        assert text.count(b"\n") == sum(count[split] for count in CATEGORIES.values())


def test_the_script_writes_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    """The models' answers are read from the files that it replaces; the seed determines everything else."""
    for file in FILE_NAMES:
        kept = [line for line in (DATA / file).read_text().splitlines() if json.loads(line)["kind"] in make_pairs.FLAGS]
        (tmp_path / file).write_text("\n".join(kept))
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-m", "data.make.pairs", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=DATA.parent, env=environment, capture_output=True)
    for file in FILE_NAMES:
        assert (tmp_path / file).read_bytes() == (DATA / file).read_bytes(), file


def test_without_stored_answers_the_script_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data.make.pairs", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=DATA.parent, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and "--ask-base-model" in result.stderr
    assert not list(tmp_path.iterdir())


def test_stored_base_answers_are_what_the_shipped_model_says(pairs: dict, rows: list[Row]) -> None:
    """Asked again, greedily, for few tokens. Another machine may round a sum differently, so most must be equal."""
    stored = {p["prompt"]: p["rejected"] for p in pairs[FILES["held out"]] if p["kind"] == "base model"}
    count = CATEGORIES["base model"].held_out
    asked = make_pairs.rows_to_ask(make_pairs.rows_of(rows, "held out"), "0 held out", "base model", count)
    setting = make_pairs.SETTINGS[0]
    assert setting == (24, 0.0)
    again = [row for row in asked[:: len(make_pairs.SETTINGS)] if prompt_of(row) in stored]
    answers = make_pairs.ask_base_model(again, [setting])
    equal = sum(stored[prompt_of(row)] == answer for row, answer in zip(again, answers, strict=True))
    assert len(again) > 10 and equal >= 0.8 * len(again)


def test_an_edit_that_changes_nothing_is_not_a_bug() -> None:
    """`subtle_bug` returns only code that fails the checks. Here every edit passes them."""
    row = Row("Do anything.", "", "value = 1", "family", "training", [Check("True", True)])
    assert make_pairs.subtle_bug(row, [row], Random(0)) is None


@pytest.mark.parametrize(
    "rule, code, prompt, expected",
    [
        ("flipped_comparison", "f = lambda x: x >= 3", "", {"f = lambda x: x > 3", "f = lambda x: x < 3"}),
        ("wrong_operator", "y = x - 1", "", {"y = x + 1"}),
        ("swapped", "def f(a, b):\n    return a - b", "", {"def f(a, b):\n    return b - a"}),
        ("swapped", "def f(a, b):\n    return a", "", {"def a(f, b):\n    return a", "def f(b, a):\n    return a"}),
        ("negation", 'y = "a" in x', "", {'y = "a" not in x'}),
        (
            "left_out",
            "def f(x):\n    return x + 1",
            "",
            {"def f(x):\n    x + 1", "def f(x):\n    return x"},
        ),
        ("left_out", "y = [x for x in z if len(x) > 2]", "", {"y = [x for x in z]", "y = [x for x in z if x > 2]"}),
    ],
)
def test_rules(rule: str, code: str, prompt: str, expected: set[str]) -> None:
    found = set()
    for seed in range(30):
        found |= set(getattr(make_pairs, rule)(code, prompt, Random(seed)))
    assert found & expected == expected
