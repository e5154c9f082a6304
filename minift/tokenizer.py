"""The byte-level BPE tokenizer of OPT and its relatives, read from the files that stand beside a model.

Text is only ever text here: a row that spells `</s>` gets the tokens of those four characters, not the token that ends
a response. Whoever means the token says so, with a `Special` piece.
"""

import json
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from minift.errors import UserError
from minift.files import read_json, written_whole

FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
# What facebook/opt-350m's tokenizer_config.json says: a vocab.json without one is taken for OPT's.
OPT_SETTINGS = {
    "add_bos_token": True,
    "add_prefix_space": False,
    "bos_token": "</s>",
    "eos_token": "</s>",
    "unk_token": "</s>",
    "pad_token": "<pad>",
    "tokenizer_class": "GPT2Tokenizer",
}


class Special(str):
    """A piece of text that stands for one special token, by its name: `Special("</s>")` is OPT's id 2."""

    __slots__ = ()


class Tokenizer:
    """Text to ids and back, equal to the reference's tokenizer but for special tokens spelled in text (see above).

    `bos_token_id`   what `encode` puts in front of every text, or None: OPT 2, GPT-2 and Galactica None
    `bos_token`      the BOS token's name for templates, or None; GPT-2 has one although `encode` puts none in front
    `eos_token`, `eos_token_id`
    `pad_token_id`   the EOS's id where the tokenizer has no padding token. No batch of minift's holds it, as padding
                     exists only inside attention: it is for the files that others read.
    `vocab_size`     the largest id + 1
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, named: dict[str, str], bos_token_id: int | None, files: dict[str, bytes]
    ):
        self._backend = backend
        self._files = files
        self.bos_token = named.get("bos_token")
        self.bos_token_id = bos_token_id
        self.eos_token = named["eos_token"]
        self.eos_token_id: int = backend.token_to_id(self.eos_token)
        self.pad_token_id: int = backend.token_to_id(named.get("pad_token", self.eos_token))
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str | Sequence[str]) -> list[int]:
        """The ids of a text, or of pieces of one, with the BOS in front where the tokenizer has it so.

        `Special` pieces become their token's id. Neighbouring plain pieces are joined before BPE sees them, so that
        cutting a text into pieces changes nothing. A BOS that the pieces begin with is not doubled.

        Raises ValueError for a lone surrogate, and for a `Special` that the vocabulary doesn't have.
        """
        pieces = [text] if isinstance(text, str) else text
        ids: list[int] = []
        for is_special, run in groupby(pieces, key=lambda piece: isinstance(piece, Special)):
            if is_special:
                ids.extend(self._special_id(piece) for piece in run)
            else:
                ids.extend(self._encode_plain("".join(run)).ids)
        if self.bos_token_id is None or (pieces and isinstance(pieces[0], Special) and ids[0] == self.bos_token_id):
            return ids
        return [self.bos_token_id, *ids]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a plain text, and the characters [start, end) that each came from; the BOS, if any, has (0, 0).

        Tokens that share a character, as those of an emoji may, each have all of it. Raises ValueError as `encode`.
        """
        encoding = self._encode_plain(text)
        if self.bos_token_id is None:
            return encoding.ids, encoding.offsets
        return [self.bos_token_id, *encoding.ids], [(0, 0), *encoding.offsets]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids. Ids that have no token (OPT's 50265 to 50271) give nothing; no space is tidied away."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files this tokenizer was read from, byte for byte, so that transformers reads the same one."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            with written_whole(Path(directory, name)) as unfinished:
                unfinished.write_bytes(content)

    def _encode_plain(self, text: str) -> tokenizers.Encoding:
        try:
            return self._backend.encode(text, add_special_tokens=False)
        except TypeError:
            # tokenizers says no more than "must be str" about half of a UTF-16 pair.
            for place, character in enumerate(text):
                if "\ud800" <= character <= "\udfff":
                    message = f"lone surrogate U+{ord(character):04X} at character {place + 1}: not valid Unicode text"
                    raise ValueError(message) from None
            raise

    def _special_id(self, piece: str) -> int:
        token_id = self._backend.token_to_id(piece)
        if token_id is None:
            raise ValueError(f"the vocabulary has no token {str(piece)!r}")
        return token_id


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a model's directory: tokenizer.json, or else vocab.json + merges.txt.

    tokenizer_config.json and special_tokens_map.json name the special tokens; config.json's `eos_token_id` is asked
    when they don't (Galactica). Whether texts begin with a BOS is for tokenizer.json's own post-processor to say, and
    for `add_bos_token` where there is no tokenizer.json.

    Raises UserError, naming the file, if there is no tokenizer, a file is broken, or no EOS can be found.
    """
    directory = Path(directory)
    files, settings = _read_files(directory)
    try:
        named = {key: _content(settings[key]) for key in NAMED_TOKENS if settings.get(key)}
        if "tokenizer.json" in files:
            backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
        else:
            backend = _byte_level_bpe(directory, settings, set(named.values()))
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"{directory}: the tokenizer's files can't be read: {error}") from None

    if "eos_token" not in named and isinstance(settings.get("eos_token_id"), int):
        named["eos_token"] = backend.id_to_token(settings["eos_token_id"]) or ""
    if backend.token_to_id(named.get("eos_token", "")) is None:
        what = f"{named['eos_token']!r} is not in its vocabulary" if named.get("eos_token") else "none is named"
        raise UserError(f"{directory}: no EOS token: {what}; set eos_token in tokenizer_config.json")
    named = {key: token for key, token in named.items() if backend.token_to_id(token) is not None}

    backend.no_truncation()
    backend.no_padding()
    # Without the flag "special", text that spells the token would become it whatever `encode_special_tokens` says.
    flagged = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    unflagged = sorted(set(named.values()) - flagged)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in unflagged])
    backend.encode_special_tokens = True

    bos_token_id = None
    if "tokenizer.json" in files:
        bos_token_id = _bos_of_post_processor(backend, directory)
    elif settings.get("add_bos_token"):
        if "bos_token" not in named:
            raise UserError(f"{directory}: add_bos_token is set, but no bos_token is named that the vocabulary has")
        bos_token_id = backend.token_to_id(named["bos_token"])
    # `encode` puts the BOS in front by itself. And GPT-2's post-processor trims spaces off the offsets.
    backend.post_processor = None
    return Tokenizer(backend, named, bos_token_id, files)


def check_fits(tokenizer: Tokenizer, vocab_size: int, model_name: str) -> None:
    """Raise UserError if the tokenizer could give an id that the model's embedding, `vocab_size` rows, doesn't have."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{model_name}: its tokenizer doesn't fit: ids go up to {tokenizer.vocab_size - 1}, "
            f"but the model's embedding has {vocab_size} rows; use the tokenizer that came with the model"
        )


