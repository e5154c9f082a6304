"""The benchmark runs every line, reads the data it is given, and writes table and JSON. Tests do not assert times."""

import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from minift.batching import Loader, collate
from minift.commands.flags import parse
from minift.encode import encode_rows
from minift.files.datasets import load_rows
from minift.files.tokenizer import load_tokenizer
from minift.files.weights import load_model
from minift.model import OPT, RewardModel, last_tokens
from minift.pairs import Ranking, collate_rankings
from minift.prepacked import product
from minift.prompts import TEMPLATES
from tests.bench import Timing, Work, ours, peak_memory, trl_side
from tests.bench import __main__ as bench
from tests.bench.alone import Products
from tests.bench.clock import step_ends, time_of_steps
from tests.loop import rm_loss, sft_loss
from tests.reference import random_examples
from tests.runs import SHIPPED, SMALL_OPT, user_error, write_lines

MATRIX_RATE, MEMORY_RATE = bench.matrix_rate, bench.memory_rate
ROWS = [dict(row) for row in load_rows(bench.DATA / "heldout.jsonl")[:8]]
PAIRS = [{"prompt": f"Add {number}.", "chosen": f"x + {number}", "rejected": "x"} for number in range(4)]
SIZES = ["--rounds", "2", "--steps", "2", "--batch-size", "4", "--prompts", "8", "--new-tokens", "3"]


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not measure the machine, which takes seconds."""
    monkeypatch.setattr(bench, "matrix_rate", lambda *_: 1e11)
    monkeypatch.setattr(bench, "memory_rate", lambda *_: 1e10)


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    data, pairs = write_lines(tmp_path / "rows.jsonl", ROWS), write_lines(tmp_path / "pairs.jsonl", PAIRS)
    return [*SIZES, "--data", str(data), "--pairs", str(pairs), "--out", str(tmp_path / "new" / "bench.json")]


def start_once(self: bench.Bench, side: str, work: Work, alone: Callable = bench.Bench.alone) -> tuple[Timing, int]:
    """Start train_sft.py alone; train here; with a cache only see that the flag is there: each start takes seconds."""
    if work.line != "startup":
        return bench.run(side, work), 2**27
    if not work.flags:
        return alone(self, side, work)
    assert (side, parse("sft", work.flags).encoded_cache) == ("ours", str(self.scratch / "encoded-6"))
    return Timing(1.0, 1), 2**27


def test_a_profile_has_the_operators_of_a_step(tmp_path, capsys):
    bench.main(["--profile", "--only", "sft", "--steps", "2", "--batch-size", "2", "--out", str(tmp_path / "none")])
    _, _, what, *operators = capsys.readouterr().out.splitlines()
    assert what == "rows, SFT" and len(operators) == bench.OPERATORS and not [*tmp_path.iterdir()]
    split = [line.rsplit(maxsplit=3) for line in operators]
    found = {name.strip(): (float(share[:-1]), int(calls.replace(",", ""))) for name, share, calls, _ in split}
    assert found["aten::_fused_adamw_"][1] == 4  # two groups of parameters, in two steps
    shares = [share for share, _ in found.values()]
    assert found["aten::mm"][0] > 5 and shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100.1


def test_every_line_is_printed_and_written(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "REFERENCE_ROWS", 0)  # trl's process would take seconds
    monkeypatch.setattr(bench.Bench, "alone", start_once)
    monkeypatch.setattr(bench.Bench, "has_ctranslate2", lambda _: False)
    bench.main([*flags, "--no-memory", "--rows", "6"])
    printed = capsys.readouterr().out.splitlines()
    head, packages, columns, *lines, first, startup, new, kept, path = printed
    assert head.startswith("tiny shape, float32, ") and "trl 1.16.0" in packages
    assert max(map(len, printed[:-1])) <= 120 and columns.startswith("a second ") and first.startswith("seconds to ")
    number = r"[\d.]+"
    for line in lines:
        found = re.fullmatch(rf"(.{{30}}) *({number}) +({number}) +({number})x +({number}) to ({number})(  .*)?", line)
        assert found, line
        assert float(found[5]) <= float(found[4]) + 0.01 <= float(found[6]) + 0.02
    whats = [what for name, what in bench.LINES.items() if name != "startup"]
    assert [line[:30].strip() for line in lines] == whats
    whats = ("6 rows", "6 rows, a new cache", "6 rows, from the cache")
    for what, line in zip(whats, (startup, new, kept), strict=True):
        assert re.fullmatch(rf"{what} +{number} +{number}", line)

    written = json.loads(Path(path).read_text())
    assert path == str(tmp_path / "new" / "bench.json")
    assert {"date", "command", "machine", "versions", "matrix_rate", "memory_rate"} < written.keys()
    assert written["data"] == {"data": flags[-5], "pairs": flags[-3], "tokenizer": "shipped"}
    results = {result["line"]: result for result in written["lines"]}
    assert [*results] == [*bench.LINES]
    for name, items in (("sft", 4), ("reward", 2), ("bleu", bench.SEGMENTS)):
        rounds = results[name]["rounds"]
        assert len(rounds) == 2 and all([found[1] for found in side] == [items] * 2 for side in rounds.values())
    for name, prompts in (("greedy", 8), ("beam", 2), ("single", 1)):
        assert results[name]["prompts"] == results[name]["equal_completions"] == prompts
        assert results[name]["against"] == "transformers" and results[name]["batch_size"]["transformers"] == min(
            prompts, 8
        )
    for side in results["greedy"]["rounds"].values():
        assert all(tokens < 8 * 3 for _, tokens in side)  # the EOS occurs, and what pads a row after it does not count
    assert results["sft"]["share_of"] == "matrix rate" and results["single"]["share_of"] == "memory rate"
    assert {name for name, result in results.items() if "alone" in result} == {"sft", "reward", "greedy", "beam"}
    first = next(result for result in written["lines"] if result["line"] == "startup")
    assert first["memory"]["minift"] > 2**26  # of a process that has imported torch


def test_each_side_works_once_more_for_its_memory(flags, monkeypatch, capsys):
    monkeypatch.setattr(bench.Bench, "has_ctranslate2", lambda _: False)
    asked: list[tuple[str, Work]] = []
    peaks = {"ours": 3 * 2**30, "transformers_side": 4 * 2**30}
    monkeypatch.setattr(bench.Bench, "alone", lambda _, *what: asked.append(what) or (Timing(1.0, 1), peaks[what[0]]))
    bench.main([*flags, "--only", "single,bleu"])
    assert [(side, work.line) for side, work in asked] == [("ours", "single"), ("transformers_side", "single")]
    single, bleu, _ = capsys.readouterr().out.splitlines()[3:]
    assert re.search(r" to [\d.]+ +3.00 +4.00 +0.75x  \d+% of the memory rate$", single)
    assert bleu.startswith("segments, BLEU ") and "GiB" not in bleu and len(bleu) < 90


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `--device cuda` mean the CPU, with batches of sizes that suit it."""
    monkeypatch.setattr(bench, "pick_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(bench, "GPU_BATCH_SIZES", (1, 2, 4))
    monkeypatch.setattr(gc, "collect", lambda: 0)  # with pytest's objects it takes a third of a second
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)


