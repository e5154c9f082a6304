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
    "values": {
        "model": "data/model",
        "lr": 0.001,
        "lora_targets": ["q_proj", "v_proj"],
        "dropout": None,
        "data": "my<data>.jsonl",
    },
    "versions": {"torch": "9.8.7"},
    "fingerprints": {"weights": "abc123"},
    "command": "python train_sft.py --max-steps 2",
    "machine": "An <abacus>, 1 thread",
    "date": "2026-01-31",
    "results": {
        "eval_loss": {"before": 4.1256, "after": 0.75},
        "bleu": {"before": {"all": 1.5, "new": 2.5}, "after": {"all": 60.25, "new": 70.5}},
        "ties": {"before": 1234, "after": 0},
    },
}
RATES = {
    "pass_rate": {"before": {"all": 0.0, "new": 0.25}, "after": {"all": 0.5, "new": 0.75}},
    "pass_interval": {"before": {"all": [0.0, 0.1], "new": [0, 1]}, "after": {"all": [0.4, 0.65], "new": [0.3, 0.9]}},
    "checked": {"before": {"all": 2000, "new": 4}, "after": {"all": 2000, "new": 4}},
}
METRICS = [
    {"step": 0, "split": "eval", "loss": 4.125, "tokens": 0, "seconds": 0.0},
    {"step": 1, "split": "train", "loss": 4.0, "lr": 0.001, "grad_norm": 2.0, "tokens": 70, "seconds": 0.5},
    {"step": 2, "split": "train", "loss": 3.0, "lr": 0.0005, "grad_norm": 1.0, "tokens": 140, "seconds": 1.0},
    {"step": 2, "split": "eval", "loss": 0.75, "tokens": 1400, "seconds": 240.0},
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
PAIRS = [
    {"kind": kind, "prompt": kind, "chosen": "yes", "rejected": "no", "rewards_before": before, "rewards_after": after}
    for kind, before, after in (("p", [0, 1], [3, 1]), ("q", [1, 1], [-1, 1]))
]


class Page(HTMLParser):
    """The tags, table cells and texts that a browser sees; asserts that tags nest correctly."""

    VOID = {"meta", "br", "wbr"}

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
        if "pre" in self.open:
            self.pres[-1] += data

    def paths(self, css_class: str) -> list[str]:
        return [a["d"] for tag, a in self.tags if tag == "path" and a.get("class") == css_class]


def html_of(folder: Path, record=RECORD, metrics=METRICS, samples=SAMPLES, seen=None) -> str:
    path = write_report(folder, record, metrics, samples, seen or {})
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def page_of(folder: Path, **data) -> Page:
    return Page(html_of(folder, **data))


def test_results_are_rows_with_before_and_after_as_columns(tmp_path):
    cells = page_of(tmp_path).cells
    assert ["", "before", "after"] in cells
    assert ["held-out loss", "4.13", "0.75"] in cells  # three digits
    assert ["BLEU", "1.5", "60.2"] in cells and ["BLEU · new", "2.5", "70.5"] in cells
    assert ["ties", "1,234", "0"] in cells
    flat = page_of(tmp_path, record=RECORD | {"results": {"brier": 0.125}}).cells
    assert ["", ""] in flat and ["Brier score", "0.125"] in flat


def test_the_verdict_comes_first(tmp_path):
    html = html_of(tmp_path)
    title = "Instruction tuning: BLEU 1.5\u00a0→\u00a060.2, held-out loss 4.13\u00a0→\u00a00.75"
    assert f"<title>{title}</title>" in html
    head = re.sub("<[^>]+>", "", html[html.index("<h1>") : html.index("<h2>")])
    facts = "2 steps 1,400 tokens 4.0 min of training An &lt;abacus&gt;, 1 thread 2026-01-31"
    about = f"{tmp_path.name}: data/model trained on my&lt;data&gt;.jsonl"
    assert head.split("\n") == [title, f"{about}{facts}python train_sft.py --max-steps 2", ""]
    with_rates = html_of(tmp_path, RECORD | {"results": RECORD["results"] | RATES})
    assert "<h1>Instruction tuning: pass rate 0.0%\u00a0→\u00a050.0%, BLEU 1.5\u00a0→\u00a060.2</h1>" in with_rates


@pytest.mark.parametrize(
    "seconds, shown", [(0.4, "0 s"), (119.4, "119 s"), (120, "2.0 min"), (7199, "120.0 min"), (9000, "2.5 h")]
)
def test_the_time_has_a_suitable_unit(tmp_path, seconds, shown):
    html = html_of(tmp_path, metrics=[METRICS[0] | {"seconds": seconds}])
    assert f"<span>{shown} of training</span>" in html


def test_a_run_of_an_earlier_version_or_without_results_has_a_verdict_too(tmp_path):
    record = {"task": "rm", "values": {"model": "m", "data": "d"}}
    html = html_of(tmp_path, record, metrics=[], samples=[])
    assert "<h1>Reward model: not finished</h1>" in html and "m trained on d" in html and "<pre" not in html
    assert "<h1>Reward model: nothing held out</h1>" in html_of(tmp_path, record | {"results": {}})
    record = {"values": {"data": "a/<b>"}, "command": "x --out=y/z"}  # broken after slashes, and between words
    html = html_of(tmp_path, record, metrics=[], samples=[])
    assert "<span>x</span> <span>--out=y/<wbr>z</span>" in html and "<td>a/<wbr>&lt;b&gt;</td>" in html


def test_rates_by_category_are_bars_with_intervals(tmp_path):
    html = html_of(tmp_path, RECORD | {"results": RECORD["results"] | RATES})
    cells = Page(html).cells
    assert ["pass rate", "0.0%", "50.0%"] in cells and not any("checked" in row[0] or row[0] == "new" for row in cells)
    assert not any(row[0].startswith(("pass interval", "pass rate ·")) for row in cells)
    bars = [a["style"] for tag, a in Page(html).tags if tag == "i"]
    assert bars == [
        *("left:0.0%;width:50.0%", "left:40.0%;width:25.0%", "left:0.0%;width:0.0%"),
        *("left:0.0%;width:75.0%", "left:30.0%;width:60.0%", "left:25.0%;width:0.0%"),
    ]
    assert "<span>50.0% of 2,000</span>" in html and "<span>75.0% of 4</span>" in html
    older = {key: value for key, value in RATES.items() if key != "pass_interval"}  # without intervals
    assert ["pass rate · new", "25.0%", "75.0%"] in page_of(tmp_path, record=RECORD | {"results": older}).cells


def test_a_category_may_be_called_before_or_after(tmp_path):
    scores = {"all": 1.5, "before": 2.5, "after": 3.5}
    cells = page_of(tmp_path, record=RECORD | {"results": {"bleu": {"before": scores, "after": scores}}}).cells
    for category, score in scores.items():
        assert [f"BLEU · {category}".removesuffix(" · all"), f"{score}", f"{score}"] in cells


def test_values_versions_and_fingerprints_are_shown(tmp_path):
    cells = page_of(tmp_path).cells
    for row in (["lr", "0.001"], ["lora_targets", "q_proj, v_proj"], ["dropout", "none"], ["data", "my<data>.jsonl"]):
        assert row in cells
    assert ["torch", "9.8.7"] in cells and ["weights", "abc123"] in cells


def test_samples_are_shown_unchanged_and_cannot_break_out(tmp_path):
    page = page_of(tmp_path)
    assert page.pres[1:] == [
        *("Say <b>hi</b> & go", "hi\u2028!", "hi", "</pre><script>"),
        *("Again", "same", " same\n", "other"),
    ]
    assert "script" not in {tag for tag, _ in page.tags}
    assert sum(a.get("class") == "good" for _, a in page.tags) == 1  # the second answer is its reference


def test_answers_that_pass_are_marked(tmp_path):
    html = html_of(tmp_path, samples=[SAMPLES[0] | {"passed": {"before": False, "after": True}}, SAMPLES[1]])
    assert html.count("✗ fails") == html.count("✓ passes") == 1
    assert 'before · BLEU 0 <span class="bad">✗ fails' in html and 'after · BLEU 37 <span class="good">✓ passes' in html


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
    assert labels == ["loss", "learning rate", "gradient norm"]
    # loss: steps 0 … 2, ticks 0 … 5; the plot is 416 wide from x = 54, and 212 high down to y = 236.
    dots = [(a["cx"], a["cy"]) for tag, a in page.tags if tag == "circle" and a["class"] == "eval"]
    assert dots == [("54.0", f"{236 - 212 * 4.125 / 5:.1f}"), ("470.0", f"{236 - 212 * 0.75 / 5:.1f}")]
    assert page.paths("smooth")[0] == "M262.0 66.4L470.0 108.8"  # two points are too few to smooth
    assert page.paths("train") == page.paths("eval") == []  # no line between evaluations


def test_the_best_checkpoint_is_the_lowest_held_out_loss_after_a_step(tmp_path):
    later = [
        {"step": step, "split": "eval", "loss": loss} for step, loss in ((0, 0.1), (4, 0.6), (1006, 0.5), (1008, 0.7))
    ]
    html = html_of(tmp_path, metrics=[*later, METRICS[1]])
    rings = [a for tag, a in Page(html).tags if tag == "circle" and a["class"] == "best"]
    dots = [a for tag, a in Page(html).tags if tag == "circle" and a["class"] == "eval"]
    assert len(rings) == 1 and len(dots) == 4 and (rings[0]["cx"], rings[0]["cy"]) == (dots[2]["cx"], dots[2]["cy"])
    assert "best checkpoint: 0.5 at step 1,006<" in html
    assert '"best"' not in html_of(tmp_path, metrics=METRICS[:2])  # no evaluation after a step


def test_axes_have_names_and_units_and_other_charts_are_smaller(tmp_path):
    metrics = [line | {"supervised_tokens": 3} for line in METRICS]
    html = html_of(tmp_path, metrics=metrics)
    for name in ("nats per supervised token", "step size of AdamW", "norm before clipping"):
        assert html.count(f">{name}</text>") == 1
    assert html.count(">optimiser step</text>") == 3
    assert [a["viewbox"] for tag, a in Page(html).tags if tag == "svg"] == ["0 0 480 270", *["0 0 240 150"] * 2]
    assert ">nats per pair</text>" in html_of(tmp_path, metrics=[line | {"pairs": 3} for line in METRICS])


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
    assert page.paths("smooth")[1].startswith("M54.0 116.0L")


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
    assert labels == ["loss", "learning rate", "gradient norm", "accuracy"]


def test_the_run_of_a_reward_model_is_shown_too(tmp_path):
    samples = [{"prompt": "p", "chosen": "good", "rejected": "bad", "score_chosen": 1.25, "score_rejected": -0.5}]
    record = {"task": "rm", "results": {"accuracy": {"before": {"all": 0.5}, "after": {"all": 0.75}}}}
    html = html_of(tmp_path, record, samples=samples)
    page = Page(html)
    assert page.pres == ["p", "good", "bad"]
    assert "score chosen: 1.25 · score rejected: -0.5" in html
    assert "<h1>Reward model: held-out accuracy 50.0%\u00a0→\u00a075.0%</h1>" in html


def test_the_worst_samples_come_first(tmp_path):
    answers = [("a b c d", True), ("a b c d", False), ("a b x y", False), ("a b x z", True), ("b", None)]
    samples = [
        {"kind": f"k{index}", "prompt": "p", "reference": "a b c d", "after": answer}
        | ({"passed": {"after": passed}} if passed is not None else {})
        for index, (answer, passed) in enumerate(answers)
    ]
    html = html_of(tmp_path, samples=samples)
    assert re.findall("<article><p>(k.)</p>", html) == ["k2", "k1", "k4", "k3", "k0"]
    assert "5 in samples.jsonl, worst first: 2 fail their checks;" in html
    assert 'after · BLEU 100 <span class="good">= reference</span>' in html


def test_pairs_that_are_ranked_wrongly_come_first_with_their_probability(tmp_path):
    html = html_of(tmp_path, {"task": "rm"}, samples=PAIRS)
    assert Page(html).pres == ["q", "yes", "no", "p", "yes", "no"]
    first, second = re.findall("<article><p>(.*?)</p>", html)
    assert first == (
        'probability of chosen 11.9% <span class="bad">✗ ranked wrongly</span> · q · rewards before: 1, 1 · '
        "rewards after: -1, 1"
    )
    assert second.startswith("probability of chosen 88.1% · p")
    assert "2 in samples.jsonl, worst first: 1 ranked wrongly;" in html


def test_words_that_differ_are_marked_in_both_texts(tmp_path):
    samples = [{"reference": "return (a + b)", "after": "return  (a - <c>)", "before": "x"}]
    html = html_of(tmp_path, samples=samples)
    assert "<pre>return<del> </del>(a <del>+</del> <del>b</del>)</pre>" in html
    assert "<pre>return<ins>  </ins>(a <ins>-</ins> <ins>&lt;c&gt;</ins>)</pre>" in html
    html = html_of(tmp_path, samples=[{"chosen": "+= 1", "rejected": "-= 1"}])
    assert "<pre><del>+</del>= 1</pre>" in html and "<pre><ins>-</ins>= 1</pre>" in html
    long = "a " * 1001  # 2,002 words and blanks: not compared
    assert "<del>a" not in html_of(tmp_path, samples=[{"reference": long, "after": "b"}])


def test_the_answer_before_is_short_and_repeated_lines_are_counted(tmp_path):
    lines = "\n".join(map(str, range(40)))
    samples = [{"reference": "r\nr\nr", "after": "#\n" * 50, "before": lines}, {"before": "word " * 300}]
    first, second = (page_of(tmp_path, samples=[sample]).pres[1:] for sample in samples)
    assert first == ["r\nr\nr", "#\n… 50 such lines\n", "\n".join(map(str, range(12))) + " …"]
    assert second == [("word " * 180) + " …"]


def test_many_samples_are_folded_away(tmp_path):
    html = html_of(tmp_path, samples=SAMPLES * 10)
    visible, folded, _ = html.split("<details>")
    assert (visible.count("<article>"), folded.count("<article>")) == (8, 12)
    assert "the next 12" in folded


def test_only_the_worst_of_thousands_are_shown(tmp_path):
    html = html_of(tmp_path, samples=SAMPLES * 300)
    assert html.count("<article>") == 500 and "600 in samples.jsonl" in html and "the next 492" in html


def test_one_row_is_shown_as_the_loss_sees_it(tmp_path):
    row = {"name": "row", "tokens": ["⟨</s>⟩", "a<\n", " b\n  ", "⟨</s>⟩"], "values": [None, None, math.log(2), 0.0]}
    html = html_of(tmp_path, seen={"rows": [row]})
    assert (
        '<pre class="tokens"><span class="grey">⟨&lt;/s&gt;⟩</span><span class="grey">a&lt;↵\n</span>'
        '<span class="token" style="--heat:35%"> b↵<small>0.69</small></span>\n  '
        '<span class="token" style="--heat:0%">⟨&lt;/s&gt;⟩<small>0.00</small></span></pre>'
    ) in html
    assert "The row's loss is the mean, 0.693 / 2 = 0.347." in html
    assert "One row as the loss sees it" in html and "as the loss sees" not in html_of(tmp_path)


def test_a_pair_is_shown_as_the_loss_sees_it(tmp_path):
    rows = [
        {"name": "chosen", "tokens": ["p", " yes", "⟨e⟩"], "values": [None, None, 1.5]},
        {"name": "rejected", "tokens": ["p", "⟨e⟩"], "values": [None, -0.5]},
    ]
    html = html_of(tmp_path, seen={"rows": rows})
    shared, end = '<span class="grey">p</span>', '<span class="token">⟨e⟩<small>{}</small></span></pre>'
    assert f'<h3>chosen</h3><pre class="tokens">{shared} yes{end.format("1.50")}' in html
    assert f'<h3>rejected</h3><pre class="tokens">{shared}{end.format("-0.50")}' in html
    assert (
        "is 2 higher than that of the second" in html and "σ(2) = 0.881, and the loss is −log of this, 0.127." in html
    )


def test_rewards_are_histograms_and_a_reliability_diagram(tmp_path):
    html = html_of(tmp_path, {"task": "rm"}, metrics=[], samples=PAIRS)
    page = Page(html)
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    assert labels == ["rewards before training", "rewards after training", "reliability: accuracy over confidence"]
    # Rewards from -1 to 3 in 24 bins on a plot 236 wide from x = 54; two responses high, down to y = 236.
    bars = [(a["class"], a["x"], a["height"]) for tag, a in page.tags if tag == "rect"]
    x = {reward: f"{54 + 236 * bucket / 24:.1f}" for reward, bucket in ((-1, 0), (0, 6), (1, 12), (3, 23))}
    assert bars == [
        *(("chosen", x[0], "106.0"), ("chosen", x[1], "106.0"), ("rejected", x[1], "212.0")),
        *(("chosen", x[-1], "106.0"), ("chosen", x[3], "106.0"), ("rejected", x[1], "212.0")),
    ]
    # Before: differences -1 and 0, both wrong, in two bins; after: 2 and -2 in one bin, half of them right.
    dots = [(a["class"], a["cx"], a["cy"]) for tag, a in page.tags if tag == "circle"]
    x = {difference: f"{54 + 236 * (1 / (1 + math.exp(-difference)) - 0.5) / 0.5:.1f}" for difference in (0, 1, 2)}
    assert dots == [("before", x[0], "236.0"), ("before", x[1], "236.0"), ("after", x[2], "130.0")]
    assert "<title>2 pairs: confidence 88%, accuracy 50%</title>" in html


@pytest.mark.parametrize(
    "kind, shown", [(5, "kind: 5"), (["a", 2], "kind: a, 2"), ({}, ""), (None, ""), (True, "True")]
)
def test_a_kind_need_not_be_text(tmp_path, kind, shown):
    assert shown in html_of(tmp_path, {"task": "rm"}, samples=[PAIRS[0] | {"kind": kind}])


def test_equal_rewards_are_drawn(tmp_path):
    equal = [pair | {"rewards_before": [2, 2], "rewards_after": [2.0, 2.0]} for pair in PAIRS]
    html = html_of(tmp_path, {"task": "rm"}, samples=equal)
    assert not re.search(r"nan|\binf\b", html)
    assert "worst first: 2 ranked wrongly;" in html and html.count("✗ ranked wrongly") == 2  # a tie is wrong


@pytest.mark.parametrize(
    "data",
    [
        {"record": {"results": []}},
        {"record": {"results": {"bleu": 7}}},
        {"record": {"values": {"model": 7}}},
        {"record": {"command": 7}},
        {"samples": [{"passed": "no", "after": "x"}]},
        {"samples": [{"rewards_after": ["a", "b"], "rewards_before": [1, 2]}]},
        {"seen": {"rows": [{"tokens": ["a"], "values": []}]}},
    ],
)
def test_values_that_a_run_does_not_write_are_refused(tmp_path, data):
    with pytest.raises(UserError, match="value of the wrong type .* expected the files that a run wrote"):
        html_of(tmp_path, **data)
    assert [*tmp_path.iterdir()] == []


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
        ("row.json", "{", "row.json:1:2: malformed JSON"),
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
