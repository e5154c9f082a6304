"""A reward model in use, against transformers' scores and counts worked out by hand."""

import json
import math
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from transformers import AutoTokenizer, OPTForSequenceClassification

from minift.commands import generate, score, winrate
from minift.commands.terminal import print_table
from minift.errors import UserError
from minift.files import language_model
from minift.files.datasets import SCORE_SCHEMAS, load_rows
from minift.files.pretrained import load_judge
from minift.files.templates import save_template
from minift.model import OPT, RewardModel
from minift.prompts import TEMPLATES
from minift.scoring import Judge, calibration, examine, wilson_interval, win_rate
from tests.runs import read_lines, saved, user_error, write_lines

ANSWERS = [
    ("Add 1 and 2.", "3"),
    ("Add 1 and 2.", "def add(first, second):\n    return first + second"),
    ("What is a list?", "A list holds values, in order."),
    ("What is a list?", ""),
    (None, "\n\nHuman: Hi\n\nAssistant: Hello."),
    ("A", "for number in range(10): print(number)"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    return saved(RewardModel, tmp_path_factory.mktemp("reward"), 0, tokenizer)


@pytest.fixture
def judge(folder) -> Judge:
    return load_judge(folder, batch_size=4)


# ---- counts by hand ----


@pytest.mark.parametrize("wins, n", [(0, 7), (1, 1), (8, 10), (55, 110), (495, 550), (7, 7)])
def test_the_wilson_interval_is_where_the_normal_test_just_fails_to_reject(wins, n):
    z = NormalDist().inv_cdf(0.975)
    low, high = wilson_interval(wins, n)
    assert 0 <= low <= wins / n <= high <= 1
    for end in (low, high):
        # For a proportion of 0 or 1 one end is the proportion itself.
        assert math.isclose(abs(wins / n - end), z * math.sqrt(end * (1 - end) / n), rel_tol=1e-9, abs_tol=1e-9)
    assert high - low > 0.001


def test_the_wilson_interval_as_printed_in_textbooks():
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-7)  # R: binom.confint(8, 10, wilson)


def test_a_tie_is_not_a_win():
    rate = win_rate([1.0, 0.0, -2.0, 1e-9])
    assert (rate.wins, rate.ties, rate.pairs, rate.rate) == (2, 1, 4, 0.5)
    with pytest.raises(ValueError, match="no pairs"):
        win_rate([])


def test_calibration_by_hand():
    nine_to_one = math.log(0.9 / 0.1)
    error, brier = calibration([nine_to_one] * 9 + [-nine_to_one])
    assert error == pytest.approx(0, abs=1e-12)
    assert brier == pytest.approx(0.9 * 0.1**2 + 0.1 * 0.9**2)
    # Half right at a confidence of 0.9, and, in another bin, all right at 0.6.
    six_to_four = math.log(0.6 / 0.4)
    error, brier = calibration([nine_to_one, -nine_to_one, six_to_four, six_to_four])
    assert error == pytest.approx((abs(0.9 - 0.5) * 2 + abs(0.6 - 1) * 2) / 4)
    assert brier == pytest.approx((0.01 + 0.81 + 0.16 + 0.16) / 4)
    assert calibration([1e4, -1e4]) == (0.5, 0.5)  # certain, and half right


def test_an_examination_by_category_with_ties_and_rankings(capsys):
    exam = examine([[2.0, 1.0], [0.5, 0.5], [1.0, 3.0], [3.0, 1.0, 2.0]], ["easy", "easy", "hard", None])
    assert exam["pairs"] == {"all": 6, "easy": 2, "hard": 1}
    assert exam["accuracy"] == {"all": 0.5, "easy": 0.5, "hard": 0.0}  # the ranking: 3 > 1, 3 > 2, but not 1 > 2
    assert exam["ties"] == 1
    odds = [1 / (1 + math.exp(-difference)) for difference in (1, 0, -2, 2, 1, -1)]
    assert exam["mean_probability"] == pytest.approx(sum(odds) / 6)
    assert exam["interval"]["easy"] == [*wilson_interval(1, 2)]
    print_table({measure: {"before": value, "after": value} for measure, value in exam.items()})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["accuracy,", "6", "pairs", "50.0%"]
    assert any("hard, 1 pair " in line for line in lines)


# ---- a judge ----


def test_rewards_of_a_half_precision_model_are_not_rounded_to_it(folder):
    judge = load_judge(folder, dtype=torch.bfloat16)
    rewards = torch.tensor(judge.scores(ANSWERS))
    assert judge.model.score.weight.dtype == torch.bfloat16
    assert not torch.equal(rewards, rewards.bfloat16().float())


def test_a_score_is_transformers_score_of_the_rendered_text(judge, folder):
    reference = OPTForSequenceClassification.from_pretrained(folder).eval()
    reference_tokenizer = AutoTokenizer.from_pretrained(folder)
    for query, response in ANSWERS:
        text = response if query is None else f"\n\nHuman: {query}\n\nAssistant: {response}"
        with torch.no_grad():
            expected = reference(**reference_tokenizer(text + "</s>", return_tensors="pt")).logits.item()
        assert judge.score(query, response) == pytest.approx(expected, abs=1e-5)


def test_scores_do_not_depend_on_other_texts_or_order(judge):
    together = judge.scores(ANSWERS)
    assert together[::-1] == judge.scores(ANSWERS[::-1])
    assert together[2:] + together[:2] == judge.scores(ANSWERS[2:] + ANSWERS[:2])
    assert together == pytest.approx([judge.score(*answer) for answer in ANSWERS], abs=1e-6)
    assert len(set(together)) == len(ANSWERS)


def test_equal_texts_tie_in_any_batch(judge):
    scores = judge.scores([*ANSWERS, *reversed(ANSWERS)])
    assert scores == scores[::-1]


def test_compare_and_best_of_follow_the_scores(judge):
    query, responses = "What is a list?", [response for _, response in ANSWERS]
    scores = [judge.score(query, response) for response in responses]
    expected = 1 / (1 + math.exp(scores[1] - scores[0]))
    assert judge.compare(query, *responses[:2]) == pytest.approx(expected, abs=1e-6)
    assert judge.compare(query, *responses[1::-1]) == pytest.approx(1 - expected, abs=1e-6)
    assert judge.best_of(query, responses) == scores.index(max(scores))


def test_the_best_of_nothing_is_refused(judge):
    with pytest.raises(ValueError, match="no responses to choose from"):
        judge.best_of("A", [])


def test_a_judge_trains_nothing_and_drops_nothing_out(folder):
    judge = load_judge(folder)
    judge.model.train()
    assert judge.score("A", "B") == judge.score("A", "B")
    assert judge.model.training


def test_an_answer_longer_than_the_model_is_refused(judge):
    with pytest.raises(ValueError, match="more than the reward model's 64 positions"):
        judge.score("A", "B C " * 64)


# ---- minift score ----


def test_score_adds_scores_to_responses(folder, judge, tmp_path, capsys):
    rows = [{"prompt": query, "response": text, "id": n} for n, (query, text) in enumerate(ANSWERS) if query]
    data, out = write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    score.main(["--model", str(folder), "--data", str(data), "--out", str(out), "--batch-size", "2"])
    scored = read_lines(out)
    assert [{name: row[name] for name in ("prompt", "response", "id")} for row in scored] == rows
    expected = [judge.score(row["prompt"], row["response"]) for row in rows]
    assert [row["score"] for row in scored] == pytest.approx(expected, abs=1e-6)
    assert "5 responses" in capsys.readouterr().out


def test_score_adds_scores_to_pairs_and_prints_the_win_rate(folder, judge, tmp_path, capsys):
    texts = [text for _, text in ANSWERS]
    rows = [{"prompt": "A", "chosen": a, "rejected": b, "kind": "k"} for a, b in zip(texts, texts[1:], strict=False)]
    rows.append({"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: A\n\nAssistant: C"})
    data, out = write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    score.main(["--model", str(folder), "--data", str(data), "--out", str(out)])
    scored = read_lines(out)
    assert [row["score_rejected"] for row in scored[:-2]] == pytest.approx(
        [row["score_chosen"] for row in scored[1:-1]]
    )
    assert scored[-1]["score_chosen"] == pytest.approx(judge.score("A", "B"), abs=1e-6)
    wins = sum(row["score_chosen"] > row["score_rejected"] for row in scored)
    assert f"{wins / len(rows):.1%} (" in capsys.readouterr().out


def test_score_sends_an_instruction_and_its_input_through_the_template(folder, judge, tmp_path, capsys):
    question = {"instruction": "Add.", "input": "1, 2"}
    rows = [
        [question | {"response": "3"}, {"instruction": "Add.", "response": "3"}],
        [question | {"chosen": "3", "rejected": "4", "score": 1}, {"prompt": "Add.", "chosen": "3", "rejected": "4"}],
    ]
    for two, names in zip(rows, (["score"], ["score_chosen", "score_rejected"]), strict=True):
        out = tmp_path / "out.jsonl"
        score.main(
            ["--model", str(folder), "--data", str(write_lines(tmp_path / "rows.jsonl", two)), "--out", str(out)]
        )
        for row, query in zip(read_lines(out), (question, "Add."), strict=True):
            expected = [judge.scores([(query, answer)])[0] for answer in ("3", "4")][: len(names)]
            assert [row[name] for name in names] == pytest.approx(expected, abs=1e-6)
        assert "not read" not in capsys.readouterr().out


def test_score_counts_what_the_model_does_not_see(folder, tmp_path, capsys):
    rows = [{"chosen": "A", "rejected": "B", "source": "x"}, {"prompt": "\n\nHuman: A\n\nAssistant:", "response": "B"}]
    for row, words in zip(rows, ("share nothing but the BOS", "a second time"), strict=True):
        data = write_lines(tmp_path / "rows.jsonl", [row])
        score.main(["--model", str(folder), "--data", str(data)])
        printed = capsys.readouterr().out
        assert words in printed and ("whose 'source' is not read (line 1)" in printed) == ("source" in row)


@pytest.mark.parametrize("command", [score, winrate], ids=["score", "winrate"])
def test_no_field_of_a_row_is_replaced(command, tmp_path):
    """Refused before any work: the models do not exist."""
    data = tmp_path / "rows.jsonl"
    flags = ["--data", data, "--model", "no"] if command is score else ["--prompts", data, "--judge", "no"]
    flags += [] if command is score else ["--model-a", "no", "--model-b", "no"]
    added = ["score"] if command is score else ["answer_a", "answer_b", "score_a", "score_b"]
    for name in added:
        write_lines(data, [{"prompt": "A", "response": "B"}, {"prompt": "A", "response": "B", name: None, "c": 1}])
        with pytest.raises(UserError, match="no: no such folder"):
            command.main([*map(str, flags), "--out", str(tmp_path / "out.jsonl")])
        write_lines(data, [{"prompt": "A", "response": "B"}, {"prompt": "A", "response": "B", name: 0}])
        with pytest.raises(UserError, match=f"line 2: the row has a field '{name}', which is to be added"):
            command.main([*map(str, flags), "--out", str(tmp_path / "out.jsonl")])
        with pytest.raises(UserError, match="no: no such folder"):
            command.main([*map(str, flags)])  # nothing is written
    write_lines(data, [{"prompt": "A", "response": "B", "id": "\ud800"}])
    with pytest.raises(UserError, match="line 1: field 'id' has a lone surrogate"):
        command.main([*map(str, flags), "--out", str(tmp_path / "out.jsonl")])


def test_score_refuses_in_one_line(folder, tmp_path, tokenizer):
    def refused(*flags: object, data: Path) -> str:
        return user_error(score.main, ["--data", str(data), *map(str, flags)])

    good = write_lines(tmp_path / "good.jsonl", [{"prompt": "A", "response": "B"}])
    long = write_lines(
        tmp_path / "long.jsonl", [{"prompt": "A", "response": "B"}, {"prompt": "A", "response": "B C " * 64}]
    )
    half = write_lines(tmp_path / "half.jsonl", [{"prompt": "A", "chosen": "B"}])
    language_model = saved(OPT, tmp_path / "lm", 0, tokenizer)
    assert "this is a language model" in refused("--model", language_model, data=good)
    assert "line 2" in (message := refused("--model", folder, data=long)) and str(long) in message
    assert f"{half}:1" in (message := refused("--model", folder, data=half)) and "'rejected' is missing" in message
    assert "--template" in refused("--model", folder, "--template", "nowhere", data=good)
    assert "--batch-size" in refused("--model", folder, "--batch-size", "0", data=good)
    assert "--out" in refused("--model", folder, "--out", tmp_path / "no" / "where", data=good)
    assert "no-model" in refused("--model", tmp_path / "no-model", data=good)


def test_a_judge_s_template_is_that_of_its_model_unless_named(tokenizer, tmp_path):
    folder = saved(RewardModel, tmp_path / "reward", 0, tokenizer)
    assert load_judge(folder).template is TEMPLATES["dialogue"]
    save_template(TEMPLATES["alpaca"], folder)
    assert load_judge(folder).template.without_input == TEMPLATES["alpaca"].without_input
    assert load_judge(folder, template="none").template is TEMPLATES["none"]


def test_rows_to_score_share_one_schema(tmp_path):
    rows = [{"prompt": "A", "response": "B"}, {"prompt": "A", "chosen": "B", "rejected": "C"}]
    with pytest.raises(UserError, match=r":2: this row has 'chosen' and 'rejected', earlier"):
        load_rows(write_lines(tmp_path / "rows.jsonl", rows), SCORE_SCHEMAS)


# ---- minift winrate ----


def test_winrate_lets_both_answer_and_the_judge_decide(folder, judge, tokenizer, tmp_path, capsys):
    model_a, model_b = (saved(OPT, tmp_path / name, seed, tokenizer) for name, seed in (("a", 1), ("b", 2)))
    rows = [{"prompt": "Add."}, {"instruction": "Add.", "input": "1, 2"}, {"instruction": "What?"}, {"prompt": "Hi"}]
    prompts, out = write_lines(tmp_path / "prompts.jsonl", rows), tmp_path / "out.jsonl"
    flags = ["--judge", str(folder), "--prompts", str(prompts), "--max-new-tokens", "6", "--out", str(out)]
    winrate.main(["--model-a", str(model_a), "--model-b", str(model_b), *flags])
    found = json.loads(capsys.readouterr().out)
    answered = read_lines(out)
    queries = ["Add.", "Add.\n\n1, 2", "What?", "Hi"]
    for side in ("a", "b"):
        expected = [judge.score(query, row[f"answer_{side}"]) for query, row in zip(queries, answered, strict=True)]
        assert [row[f"score_{side}"] for row in answered] == pytest.approx(expected, abs=1e-6)
        assert found[f"mean_score_{side}"] == pytest.approx(sum(expected) / 4, abs=1e-6)
    wins = sum(row["score_a"] > row["score_b"] for row in answered)
    losses = sum(row["score_a"] < row["score_b"] for row in answered)
    assert (found["wins_a"], found["wins_b"], found["ties"], found["prompts"]) == (wins, losses, 4 - wins - losses, 4)
    assert found["interval_95"] == [*wilson_interval(wins, 4)]

    # Exchanged, the other one's wins are counted; a model never beats itself.
    winrate.main(["--model-a", str(model_b), "--model-b", str(model_a), *flags])
    assert json.loads(capsys.readouterr().out)["wins_a"] == losses
    winrate.main(["--model-a", str(model_a), "--model-b", str(model_a), *flags])
    found = json.loads(capsys.readouterr().out)
    assert (found["wins_a"], found["wins_b"], found["ties"]) == (0, 0, 4)


def test_winrate_asks_both_through_the_template(folder, tokenizer, tmp_path, monkeypatch, capsys):
    asked = []

    def record(model, prompts, options, on_progress):
        asked.append([tokenizer.decode(ids) for ids in prompts])
        return [[tokenizer.encode("B")[1:]] for _ in prompts]

    load, loaded = winrate.load_for_sft, []
    monkeypatch.setattr(winrate, "load_for_sft", lambda *given, **more: loaded.append(1) or load(*given, **more))
    monkeypatch.setattr(language_model, "generate", record)
    model = saved(OPT, tmp_path / "a", 1, tokenizer)
    prompts = write_lines(
        tmp_path / "prompts.jsonl", [{"prompt": "Add.", "system": "S"}, {"instruction": "Add.", "input": "1"}]
    )
    flags = ["--model-a", model, "--model-b", model, "--judge", folder, "--prompts", prompts, "--max-new-tokens", 2]
    winrate.main([*map(str, flags)])
    plain = "### Instruction:\nAdd.\n\n### Response:\n"
    assert asked == [[plain, "### Instruction:\nAdd.\n\n### Input:\n1\n\n### Response:\n"]] * 2
    assert len(loaded) == 2  # each once
    assert capsys.readouterr().err.count("1 row whose 'system' is not read (line 1)") == 1
    # Of a row that fits both schemas, the field that generate and train_sft.py use.
    asked.clear()
    write_lines(prompts, [{"instruction": "Add.", "prompt": None}, {"instruction": "A", "prompt": "Add."}])
    winrate.main([*map(str, flags)])
    assert asked == [[plain, plain]] * 2
    asked.clear()
    winrate.main([*map(str, flags), "--template", "none", "--limit", "1"])
    assert asked == [["Add."]] * 2

    # A remark about a prompt is printed once for each model.
    write_lines(prompts, [{"prompt": plain}])
    capsys.readouterr()
    winrate.main([*map(str, flags)])
    assert capsys.readouterr().err.count("a second time") == 2
    write_lines(prompts, [{"prompt": "Add."}])

    # Each model gets the template that it was trained with, if that is beside it.
    asked.clear()
    other = saved(OPT, tmp_path / "b", 1, tokenizer)
    save_template(TEMPLATES["none"], other)
    winrate.main([*map(str, flags), "--model-b", str(other), "--limit", "1"])
    assert asked == [[plain], ["Add."]]


def test_winrate_refuses_in_one_line(folder, tokenizer, tmp_path):
    model = saved(OPT, tmp_path / "a", 1, tokenizer)
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "Add."}, {"prompt": "Add. " * 60}])

    def refused(model_a: Path, model_b: Path, judge: Path, *flags: str) -> str:
        paths = ["--model-a", model_a, "--model-b", model_b, "--judge", judge, "--prompts", prompts]
        return user_error(winrate.main, [*map(str, paths), *flags])

    assert "this is a language model" in refused(model, model, model)
    assert "this is a reward model" in refused(folder, model, folder, "--limit", "1", "--max-new-tokens", "2")
    assert "line 2: the question alone: " in refused(model, model, folder, "--max-new-tokens", "2")
    assert "--model-a: line 1: the prompt has" in refused(
        model, model, folder, "--max-new-tokens", "60", "--limit", "1"
    )
    assert "--judge-template" in refused(model, model, folder, "--judge-template", "nowhere")
    # The judge's limits are known before anybody answers: the models do not exist.
    missing, template = tmp_path / "missing", tmp_path / "no_input.txt"
    template.write_text("{instruction}{response}")
    write_lines(prompts, [{"prompt": "Add."}, {"instruction": "Add.", "input": "1"}])
    message = refused(missing, missing, folder, "--judge-template", str(template))
    assert "line 2: the question alone: " in message and "it has no {input}" in message
    write_lines(prompts, [{"prompt": "Add. " * 60}])
    assert "line 1: the question alone: " in refused(missing, missing, folder)


