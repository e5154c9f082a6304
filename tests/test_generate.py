"""Generation against transformers' `generate` and its logits processors, and against itself done the slow way."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from transformers.generation import logits_process

from minift import generate as generation
from minift.errors import UserError, run_command
from minift.generate import KVCache, Options, close_ranks, draw, generate, main, next_logits, process
from minift.model import OPT, OPTConfig
from minift.tokenizer import Tokenizer
from minift.weights import save_model

VOCAB = 40
MAX_NEW = 12
LENGTHS = (1, 4, 9)


def model_pair(norm_before: bool, dtype: torch.dtype = torch.float32) -> tuple[transformers.OPTForCausalLM, OPT]:
    """The reference and ours with the same random weights, scaled so that outputs vary and do not echo the prompt."""
    torch.manual_seed(1)
    config = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        word_embed_proj_dim=32 if norm_before else 16,
        do_layer_norm_before=norm_before,
    )
    reference = transformers.OPTForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.dim() > 1:
                parameter *= {True: (20, 4), False: (8, 6)}[norm_before]["embed" in name]
    model = OPT(OPTConfig.from_dict(config.to_dict())).to(dtype)
    state = {name.removeprefix("model."): value for name, value in reference.state_dict().items()}
    model.load_state_dict({name: value for name, value in state.items() if name != "lm_head.weight"})
    return reference, model


def ragged_prompts(each: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [[2, *torch.randint(3, VOCAB, (n - 1,), generator=generator).tolist()] for _ in range(each) for n in lengths]


def likely_end(model: OPT, prompts: list[list[int]]) -> int:
    """A token that the model is fond of: as EOS it makes completions of all lengths."""
    completions = generate(model, prompts, Options(max_new_tokens=MAX_NEW))
    return Counter(token for [ids] in completions for token in ids).most_common(2)[1][0]


def reference_completions(
    reference: transformers.OPTForCausalLM, prompts: list[list[int]], options: Options, width: int | None = None
) -> list[list[list[int]]]:
    """What transformers' `generate` gives: prompts of one length together, or all padded on the left to `width`."""
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(width or len(prompt), []).append(number)
    found: list[list[list[int]]] = [[] for _ in prompts]
    for length, numbers in groups.items():
        pads = [length - len(prompts[number]) for number in numbers]
        together = reference.generate(
            torch.tensor([[1] * pad + prompts[number] for pad, number in zip(pads, numbers, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads]),
            do_sample=False,
            max_new_tokens=options.max_new_tokens,
            min_new_tokens=options.min_new_tokens or None,
            num_beams=options.num_beams,
            num_return_sequences=options.num_samples,
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
            repetition_penalty=options.repetition_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            eos_token_id=options.eos_token_id,
            pad_token_id=1,
        )
        for place, ids in enumerate(together[:, length:].tolist()):
            end = ids.index(options.eos_token_id) + 1 if options.eos_token_id in ids else len(ids)
            found[numbers[place // options.num_samples]].append(ids[:end])
    return found


PROCESSED = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 5}
GREEDY = [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 6}, PROCESSED]
BEAMS = [
    {"num_beams": beams, "length_penalty": penalty, "early_stopping": stopping}
    for beams in (2, 5)
    for penalty in (0.6, 1.0, 2.0)
    for stopping in (True, False, "never")
]
OTHER_BEAMS = [
    {"num_beams": 2, **PROCESSED},
    {"num_beams": 5, **PROCESSED, "early_stopping": True},
    {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 4, "num_samples": 3},
]


@pytest.mark.parametrize("norm_before", [True, False], ids=["pre-LN", "post-LN"])
def test_tokens_are_those_of_transformers(norm_before: bool) -> None:
    reference, model = model_pair(norm_before)
    prompts = ragged_prompts(each=4)
    end = likely_end(model, prompts)
    lengths = Counter()
    for chosen in GREEDY + BEAMS + OTHER_BEAMS:
        # 17 rows: some prompts enter late, and 5 beams do not divide it.
        options = Options(max_new_tokens=MAX_NEW, eos_token_id=end, batch_size=17, **chosen)
        completions = generate(model, prompts, options)
        assert completions == reference_completions(reference, prompts, options), chosen
        lengths.update(len(ids) for samples in completions for ids in samples)
    assert len(lengths) >= 8  # else nothing above was about endings


@pytest.mark.parametrize("chosen", [{}, {"num_beams": 5}, {"num_beams": 5, "length_penalty": 2.0}], ids=str)
def test_tokens_are_those_of_a_left_padded_batch(chosen: dict) -> None:
    reference, model = model_pair(norm_before=False)
    prompts = ragged_prompts(each=4)
    options = Options(max_new_tokens=MAX_NEW, eos_token_id=likely_end(model, prompts), **chosen)
    assert generate(model, prompts, options) == reference_completions(reference, prompts, options, width=max(LENGTHS))


@pytest.mark.parametrize(
    "chosen",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 3},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 2.5, "top_k": 9, "top_p": 0.8},
        {"temperature": 0.3, "top_k": 99, "top_p": 0.95, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_processors_are_those_of_transformers(chosen: dict) -> None:
    options = Options(eos_token_id=7, **chosen)
    generator = torch.Generator().manual_seed(3)
    # Few different ids, so that n-grams repeat; rows of different lengths share a call of ours.
    rows = [torch.randint(0, 4, (n,), generator=generator).tolist() for n in (1, 2, 9, 30, 30, 17)]
    num_new = [0, 1, 2, 3, 4, 5]
    scores = 3 * torch.randn(len(rows), VOCAB, generator=generator)
    before = scores.clone()
    ours = process(scores, rows, num_new, options)
    assert torch.equal(scores, before)
    assert not torch.equal(ours, before)
    for row, (ids, new) in enumerate(zip(rows, num_new, strict=True)):
        expected = scores[row : row + 1]
        for processor in reference_processors(options, prompt_length=len(ids) - new):
            expected = processor(torch.tensor([ids]), expected)
        assert torch.equal(ours[row].isinf(), expected[0].isinf())
        torch.testing.assert_close(ours[row].softmax(0), expected[0].softmax(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(ours[row], expected[0])


def reference_processors(options: Options, prompt_length: int) -> list[logits_process.LogitsProcessor]:
    """In the order of transformers' `_get_logits_processor`."""
    processors: list[logits_process.LogitsProcessor] = []
    if options.repetition_penalty != 1:
        processors.append(logits_process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        processors.append(logits_process.NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if options.min_new_tokens:
        minimum = options.min_new_tokens
        processors.append(logits_process.MinNewTokensLengthLogitsProcessor(prompt_length, minimum, 7))
    if options.temperature:
        processors.append(logits_process.TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        processors.append(logits_process.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(logits_process.TopPLogitsWarper(options.top_p))
    return processors


def test_top_p_keeps_as_few_as_make_up_p() -> None:
    """By hand: of 0.5, 0.3, 0.15, 0.05 the two likeliest make up 0.7 and more."""
    scores = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    kept = process(scores, [[0]], [0], Options(temperature=1.0, top_p=0.7)).softmax(1)
    torch.testing.assert_close(kept, torch.tensor([[0, 0.625, 0, 0.375]]))


def test_sampling_follows_the_distribution() -> None:
    """Chi-squared, 8 tokens, so 7 degrees of freedom: 24.32 is exceeded once in a thousand times."""
    reference, model = model_pair(norm_before=False)
    prompt = ragged_prompts(each=1)[1]
    with torch.no_grad():
        logits = reference(torch.tensor([prompt])).logits[0, -1] / 9.0
    top = logits.topk(8)
    samples = 4000
    options = Options(max_new_tokens=1, temperature=9.0, top_k=8, num_samples=samples, batch_size=500, seed=5)
    drawn = Counter(ids[0] for ids in generate(model, [prompt], options)[0])
    assert drawn.keys() <= set(top.indices.tolist())
    expected = [samples * probability for probability in top.values.softmax(0).tolist()]
    assert min(expected) > 20  # few, and the test would not hold; none, and it would be of one token
    pairs = zip(top.indices.tolist(), expected, strict=True)
    assert sum((drawn[token] - wanted) ** 2 / wanted for token, wanted in pairs) < 24.32


def test_drawing_inverts_the_distribution_function() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(6, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities, uniforms).tolist() == [1, 1, 3, 3, 4, 4]


SAMPLED = {"temperature": 3.0, "top_p": 0.95, "num_samples": 3}
STRATEGIES = [{}, PROCESSED, SAMPLED, {"num_beams": 5, "num_samples": 5}]


@pytest.mark.parametrize("chosen", STRATEGIES, ids=["greedy", "processed", "sampled", "beams"])
@pytest.mark.parametrize("norm_before", [True, False], ids=["pre-LN", "post-LN"])
def test_the_batch_changes_nothing(norm_before: bool, chosen: dict) -> None:
    _, model = model_pair(norm_before, torch.float64)
    prompts = ragged_prompts(each=4, lengths=(1, 3, 9, 6))
    end = likely_end(model, prompts)
    alone, seven, all_at_once = (
        generate(model, prompts, Options(max_new_tokens=MAX_NEW, eos_token_id=end, batch_size=size, **chosen))
        for size in (1, 7, 64)
    )
    assert alone == seven == all_at_once
    assert len({tuple(ids) for samples in alone for ids in samples}) > len(prompts) / 2


def test_each_sample_has_its_own_stream() -> None:
    _, model = model_pair(norm_before=False, dtype=torch.float64)
    prompts = ragged_prompts(each=2)
    many = Options(max_new_tokens=MAX_NEW, **SAMPLED)
    three = generate(model, prompts, many)
    assert generate(model, prompts[:2], many) == three[:2]  # other prompts do not count
    one = Options(max_new_tokens=MAX_NEW, **SAMPLED | {"num_samples": 1})
    assert [samples[:1] for samples in three] == generate(model, prompts, one)  # nor do other samples
    assert generate(model, prompts, Options(max_new_tokens=MAX_NEW, seed=43, **SAMPLED)) != three
    same_prompt = generate(model, [prompts[0], prompts[0]], many)
    assert len({tuple(ids) for samples in same_prompt for ids in samples}) == 6


@torch.no_grad()
@pytest.mark.parametrize("norm_before", [True, False], ids=["pre-LN", "post-LN"])
def test_cached_logits_are_those_of_the_whole_row(norm_before: bool) -> None:
    """Through everything that happens to a cache: prompts enter, twice over too, rows move up, and buffers grow."""
    _, model = model_pair(norm_before, torch.float64)
    model.eval()
    generator = torch.Generator().manual_seed(4)
    cache = KVCache(num_slots=8)
    live: list[list[int]] = []
    moves = {3: [0, 5, 2, 3, 4], 6: [3, 3, 0, 3, 1], 9: [4, 1]}
    entrances = {0: (ragged_prompts(each=2), 1), 4: ([[2, 5], [2, 6, 7]], 1), 10: (ragged_prompts(each=1), 2)}
    for step in range(30):
        entering, copies = entrances.get(step, ([], 1))
        if step == 4:
            cache.select([0, 1, 2])
            live = live[:3]
        logits = next_logits(model, cache, live, entering, copies)
        live = live + [list(prompt) for prompt in entering for _ in range(copies)]
        for row, ids in enumerate(live):
            whole = model(torch.tensor(ids), torch.arange(len(ids)), torch.arange(len(ids))[None])
            torch.testing.assert_close(logits[row].double(), model.logits(whole[-1:])[0], rtol=1e-6, atol=1e-6)
        live = [[*ids, int(torch.randint(0, VOCAB, (), generator=generator))] for ids in live]
        sources = moves.get(step, list(range(len(live))))
        cache.select(sources)
        live = [list(live[source]) for source in sources]
    assert len(live) == 8


def test_the_cache_is_used_and_the_batch_stays_full(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = model_pair(norm_before=False)
    prompts = ragged_prompts(each=16)
    end = likely_end(model, prompts)
    calls: list[tuple[int, int]] = []
    whole = model.forward

    def counted(input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, cache: KVCache) -> torch.Tensor:
        calls.append(rows.shape)
        return whole(input_ids, positions, rows, cache)

    monkeypatch.setattr(model, "forward", counted)
    completions = generate(model, prompts, Options(max_new_tokens=MAX_NEW, eos_token_id=end, batch_size=8))
    lengths = [len(ids) for [ids] in completions]
    decoding = [rows for rows, length in calls if length == 1]
    assert max(rows for rows, _ in calls) == 8
    # Prompts of one token look like decoding; beyond those, each token but a row's first is fed once.
    one_token_entrances = sum(decoding) - sum(length - 1 for length in lengths)
    assert 0 <= one_token_entrances <= len(prompts) // len(LENGTHS)
    # In batches that nothing enters until all have finished, each would last as long as its longest row.
    static_steps = sum(max(lengths[start : start + 8]) for start in range(0, len(lengths), 8))
    assert len(decoding) < 0.8 * static_steps


def test_close_ranks() -> None:
    assert close_ranks([False, True, False, True, False, False]) == [0, 4, 2, 5]
    assert close_ranks([True, True]) == []
    assert close_ranks([False, False, True]) == [0, 1]


@pytest.mark.parametrize("chosen", [{}, SAMPLED, {"num_beams": 3}], ids=["greedy", "sampled", "beams"])
def test_the_end_token(chosen: dict) -> None:
    _, model = model_pair(norm_before=False)
    prompts = ragged_prompts(each=4)
    end = likely_end(model, prompts)

    def completions(**more: int | None) -> list[list[int]]:
        options = Options(**{"max_new_tokens": MAX_NEW, "eos_token_id": end} | chosen | more)
        return [ids for samples in generate(model, prompts, options) for ids in samples]

    ended = completions()
    assert all(end not in ids[:-1] and (len(ids) == MAX_NEW or ids[-1] == end) for ids in ended)
    assert len({len(ids) for ids in ended}) > 2
    assert min(map(len, ended)) < 6 <= min(map(len, completions(min_new_tokens=5)))
    assert all(len(ids) == MAX_NEW for ids in completions(eos_token_id=None))
    assert all(len(ids) == 1 for ids in completions(max_new_tokens=1))


def test_mode_and_progress() -> None:
    _, model = model_pair(norm_before=True)
    model.train()
    finished = []
    for chosen in (SAMPLED, {"num_beams": 3, "num_samples": 3}):
        options = Options(max_new_tokens=4, batch_size=4, **chosen)
        completions = generate(model, ragged_prompts(each=1), options, finished.append)
        assert sum(finished) == 9 and len(completions) == 3
        finished.clear()
    assert model.training
    # Dropout 0.1 is off while generating, or two runs would differ.
    first, second = (generate(model, ragged_prompts(each=4), Options(max_new_tokens=8)) for _ in range(2))
    assert first == second
    assert generate(model, [], Options()) == []


WRONG_OPTIONS = [
    ("num_beams", 0),
    ("top_p", 2.0),
    ("top_p", math.nan),
    ("temperature", -1.0),
    ("temperature", math.inf),
    ("top_k", -1),
    ("top_k", 5),  # at temperature 0
    ("num_samples", 0),
    ("num_samples", 2),  # greedy twice is the same twice
    ("max_new_tokens", 0),
    ("min_new_tokens", 129),
    ("repetition_penalty", 0.0),
    ("no_repeat_ngram_size", -1),
    ("length_penalty", math.nan),
    ("early_stopping", "always"),
    ("batch_size", 0),
    ("seed", -1),
]


@pytest.mark.parametrize(("name", "value"), WRONG_OPTIONS)
def test_wrong_options_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {value}, expected"):
        Options(**{name: value})


def test_what_cannot_be_generated_from() -> None:
    _, model = model_pair(norm_before=True)
    with pytest.raises(ValueError, match="^prompt 1 is empty"):
        generate(model, [[2], []], Options(max_new_tokens=4))
    with pytest.raises(ValueError, match="^prompt 0 has 61 tokens.*64 positions"):
        generate(model, [[2] * 61], Options(max_new_tokens=4))
    assert len(generate(model, [[2] * 60], Options(max_new_tokens=4))[0][0]) == 4
    with pytest.raises(ValueError, match="^num_beams is 21, expected at most half of 40"):
        generate(model, [[2]], Options(num_beams=21, max_new_tokens=4))
    with pytest.raises(ValueError, match="no_repeat_ngram_size"):
        generate(model, [list(range(VOCAB))], Options(no_repeat_ngram_size=1, max_new_tokens=4))
    with pytest.raises(ValueError, match="temperature.*does not sample"):
        Options(num_beams=2, temperature=1.0)


@pytest.fixture(scope="module")
def model_directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = OPTConfig(512, 16, 2, 2, 32, 16, max_position_embeddings=64, do_layer_norm_before=False)
    save_model(OPT(config), directory)
    tokenizer.save(directory)
    return directory


PROMPTS = [
    {"prompt": "def add(first", "id": 7},
    {"instruction": "Write a list.", "input": "1, 2", "id": 8},
    {"instruction": "Write a function.", "completion": "of the data set's own"},
]


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


def run(model: Path, prompts: Path, *more: str) -> None:
    main(["--model", str(model), "--prompts", str(prompts), "--max-new-tokens", "6", *more])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_command(
    model_directory: Path, prompts_file: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prompts_file.with_name("out.jsonl")
    run(model_directory, prompts_file, "--out", str(out))
    assert capsys.readouterr().out == ""
    lines = read(out)
    reference = transformers.OPTForCausalLM.from_pretrained(model_directory)
    texts = [
        "def add(first",
        "### Instruction:\nWrite a list.\n\n### Input:\n1, 2\n\n### Response:\n",
        "### Instruction:\nWrite a function.\n\n### Response:\n",
    ]
    prompts = [tokenizer.encode(text) for text in texts]
    expected = reference_completions(reference, prompts, Options(max_new_tokens=6, eos_token_id=2))
    assert [[line["token_ids"]] for line in lines] == expected
    for line, row in zip(lines, PROMPTS, strict=True):
        assert line == row | {"completion": tokenizer.decode(line["token_ids"]), "token_ids": line["token_ids"]}

    run(model_directory, prompts_file)
    assert capsys.readouterr().out == out.read_text()
    assert [path.name for path in sorted(out.parent.iterdir())] == ["out.jsonl", "prompts.jsonl"]


def test_command_writes_a_line_for_each_sample(model_directory: Path, prompts_file: Path) -> None:
    out = prompts_file.with_name("out.jsonl")
    for flags in (["--num-samples", "3"], ["--num-samples", "3", "--num-beams", "4", "--early-stopping", "true"]):
        run(model_directory, prompts_file, "--out", str(out), *flags)
        lines = read(out)
        assert [line["sample"] for line in lines] == [0, 1, 2] * 3
        assert [line.get("id") for line in lines] == [7] * 3 + [8] * 3 + [None] * 3
        assert len({tuple(line["token_ids"]) for line in lines[:3]}) == 3


@pytest.mark.parametrize(
    ("flags", "sampled"),
    [
        ([], False),
        (["--top-k", "3"], True),
        (["--top-p", "0.9"], True),
        (["--temperature", "0.5"], True),
        (["--temperature", "0"], False),
        (["--num-samples", "2"], True),
        (["--num-samples", "2", "--num-beams", "2"], False),
        (["--top-p", "1.0", "--top-k", "0"], False),
    ],
    ids=str,
)
def test_what_asks_for_sampling(flags: list[str], sampled: bool) -> None:
    arguments = generation._parser().parse_args(["--model", "m", "--prompts", "p", *flags])
    assert (generation._options(arguments).temperature > 0) == sampled


WRONG_COMMANDS = [
    (["--num-beams", "0"], "--num-beams is 0, expected 1 or more"),
    (["--num-beams", "two"], "--num-beams: invalid int value: 'two'"),
    (["--top-p", "2"], "--top-p is 2.0, expected 0 to 1"),
    (["--temperature", "-1"], "--temperature is -1.0"),
    (["--temperature", "0", "--top-k", "5"], "--top-k is 5, expected 0 at temperature 0"),
    (["--early-stopping", "maybe"], "--early-stopping"),
    (["--num-beams", "400"], "--num-beams is 400, expected at most half"),
    (["--no-such-flag", "1"], "--no-such-flag"),
    (["--template", "nowhere.txt"], "--template nowhere.txt"),
    (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--model", "nowhere"], "nowhere"),
    (["--max-new-tokens", "60"], "prompts.jsonl: line 1: the prompt has"),
]


def fails_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ending:
        run_command(lambda: main(arguments))
    assert ending.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(("flags", "message"), WRONG_COMMANDS, ids=str)
def test_a_wrong_command_is_one_line(
    flags: list[str], message: str, model_directory: Path, prompts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prompts_file.with_name("out.jsonl")
    given = ["--model", str(model_directory), "--prompts", str(prompts_file), "--out", str(out)]
    assert message in fails_in_one_line([*given, "--max-new-tokens", "6", *flags], capsys)
    assert [path.name for path in out.parent.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', ":2:15: malformed JSON"),
        ("[1]", ":2: a list, expected an object"),
        ('{"text": "a"}', ":2: no field of a row in it, expected 'instruction', or 'prompt'"),
        ('{"prompt": 3}', ":2: field 'prompt' is a number, expected a string"),
        ('{"instruction": "a", "input": null}', ":2: field 'input' is null, expected a string"),
        ('{"prompt": "\\ud800"}', ":2: field 'prompt' holds half of a character"),
        (json.dumps({"prompt": "word " * 80}), ": line 2: the prompt has"),
    ],
    ids=str,
)
def test_a_wrong_prompt_is_named_by_its_line(
    line: str, message: str, model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    given = ["--model", str(model_directory), "--prompts", str(path), "--max-new-tokens", "6"]
    assert f"{path}{message}" in fails_in_one_line(given, capsys)


def test_files_that_hold_no_prompts(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "binary.jsonl"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in ((empty, "no rows"), (binary, "not UTF-8"), (tmp_path, "a directory")):
        assert message in fails_in_one_line(["--model", str(model_directory), "--prompts", str(path)], capsys)


def test_models_that_cannot_generate(
    model_directory: Path, gpt2_tokenizer_directory: Path, prompts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model_directory / "config.json").read_text())
    model = prompts_file.parent / "model"
    model.mkdir()
    for name in ("model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (model / name).write_bytes((model_directory / name).read_bytes())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["OPTForSequenceClassification"]}))
    arguments = ["--model", str(model), "--prompts", str(prompts_file)]
    assert "reward model" in fails_in_one_line(arguments, capsys)

    # Without a BOS of the tokenizer's own, "" has no token at all.
    (model / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((gpt2_tokenizer_directory / name).read_bytes())
    prompts_file.write_text('{"prompt": ""}\n')
    message = fails_in_one_line([*arguments, "--max-new-tokens", "6"], capsys)
    assert f"{prompts_file}: line 1: the prompt is empty" in message


def test_a_mistake_of_the_flags_is_a_user_error() -> None:
    with pytest.raises(UserError):
        main(["--model"])
