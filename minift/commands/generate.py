"""`minift generate`: prompts in, completions out, in the prompts' order.

On a terminal the completions are plain text. In a file or pipe they are JSON lines.
"""

import re
import sys
from argparse import Namespace
from collections.abc import Sequence

from minift.beam import check_beams
from minift.commands.cli import CommandParser, add_device_flags, check_out, whole_number
from minift.config import flag_of
from minift.encode import encode_prompt
from minift.errors import UserError
from minift.files.datasets import PROMPT_SCHEMAS, Row, check_added, load_rows, print_remarks
from minift.files.language_model import LanguageModel
from minift.files.pretrained import load_language_model
from minift.files.text import STDIN, say, write_json_lines
from minift.generate import Completions, Options, check_prompt
from minift.progress import progress_bar
from minift.prompts import TEMPLATES, Template
from minift.remarks import Encoded, unread, wraps_again
from minift.run.device import placement
from minift.tokenizer import Tokenizer

# Fields of `Options` that are flags of the same type and default, by the group that --help shows them in.
FLAGS = {
    "length": {
        "max_new_tokens": "maximum number of tokens in a completion",
        "min_new_tokens": "no end token before that many",
    },
    "beam search": {
        "num_beams": "above 1: beam search",
        "length_penalty": "scores are divided by length to this power",
    },
    "sampling": {
        "top_k": "sample from the k most probable tokens; 0: from all",
        "top_p": "sample from the most probable tokens with total probability p",
        "num_samples": "completions of each prompt, numbered by `sample`; with beams, the best ones",
        "seed": "",
    },
    "repetition": {
        "repetition_penalty": "for tokens that occurred, in the prompt or after; 1: none",
        "no_repeat_ngram_size": "no n tokens in a row twice; 0: any may repeat",
    },
    "speed": {"batch_size": "rows at a time; each beam is a row"},
}


def main(arguments: list[str] | None = None) -> None:
    """Complete the prompts of a file, of standard input or of the command line."""
    args = _parser().parse_args(arguments)
    options = _options(args)
    check_out(args.out, "--prompts", args.prompts or "", hint="; without --out the lines are printed")
    rows, source = _read_prompts(args)
    check_added(rows, ("completion", "token_ids", *(("sample",) if options.num_samples > 1 else ())), source)
    model = load_language_model(args.model, template=args.template, **placement(args.device, args.dtype))
    config, tokenizer, template = model.model.config, model.tokenizer, model.template
    prompts = encode_prompts(rows, tokenizer, template, config.max_position_embeddings, options.max_new_tokens, source)
    try:
        check_beams(options.num_beams, config.vocab_size)  # before the progress bar, which no message should follow
        completions = complete(model, prompts, options, "completions")
    except ValueError as error:
        raise name_flag(error) from None
    texts = texts_of(rows, completions, model)
    if args.out is None and sys.stdout.isatty():
        _print_texts(rows, texts)
        return
    lines = []
    for row, samples, its_texts in zip(rows, completions, texts, strict=True):
        for number, (token_ids, text) in enumerate(zip(samples, its_texts, strict=True)):
            added = {"completion": text, "token_ids": token_ids}
            lines.append(row.given | added | ({"sample": number} if len(samples) > 1 else {}))
    write_json_lines(args.out, lines)


def _read_prompts(args: Namespace) -> tuple[list[Row], str]:
    """Return the rows to complete, and what messages call them."""
    if args.prompt is not None:
        added = {} if args.input is None else {"input": args.input}
        return [Row({"instruction": text} | added, f"{text[:40]!r}") for text in args.prompt[: args.limit]], "--prompt"
    if args.input is not None:
        raise UserError("--input: it belongs to --prompt; rows of --prompts have their own")
    if args.prompts == "-":
        return load_rows(None, PROMPT_SCHEMAS, mixed=True)[: args.limit], STDIN
    return load_rows(args.prompts, PROMPT_SCHEMAS, mixed=True)[: args.limit], args.prompts


def _print_texts(rows: Sequence[Row], texts: Sequence[Sequence[str]]) -> None:
    """Print completions as text, under a title each if there are several."""
    for row, samples in zip(rows, texts, strict=True):
        for number, text in enumerate(samples):
            sample = f", sample {number}" if len(samples) > 1 else ""
            say(text if len(rows) == len(samples) == 1 else f"── {row.location}{sample}\n{text}\n")


