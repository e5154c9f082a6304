"""Packed batches and the sampler, by content and by count."""

import doctest
import math

import pytest
import torch
from torch.utils.data import RandomSampler

from minift import batching
from minift.batching import Sampler, collate, lay_out_rows


def test_the_example_in_the_docstring():
    results = doctest.testmod(batching)
    assert results.attempted >= 5 and results.failed == 0


def test_every_row_can_be_read_back():
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in (3, 1, 8, 8, 2):
        ids = torch.randint(100, (length,), generator=generator).tolist()
        examples.append((ids, [token if token % 2 else -100 for token in ids]))
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
    assert lay_out_rows([2, 3, 1]).tolist() == [[0, 1, -1], [2, 3, 4], [5, -1, -1]]
    assert lay_out_rows([4]).tolist() == [[0, 1, 2, 3]]
    assert lay_out_rows([1, 1]).tolist() == [[0], [1]]


def test_a_batch_moves_as_a_whole():
    batch = collate([([2, 10], [-100, 10])]).to(torch.device("meta"))
    assert {tensor.device.type for tensor in batch} == {"meta"}
    assert batch.rows.shape == (1, 2)


def rows_of(sampler: Sampler, step: int) -> list[int]:
    return [row for micro_batch in sampler.micro_batches(step) for row in micro_batch]


def epoch_of(sampler: Sampler, epoch: int) -> list[int]:
    first = epoch * sampler.steps_per_epoch
    return [row for step in range(first, first + sampler.steps_per_epoch) for row in rows_of(sampler, step)]


@pytest.mark.parametrize(("num_rows", "batch_size", "grad_accum"), [(23, 4, 2), (24, 4, 2), (23, 1, 1), (5, 8, 4)])
def test_the_order_is_the_reference_s(num_rows, batch_size, grad_accum):
    """That of torch's RandomSampler, which trl's loader seeds with seed + epoch; and so every row once an epoch."""
    sampler = Sampler(num_rows, batch_size, grad_accum, seed=42)
    assert sampler.steps_per_epoch == math.ceil(num_rows / (batch_size * grad_accum))
    for epoch in range(3):
        generator = torch.Generator().manual_seed(42 + epoch)
        assert epoch_of(sampler, epoch) == list(RandomSampler(range(num_rows), generator=generator))
        assert sorted(epoch_of(sampler, epoch)) == list(range(num_rows))
    assert epoch_of(sampler, 0) != epoch_of(sampler, 1)
    assert epoch_of(sampler._replace(seed=43), 0) == epoch_of(sampler, 1)


def test_rows_in_the_order_of_the_file():
    sampler = Sampler(7, 2, 1, seed=42, shuffled=False)
    for epoch in range(2):
        assert epoch_of(sampler, epoch) == list(range(7))


@pytest.mark.parametrize(
    ("num_rows", "sizes"), [(16, [2, 2, 2, 2]), (17, [1]), (19, [2, 1]), (22, [2, 2, 2]), (23, [2, 2, 2, 1])]
)
def test_what_is_left_at_an_epoch_s_end_is_a_step_of_its_own(num_rows, sizes):
    sampler = Sampler(num_rows, batch_size=2, grad_accum=4, seed=0)
    assert [len(rows) for rows in sampler.micro_batches(sampler.steps_per_epoch - 1)] == sizes
    # The next epoch starts full again, with a row of its own order.
    assert [len(rows) for rows in sampler.micro_batches(sampler.steps_per_epoch)] == [2, 2, 2, 2]


def test_the_place_in_the_data_is_the_step_alone():
    sampler = Sampler(23, 2, 3, seed=7)
    expected = [rows_of(sampler, step) for step in range(12)]
    before = torch.get_rng_state()
    for step in reversed(range(12)):
        torch.manual_seed(step)
        assert rows_of(Sampler(23, 2, 3, seed=7), step) == expected[step]
    torch.set_rng_state(before)
    rows_of(sampler, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_accumulation_does_not_change_what_a_step_sees():
    shapes = [Sampler(21, batch_size, 8 // batch_size, seed=3) for batch_size in (1, 2, 4, 8)]
    for step in range(7):
        seen = [rows_of(sampler, step) for sampler in shapes]
        assert all(rows == seen[0] for rows in seen)
    for sampler in shapes:
        sizes = [len(rows) for rows in sampler.micro_batches(0)]
        assert sizes == [sampler.batch_size] * sampler.grad_accum
