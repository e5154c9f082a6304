"""A tokenizer's files in a model's folder: read, saved, and checked against a model."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from minift.errors import UserError
from minift.files.text import MACHINE_ERRORS, atomic_write, parse_json, read_bytes, read_json, read_text
from minift.tokenizer import Tokenizer

FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json")  # fmt: skip
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
# The settings in facebook/opt-350m's tokenizer_config.json: a vocab.json without that file is assumed to be OPT's.
OPT_SETTINGS = {"add_bos_token": True, "add_prefix_space": False, "bos_token": "</s>", "eos_token": "</s>",
    "unk_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "GPT2Tokenizer"}  # fmt: skip

PROBE = "ab 1 é 😀\n)"  # text that every byte-level tokenizer keeps


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read the byte-level BPE tokenizer of a model's folder: tokenizer.json, or else vocab.json and merges.txt.

    tokenizer_config.json and special_tokens_map.json name the special tokens. If they name no EOS (Galactica),
    config.json's `eos_token_id` is used. tokenizer.json's post-processor decides if `encode` adds a BOS; without a
    tokenizer.json, `add_bos_token` does. Raises UserError if a file is missing or broken, or if no EOS is found.
    """
    folder = Path(folder)
    files, settings = _read_files(folder)
    try:
        named = {key: settings[key] for key in NAMED_TOKENS if key in settings}
        if "tokenizer.json" in files:
            text = files["tokenizer.json"].decode("utf-8")
            _check_algorithm(parse_json(text, folder / "tokenizer.json", "a tokenizer", allow_nan=True))
            backend = tokenizers.Tokenizer.from_str(text)
            backend.model.dropout = None  # with BPE dropout, a text would have other ids each time
        else:
            backend = _byte_level_bpe(folder, settings, set(named.values()))
        if "eos_token" not in named:
            eos_token_id = (_read_object(folder / "config.json") | settings).get("eos_token_id")
            by_id = {token_id: token for token, token_id in backend.get_vocab().items()}
            named["eos_token"] = by_id.get(eos_token_id, "") if type(eos_token_id) is int else ""
        backend.no_truncation()
        backend.no_padding()
        if backend.decode(backend.encode(PROBE, add_special_tokens=False).ids).strip() != PROBE:
            raise ValueError("text would be lost, expected byte-level BPE, as of OPT or GPT-2")
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exceptions; its panics are not even Exceptions
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise
        raise UserError(f"{folder}: the tokenizer's files can't be read: {error}") from None

    if backend.token_to_id(named["eos_token"]) is None:
        problem = f"its EOS token is {named['eos_token']!r}, expected one in its vocabulary"
        raise UserError(f"{folder}: {problem}; set eos_token in tokenizer_config.json")
    named = {key: token for key, token in named.items() if backend.token_to_id(token) is not None}
    # `encode_special_tokens` works only for tokens flagged "special": text that spells another would become that token.
    flagged = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    unflagged = sorted(set(named.values()) - flagged)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in unflagged])
    backend.encode_special_tokens = True
    bos_token_id = None
    if "tokenizer.json" in files:
        bos_token_id = _bos_of_post_processor(backend, folder)
    elif settings.get("add_bos_token"):
        if "bos_token" not in named:
            raise UserError(f"{folder}: add_bos_token is set, but no bos_token in its vocabulary")
        bos_token_id = backend.token_to_id(named["bos_token"])
    if bos_token_id not in (None, *backend.get_vocab().values()):
        raise UserError(f"{folder / 'tokenizer.json'}: its BOS has id {bos_token_id}, expected that of a token")
    # `Tokenizer.encode` adds the BOS itself. And GPT-2's post-processor trims spaces off the offsets.
    backend.post_processor = None
    return Tokenizer(backend, named, bos_token_id, files)


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write the files the tokenizer was read from, byte for byte, so that transformers reads the same tokenizer."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files.items():
        with atomic_write(Path(folder, name)) as unfinished:
            unfinished.write_bytes(content)


def check_fits(tokenizer: Tokenizer, vocab_size: int, model_name: str) -> None:
    """Raise UserError if the tokenizer has ids beyond the `vocab_size` rows of the model's embedding."""
    if tokenizer.vocab_size > vocab_size:
        problem = f"ids go up to {tokenizer.vocab_size - 1}, but the model's embedding has {vocab_size} rows"
        raise UserError(f"{model_name}: its tokenizer doesn't fit: {problem}; use the one that came with the model")


