"""OPT against the reference's own forward and backward passes, and against itself where two ways must agree."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from minift.batching import Batch, collate
from minift.losses import completion_cross_entropy
from minift.model import OPT, OPTConfig, initialise, row_layout
from minift.weights import load_model

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 20,
    "dropout": 0.0,
}
PROJECTED = {"word_embed_proj_dim": 12}
VARIANTS = {
    "pre-LN": {},
    "pre-LN, no final LayerNorm": {"_remove_final_layer_norm": True},
    "pre-LN, projected": PROJECTED,
    "post-LN": {"do_layer_norm_before": False},
    "post-LN, projected (350m)": {"do_layer_norm_before": False} | PROJECTED,
    "Galactica": {
        "activation_function": "gelu",
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "bos_token_id": 0,
    },
    "biases without affine": {"layer_norm_elementwise_affine": False},
    "affine without biases": {"enable_bias": False, "do_layer_norm_before": False},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
LENGTHS = (7, 1, 20, 12)  # one token alone, and one row as long as there are positions


def reference_model(variant: str, dtype: torch.dtype = torch.float32, **changes) -> transformers.OPTForCausalLM:
    """The reference with weights that leave nothing trivial: no bias is 0 and no LayerNorm the identity."""
    config = transformers.OPTConfig(**(SMALL | VARIANTS[variant] | changes))
    model = transformers.OPTForCausalLM._from_config(config, attn_implementation="sdpa").to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "embed" in name else 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.normal_(0.0, scale, generator=generator)
            if "layer_norm.weight" in name:
                parameter.add_(1.0)
    return model.eval()


def both_models(variant: str, folder: Path, dtype: torch.dtype = torch.float32, **changes):
    reference = reference_model(variant, dtype, **changes)
    reference.save_pretrained(folder)
    return reference, load_model(folder, dtype=dtype).eval()


def our_model(variant: str, dtype: torch.dtype = torch.float32, **changes) -> OPT:
    model = OPT(OPTConfig.from_dict(SMALL | VARIANTS[variant] | changes)).to(dtype)
    state = reference_model(variant, dtype, **changes).model.state_dict()
    model.load_state_dict(state)
    return model.eval()


def documents(lengths=LENGTHS, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Random (input_ids, labels), labels masked in the first half but for the very first, which no row can predict."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(3, 60, (length,), generator=generator)
        if length > 1:
            ids[length // 3] = 1  # a pad id in the text: looked up like any other, without a gradient to the table
        labels = ids.clone()
        labels[1 : length // 2] = -100
        examples.append((ids.tolist(), labels.tolist()))
    return examples


def padded(examples) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's batch: input_ids, attention_mask and labels, each (R, T)."""
    length = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [1] * (length - len(ids)) for ids, _ in examples])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in examples])
    return ids, mask, labels


def our_hidden(model: OPT, batch: Batch) -> Tensor:
    return model(batch.input_ids, batch.positions, batch.rows)  # (N, E)


def our_logits(model: OPT, examples) -> Tensor:
    return model.logits(our_hidden(model, collate(examples)))  # (N, V)


