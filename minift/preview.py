"""What the loss sees: rows with their supervised tokens marked. `python -m minift.preview --model M --data F`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TextIO

from minift.datasets import load_rows
from minift.encode import UNSUPERVISED, Example, encode_rows
from minift.errors import CommandParser, UserError, run_command, whole_number
from minift.files import check_out, read_json, written_whole
from minift.hub import model_folder
from minift.prompts import TEMPLATES, template_of
from minift.tokenizer import Tokenizer, check_fits, load_tokenizer

GREEN, GREY, PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def show(examples: Sequence[Example], tokenizer: Tokenizer, how_many: int, stream: TextIO) -> None:
    """Print the first examples as text: supervised tokens green, or between ⟦ and ⟧ where there is no colour.

    Special tokens stand between ⟨ and ⟩, which tells them from text that spells their names. A ↵ ends a line.
    Colour is for terminals, unless NO_COLOR is set (no-color.org).
    """
    colour = stream.isatty() and not os.environ.get("NO_COLOR")
    supervised = f"{GREEN}green{PLAIN}" if colour else "between ⟦ and ⟧"
    lines = [f"What the loss sees: tokens {supervised} are supervised, ⟨…⟩ is a special token, ↵ a line end."]
    for number, example in enumerate(examples[:how_many], start=1):
        count = sum(label != UNSUPERVISED for label in example.labels)
        lines.append(f"\n── example {number} of {len(examples):,}: {len(example.input_ids)} tokens, {count} supervised")
        lines.append(mark(example, tokenizer, colour))
    stream.write(_encodable("\n".join([*lines, ""]), stream))


def mark(example: Example, tokenizer: Tokenizer, colour: bool) -> str:
    """An example's text with its supervised stretches marked. Neighbouring tokens are decoded together, as a character
    may have several; one cut in two by the mask shows as �."""
    specials = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    open_mark, close_mark = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    marked = []
    for is_supervised, stretch in groupby(
        zip(example.input_ids, example.labels, strict=True), key=lambda pair: pair[1] != UNSUPERVISED
    ):
        text = ""
        for is_special, run in groupby((token for token, _ in stretch), key=lambda token: token in specials):
            if is_special:
                text += "".join(f"⟨{tokenizer.decode([token], skip_special_tokens=False)}⟩" for token in run)
            else:
                text += _spelled_out(tokenizer.decode(list(run), skip_special_tokens=False)).replace("\n", "↵\n")
        marked.append(open_mark + text + close_mark if is_supervised else GREY + text + PLAIN if colour else text)
    return "".join(marked)


def write_examples(examples: Sequence[Example], kept: Sequence[int], path: str) -> None:
    """One JSON line for each example: `row`, its index in the file from 0, `input_ids` and `labels`. All or nothing."""
    with written_whole(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for row, example in zip(kept, examples, strict=True):
            file.write(json.dumps({"row": row, **example._asdict()}) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """The command: show some rows, write all of them if asked, and say what became of each."""
    args = _parser().parse_args(arguments)
    folder = model_folder(args.model)
    tokenizer = load_tokenizer(folder)
    config = _read_config(folder)
    if "vocab_size" in config:
        check_fits(tokenizer, config["vocab_size"], args.model)
    examples, kept, report = encode_rows(
        load_rows(args.data),
        tokenizer,
        template_of(args.template, folder, "course"),
        max_length=args.max_length,
        positions=config.get("max_position_embeddings"),
        response_template=args.response_template,
        supervise=args.supervise,
        source=args.data,
    )
    check_out(args.out, "--data", args.data)
    if args.out is not None:
        write_examples(examples, kept, args.out)
    show(examples, tokenizer, args.rows, sys.stdout)
    print("\n" + "\n".join(report.lines()))


def safe(text: str, stream: TextIO) -> str:
    """Somebody's text as a terminal may have it: control characters, and what `stream` can't encode, spelled out."""
    return _encodable(_spelled_out(text), stream)


def _spelled_out(text: str) -> str:
    # A row must not be able to move the cursor.
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _encodable(text: str, stream: TextIO) -> str:
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _read_config(directory: Path) -> dict[str, int]:
    path = Path(directory, "config.json")
    if not path.is_file():
        return {}
    config = read_json(path, "an OPT's config.json")
    sizes = {name: config[name] for name in ("vocab_size", "max_position_embeddings") if name in config}
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise UserError(f"{path}: {name} is {size!r}, expected a whole number")
    return sizes


def _parser() -> argparse.ArgumentParser:
    about = "Shows what the loss sees of some data."
    parser = CommandParser("python -m minift.preview", description=about)
    parser.add_argument("--model", required=True, help="a model's directory or hub id; its weights are not read")
    parser.add_argument("--data", required=True, help="rows: a JSON, JSONL or parquet file, or a hub data set")
    parser.add_argument("--template", help=f"one of {', '.join(TEMPLATES)}, or a file (the run's own, or course)")
    parser.add_argument("--response-template", help="what the response follows in rows of text (the template's own)")
    parser.add_argument(
        "--max-length", type=whole_number(1), help="tokens kept of a row (all, up to the model's positions)"
    )
    parser.add_argument("--supervise", choices=("completion", "all"), default="completion")
    parser.add_argument("--rows", type=whole_number(0), default=3, help="how many to show")
    parser.add_argument("--out", help="write input_ids and labels of every row to this .jsonl file")
    return parser


if __name__ == "__main__":
    run_command(main)
