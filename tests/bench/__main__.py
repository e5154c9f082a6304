"""`python -m tests.bench`, or `make bench`: minift and what it replaces, timed in turn on the same work, as ratios.

In each round all sides do the same work, one after the other, so that other load on the machine affects all of them. A
line shows the medians, their ratio, and the smallest and largest ratio of a round, which say how far to trust it. Then
each side does the work once more in a process of its own, whose peak memory is shown. The times are never asserted. All
of it is also written as JSON, after each line.

On a GPU each side works at its own best batch size, all in one process, and training is counted in tokens.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import torch
import torch.nn.functional as F
from torch import nn

from data.make.pretrain import initialise
from minift.batching import Loader, collate
from minift.commands.cli import CommandParser, run_command, whole_number
from minift.encode import IGNORE_INDEX, encode_prompt, encode_rows, split_row
from minift.errors import UserError
from minift.files.datasets import PAIR_SCHEMAS, PROMPT_SCHEMAS, load_rows
from minift.files.text import write_json, write_json_lines, write_text
from minift.files.tokenizer import check_fits, load_tokenizer, save_tokenizer
from minift.files.weights import load_model, read_config, save_model
from minift.generate import Options, generate
from minift.model import OPT, OPTConfig
from minift.pairs import collate_rankings, encode_rankings
from minift.prompts import TEMPLATES
from minift.run.device import machine, pick_device
from minift.tokenizer import Tokenizer
from tests.bench import Timing, Work, read_ids
from tests.bench.alone import products_alone
from tests.bench.clock import now
from tests.compare.training import quiet

ROOT = Path(__file__).parents[2]
DATA = ROOT / "data"
SHAPES = {  # of facebook's models: layers, width, heads, feed-forward width, embedding width, pre-LN
    "125m": (12, 768, 12, 3072, 768, True),
    "350m": (24, 1024, 16, 4096, 512, False),
}
NAMES = {  # of the sides
    "ours": "minift",
    "trl_side": "trl",
    "transformers_side": "transformers",
    "ctranslate2_side": "CTranslate2",
    "sacrebleu_side": "sacreBLEU",
}
LINES = {  # what the table calls them
    "sft": "rows, SFT",
    "reward": "pairs, reward model",
    "greedy": "tokens, greedy",
    "beam": "tokens, 4 beams",
    "single": "tokens, one prompt at a time",
    "bleu": "segments, BLEU",
    "startup": "",
}
TRAINING = ("sft", "reward")
ON_GPU = LINES | {"sft": "tokens, SFT", "reward": "tokens, reward model"}
del ON_GPU["bleu"], ON_GPU["startup"]  # their work is a CPU's
MAX_LENGTH = 512  # of a row that is trained on; longer ones are left out
MAX_PROMPT = 256
BEAMS = 4
SHARPNESS = 8  # of the logits: a random model's likeliest token gets a probability of about one half, not 1/1000
SEGMENTS = 2000
BATCH_SIZES = (8, 16, 32, 64)  # rows, of which the fastest is taken for the other sides of generation
GPU_BATCH_SIZES = (16, 32, 64, 128, 256)  # and on a GPU for each side
TRIED_STEPS = 5  # of training, after the warm-up, to try a batch size
SHORTEST = 1000  # rows of the data, repeated with a number, are the rows of `startup`
REFERENCE_ROWS = 20_000  # trl reads no more than that many
OPERATORS = 20  # that --profile prints


class Line(NamedTuple):
    """The work of all sides, and what bounds its speed."""

    name: str
    work: Work
    others: tuple[str, ...]  # sides beside minift's
    bound: str = ""  # "matrix" or "memory": the rate that the share is of
    per_item: Callable[[int], float] | None = (
        None  # operations or bytes, by minift's batch size; None: they are counted
    )


def main(arguments: list[str] | None = None) -> None:
    """Time all sides of each line in turn; print rates, their ratio and its range; write JSON. Or profile minift's."""
    args = _parser().parse_args(arguments)
    started = datetime.now()
    with tempfile.TemporaryDirectory(prefix="minift-bench-") as scratch:
        bench = Bench(args, Path(scratch))
        about = bench.about()
        matrix, memory = (f"{about[f'{bound}_rate'] / 1e9:,.0f}" for bound in ("matrix", "memory"))
        print(f"{args.shape} shape, {args.dtype}, {about['machine']}, {matrix} GFLOP/s of matrix")
        print(f"products, {memory} GB/s; {', '.join(map(' '.join, about['versions'].items()))}", flush=True)
        head = ["a second", "minift", "other", "ratio", "of a round", "GiB", "other", "ratio", "share"]
        if args.profile:
            for line in bench.lines():
                work, _ = bench.fastest("ours", line.work)
                print(bench.titles[line.name], *operators(work), sep="\n", flush=True)
            return
        out = Path(args.out or ROOT / "runs" / "bench" / f"{started:%Y-%m-%d-%H%M%S}-{args.shape}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python -m tests.bench", *(sys.argv[1:] if arguments is None else arguments)])
        written = {"date": f"{started:%Y-%m-%d %H:%M}", "command": command, **about, "lines": list[Any]()}

        def show(results: Iterable[dict[str, Any]]) -> None:
            for result in results:
                print(_row(result), flush=True)
                written["lines"].append(result)
                write_json(out, written)

        if {*bench.only} != {"startup"}:
            print(_columns(head), flush=True)
        for line in bench.lines():
            show(bench.measure(line))
        if "startup" in bench.only:
            print(_columns(["seconds to the first step", *head[1:4], "", *head[5:8], ""]), flush=True)
            show(bench.startups())
    print(out)


