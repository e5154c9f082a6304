"""What a run on a CPU is said to cost: counted by hand, by torch's own counters, and as the scripts print it."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minift import cost
from minift.batching import collate
from minift.lora import add_lora
from minift.losses import completion_cross_entropy
from minift.model import OPT, OPTConfig, RewardModel, set_dropout

# facebook/opt-350m's shape; on "meta" it takes no memory.
OPT_350M = OPTConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    ffn_dim=4096,
    word_embed_proj_dim=512,
    do_layer_norm_before=False,
)
C, E, F, LAYERS, V, RANK = 32, 16, 64, 3, 100, 4
SMALL = OPTConfig(
    vocab_size=V,
    hidden_size=C,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    ffn_dim=F,
    word_embed_proj_dim=E,
    max_position_embeddings=64,
    do_layer_norm_before=False,
)


def meta(config: OPTConfig, kind: type = OPT) -> OPT:
    with torch.device("meta"):
        return kind(config)


def small(adapters: bool) -> OPT:
    torch.manual_seed(0)
    model = OPT(SMALL)
    if adapters:
        add_lora(model, RANK, 8.0, 0.1, ("q_proj", "v_proj"))
    return model


def batch_of(*lengths: int, supervised: int):
    ids = [[7] * length for length in lengths]
    return collate([(row, [-100] * (len(row) - supervised) + row[-supervised:]) for row in ids])


def one_step(model: OPT, batch) -> None:
    model.train()
    hidden = model(batch.input_ids, batch.positions, batch.rows)
    completion_cross_entropy(hidden, model.head, batch.labels, batch.positions)[0].backward()


@pytest.mark.parametrize("kind", [OPT, RewardModel])
def test_products_of_the_courses_model_by_hand(kind):
    layer = 4 * 1024 * 1024 + 2 * 1024 * 4096  # q, k, v, out; fc1, fc2
    body = 24 * layer + 2 * 512 * 1024  # and the two projections
    model = meta(OPT_350M, kind)
    assert cost.products(model) == (6 * body, 6 * 50272 * 512)
    model.decoder.requires_grad_(False)
    assert cost.products(model) == (4 * body, 4 * 50272 * 512)


@pytest.mark.parametrize("adapters", [False, True])
def test_products_are_those_that_torch_counts(adapters):
    model = small(adapters)
    batch = batch_of(9, 20, supervised=5)
    with FlopCounterMode(display=False) as counter:
        one_step(model, batch)
    counted = sum(
        number for name, number in counter.get_flop_counts()["Global"].items() if str(name) in ("aten.mm", "aten.addmm")
    )
    per_token, per_supervised = cost.products(model)
    # Nothing below the first adapters trains: what would be the gradient of the first layer's input is not computed.
    spared = 2 * (E * C + 3 * C * C + 2 * C * RANK) if adapters else 0
    assert counted == 29 * (per_token - spared) + 10 * per_supervised


def test_memory_of_the_courses_model_by_hand():
    """331,196,416 weights and the lab's 1,572,864 in adapters, of 4 bytes each; what trains is there four times."""
    model = meta(OPT_350M)
    weights, adapters = 331_196_416, 1_572_864
    assert sum(parameter.numel() for parameter in model.parameters()) == weights
    all_weights = cost.memory(model, 0, 0, 0)
    assert all_weights - cost.PYTHON == 4 * 4 * weights
    model.decoder.requires_grad_(False)
    trained = torch.nn.Parameter(torch.empty(adapters, device="meta"))
    model.register_parameter("adapters", trained)
    empty = cost.memory(model, 0, 0, 0)
    assert empty - cost.PYTHON == 4 * (weights + 4 * adapters)
    # 12 numbers of width 1024 a token (ReLU's are 4 of them) and 4 a slot, in each of 24 layers; twice the logits of at
    # most 1,024 positions.
    assert cost.memory(model, 1, 1, 0) - empty == 4 * 24 * 16 * 1024 == 1_572_864
    assert cost.memory(model, 0, 1, 0) - empty == 4 * 24 * 4 * 1024
    assert cost.memory(model, 0, 0, 100) - empty == 4 * 2 * 100 * 50272
    assert cost.memory(model, 0, 0, 9999) - empty == 4 * 2 * 1024 * 50272
    assert cost.memory(model.double(), 1, 1, 0) - cost.memory(model, 0, 0, 0) == 8 * 24 * 16 * 1024


