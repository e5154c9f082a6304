"""Model files: every layout that the hub has, every way to break one, and saved models against transformers."""

import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from safetensors.torch import save_model as save_tied

from minift.errors import UserError
from minift.files.adapters import read_base
from minift.files.text import sha256
from minift.files.weights import config_values, load_model, parse_config, read_config, save_model, weight_files
from minift.model import OPT, OPTConfig
from tests.runs import user_error

LAYOUTS = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
# Post-LN with projections, like opt-350m: the shape in which most can go wrong.
CONFIG = OPTConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=24,
    word_embed_proj_dim=8,
    max_position_embeddings=12,
    do_layer_norm_before=False,
)
EMBEDDING = "model.decoder.embed_tokens.weight"
HEAD = "lm_head.weight"


def hub_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random fp16 weights under the hub's names, `model.decoder.*`."""
    torch.manual_seed(seed)
    values = config_values(CONFIG)
    reference = transformers.OPTForCausalLM(transformers.OPTConfig(**values))
    state = {name: torch.randn_like(tensor).half() for name, tensor in reference.state_dict().items()}
    del state[HEAD]
    return state


def random_model(seed: int) -> OPT:
    model = OPT(CONFIG)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in hub_state(seed).items()})
    return model


def write_config(folder: Path, **changes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_values(CONFIG) | changes))


def write_weights(folder: Path, layout: str, state: dict, metadata: dict | None = None) -> list[Path]:
    """Write `state` in one of the four layouts, as three shards if it has an index; return the files with weights."""
    single = layout.removesuffix(".index.json")
    stem, suffix = single.split(".")
    names = [single] if single == layout else [f"{stem}-0000{shard}-of-00003.{suffix}" for shard in (1, 2, 3)]
    for shard, name in enumerate(names):
        part = {key: state[key] for key in list(state)[shard :: len(names)]}
        if suffix == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata or {"format": "pt"})
    if single != layout:
        weight_map = {key: names[index % 3] for index, key in enumerate(state)}
        (folder / layout).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return [folder / name for name in names]


def assert_holds(model: OPT, state: dict[str, torch.Tensor]) -> None:
    found = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor.float()), name


def assert_refused(folder: Path, *words: str, **options) -> None:
    message = user_error(load_model, folder, **options)
    for word in words:
        assert word in message


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_every_layout_and_prefix_gives_the_same_weights(tmp_path, layout, prefix):
    write_config(tmp_path)
    state = hub_state()
    write_weights(tmp_path, layout, {prefix + name.removeprefix("model."): state[name] for name in state})
    random_state = torch.get_rng_state()
    model = load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state), "loading weights must not change the rest of a run"
    assert_holds(model, state)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model.config == CONFIG


def test_the_first_layout_of_the_order_wins(tmp_path):
    for first in range(4):
        folder = tmp_path / str(first)
        write_config(folder)
        for index in reversed(range(first, 4)):
            write_weights(folder, LAYOUTS[index], hub_state(seed=index))
        assert_holds(load_model(folder), hub_state(seed=first))


def test_shards_that_transformers_saved(tmp_path):
    state = hub_state()
    reference = transformers.OPTForCausalLM(transformers.OPTConfig(**config_values(CONFIG)))
    reference.load_state_dict(state | {HEAD: state[EMBEDDING]})
    reference.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_holds(load_model(tmp_path), state)


