"""Tokens as text: supervised ones marked, special ones and line ends visible, control characters escaped."""

import os
from collections.abc import Sequence
from itertools import groupby
from typing import TextIO

from minift.encode import IGNORE_INDEX, Example
from minift.files.text import printable
from minift.tokenizer import Tokenizer

GREEN, GREY, PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def has_colour(stream: TextIO) -> bool:
    """Return whether to print colours: on terminals, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def mark(example: Example, tokenizer: Tokenizer, colour: bool) -> str:
    """Return an example's text with its supervised stretches marked.

    Neighbouring tokens are decoded together, because a character may consist of several. A character that the mask cuts
    in two is printed as �.
    """
    specials = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    start, end = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    marked = []
    for is_supervised, stretch in groupby(
        zip(example.input_ids, example.labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX
    ):
        text = ""
        for is_special, run in groupby((token for token, _ in stretch), key=lambda token: token in specials):
            if is_special:
                names = [tokenizer.decode([token], skip_special_tokens=False) for token in run]
                text += "".join(f"⟨{printable(name)}⟩" for name in names)
            else:
                text += printable(tokenizer.decode(list(run), skip_special_tokens=False)).replace("\n", "↵\n")
        marked.append(start + text + end if is_supervised else GREY + text + PLAIN if colour else text)
    return "".join(marked)


def token_texts(input_ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return each token as text, special ones between ⟨ and ⟩. A part of a character is �."""
    specials = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in input_ids]
    return [f"⟨{text}⟩" if token in specials else text for token, text in zip(input_ids, texts, strict=True)]


def token_table(example: Example, tokenizer: Tokenizer) -> str:
    """Return an example's tokens with their ids and labels, one a line; supervised tokens are between ⟦ and ⟧."""
    lines = [f"{'id':>6} {'label':>6}  token"]
    for token, label in zip(*example, strict=True):
        text = mark(Example([token], [label]), tokenizer, colour=False).replace("\n", "").replace(" ", "␣")
        lines.append(f"{token:6} {label:6}  {text}")
    return "\n".join(lines)