def difference(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """max|a − b| / max|b|: relative to a tensor's largest entry, or to that of another one."""
    scale = expected if scale is None else scale
    return ((found - expected).abs().max() / scale.abs().max()).item()


def assert_gradients_agree(model: OPT, expected: dict[str, Tensor], tolerance: float) -> None:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient
        if name.endswith("k_proj.bias"):
            # The softmax does not see a shift of all keys, so this gradient is 0 but for rounding: that of the weight
            # beside it tells how much rounding there may be.
            scale = expected[name.replace("bias", "weight")]
            assert found[name].abs().max() < tolerance * scale.abs().max(), name
        assert difference(found[name], gradient, scale) < tolerance, name


# ----------------------------------------------------------------------------------------------------- the reference


@every_variant
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logits_loss_and_every_gradient(tmp_path, variant, dtype, tolerance):
    reference, model = both_models(variant, tmp_path, dtype)
    examples = documents()
    ids, mask, labels = padded(examples)
    output = reference(input_ids=ids, attention_mask=mask, labels=labels)
    batch = collate(examples)
    hidden = our_hidden(model, batch)
    assert difference(model.logits(hidden), output.logits[mask.bool()]) < tolerance

    total, count = completion_cross_entropy(hidden, model.head, batch.labels, batch.positions)
    (total / count).backward()
    expected = output.loss
    if dtype == torch.float64:  # the reference's own loss rounds its logits to fp32
        expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    assert difference(total / count, expected) < tolerance
    names = {name.removeprefix("model."): parameter.grad for name, parameter in reference.named_parameters()}
    assert_gradients_agree(model, names, tolerance)


@pytest.fixture
def visible_dropout(monkeypatch):
    """Dropout that is the same every time: ×(1 + p) where it acts, so that its places and rates show in the numbers."""

    def dropout(hidden, p=0.5, training=True, inplace=False):
        return hidden * (1 + p) if training else hidden

    attention = F.scaled_dot_product_attention

    def scaled_dot_product_attention(*args, dropout_p=0.0, **options):
        return attention(*args, **options) * (1 + dropout_p)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)