def test_a_pickle_older_than_zip_files(tmp_path):
    write_config(tmp_path)
    torch.save(hub_state(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_holds(load_model(tmp_path), hub_state())


def test_weights_stored_transposed_come_out_contiguous(tmp_path):
    write_config(tmp_path)
    torch.save({name: tensor.t().contiguous().t() for name, tensor in hub_state().items()}, tmp_path / LAYOUTS[2])
    model = load_model(tmp_path)
    assert_holds(model, hub_state())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", ["both", "head only"])
def test_the_tied_embedding_under_its_other_name(tmp_path, layout, stored):
    write_config(tmp_path)
    state = hub_state()
    on_disk = state | {HEAD: state[EMBEDDING].clone(), "decoder.version": torch.tensor([3.0])}
    if stored == "head only":
        del on_disk[EMBEDDING]
    write_weights(tmp_path, layout, on_disk)
    assert_holds(load_model(tmp_path), state)


def test_a_tied_save_with_its_alias_in_the_metadata(tmp_path):
    """safetensors' own `save_model`, which made the hub's conversions, drops one name and notes it."""
    write_config(tmp_path)
    tied = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(8, 50, bias=False), "model": OPT(CONFIG)})
    tied["lm_head"].weight = tied["model"].decoder.embed_tokens.weight
    path = tmp_path / "model.safetensors"
    save_tied(tied, str(path), {"format": "pt"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", EMBEDDING: HEAD} and EMBEDDING not in file.offset_keys()
    assert_holds(load_model(tmp_path), {name: tensor for name, tensor in tied.state_dict().items() if name != HEAD})


def test_a_loaded_model_owns_its_weights(tmp_path):
    """Nothing is cast here, so loading could return views of the mapped file, which change with it."""
    write_config(tmp_path)
    for layout in ("model.safetensors", "pytorch_model.bin"):
        [path] = write_weights(tmp_path, layout, hub_state())
        model = load_model(tmp_path, dtype=torch.float16)
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
        assert_holds(model.float(), hub_state())
        path.unlink()


def test_dtypes(tmp_path):
    write_config(tmp_path)
    write_weights(tmp_path, "model.safetensors", hub_state())
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        model = load_model(tmp_path, dtype=dtype)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
        assert torch.equal(model.head, hub_state()[EMBEDDING].to(dtype))


MEASURE = """
import sys
from pathlib import Path
from minift.files.weights import load_model

def status(field):  # in bytes
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

load_model(sys.argv[1])  # so that nothing is imported or set up below
for folder in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = status("VmRSS")
    model = load_model(folder)
    print((status("VmHWM") - before) / sum(tensor.nbytes for tensor in model.state_dict().values()))
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc/self/clear_refs to measure a peak by")
def test_loading_shards_takes_the_model_once_and_a_shard(tmp_path):
    """Measure a process's peak memory, mapped files included, as a multiple of the model's size."""
    config = replace(
        CONFIG, vocab_size=6000, hidden_size=384, num_hidden_layers=6, ffn_dim=1536, word_embed_proj_dim=384
    )
    with torch.device("meta"):
        shapes = {f"model.{name}": tensor.shape for name, tensor in OPT(config).state_dict().items()}
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    small = tmp_path / "small"
    write_config(small)
    write_weights(small, LAYOUTS[0], hub_state())
    folders = [tmp_path / "safetensors", tmp_path / "bin"]
    for folder, suffix in zip(folders, ("safetensors", "bin"), strict=True):
        write_config(folder, **config_values(config))
        names = list(state)
        shards = [f"part-{number}.{suffix}" for number in range(7)]
        for number, shard in enumerate(shards):
            part = {name: state[name] for name in names[number::7]}
            save_file(part, folder / shard) if suffix == "safetensors" else torch.save(part, folder / shard)
        index = f"{'model' if suffix == 'safetensors' else 'pytorch_model'}.{suffix}.index.json"
        weight_map = {name: shards[index % 7] for index, name in enumerate(names)}
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    command = [sys.executable, "-c", MEASURE, small, *folders]
    # A fixed threshold returns freed memory to the system, so that the second model can't reuse the first one's.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    ratios = [float(line) for line in done.stdout.split()]
    # 1 for the model, and the mapped pages of one or two shards of seven; with all of them it would be 2.
    assert len(ratios) == 2 and all(1 < ratio < 1.45 for ratio in ratios), ratios


# The hub's configs: hidden size (a quarter of ffn_dim), layers, heads, embedding width, LayerNorm before, parameters.
SIZES = {
    "opt-125m": (768, 12, 12, 768, True, 125_239_296),
    "opt-350m": (1024, 24, 16, 512, False, 331_196_416),
    "opt-1.3b": (2048, 24, 32, 2048, True, None),
    "opt-2.7b": (2560, 32, 32, 2560, True, None),
    "opt-6.7b": (4096, 32, 32, 4096, True, None),
    "opt-13b": (5120, 40, 40, 5120, True, None),
    "opt-30b": (7168, 48, 56, 7168, True, None),
    "opt-66b": (9216, 64, 72, 9216, True, None),
    "galactica-125m": (768, 12, 12, 768, True, None),
    "galactica-1.3b": (2048, 24, 32, 2048, True, None),
    "galactica-6.7b": (4096, 32, 32, 4096, True, None),
    "galactica-30b": (7168, 48, 56, 7168, True, None),
    "galactica-120b": (10240, 96, 80, 10240, True, None),
}


@pytest.mark.parametrize("name", SIZES)
def test_every_size_by_its_config(tmp_path, name):
    """Compare names, shapes and parameter count with the reference, transformers' OPT; both on the meta device."""
    hidden, layers, heads, width, before, count = SIZES[name]
    values = {"model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 50272, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * hidden, "word_embed_proj_dim": width,
        "max_position_embeddings": 2048, "do_layer_norm_before": before, "activation_function": "relu", "dropout": 0.1,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0, "init_std": 0.02, "prefix": "</s>",
        "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "torch_dtype": "float16"}  # fmt: skip
    if name.startswith("galactica"):
        values |= {"vocab_size": 50000, "activation_function": "gelu", "enable_bias": False, "bos_token_id": 0}
        values |= {"layer_norm_elementwise_affine": False, "learned_embeddings": True, "scale_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        model = OPT(read_config(tmp_path)[0])
        reference = transformers.OPTForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path))
    shapes = {f"model.{name}": tensor.shape for name, tensor in model.state_dict().items()}
    expected = {name: tensor.shape for name, tensor in reference.state_dict().items() if name != HEAD}
    assert shapes == expected
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == sum(parameter.numel() for parameter in reference.parameters()) and count in (None, total)


# ------------------------------------------------------------------------------------------------------------- configs


def test_a_config_survives_config_json():
    config = replace(CONFIG, enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu")
    values = json.loads(json.dumps(config_values(config)))
    assert parse_config(values) == config
    reference = transformers.OPTConfig(**values)
    for name, value in values.items():
        assert getattr(reference, name) == value, name


def test_config_defaults_are_those_of_the_reference():
    reference = transformers.OPTConfig()
    for name, value in config_values(OPTConfig()).items():
        if name != "architectures":
            assert getattr(reference, name) == value, name
    # An absent or null width is that of the layers; unknown keys are ignored.
    for values in ({}, {"word_embed_proj_dim": None}, {"prefix": "</s>", "torch_dtype": "float16"}):
        assert parse_config(values | {"hidden_size": 24}).word_embed_proj_dim == 24
    assert parse_config({"dropout": 0}).dropout == 0


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
        ("activation_function", str),
        ("model_type", "gpt2"),
        ("tie_word_embeddings", False),
        ("layerdrop", 0.1),
    ],
)
def test_config_values_that_no_opt_has(name, value):
    with pytest.raises(ValueError, match=name) as refusal:
        parse_config({name: value})
    assert "\n" not in str(refusal.value)


def test_read_config_names_the_architecture(tmp_path):
    for values, name in (({}, ""), ({"architectures": 3}, ""), ({"architectures": ["OPTModel"]}, "OPTModel")):
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert read_config(tmp_path) == (OPTConfig(), name)


def test_read_base(tmp_path):
    path = tmp_path / "adapter_config.json"
    for revision in (None, "abc"):
        path.write_text(json.dumps({"base_model_name_or_path": "facebook/opt-125m", "revision": revision}))
        assert read_base(tmp_path) == ("facebook/opt-125m", revision)
    for values in ({}, {"base_model_name_or_path": ""}, {"base_model_name_or_path": 3}, {"revision": "abc"}):
        path.write_text(json.dumps(values))
        with pytest.raises(UserError, match="adapter_config.json: base_model_name_or_path is"):
            read_base(tmp_path)


# ---------------------------------------------------------------------------------------------------------- refusing


def test_folders_without_a_model(tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere", "config.json", "no such file")
    assert_refused(tmp_path, "config.json", "no such file")
    write_config(tmp_path)
    assert_refused(tmp_path, "no weights", *LAYOUTS)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "expected a JSON object"),
        ('{"hidden_size": 16', "expected a JSON object"),
        ("[" * 200_000, "expected a JSON object"),
        (b"\xff\xfe{}", "not UTF-8 text"),
        ("[]", "expected a JSON object"),
        ('{"hidden_size": "16"}', "hidden_size"),
        ('{"hidden_size": 15, "num_attention_heads": 2}', "hidden_size"),
        ('{"model_type": "gpt2"}', "gpt2"),
        ('{"architectures": ["OPTForSequenceClassification"]}', "reward model"),
        ('{"architectures": 3, "dropout": "high"}', "dropout"),
    ],
)
def test_a_broken_config(tmp_path, text, word):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(tmp_path, "config.json", word)