class Bench:
    """The models, the data and the rates of the machine, and what is measured with them."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.device, self.on_gpu = pick_device(args.device), args.device == "cuda"
        self.titles = ON_GPU if self.on_gpu else LINES
        self.only = args.only or [*self.titles]
        if missing := [name for name in self.only if name not in self.titles]:
            raise UserError(f"--only {missing[0]}: not on a GPU, expected some of {','.join(ON_GPU)}")
        if args.warm_up >= args.steps:
            raise UserError(f"--warm-up {args.warm_up}: expected fewer than the {args.steps} --steps")
        self.sizes = GPU_BATCH_SIZES if self.on_gpu else BATCH_SIZES
        self.batch_size = args.batch_size or (max(self.sizes) if self.on_gpu else 8)
        self.config = shape_of(args.shape)
        self.tokenizer = load_tokenizer(Path(args.tokenizer or DATA / "model"))
        check_fits(self.tokenizer, self.config.vocab_size, f"--tokenizer {args.tokenizer}, --shape {args.shape}")
        model = OPT(self.config)
        self.products = products(model)
        if {*TRAINING, "startup"} & {*self.only}:
            save(model, self.tokenizer, scratch / "model")
        self.work = Work(
            line="", folder=str(scratch / "model"), data="", batch_size=self.batch_size, scratch=str(scratch),
            max_length=min(MAX_LENGTH, self.config.max_position_embeddings), threads=torch.get_num_threads(),
            device=self.device.type, dtype=args.dtype, warm_up=args.warm_up, is_compiled=args.compile,
            keeps_little=args.gradient_checkpointing,
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        """Return what a reader needs beside the results."""
        packages = ["transformers", "trl", *(["ctranslate2"] if self.has_ctranslate2() else [])]
        return {
            "machine": machine(self.device),
            "versions": {"torch": torch.__version__} | {name: version(name) for name in packages},
            "shape": self.args.shape,
            "dtype": self.args.dtype,
            "data": {name: getattr(self.args, name) or "shipped" for name in ("data", "pairs", "tokenizer")},
            "rounds": self.args.rounds,
            **{f"{bound}_rate": self.rate(bound) for bound in ("matrix", "memory")},
        }

    def lines(self) -> Iterator[Line]:
        """Yield the lines in the order of the table, but not that of the first step."""
        only = self.only
        if "sft" in only:
            yield self.sft_line()
        if "reward" in only:
            yield self.reward_line()
        if {"greedy", "beam", "single"} & {*only}:
            yield from self.generation_lines()
        if "bleu" in only:
            data = self.write("bleu.jsonl", load_rows(DATA / "instructions.jsonl")[:SEGMENTS])
            yield Line("bleu", self.work._replace(line="bleu", data=data), ("sacrebleu_side",))

    def write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> str:
        path = self.scratch / name
        write_json_lines(path, rows)
        return str(path)

    # ---- training ----

    def sft_line(self) -> Line:
        """Train on the first rows of the data that are short enough."""
        source = self.args.data or str(DATA / "instructions.jsonl")
        count = self.args.steps * self.batch_size
        rows = load_rows(source)[: 2 * count]
        encoded = encode_rows(rows, self.tokenizer, TEMPLATES["course"], max_length=None, source=source)
        kept = [
            (row, example)
            for row, example in zip(encoded.rows, encoded.examples, strict=True)
            if len(example.input_ids) <= self.work.max_length
        ][:count]
        check_enough(len(kept), count, f"--data {source}")
        for_all, late, head = self.products
        supervised = sum(label != IGNORE_INDEX for _, example in kept for label in example.labels)
        counts = [len(example.input_ids) if self.on_gpu else 1 for _, example in kept]
        data = self.write("rows.jsonl", [row for row, _ in kept])
        work = self.work._replace(line="sft", data=data, counts=counts)

        def per_item(batch_size: int) -> float:
            batches = Loader([example for _, example in kept], collate, batch_size)
            tokens = sum(len(batch.input_ids) for batch in batches)  # those that rows share once, as they are computed
            return (for_all * tokens + (late + head) * supervised) / sum(counts)

        return Line("sft", work, ("trl_side",), "matrix", per_item)

    def reward_line(self) -> Line:
        """Train on the first pairs that are short enough, half as many in a step as rows: a pair has two."""
        source = self.args.pairs or str(DATA / "pairs.jsonl")
        batch_size = max(1, self.batch_size // 2)
        count = self.args.steps * batch_size
        rows = load_rows(source, PAIR_SCHEMAS)[: 2 * count]
        encoded = encode_rankings(
            rows, self.tokenizer, TEMPLATES["dialogue"], max_length=self.work.max_length, source=source
        )
        check_enough(len(encoded.rows), count, f"--pairs {source}")
        for_all, late, _ = self.products
        rankings = encoded.examples[:count]
        tokens = sum(len(collate_rankings([ranking]).input_ids) for ranking in rankings)
        counts = [sum(map(len, ranking.responses)) if self.on_gpu else 1 for ranking in rankings]
        data = self.write("pairs.jsonl", [dict(row) for row in encoded.rows[:count]])
        work = self.work._replace(line="reward", data=data, batch_size=batch_size, counts=counts)
        operations = (for_all * tokens + 2 * late * count) / sum(counts)
        return Line("reward", work, ("trl_side",), "matrix", lambda _: operations)

    # ---- generation ----

    def generation_lines(self) -> Iterator[Line]:
        """Complete prompts greedily, all at once or one at a time, and with beams; an EOS ends them at many lengths."""
        prompts = self.prompts()
        folder = save(OPT(self.config), self.tokenizer, self.scratch / "varied", varied=True)
        model = load_model(folder, dtype=getattr(torch, self.args.dtype)).to(self.device)
        options = Options(max_new_tokens=self.args.new_tokens)
        eos = end_token([ids for [ids] in generate(model, prompts, options)], self.args.new_tokens)
        read = weight_bytes(model)
        del model
        others = ("transformers_side",)
        if self.has_ctranslate2():
            with quiet():
                importlib.import_module("tests.bench.ctranslate2_side").convert(str(folder))
            others += ("ctranslate2_side",)
        for name, share, beams in (("greedy", 1, 1), ("beam", BEAMS, BEAMS), ("single", 8, 1)):
            if name in self.only:
                path = self.scratch / f"{name}.json"
                write_text(path, json.dumps(prompts[: max(1, len(prompts) // share)]))
                work = self.work._replace(
                    line=name, folder=str(folder), data=str(path), new_tokens=self.args.new_tokens, num_beams=beams,
                    eos=eos, batch_size=1 if name == "single" else max(self.sizes) // beams,
                )  # fmt: skip
                if name == "single":
                    yield Line(name, work, others, "memory", lambda _: read)
                else:
                    yield Line(name, work, others, "" if self.on_gpu else "matrix")

    def has_ctranslate2(self) -> bool:
        """Return whether CTranslate2 is installed and computes in the dtype on this processor; a GPU is not tried."""
        is_there = not self.on_gpu and importlib.util.find_spec("ctranslate2") is not None
        return is_there and self.args.dtype in importlib.import_module("tests.bench.ctranslate2_side").DTYPES

    def prompts(self) -> list[list[int]]:
        source = self.args.data or str(DATA / "heldout.jsonl")
        rows = load_rows(source, PROMPT_SCHEMAS, mixed=True)[: 2 * self.args.prompts]
        encoded = [encode_prompt(row, self.tokenizer, TEMPLATES["course"]) for row in rows]
        kept = [ids for ids in encoded if len(ids) <= MAX_PROMPT][: self.args.prompts]
        check_enough(len(kept), self.args.prompts, f"--data {source}")
        return kept

    # ---- measuring ----

    def measure(self, line: Line) -> Iterator[dict[str, Any]]:
        """Yield a result for each other side of a line, all measured in the same rounds."""
        works, tried = dict[str, Work](), dict[str, dict[int, float]]()
        for side in ("ours", *line.others):
            works[side], tried[side] = self.fastest(side, line.work)
        rounds: list[dict[str, Timing]] = []
        memory: dict[str, int] = {}
        bounds: list[float] = []  # the machine's rate in each round: it changes with the load
        # Each time in a process of its own: train_sft.py sets its allocator. On a GPU to start one takes too long.
        apart = line.name in TRAINING and not self.on_gpu
        for _ in range(self.args.rounds):
            measured = [(self.alone if apart else self.here)(side, work) for side, work in works.items()]
            rounds.append({side: timing for side, (timing, _) in zip(works, measured, strict=True)})
            memory = {side: max(peak, memory.get(side, 0)) for side, (_, peak) in zip(works, measured, strict=True)}
            if line.bound:
                bounds.append(self.rate(line.bound))
        if not apart and not self.on_gpu:
            show = self.args.memory and line.name != "bleu"
            memory = {side: self.alone(side, work)[1] for side, work in works.items() if show}
        rates = {side: [done[side].items / done[side].seconds for done in rounds] for side in works}
        median = {side: statistics.median(rates[side]) for side in works}
        for side in line.others:
            both = ("ours", side)
            ratios = [mine / its for mine, its in zip(rates["ours"], rates[side], strict=True)]
            result: dict[str, Any] = {"line": line.name, "what": self.titles[line.name], "against": NAMES[side]}
            result |= {"median": {NAMES[s]: median[s] for s in both}, "ratio": median["ours"] / median[side]}
            result |= {"lowest_ratio": min(ratios), "highest_ratio": max(ratios)}
            if line.bound and side == line.others[0]:
                counted, alone = self.products_alone(works["ours"]) if line.bound == "matrix" else (0, None)
                cost = line.per_item(works["ours"].batch_size) if line.per_item else counted / rounds[0]["ours"].items
                shares = [rate * cost / bound for rate, bound in zip(rates["ours"], bounds, strict=True)]
                result |= {"share": statistics.median(shares), "share_of": f"{line.bound} rate", "bounds": bounds}
                result |= {"alone": alone} if alone else {}
            if line.name != "bleu":
                result |= {"batch_size": {NAMES[s]: works[s].batch_size for s in both}}
                result |= {"tried": {NAMES[s]: tried[s] for s in both}}
            if memory:
                result |= {"memory": {NAMES[s]: memory[s] for s in both}}
            if rounds[0]["ours"].completions:
                mine, its = ([*map(list, rounds[0][s].completions)] for s in both)
                equal = sum(a == b for a, b in zip(mine, its, strict=True))
                result |= {"prompts": len(mine), "equal_completions": equal}
            yield result | {"rounds": {NAMES[s]: [[done[s].seconds, done[s].items] for done in rounds] for s in both}}

    def products_alone(self, work: Work) -> tuple[int, float | None]:
        """Return the operations of minift's matrix products, and the share of the matrix rate that they reach alone.

        In training they are those of two steps and the evaluation after them. On a GPU nothing is measured.
        """
        if self.on_gpu:
            return 0, None
        if work.line in TRAINING:
            work = work._replace(limit=2 * work.batch_size, warm_up=1)
        with quiet():
            operations, seconds = products_alone(work)
        return operations, operations / seconds / self.rate("matrix")

    def rate(self, bound: str) -> float:
        """Measure the rate of matrix products, in operations a second, or of reading memory, in bytes a second."""
        if bound == "memory":
            return memory_rate(2**30 if self.on_gpu else 2**27, self.device)
        rows, width = (8192, 8192) if self.on_gpu else (1024, self.config.hidden_size)
        return matrix_rate(rows, width, self.device, getattr(torch, self.args.dtype))

    def fastest(self, side: str, work: Work) -> tuple[Work, dict[int, float]]:
        """Return the work with the batch size at which a side is fastest, and the rate at each size that was tried.

        On a CPU only the other sides of generation choose. On a GPU a size is tried with a few steps, or one batch of
        prompts, as long as the memory suffices.
        """
        trains = work.line in TRAINING
        if work.line in ("single", "bleu") or (not self.on_gpu and (trains or side == "ours")):
            return work, {}
        given = self.args.batch_size if side == "ours" else self.args.reference_batch
        items = len(work.counts) or len(read_ids(work))
        rows = 2 if work.line == "reward" else work.num_beams  # of an item
        sizes = sorted({min(items, max(1, size // rows)) for size in ([given] if given else self.sizes)})
        sizes = [size for size in sizes if not trains or size * work.warm_up < items]
        if not sizes:
            raise UserError(f"--steps {self.args.steps}: {NAMES[side]}'s batches end within the warm-up: choose more")
        rates: dict[int, float] = {}
        for size in sizes if len(sizes) > 1 else ():
            limit = size * (work.warm_up + TRIED_STEPS if trains else 1) if self.on_gpu else None
            try:
                timing, _ = self.here(side, work._replace(batch_size=size, limit=limit))
            except torch.OutOfMemoryError:
                break  # larger ones need more
            rates[size] = timing.items / timing.seconds
        return work._replace(batch_size=max(rates, key=rates.__getitem__, default=sizes[0])), rates

    def here(self, side: str, work: Work) -> tuple[Timing, int]:
        """Let a side work in this process; return its time and the GPU's peak memory in bytes, on a CPU 0."""
        if self.on_gpu:
            gc.collect()  # a model that another side left in a cycle
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with quiet():
            timing = run(side, work)
        return timing, torch.cuda.max_memory_allocated() if self.on_gpu else 0

    def alone(self, side: str, work: Work) -> tuple[Timing, int]:
        """Let a side work in a process of its own; return its time and its peak memory in bytes."""
        path = self.scratch / "work.json"
        write_text(path, json.dumps(work._replace(started=time.time())._asdict()))
        command = [sys.executable, "-m", "tests.bench.child", side, str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{side}, {work.line}: {done.stderr[-1000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        return Timing(found["seconds"], found["items"]), found["peak"]

    def startups(self) -> Iterator[dict[str, Any]]:
        """Yield results of the time from a process's start to the end of the first step; each is measured once."""
        for count in self.args.rows:
            data = self.write(f"first-{count}.jsonl", numbered_rows(self.short_rows(), count))
            cache = [f"--encoded-cache={self.scratch / f'encoded-{count}'}"]
            for what, flags in (("", []), (", a new cache", cache), (", from the cache", cache)):
                has_reference = not flags and count <= REFERENCE_ROWS
                work = self.work._replace(line="startup", data=data, flags=flags)
                done = {side: self.alone(side, work) for side in ("ours", *(["trl_side"] if has_reference else []))}
                seconds = {side: timing.seconds for side, (timing, _) in done.items()}
                result: dict[str, Any] = {"line": "startup", "what": f"{count:,} rows{what}"}
                result |= {"median": {NAMES[side]: seconds[side] for side in done}}
                if has_reference:
                    result |= {"against": "trl", "ratio": seconds["trl_side"] / seconds["ours"]}
                yield result | {"memory": {NAMES[side]: peak for side, (_, peak) in done.items()}}

    def short_rows(self) -> list[dict[str, str]]:
        """Return the shortest rows of the data as prompts and completions, which both sides read."""
        rows = load_rows(self.args.data or DATA / "instructions.jsonl")
        rendered = []
        for row in rows:
            prompt, completion = split_row(row, self.tokenizer, TEMPLATES["course"], TEMPLATES["course"].marker)
            rendered.append({"prompt": "".join(prompt), "completion": "".join(completion[:-1])})
        return sorted(rendered, key=lambda row: len(row["prompt"]) + len(row["completion"]))[:SHORTEST]


def operators(work: Work) -> Iterator[str]:
    """Yield the operators, or a GPU's kernels, that take most of minift's time, each with its share; loading counts."""
    activity, on_gpu = torch.profiler.ProfilerActivity, work.device == "cuda"
    with quiet(), torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * on_gpu]) as profiler:
        run("ours", work)
    found = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.key, event.count)
        for event in profiler.key_averages()
        if not on_gpu or (event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation)
    ]
    total, width = sum(own for own, *_ in found), 90 if on_gpu else 50  # the names of kernels are long
    for own, name, count in sorted(found, reverse=True)[:OPERATORS]:
        yield f"  {name:{width}.{width}}{own / total:7.1%}{count:9,} calls"


