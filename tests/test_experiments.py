"""`make experiments`: each mistake is the one that its line names, and a finished run is not repeated."""

import torch

from minift.beam import beam_search
from minift.encode import IGNORE_INDEX, Example, encode_completion
from minift.files.tokenizer import load_tokenizer
from minift.generate import Options
from minift.losses import next_token_targets
from minift.tokenizer import Special
from tests import experiments
from tests.reference import PRE_LN, logits_of, random_examples, varied_twins
from tests.runs import SHIPPED, few_rows

LENGTHS = (5, 9)


def test_each_row_counts_the_same() -> None:
    model, examples = varied_twins(PRE_LN, torch.float64)[1], random_examples(LENGTHS, vocab_size=40)
    found = []
    for example in examples:
        hidden = model(
            torch.tensor(example.input_ids), torch.arange(len(example.labels)), torch.arange(len(example.labels))[None]
        )
        wanted, targets = next_token_targets(torch.tensor(example.labels), torch.arange(len(example.labels)))
        found.append(experiments.mean_of_each_row(hidden[wanted], model.head, targets))
    assert [count.item() for _, count in found] == [1, 1]
    for (mean, _), example in zip(found, examples, strict=True):
        log_p = logits_of(model, [example]).log_softmax(1)
        supervised = [i for i, label in enumerate(example.labels) if i and label != IGNORE_INDEX]
        expected = -sum(log_p[i - 1, example.labels[i]] for i in supervised) / len(supervised)
        assert abs(mean - expected) < 1e-10


def test_a_row_sees_the_row_before_it() -> None:
    model, (first, second) = varied_twins(PRE_LN, torch.float64)[1], random_examples(LENGTHS, vocab_size=40)
    other = first._replace(input_ids=[token ^ 1 for token in first.input_ids])
    for make_batch, is_leaky in ((experiments.collate, False), (experiments.one_long_row, True)):
        batches = [make_batch([before, second]) for before in (first, other)]
        states = [model(batch.input_ids, batch.positions, batch.rows)[LENGTHS[0] :] for batch in batches]
        assert (not torch.equal(*states)) == is_leaky


def test_one_long_row_has_all_tokens_of_each_row() -> None:
    """Rows of one batch share the start of their template, but the experiment is about rows laid end to end."""
    first, second = (
        Example([2, 5, 9, *ids], [IGNORE_INDEX] * 4 + labels[1:])
        for ids, labels in random_examples(LENGTHS, vocab_size=40)
    )
    batch = experiments.one_long_row([first, second])
    assert batch.input_ids.tolist() == first.input_ids + second.input_ids
    assert batch.labels.tolist() == first.labels + second.labels
    assert batch.positions.tolist() == [*range(len(first.labels)), *range(len(second.labels))]
    assert batch.rows.tolist() == [[*range(len(batch.labels))]]


def test_the_end_has_no_label() -> None:
    pieces = ["Say hi:"], [" hi", Special("</s>")], load_tokenizer(SHIPPED)
    right, wrong = encode_completion(*pieces)[0], experiments.end_unsupervised(*pieces)[0]
    assert right.input_ids == wrong.input_ids and right.labels[:-1] == wrong.labels[:-1]
    assert (right.labels[-1], wrong.labels[-1]) == (2, IGNORE_INDEX)


def test_five_beams_answer() -> None:
    model, prompts = varied_twins(PRE_LN)[1], [example.input_ids for example in random_examples(LENGTHS, vocab_size=40)]
    found = experiments.five_beams(model, prompts, Options(max_new_tokens=6), lambda _: None, [6, 6])
    assert found == beam_search(model, prompts, Options(max_new_tokens=6, num_beams=5))


def test_the_table_and_runs_that_are_finished(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(experiments, "FOLDER", tmp_path / "runs")
    flags = " ".join(map(str, [*few_rows("sft", tmp_path), "--recipe tiny --run-checks --batch-size 2"]))
    command = ["plain,beams", "--seeds", "1", "2", "--steps", "1", "--flags", flags]
    experiments.main(command)
    first = capsys.readouterr().out
    lines = first.splitlines()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["plain-1-1", "plain-1-2"]
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| nothing is changed (`plain`)",
        "| nothing is changed, but 5 beams answer (`beams`)",
    ]
    assert all(line.count("%–0.0%)") == 2 for line in lines[2:])  # one step teaches nothing
    monkeypatch.setattr(experiments, "run", None)
    experiments.main(command)
    assert capsys.readouterr().out == first
