"""Best of n: the estimate against all subsets, `minift best-of` on small models, and the commands of `make improve`."""

import json
import math
import re
import shlex
import shutil
import subprocess
from fractions import Fraction
from itertools import combinations
from statistics import fmean, stdev

import pytest

from minift.commands import best_of, winrate
from minift.commands.flags import parse
from minift.errors import UserError
from minift.files import language_model
from minift.files.datasets import TRAINING_SCHEMAS, load_rows
from minift.files.pretrained import load_judge
from minift.scoring import mean_best_of, vote, wilson_interval
from tests.runs import ROOT, read_lines, write_lines

DOUBLE, TRIPLE = "def f(x):\n    return 2 * x", "def f(x):\n    return 3 * x"
CHECKS = [{"expression": "f(2)", "expected": "4"}]
ROWS = [
    {"instruction": "Double.", "output": "the reference", "kind": "easy", "checks": CHECKS},
    {"instruction": "Double.", "input": "x", "output": "", "kind": "hard", "checks": CHECKS},
    {"prompt": "Hi"},
]
GREEDY = [TRIPLE, DOUBLE]
SAMPLES = [[DOUBLE, TRIPLE, DOUBLE], [TRIPLE, TRIPLE, "def f("], ["Yo", "so " * 60, "Hello"]]


@pytest.fixture
def scripted(monkeypatch, tokenizer, tmp_path, model, judge):
    """Return `minift best-of` with a model that says what SAMPLES and GREEDY hold; it takes more flags."""
    prompts = write_lines(tmp_path / "prompts.jsonl", ROWS)

    def answers(_, prompts, options, *rest) -> list:
        texts = SAMPLES if options.temperature else [[text] for text in GREEDY]
        assert [options.num_samples] * len(prompts) == [*map(len, texts)]
        return [[tokenizer.encode(text)[1:] for text in its_texts] for its_texts in texts]

    def command(*flags: object) -> None:
        monkeypatch.setattr(language_model, "generate", answers)
        fixed = ["--model", model, "--judge", judge, "--prompts", prompts, "--samples", 3, "--max-new-tokens", 2]
        best_of.main([*map(str, [*fixed, *flags])])

    return command


# -------------------------------------------------------------------------------------------------------- the estimate


@pytest.mark.parametrize(
    "rewards", [[0.5, -1.0, 2.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0, 0.0], [0.0] * 5, [-math.inf, 2.0, -math.inf, 1.0, 2.0]]
)
def test_the_closed_form_is_the_mean_over_all_subsets(rewards):
    values = [3.0, 1.0, 4.0, 1.5, 9.0]
    for k in range(1, 6):
        subsets = combinations(range(5), k)  # in the samples' order: the first of equal rewards wins
        best = [Fraction(values[max(subset, key=lambda sample: rewards[sample])]) for subset in subsets]
        assert mean_best_of(values, rewards, k) == pytest.approx(float(sum(best) / len(best)), abs=1e-14)
    assert mean_best_of(values, rewards, 1) == pytest.approx(fmean(values))
    assert mean_best_of(values, rewards, 5) == values[rewards.index(max(rewards))]


def test_with_the_checks_as_judge_it_is_pass_at_k():
    passed = [False, True, False, True, False, False]
    for k in range(1, 7):
        expected = 1 - math.comb(4, k) / math.comb(6, k)  # no subset of the four that fail
        assert mean_best_of(passed, [*map(float, passed)], k) == pytest.approx(expected)


def test_a_vote_adds_up_the_strengths_of_equal_texts():
    texts = ["a", "b", "b", "c", "b"]
    assert vote(texts, [0.0] * 5) == 1  # the majority
    assert vote(texts, [math.log(4), 0.0, 0.0, 0.0, 0.0]) == 0  # 4 against 1 + 1 + 1
    assert vote(texts, [math.log(2), 0.0, 0.0, 0.0, 0.0]) == 1  # 2 against 3
    assert vote(["a", "b"], [1.0, 1.0]) == 0
    assert vote(texts, [-math.inf, -800.0, -800.0, -801.0, -800.0]) == 1  # exp(-800) is 0 in float64
    assert vote(["a", "b", "b"], [-math.inf, -5.0, -5.0]) == 1
    assert vote(["a", "b", "b"], [900.0, 0.0, 0.0]) == 0
    assert vote(["a", "b", "b"], [-math.inf] * 3) == 0  # nothing to choose by


