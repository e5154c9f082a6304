"""Where minift differs from the reference on purpose, each with a measurement that shows it."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import OPTForCausalLM, OPTForSequenceClassification, Trainer
from trl import RewardTrainer, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import disable_dropout_in_model

from minift.batching import Loader, collate
from minift.encode import IGNORE_INDEX, Example, encode_rows
from minift.files.datasets import PAIR_SCHEMAS, Row, load_rows
from minift.files.tokenizer import load_tokenizer
from minift.files.weights import load_model
from minift.losses import bradley_terry
from minift.model import OPT
from minift.optim import total_norm
from minift.pairs import encode_rankings, responses_of
from minift.prompts import TEMPLATES
from minift.run.setup import set_dropout
from minift.scoring import win_rate
from minift.tokenizer import Tokenizer
from minift.trainer import Task, evaluate
from tests.compare import Difference, Setting
from tests.compare.sft import TEMPLATE, encode_for_both, texts_of, train_trl, trl_rows
from tests.compare.training import (
    ONE_EPOCH,
    largest_relative,
    length_limit,
    make_trainer,
    quiet,
    reference_model,
    reference_tokenizer,
    train_minift,
)
from tests.loop import sft_loss, write_nothing
from tests.reference import hidden_states, logits_of

ROWS = 24
EVAL_BATCH = 5
DROPOUT = 0.1  # OPT's own


def compare(setting: Setting) -> Iterator[Difference]:
    tokenizer = load_tokenizer(setting.model)
    model = load_model(setting.model).eval()
    rows = [row for row in load_rows(setting.data)[: 4 * ROWS] if tokenizer.eos_token not in str(row)]
    encoded = encode_rows(rows, tokenizer, TEMPLATE, max_length=model.config.max_position_embeddings)
    rows, examples = encoded.rows[:ROWS], encoded.examples[:ROWS]
    for measure in (
        partial(packed_documents, setting, model, examples),
        partial(dropped_rows, setting, tokenizer, rows, examples),
        partial(equal_sides, setting, tokenizer, model.config.max_position_embeddings),
        partial(dropout_turned_off, setting, model, examples[0]),
        partial(evaluation_loss, setting, model, tokenizer, rows, examples),
        partial(special_tokens_in_text, setting, tokenizer),
        partial(margins),
        partial(logged_norm, setting),
        partial(norm_of_the_gradient),
    ):
        setting.progress(f"differences: {measure.func.__name__.replace('_', ' ')}")
        with quiet():
            yield measure()


@torch.no_grad()
def packed_documents(setting: Setting, model: OPT, examples: Sequence[Example]) -> Difference:
    """Compare the second of two documents in a batch with the same document alone."""
    pair, length = examples[:2], len(examples[1].input_ids)
    ours = float((logits_of(model, pair)[-length:] - logits_of(model, pair[1:])).abs().max())

    reference = reference_model(OPTForCausalLM, setting.model, "float32")
    packing = DataCollatorForLanguageModeling(pad_token_id=reference.config.pad_token_id, padding_free=True)

    def packed_logits(documents: Sequence[Example]) -> Tensor:
        batch = packing([{"input_ids": ids, "labels": labels} for ids, labels in documents])
        return reference(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]

    theirs = float((packed_logits(pair)[-length:] - packed_logits(pair[1:])).abs().max())
    return Difference(
        "documents that share a batch without padding",
        f"the second document's logits change by {ours:.0e}: rounding",
        f"trl's packing, on OPT: they change by {theirs:.2f}",
        "transformers' OPT does not start a new document where positions start again, so packed documents see each "
        "other; minift's attention has a separate row for each document",
    )


def dropped_rows(
    setting: Setting, tokenizer: Tokenizer, rows: Sequence[Row], examples: Sequence[Example]
) -> Difference:
    """Count rows whose completion is beyond the maximum length."""
    prompts = sorted(example.labels.count(IGNORE_INDEX) for example in examples)
    limit = max(prompts[len(prompts) // 2], prompts[0] + 1)
    encoded = encode_rows(rows, tokenizer, TEMPLATE, max_length=limit, source="the rows")
    trainer = sft_trainer(setting, tokenizer, rows, max_length=limit)
    return Difference(
        "rows cut off before their completion",
        f"keeps {len(encoded.rows)} and says: {encoded.summary.splitlines()[1].strip()}",
        f"trains on {len(trainer.train_dataset)} of the {len(rows)} rows and does not report the others",
        "users should know which rows are not learned from",
    )


def equal_sides(setting: Setting, tokenizer: Tokenizer, max_length: int) -> Difference:
    """Encode pairs with equal sides, and count equal rewards."""
    pairs = load_rows(setting.pairs, PAIR_SCHEMAS)[:6]
    for pair in pairs[:2]:
        best = responses_of(pair)[0]
        pair.update({"responses": [best, best]} if "responses" in pair else {"chosen": best, "rejected": best})
    encoded = encode_rankings(pairs, tokenizer, TEMPLATES["dialogue"], max_length=max_length)
    tied = win_rate([0.0, 0.0, 1.0])

    texts = [{"chosen": text, "rejected": text} for text in (responses_of(pair)[0] for pair in pairs[:2])]
    reference = reference_model(OPTForSequenceClassification, setting.model, "float32", num_labels=1)
    theirs = reference_tokenizer(setting.model)
    trainer = make_trainer(RewardTrainer, reference, theirs, texts, setting.scratch, max_length=max_length)
    measured = trainer.evaluate(trainer.train_dataset)
    return Difference(
        "ties",
        f"of {len(pairs)} pairs, 2 of them with equal sides, learns from {len(encoded.rows)} and names the others; "
        f"a win rate counts {tied.wins} win and {tied.ties} ties in {tied.pairs} pairs",
        f"learns from equal sides too: loss {measured['eval_loss']:.4f}, accuracy {measured['eval_accuracy']:.0f}; "
        "trl 0.11 counted a tie as right",
        "a pair of equal sides has no gradient, and a tie is neither right nor a preference",
    )


@torch.no_grad()
def dropout_turned_off(setting: Setting, model: OPT, example: Example) -> Difference:
    """Compare two training passes over the same row."""
    batch = collate([example])
    set_dropout(model, 0.0)

    def hidden(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return hidden_states(model.train(), batch)

    ours = float((hidden(1) - hidden(2)).abs().max())
    model.eval()

    reference = reference_model(OPTForCausalLM, setting.model, "float32", dropout=DROPOUT)
    disable_dropout_in_model(reference)

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return reference.train()(batch.input_ids[None], use_cache=False).logits

    theirs = float((logits(1) - logits(2)).abs().max())
    return Difference(
        "dropout turned off",
        f"--dropout 0: two training passes differ by {ours:.1f}",
        f"disable_dropout, the reward trainer's default: their logits differ by {theirs:.2f}",
        "trl sets the rate of Dropout modules to 0; OPT's dropout is a function call and stays on. The sections above "
        "set dropout to 0 in the reference's config",
    )


def evaluation_loss(
    setting: Setting, model: OPT, tokenizer: Tokenizer, rows: Sequence[Row], examples: Sequence[Example]
) -> Difference:
    """Evaluate held-out rows in batches whose answers have different lengths."""
    loss = sft_loss(model)
    batches = Loader(examples, collate, EVAL_BATCH)
    ours = evaluate(Task(model, loss, Loader([], collate, 1), batches, write_nothing, "supervised_tokens"))["loss"]
    trainer = sft_trainer(setting, tokenizer, rows, per_device_eval_batch_size=EVAL_BATCH)
    theirs = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    with torch.no_grad():
        sums = [(float(total), int(count), len(batch.rows)) for batch in batches for total, count, _ in [loss(batch)]]
    of_means = sum(num_rows * total / count for total, count, num_rows in sums) / len(examples)
    return Difference(
        "evaluation loss",
        f"{ours:.6f}, the mean over {sum(count for _, count, _ in sums):,} tokens of {len(examples)} rows",
        f"{theirs:.6f} on the same rows; the means of batches of {EVAL_BATCH}, weighted by rows, give {of_means:.6f}",
        "the loss per token should not depend on which rows share a batch",
    )


def special_tokens_in_text(setting: Setting, tokenizer: Tokenizer) -> Difference:
    """Encode a text that spells the end token."""
    text = f"What does {tokenizer.eos_token} mean?"
    ours = tokenizer.encode(text)[1:].count(tokenizer.eos_token_id)
    theirs = reference_tokenizer(setting.model)(text)["input_ids"][1:].count(tokenizer.eos_token_id)
    return Difference(
        "special tokens spelled in a row's text",
        f"{text!r} holds {ours} end tokens",
        f"it holds {theirs}",
        "text is text: a row, or a user's question, should not be able to end a response",
    )


def margins() -> Difference:
    """Compute the Bradley–Terry loss of four pairs with margins."""
    chosen, rejected = torch.tensor([2.0, 1.0, 0.5, -1.0]), torch.tensor([1.0, 1.5, 0.0, -2.0])
    wanted = torch.tensor([0.0, 1.0, 2.0, 3.0])
    total, count = bradley_terry(chosen, rejected, wanted, torch.ones(4))
    # trl 0.11.4's line: the model's rewards are (B, 1), the collator's margins (B,).
    broadcast = -F.logsigmoid(chosen[:, None] - rejected[:, None] - wanted)
    return Difference(
        "margins",
        f"{float(total / count):.4f}, the mean over {int(count)} pairs",
        f"trl 0.11's formula gives {float(broadcast.mean()):.4f}, over {broadcast.numel()} pairs of a reward and a "
        "margin; trl 1.16 agrees with minift",
        "each pair has its own margin",
    )


def logged_norm(setting: Setting) -> Difference:
    """Train both sides in float32; compare the norms that they log with the float64 norm of trl's gradient."""
    examples, texts = encode_for_both(setting)
    theirs, _ = train_trl(setting.model, texts, ONE_EPOCH, length_limit(setting))
    model = load_model(setting.model)
    ours = train_minift(model, ONE_EPOCH, examples, collate, sft_loss(model), "supervised_tokens")
    exact, logged = ([step[name] for step in theirs.steps] for name in ("grad_norm", "logged_grad_norm"))
    errors = [norm / true - 1 for norm, true in zip(logged, exact, strict=True)]
    worst = max(range(len(errors)), key=lambda step: abs(errors[step]))
    own = [step["grad_norm"] for step in ours.steps]
    return Difference(
        "the gradient norm in the log, float32",
        f"{own[worst]:.6f} in step {worst + 1} of {len(own)}; at most {largest_relative(own, exact)[0]:.1e} from the "
        "float64 norm of trl's gradient in any step",
        f"{logged[worst]:.6f} in that step, where the float64 norm of the same gradient is {exact[worst]:.6f}: "
        f"{errors[worst]:+.1e}, the largest of all steps",
        "trl logs, and clips by, torch's clip_grad_norm_, which adds up in float32. So the sections above compare "
        "minift's norm with the float64 norm of trl's gradient, taken before clipping",
    )


def norm_of_the_gradient() -> Difference:
    """Take the norm of a random gradient of OPT-125m's token embedding, and that in float64."""
    gradient = torch.randn(50272, 768, generator=torch.Generator().manual_seed(0))
    exact = gradient.double().square().sum().sqrt()
    ours, theirs = (float(norm([gradient]) / exact - 1) for norm in (total_norm, torch.nn.utils.get_total_norm))
    return Difference(
        "the norm of a large gradient in float32",
        f"{ours:+.0e} of that in float64",
        f"torch.nn.utils.get_total_norm, which clips trl's gradients: {theirs:+.2%} of it",
        "one running sum of 39 million squares loses those that are small beside it; minift takes the norm of each row "
        "first. So grad_norm, and a clipped gradient, differ by as much from trl's for a vocabulary of this size",
    )


def sft_trainer(setting: Setting, tokenizer: Tokenizer, rows: Sequence[Row], **values: Any) -> Trainer:
    """Return trl's trainer for these rows."""
    texts = trl_rows(texts_of(row, tokenizer) for row in rows)
    model = reference_model(OPTForCausalLM, setting.model, "float32")
    return make_trainer(SFTTrainer, model, reference_tokenizer(setting.model), texts, setting.scratch, **values)