def winrate_of_answers(folder: Path, tokenizer, tmp_path: Path, monkeypatch, answers: list[str]) -> Path:
    """Let two models give the same answers, the judge of 64 positions decide; return the file of --out."""
    monkeypatch.setattr(language_model, "generate", lambda *_: [[tokenizer.encode(answer)[1:]] for answer in answers])
    model, out = saved(OPT, tmp_path / "a", 1, tokenizer), tmp_path / "out.jsonl"
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "Add."} for _ in answers])
    paths = ["--model-a", model, "--model-b", model, "--judge", folder, "--prompts", prompts, "--out", out]
    winrate.main([*map(str, paths), "--max-new-tokens", "2"])
    return out


def test_winrate_leaves_out_answers_that_are_too_long_for_the_judge(folder, tokenizer, tmp_path, monkeypatch, capsys):
    """One of them used to throw all answers away, after all were made."""
    answers = ["B", "so " * 60, "C"]
    out = winrate_of_answers(folder, tokenizer, tmp_path, monkeypatch, answers)
    printed = capsys.readouterr()
    found, rows = json.loads(printed.out), read_lines(out)
    assert (found["prompts"], found["ties"], found["left_out"]) == (2, 2, 1)
    assert "2 of 6 answers, too long for the judge, are left out: line 2" in printed.err
    assert [row["answer_a"] for row in rows] == answers == [row["answer_b"] for row in rows]
    assert [row["score_a"] is None for row in rows] == [False, True, False] == [row["score_b"] is None for row in rows]
    mean = (rows[0]["score_a"] + rows[2]["score_a"]) / 2
    assert found["mean_score_a"] == pytest.approx(mean, abs=1e-6)


