"""`minift tour`: ten stops, numbers that a reader can redo, and an error wherever by hand and by code disagree."""

import copy
import io
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

import minift.model
import minift.scoring
from minift.commands import notebook, tour
from minift.commands.cli import run_command
from minift.encode import IGNORE_INDEX, Example
from minift.files import marks
from minift.rows import RowLayout
from tests.runs import ROOT, mistake

TITLES = [
    "Turn a row into a prompt",
    "Turn text into tokens, ids and labels",
    "Pack three rows into one flat list",
    "Turn ids into hidden states",
    "Turn hidden states into a loss",
    "Take an optimiser step, and compute the loss again",
    "Let the tuned model answer, token by token",
    "Compare the answer with the reference: BLEU",
    "Turn two answers into two rewards",
    "Turn rewards into a loss and a win rate",
]


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> str:
    """Return what the command prints, started in an empty folder, which stays empty."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-m", "minift", "tour"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert not [*folder.iterdir()]
    return done.stdout


@pytest.fixture(scope="module")
def stops(printed) -> list[str]:
    """Return the text of each stop."""
    return re.split(r"^── stop \d+ of 10: ", printed, flags=re.MULTILINE)[1:]


def number(text: str, pattern: str) -> float:
    """Return the one number that the pattern's group finds."""
    [found] = re.findall(pattern, text)
    return float(found)


def test_ten_stops_that_fit_a_terminal(printed, stops):
    assert [text.split("\n")[0].rstrip(" ─") for text in stops] == TITLES
    lines = printed.split("\n")
    assert max(map(len, lines)) == 80 and "\x1b" not in printed
    assert not [line for line in lines if line != line.rstrip()]
    checked = [re.findall(r"by hand|  checked: ", text) for text in stops]
    assert not checked[0] and all(checked[1:])


def test_each_stop_names_files_and_functions_that_exist(stops):
    for text, stop in zip(stops, notebook.STOPS, strict=True):
        assert stop.functions and all(f"   {place}\n" in text for place in stop.places)
        for place in stop.places:
            file, names = place.split(": ")
            source = (ROOT / file).read_text()
            assert all(f"def {name.split('.')[-1]}(" in source for name in names.split(", "))


def test_a_reader_with_a_calculator_gets_the_loss(stops):
    text = stops[4]
    table = text[text.index("  token") : text.index("\n\nThe loss is")].split("\n")[1:]
    cells = [line[start : start + 24] for line in table for start in (2, 28, 54)]
    cells = [cell for cell in cells if cell.strip()]  # the rows have different lengths
    losses = [float(cell[15:]) for cell in cells if not cell.startswith("sum")]
    sums = [float(cell[15:]) for cell in cells if cell.startswith("sum")]
    assert (len(losses), len(sums)) == (34, 3)
    for cell, loss in zip(cells, losses, strict=False):
        assert math.exp(-loss) == pytest.approx(float(cell[8:15]), rel=6e-2)
    total = number(text, r"= (\d+\.\d{5}), divided by 34")
    assert round(sum(losses), 5) == round(sum(sums), 5) == total
    by_hand, by_code = number(text, r"loss: by hand (\d\.\d{5})"), number(text, r"loss: .* by code (\d\.\d{5})")
    assert round(total / 34, 5) == by_hand == pytest.approx(by_code, abs=1.1e-5)


def test_a_reader_with_a_calculator_gets_the_step_and_bleu(stops):
    text = stops[5]
    before, after = number(text, r" w = (-?\d\.\d+)"), number(text, r"w after the step: by hand (-?\d\.\d+)")
    gradient, clipped = number(text, r"gradient (-?\d\.\d+)"), number(text, r"clipped g = (-?\d\.\d+)")
    assert gradient / number(text, r"norm is (\d+\.\d+)") == pytest.approx(clipped, rel=1e-3)
    assert before - 0.001 * math.copysign(1, clipped) == pytest.approx(after, abs=1e-5)
    losses = [number(text, rf"loss {when}: (?:by hand )?(\d\.\d+)") for when in ("before the step", "after the step",
                                                                                  "after two more")]  # fmt: skip
    assert losses == sorted(losses, reverse=True) and f"{losses[0]:.5f}" in stops[4]

    fractions = [int(some) / int(all_) for some, all_ in re.findall(r"-grams: (\d+) of (\d+) match", stops[7])]
    score = 100 * math.prod(fractions) ** 0.25 * number(stops[7], r"penalty:\s+(\d\.\d{5})")
    assert score == pytest.approx(number(stops[7], r"BLEU: by hand (\d+\.\d+)"), abs=1e-4)


