"""Model folder → OPT or a reward model, and back: config.json and safetensors or `.bin` weights, as on the hub."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.errors import UserError
from minift.files.adapters import ADAPTER_CONFIG, pick_adapter_weights
from minift.files.hub import Repository, fetch, look_up
from minift.files.tensors import EMBEDDING, HEAD, SCORE, read_state, write_tensors
from minift.files.text import check_not_pointer, read_json, write_json
from minift.model import ACTIVATIONS, OPT, Model, OPTConfig, RewardModel

# The first of these that a folder or repository holds is its weights.
LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
REWARD_ARCHITECTURE = "OPTForSequenceClassification"
TYPES = {bool: "true or false", float: "a number", int: "a whole number", str: "a text"}
HARMLESS = 2**24  # this many weights may be claimed by a config.json without files of that size


def parse_config(values: dict[str, Any]) -> OPTConfig:
    """Return the config in a parsed `config.json`; other keys are ignored, as the hub's files hold many.

    Raises ValueError if a value has the wrong type or asks for something that minift's OPT does not do.
    """
    values = {name: value for name, value in values.items() if value is not None}
    # In transformers, "word_embed_proj_dim": null means "as wide as the layers".
    values.setdefault("word_embed_proj_dim", values.get("hidden_size", OPTConfig.hidden_size))
    defaults = asdict(OPTConfig())
    for name, default in defaults.items():
        value, expected = values.get(name, default), type(default)
        if type(value) not in ((int, float) if expected is float else (expected,)):
            raise ValueError(f"{name} is {value!r}, expected {TYPES[expected]}")
        if expected is int and value < (0 if name.endswith("_token_id") else 1):
            raise ValueError(f"{name} is {value}, expected a positive number")
    config = OPTConfig(**{name: value for name, value in values.items() if name in defaults})
    num_heads = config.num_attention_heads
    for name, holds, right in (
        ("model_type", values.get("model_type", "opt") == "opt", "'opt'"),
        ("tie_word_embeddings", values.get("tie_word_embeddings", True), "true: a head tied to the embedding"),
        ("layerdrop", not values.get("layerdrop"), "0"),
        ("dropout", 0 <= config.dropout <= 1, "a probability"),
        ("attention_dropout", 0 <= config.attention_dropout <= 1, "a probability"),
        ("pad_token_id", config.pad_token_id < config.vocab_size, f"a number below vocab_size {config.vocab_size}"),
        ("activation_function", config.activation_function in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
        ("hidden_size", config.hidden_size % num_heads == 0, f"a number divisible by num_attention_heads {num_heads}"),
    ):
        if not holds:
            raise ValueError(f"{name} is {values.get(name, defaults.get(name))!r}, expected {right}")
    return config


def config_values(config: OPTConfig) -> dict[str, Any]:
    """Return the `config.json` of a causal language model, as transformers reads it."""
    return {"model_type": "opt", "architectures": ["OPTForCausalLM"], "tie_word_embeddings": True, **asdict(config)}


def read_config(folder: str | Path) -> tuple[OPTConfig, str]:
    """Read a folder's config.json: an OPT's config, and the name of its architecture or "".

    Raises UserError if the file is absent, malformed, or of another architecture.
    """
    path = Path(folder, "config.json")
    values = read_json(path, "an OPT's config.json")
    try:
        config = parse_config(values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    architectures = values.get("architectures")
    return config, str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def weight_files(folder: str | Path) -> list[Path]:
    """Return the files that hold a folder's weights, shards sorted by name; UserError if there are none."""
    folder = Path(folder)
    names = [path.name for path in folder.glob("*") if path.is_file()]
    return [folder / name for name in _pick_weights(names, folder, lambda index: folder / index)]


def fetch_weights(name: str, revision: str | None = None) -> None:
    """Fetch the weights of a hub id into the hub's cache; those of the adapters if it holds no model.

    Raises UserError if the repository has no weights, and like `look_up`.
    """
    repository = look_up(name, "model", revision)
    if ADAPTER_CONFIG in repository.files and not {*LAYOUTS} & {*repository.files}:
        names = [pick_adapter_weights(repository.files)]
    else:
        names = [name for name in repository.files if "/" not in name]
        names = _pick_weights(names, repository, lambda index: fetch(repository, [index])[0])
    fetch(repository, names)