def change(name: str, tensor: torch.Tensor | None):
    def changed(state: dict) -> dict:
        return {key: value for key, value in (state | {name: tensor}).items() if value is not None}

    return changed


FC1 = "model.decoder.layers.1.fc1.weight"


def one_entry(value: float) -> torch.Tensor:
    tensor = torch.ones(24, 16)
    tensor[23, 15] = value
    return tensor


@pytest.mark.parametrize("layout", ["model.safetensors", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (change(FC1, None), "1 missing, first decoder.layers.1.fc1.weight"),
        (change(EMBEDDING, None), "1 missing, first decoder.embed_tokens.weight"),
        (
            change("score.weight", torch.ones(1, 8)),
            "has score.weight: this is a reward model, expected a language model",
        ),
        (change(FC1.removeprefix("model."), torch.ones(24, 16)), "1 unexpected"),  # there under both prefixes
        # One prefix is stripped, not two.
        (lambda state: {f"model.{name}": state[name] for name in state}, "36 unexpected, first model.model.decoder."),
        (change(FC1, torch.ones(16, 24)), f"model: 1 of another shape, first {FC1} [16, 24] for [24, 16]"),
        (change(FC1, torch.ones(24, 16, dtype=torch.int8)), f"{FC1} holds NaN, infinite or whole numbers"),
        (change(FC1, one_entry(torch.inf)), "NaN, infinite"),
        (change(FC1, one_entry(-torch.inf)), "NaN, infinite"),
        (change(FC1, one_entry(torch.nan)), "NaN, infinite"),
        (change(HEAD, torch.zeros(50, 8)), "lm_head.weight differs"),
        (change(HEAD, torch.zeros(49, 8)), "1 of another shape, first lm_head.weight"),
        (
            lambda state: {f"transformer.h.{name}": state[name] for name in state},
            "; 36 unexpected, first transformer.h.model.decoder.",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, layout, changed, word):
    write_config(tmp_path)
    write_weights(tmp_path, layout, changed(hub_state()))
    assert_refused(tmp_path, str(tmp_path), word)


def test_weights_that_overflow_in_fp16(tmp_path):
    write_config(tmp_path)
    write_weights(tmp_path, "model.safetensors", hub_state() | {FC1: one_entry(1e5)})
    load_model(tmp_path)
    assert_refused(tmp_path, FC1, "torch.float16", dtype=torch.float16)


def test_a_config_of_more_weights_than_the_files_hold(tmp_path):
    """Refused before the model is built: the modules of a billion layers alone would fill the memory."""
    write_weights(tmp_path, "model.safetensors", hub_state())
    for changes in ({"num_hidden_layers": 10**9}, {"num_hidden_layers": 10**6, "hidden_size": 2, "ffn_dim": 1}):
        write_config(tmp_path, **changes)
        assert_refused(tmp_path, f"{tmp_path}: truncated or of another model", "weights and more")


def test_one_number_spread_over_the_shapes_of_a_large_model(tmp_path):
    """A pickle's tensor may have any shape with strides of 0: a file of kilobytes must not become gigabytes."""
    config = replace(CONFIG, vocab_size=200_000)
    write_config(tmp_path, **config_values(config))
    with torch.device("meta"):
        shapes = {f"model.{name}": tensor.shape for name, tensor in OPT(config).state_dict().items()}
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, tmp_path / "pytorch_model.bin")
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 100_000
    assert_refused(tmp_path, "pytorch_model.bin", "larger than the file has room for")


@pytest.mark.parametrize("odd", [torch.eye(24, 16).to_sparse(), torch.ones(24, 16, device="meta")])
def test_sparse_and_meta_tensors_are_refused(tmp_path, odd):
    write_config(tmp_path)
    torch.save(hub_state() | {FC1: odd}, tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path, "holds more than weights")


@pytest.mark.parametrize("layout", [*LAYOUTS, "older pickle"])
@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.9, -1])
def test_truncated_files(tmp_path, layout, kept):
    write_config(tmp_path)
    if layout == "older pickle":
        path = tmp_path / "pytorch_model.bin"
        torch.save(hub_state(), path, _use_new_zipfile_serialization=False)
    else:
        path = write_weights(tmp_path, layout, hub_state())[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    assert_refused(tmp_path, str(path), "truncated or damaged")


def test_no_code_in_a_checkpoint_runs(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    write_config(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    for new_format in (True, False):
        torch.save(hub_state() | {"payload": Payload()}, path, _use_new_zipfile_serialization=new_format)
        assert_refused(tmp_path, str(path), "holds more than weights")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_no_call_in_a_checkpoint_takes_memory(tmp_path, new_format):
    """torch's `weights_only` lets a file of a few bytes allocate a bytearray of any size."""

    class Hoard:
        def __reduce__(self):
            return bytearray, (10**13,)

    write_config(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(hub_state() | {"hoard": Hoard()}, path, _use_new_zipfile_serialization=new_format)
    assert_refused(tmp_path, str(path), "holds more than weights")


def test_a_compressed_archive_is_not_unpacked(tmp_path):
    write_config(tmp_path)
    plain, path = tmp_path / "plain.bin", tmp_path / "pytorch_model.bin"
    torch.save(hub_state(), plain)
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name in archive.namelist():
            compressed.writestr(name, archive.read(name))
    assert_refused(tmp_path, str(path), "not an archive as torch.save writes it")


def archive(*entries: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as written, warnings.catch_warnings(action="ignore"):
        for name, data in entries:
            written.writestr(name, data)
    return stream.getvalue()


HOARD = b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R."  # bytearray(2**30)
HARMLESS = b"\x80\x02}."


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("archive/DATA.PKL", HOARD)], "holds more than weights"),
        ([("archive/data.pkl", HARMLESS), ("archive/DATA.PKL", HOARD)], "weights do not fit"),
        ([("archive/data.pkl", HOARD), ("archive/data.pkl", HARMLESS)], "holds more than weights"),
        ([("archive/data.pkl", HARMLESS), ("other/data.pkl", HOARD)], "truncated or damaged"),
        ([("data.pkl", HOARD)], "truncated or damaged"),
    ],
)
def test_the_pickle_that_is_checked_is_the_one_that_is_read(tmp_path, entries, message):
    """torch's reader takes the first of two entries and ignores case; Python's takes the last."""
    write_config(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(archive(*entries, ("archive/version", b"3\n")))
    assert_refused(tmp_path, f"{path}: ", message)


def test_of_two_directories_the_one_that_torch_reads_is_checked(tmp_path):
    """Python searches back from the end and finds the nearer one; torch goes to the offset in the end record."""
    first, second = (
        archive(("archive/data.pkl", data.ljust(40)), ("archive/version", b"3\n")) for data in (HOARD, HARMLESS)
    )
    assert len(first) == len(second)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(first[: first.rindex(b"PK\5\6")] + second)
    with zipfile.ZipFile(path) as seen:
        assert seen.read("archive/data.pkl") == HARMLESS.ljust(40)
    reader = torch._C.PyTorchFileReader(str(path))
    assert reader.get_record("data.pkl") == HOARD.ljust(40)
    write_config(tmp_path)
    assert_refused(tmp_path, str(path), "holds more than weights")


def test_running_out_of_memory_is_not_reported_as_a_damaged_file(tmp_path, monkeypatch):
    write_config(tmp_path)
    write_weights(tmp_path, "pytorch_model.bin", hub_state())

    def load(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError):
        load_model(tmp_path)


@pytest.mark.parametrize("held", [[torch.ones(2)], {"state_dict": hub_state()}, {"step": 3}, {3: torch.ones(2)}])
def test_a_pickle_that_is_not_a_state_dict(tmp_path, held):
    write_config(tmp_path)
    torch.save(held, tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path, "pytorch_model.bin", "expected a state dict")


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/outside.safetensors", "a\\b.safetensors", "..", "weights.bin", 3, None]
    + ["a" * 5000 + ".safetensors", "a\0.safetensors"],
)
def test_an_index_that_names_files_elsewhere(tmp_path, shard):
    folder = tmp_path / "model"
    write_config(folder)
    save_file(hub_state(), tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(hub_state(), shard)}))
    assert_refused(folder, str(index), repr(shard)[:200], "in the same folder")


