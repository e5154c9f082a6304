"""Packed batches, shared prefixes and the loader, by content and by count."""

import dataclasses
import math
import random
from unittest import mock

import pytest
import torch
from torch.utils.data import RandomSampler

from minift.batching import Loader, collate, pack, pad_rows, share_prefixes
from minift.encode import IGNORE_INDEX, Example
from tests.reference import random_examples


def test_every_row_can_be_read_back():
    examples = random_examples((3, 1, 8, 8, 2))
    batch = collate(examples)
    assert {tensor.dtype for tensor in batch} == {torch.int64}
    assert batch.rows.shape == (5, 8) and batch.input_ids.shape == (22,)
    for row, (ids, labels) in zip(batch.rows, examples, strict=True):
        length = len(ids)
        assert (row[length:] == -1).all() and (row[:length] >= 0).all()
        where = row[:length]
        assert batch.input_ids[where].tolist() == ids
        assert batch.labels[where].tolist() == labels
        assert batch.positions[where].tolist() == list(range(length))
    assert sorted(batch.rows[batch.rows >= 0].tolist()) == list(range(22))


def test_layouts():
    assert pad_rows([[0, 1], [2, 3, 4], [5]]).tolist() == [[0, 1, -1], [2, 3, 4], [5, -1, -1]]
    assert pad_rows([range(4)]).tolist() == [[0, 1, 2, 3]]
    assert pad_rows([[0], [1]]).tolist() == [[0], [1]]


def test_the_start_of_prompts_is_stored_once_and_each_target_follows_its_predictor():
    rng = random.Random(0)
    saved = 0
    for _ in range(300):
        examples = []
        for _ in range(rng.randint(1, 6)):  # few ids, so that prompts and responses begin alike by chance
            prompt, response = (rng.choices((5, 6), k=rng.randint(low, 5)) for low in (0, 1))
            later = rng.choices((5, 6), k=rng.randrange(3))  # a second question, not supervised, and its answer
            labels = [IGNORE_INDEX] * len(prompt) + response + [IGNORE_INDEX] * len(later) + response[: len(later)]
            examples.append(Example(prompt + response + later + response[: len(later)], labels))
        batch = collate(examples)
        owners = [set(row[row >= 0].tolist()) for row in batch.rows]
        for row, (ids, labels), owner in zip(batch.rows.tolist(), examples, owners, strict=True):
            path = row[: len(ids)]
            assert batch.input_ids[path].tolist() == ids and batch.labels[path].tolist() == labels
            assert batch.positions[path].tolist() == list(range(len(ids)))
            for before, here, label in zip([-1, *path], path, labels, strict=False):
                is_shared = sum(here in other for other in owners) > 1
                assert not (is_shared and label != IGNORE_INDEX)
                assert label == IGNORE_INDEX or before == -1 or before == here - 1
            assert owner == set(path)
        starts = {tuple(ids[:length]) for ids, labels in examples for length in range(1, len(common_start(labels)))}
        own = sum(len(ids) - max(0, len(common_start(labels)) - 1) for ids, labels in examples)
        assert len(batch.input_ids) == len(starts) + own
        saved += sum(len(ids) for ids, _ in examples) - len(batch.input_ids)
    assert saved > 200


def common_start(labels: list[int]) -> list[int]:
    return labels[: next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))]


def test_rows_that_a_model_reads_share_all_but_their_last_token():
    input_ids, positions, rows = pack([[2, 7, 8], [2, 7, 8], [2, 7]])
    assert input_ids.tolist() == [2, 7, 8, 8, 7] and positions.tolist() == [0, 1, 2, 2, 1]
    assert rows.tolist() == [[0, 1, 2], [0, 1, 3], [0, 4, -1]]


def test_prefixes_are_stored_once_and_last_tokens_never_shared():
    rng = random.Random(0)
    saved = 0
    for _ in range(300):
        sequences = [rng.choices((5, 6, 7), k=rng.randint(1, 9)) for _ in range(rng.randint(1, 6))]
        sequences += rng.choices(sequences, k=rng.randrange(2))  # now and then the same sequence twice
        ids, positions, indices = share_prefixes(sequences, [len(sequence) - 1 for sequence in sequences])
        assert [[ids[index] for index in path] for path in indices] == sequences
        assert [[positions[index] for index in path] for path in indices] == [[*range(len(s))] for s in sequences]
        assert indices[0] == [*range(len(sequences[0]))]  # collate_rankings labels the first tokens of the tree
        assert len({path[-1] for path in indices}) == len(sequences)
        prefixes = {tuple(sequence[:length]) for sequence in sequences for length in range(1, len(sequence))}
        assert len(ids) == len(positions) == len(prefixes) + len(sequences)
        saved += sum(map(len, sequences)) - len(ids)
    assert saved > 1000


# ---- the loader; the examples of most tests here are numbers, and a batch is their list ----


def numbers(count: int, *values: int, seed: int = 0, order: str = "shuffled") -> Loader:
    return Loader(range(count), list, *values, seed=seed, order=order)


def seen(loader: Loader, step: int) -> list[int]:
    return [number for batch in loader.micro_batches(step) for number in batch]