def run(side: str, work: Work) -> Timing:
    return importlib.import_module(f"tests.bench.{side}").run(work)


def check_enough(found: int, wanted: int, source: str) -> None:
    if found < wanted:
        raise UserError(f"{source}: {found:,} rows are short enough, expected {wanted:,}: choose smaller numbers")


def numbered_rows(rows: Sequence[dict[str, str]], count: int) -> Iterator[dict[str, str]]:
    """Yield `count` rows: those given again and again, each with its own number before its prompt."""
    for number in range(count):
        row = rows[number % len(rows)]
        yield {"prompt": f"{number}\n{row['prompt']}", "completion": row["completion"]}


# ---- models and machines ----


def shape_of(name: str) -> OPTConfig:
    """Return the shape of the shipped model, or of one of facebook's."""
    if name == "tiny":
        return read_config(DATA / "model")[0]
    layers, width, heads, feed_forward, embedding, pre_ln = SHAPES[name]
    return OPTConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, ffn_dim=feed_forward,
        word_embed_proj_dim=embedding, do_layer_norm_before=pre_ln,
    )  # fmt: skip


@torch.no_grad()
def save(model: OPT, tokenizer: Tokenizer, folder: Path, *, varied: bool = False) -> Path:
    """Save a model of random weights with the tokenizer.

    With pre-LN and weights this small, greedy decoding repeats one token for ever, and every token is improbable. With
    `varied`, the layers' weights are larger, so that completions vary, and the logits too, so that beams differ.
    """
    initialise(model, 0)
    if varied:
        if model.config.do_layer_norm_before:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight *= 4
        norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
        norms[-1].weight *= SHARPNESS
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    return folder