def test_on_a_gpu_each_side_has_its_own_batch_size(flags, fake_gpu, monkeypatch):
    """trl's batches of 2 rows do not fit into the memory. A size is tried with the warm-up and five steps, or once."""
    done: dict[str, list[tuple[str, int, int | None]]] = {}

    def work_fast(side: str, work: Work) -> Timing:
        done.setdefault(work.line, []).append((side, work.batch_size, work.limit))
        if side == "trl_side" and work.batch_size == 2:
            raise torch.OutOfMemoryError
        return Timing(1 / work.batch_size, 1)

    monkeypatch.setattr(bench, "run", work_fast)
    del flags[(at := flags.index("--batch-size")) : at + 2]
    bench.main([*flags, "--device", "cuda", "--only", "sft,greedy,single"])
    assert done["sft"][:3] == [("ours", 1, 6), ("ours", 2, 12), ("ours", 4, 24)]
    assert done["sft"][3:5] == [("trl_side", 1, 6), ("trl_side", 2, 12)]
    assert done["sft"][5:] == [("ours", 4, None), ("trl_side", 1, None)] * 2
    assert done["greedy"][3:6] == [("transformers_side", size, size) for size in (1, 2, 4)]
    sft, *_ = json.loads(Path(flags[-1]).read_text())["lines"]
    assert sft["tried"] == {"minift": {"1": 1, "2": 2, "4": 4}, "trl": {"1": 1}}
    assert done["single"] == [("ours", 1, None), ("transformers_side", 1, None)] * 2