def test_the_vote_is_the_mode_of_the_model_times_exp_reward():
    probability, reward = {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": -1.0, "b": 0.25, "c": 0.5}
    texts = [text for text, share in probability.items() for _ in range(round(10 * share))]
    best = max(probability, key=lambda text: probability[text] * math.exp(reward[text]))
    assert texts[vote(texts, [reward[text] for text in texts])] == best == "b"


def test_the_interval_of_a_mean():
    values = [1.0, 0.0, 0.25, 0.5]
    radius = 1.959963984540054 * stdev(values) / 2
    assert best_of.mean_interval(values) == pytest.approx((0.4375 - radius, 0.4375 + radius))
    assert best_of.mean_interval([1.0]) == (-math.inf, math.inf)


# --------------------------------------------------------------------------------------------------------- the command


def test_samples_their_rewards_and_the_best_are_added(scripted, judge, tmp_path, capsys):
    out, favourites = tmp_path / "out.jsonl", tmp_path / "rows.jsonl"
    scripted("--out", out, "--rows", favourites)
    assert capsys.readouterr().err.count("1 of 9 answers, too long for the judge, are left out") == 1
    lines, referee = read_lines(out), load_judge(judge)
    questions = [{"instruction": "Double."}, {"instruction": "Double.", "input": "x"}, {"instruction": "Hi"}]
    for row, question, texts, line in zip(ROWS, questions, SAMPLES, lines, strict=True):
        assert line.items() >= row.items() and line.keys() == row.keys() | {"samples", "rewards", "best"}
        rewards = [None if len(text) > 150 else referee.scores([(question, text)])[0] for text in texts]
        assert line["samples"] == texts and line["rewards"] == pytest.approx(rewards, abs=1e-6)
        readable = [reward for reward in line["rewards"] if reward is not None]
        assert line["best"] == texts[line["rewards"].index(max(readable))]
    # Rows to train on: the judge's favourite, not the row's own output.
    expected = [question | {"output": line["best"]} for question, line in zip(questions, lines, strict=True)]
    assert read_lines(favourites) == expected == load_rows(favourites, TRAINING_SCHEMAS)


def test_without_out_the_lines_are_printed(scripted, capsys):
    scripted("--run-checks")
    printed = capsys.readouterr()
    assert [json.loads(line)["samples"] for line in printed.out.splitlines()] == SAMPLES
    assert "pass rate" in printed.err


def test_the_table_of_pass_rates(scripted, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    scripted("--run-checks", "--out", out)
    lines = read_lines(out)
    assert [line["passed"] for line in lines] == [[True, False, True], [False] * 3, None]
    assert [(line["greedy"], line["greedy_passed"]) for line in lines] == [
        (TRIPLE, False),
        (DOUBLE, True),
        (None, None),
    ]
    table = {}
    title, *rows = capsys.readouterr().out.splitlines()
    assert re.split(" {2,}", title) == ["pass rate", "all, 2 prompts", "easy, 1 prompts", "hard, 1 prompts"]
    for row in rows:
        label, *cells = re.split(" {2,}", row)
        table[label] = cells
    best = [mean_best_of(lines[0]["passed"], lines[0]["rewards"], k) for k in (1, 2, 3)]
    for label, easy in (("mean of the samples: best of 1", 2 / 3), ("best of 2", best[1]), ("best of 3", best[2])):
        low, high = wilson_interval(easy, 2)
        assert table[label][0] == f"{easy / 2:.1%} ({low:.1%}-{high:.1%})"
        assert table[label][1].startswith(f"{easy:.1%} (") and table[label][2].startswith("0.0% (")
    assert [cell.split()[0] for cell in table["greedy"]] == ["50.0%", "0.0%", "100.0%"]
    assert [cell.split()[0] for cell in table["any of 3"]] == ["50.0%", "100.0%", "0.0%"]
    assert [cell.split()[0] for cell in table["best of 3, less greedy"]] == [
        f"{(best[2] - 1) / 2:+.1%}",
        f"{best[2]:+.1%}",
        "-100.0%",
    ]
    assert [cell.split()[0] for cell in table["majority of 3"]] == ["50.0%", "100.0%", "0.0%"]
    voted = lines[0]["passed"][vote(lines[0]["samples"], lines[0]["rewards"])]
    assert [cell.split()[0] for cell in table["vote of 3, by e^reward"]][1:] == [f"{voted:.1%}", "0.0%"]
    assert table["vote of 3, less greedy"][1].startswith(f"{float(voted):+.1%} (")
    assert [*table] == ["greedy", "mean of the samples: best of 1", "best of 2", "best of 3", "majority of 3",
                        "vote of 3, by e^reward", "any of 3", "best of 3, less greedy",
                        "vote of 3, less greedy"]  # fmt: skip


def test_with_vote_the_favourite_is_the_vote_of_the_judge(scripted, monkeypatch, tmp_path):
    rewards = iter([0.0, 0.5, 0.0] + [0.1, 0.1, 0.5] + [1.0, 2.0])  # one sample is too long for the judge
    monkeypatch.setattr(winrate, "score_rows", lambda *_: [*rewards])
    scripted("--vote", "--out", tmp_path / "out.jsonl")
    assert [line["best"] for line in read_lines(tmp_path / "out.jsonl")] == [DOUBLE, TRIPLE, "Hello"]


def test_equal_answers_run_once_and_nothing_runs_without_the_flag(scripted, monkeypatch, tmp_path):
    ran = []

    def record(answers, checks, on_progress) -> list[bool]:
        ran.extend(answers)
        return [False for _ in answers]

    monkeypatch.setattr(best_of, "check_answers", record)
    scripted("--out", tmp_path / "out.jsonl")
    assert ran == []
    scripted("--out", tmp_path / "out.jsonl", "--run-checks")
    assert ran == [TRIPLE, DOUBLE, DOUBLE, TRIPLE, "def f("]


def test_samples_are_kept_whatever_the_judge_does(scripted, monkeypatch, tmp_path):
    out, favourites = tmp_path / "out.jsonl", tmp_path / "rows.jsonl"

    def fail(_: object, sequences: list, *rest: object) -> list:
        if sequences:
            raise MemoryError
        return []

    monkeypatch.setattr(winrate, "score_rows", fail)
    with pytest.raises(MemoryError):
        scripted("--out", out)
    assert [line["samples"] for line in read_lines(out)] == SAMPLES
    out.unlink()
    monkeypatch.setattr(winrate.Judge, "encode", lambda judge, question, text: too_long() if text else [])
    with pytest.raises(UserError, match="--judge: .*none of the samples; ask for fewer --max-new-tokens"):
        scripted("--out", out, "--rows", favourites)
    assert [line["samples"] for line in read_lines(out)] == SAMPLES and not favourites.exists()


def too_long() -> None:
    raise ValueError("too long")


def test_a_real_model_gives_different_samples(model, judge, tmp_path):
    prompts, out = write_lines(tmp_path / "prompts.jsonl", ROWS[:2]), tmp_path / "out.jsonl"
    flags = ["--model", model, "--judge", judge, "--prompts", prompts, "--max-new-tokens", 6, "--out", out]
    best_of.main([*map(str, [*flags, "--samples", 4])])
    found = read_lines(out)
    assert all(len({*line["samples"]}) > 1 and line["best"] in line["samples"] for line in found)
    best_of.main([*map(str, [*flags, "--samples", 4, "--limit", 1])])
    (alone,) = read_lines(out)
    assert (alone["samples"], alone["best"]) == (found[0]["samples"], found[0]["best"])  # whatever else is sampled


def test_mistakes_end_in_one_line_before_any_work(tmp_path):
    """The models do not exist."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"

    def refused(row: dict, *flags: object) -> str:
        write_lines(prompts, [ROWS[0], row])
        with pytest.raises(UserError) as caught:
            best_of.main([*map(str, ["--model", "no", "--judge", "no", "--prompts", prompts, *flags])])
        assert "\n" not in str(caught.value) and not out.exists()
        return str(caught.value)

    assert "no: no such folder" in refused(ROWS[1])
    for name in ("samples", "rewards", "best"):
        assert f"line 2: the row has a field '{name}', which is to be added" in refused(ROWS[1] | {name: 0})
    assert "no: no such folder" in refused(ROWS[1] | {"passed": 0})
    assert "line 2: the row has a field 'passed'" in refused(ROWS[1] | {"passed": 0}, "--run-checks")
    assert "line 2: check 1: expected an object" in refused(ROWS[1] | {"checks": ["f(2)"]}, "--run-checks")
    write_lines(prompts, ROWS[2:])
    with pytest.raises(UserError, match="--run-checks: no row of .* has 'checks'"):
        best_of.main([*map(str, ["--model", "no", "--judge", "no", "--prompts", prompts, "--run-checks"])])
    for temperature in (0, -1, "nan", "inf"):
        assert "--temperature" in refused(ROWS[1], "--temperature", temperature)
    assert f"--rows {prompts}: this is the file that --prompts names" in refused(ROWS[1], "--rows", prompts)
    assert "--rows" in refused(ROWS[1], "--rows", out, "--out", out)
    assert refused(ROWS[1], "--rows", "") == "--rows '': expected a file's name"
    assert "--samples" in refused(ROWS[1], "--samples", 0)


# -------------------------------------------------------------------------------------------------------- make improve


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_improve_trains_on_the_favourites_that_it_chooses(monkeypatch):
    done = subprocess.run(["make", "-n", "improve"], cwd=ROOT, capture_output=True, text=True, check=True)
    sample, train = (
        shlex.split(line)
        for line in done.stdout.replace("\\\n", "").splitlines()
        if "best-of" in line or "train_sft.py" in line
    )
    args = best_of._parser().parse_args(sample[sample.index("best-of") + 1 :])
    monkeypatch.chdir(ROOT)
    config = parse("sft", train[train.index("train_sft.py") + 1 :])
    assert (args.model, args.judge, args.prompts) == ("runs/sft", "runs/rm", "data/instructions.jsonl")
    assert (config.model, config.data, config.eval_data) == (args.model, args.rows, "data/heldout.jsonl")
    # The run's own template, whichever that is: best-of reads it too.
    assert (args.template, config.template) == (None, "runs/sft/template.json")
    assert config.run_checks and not args.run_checks  # training rows have no checks: the judge alone decides