@every_variant
@pytest.mark.parametrize("training", [True, False])
def test_dropout_acts_where_the_reference_has_it(tmp_path, visible_dropout, variant, training):
    reference, model = both_models(variant, tmp_path, torch.float64, dropout=0.3, attention_dropout=0.2)
    without = our_logits(model, documents())
    ids, mask, _ = padded(documents())
    expected = reference.train(training)(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    found = our_logits(model.train(training), documents())
    assert difference(found, expected) < 1e-10
    assert torch.equal(found, without) != training


@pytest.mark.parametrize("name", ["dropout", "attention_dropout"])
def test_dropout_is_random_in_training_only(name):
    model = our_model("post-LN, projected (350m)", **{"dropout": 0.0, name: 0.5})
    expected = our_logits(model, documents())
    assert torch.equal(our_logits(model, documents()), expected)
    model.train()
    torch.manual_seed(0)
    first, second = our_logits(model, documents()), our_logits(model, documents())
    torch.manual_seed(0)
    assert torch.equal(our_logits(model, documents()), first)
    assert not torch.equal(first, second) and not torch.equal(first, expected)


# ------------------------------------------------------------------------------------------------- two ways, one result


@every_variant
def test_packed_is_alone_is_padded(variant):
    model = our_model(variant, torch.float64)
    examples = documents()
    packed = our_logits(model, examples)  # (N, V)
    alone = torch.cat([our_logits(model, [example]) for example in examples])
    assert difference(packed, alone) < 1e-12

    ids, mask, _ = padded(examples)  # every pad a token of its own, as other code has it
    slots = torch.arange(ids.numel()).view(ids.shape)  # (R, T)
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    logits = model.logits(model(ids.flatten(), positions.flatten(), slots))
    assert difference(packed, logits[mask.flatten().bool()]) < 1e-12


@every_variant
@pytest.mark.parametrize("changed", range(4))
def test_documents_never_see_each_other(variant, changed):
    """Bit for bit. The first document matters most: padding repeats its first token."""
    model = our_model(variant)
    examples = documents()
    before = our_logits(model, examples).split(LENGTHS)
    examples[changed] = documents(seed=1)[changed]
    after = our_logits(model, examples).split(LENGTHS)
    for place, (one, other) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(one, other) == (place != changed)


@every_variant
def test_tokens_never_see_the_future(variant):
    model = our_model(variant)
    examples = documents()
    before = our_logits(model, examples)
    ids, labels = examples[2]
    start = sum(LENGTHS[:2])
    examples[2] = (ids[:11] + [ids[11] ^ 1] + ids[12:], labels)
    same = (our_logits(model, examples) == before).all(1)  # (N,)
    assert same[: start + 11].all() and same[start + 20 :].all()
    assert not same[start + 11 : start + 20].any()


def test_the_order_of_the_flat_list_does_not_matter():
    model = our_model("post-LN, projected (350m)", torch.float64)
    batch = collate(documents())
    order = torch.randperm(sum(LENGTHS), generator=torch.Generator().manual_seed(0))
    rows = torch.where(batch.rows < 0, -1, order.argsort()[batch.rows])
    shuffled = model(batch.input_ids[order], batch.positions[order], rows)
    assert difference(shuffled, our_hidden(model, batch)[order]) < 1e-12


@every_variant
def test_a_shared_prompt_computed_once(variant):
    """A prompt that stands in two rows gives what two separate rows give, and its gradients add up."""
    model = our_model(variant, torch.float64)
    prompt, left, right = (ids for ids, _ in documents((5, 3, 6)))
    weight = torch.randn(14, model.config.word_embed_proj_dim, generator=torch.Generator().manual_seed(0)).double()

    separate = our_hidden(model, collate([(prompt + left, prompt + left), (prompt + right, prompt + right)]))
    separate = torch.cat([separate[:8], separate[13:]])  # less the second prompt: (14, E)
    (separate * weight).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    positions = torch.tensor([*range(5), *range(5, 8), *range(5, 11)])
    rows = torch.tensor([[*range(5), 5, 6, 7, -1, -1, -1], [*range(5), *range(8, 14)]])
    shared = model(torch.tensor(prompt + left + right), positions, rows)
    (shared * weight).sum().backward()
    assert difference(shared, separate) < 1e-12
    assert_gradients_agree(model, expected, 1e-12)


def test_a_shared_token_is_read_back_from_the_first_row_that_has_it():
    rows = torch.tensor([[0, 1, 2, -1], [0, 1, 3, 4], [5, 6, -1, -1], [0, 7, -1, -1]])
    assert row_layout(rows, 8).scatter.tolist() == [0, 1, 2, 6, 7, 8, 9, 13]


def test_positions_are_looked_up_two_rows_on():
    model = our_model("pre-LN")
    table = model.decoder.embed_positions.weight
    assert table.shape == (22, 32)
    our_logits(model, documents((5, 9))).sum().backward()
    assert model.head.grad.any(1).all()  # through the tied head, tokens that were never read included
    assert table.grad.any(1).nonzero().flatten().tolist() == list(range(2, 11))


def test_one_token_at_a_time_through_a_cache():
    class Cache:
        """Two rows of one length; the mask lets every query see all there is."""

        def __init__(self):
            self.layers = []
            self.held = {}

        def extend(self, layer, key, value):
            self.layers.append(layer)
            if layer in self.held:
                key, value = (torch.cat(pair, 2) for pair in zip(self.held[layer], (key, value), strict=True))
            self.held[layer] = key, value  # (R, H, S, D)
            return key, value, torch.ones(2, 1, 1, key.shape[2], dtype=torch.bool)

    model = our_model("post-LN, projected (350m)", torch.float64)
    batch = collate(documents((6, 6)))
    expected = our_hidden(model, batch).view(2, 6, -1)
    cache = Cache()
    for place in range(6):
        ids = batch.input_ids[batch.rows[:, place]]
        hidden = model(ids, torch.tensor([place, place]), torch.tensor([[0], [1]]), cache)
        assert difference(hidden, expected[:, place]) < 1e-12
    assert cache.layers == [0, 1] * 6


# ------------------------------------------------------------------------------------------------------ configurations

SIZES = {  # hidden, layers, heads, ffn, embedding width, LayerNorm before, parameters where OPT.md gives them
    "125m": (768, 12, 12, 3072, 768, True, 125_239_296),
    "350m": (1024, 24, 16, 4096, 512, False, 331_196_416),
    "1.3b": (2048, 24, 32, 8192, 2048, True, None),
    "2.7b": (2560, 32, 32, 10240, 2560, True, None),
    "6.7b": (4096, 32, 32, 16384, 4096, True, None),
    "13b": (5120, 40, 40, 20480, 5120, True, None),
    "30b": (7168, 48, 56, 28672, 7168, True, None),
    "66b": (9216, 64, 72, 36864, 9216, True, None),
}


def assert_same_shapes_as_reference(values: dict) -> int:
    """Names and shapes on the meta device, which takes no memory; the number of parameters."""
    with torch.device("meta"):
        model = OPT(OPTConfig.from_dict(values))
        reference = transformers.OPTForCausalLM(transformers.OPTConfig(**values))
    found = {f"model.{name}": tensor.shape for name, tensor in model.named_parameters()}
    assert found == {name: tensor.shape for name, tensor in reference.named_parameters()}
    return sum(shape.numel() for shape in found.values())


@pytest.mark.parametrize("size", SIZES)
def test_every_size_on_the_meta_device(size):
    hidden, layers, heads, ffn, width, before, parameters = SIZES[size]
    values = {
        "model_type": "opt",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": ffn,
        "word_embed_proj_dim": width,
        "do_layer_norm_before": before,
    }
    found = assert_same_shapes_as_reference(values)
    assert parameters in (None, found)


def test_the_hub_configs():
    folder = os.environ.get("MINIFT_REAL_DATA")
    if folder is None:
        pytest.skip("MINIFT_REAL_DATA names no folder with opt_configs.json")
    for values in json.loads((Path(folder) / "opt_configs.json").read_text())["configs"].values():
        assert_same_shapes_as_reference(values)


@every_variant
def test_configurations_come_back_from_their_own_dictionary(variant):
    config = OPTConfig.from_dict(SMALL | VARIANTS[variant])
    values = json.loads(json.dumps(config.to_dict()))
    assert OPTConfig.from_dict(values) == config
    reference = transformers.OPTConfig(**values)
    for name, value in values.items():
        assert getattr(reference, name) == value, name


def test_defaults_are_the_reference_s():
    reference = transformers.OPTConfig()
    for name, value in OPTConfig().to_dict().items():
        if name != "architectures":
            assert getattr(reference, name) == value, name
    # A width that is absent or null is that of the layers; keys that nobody here reads are ignored.
    for values in ({}, {"word_embed_proj_dim": None}, {"prefix": "</s>", "torch_dtype": "float16"}):
        assert OPTConfig.from_dict(values | {"hidden_size": 24}).word_embed_proj_dim == 24
    assert OPTConfig.from_dict({"dropout": 0}).dropout == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "768"),
        ("hidden_size", 768.0),
        ("hidden_size", True),
        ("hidden_size", 0),
        ("hidden_size", 770),  # not divisible by 12 heads
        ("num_hidden_layers", -1),
        ("num_attention_heads", [12]),
        ("vocab_size", 1),  # no row for the pad, which is 1
        ("pad_token_id", 50272),
        ("eos_token_id", -1),
        ("do_layer_norm_before", 1),
        ("enable_bias", "true"),
        ("dropout", "0.1"),
        ("dropout", False),
        ("dropout", 1.5),
        ("attention_dropout", -0.1),
        ("attention_dropout", float("nan")),
        ("activation_function", "swish"),
        ("activation_function", None.__class__),
        ("model_type", "gpt2"),
        ("tie_word_embeddings", False),
        ("layerdrop", 0.1),
    ],
)
def test_values_that_no_opt_has(name, value):
    with pytest.raises(ValueError, match=name) as refusal:
        OPTConfig.from_dict({name: value})
    assert "\n" not in str(refusal.value)


# ------------------------------------------------------------------------------------------------------ initialisation


def test_initialise():
    config = OPTConfig.from_dict(SMALL | PROJECTED | {"vocab_size": 500, "hidden_size": 64, "ffn_dim": 256})
    models = [OPT(config) for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed in zip(models, (5, 5, 6), strict=True):
        initialise(model, seed)
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["decoder.project_in.weight"], other["decoder.project_in.weight"])

    for name, tensor in first.items():
        if "layer_norm.weight" in name:
            assert (tensor == 1).all(), name
        elif name.endswith("bias"):
            assert (tensor == 0).all(), name
        else:
            scale = tensor.shape[1] ** -0.5
            if name.endswith(("out_proj.weight", "fc2.weight")):  # what four branches add to the residual stream
                scale /= 2
            assert tensor.std().item() == pytest.approx(scale, rel=0.1), name
            assert abs(tensor.mean().item()) < 0.1 * scale, name
    assert not first["decoder.embed_tokens.weight"][config.pad_token_id].any()
