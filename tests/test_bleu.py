"""Tests of BLEU against sacreBLEU and against hand calculations, and of the command from file to JSON."""

import itertools
import json
import logging
import math
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import sacrebleu.metrics
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_intl import TokenizerV14International

from minift.bleu import SMOOTHING_DEFAULTS, corpus_bleu, sentence_bleu
from minift.commands.bleu import main
from minift.words import TOKENIZERS, words
from tests.compare.bleu import compare_scores, random_corpus
from tests.runs import mistake

# Characters that the running Python's Unicode doesn't know are left out: sacreBLEU uses the `regex` package, which may
# have a newer Unicode.
ASSIGNED = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) != "Cn"]
MARKS = [character for character in ASSIGNED if unicodedata.category(character)[0] in "PSN"]
SPACES = [character for character in ASSIGNED if character.isspace()]
# Strings that some tokeniser treats specially, besides those of tests/compare/bleu.py.
TRICKY = "&amp;amp;quot; <skip<skipped>ped> a...5 ` $ １ return( the The a a a b b c".split()
TRICKY += ["-\r\n", "\r", "\x85"]


def random_word(rng: random.Random) -> str:
    alphabet = rng.choice(["".join(map(chr, range(128))), "0123456789.,-ab", MARKS, SPACES, ASSIGNED])
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 4)))


@pytest.mark.parametrize("tokenize", TOKENIZERS)
@pytest.mark.parametrize("smooth_method", SMOOTHING_DEFAULTS)
def test_equals_sacrebleu_on_random_corpora(tokenize, smooth_method):
    """Compare 100 corpora each time, with words and values of options that `make compare` does not use."""
    rng = random.Random(f"{tokenize} {smooth_method}")
    words = [*TRICKY, *(random_word(rng) for _ in range(200))]
    settings = itertools.product([False, True], [False, True], [None, None, 0, 0.25, 2], [4, 4, 4, 1, 6])
    corpora = []
    for lowercase, effective_order, smooth_value, max_ngram_order in settings:
        chosen = {"tokenize": tokenize, "smooth_method": smooth_method, "smooth_value": smooth_value}
        chosen |= {"lowercase": lowercase, "use_effective_order": effective_order, "max_ngram_order": max_ngram_order}
        hypotheses, references = random_corpus(rng, words)
        corpora.append((chosen, [rng.choice([text, text.upper()]) for text in hypotheses], references))

    assert [check for check in compare_scores("random corpora", corpora) if not check.agrees] == []
    scores = [corpus_bleu(hypotheses, references, **chosen).score for chosen, hypotheses, references in corpora]
    assert 20 < sum(score > 0 for score in scores) < 97  # both sorts occurred


def test_defaults_are_sacrebleus():
    hypotheses, references = ["The cat sat.", "a b"], [["The cat sat!", "a b"], ["A cat sat.", "a c"]]
    theirs = sacrebleu.corpus_bleu(hypotheses, references)
    ours = corpus_bleu(hypotheses, references)
    assert ours.score == theirs.score > 0
    assert ours.signature == f"nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert sentence_bleu("a b", ["a b"]).score == sacrebleu.sentence_bleu("a b", ["a b"]).score == pytest.approx(100)
    assert "|eff:yes|" in sentence_bleu("a b", ["a b"]).signature


@pytest.mark.parametrize("template", ["a{0}1{0}b", "5{0} {0}5{0}", "x{0}{0}1"])
def test_every_character_is_split_as_sacrebleu_splits_it(template):
    """Put each character between letters, digits and itself; of ideographs and private use, every fiftieth."""
    similar = {"Lo", "Co"}
    characters = [c for number, c in enumerate(ASSIGNED) if number % 50 == 0 or unicodedata.category(c) not in similar]
    for start in range(0, len(characters), 5000):
        text = " q ".join(template.format(character) for character in characters[start : start + 5000])
        assert words(text, "13a") == Tokenizer13a()(text.rstrip()).split()
        assert words(text, "intl") == TokenizerV14International()(text.rstrip()).split()


@pytest.mark.parametrize(
    "text, tokenize, expected",
    [
        ("It's 3.5, no? <b>_x_", "13a", ["It's", "3.5", ",", "no", "?", "<", "b", ">", "_", "x", "_"]),
        ("well-\nknown 1-2 x-y", "13a", ["wellknown", "1", "-", "2", "x-y"]),
        ("trailing-\n", "13a", ["trailing-"]),
        ("&quot;&amp;lt;&quot; <skipped>end.", "13a", ['"', "<", '"', "end", "."]),
        ("1,000.5€ in 1999.", "intl", ["1,000.5", "€", "in", "1999."]),
        ("日本，語", "intl", ["日本", "，", "語"]),
        (" a b\u3000c\n", "char", ["a", "b", "c"]),
        ("don't. split\u2028me", "none", ["don't.", "split", "me"]),
    ],
)
def test_tokens_by_hand(text, tokenize, expected):
    assert words(text, tokenize) == expected


