"""Hub id or folder → OPT or a reward model, and back: config.json and safetensors or `.bin` weights, as on the hub."""

import hashlib
import json
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minift.errors import UserError
from minift.files import read_json, write_text, written_whole
from minift.hub import fetch, look_up, model_folder
from minift.model import OPT, OPTConfig, RewardModel

Model = TypeVar("Model", OPT, RewardModel)

# The first of these that a folder or repository holds is its weights.
LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
EMBEDDING = "decoder.embed_tokens.weight"
HEAD = "lm_head.weight"
SCORE = "score.weight"
CONFIG = "an OPT's config.json"
REWARD_ARCHITECTURE = "OPTForSequenceClassification"
HARMLESS = 2**24  # so many weights get their memory, and the modules around them, before any file is read
CALLS = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}  # the pickle's operations that name a function
MAKES_TENSORS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
LONGEST_NAME = 200  # of a shard's file
STRAY = {"decoder.version"}  # fairseq's file version, which the first conversions carried along


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The folder that holds a model's files: `model` itself, or the cache's for a hub id, whose weights are fetched.

    Raises UserError when `model` is neither or has no weights; ConnectionError when the hub can't be reached.
    """
    folder = model_folder(model, revision)
    if not Path(model).is_dir():
        repository = look_up(str(model), "model", revision)
        layout = next((name for name in LAYOUTS if name in repository.files), None)
        if layout is None:
            raise UserError(f"{repository}: no weights, expected one of {', '.join(LAYOUTS)}")
        fetch(repository, [layout])
        if layout.endswith(".json"):
            shards = _shard_names(folder / layout)
            absent = [name for name in shards if name not in repository.files]
            if absent:
                raise UserError(f"{repository}: no {absent[0]} in it, though {layout} names it")
            fetch(repository, shards)
    return folder


def load_model(model: str | Path, *, dtype: torch.dtype = torch.float32, revision: str | None = None) -> OPT:
    """An OPT language model on the CPU, from a hub id or a folder, every tensor cast to `dtype` (the hub's are fp16).

    Raises UserError when a file is absent or damaged, and when a weight is missing, left over, of another shape, or NaN
    or infinite in `dtype`; and as `resolve` does. Tensors are copied one at a time out of one mapped file after the
    other, so the weights are never in memory twice. No code in a checkpoint runs.
    """
    folder = resolve(model, revision)
    path = folder / "config.json"
    if REWARD_ARCHITECTURE in str(read_json(path, CONFIG).get("architectures")):
        raise UserError(f"{path}: this is a reward model ({REWARD_ARCHITECTURE}), expected a language model")
    return _load(OPT, folder, dtype)


def load_reward_model(
    model: str | Path, *, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> RewardModel:
    """A reward model on the CPU, as `save_model` or transformers (`OPTForSequenceClassification`, one label) left it.

    Raises UserError as `load_model` does, and for a language model: it has no head that could score anything.
    """
    return _load(RewardModel, resolve(model, revision), dtype)


def new_reward_model(
    model: str | Path, *, seed: int, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> RewardModel:
    """A reward model to train: the body of a language model under a fresh head, or a reward model to go on from.

    The head is drawn from N(0, init_std²), as the reference draws it, by a generator of its own seeded with `seed`: so
    small that training starts from hardly an opinion, a loss near ln 2. Raises UserError as `load_model` does.
    """
    folder = resolve(model, revision)
    config = read_config(folder / "config.json")
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(1, config.word_embed_proj_dim, generator=generator) * config.init_std
    return _load(RewardModel, folder, dtype, fresh={SCORE: head.to(dtype)})


def read_config(path: Path) -> OPTConfig:
    """Read an OPT's config.json; UserError if it is absent, malformed, or some other kind of model's."""
    values = read_json(path, CONFIG)
    try:
        return OPTConfig.from_dict(values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, shards in the order of their names."""
    path = next((folder / name for name in LAYOUTS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: no weights, expected one of {', '.join(LAYOUTS)}")
    if path.suffix != ".json":
        return [path]
    files = [folder / shard for shard in _shard_names(path)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file, though {path.name} names it")
    return files


def save_model(model: OPT | RewardModel, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors, each whole or not at all, as transformers reads them.

    A language model becomes an `OPTForCausalLM`, a reward model an `OPTForSequenceClassification` with one label.
    Weights are stored as `dtype`, or as they are. The tied head is not stored: transformers ties it again.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name if name == SCORE else f"model.{name}": tensor.to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    stored = str(model.decoder.embed_tokens.weight.dtype if dtype is None else dtype).removeprefix("torch.")
    with written_whole(folder / "model.safetensors") as path:
        try:
            save_file(state, path, metadata={"format": "pt"})
        except SafetensorError as error:  # how a full disk looks here
            raise OSError(f"{folder / 'model.safetensors'}: {error}") from error
    config = model.config.to_dict() | {"dtype": stored}
    if isinstance(model, RewardModel):
        # The names of the labels are how transformers counts them: without them it would expect a head of two.
        config |= {"architectures": [REWARD_ARCHITECTURE], "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def fingerprint(model: str | Path, revision: str | None = None) -> str:
    """SHA-256 of the weights, in hexadecimal: for a single file what `sha256sum` prints, else over all shards."""
    digest = hashlib.sha256()
    for path in weight_files(resolve(model, revision)):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _shard_names(index: Path) -> list[str]:
    """The files that an index names, sorted."""
    shard_of = read_json(index, "which file holds which weight").get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{index}: expected a weight_map from weights to files")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    for shard in shard_of.values():
        # Nothing but a file of the same kind in this very folder: an index is as untrusted as the weights.
        plain = isinstance(shard, str) and len(shard) < LONGEST_NAME and not {"/", "\\", "\0"} & {*shard}
        if not plain or not shard.endswith(suffix):
            raise UserError(f"{index}: weight_map names {shard!r:.200}, expected a {suffix} file in the same folder")
    return sorted(set(shard_of.values()))


def _load(kind: type[Model], folder: Path, dtype: torch.dtype, fresh: dict[str, Tensor] | None = None) -> Model:
    """A model of a kind with the weights of a folder, and `fresh` ones for those the folder may lack."""
    config = read_config(folder / "config.json")
    files = weight_files(folder)
    width, stored = config.hidden_size, sum(path.stat().st_size for path in files)
    # A layer's modules take the memory of some thousand weights, however narrow it is.
    claimed = config.num_hidden_layers * max(4 * width * width + 2 * width * config.ffn_dim, 2**14)
    claimed += config.vocab_size * config.word_embed_proj_dim + config.max_position_embeddings * width
    if claimed > max(stored, HARMLESS):
        where = files[0] if len(files) == 1 else folder
        raise UserError(f"{where}: truncated or of another model: {stored:,} bytes for {claimed:,} weights and more")
    with torch.device("meta"):
        model = kind(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(_read_state(files, expected, dtype, fresh or {}), assign=True)
    return model


def _read_state(
    files: list[Path], expected: dict[str, torch.Size], dtype: torch.dtype, fresh: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of the expected weights, found in `files` with or without a leading `model.`; UserError for any others."""
    state: dict[str, Tensor] = {}
    unexpected, misshapen = [], {}
    shapes = expected | {HEAD: expected[EMBEDDING]}
    for path in files:
        room = path.stat().st_size
        for full_name, tensor in _read_tensors(path):
            name = full_name.removeprefix("model.")
            if name in STRAY:
                continue
            if name not in shapes or name in state:
                unexpected.append(full_name)
            elif tensor.shape != shapes[name] or not tensor.is_floating_point():
                misshapen[name] = f"{full_name} {tensor.dtype} {[*tensor.shape]} for {[*shapes[name]]}"
            else:
                # A pickle can spread one number over any shape. The head may share the embedding's bytes.
                room -= tensor.nbytes if name != HEAD else 0
                if room < 0:
                    raise UserError(f"{path}: damaged: {full_name} is said to be larger than the file has room for")
                # A copy even if nothing is cast: the tensor is a view of the mapped file.
                state[name] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
                # The extremes are NaN if any number is; isfinite() of all numbers would take their memory once more.
                if not all(extreme.isfinite() for extreme in state[name].aminmax()):
                    raise UserError(f"{path}: {full_name} holds NaN or infinite numbers when read as {dtype}")
    # A tied save may keep the tensor under either name or both.
    head = state.pop(HEAD, None)
    if head is not None and not torch.equal(state.setdefault(EMBEDDING, head), head):
        raise UserError(f"{files[-1].parent}: lm_head.weight differs from embed_tokens.weight, expected a tied head")
    state = fresh | state
    missing = [name for name in expected if name not in state and name not in misshapen]
    where = files[0] if len(files) == 1 else files[0].parent
    if missing == [SCORE]:
        raise UserError(f"{where}: no {SCORE}: this is a language model; train a reward model from it with train_rm.py")
    problems = [
        f"{len(names)} {problem} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for problem, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", [*misshapen.values()]))
        if names
    ]
    if problems:
        raise UserError(f"{where}: weights do not fit the model of config.json: {'; '.join(problems)}")
    return state


def _read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of one file, as views of it wherever it can be mapped. UserError when the file is damaged."""
    if path.suffix == ".safetensors":
        yield from _read_safetensors(path)
    else:
        yield from _read_pickle(path)


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path}: unreadable, truncated or damaged: download or copy it again ({error})") from None


def _read_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        _check_pickle(path)
        with warnings.catch_warnings(action="ignore"):  # torch's own, about a pickle it then refuses
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle fails in whatever way its bytes say
        raise UserError(
            f"{path}: unreadable, truncated or damaged: download or copy it again ({type(error).__name__})"
        ) from None
    tensors = state.items() if isinstance(state, dict) else [(None, state)]
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors):
        raise UserError(f"{path}: expected a state dict, a dictionary of tensors by name")
    yield from tensors


def _check_pickle(path: Path) -> None:
    """Refuse a pickle that calls anything but what makes tensors, before any of it runs.

    torch's `weights_only` runs a few calls more, with which a small file can take any amount of memory. A zip holds one
    pickle, not compressed; files from before torch 1.6 begin with five, the fourth of which is the state dict.
    """
    with zipfile.ZipFile(path) if zipfile.is_zipfile(path) else path.open("rb") as file:
        pickles = [file] * 5
        if isinstance(file, zipfile.ZipFile):
            entries = file.infolist()
            # torch, unlike Python, finds an entry whatever the case of its name, and the first of two.
            pickles = [file.open(entry) for entry in entries if entry.filename.lower().endswith("/data.pkl")]
            is_plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not is_plain or len(pickles) != 1 or not _has_one_directory(path):
                raise UserError(f"{path}: an archive unlike those of torch.save, expected one of these, not compressed")
        for pickled in pickles:
            for operation, name, _ in pickletools.genops(pickled):
                makes_storage = isinstance(name, str) and re.fullmatch(r"torch \w+Storage", name)
                if operation.name in CALLS and not makes_storage and name not in MAKES_TENSORS:
                    what = f"holds more than weights ({operation.name} {name}) and was not run"
                    raise UserError(f"{path}: {what}, expected a plain state dict, of pickle protocol 2")


def _has_one_directory(path: Path) -> bool:
    """Whether a zip's directory is where both ways lead: back from the end, as Python goes, and the offset told there,
    as torch does. Layout: PKWARE's APPNOTE, 4.3.14 to 4.3.16."""
    with path.open("rb") as file:
        end = file.seek(-22, 2)
        record = file.read()
        size, offset, comment = struct.unpack("<IIH", record[12:])
        file.seek(max(0, end - 76))
        larger = file.read(76)  # the records of zip64, which stand in front where there are any
    if larger[-20:-16] == b"PK\6\7":
        end -= 76
        size, offset = struct.unpack("<QQ", larger[40:56])
        if larger[:4] != b"PK\6\6" or struct.unpack("<Q", larger[-12:-4]) != (end,):
            return False
    return record[:4] == b"PK\5\6" and comment == 0 and offset + size == end