@pytest.mark.parametrize("lengths", [(32, 32), (60, 4, 3, 3)])
@pytest.mark.parametrize(
    "adapters, dropout, share", [(True, 0.1, (0.95, 1.05)), (False, 0.1, (0.9, 1.1)), (False, 0.0, (0.75, 1))]
)
def test_memory_is_what_autograd_keeps(adapters, dropout, share, lengths):
    model = small(adapters)
    set_dropout(model, dropout)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor, storage.nbytes()  # held, so that no address is used twice
        return tensor

    model.train()
    batch = batch_of(*lengths, supervised=2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch.input_ids, batch.positions, batch.rows)
    found = sum(nbytes for _, nbytes in kept.values())
    told = cost.memory(model, sum(lengths), batch.rows.numel(), 0) - cost.memory(model, 0, 0, 0)
    assert share[0] <= found / told <= share[1]


def told(monkeypatch, total_steps: int, **options) -> tuple[str, list[int]]:
    """The announcement at 10 GFLOP/s, and the steps whose batches it looked at."""
    monkeypatch.setattr(cost, "matrix_rate", lambda tokens, width, dtype: 10e9)
    looked_at = []

    def micro_batches(step):
        looked_at.append(step)
        return [batch_of(300, 400, supervised=50), batch_of(500 if step else 700, supervised=100)]

    return cost.announce(meta(OPT_350M), micro_batches, total_steps, torch.float32, **options), looked_at


def test_an_announcement_worked_out_by_hand(monkeypatch):
    # Two steps of 1,400 and 1,200 tokens, of which 200 are supervised: 2,600 · 6 · 303,038,464 + 400 · 6 · 25,739,264
    # = 4.789 TFLOP, so 684 s at 70% of 10 GFLOP/s. Memory: 0.4 + 16 · 0.3312 GB of weights, gradients and moments,
    # 700 tokens · 1,179,648 B and 800 slots · 393,216 B kept and 2 · 100 · 50,272 · 4 B of logits = 6.88 GB.
    text, looked_at = told(monkeypatch, 2)
    assert looked_at == [0, 1]
    assert text.split("\n")[1:] == [
        "On this CPU training will take about 11.4 minutes and 6.9 GB of memory: 2 steps of",
        "about 1,300 tokens, 4.8 TFLOP at 70% of the 10 GFLOP/s of matrix products here; evaluation comes on top",
    ]
    assert ", 4.7 TFLOP at" in told(monkeypatch, 2, uses_head=False)[0]


def test_a_long_run_is_told_from_its_first_steps(monkeypatch):
    text, looked_at = told(monkeypatch, 39_060)
    assert looked_at == [*range(50)]
    # 50 steps hold 1,204 tokens on average: 39,060 · (1,204 · 6 · 303,038,464 + 200 · 6 · 25,739,264) / 7e9 = 143 days
    assert "about 143.4 days" in text and "39,060 steps of\nabout 1,204 tokens, 86,714.6 TFLOP" in text


@pytest.mark.parametrize(
    "seconds, expected",
    [(0.2, "1 s"), (119, "119 s"), (120, "2 minutes"), (7199, "120 minutes"), (9000, "2.5 hours"), (2e6, "23.1 days")],
)
def test_a_duration_is_told_in_the_largest_unit_of_which_there_are_two(seconds, expected):
    assert cost.duration(seconds) == expected


def test_the_rate_is_that_of_products_of_these_shapes(monkeypatch):
    """A clock that ticks 0.1 s a look: two products between the first look and the one that ends the loop."""
    ticks = iter(range(100))
    shapes = []
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 10))
    monkeypatch.setattr(cost.F, "linear", lambda hidden, weight: shapes.append((*hidden.shape, *weight.shape)))
    rate = cost.matrix_rate(212, 4096, torch.float32, seconds=0.15)
    assert shapes == [(212, 1024, 1024, 1024)] * 3  # one to warm up
    assert rate == pytest.approx(2 * 2 * 212 * 1024**2 / 0.3)
    cost.matrix_rate(10**6, 256, torch.float64, seconds=0)
    assert shapes[-1] == (4096, 256, 256, 256)
