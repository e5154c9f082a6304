"""minift's BLEU and sacreBLEU's: on random corpora, and on a model's own answers against the rows' outputs."""

import random
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import sacrebleu.metrics
from sacrebleu.metrics.bleu import BLEUScore

from minift.bleu import BLEU, SMOOTHING_DEFAULTS, corpus_bleu, sentence_bleu
from minift.config import Config
from minift.files.datasets import Row, load_rows
from minift.files.tokenizer import load_tokenizer
from minift.files.weights import load_model
from minift.generate import Options, generate
from minift.prompts import TEMPLATES
from minift.run.exam import held_out_prompts
from minift.words import TOKENIZERS
from tests.compare import Check, Setting

ANSWERS, NEW_TOKENS = 200, 32
SENTENCES = 5  # of each corpus, also compared one at a time
ROUNDING = 1e-9  # of a score between 0 and 100
# Strings that some tokeniser treats specially, and characters of many scripts.
HARD = """
    &quot; &amp; &lt; &gt; &amp;lt; <skipped> <SKIPPED> -\n - . .. a..5 3. .5 1,000.5 1-2 x-y don't _ __init__ `x` $5
    ½ ٣ € İ ß é 日本語 ， 👍🏽 x[i]+=1; f(x): -> != "" '' { } ~ ^ | \\
""".split()
HARD += ["-\n", "\n", "\t", "\x0c", "\u2028", "\u3000", "e\u0301", "\0", " ."]

Corpus = tuple[dict[str, Any], list[str], list[list[str | None]]]  # options, hypotheses, references


def compare(setting: Setting) -> Iterator[Check]:
    rows = load_rows(setting.data)
    words = [word for row in rows[:500] for text in row.values() if isinstance(text, str) for word in text.split(" ")]
    settings = [
        {"tokenize": tokenize, "smooth_method": smooth, "lowercase": lowercase, "max_ngram_order": order}
        for tokenize, smooth, lowercase, order in product(TOKENIZERS, SMOOTHING_DEFAULTS, (False, True), (4, 2, 6))
    ]
    each = 1 if setting.quick else 20
    setting.progress(f"bleu: {len(settings) * each:,} random corpora")
    generator = random.Random(42)
    corpora = [(chosen, *random_corpus(generator, words)) for chosen in settings for _ in range(each)]
    yield from compare_scores("random corpora", corpora)

    hypotheses, references = real_answers(setting, rows)
    setting.progress("bleu: the model's answers")
    # An untuned model rarely writes the reference's words. After half a reference, 4-grams match too.
    helped = [right[: len(right) // 2] + answer for answer, right in zip(hypotheses, references, strict=True)]
    few = [chosen for chosen in settings if chosen["max_ngram_order"] == 4 and not chosen["lowercase"]]
    corpora = [(chosen, texts, [references]) for chosen in few for texts in (hypotheses, helped)]
    yield from compare_scores("real answers", corpora)


def compare_scores(what: str, corpora: Sequence[Corpus]) -> Iterator[Check]:
    """Compare BLEU of each corpus and of its first segments: counts and signatures exactly, scores up to rounding.

    A corpus comes with the options of `corpus_bleu`.
    """
    pairs: list[tuple[BLEU, BLEUScore, str]] = []
    for chosen, hypotheses, references in corpora:
        oracle = reference_bleu(chosen)
        theirs = oracle.corpus_score(hypotheses, references)
        pairs.append((corpus_bleu(hypotheses, references, **chosen, force=True), theirs, str(oracle.get_signature())))
        oracle = reference_bleu({"use_effective_order": True} | chosen)
        for number, hypothesis in enumerate(hypotheses[:SENTENCES]):
            segment = [stream[number] for stream in references]
            theirs = oracle.sentence_score(hypothesis, segment)
            pairs.append((sentence_bleu(hypothesis, segment, **chosen), theirs, str(oracle.get_signature())))
    apart = unequal = 0
    for ours, theirs, signature in pairs:
        values = zip(
            (ours.score, ours.bp, *ours.precisions), (theirs.score, theirs.bp, *theirs.precisions), strict=True
        )
        apart = max(apart, *(abs(a - b) for a, b in values))
        exact = (theirs.counts, theirs.totals, theirs.sys_len, theirs.ref_len, signature)
        unequal += (ours.counts, ours.totals, ours.sys_len, ours.ref_len, ours.signature) != exact
    scores = [theirs.score for _, theirs, _ in pairs]
    on = f"{len(corpora):,} corpora, {len(pairs) - len(corpora):,} sentences"
    note = f"{sum(score > 0 for score in scores):,} above 0, up to {max(scores):.1f}"
    yield Check("bleu", f"score, penalty and precisions, {what}", on, apart, ROUNDING, note)
    yield Check("bleu", f"counts, lengths and signature, {what}", on, unequal, 0)


def reference_bleu(chosen: dict[str, Any]) -> sacrebleu.metrics.BLEU:
    """Return sacreBLEU's metric with the options of `corpus_bleu`, one of which has another name there."""
    theirs = {name.removeprefix("use_"): value for name, value in chosen.items()}
    return sacrebleu.metrics.BLEU(**theirs, force=True)


def random_corpus(generator: random.Random, words: Sequence[str]) -> tuple[list[str], list[list[str | None]]]:
    """Return up to six segments of few different words, and one to three references each; later ones have gaps."""
    chosen = [generator.choice([HARD, words][generator.random() < 0.5]) for _ in range(generator.randint(2, 10))]

    def segment() -> str:
        length = generator.choice([0, 1, 2, 3, 4, 6, 9, 14])
        return generator.choice(["", " ", " ", "\n"]).join(generator.choice(chosen) for _ in range(length))

    def edited(text: str) -> str:
        parts = text.split(" ")
        parts[generator.randrange(len(parts))] = generator.choice(chosen)
        return " ".join(parts)

    hypotheses = [segment() for _ in range(generator.randint(1, 6))]
    references: list[list[str | None]] = []
    for number in range(generator.choice([1, 1, 2, 3])):
        stream = [generator.choice([segment(), edited(text), text]) for text in hypotheses]
        references.append([None if number and generator.random() < 0.2 else text for text in stream])
    return hypotheses, references


def real_answers(setting: Setting, rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Return the model's greedy answers to prompts from all parts of the data, and the references."""
    tokenizer = load_tokenizer(setting.model)
    model = load_model(setting.model)
    count = min(6 if setting.quick else ANSWERS, len(rows))
    spread = [rows[number * len(rows) // count] for number in range(count)]
    room = model.config.max_position_embeddings - NEW_TOKENS
    questions = held_out_prompts(spread, tokenizer, TEMPLATES["course"], Config(bleu_samples=count), room)
    setting.progress(f"bleu: the model answers {len(questions)} prompts")
    options = Options(max_new_tokens=NEW_TOKENS, eos_token_id=tokenizer.eos_token_id, no_repeat_ngram_size=4)
    completions = generate(model, [question.prompt_ids for question in questions], options)
    return [tokenizer.decode(ids) for (ids,) in completions], [question.reference for question in questions]