def end_token(completions: Sequence[Sequence[int]], longest: int) -> int:
    """Return the token that, as the EOS, would end these completions at the most even lengths from 1 to `longest`."""
    even = [longest * number / len(completions) for number in range(1, len(completions) + 1)]

    def unevenness(token: int) -> float:
        lengths = sorted(ids.index(token) + 1 if token in ids else longest for ids in completions)
        return sum(abs(length - wanted) for length, wanted in zip(lengths, even, strict=True))

    return min(sorted({token for ids in completions for token in ids}), key=unevenness)


def products(model: OPT) -> tuple[int, int, int]:
    """Return the operations of training for each token, for each wanted token in the last layer, and in the head.

    A weight W of n numbers takes 2n in W x, 2n for the gradient of x, and 2n for its own. The last layer's output and
    its feed-forward are computed for wanted tokens only.
    """
    last = model.decoder.layers[-1]
    late = [last.self_attn.out_proj, last.fc1, last.fc2, model.decoder.project_out]
    linears = [module for module in model.decoder.modules() if isinstance(module, nn.Linear)]
    for_all = sum(6 * linear.weight.numel() for linear in linears if linear not in late)
    return for_all, sum(6 * linear.weight.numel() for linear in linears if linear in late), 6 * model.head.numel()


def weight_bytes(model: OPT) -> int:
    """Return the bytes of weights that a decode step reads: every matrix and the head, once."""
    linears = [module for module in model.decoder.modules() if isinstance(module, nn.Linear)]
    return model.head.element_size() * (sum(linear.weight.numel() for linear in linears) + model.head.numel())