def test_no_four_gram_scores_zero_against_itself():
    """Score a corpus of short segments 0 unless the effective order is used, as sacreBLEU does."""
    assert corpus_bleu(["a b c"], [["a b c"]]).score == 0.0
    assert corpus_bleu(["a b c"], [["a b c"]], use_effective_order=True).score == pytest.approx(100)
    assert corpus_bleu(["a b c", "a b c d"], [["a b c", "a b c d"]]).score == pytest.approx(100)


def test_precisions_and_counts_by_hand():
    """Clip counts: "the" occurs seven times, and twice in the first reference (Papineni et al., section 2.1)."""
    hypothesis = "the the the the the the the"
    references = ["the cat is on the mat", "there is a cat on the mat"]
    bleu = sentence_bleu(hypothesis, references, smooth_method="none")
    assert (bleu.counts, bleu.totals) == ([2, 0, 0, 0], [7, 6, 5, 4])
    assert bleu.precisions == pytest.approx([100 * 2 / 7, 0, 0, 0])
    assert (bleu.score, bleu.bp, bleu.sys_len, bleu.ref_len) == (0.0, 1.0, 7, 7)

    # The k-th n without a match counts 1 / 2**k of a match.
    bleu = sentence_bleu(hypothesis, references, smooth_method="exp")
    assert bleu.precisions == pytest.approx([100 * 2 / 7, 100 / (2 * 6), 100 / (4 * 5), 100 / (8 * 4)])
    assert bleu.score == pytest.approx(math.prod(bleu.precisions) ** 0.25)
    floor = sentence_bleu(hypothesis, references, smooth_method="floor", smooth_value=0.5)
    assert floor.precisions == pytest.approx([100 * 2 / 7, 50 / 6, 50 / 5, 50 / 4])
    assert "|smooth:floor[0.50]|" in floor.signature
    add_k = sentence_bleu(hypothesis, references, smooth_method="add-k")
    assert add_k.precisions == pytest.approx([100 * 2 / 7, 100 / 7, 100 / 6, 100 / 5])
    assert "|smooth:add-k[1.00]|" in add_k.signature


def test_brevity_penalty_by_hand():
    bleu = corpus_bleu(["a b c d"], [["a b c d e f g"]])
    assert bleu.bp == pytest.approx(math.exp(1 - 7 / 4))
    assert bleu.score == pytest.approx(100 * math.exp(1 - 7 / 4))
    assert corpus_bleu(["a b c d e"], [["a b c d"]]).bp == 1.0
    # Lengths 3 and 5 are equally close to 4: the shorter counts. 6 is closer to 7 than 3 is, in either order.
    assert sentence_bleu("a b c d", ["a b c d e", "a b c"]).ref_len == 3
    assert sentence_bleu("a b c d e f g", ["a b c", "a b c d e f"]).ref_len == 6


def test_empty_hypotheses_and_references():
    for hypothesis, references, bp in [("", ["a b"], 0.0), ("", [""], 1.0), (" \n", ["a"], 0.0), ("a", [""], 1.0)]:
        bleu = sentence_bleu(hypothesis, references)
        assert (bleu.score, bleu.bp, bleu.precisions) == (0.0, bp, [0.0] * 4)


def test_gaps_in_the_references_show_in_the_signature():
    streams = [["a b c d", "a b c d"], ["x", None]]
    assert corpus_bleu(["a b c d", "a b c d"], streams).signature.startswith("nrefs:var|")
    assert sentence_bleu("a b c d", ["a b c d", None]).signature.startswith("nrefs:1|")


