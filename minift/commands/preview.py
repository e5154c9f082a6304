"""`minift preview`: what the loss sees of some rows, with their supervised tokens marked, or of some pairs."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from minift.commands import terminal
from minift.commands.cli import CommandParser, check_out, whole_number
from minift.encode import Example, encode_rows
from minift.errors import UserError
from minift.files.datasets import PAIR_SCHEMAS, TRAINING_SCHEMAS, Row, check_row, load_rows
from minift.files.pretrained import find_model
from minift.files.templates import template_of
from minift.files.text import say, write_json_lines
from minift.files.tokenizer import check_fits, load_tokenizer
from minift.files.weights import read_config
from minift.pairs import encode_rankings
from minift.prompts import TEMPLATES, Template
from minift.remarks import Encoded, location_of
from minift.run.setup import check_max_length
from minift.tokenizer import Tokenizer

SCHEMAS = TRAINING_SCHEMAS | PAIR_SCHEMAS


def main(arguments: list[str] | None = None) -> None:
    """Show some rows, write all of them if asked, and print what was kept."""
    args = _parser().parse_args(arguments)
    check_out(args.out, "--data", args.data)
    files = find_model(args.model, fetch_weights=False)
    tokenizer = load_tokenizer(files.tokenizer_folder)
    max_positions = None  # a folder with only a tokenizer is fine too: then nothing limits a row's length
    if (files.folder / "config.json").is_file():
        config, _ = read_config(files.folder)
        check_fits(tokenizer, config.vocab_size, args.model)
        max_positions = config.max_position_embeddings
        if args.max_length is not None:
            check_max_length(args.max_length, max_positions)
    rows = load_rows(args.data, SCHEMAS)
    if check_row(rows[0], SCHEMAS, args.data) in PAIR_SCHEMAS.values():
        _preview_pairs(rows, args, tokenizer, template_of(args.template, files.own, "dialogue"), max_positions)
        return
    encoded = encode_rows(
        rows, tokenizer, template_of(args.template, files.own, "course"), source=args.data,
        max_length=args.max_length, response_template=args.response_template, supervise=args.supervise,
    )  # fmt: skip
    if args.max_length is None and max_positions is not None:
        _check_lengths(encoded, max_positions)
    _write(args.out, encoded, [example._asdict() for example in encoded.examples])
    terminal.show_labels(encoded.examples, tokenizer, args.rows)
    say("\n" + encoded.summary)


def _preview_pairs(
    rows: Sequence[Row], args: Namespace, tokenizer: Tokenizer, template: Template, max_positions: int | None
) -> None:
    """Do the same for pairs or rankings, as train_rm.py encodes them."""
    for flag, is_given in (("--response-template", args.response_template), ("--supervise", args.supervise == "all")):
        if is_given:
            raise UserError(f"{flag}: it is for rows to tune on, and {args.data} has pairs or rankings: leave it out")
    max_length = args.max_length or max_positions or sys.maxsize
    encoded = encode_rankings(rows, tokenizer, template, source=args.data, max_length=max_length)
    _write(args.out, encoded, [{"responses": ranking.responses} for ranking in encoded.examples])
    terminal.show_rankings(encoded.examples, tokenizer, args.rows)
    say("\n" + encoded.summary)


def _write(path: str | None, encoded: Encoded[Any], lines: Sequence[dict[str, Any]]) -> None:
    """Write a line for each row that was kept, with its number in the data set."""
    if path is not None:
        write_json_lines(path, ({"row": row} | line for row, line in zip(encoded.indices, lines, strict=True)))


def _check_lengths(encoded: Encoded[Example], max_positions: int) -> None:
    for row, index, example in zip(encoded.rows, encoded.indices, encoded.examples, strict=True):
        if len(example.input_ids) > max_positions:
            raise UserError(
                f"{encoded.source}: {location_of(row, index)}: {len(example.input_ids)} tokens, more than the model's "
                f"{max_positions} positions; cut such rows with --max-length {max_positions}, or remove them"
            )


def _parser() -> CommandParser:
    parser = CommandParser(
        "minift preview", arguments="--model MODEL --data FILE [flags]",
        description="Show what the loss sees of some rows.",
        examples=(
            "--model data/model --data data/instructions.jsonl --rows 10",
            "--model data/model --data data/pairs.jsonl",
            "--model data/model --data texts.jsonl --response-template 'Answer:' --out ids.jsonl",
        ),
    )  # fmt: skip
    add = parser.add_argument_group("model and rows").add_argument
    add("--model", required=True, help="a model's folder or hub id; its weights are not read")
    add("--data", required=True, metavar="FILE", help="rows to tune on, pairs or rankings: a JSON, JSONL, CSV or "
        "parquet file, or a hub data set")  # fmt: skip
    add = parser.add_argument_group("what the model sees").add_argument
    add("--template", help=f"one of {', '.join(TEMPLATES)}, or a file (default: that of the training run, or "
        "course, for pairs dialogue)")  # fmt: skip
    add("--response-template", help="text before the response in rows of `text` (default: the template's)")
    add("--max-length", type=whole_number(1), help="tokens kept of a row; pairs with a longer side are "
        "dropped (default: all, up to the model's positions)")  # fmt: skip
    add("--supervise", choices=("completion", "all"), default="completion", metavar="TOKENS", help="tokens that count "
        "in the loss: completion or all (default: %(default)s)")  # fmt: skip
    add = parser.add_argument_group("what is shown and written").add_argument
    add("--rows", type=whole_number(0), default=terminal.SHOWN, help="how many rows to show (default: %(default)s)")
    add("--out", metavar="FILE", help="JSONL: input_ids and labels of every row, or the ids of each pair's responses, "
        "best first, after their prompt; `row` counts from 0")  # fmt: skip
    return parser