def matrix_rate(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations a second of `(rows, width)` times `(width, width)` products."""
    # Random numbers: with equal ones a GPU needs less power, and so is faster than in any real work.
    hidden, weight = (torch.randn(count, width, device=device, dtype=dtype) for count in (rows, width))
    return 2 * hidden.numel() * width * times_a_second(lambda: F.linear(hidden, weight), device)


def memory_rate(count: int, device: torch.device) -> float:
    """Measure the bytes a second in which a large tensor is read."""
    numbers = torch.ones(count, device=device)
    return 4 * numbers.numel() * times_a_second(numbers.sum, device)


def times_a_second(work: Callable[[], Any], device: torch.device) -> float:
    """Return how often something can be done in a second."""
    work()  # the first time starts the threads
    done, started = 0, now(device.type)
    while time.time() - started < 1:
        work()  # a GPU queues about a thousand, then it makes the next one wait
        done += 1
    return done / (now(device.type) - started)


# ---- output and flags ----


def _columns(cells: Sequence[str]) -> str:
    """Return a line of the table, at most 120 columns wide."""
    what, *numbers, share = cells
    widths = (9, 9, 8, 15, 7, 7, 8)
    aligned = [f"{number:>{width}}" for number, width in zip(numbers, widths, strict=True)]
    return f"{what:30}{''.join(aligned)}  {share}".rstrip()


def _row(result: dict[str, Any]) -> str:
    """Return the table's line for a result."""
    against = result.get("against")
    cells = [result["what"] if against != "CTranslate2" else "  against CTranslate2"]
    cells += [f"{result['median'][name]:.1f}" if name in result["median"] else "" for name in ("minift", against)]
    cells.append(f"{result['ratio']:.2f}x" if "ratio" in result else "")
    cells.append(f"{result['lowest_ratio']:.2f} to {result['highest_ratio']:.2f}" if "rounds" in result else "")
    memory = result.get("memory", {})
    cells += [f"{memory[name] / 2**30:.2f}" if name in memory else "" for name in ("minift", against)]
    cells.append(f"{memory['minift'] / memory[against]:.2f}x" if len(memory) == 2 else "")
    beside = f", alone {result['alone']:.0%}" if "alone" in result else f" of the {result.get('share_of')}"
    cells.append(f"{result['share']:.0%}{beside}" if "share" in result else "")
    return _columns(cells)


def _lines(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in LINES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {','.join(LINES)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("python -m tests.bench", description="time minift and what it replaces, in turn")
    add = parser.add_argument
    add("--shape", choices=("tiny", *SHAPES), default="tiny", help="the shipped model's, or one of facebook's, with "
        "random weights (%(default)s)")  # fmt: skip
    add("--only", type=_lines, metavar="LINES", help=f"some of {','.join(LINES)} (all; on a GPU not the last two)")
    add("--data", metavar="FILE", help="rows to train on, and prompts (the shipped ones)")
    add("--pairs", metavar="FILE", help="pairs to train a reward model on (the shipped ones)")
    add("--tokenizer", metavar="FOLDER", help="a tokenizer for them, as OPT's (the shipped one)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where all sides work (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all sides: the weights' in generation, "
        "autocast's in training (%(default)s)")  # fmt: skip
    add("--rounds", type=whole_number(1), default=5, help="how often all sides do their work (%(default)s)")
    add("--steps", type=whole_number(2), default=20, help="steps in a round (%(default)s)")
    add("--warm-up", type=whole_number(1), metavar="STEPS", default=1, help="the first of them, which are not timed "
        "(%(default)s)")  # fmt: skip
    add("--compile", action="store_true", help="compile minift's layers in training, which needs a longer --warm-up")
    add("--gradient-checkpointing", action="store_true", help="train minift with this flag: less memory, more time")
    add("--batch-size", type=whole_number(1), metavar="ROWS", help="rows in a step; half as many pairs (8); on a GPU "
        f"minift's, in generation too (the fastest of {', '.join(map(str, GPU_BATCH_SIZES))})")  # fmt: skip
    add("--reference-batch", type=whole_number(1), metavar="ROWS", help="rows in a batch of the other sides of "
        f"generation (the fastest of {', '.join(map(str, BATCH_SIZES))}); on a GPU of training too")  # fmt: skip
    add("--prompts", type=whole_number(1), default=64, help="prompts; a quarter with beams, an eighth one at a time "
        "(%(default)s)")  # fmt: skip
    add("--new-tokens", type=whole_number(1), default=64, help="at most, of each completion (%(default)s)")
    add("--rows", type=whole_number(1), nargs="+", default=[REFERENCE_ROWS], help="sizes of the data up to the first "
        f"step; trl reads {REFERENCE_ROWS:,} at most (%(default)s)")  # fmt: skip
    add("--profile", action="store_true", help="print which operators minift's time goes to, instead of timing")
    add(
        "--no-memory",
        dest="memory",
        action="store_false",
        help="do not start processes of generation to measure their memory",
    )
    add("--out", metavar="FILE", help="JSON (runs/bench/, named by date and shape)")
    return parser


if __name__ == "__main__":
    run_command(main)