def read_language_config(folder: str | Path) -> OPTConfig:
    """Return a language model's config. Raises UserError for a reward model's, and like `read_config`."""
    config, architecture = read_config(folder)
    if architecture == REWARD_ARCHITECTURE:
        raise UserError(f"{Path(folder, 'config.json')}: this is a reward model, expected a language model")
    return config


def load_model(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> OPT:
    """Return a folder's language model on the CPU, in `dtype` (the hub's are stored in fp16).

    Raises UserError if a file is absent or damaged, if it is a reward model, and like `read_state`.
    """
    return _load(OPT, read_language_config(folder), folder, dtype, fresh={})


def load_reward_model(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> RewardModel:
    """Return a folder's reward model on the CPU, written by `save_model` or transformers (one label).

    Raises UserError like `load_model`, and for a language model, which has no head to score with.
    """
    config, _ = read_config(folder)
    return _load(RewardModel, config, folder, dtype, fresh={})


def new_reward_model(folder: str | Path, *, seed: int, dtype: torch.dtype = torch.float32) -> RewardModel:
    """Return a reward model to train: a language model's body under a fresh head, or the folder's reward model.

    The head is drawn from N(0, init_std²), as in transformers, by its own generator. Rewards then start near 0 and the
    loss near ln 2. Raises UserError like `load_model`.
    """
    config, _ = read_config(folder)
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(1, config.word_embed_proj_dim, generator=generator) * config.init_std
    return _load(RewardModel, config, folder, dtype, fresh={SCORE: head.to(dtype)})


def save_model(model: OPT | RewardModel, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors as transformers reads them; each write is atomic.

    A language model becomes an `OPTForCausalLM`, a reward model an `OPTForSequenceClassification` with one label.
    Weights are stored as `dtype`, by default their own. The tied head is not stored: transformers ties it again.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name if name == SCORE else f"model.{name}": tensor.to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    write_tensors(folder / "model.safetensors", state)
    stored = str(dtype or model.head.dtype).removeprefix("torch.")
    config = config_values(model.config) | {"dtype": stored}
    if isinstance(model, RewardModel):
        # transformers counts labels by their names: without them it would expect a head of two.
        config |= {"architectures": [REWARD_ARCHITECTURE], "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        if model.config.pad_token_id == model.config.eos_token_id:
            # transformers reads a reward at the last token that is not a pad. Without a pad that is the last one, the
            # EOS, and batches are refused instead of scored at the token before it.
            config["pad_token_id"] = None
    write_json(folder / "config.json", config)


def _pick_weights(names: list[str], where: Path | Repository, fetch_index: Callable[[str], Path]) -> list[str]:
    """Return which of a folder's or repository's files hold its weights, sorted; raise UserError if any are missing."""
    layout = next((layout for layout in LAYOUTS if layout in names), None)
    if layout is None:
        raise UserError(f"{where}: no weights, expected one of {', '.join(LAYOUTS)}")
    if not layout.endswith(".index.json"):
        return [layout]
    index = fetch_index(layout)
    shard_of = read_json(index, "which file holds which weight").get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{index}: expected a weight_map from weights to files")
    suffix = Path(layout.removesuffix(".index.json")).suffix
    for shard in shard_of.values():
        # Only a file of the same format in this very folder: an index is as untrusted as the weights.
        if shard not in names or not shard.endswith(suffix):
            raise UserError(f"{index}: weight_map names {shard!r:.200}, expected a {suffix} file in the same folder")
    return sorted(set(shard_of.values()))


def _load(
    model_class: type[Model], config: OPTConfig, folder: str | Path, dtype: torch.dtype, fresh: dict[str, Tensor]
) -> Model:
    """Return a model with the weights of a folder, and with `fresh` ones for those that the folder lacks."""
    files = weight_files(folder)
    for path in files:
        check_not_pointer(path)
    width, stored = config.hidden_size, sum(path.stat().st_size for path in files)
    # However narrow a layer is, its modules take the memory of some thousand weights.
    claimed = config.num_hidden_layers * max(4 * width * width + 2 * width * config.ffn_dim, 2**14)
    claimed += config.vocab_size * config.word_embed_proj_dim + config.max_position_embeddings * width
    if claimed > max(stored, HARMLESS):
        raise UserError(f"{folder}: truncated or of another model: {stored:,} bytes for {claimed:,} weights and more")
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = read_state(files, shapes | {HEAD: shapes[EMBEDDING]}, dtype, fresh)
    model.load_state_dict(state, assign=True)
    return model