def test_a_reader_with_a_calculator_gets_the_preference_and_its_interval(stops):
    chosen, rejected = (number(stops[8], rf"reward of the {side} answer: by hand (-?\d+\.\d+)")
                        for side in ("chosen", "rejected"))  # fmt: skip
    text = stops[9]
    difference = number(text, r"c - r = (-?\d+\.\d+)")
    assert difference == pytest.approx(chosen - rejected, abs=1e-9)
    probability = 1 / (1 + math.exp(-difference))
    strength, other = number(text, r"e\^c = (\d\.\d+)"), number(text, r"e\^r = (\d\.\d+)")
    assert strength / (strength + other) == pytest.approx(probability, abs=1e-5)
    assert number(text, r"σ\(c - r\): by hand (\d\.\d{5})\b(?=, by code 0.5)") == round(probability, 5)
    assert number(text, r"-log σ\(c - r\): by hand (\d\.\d+)") == round(-math.log(probability), 5)
    assert number(text, r"loss after one step .*: (\d\.\d+)") < -math.log(probability)
    wins, pairs = (int(word) for word in re.findall(r"(\d+) / (\d+) =", text)[0])
    ends = [float(p) for p in re.findall(r"^  p = (\d\.\d+)", text, re.MULTILINE)]
    assert len(ends) == 2 and ends[0] < wins / pairs < ends[1]
    for p in ends:
        assert abs(wins / pairs - p) == pytest.approx(1.95996 * math.sqrt(p * (1 - p) / pairs), abs=2e-5)


# ---- by hand ≠ by code ----


@pytest.fixture(scope="module")
def before() -> list[tour.Tour]:
    """Return the tour as it is before each stop."""
    guide, copies = tour.Tour(colour=False), []
    for stop in notebook.STOPS:
        copies.append(copy.deepcopy(guide))
        assert [*stop.method(guide)]
    return copies


def one_token_less(prompt, completion, tokenizer):
    ids = tokenizer.encode([*prompt, *completion])
    return Example(ids, [IGNORE_INDEX] * len(tokenizer.encode([*prompt, *completion[:1]])) + ids[-1:]), False


def from_one(examples, collate=tour.collate):
    batch = collate(examples)
    return batch._replace(positions=batch.positions + 1)


def the_row_before(rows, num_tokens, max_groups, row_layout=minift.model.row_layout):
    layout = row_layout(rows, num_tokens, max_groups)
    return RowLayout(layout.gather.roll(1) if len(rows) > 1 else layout.gather, *layout[1:])


def unshifted(labels, positions):
    where = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    return where, labels[where]


def plain_descent(model, weight_decay):
    return torch.optim.SGD(model.parameters())


def without_clipping(hypotheses, references, smooth_method, corpus_bleu=tour.corpus_bleu):
    found = corpus_bleu(hypotheses, references, smooth_method=smooth_method)
    return found._replace(counts=found.totals)


