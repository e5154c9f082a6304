"""Model folder → OPT or a reward model, and back: config.json and safetensors or `.bin` weights, as on the hub."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minift.errors import UserError
from minift.files.pickles import load_pickle
from minift.files.text import atomic_write, check_not_pointer, read_json, write_json
from minift.model import ACTIVATIONS, OPT, Model, OPTConfig, RewardModel

# The first of these that a folder or repository holds is its weights.
LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
REWARD_ARCHITECTURE = "OPTForSequenceClassification"
TYPES = {bool: "true or false", float: "a number", int: "a whole number", str: "a text"}
SCORE = "score.weight"  # a reward model's head, which is new and so is trained with adapters
EMBEDDING = "decoder.embed_tokens.weight"
HEAD = "lm_head.weight"  # tied: another name for the embedding
STRAY = "decoder.version"  # fairseq's file version, which the first conversions kept
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
    """Return the OPT config in a folder's config.json, and the name of its architecture or ""; UserError if wrong."""
    path = Path(folder, "config.json")
    values = read_json(path, "an OPT's config.json")
    try:
        config = parse_config(values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    architectures = values.get("architectures")
    return config, str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def read_language_config(folder: str | Path) -> OPTConfig:
    """Return a language model's config. Raises UserError for a reward model's, and like `read_config`."""
    config, architecture = read_config(folder)
    if architecture == REWARD_ARCHITECTURE:
        raise UserError(f"{folder}/config.json: this is a reward model, expected a language model")
    return config


def weight_files(folder: str | Path) -> list[Path]:
    """Return the files that hold a folder's weights, shards sorted by name; UserError if there are none."""
    folder = Path(folder)
    names = [path.name for path in folder.glob("*") if path.is_file()]
    return [folder / name for name in pick_weights(names, folder, folder)]


def pick_weights(names: Sequence[str], folder: Path, where: object) -> list[str]:
    """Return which of a folder's or repository's files hold its weights, sorted; raise UserError if any are missing.

    An index is read from `folder`. Messages call the folder or repository `where`.
    """
    layout = next((layout for layout in LAYOUTS if layout in names), None)
    if layout is None:
        raise UserError(f"{where}: no weights, expected one of {', '.join(LAYOUTS)}")
    if not layout.endswith(".index.json"):
        return [layout]
    index = folder / layout
    shard_of = read_json(index, "which file holds which weight").get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{index}: expected a weight_map from weights to files")
    suffix = Path(layout.removesuffix(".index.json")).suffix
    for shard in shard_of.values():
        # Only a file of the same format in this very folder: an index is as untrusted as the weights.
        if shard not in names or not shard.endswith(suffix):
            raise UserError(f"{index}: weight_map names {shard!r:.200}, expected a {suffix} file in the same folder")
    return sorted(set(shard_of.values()))


def load_model(folder: str | Path, *, dtype: torch.dtype = torch.float32, mapped: bool = False) -> OPT:
    """Return a folder's language model on the CPU, in `dtype` (the hub's are stored in fp16).

    With `mapped` the weights stay on disk until they are used: see `read_state`. Raises UserError if a file is absent
    or damaged, if it is a reward model, and like `read_state`.
    """
    return _load(OPT, read_language_config(folder), folder, dtype, fresh={}, mapped=mapped)


def load_reward_model(
    folder: str | Path, *, seed: int | None = None, dtype: torch.dtype = torch.float32, mapped: bool = False
) -> RewardModel:
    """Return a folder's reward model on the CPU, written by `save_model` or transformers (one label).

    With a `seed`, a language model gets a fresh head, drawn from N(0, init_std²) by a generator of its own, as in
    transformers: rewards start near 0 and the loss near ln 2. Without a `seed`, raises UserError for a language model;
    otherwise like `load_model`.
    """
    config, _ = read_config(folder)
    fresh = {}
    if seed is not None:
        head = torch.randn(1, config.word_embed_proj_dim, generator=torch.Generator().manual_seed(seed))
        fresh[SCORE] = (head * config.init_std).to(dtype)
    return _load(RewardModel, config, folder, dtype, fresh, mapped=mapped)


def save_model(model: OPT | RewardModel, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors as transformers reads them; each write is atomic.

    A language model becomes an `OPTForCausalLM`, a reward model an `OPTForSequenceClassification` with one label.
    Weights are stored as `dtype`, by default their own. The tied head is not stored: transformers ties it again.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    named = {name if name == SCORE else f"model.{name}": tensor for name, tensor in state.items()}
    write_tensors(folder / "model.safetensors", named)
    config = config_values(model.config) | {"dtype": str(dtype or model.head.dtype).removeprefix("torch.")}
    if isinstance(model, RewardModel):
        # transformers counts labels by their names: without them it would expect a head of two.
        config |= {"architectures": [REWARD_ARCHITECTURE], "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        if model.config.pad_token_id == model.config.eos_token_id:
            # transformers reads a reward at the last token that is not a pad. Without a pad that is the last one, the
            # EOS, and batches are refused instead of scored at the token before it.
            config["pad_token_id"] = None
    write_json(folder / "config.json", config)


def read_state(
    files: Sequence[Path], shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, fresh: Mapping[str, Tensor],
    *, mapped: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Return copies in `dtype` of the tensors that `shapes` names, or `fresh` ones for those that the files lack.

    The files hold them with or without a leading `model.`. They are copied one at a time out of one mapped file after
    the other, so they are never in memory twice. No code in a file runs. Raises UserError if a file is damaged, or if
    a tensor is missing, unexpected, of another shape, not of floating point numbers, or NaN or infinite in `dtype`.

    With `mapped`, return views of the mapped files instead, as they are stored: `to_dtype` casts and checks them later.
    """
    state: dict[str, Tensor] = {}
    unexpected: set[str] = set()
    misshapen: dict[str, str] = {}
    for path in files:
        room = path.stat().st_size
        for full_name, tensor in _read_tensors(path):
            name = full_name.removeprefix("model.")
            if name == STRAY:
                continue
            if name in state or name not in shapes:
                unexpected.add(full_name)
            elif tensor.shape != torch.Size(shapes[name]):
                misshapen[name] = f"{full_name} {[*tensor.shape]} for {[*shapes[name]]}"
            else:
                # A pickle can spread one number over any shape. The head may share the embedding's bytes.
                room -= tensor.nbytes if name != HEAD else 0
                if room < 0:
                    raise UserError(f"{path}: damaged: {full_name} is said to be larger than the file has room for")
                state[name] = tensor if mapped else to_dtype(tensor, dtype, f"{path}: {full_name}")

    where = files[0] if len(files) == 1 else files[0].parent
    head = state.pop(HEAD, None)  # a tied save may keep the tensor under either name or both
    if head is not None and not torch.equal(state.setdefault(EMBEDDING, head), head):
        raise UserError(f"{where}: lm_head.weight differs from embed_tokens.weight, expected a tied head")
    state = {**fresh, **state}
    missing = shapes.keys() - state.keys() - misshapen.keys() - {HEAD}
    odd = min(missing | unexpected, default="")
    if len(missing | unexpected) == 1 and odd.endswith(SCORE) and not misshapen:
        subject = "these adapters are of" if odd.startswith("base_model.") else "this is"
        problem = f"has {SCORE}: {subject} a reward model, expected a language model"
        if missing:
            problem = f"no {SCORE}: {subject} a language model; train a reward model from it with train_rm.py"
        raise UserError(f"{where}: {problem}")
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": {*misshapen.values()}}
    if found := [f"{len(names)} {problem}, first {min(names)}" for problem, names in problems.items() if names]:
        raise UserError(f"{where}: weights do not fit the model: {'; '.join(found)}")
    return state


def to_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a copy in `dtype`; raise UserError, which calls the tensor `name`, unless all its numbers are finite."""
    # A copy even if nothing is cast: the tensor may be a view of a mapped file.
    copy = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    # One NaN makes the extremes NaN; isfinite() of the whole tensor would allocate as much again.
    if not tensor.is_floating_point() or not all(limit.isfinite() for limit in copy.aminmax()):
        raise UserError(f"{name} holds NaN, infinite or whole numbers when read as {dtype}")
    return copy


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically, marked as PyTorch's. Raises like `atomic_write`."""
    with atomic_write(path) as unfinished:
        # safetensors writes under a random name first. A killed process would leave that file for ever, so it is
        # written in a folder, which the next write of `path` deletes.
        folder = unfinished.with_suffix(".folder")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
            (folder / path.name).replace(unfinished)
            folder.rmdir()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _load(
    model_class: type[Model], config: OPTConfig, folder: str | Path, dtype: torch.dtype, fresh: dict[str, Tensor],
    *, mapped: bool,
) -> Model:  # fmt: skip
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
    state = read_state(files, shapes | {HEAD: shapes[EMBEDDING]}, dtype, fresh, mapped=mapped)
    model.load_state_dict(state, assign=True)
    return model


def _read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the named tensors of a file, as views of it wherever it can be mapped."""
    check_not_pointer(path)
    if path.suffix != ".safetensors":
        yield from load_pickle(path).items()
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path}: unreadable, truncated or damaged: download or copy it again ({error})") from None
