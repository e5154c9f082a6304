"""`minift tour`: ten stops, from a row to an answer and from a pair of answers to a win rate.

Read it as a notebook. A stop calls the functions that its decorator names, on the model and the rows in data/, and
shows what they return. It uses what earlier stops left, so those run too. A value "by hand" is computed here in another
way; if the two differ, the tour ends with status 1.
"""

import json
import math
import sys
from functools import partial
from itertools import pairwise
from os.path import commonprefix

import torch
from torch import Tensor

from minift.batching import Batch, Loader, collate, pack
from minift.bleu import corpus_bleu
from minift.commands.cli import CommandParser, check_out
from minift.commands.flags import PROJECT
from minift.commands.notebook import STOPS, Text, agree, ends, indented, show, spans, stop, table, write_page
from minift.config import Config
from minift.encode import IGNORE_INDEX, encode_completion, encode_prompt, encode_rows
from minift.errors import UserError
from minift.files.datasets import PAIR_SCHEMAS, load_rows
from minift.files.marks import GREEN, PLAIN, has_colour, mark
from minift.files.pretrained import find_model, load_for_rm, load_language_model
from minift.files.text import printable
from minift.generate import Options, generate
from minift.losses import bradley_terry, completion_cross_entropy, next_token_targets
from minift.model import OPT, RewardModel
from minift.optim import adamw, learning_rate
from minift.pairs import PairBatch, collate_rankings, encode_rankings
from minift.prompts import TEMPLATES, end_with_eos, render
from minift.rows import row_layout
from minift.run.setup import set_dropout
from minift.scoring import Z_95, Judge, score_rankings, sigmoid, win_rate
from minift.trainer import Task, evaluate, optimizer_step
from minift.words import words

DATA = PROJECT / "data"
LINES, PAIR_LINE, NUM_PAIRS = (8047, 1406, 10841), 314, 20  # of instructions.jsonl and heldout_pairs.jsonl: short rows
CONFIG = Config(lr=1e-3)
SHAPES = {  # modules of `Decoder`, and what they return
    "embed_tokens": "N × E: a vector for each id",
    "project_in": "N × C",
    "layers.0.self_attn": "N × C: mixed with earlier tokens of the row",
    "layers.0.fc1": "N × 4C: inside the feed-forward",
    "layers.3": "N × C: after the last layer",
    "project_out": "N × E: the hidden states, for the head",
}