BROKEN = {
    "the mask ends too late": (2, tour, "encode_completion", one_token_less, "decode"),
    "positions count from 1": (3, tour, "collate", from_one, "positions"),
    "a row sees another": (4, minift.model, "row_layout", the_row_before, "alone"),
    "labels are not shifted": (5, tour, "next_token_targets", unshifted, "loss"),
    "plain gradient descent": (6, tour, "adamw", plain_descent, "w after the step"),
    "another token": (7, tour, "generate", lambda *_: [[[5, 6, 7, 8, 9]]], "generate"),
    "n-grams match too often": (8, tour, "corpus_bleu", without_clipping, "matches"),
    "rewards at the first token": (9, minift.model, "last_tokens", lambda rows: rows[:, 0], "reward of the chosen"),
    "the worse answer preferred": (10, tour, "bradley_terry", lambda c, r, m, w: (-((c - r).sigmoid().log() - 1).sum(),
                                                                                  w.sum()), "loss"),
    "a sigmoid of twice the difference": (10, tour, "sigmoid", lambda x: 1 / (1 + math.exp(-2 * x)), "σ"),
    "the interval of a normal": (10, minift.scoring, "wilson_interval", lambda wins, n: (0.35, 0.75), "p = 0.35"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_code_is_noticed(fault, before, monkeypatch):
    place, where, name, replacement, message = BROKEN[fault]
    monkeypatch.setattr(where, name, replacement)
    with pytest.raises(notebook.DisagreementError, match=re.escape(message)):
        [*notebook.STOPS[place - 1].method(copy.deepcopy(before[place - 1]))]


def test_a_disagreement_ends_in_one_line_and_status_1(monkeypatch, capsys):
    monkeypatch.setattr(tour, "encode_completion", one_token_less)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: tour.main([]))
    printed = capsys.readouterr()
    assert ended.value.code == 1 and "stop 1 of 10" in printed.out and "stop 2 of 10" not in printed.out
    assert printed.err.startswith("error: stop 2: the supervised ids decode to the row's output: by hand credits")
    assert printed.err.count("\n") == 1


def test_equal_means_equal_up_to_rounding():
    assert notebook.agree("x", 0.1 + 0.2, 0.3) == "  x: by hand 0.30000, by code 0.30000"
    assert notebook.agree("x", [1], [1]) == "  checked: x"
    for by_hand, by_code in ((1.0, 1.0001), (0.0, math.nan), ([1], [2]), ("a", "b"), (3, 4)):
        with pytest.raises(notebook.DisagreementError, match="x: by hand .*, by code "):
            notebook.agree("x", by_hand, by_code)


# ---- flags ----


def test_one_stop_is_that_stop(stops, capsys):
    tour.main(["--stop", "3"])
    assert capsys.readouterr().out == f"── stop 3 of 10: {stops[2]}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stop", "11"], "--stop: invalid choice: 11"),
        (["--stop", "0"], "--stop: invalid choice: 0"),
        (["--stop", "two"], "--stop: invalid int value: 'two'"),
        (["--pause"], "--pause: standard input is not a terminal"),
        (["--html", ""], "--html '': expected a file's name"),
        (["--html", "nowhere/tour.html"], "--html nowhere/tour.html: expected a file name in an existing directory"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert mistake(tour.main, flags, capsys).startswith(message)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def a_stop(self):
    """Say something."""
    yield "Said."


def test_pause_waits_for_enter_between_stops(capsys, monkeypatch):
    monkeypatch.setattr(notebook, "STOPS", [notebook.Stop(a_stop, (a_stop,))] * 3)
    for lines, shown in ((2, 3), (1, 2), (0, 1)):
        monkeypatch.setattr(sys, "stdin", Terminal("\n" * lines))
        notebook.show(None, None, pause=True)
        assert capsys.readouterr().out.count("Said.") == shown
        assert not sys.stdin.read()


def test_colour_on_terminals_only(monkeypatch):
    for no_color in ("", "1"):
        stream = Terminal()
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys, "stdout", stream)
        tour.main(["--stop", "2"])
        text = stream.getvalue()
        assert (marks.GREEN in text) == (not no_color)
        assert max(len(line) for line in re.sub("\x1b\\[\\d+m", "", text).split("\n")) == 80


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not the last one open."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_has_the_same_stops(stops, tmp_path, capsys):
    path = tmp_path / "tour.html"
    tour.main(["--html", str(path), "--stop", "2"])
    assert capsys.readouterr().out == f"{path}\n" and [*tmp_path.iterdir()] == [path]
    page, parser = path.read_text(encoding="utf-8"), Balanced()
    parser.feed(page)
    assert not parser.open and "\x1b" not in page
    assert not {"script", "link", "img"} & {*parser.seen} and "http" not in page
    assert "<h2>2. Turn text into tokens, ids and labels</h2>" in page and "minift/encode.py: encode_completion" in page
    assert page.count("<b>") == 12 + 1 and "<b>credits = [4, 13, 2]⟨&lt;/s&gt;⟩</b>" in page
    # The page's own backticks are code; those of the row stay.
    assert "The mask as <code>minift preview</code> shows it" in page and "called `credits`.↵" in page