def test_warns_of_text_already_split(caplog):
    lines = ["a b ."] * 100
    with caplog.at_level(logging.WARNING):
        corpus_bleu(lines[:99], [lines[:99]])
        corpus_bleu(lines, [lines], force=True)
        assert not caplog.records
        corpus_bleu(lines, [lines])
        assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "hypotheses, references, settings, error, message",
    [
        ([], [[]], {}, ValueError, "at least one hypothesis"),
        (["a"], [], {}, ValueError, "at least one"),
        (["a", "b"], [["a", "b"], ["a"]], {}, ValueError, r"references\[1\] has 1 segments, hypotheses 2"),
        (["a"], [["a", "b"]], {}, ValueError, r"references\[0\] has 2 segments"),
        (["a", "b"], [["a", None], ["b", None]], {}, ValueError, "segment 1 has no reference"),
        ("ab", [["a", "b"]], {}, TypeError, "found one string"),
        (["a", "b"], ["ab"], {}, TypeError, "found one string"),
        ([None], [["a"]], {}, TypeError, "segment 0"),
        (["a"], [[1]], {}, TypeError, "segment 0"),
        (["a"], [["a"]], {"smooth_method": "laplace"}, ValueError, "smooth_method"),
        (["a"], [["a"]], {"tokenize": "zh"}, ValueError, "tokenize"),
        (["a"], [["a"]], {"smooth_value": -0.1}, ValueError, "smooth_value"),
        (["a"], [["a"]], {"smooth_value": math.nan}, ValueError, "smooth_value"),
        (["a"], [["a"]], {"max_ngram_order": 0}, ValueError, "max_ngram_order"),
    ],
)
def test_refuses_what_is_not_a_corpus(hypotheses, references, settings, error, message):
    with pytest.raises(error, match=message):
        corpus_bleu(hypotheses, references, **settings)


def test_refuses_a_string_for_the_references_of_a_sentence():
    with pytest.raises(TypeError, match="one string"):
        sentence_bleu("a b", "a b")


def test_never_imports_torch():
    code = "import minift.commands.bleu, sys; assert not {'torch', 'numpy', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def run_bleu(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "minift", "bleu", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def test_command_says_that_a_text_is_too_short(tmp_path):
    texts = write(tmp_path / "texts.txt", "yes\nno\nperhaps\n")
    for flags, is_said in (([], True), (["--effective-order"], False), (["--sentence-level"], False)):
        done = run_bleu(texts, texts, *flags)
        assert done.returncode == 0 and (done.stderr.startswith("too few words: ") if is_said else not done.stderr)


def test_command_prints_what_sacrebleu_prints(tmp_path):
    """Read lines with what `str.splitlines` would split at; one ends with \\r\\n; one file has no last newline."""
    hypotheses = write(tmp_path / "hyp.txt", "the cat\u2028sat on the mat .\r\n\na b\x0cc d e\nvoilà 日本 x\n")
    first = write(tmp_path / "ref1.txt", "the cat sat on the mat.\n\na b c d\nvoilà 日本 y")
    second = write(tmp_path / "ref2.txt", "The cat sat on a mat .\nx\na b c d f\nvoilà 日 x\n")
    flags = ["--tokenize", "intl", "--smooth-method", "floor", "--smooth-value", "0.2", "--lowercase"]
    ours = run_bleu(hypotheses, first, second, *flags)
    assert (ours.returncode, ours.stderr) == (0, "")
    command = [sys.executable, "-m", "sacrebleu", first, second, "-i", hypotheses, "-f", "json", "-w", "12"]
    flags = ["-tok", "intl", "-s", "floor", "-sv", "0.2", "-lc"]
    theirs = subprocess.run([*map(str, command), *flags], capture_output=True, text=True, check=True)
    expected = json.loads(theirs.stdout)
    fields = json.loads(ours.stdout)
    assert fields["score"] == pytest.approx(expected["score"], rel=0, abs=1e-9) and fields["score"] > 0
    assert {name: fields[name] for name in expected} == expected | {"score": fields["score"]}
    assert list(fields)[: len(expected)] == list(expected)
    assert (fields["nrefs"], fields["sys_len"], len(fields["counts"])) == ("2", 15, 4)


def test_command_at_the_sentence_level(tmp_path):
    hypotheses = write(tmp_path / "hyp.txt", "a b c\nx\n")
    references = write(tmp_path / "ref.txt", "a b c\ny\n")
    lines = run_bleu(hypotheses, references, "--sentence-level").stdout.splitlines()
    assert [json.loads(line)["score"] for line in lines] == pytest.approx([100, 0])
    assert json.loads(lines[0])["eff"] == "yes"
    assert json.loads(run_bleu(hypotheses, "--effective-order", references).stdout)["eff"] == "yes"