def encode_prompts(
    rows: Sequence[Row], tokenizer: Tokenizer, template: Template, max_positions: int, max_new_tokens: int, source: str
) -> list[list[int]]:
    """Return each row's prompt as ids, and print remarks on stderr; `source` is what messages call the rows.

    Raises UserError for a prompt that cannot be encoded or leaves no room for the new tokens.
    """
    prompts: list[list[int]] = []
    seen: Encoded[list[int]] = Encoded(source, "row", len(rows))
    for row in rows:
        try:
            if remark := wraps_again(row, template):
                seen.remark(remark, row.location)
            prompts.append(encode_prompt(row, tokenizer, template))
            check_prompt(prompts[-1], "the prompt", max_new_tokens, max_positions)
        except (ValueError, UserError) as error:
            raise UserError(f"{source}: {row.location}: {error}") from None
        for remark in unread(row):
            seen.remark(remark, row.location)
    print_remarks(seen, sys.stderr)
    return prompts


def complete(
    language_model: LanguageModel, prompts: Sequence[Sequence[int]], options: Options, description: str
) -> Completions:
    """Complete prompts behind a progress bar. Raises ValueError like `generate`."""
    with progress_bar(len(prompts) * options.num_samples, description, "answer") as bar:
        return language_model.complete(prompts, options, bar.update)


def texts_of(rows: Sequence[Row], completions: Completions, language_model: LanguageModel) -> list[list[str]]:
    """Return completions of rows as text."""
    return [
        [language_model.text_of(row, token_ids) for token_ids in samples]
        for row, samples in zip(rows, completions, strict=True)
    ]


def _parser() -> CommandParser:
    parser = CommandParser(
        "minift generate", arguments="--model MODEL (--prompts FILE | --prompt TEXT) [flags]",
        description="Complete prompts: greedy, sampling or beam search.",
        examples=(
            "--model runs/sft --prompt 'Reverse the list `a`.'",
            "--model runs/sft --prompts data/heldout.jsonl --out answers.jsonl",
            "--model runs/sft --prompts rows.csv --num-beams 5 --early-stopping true",
        ),
    )  # fmt: skip
    group = parser.add_argument_group("model and prompts")
    add = group.add_argument
    add("--model", required=True, help="a folder or hub id of a model, or of adapters")
    prompts = group.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompts", metavar="FILE", help='rows of {"prompt": …}, {"instruction": …, "input": …} or '
        '{"messages": […]} for the template; - is standard input, in JSON')  # fmt: skip
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="an instruction; may be given several times")
    add("--input", metavar="TEXT", help="the input of each --prompt")
    add("--limit", type=whole_number(1), metavar="N", help="complete the first N prompts only (default: all)")
    add("--out", metavar="FILE", help="JSONL: the same lines with `completion` and `token_ids` (default: standard "
        "output, where a terminal shows only the text)")  # fmt: skip
    add("--template", help=f"{', '.join(TEMPLATES)}, or a file (default: that of the training run, or course)")
    defaults = Options()
    adds = {}
    for title, meanings in FLAGS.items():
        adds[title] = parser.add_argument_group(title).add_argument
        for name, meaning in meanings.items():
            default = getattr(defaults, name)
            adds[title](
                flag_of(name), type=type(default), default=default, help=f"{meaning} (default: {default})".lstrip()
            )
    adds["beam search"]("--early-stopping", choices=("true", "false", "never"), default="false", metavar="WHEN",
        help="true, false or never: when the search ends (default: %(default)s)")  # fmt: skip
    adds["sampling"]("--temperature", type=float, help="0 is greedy, above 0 tokens are sampled (default: 0, or 1 "
        "where --top-k, --top-p or --num-samples without beams ask for sampling)")  # fmt: skip
    add_device_flags(parser)
    return parser


def _options(args: Namespace) -> Options:
    values = {name: getattr(args, name) for meanings in FLAGS.values() for name in meanings}
    values["early_stopping"] = {"true": True, "false": False, "never": "never"}[args.early_stopping]
    is_sampled = args.num_beams == 1 and (args.top_k != 0 or args.top_p != 1 or args.num_samples > 1)
    values["temperature"] = float(is_sampled) if args.temperature is None else args.temperature
    try:
        return Options(**values)
    except ValueError as error:
        raise name_flag(error) from None


def name_flag(error: ValueError) -> UserError:
    """Return the error with flags for the names of options in it."""
    names = "[a-z]+(_[a-z]+)+|^[a-z]+"
    flagged = re.sub(names, lambda name: flag_of(name[0]) if hasattr(Options, name[0]) else name[0], str(error))
    return UserError(flagged)