def _read_files(directory: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The tokenizer's own files, and what they and config.json say of special tokens."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory, expected one with a tokenizer's files")
    files = {name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}
    default = {}
    if "tokenizer.json" not in files:
        if "vocab.json" not in files or "merges.txt" not in files:
            raise UserError(f"{directory}: no tokenizer here, expected tokenizer.json, or vocab.json and merges.txt")
        default = OPT_SETTINGS
        files.setdefault("tokenizer_config.json", json.dumps(default, indent=2).encode())

    settings = _read_object(directory / "tokenizer_config.json", default)
    token_map = _read_object(directory / "special_tokens_map.json")
    # The reference's precedence: the map is the older format, which `added_tokens_decoder` replaced.
    settings = token_map | settings if "added_tokens_decoder" in settings else settings | token_map
    return files, {"eos_token_id": _read_object(directory / "config.json").get("eos_token_id")} | settings


def _byte_level_bpe(directory: Path, settings: dict[str, Any], named: set[str]) -> tokenizers.Tokenizer:
    """From vocab.json and merges.txt, and from where a tokenizer that was extended lists its tokens beyond these."""
    model = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    lost = [symbol for symbol in pre_tokenizers.ByteLevel.alphabet() if model.token_to_id(symbol) is None]
    if lost:
        raise UserError(
            f"{directory / 'vocab.json'}: {len(lost)} of the 256 byte symbols are missing, so text would be lost; "
            "expected a byte-level BPE vocabulary as OPT's or GPT-2's"
        )
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()

    if "added_tokens_decoder" in settings:
        added = {int(token_id): AddedToken(**token) for token_id, token in settings["added_tokens_decoder"].items()}
    else:
        added = {
            token_id: AddedToken(token, special=token in named, normalized=token not in named)
            for token, token_id in _read_object(directory / "added_tokens.json").items()
        }
    for token_id, token in sorted(added.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise UserError(f"{directory}: the added token {token.content!r} can't have id {token_id}: ids have a gap")
    return backend


def _bos_of_post_processor(backend: tokenizers.Tokenizer, directory: Path) -> int | None:
    """What the post-processor puts in front of a text: one token or none."""
    bare, full = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    if full == bare:
        return None
    if full[1:] == bare:
        return full[0]
    raise UserError(
        f"{directory / 'tokenizer.json'}: its post-processor makes {full} of {bare}; "
        "expected one that adds at most one token in front (minift adds the EOS itself)"
    )


def _read_object(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file's JSON object; the default, or an empty one, where there is no file."""
    return read_json(path, "a tokenizer's file") if path.is_file() else default or {}


def _content(token: str | dict[str, Any]) -> str:
    """A token's name: the files hold either the string itself or an object with it as "content"."""
    name = token["content"] if isinstance(token, dict) else token
    if not isinstance(name, str):
        raise ValueError(f"a special token is {token!r}, expected its text")
    return name