def test_broken_indexes(tmp_path):
    write_config(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'):
        index.write_text(text)
        assert_refused(tmp_path, str(index), "weight_map")
    index.write_text("{")
    assert_refused(tmp_path, str(index), "expected a JSON object")
    write_weights(tmp_path, index.name, hub_state())[1].unlink()
    assert_refused(tmp_path, str(index), "names 'model-00002-of-00003.safetensors'", "in the same folder")


# ------------------------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_transformers_loads_what_is_saved(tmp_path, dtype):
    model = random_model(seed=0)
    save_model(model, tmp_path / "new" / "folder", dtype)
    folder = tmp_path / "new" / "folder"
    reference, loading = transformers.OPTForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert reference.dtype == (dtype or torch.float32)
    expected = model.to(dtype) if dtype else model
    for name, tensor in expected.state_dict().items():
        assert torch.equal(reference.state_dict()[f"model.{name}"], tensor), name
    assert torch.equal(reference.lm_head.weight, expected.head)
    for name, value in config_values(CONFIG).items():
        assert getattr(reference.config, name) == value, name

    values = json.loads((folder / "config.json").read_text())
    assert values == config_values(CONFIG) | {"dtype": "float16" if dtype else "float32"}

    assert_holds(load_model(folder), {f"model.{name}": tensor for name, tensor in expected.state_dict().items()})
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(name.startswith("model.decoder.") for name in file.offset_keys())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1, "the weights and config.json differ in permissions"


def test_a_full_disk_leaves_the_last_good_files(tmp_path):
    save_model(random_model(seed=0), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(SafetensorError, match="File too large"):
            save_model(random_model(seed=1), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_again_replaces(tmp_path):
    for seed in (0, 1):
        save_model(random_model(seed), tmp_path)
        assert_holds(load_model(tmp_path), hub_state(seed))


def test_the_fingerprint_is_that_of_all_weight_files(tmp_path):
    write_config(tmp_path / "one")
    [path] = write_weights(tmp_path / "one", "model.safetensors", hub_state())
    whole = sha256(weight_files(tmp_path / "one"))
    assert whole == hashlib.sha256(path.read_bytes()).hexdigest()
    state = hub_state()
    state[FC1][3, 3] += 1
    write_weights(tmp_path / "one", "model.safetensors", state)
    assert sha256(weight_files(tmp_path / "one")) != whole

    write_config(tmp_path / "shards")
    paths = write_weights(tmp_path / "shards", "pytorch_model.bin.index.json", hub_state())
    together = b"".join(path.read_bytes() for path in paths)
    assert sha256(weight_files(tmp_path / "shards")) == hashlib.sha256(together).hexdigest()