class Tour:
    """The stops in order. An attribute is what one stop leaves for later ones."""

    def __init__(self, colour: bool) -> None:
        self.colour = colour
        loaded = load_language_model(DATA / "model")
        self.model, self.tokenizer, self.template = loaded.model, loaded.tokenizer, loaded.template
        set_dropout(self.model, 0.0)  # so that training computes what stop 5 does

    @stop(load_rows, render)
    def prompt(self) -> Text:
        """Turn a row into a prompt."""
        rows = load_rows(DATA / "instructions.jsonl")
        self.rows = [rows[line - 1] for line in LINES]
        row = self.rows[0]
        yield f"{row.location.capitalize()} of data/instructions.jsonl: an instruction, its input, and the output."
        yield from (f"  {field:12} {json.dumps(row[field])}" for field in ("instruction", "input", "output"))
        self.before, response = render(row, self.template, self.tokenizer)
        self.after = end_with_eos(response, self.tokenizer)
        before, after = printable("".join(self.before)), printable("".join(self.after))
        yield f"The prompt without the response, in the template `{self.template.name}`. Answers are generated from it."
        yield indented(before)
        yield "The prompt with the response and the end token. The model is trained on this."
        yield indented(before + self.green(after))

    @stop(encode_completion, mark)
    def labels(self) -> Text:
        """Turn text into tokens, ids and labels."""
        example, _ = encode_completion(self.before, self.after, self.tokenizer)
        yield f"The label is the id if the token counts in the loss, else {IGNORE_INDEX}. ␣ is a blank, ↵ a line end."
        cells = [f"{self.token(token):13}{token:5}{label:6}" for token, label in zip(*example, strict=True)]
        for place, label in enumerate(example.labels):
            cells[place] = cells[place] if label == IGNORE_INDEX else self.green(cells[place])
        height = -(-len(cells) // 3)
        yield from table(f"{'token':13}{'id':>5}{'label':>6}", [cells[i * height :][:height] for i in range(3)])
        yield f"The mask as `minift preview` shows it: supervised tokens {'green' if self.colour else 'in ⟦ ⟧'}."
        yield indented(mark(example, self.tokenizer, self.colour))
        decoded = self.tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
        yield agree("the supervised ids decode to the row's output", self.rows[0]["output"], decoded)

    @stop(encode_rows, collate)
    def packed(self) -> Text:
        """Pack three rows into one flat list."""
        self.examples = encode_rows(self.rows, self.tokenizer, self.template, max_length=None).examples
        self.batch = collate(self.examples)
        paths = [row[row >= 0].tolist() for row in self.batch.rows]
        lengths = [len(path) for path in paths]
        yield (
            f"Rows of {lengths[0]}, {lengths[1]} and {lengths[2]} tokens, end to end. A prefix that several share is "
            f"in the list once: N = {len(self.batch.input_ids)} instead of {sum(lengths)}."
        )
        last = [path[-1] for path in paths]  # each row's own tokens end with it
        own = [end - before for before, end in pairwise([-1, *last])]
        for name in ("input_ids", "positions", "labels"):
            parts = getattr(self.batch, name).split(own)
            yield f"  {name:10}" + "".join(f"| {ends(part.tolist(), 2):20}" for part in parts).rstrip()
        yield f"rows (R, T) = {tuple(self.batch.rows.shape)}: where each row's tokens are in the list, -1 past its end."
        for number, (row, path) in enumerate(zip(self.batch.rows.tolist(), paths, strict=True)):
            pads = ", -1 …" if -1 in row else ""
            yield f"  row {number}   {spans(path)}{pads}"
        yield f"Padded to one length, the rows would have {(self.batch.rows < 0).sum()} pads. Only attention does that."
        yield agree(
            "positions count from 0 in each row",
            [[*range(length)] for length in lengths],
            [self.batch.positions[path].tolist() for path in paths],
        )

    @stop(OPT.forward, row_layout)
    @torch.no_grad()
    def hidden(self) -> Text:
        """Turn ids into hidden states."""
        shapes: dict[str, tuple[int, ...]] = {}

        def keep_shape(name: str, _module: object, _inputs: object, output: Tensor) -> None:
            shapes[name] = tuple(output.shape)

        part = self.model.decoder.get_submodule
        hooks = [part(name).register_forward_hook(partial(keep_shape, name)) for name in SHAPES]
        self.states = self.model(self.batch.input_ids, self.batch.positions, self.batch.rows)  # (N, E)
        for hook in hooks:
            hook.remove()
        yield "The shapes of what the model's parts return for the list of stop 3:"
        yield from (f"  {name:20}{shape!s:12}  {SHAPES[name]}" for name, shape in shapes.items())
        layout = row_layout(self.batch.rows, len(self.batch.input_ids))
        yield (
            f"Inside attention, queries, keys and values are gathered into {len(layout.gather)} cells, rows of "
            f"similar length together, and the result is scattered back to N = {len(layout.scatter)} tokens. No row "
            "sees another: alone it has the same hidden states."
        )
        alone = self.model(*pack([self.examples[1].input_ids]))[-1]
        packed = self.states[self.batch.rows[1].max()]
        yield agree("length of row 1's last vector, alone", alone.norm().item(), packed.norm().item())

    @stop(next_token_targets, completion_cross_entropy)
    @torch.no_grad()
    def loss(self) -> Text:
        """Turn hidden states into a loss."""
        log_p = self.model.logits(self.states).double().log_softmax(1)  # (N, V)
        batch, columns, sums = self.batch, [], []
        for row in batch.rows:
            losses = {}
            for here, after in pairwise(row[row >= 0].tolist()):  # the vector here predicts the token after it
                if batch.labels[after] != IGNORE_INDEX:
                    losses[after] = round(-log_p[here, batch.input_ids[after]].item(), 5)  # as a reader has it
            named = [(self.token(int(batch.input_ids[place])), loss) for place, loss in losses.items()]
            columns.append([f"{name:8.7}{math.exp(-loss):7.2g}{loss:9.5f}" for name, loss in named])
            sums.append(sum(losses.values()))
        yield "The probability p of each supervised token of the three rows, and -log p:"
        yield from table(f"{'token':8}{'p':>7}{'-log p':>9}", columns)
        yield "  " + "  ".join(f"{'sum':8}{each:16.5f}" for each in sums)
        count, total = sum(map(len, columns)), sum(sums)
        yield f"The loss is the mean: {' + '.join(f'{each:.5f}' for each in sums)} = {total:.5f}, divided by {count}."
        self.by_hand = total / count
        wanted, targets = next_token_targets(batch.labels, batch.positions)  # (M,), (M,)
        summed, counted = completion_cross_entropy(self.states[wanted], self.model.head, targets)
        yield agree("the number of supervised tokens", count, int(counted))
        yield agree("loss", self.by_hand, (summed / counted).item())

    @stop(adamw, learning_rate, optimizer_step, evaluate)
    def step(self) -> Text:
        """Take an optimiser step, and compute the loss again."""

        def loss(batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            wanted, targets = next_token_targets(batch.labels, batch.positions)  # (M,), (M,)
            hidden = self.model(batch.input_ids, batch.positions, batch.rows, wanted=wanted)  # (M, E)
            return *completion_cross_entropy(hidden, self.model.head, targets), {}

        batches = Loader(self.examples, collate, batch_size=3)
        task = Task(self.model, loss, batches, batches, write_model=lambda folder: None, unit="supervised_tokens")
        lr = learning_rate(0, CONFIG.lr, "constant", 0, 3)
        optimizer = adamw(self.model, lr)
        weight = self.model.get_parameter("decoder.layers.0.self_attn.v_proj.weight")
        total, count, _ = loss(self.batch)
        gradient, before = torch.autograd.grad(total / count, weight)[0][0, 0].item(), weight[0, 0].item()
        sums, norm = optimizer_step(task, optimizer, CONFIG, 0, lr)
        yield f"The batch is the list of stop 3, and the learning rate lr is {lr}."
        yield agree("loss before the step", self.by_hand, sums["loss"] / sums["count"])
        yield (
            f"The gradient's norm is {norm:.5f}. It is clipped to 1: each component is divided by the norm. "
            "AdamW's first step changes a weight w with the clipped gradient g by -lr · g / (|g| + 1e-8)."
        )
        clipped = gradient * min(1.0, CONFIG.max_grad_norm / norm)
        yield f"  one weight: w = {before:.5f}, gradient {gradient:.7f}, clipped g = {clipped:.7f}"
        yield agree("w after the step", before - lr * clipped / (abs(clipped) + 1e-8), weight[0, 0].item())
        yield f"  loss after the step: {evaluate(task)['loss']:.5f}"
        for number in (1, 2):
            optimizer_step(task, optimizer, CONFIG, number, lr)
        yield f"  loss after two more: {evaluate(task)['loss']:.5f}"

    @stop(encode_prompt, generate)
    @torch.no_grad()
    def answer(self) -> Text:
        """Let the tuned model answer, token by token."""
        ids = encode_prompt(self.rows[0], self.tokenizer, self.template)
        options = Options(max_new_tokens=20, eos_token_id=self.tokenizer.eos_token_id)
        [[new_ids]] = generate(self.model, [ids], options)
        yield f"The prompt has {len(ids)} tokens. The three most probable next ones; greedy decoding takes the first:"
        by_hand: list[int] = []
        while len(by_hand) < min(5, len(new_ids)):
            last = self.model(*pack([ids + by_hand]))[-1:]  # (1, E): all tokens again, without a cache
            top, tokens = self.model.logits(last).softmax(1)[0].topk(3)
            best, *others = [f"{self.token(int(token)):12}{p:.4f}" for p, token in zip(top, tokens, strict=True)]
            by_hand.append(int(tokens[0]))
            yield f"  {len(by_hand)}  " + "     ".join([self.green(best), *others])
        yield agree("`generate`, with its cache of keys and values, takes the same", by_hand, new_ids[:5])
        self.text = self.tokenizer.decode(new_ids)
        yield "The whole answer, after three steps of training on three rows:"
        yield indented(printable(self.text))

    @stop(words, corpus_bleu)
    def compared(self) -> Text:
        """Compare the answer with the reference: BLEU."""
        output = self.rows[0]["output"]
        answer, reference = words(self.text), words(output)
        score = corpus_bleu([self.text], [[output]], smooth_method="none")
        yield "BLEU compares words. The reference is the row's output."
        yield f"  answer     {printable(' '.join(answer))}\n  reference  {' '.join(reference)}"
        yield "An n-gram of the answer matches at most as often as it occurs in the reference."
        matches, totals, product = list[int](), list[int](), 1.0
        for n in (1, 2, 3, 4):
            found, allowed = ([*zip(*(side[i:] for i in range(n)), strict=False)] for side in (answer, reference))
            matching = {gram: min(found.count(gram), allowed.count(gram)) for gram in found}
            too_many = " | ".join(" ".join(gram) for gram in matching if matching[gram] < found.count(gram)) or "none"
            matches.append(sum(matching.values()))
            totals.append(len(found))
            product *= matches[-1] / max(1, len(found))
            yield f"  {n}-grams: {matches[-1]} of {len(found)} match; too many: {printable(too_many)[:40]}"
        yield agree("matches and totals", (matches, totals), (score.counts, score.totals))
        brevity = min(1.0, math.exp(1 - len(reference) / max(1, len(answer))))
        yield (
            "BLEU is 100 times the fourth root of the four fractions' product, times the brevity penalty: "
            f"{brevity:.5f} for {len(answer)} words against {len(reference)}."
        )
        yield agree("BLEU", 100 * product**0.25 * brevity, score.score)

    @stop(load_rows, encode_rankings, collate_rankings, RewardModel.rewards, Judge.score)
    @torch.no_grad()
    def rewards(self) -> Text:
        """Turn two answers into two rewards."""
        rows, names = load_rows(DATA / "heldout_pairs.jsonl", PAIR_SCHEMAS), ("chosen", "rejected")
        self.row = pair = rows[PAIR_LINE - 1]
        yield f"{pair.location.capitalize()} of data/heldout_pairs.jsonl: a prompt, the better and the worse answer."
        yield from (f"  {field:10} {json.dumps(pair[field])}" for field in ("prompt", *names))
        model, tokenizer = load_for_rm(find_model(DATA / "model"), seed=CONFIG.seed)
        set_dropout(model, 0.0)
        self.judge = Judge(model, tokenizer, TEMPLATES["dialogue"])
        rankings = encode_rankings([pair, *rows[:NUM_PAIRS]], tokenizer, self.judge.template, max_length=256).examples
        self.pair, *self.others = rankings
        batch = collate_rankings([self.pair])
        lengths, shared = [len(ids) for ids in self.pair.responses], len(commonprefix(self.pair.responses))
        yield (
            f"The template is `dialogue`. Both rows begin with the same {shared} tokens, the prompt and more. The list "
            f"has them once: N = {lengths[0]} + {lengths[1]} - {shared} = {len(batch.input_ids)}."
        )
        for name, row in zip(names, batch.rows, strict=True):
            yield f"  {name:10} {ends(row[:shared].tolist(), 2)} | {' '.join(map(str, row[shared:].tolist()))}"
        yield "A reward is the product of a row's last hidden state h and the head's vector w, which is random so far."
        hidden = model.decoder(batch.input_ids, batch.positions, batch.rows)  # (N, E)
        rewards = model(batch.input_ids, batch.positions, batch.rows).tolist()  # R of them
        w = model.score.weight[0].tolist()
        self.both = [round(reward, 5) for reward in rewards]  # as a reader has them
        for name, row, reward in zip(names, batch.rows, rewards, strict=True):
            h = hidden[row.max()].tolist()
            first = " + ".join(f"{a:.3f} · {b:.3f}" for a, b in zip(h[:3], w[:3], strict=True))
            yield f"  {name:10} {first} + … ({len(w)} products)"
            by_hand = sum(a * b for a, b in zip(h, w, strict=True))
            yield agree(f"reward of the {name} answer", by_hand, reward)
            yield agree("the same through `Judge.score`", by_hand, self.judge.score(pair["prompt"], pair[name]))

    @stop(bradley_terry, sigmoid, Judge.best_of, win_rate, optimizer_step)
    def preference(self) -> Text:
        """Turn rewards into a loss and a win rate."""
        model, (chosen, rejected) = self.judge.model, self.both

        def loss(batch: PairBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            rewards = model(batch.input_ids, batch.positions, batch.rows)  # (R,)
            return *bradley_terry(rewards[batch.chosen], rewards[batch.rejected], batch.margins, batch.weights), {}

        batches = Loader([self.pair], collate_rankings, batch_size=1)
        task = Task(model, loss, batches, batches, write_model=lambda folder: None, unit="pairs")
        yield (
            "Bradley and Terry: the chosen answer is preferred with the probability e^c / (e^c + e^r), where c and r "
            "are the rewards. This equals σ(c - r) with σ(x) = 1 / (1 + e^-x)."
        )
        strength, other = math.exp(chosen), math.exp(rejected)
        yield f"  c - r = {chosen - rejected:.5f}, e^c = {strength:.5f}, e^r = {other:.5f}"
        yield agree("σ(c - r)", strength / (strength + other), sigmoid(chosen - rejected))
        yield agree("loss, -log σ(c - r)", -math.log(strength / (strength + other)), evaluate(task)["loss"])
        optimizer_step(task, adamw(model, CONFIG.lr), CONFIG, 0, CONFIG.lr)
        after = evaluate(task)["loss"]
        yield f"  loss after one step of training on this pair: {after:.5f}"
        best = self.judge.best_of(self.row["prompt"], [self.row["chosen"], self.row["rejected"]])
        yield (
            "Equal rewards have the loss log 2 = 0.69315. With a lower loss, the chosen answer has the higher reward; "
            "with a higher loss, the rejected one. `Judge.best_of` returns the number of the answer with the highest "
            "reward."
        )
        yield agree("its number, 0 for the chosen answer and 1 for the rejected one", int(after > math.log(2)), best)
        scored = score_rankings(model, self.others, batch_size=32)
        rate = win_rate([chosen - rejected for chosen, rejected in scored])
        yield f"The win rate of the chosen answers in the file's first {rate.pairs} pairs, with Wilson's 95% interval:"
        yield agree("wins", sum(chosen > rejected for chosen, rejected in scored), rate.wins)
        yield f"  {rate.wins} / {rate.pairs} = {rate.rate:.5f}, between {rate.low:.5f} and {rate.high:.5f}"
        yield f"  at both ends p, |rate - p| = z √(p(1 - p) / n), with z = {Z_95:.5f}"
        for p in (rate.low, rate.high):
            yield agree(f"p = {p:.5f}", Z_95 * math.sqrt(p * (1 - p) / rate.pairs), abs(rate.rate - p))

    def green(self, text: str) -> str:
        """Return text in the colour of supervised and chosen tokens."""
        return GREEN + text + PLAIN if self.colour else text

    def token(self, token: int) -> str:
        """Return a token's text with visible blanks."""
        text = printable(self.tokenizer.decode([token], skip_special_tokens=False))
        return text.replace(" ", "␣").replace("\n", "↵")


def main(arguments: list[str] | None = None) -> None:
    """Show the stops, or write them to a page."""
    parser = CommandParser("minift tour", description="See a row become an answer, and two answers rewards.")
    add, most = parser.add_argument, len(STOPS)
    add("--stop", type=int, choices=range(1, most + 1), metavar="N", help=f"show only this one, 1 to {most}")
    add("--pause", action="store_true", help="wait for Enter between stops")
    add("--html", metavar="FILE", help="write a page instead")
    args = parser.parse_args(arguments)
    if args.pause and not (sys.stdin and sys.stdin.isatty()):
        raise UserError("--pause: standard input is not a terminal, so nobody can press Enter: leave the flag out")
    check_out(args.html, "the tour", str(DATA / "instructions.jsonl"), own_flag="--html")
    if args.html is None:
        show(Tour(has_colour(sys.stdout)), args.stop, pause=args.pause)
    else:
        write_page(Tour(colour=True), args.stop, args.html)