def epoch_of(loader: Loader, epoch: int) -> list[int]:
    first = epoch * loader.steps_per_epoch
    return [number for step in range(first, first + loader.steps_per_epoch) for number in seen(loader, step)]


def test_batches_that_were_made_earlier_are_used_once_and_for_their_step_only():
    made: list[list[int]] = []
    loader = Loader(range(20), lambda numbers: made.append(list(numbers)) or list(numbers), 2, 4, order="shuffled")
    expected = {(step, *part): list(loader.micro_batches(step, *part)) for step in (1, 2) for part in ((0, 1), (1, 2))}
    made.clear()
    loader.make_ready(1, 1, 2)
    assert made == expected[1, 1, 2] and loader == dataclasses.replace(loader)
    for step, collated in (((1, 0, 1), True), ((2, 1, 2), True), ((1, 1, 2), False), ((1, 1, 2), True)):
        made.clear()
        assert list(loader.micro_batches(*step)) == expected[step] and bool(made) == collated, step
    loader.make_ready(1, 0, 1)
    loader.make_ready(2, 0, 1)  # only one step is kept
    made.clear()
    assert list(loader.micro_batches(2)) == expected[2, 0, 1] and not made
    assert list(loader.micro_batches(1)) == made == expected[1, 0, 1]


def test_examples_are_collated_and_an_evaluation_reads_all_in_order():
    examples = random_examples((3, 1, 8, 8, 2))
    loader = Loader(examples, collate, 2, grad_accum=2, order="shuffled")
    [chosen] = dataclasses.replace(loader, collate=list).micro_batches(1)
    [batch] = loader.micro_batches(1)
    assert len(chosen) == 1 and all(map(torch.equal, batch, collate(chosen)))
    expected = [collate(examples[start : start + 2]) for start in (0, 2, 4)]
    assert all(all(map(torch.equal, *pair)) for pair in zip(loader, expected, strict=True))
    assert list(Loader([], collate, 2)) == []


@pytest.mark.parametrize(("count", "batch_size", "grad_accum"), [(23, 4, 2), (24, 4, 2), (23, 1, 1), (5, 8, 4)])
def test_the_order_is_that_of_trl(count, batch_size, grad_accum):
    """The order of torch's RandomSampler, which trl seeds with seed + epoch; so every example comes once an epoch."""
    loader = numbers(count, batch_size, grad_accum, seed=42)
    assert loader.steps_per_epoch == math.ceil(count / (batch_size * grad_accum))
    for epoch in range(3):
        generator = torch.Generator().manual_seed(42 + epoch)
        assert epoch_of(loader, epoch) == list(RandomSampler(range(count), generator=generator))
        assert sorted(epoch_of(loader, epoch)) == list(range(count))
    assert epoch_of(loader, 0) != epoch_of(loader, 1)
    assert epoch_of(dataclasses.replace(loader, seed=43), 0) == epoch_of(loader, 1)


def test_the_order_is_drawn_once_an_epoch():
    loader = numbers(1000, 2, seed=7)
    with mock.patch("torch.randperm", wraps=torch.randperm) as drawn:
        first = [seen(loader, step) for step in (*range(5), 500, 501)]
    assert drawn.call_count == 2
    assert first[:5] == [epoch_of(loader, 0)[2 * step :][:2] for step in range(5)]


def test_the_order_of_the_file():
    loader = numbers(7, 2, 1, seed=42, order="sequential")
    for epoch in range(2):
        assert epoch_of(loader, epoch) == list(range(7))


@pytest.mark.parametrize(
    ("count", "sizes"), [(16, [2, 2, 2, 2]), (17, [1]), (19, [2, 1]), (22, [2, 2, 2]), (23, [2, 2, 2, 1])]
)
def test_the_rest_of_an_epoch_is_a_step(count, sizes):
    loader = numbers(count, 2, 4)
    assert [len(batch) for batch in loader.micro_batches(loader.steps_per_epoch - 1)] == sizes
    # The next epoch's first step is full again.
    assert [len(batch) for batch in loader.micro_batches(loader.steps_per_epoch)] == [2, 2, 2, 2]


def test_a_step_s_examples_depend_on_seed_and_step_alone():
    loader = numbers(23, 2, 3, seed=7)
    expected = [seen(loader, step) for step in range(12)]
    before = torch.get_rng_state()
    for step in reversed(range(12)):
        torch.manual_seed(step)
        assert seen(numbers(23, 2, 3, seed=7), step) == expected[step]
    torch.set_rng_state(before)
    seen(loader, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_without_examples_has_no_steps():
    assert list(numbers(0, 2, 3)) == [] and numbers(0, 2, 3).steps_per_epoch == 0
    with pytest.raises(ValueError, match="no examples"):
        next(numbers(0, 2, 3).micro_batches(0))


def test_accumulation_does_not_change_what_a_step_sees():
    loaders = [numbers(21, batch_size, 8 // batch_size, seed=3) for batch_size in (1, 2, 4, 8)]
    for step in range(7):
        first, *others = [seen(loader, step) for loader in loaders]
        assert all(other == first for other in others)
    for loader in loaders:
        assert [len(batch) for batch in loader.micro_batches(0)] == [loader.batch_size] * loader.grad_accum
