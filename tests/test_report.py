"""Tests of the report: it shows everything of a run, loads nothing else, and no text can break its HTML."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minift.commands.report import main
from minift.errors import UserError
from minift.run.charts import smoothed, thinned, ticks
from minift.run.report import write_report

RECORD = {
    "task": "sft",
    "values": {"lr": 0.001, "lora_targets": ["q_proj", "v_proj"], "dropout": None, "data": "my<data>.jsonl"},
    "versions": {"torch": "9.8.7"},
    "fingerprints": {"weights": "abc123"},
    "results": {
        "eval_loss": {"before": 4.125, "after": 0.75},
        "bleu": {"before": {"all": 1.5, "new": 2.5}, "after": {"all": 60.25, "new": 70.5}},
        "accuracy": 0.875,
    },
}
METRICS = [
    {"step": 0, "split": "eval", "loss": 4.125, "tokens": 0, "seconds": 0.0},
    {"step": 1, "split": "train", "loss": 4.0, "lr": 0.001, "grad_norm": 2.0, "tokens": 70, "seconds": 0.5},
    {"step": 2, "split": "train", "loss": 3.0, "lr": 0.0005, "grad_norm": 1.0, "tokens": 140, "seconds": 1.0},
    {"step": 2, "split": "eval", "loss": 0.75, "tokens": 140, "seconds": 1.0},
]
SAMPLES = [
    {
        "kind": "new",
        "prompt": "Say <b>hi</b> & go",
        "reference": "hi\u2028!",
        "before": "</pre><script>",
        "after": "hi",
    },
    {"kind": None, "prompt": "Again", "reference": "same", "before": "other", "after": " same\n"},
]


class Page(HTMLParser):
    """The tags, table cells and texts that a browser sees; asserts that tags nest correctly."""

    VOID = {"meta"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[list[str]] = []
        self.pres: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag == "pre":
            self.pres.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data
        if self.open and self.open[-1] == "pre":
            self.pres[-1] += data

    def paths(self, css_class: str) -> list[str]:
        return [a["d"] for tag, a in self.tags if tag == "path" and a.get("class") == css_class]


def html_of(folder: Path, record=RECORD, metrics=METRICS, samples=SAMPLES) -> str:
    path = write_report(folder, record, metrics, samples)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def page_of(folder: Path, **data) -> Page:
    return Page(html_of(folder, **data))


def test_results_are_rows_with_before_and_after_as_columns(tmp_path):
    cells = page_of(tmp_path).cells
    assert ["", "", "before", "after"] in cells
    assert ["eval loss", "", "4.125", "0.75"] in cells
    assert ["bleu · new", "", "2.5", "70.5"] in cells
    assert ["accuracy", "0.875", "", ""] in cells


def test_a_category_may_be_called_before_or_after(tmp_path):
    scores = {"all": 1.5, "before": 2.5, "after": 3.5}
    cells = page_of(tmp_path, record=RECORD | {"results": {"bleu": {"before": scores, "after": scores}}}).cells
    for category, score in scores.items():
        assert [f"bleu · {category}", f"{score}", f"{score}"] in cells


def test_values_versions_and_fingerprints_are_shown(tmp_path):
    cells = page_of(tmp_path).cells
    for row in (["lr", "0.001"], ["lora_targets", "q_proj, v_proj"], ["dropout", "none"], ["data", "my<data>.jsonl"]):
        assert row in cells
    assert ["torch", "9.8.7"] in cells and ["weights", "abc123"] in cells


def test_samples_are_shown_unchanged_and_cannot_break_out(tmp_path):
    page = page_of(tmp_path)
    assert page.pres == [
        *("Say <b>hi</b> & go", "hi\u2028!", "</pre><script>", "hi"),
        *("Again", "same", "other", " same\n"),
    ]
    assert "script" not in {tag for tag, _ in page.tags}
    assert sum(a.get("class") == "same" for _, a in page.tags) == 1  # the second answer is its reference


def test_answers_that_pass_are_marked(tmp_path):
    samples = [SAMPLES[0] | {"passed": {"before": False, "after": True}}, SAMPLES[1], {"passed": "no", "after": "x"}]
    html = html_of(tmp_path, samples=samples)
    assert "Before <span" not in html and html.count("✗ fails") == html.count("✓ passes") == 1
    assert 'before <span class="fails">✗ fails' in html and 'after <span class="same">✓ passes' in html


def test_every_text_is_escaped(tmp_path):
    nasty = "<script>'\"&</script>"
    record = {"task": nasty, nasty: {nasty: nasty}, "results": {nasty: {"after": nasty}}}
    metrics = [{"step": i, "split": "train", nasty: i} for i in (1, 2)]
    folder = tmp_path / "<script>"
    folder.mkdir()
    html = html_of(folder, record, metrics, [{"kind": nasty, nasty: nasty, "n": [nasty]}])
    assert "<script" not in html and "</script" not in html
    page = Page(html)
    assert nasty in page.pres and [nasty, nasty] in page.cells
    assert any(a.get("aria-label", "").startswith(nasty) for _, a in page.tags)


def test_the_page_loads_nothing_else(tmp_path):
    html = html_of(tmp_path)
    assert not re.search(r"https?:|src=|href=|url\(|@import", html)


def test_curves_are_drawn_at_their_values(tmp_path):
    page = page_of(tmp_path)
    labels = [a["aria-label"].split(" over")[0] for tag, a in page.tags if tag == "svg"]
    assert labels == ["loss", "lr", "grad norm"]
    # loss: steps 0 … 2, ticks 0 … 5; the plot is 564 wide from x = 64, and 200 high down to y = 212.
    assert page.paths("eval") == [f"M64.0 {212 - 200 * 4.125 / 5:.1f}L628.0 {212 - 200 * 0.75 / 5:.1f}"]
    assert page.paths("smooth")[0] == "M346.0 52.0L628.0 92.0"  # two points are too few to smooth
    assert page.paths("train") == []


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.75, 4.125, [0, 1, 2, 3, 4, 5]),
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.0, 2e-5, [0, 5e-6, 1e-5, 1.5e-5, 2e-5]),
        (-3.0, 140.0, [-50, 0, 50, 100, 150]),
        (7.0, 7.0, [2, 4, 6, 8, 10, 12]),
        (0.0, 0.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-7.0, -7.0, [-12, -10, -8, -6, -4, -2]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    assert ticks(low, high) == expected


@pytest.mark.parametrize("scale", [10.0**power for power in range(-12, 13, 3)])
def test_there_are_always_a_few_ticks(scale):
    for i in range(1, 200):
        found = ticks(-scale * (i % 7), scale * i / 3)
        assert 4 <= len(found) <= 9
        assert found[0] <= -scale * (i % 7) + 1e-6 * scale and found[-1] >= scale * i / 3 * (1 - 1e-6)


def test_smoothing_starts_at_the_first_value_and_averages():
    assert smoothed([(i, 3.0) for i in range(100)])[0] == (0, pytest.approx(3.0))
    zigzag = smoothed([(i, 1.0 + i % 2) for i in range(400)])
    assert all(value == pytest.approx(1.5, abs=0.05) for _, value in zigzag[100:])
    assert [step for step, _ in zigzag] == list(range(400))
    assert smoothed([(1, 2.0), (2, 3.0)]) == []


def test_the_learning_rate_is_not_smoothed(tmp_path):
    metrics = [{"step": i, "split": "train", "loss": 2.0 + i % 3, "lr": i / 200} for i in range(200)]
    page = page_of(tmp_path, metrics=metrics)
    assert (len(page.paths("train")), len(page.paths("smooth"))) == (1, 2)
    assert page.paths("smooth")[1].startswith("M64.0 212.0L")


def test_a_long_curve_keeps_its_peaks():
    points = [(float(i), 500.0 if i == 12345 else math.sin(i)) for i in range(39060)]
    drawn = thinned(points)
    assert len(drawn) <= 800 and (12345.0, 500.0) in drawn and drawn == sorted(drawn)
    assert thinned(points[:800]) == points[:800]


def test_values_that_are_not_finite_are_counted_not_drawn(tmp_path):
    metrics = [{"step": i, "split": "train", "loss": float(i), "grad_norm": math.inf} for i in range(3)]
    metrics[1]["loss"] = math.nan
    html = html_of(tmp_path, metrics=metrics)
    assert html.count("not drawn: 1)") == 1 and html.count("not drawn: 3)") == 1
    assert not re.search(r"nan|\binf\b", html)


@pytest.mark.parametrize("value", [1.7e308, -1.7e308, 1e100, 5e-324, 1e-310, 1e12, 1e17, 10**400])
def test_extreme_values_and_steps_are_drawn_or_counted(tmp_path, value):
    for first, second in ((0, value), (value, value), (value, -value)):
        metrics = [{"step": i, "split": "train", "loss": loss} for i, loss in enumerate((first, second))]
        assert len(page_of(tmp_path, metrics=metrics).tags) > 5
        metrics = [{"step": step, "split": "train", "loss": 1.0} for step in (first, second)]
        html = html_of(tmp_path, metrics=metrics)
        assert not re.search(r"nan|\binf\b", html)
        assert ("too large, so not drawn" in html) == (abs(value) > 1e100)


def test_lone_surrogates_and_deep_values(tmp_path):
    write_run(tmp_path)
    (tmp_path / "samples.jsonl").write_text('{"prompt": "\\ud800", "\\udfff": "é"}\n', encoding="utf-8")
    main([str(tmp_path)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<pre>\\ud800</pre>" in page and "<pre>é</pre>" in page
    (tmp_path / "run.json").write_text('{"values": {"a": ' + "[" * 900 + "]" * 900 + "}}")
    with pytest.raises(UserError, match="nested too deeply"):
        main([str(tmp_path)])


def test_other_metrics_get_curves_and_counters_do_not(tmp_path):
    metrics = [{**line, "accuracy": 0.5, "supervised_tokens": 3, "pairs": 2} for line in METRICS]
    page = page_of(tmp_path, metrics=metrics)
    labels = [a["aria-label"].split(" over")[0] for tag, a in page.tags if tag == "svg"]
    assert labels == ["loss", "lr", "grad norm", "accuracy"]


def test_the_run_of_a_reward_model_is_shown_too(tmp_path):
    samples = [{"prompt": "p", "chosen": "good", "rejected": "bad", "score_chosen": 1.25, "score_rejected": -0.5}]
    record = {"task": "rm", "results": {"accuracy": 0.75, "interval": [0.5, 0.875]}}
    html = html_of(tmp_path, record, samples=samples)
    page = Page(html)
    assert page.pres == ["p", "good", "bad"]
    assert "score chosen: 1.25 · score rejected: -0.5" in html
    assert ["interval", "0.5, 0.875"] in page.cells


def test_many_samples_are_folded_away(tmp_path):
    html = html_of(tmp_path, samples=SAMPLES * 10)
    visible, folded = html.split("<details>")
    assert (visible.count("<article>"), folded.count("<article>")) == (8, 12)
    assert "the other 12" in folded


def test_a_run_without_samples_results_or_metrics_yet(tmp_path):
    page = page_of(tmp_path, record={"values": {"lr": 1}}, metrics=[], samples=[])
    assert page.cells == [["lr", "1"]] and "svg" not in {tag for tag, _ in page.tags}
    assert "svg" in {tag for tag, _ in page_of(tmp_path, metrics=METRICS[:1]).tags}  # one evaluation


def test_an_error_while_writing_keeps_the_earlier_page(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "report.html").write_text("the earlier page")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        html_of(tmp_path)
    assert (tmp_path / "report.html").read_text() == "the earlier page"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


# ---- the command, which reads the run's folder ----


def write_run(folder: Path, metrics=METRICS) -> Path:
    (folder / "run.json").write_text(json.dumps(RECORD), encoding="utf-8")
    for name, rows in (("metrics", metrics), ("samples", SAMPLES)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "name, content, where",
    [
        ("run.json", None, "run.json: no such file"),
        ("run.json", "{", "run.json:1:2: malformed JSON"),
        ("run.json", "[1]", "run.json: expected a JSON object"),
        ("run.json", "[" * 200000, "run.json: malformed JSON"),
        ("run.json", b"\xff{}", "run.json:1: not UTF-8 text"),
        ("metrics.jsonl", None, "metrics.jsonl: no such file"),
        ("run.json", None, "run.json: no such file, expected the folder of a run, such as runs/sft"),
        ("metrics.jsonl", '{"step": 1, "split": "train"}\n{"step": 2, "sp', "metrics.jsonl:2:13: malformed JSON"),
        (
            "metrics.jsonl",
            '{"step": 1, "split": "eval"}\n{"step": "2", "split": "eval"}\n',
            "metrics.jsonl:2: expected a",
        ),
        ("metrics.jsonl", '{"step": 1, "split": "eval"}\n\n{"step": 2}\n', "metrics.jsonl:3: expected a number"),
        ("metrics.jsonl", '{"step": 1}\n', "metrics.jsonl:1: expected a number as `step` and train or eval"),
        ("samples.jsonl", '{"a": "b"}\n7\n', "samples.jsonl:2: expected a JSON object"),
    ],
)
def test_a_missing_or_damaged_file_is_named_and_nothing_is_written(tmp_path, name, content, where):
    write_run(tmp_path)
    (tmp_path / "report.html").write_text("the earlier page")
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(where)) as error:
        main([str(tmp_path)])
    assert "\n" not in str(error.value)
    assert (tmp_path / "report.html").read_text() == "the earlier page"


def test_the_command_shows_what_the_files_hold(tmp_path):
    metrics = [*METRICS, {"step": 3, "split": "train", "loss": math.nan, "lr": 0.0}]  # a run that diverged
    main([str(write_run(tmp_path, metrics))])
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html_of(tmp_path, metrics=metrics)
    (tmp_path / "samples.jsonl").unlink()
    main([str(tmp_path)])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html == html_of(tmp_path, metrics=metrics, samples=[])
    assert "not drawn: 1)" in html


def test_the_command_prints_one_line(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "minift", "report", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    good = run(write_run(tmp_path))
    assert (good.returncode, good.stdout) == (0, f"{tmp_path / 'report.html'}\n")
    for arguments in ([tmp_path / "nowhere"], [], [tmp_path, "--out"]):
        bad = run(*arguments)
        assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
        assert bad.stderr.startswith("error: ")
