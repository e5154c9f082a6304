"""`minift chat`: ask a model, from the terminal or a pipe; a reward model may judge its answers, or choose one."""

import math
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from io import TextIOWrapper
from itertools import chain

from minift.commands.cli import CommandParser, add_device_flags, whole_number
from minift.commands.generate import encode_prompts, name_flag
from minift.commands.winrate import rewards_of
from minift.errors import UserError
from minift.files.datasets import Row
from minift.files.language_model import LanguageModel
from minift.files.pretrained import load_judge, load_language_model
from minift.files.text import STDIN, say
from minift.generate import Options
from minift.run.device import placement
from minift.scoring import Judge, vote

INPUT = re.compile(r"^[ \t]*/input(?:[ \t]*\n|[ \t]+|$)", re.MULTILINE)  # between an instruction and its input
SAMPLED = 0.7  # the temperature of several samples, as in best-of


def main(arguments: list[str] | None = None) -> None:
    """Answer each instruction of standard input; on a terminal, a wrong one does not end the command."""
    args = _parser().parse_args(arguments)
    options = _options(args)
    placed = placement(args.device, args.dtype)
    judge = None
    if args.judge is not None:
        judge = load_judge(args.judge, template=args.judge_template, flag="--judge-template", **placed)
    model = load_language_model(args.model, template=args.template, **placed)
    is_typed = sys.stdin is not None and sys.stdin.isatty()
    if is_typed:
        say("Type an instruction, and its input after /input; an empty line ends both. Ctrl-D leaves.", sys.stderr)
    for row in instructions():
        try:
            say(answer(row, model, options, judge) + "\n")
        except UserError as error:
            if not is_typed:
                raise
            say(f"error: {error}\n", sys.stderr)


def instructions() -> Iterator[Row]:
    """Yield the paragraphs of standard input: one or more lines, ended by an empty line or the end of standard input.

    The text after a line that begins with /input is the input of the lines before it.
    """
    stdin = sys.stdin or ()
    if isinstance(stdin, TextIOWrapper):
        stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8: the tokenizer refuses the line
    lines: list[str] = []
    for number, line in enumerate(chain(stdin, [""])):
        if line.strip():
            lines.append(line.rstrip("\n"))
        elif lines:
            instruction, *rest = INPUT.split("\n".join(lines), maxsplit=1)
            row = {"instruction": instruction.rstrip("\n")} | ({"input": rest[0]} if rest and rest[0] else {})
            yield Row(row, f"line {number - len(lines) + 1}")
            lines = []


def answer(row: Row, model: LanguageModel, options: Options, judge: Judge | None) -> str:
    """Return the answer to an instruction; with a judge the sample that its vote chooses, and the reward.

    Raises UserError for an instruction that the model or the judge cannot take.
    """
    if not row["instruction"]:
        raise UserError(f"{STDIN}: {row.location}: expected an instruction before /input")
    max_positions = model.model.config.max_position_embeddings
    prompts = encode_prompts([row], model.tokenizer, model.template, max_positions, options.max_new_tokens, STDIN)
    [completions] = model.complete(prompts, options)
    texts = [model.text_of(row, completion) for completion in completions]
    if judge is None:
        return texts[0]
    [rewards] = rewards_of(judge, [row], [texts])
    if max(rewards) == -math.inf:
        raise UserError("--judge: it can read none of the answers; ask for fewer --max-new-tokens")
    chosen = vote(texts, rewards)
    note = f", chosen of {len(rewards)}" if len(rewards) > 1 else ""
    return f"{texts[chosen]}\n── reward {rewards[chosen]:.2f}{note}"


def _options(args: Namespace) -> Options:
    if args.samples > 1 and args.judge is None:
        raise UserError(f"--samples {args.samples}: a reward model chooses among them: name one with --judge")
    temperature = args.temperature
    if temperature is None:
        temperature = SAMPLED if args.samples > 1 else 0.0
    if args.samples > 1 and not 0 < temperature < math.inf:
        raise UserError(f"--temperature {temperature}: expected a number of at least 1e-9: samples must differ")
    try:
        return Options(args.max_new_tokens, temperature=temperature, num_samples=args.samples, seed=args.seed)
    except ValueError as error:
        raise name_flag(error) from None


def _parser() -> CommandParser:
    about = (
        "Answer the instructions of the terminal or of standard input. An empty line ends an instruction. The text "
        "after /input, on its line and the next ones, is the input: the code or text that the instruction is about."
    )
    parser = CommandParser(
        "minift chat", arguments="--model MODEL [flags]", description=about,
        examples=(
            "--model runs/sft",
            "--model runs/sft --judge runs/rm --samples 8",
            "--model facebook/opt-125m --template dialogue --temperature 0.7",
        ),
    )  # fmt: skip
    add = parser.add_argument_group("models").add_argument
    add("--model", required=True, help="a language model's folder or hub id, such as runs/sft")
    add("--judge", help="a reward model, such as runs/rm: prints the reward of each answer")
    add("--template", help="template of the language model (default: that of its training run, or course)")
    add("--judge-template", help="template of the reward model (default: that of its training run, or dialogue)")
    add = parser.add_argument_group("answers").add_argument
    add(
        "--samples",
        type=whole_number(1),
        default=1,
        help="sample that many answers; a vote weighted by the judge's rewards chooses",
    )
    add("--max-new-tokens", type=whole_number(1), default=128, help="of an answer (default: %(default)s)")
    add("--temperature", type=float, help=f"0 is greedy (default: 0; with --samples {SAMPLED})")
    add("--seed", type=whole_number(0), default=42, help="of sampling (default: %(default)s)")
    add_device_flags(parser, half=False)
    return parser