def test_command_reads_jsonl(tmp_path):
    """Read texts with newlines, one reference or several, blank lines and a byte order mark.

    The default fields are those of instructions that `minift generate` has completed.
    """
    rows = [
        {"completion": "def f(x):\n    return x + 1", "output": "def f(x):\n    return x + 1"},
        {"completion": "a b c d e", "output": ["a b c d f", "a b c d e f"]},
    ]
    file = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    fields = json.loads(run_bleu("--jsonl", file).stdout)
    streams = [[rows[0]["output"], "a b c d f"], [None, "a b c d e f"]]
    assert fields["score"] == pytest.approx(sacrebleu.corpus_bleu([row["completion"] for row in rows], streams).score)
    assert fields["nrefs"] == "var"

    renamed = [{"h": row["completion"], "r": row["output"]} for row in rows]
    file = write(tmp_path / "renamed.jsonl", "\ufeff" + "\n \n".join(map(json.dumps, renamed)))
    again = json.loads(run_bleu("--jsonl", file, "--hypothesis-field", "h", "--reference-field", "r").stdout)
    assert again == fields


GOOD = '{"completion": "a", "output": "a"}\n'


def test_the_reference_is_not_the_hypothesis(tmp_path, capsys):
    """Refuse one field as both: `generate` once replaced a row's "completion", and the BLEU of it was 100."""
    file = str(write(tmp_path / "rows.jsonl", GOOD))
    for flag, field in (("--reference-field", "completion"), ("--hypothesis-field", "output")):
        message = mistake(main, ["--jsonl", file, flag, field], capsys)
        assert message.startswith(f"--reference-field {field}: it is")


@pytest.mark.parametrize(
    "content, names",
    [
        (GOOD + "{'completion'\n", ":2:"),
        ("\n" + GOOD + "{}{}\n", ":3:3: malformed JSON: Extra data; expected one JSON object"),
        (" \n\n", ": no rows in it"),
        (GOOD + "[" * 100_000 + "\n", ":2:"),
        (GOOD + '["a", "b"]\n', ":2: expected a JSON object"),
        (GOOD * 2 + '{"output": "a"}\n', ":3: no field 'completion'; name another with --hypothesis-field"),
        ('{"completion": "a"}\n', ":1: no field 'output'; name another with --reference-field"),
        ('{"completion": 1, "output": "a"}\n', ":1: field 'completion' must be a string"),
        ('{"completion": "a", "output": null}\n', ":1: field 'output' must be a string or a list"),
        ('{"completion": "a", "output": []}\n', ":1: field 'output' must be a string or a list"),
        ('{"completion": "a", "output": ["a", 2]}\n', ":1: field 'output' must be a string or a list"),
        (GOOD.encode() + b'{"completion": "\xff"}\n', ":2: not UTF-8 text"),
        ("", ": no rows in it"),
    ],
)
def test_command_names_the_line_of_a_bad_row(tmp_path, capsys, content, names):
    file = write(tmp_path / "rows.jsonl", content)
    assert mistake(main, ["--jsonl", str(file)], capsys).startswith(f"{file}{names}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["good", "absent"], "absent: no such file"),
        (["good", "."], ".: a directory"),
        (["good", "good/more"], "good/more: no such file"),
        (["good", "longer"], "longer has 3 lines, good has 2"),
        (["good", "good", "longer"], "longer has 3 lines, good has 2"),
        (["empty", "good"], "empty: empty"),
        (["good", "latin1"], "latin1:2: not UTF-8 text"),
        (["good"], "expected HYP REF"),
        ([], "expected HYP REF"),
        (["--jsonl", "rows", "good"], "--jsonl rows: expected no other file, got good"),
        (["good", "good", "--smooth-value", "-1"], "--smooth-value -1.0: expected"),
        (["good", "good", "--smooth-value", "nan"], "--smooth-value nan: expected"),
        (["good", "good", "--smooth-value", "x"], "--smooth-value: invalid float value: 'x'"),
        (["good", "good", "--smooth-method", "x"], "--smooth-method: invalid choice: 'x'"),
        (["good", "good", "--tokenize", "zh"], "--tokenize: invalid choice: 'zh'"),
        (["good", "good", "--lower"], "unrecognized arguments: --lower"),
    ],
)
def test_command_refuses_bad_files_and_flags(tmp_path, monkeypatch, capsys, arguments, message):
    write(tmp_path / "good", "a\nb\n")
    write(tmp_path / "longer", "a\nb\n\n")
    write(tmp_path / "empty", "")
    write(tmp_path / "latin1", "a\nvoilà\n".encode("latin-1"))
    write(tmp_path / "rows", GOOD)
    monkeypatch.chdir(tmp_path)
    assert mistake(main, arguments, capsys).startswith(message)


def test_command_ends_with_one_line_and_status_two(tmp_path):
    result = run_bleu(tmp_path / "absent", tmp_path / "absent")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {tmp_path / 'absent'}: no such file")
    assert result.stderr.count("\n") == 1