def test_winrate_keeps_the_answers_if_none_can_be_judged(folder, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--judge .*ask for fewer --max-new-tokens"):
        winrate_of_answers(folder, tokenizer, tmp_path, monkeypatch, ["so " * 60])
    assert [[*row] for row in read_lines(tmp_path / "out.jsonl")] == [["prompt", "answer_a", "answer_b"]]


def test_winrate_checks_both_models_and_the_judge_before_any_answer(folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "generate", lambda *_: pytest.fail("an answer was made"))
    roomy, narrow = (
        saved(OPT, tmp_path / str(positions), 1, tokenizer, max_position_embeddings=positions) for positions in (256, 8)
    )
    fits, too_long = {"prompt": "Add."}, {"prompt": "Add. " * 30}
    for model_b, rows, expected in (
        (narrow, [fits], "--model-b: line 1: the prompt has"),
        (roomy, [fits, too_long], "line 2: the question alone: "),
    ):
        prompts = write_lines(tmp_path / "prompts.jsonl", rows)
        paths = ["--model-a", roomy, "--model-b", model_b, "--judge", folder, "--prompts", prompts]
        with pytest.raises(UserError, match=expected):
            winrate.main([*map(str, paths), "--max-new-tokens", "2"])


def test_winrate_says_once_that_a_run_has_no_template(folder, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(language_model, "generate", lambda *_: [[tokenizer.encode("B")[1:]]])
    models = [saved(OPT, tmp_path / name, 1, tokenizer) for name in ("a", "b")]
    (models[1] / "run.json").write_text("{}")
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "Add."}])
    flags = ["--model-a", models[0], "--model-b", models[1], "--judge", folder, "--prompts", prompts]
    winrate.main([*map(str, flags), "--max-new-tokens", "2"])
    assert capsys.readouterr().err.count("so the template is course") == 1


def test_the_blanks_of_the_template_do_not_belong_to_an_answer(folder, tokenizer, tmp_path, monkeypatch):
    """`dialogue` ends in a blank, which the model writes: the judge's own template has one already."""
    monkeypatch.setattr(language_model, "generate", lambda *_: [[tokenizer.encode(" A list")[1:]]])
    model, out = saved(OPT, tmp_path / "a", 1, tokenizer), tmp_path / "out.jsonl"
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"instruction": "What?"}])
    flags = ["--prompts", prompts, "--max-new-tokens", 2, "--template", "dialogue", "--out", out]
    winrate.main([*map(str, ["--model-a", model, "--model-b", model, "--judge", folder, *flags])])
    assert read_lines(out)[0]["answer_a"] == "A list"
    generate.main([*map(str, ["--model", model, *flags])])
    (line,) = read_lines(out)
    assert line["completion"] == "A list" and line["token_ids"] == tokenizer.encode(" A list")[1:]