def _read_files(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the tokenizer's own files, and what they say about special tokens."""
    files = {name: read_bytes(folder / name) for name in FILES if (folder / name).is_file()}
    settings = _read_object(folder / "tokenizer_config.json")
    if "tokenizer.json" not in files:
        if not {"vocab.json", "merges.txt"} <= files.keys():
            raise UserError(f"{folder}: no tokenizer here, expected tokenizer.json, or vocab.json and merges.txt")
        if "tokenizer_config.json" not in files:
            settings = OPT_SETTINGS
            files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
    token_map = _read_object(folder / "special_tokens_map.json")
    # transformers' precedence: the map is the older format, which `added_tokens_decoder` replaced.
    settings = token_map | settings if "added_tokens_decoder" in settings else settings | token_map
    for key in NAMED_TOKENS:
        if token := settings.pop(key, None):  # a text, or an object with it as "content"
            settings[key] = token.get("content") if isinstance(token, dict) else token
            if not isinstance(settings[key], str):
                raise UserError(f"{folder}: {key} is {token!r}, expected its text")
    return files, settings


def _check_algorithm(values: Any) -> None:
    """Raise ValueError for a tokenizer.json of another algorithm than BPE, before the library, which may panic."""
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ValueError('tokenizer.json: expected an object with a "model"')
    name = values["model"].get("type", "BPE")  # older files do not have it
    name = "SentencePiece" if "'Precompiled'" in str(values.get("normalizer")) else name
    if name != "BPE":
        raise ValueError(f"tokenizer.json: the algorithm is {name}, expected byte-level BPE, as of OPT or GPT-2")


def _byte_level_bpe(folder: Path, settings: dict[str, Any], named: set[str]) -> tokenizers.Tokenizer:
    """Build a tokenizer from vocab.json, merges.txt and the list of added tokens, if there is one."""
    vocabulary, text = _read_object(folder / "vocab.json"), read_text(folder / "merges.txt", "merges", "utf-8")
    if not all(type(token_id) is int and 0 <= token_id < 2**32 for token_id in vocabulary.values()):
        raise UserError(f"{folder / 'vocab.json'}: expected an object from tokens to ids")
    rows = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    merges: list[Any] = [tuple(row.split(" ")) for row in rows if not row.startswith("#version")]
    if odd := [merge for merge in merges if len(merge) != 2]:
        line = " ".join(odd[0])
        raise UserError(f"{folder / 'merges.txt'}: {line!r:.60}, expected two tokens with a blank between them")
    # Not from_file(): the library cannot open every path that Python can.
    model = models.BPE(vocabulary, merges)
    absent = [symbol for symbol in pre_tokenizers.ByteLevel.alphabet() if model.token_to_id(symbol) is None]
    if absent:
        problem = f"{len(absent)} of the 256 byte symbols are missing, so text would be lost"
        raise UserError(f"{folder / 'vocab.json'}: {problem}; expected byte-level BPE, as of OPT or GPT-2")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()

    if "added_tokens_decoder" in settings:
        decoder = settings["added_tokens_decoder"]
        if not isinstance(decoder, dict) or not all(name.isdecimal() for name in decoder):
            raise ValueError(f"added_tokens_decoder is {decoder!r:.60}, expected an object from ids to tokens")
        added = {int(token_id): AddedToken(**token) for token_id, token in decoder.items()}
    else:
        added = {
            token_id: AddedToken(token, special=token in named, normalized=token not in named)
            for token, token_id in _read_object(folder / "added_tokens.json").items()
        }
    for token_id, token in sorted(added.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise UserError(f"{folder}: the added token {token.content!r} can't have id {token_id}: ids have a gap")
    return backend


def _bos_of_post_processor(backend: tokenizers.Tokenizer, folder: Path) -> int | None:
    """Return the one token that tokenizer.json's post-processor adds in front of a text, or None."""
    bare, full = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    if full == bare:
        return None
    if full[1:] == bare:
        return full[0]
    problem = f"its post-processor makes {full} of {bare}, expected it to add at most one token in front"
    raise UserError(f"{folder / 'tokenizer.json'}: {problem} (minift adds the EOS itself)")


def _read_object(path: Path) -> dict[str, Any]:
    """Read a file's JSON object, or return {} if the file does not exist."""
    return read_json(path, "a tokenizer's file") if path.is_file() else {}