def test_on_a_gpu_every_side_works_in_bfloat16(flags, fake_gpu, monkeypatch, capsys):
    dtypes: dict[str, set[Any]] = {}

    def watch(owner: Any, name: str, dtype: Callable) -> None:
        def watched(*arguments: Any, **values: Any) -> Any:
            dtypes.setdefault(name, set()).add(dtype(*arguments, **values))
            return function(*arguments, **values)

        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, watched)

    compiled: list[OPT | RewardModel] = []
    monkeypatch.setattr(ours, "compile_layers", compiled.append)
    watch(ours, "train", lambda task, *_: task.dtype)
    watch(trl_side, "make_trainer", lambda *_, bf16, **__: bf16)
    watch(ours, "generate", lambda model, *_: model.head.dtype)
    watch(ours, "beam_search", lambda model, *_: model.head.dtype)
    watch(transformers.OPTForCausalLM, "generate", lambda model, **_: model.dtype)
    flags += ["--rounds", "1", "--reference-batch", "2", "--compile"]  # no size is tried
    bench.main([*flags, "--device", "cuda", "--dtype", "bfloat16"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("tiny shape, bfloat16, ")
    assert [line[:30].strip() for line in printed[3:-1]] == [*bench.ON_GPU.values()]
    assert all(re.search(r" 1\.00 +1\.00 +1\.00x", line) for line in printed[3:-1])  # GiB
    results = {result["line"]: result for result in json.loads(Path(printed[-1]).read_text())["lines"]}
    rows = encode_rows(ROWS, load_tokenizer(SHIPPED), TEMPLATES["course"], max_length=None).examples
    tokens = [len(ids) for ids, _ in rows]
    rounds = {side: items for side, [[_, items]] in results["sft"]["rounds"].items()}
    assert rounds == {"minift": sum(tokens[4:]), "trl": sum(tokens[2:])}
    sizes = {name: [*result["batch_size"].values()] for name, result in results.items()}
    assert len(compiled) == 2  # of both lines that train
    bfloat16 = {torch.bfloat16}
    assert dtypes == {"train": bfloat16, "make_trainer": {True}, "generate": bfloat16, "beam_search": bfloat16}
    assert sizes == {"sft": [4, 2], "reward": [2, 1], "greedy": [4, 2], "beam": [1, 1], "single": [1, 1]}


def test_a_gpu_is_waited_for_where_a_time_is_read(monkeypatch):
    weight = torch.ones(1, requires_grad=True)
    optimizer, waited = torch.optim.SGD([weight]), list[int]()
    work = Work("sft", "", "", batch_size=2, counts=[5, 6, 7, 8, 9, 10, 11], warm_up=2, device="cuda")
    with step_ends(work) as ends:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(len(ends) + 1))
        for _ in range(4):
            optimizer.step()
    optimizer.step()
    assert waited == [2, 4] and len(ends) == 4
    assert time_of_steps(work, [1.0, 2.0, 4.0, 7.0]) == Timing(5.0, 9 + 10 + 11)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--device", "cuda", "--only", "sft,startup"], "--only startup: not on a GPU, expected some of sft,reward,"),
        (
            ["--device", "cuda", "--batch-size", "2", "--reference-batch", "4"],
            "--steps 2: trl's batches end within the",
        ),
        (["--steps", "2", "--warm-up", "2"], "--warm-up 2: expected fewer than the 2 --steps"),
    ],
)
def test_what_a_gpu_does_not_take_is_named(flags, fake_gpu, wrong, message):
    assert message in user_error(bench.main, [*flags, *wrong])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--steps", "3"], "rows.jsonl: 8 rows are short enough, expected 12: choose smaller numbers"),
        (["--only", "greedy", "--prompts", "9"], "rows.jsonl: 8 rows are short enough, expected 9"),
        (["--only", "reward", "--steps", "3"], "pairs.jsonl: 4 rows are short enough, expected 6"),
        (["--only", "sft,speed"], "--only: 'speed': expected some of sft,reward,"),
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_what_does_not_suffice_is_named(flags, wrong, message):
    assert message in user_error(bench.main, [*flags, *wrong])


