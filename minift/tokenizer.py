"""The byte-level BPE tokenizer of OPT and its relatives: text to ids and back.

Text is always plain text here: a row that spells `</s>` gets the tokens of those four characters, not the token that
ends a response. The caller asks for that token with a `Special` piece.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import tokenizers


class Special(str):
    """A piece of text that means one special token, by its name: `Special("</s>")` is OPT's id 2."""

    __slots__ = ()


class Tokenizer:
    """Text to ids, equal to transformers' tokenizer except for special tokens spelled in text (see above).

    `bos_token_id`   the id that `encode` puts in front of every text, or None: OPT 2, GPT-2 and Galactica None
    `bos_token`      the BOS token's name for templates, or None; GPT-2 has one although `encode` adds none
    `eos_token`, `eos_token_id`
    `pad_token_id`   the EOS's id if the tokenizer has no padding token. It is used in saved files only: minift's
                     batches have no padding.
    `vocab_size`     the largest id + 1
    `files`          the files it was read from: name → content
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, named: dict[str, str], bos_token_id: int | None, files: dict[str, bytes]
    ) -> None:
        self._backend = backend
        self.files = files
        self.bos_token = named.get("bos_token")
        self.bos_token_id = bos_token_id
        self.eos_token = named["eos_token"]
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.eos_token_id = vocabulary[self.eos_token]
        self._names_pad = "pad_token" in named
        self.pad_token_id = vocabulary[named.get("pad_token", self.eos_token)]
        self.vocab_size = max(vocabulary.values()) + 1

    def encode(self, text: str | Sequence[str]) -> list[int]:
        """Return the ids of a text or of a list of pieces, with the BOS in front if the tokenizer adds one.

        `Special` pieces become their token's id. Neighbouring plain pieces are joined before BPE sees them, so cutting
        a text into pieces changes nothing. If the pieces begin with the BOS, no second one is added.

        Raises ValueError for a lone surrogate, and for a `Special` that the vocabulary doesn't have.
        """
        pieces = [text] if isinstance(text, str) else text
        ids: list[int] = []
        for is_special, run in groupby(pieces, key=lambda piece: isinstance(piece, Special)):
            if is_special:
                for piece in run:
                    token_id = self._backend.token_to_id(piece)
                    if token_id is None:
                        raise ValueError(f"the vocabulary has no token {str(piece)!r}")
                    ids.append(token_id)
            else:
                ids.extend(self._encode_plain("".join(run)).ids)
        if self.bos_token_id is None or (pieces and isinstance(pieces[0], Special) and ids[0] == self.bos_token_id):
            return ids
        return [self.bos_token_id, *ids]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a plain text and the characters [start, end) of each; an added BOS has (0, 0).

        Tokens that share a character, for example the bytes of an emoji, each have all of it. Raises ValueError as
        `encode` does.
        """
        encoding = self._encode_plain(text)
        if self.bos_token_id is None:
            return encoding.ids, encoding.offsets
        return [self.bos_token_id, *encoding.ids], [(0, 0), *encoding.offsets]

    def config_ids(self, pad_token_id: int) -> dict[str, Any]:
        """Return the special ids for the config.json of a model; `pad_token_id` is the one in it so far.

        That one stays if the tokenizer names no padding token and has a special token of this id (Galactica).
        """
        added = self._backend.get_added_tokens_decoder().get(pad_token_id)
        is_kept = not self._names_pad and added is not None and added.special
        ids = {"eos_token_id": self.eos_token_id, "pad_token_id": pad_token_id if is_kept else self.pad_token_id}
        bos_token_id = self.bos_token_id if self.bos_token is None else self._backend.token_to_id(self.bos_token)
        return ids if bos_token_id is None else ids | {"bos_token_id": bos_token_id}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of some ids, every space kept; ids without a token (OPT's 50265 to 50271) add nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def _encode_plain(self, text: str) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code, number = ord(text[error.start]), error.start + 1
            raise ValueError(f"lone surrogate U+{code:04X} at character {number}: not valid Unicode text") from None
        try:
            return self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # the library's errors are bare Exceptions
            raise ValueError(f"the tokenizer cannot encode it: {error}") from None