def products_of(work) -> int:
    """Return the operations of the matrix products in some work, without those of attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for name, count in counts.items() if str(name).split(".")[-1] in ("mm", "addmm"))


def test_products_are_those_that_torch_counts():
    lengths = (9, 5, 12)
    model, batch = OPT(SMALL_OPT), collate(random_examples(lengths))
    for_all, late, head = bench.products(model)
    supervised = int((batch.labels != -100).sum()) - len(lengths)  # the first token of a row is not predicted
    expected = for_all * sum(lengths) + (late + head) * supervised
    assert products_of(lambda: sft_loss(model)(batch)[0].backward()) == expected

    judge, pairs = RewardModel(SMALL_OPT), collate_rankings([Ranking([[2, 5, 6, 7, 2], [2, 5, 8, 2]])])
    assert len(last_tokens(pairs.rows)) == 2 and len(pairs.input_ids) == 7
    score = 6 * 2 * judge.score.weight.numel()
    counted = products_of(lambda: rm_loss(judge)(pairs)[0].backward())
    assert counted == 7 * for_all + 2 * late + score


def test_products_alone_are_all_of_them():
    model, batch = OPT(SMALL_OPT), collate(random_examples((9, 5, 12)))
    with Products() as products, torch.no_grad():
        product(torch.ones(5, 3), torch.ones(5))(torch.ones(7, 3))  # by a prepacked copy
    assert [cost * count for _, cost, count in products.found.values()] == [2 * 7 * 5 * 3]
    with Products() as products:
        sft_loss(model)(batch)[0].backward()
    assert sum(cost * count for _, cost, count in products.found.values()) == products_of(
        lambda: sft_loss(model)(batch)[0].backward()
    )
    assert sum(count for *_, count in products.found.values()) > len(products.found)
    for call, cost, _ in products.found.values():
        assert cost % (2 * call().numel()) == 0


def test_the_share_of_the_matrix_rate_counts_a_shared_prefix_once(flags, tmp_path):
    args = bench._parser().parse_args(flags)
    (tmp_path / "scratch").mkdir()
    line = bench.Bench(args, tmp_path / "scratch").sft_line()
    rows = encode_rows(ROWS, load_tokenizer(SHIPPED), TEMPLATES["course"], max_length=None).examples
    batches, loss = [*Loader(rows, collate, 4)], sft_loss(load_model(Path(line.work.folder)))
    assert sum(len(batch.input_ids) for batch in batches) < sum(len(ids) for ids, _ in rows)
    assert 8 * line.per_item(4) == sum(products_of(lambda batch=batch: loss(batch)[0].backward()) for batch in batches)


def test_the_end_token_ends_completions_at_even_lengths():
    completions = [[7, 9, 9, 9], [9, 7, 5, 5], [5, 5, 7, 9], [5, 9, 9, 9]]
    assert bench.end_token(completions, 4) == 7  # after 1, 2, 3 and 4 tokens; 9 would after 2, 1, 4 and 2


def test_rates_count_operations_and_bytes_of_a_second(monkeypatch):
    clock = iter([0.0, 0.0, 0.4, 0.8, 1.2, 1.6])
    monkeypatch.setattr("time.time", lambda: next(clock))  # each work takes 0.4 s, and the last one ends at 1.6
    assert bench.times_a_second(lambda: None, torch.device("cpu")) == pytest.approx(3 / 1.6)

    done: list[torch.Tensor | float] = []
    monkeypatch.setattr(bench, "times_a_second", lambda work, device: done.append(work()) or 10)
    assert MATRIX_RATE(3, 5, torch.device("cpu"), torch.float64) == 10 * 2 * 3 * 5 * 5
    assert MEMORY_RATE(7, torch.device("cpu")) == 10 * 4 * 7
    assert done[0].shape == (3, 5) and done[0].dtype == torch.float64 and done[1] == 7


def test_peak_memory_is_that_of_one_process():
    """`ru_maxrss` of a child that has just started is that of its parent."""
    numbers = torch.ones(2**26)  # 256 MiB
    command = [sys.executable, "-c", "from tests.bench import peak_memory; print(peak_memory())"]
    child = int(subprocess.run(command, cwd=bench.ROOT, capture_output=True, check=True).stdout)
    assert 2**22 < child < 2**27 < numbers.nbytes < peak_memory()
