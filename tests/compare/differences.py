"""Where minift differs from the reference on purpose, each with a measurement that shows it."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import OPTForCausalLM, OPTForSequenceClassification
from transformers.trainer_callback import PrinterCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import disable_dropout_in_model

from minift.batching import Batch, collate
from minift.datasets import PAIR_KINDS, Row, load_rows
from minift.encode import Example, encode_rankings, encode_rows, responses_of, split_row
from minift.losses import bradley_terry, completion_cross_entropy
from minift.model import OPT, set_dropout
from minift.prompts import TEMPLATES
from minift.scoring import win_rate
from minift.tokenizer import Tokenizer, load_tokenizer
from minift.trainer import Task, evaluate
from minift.weights import load_model
from tests.compare import Setting
from tests.compare.training import Plan, quiet, reference_model, reference_tokenizer, reference_values

TEMPLATE = TEMPLATES["course"]
PLAN = Plan("float32", "sequential", 2e-5, 1)
ROWS = 24
DROPOUT = 0.1  # OPT's own


class Difference(NamedTuple):
    """One line of the list. The strings hold what was measured."""

    name: str
    minift: str
    reference: str
    reason: str


class SilentSFTTrainer(SFTTrainer):
    def _send_telemetry(self) -> None:
        """To nobody."""


class SilentRewardTrainer(RewardTrainer):
    def _send_telemetry(self) -> None:
        """To nobody."""


def compare(setting: Setting) -> Iterator[Difference]:
    tokenizer = load_tokenizer(setting.model)
    model = load_model(setting.model, dtype=torch.float32).eval()
    rows = [row for row in load_rows(setting.data)[: 4 * ROWS] if tokenizer.eos_token not in str(row)]
    examples, kept, _ = encode_rows(rows, tokenizer, TEMPLATE, max_length=model.config.max_position_embeddings)
    rows, examples = [rows[index] for index in kept[:ROWS]], examples[:ROWS]
    for measure in (
        partial(packed_documents, setting, model, examples),
        partial(dropped_rows, setting, tokenizer, rows, examples),
        partial(equal_sides, setting, tokenizer),
        partial(dropout_that_is_off, setting, model, examples[0]),
        partial(evaluation_loss, setting, model, tokenizer, rows, examples),
        partial(special_tokens_in_text, setting, tokenizer, rows[0]),
        partial(margins, setting),
    ):
        setting.progress(f"differences: {measure.func.__name__.replace('_', ' ')}")
        with quiet():
            yield measure()


@torch.no_grad()
def packed_documents(setting: Setting, model: OPT, examples: Sequence[Example]) -> Difference:
    """The second of two documents in a batch, next to the same document alone."""
    pair = examples[:2]

    def logits(documents: Sequence[Example]) -> Tensor:
        batch = collate(documents)
        return model.logits(model(batch.input_ids, batch.positions, batch.rows))  # (N, V)

    length = len(pair[1].input_ids)
    ours = float((logits(pair)[-length:] - logits(pair[1:])).abs().max())

    reference = reference_model(OPTForCausalLM, setting.model, "float32").eval()
    packing = DataCollatorForLanguageModeling(pad_token_id=reference.config.pad_token_id, padding_free=True)

    def reference_logits(documents: Sequence[Example]) -> Tensor:
        batch = packing([{"input_ids": ids, "labels": labels} for ids, labels in documents])
        return reference(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]

    theirs = float((reference_logits(pair)[-length:] - reference_logits(pair[1:])).abs().max())
    return Difference(
        "documents that share a batch without padding",
        f"the second document's logits move by {ours:.0e}: rounding",
        f"trl's packing, on OPT: they move by {theirs:.2f}",
        "OPT's attention in transformers takes no heed of positions that start again, so packed documents read each "
        "other; minift's attention has each document in a row of its own",
    )


def dropped_rows(
    setting: Setting, tokenizer: Tokenizer, rows: Sequence[Row], examples: Sequence[Example]
) -> Difference:
    """Rows whose completion lies beyond the maximum length."""
    prompts = sorted(sum(label == -100 for label in example.labels) for example in examples)
    limit = max(prompts[len(prompts) // 2], prompts[0] + 1)
    _, kept, report = encode_rows(rows, tokenizer, TEMPLATE, max_length=limit, source="the rows")
    trainer = sft_trainer(setting, tokenizer, rows, max_length=limit)
    lines = [line.strip() for line in report.lines()]
    return Difference(
        "rows cut off before their completion",
        f"keeps {len(kept)} and says: {lines[1]}",
        f"trains on {len(trainer.train_dataset)} of the {len(rows)} rows, without a word",
        "what is not learned from should be known",
    )


def equal_sides(setting: Setting, tokenizer: Tokenizer) -> Difference:
    """Pairs with nothing to tell between, and rewards that are equal."""
    pairs = load_rows(setting.pairs, PAIR_KINDS)[:6]
    template = TEMPLATES["dialogue"]
    for pair in pairs[:2]:
        best = responses_of(pair)[0]
        pair.update({"responses": [best, best]} if "responses" in pair else {"chosen": best, "rejected": best})
    longest = load_model(setting.model).config.max_position_embeddings
    _, kept, report = encode_rankings(pairs, tokenizer, template, max_length=longest, positions=longest)
    tied = win_rate([0.0, 0.0, 1.0])

    texts = [{"chosen": text, "rejected": text} for text in (responses_of(pair)[0] for pair in pairs[:2])]
    reference = reference_model(OPTForSequenceClassification, setting.model, "float32", num_labels=1)
    arguments = RewardConfig(**reference_values(PLAN, setting.scratch), max_length=longest)
    trainer = SilentRewardTrainer(
        model=reference,
        processing_class=reference_tokenizer(setting.model),
        train_dataset=Dataset.from_list(texts),
        eval_dataset=Dataset.from_list(texts),
        args=arguments,
    )
    trainer.remove_callback(PrinterCallback)
    measured = trainer.evaluate()
    return Difference(
        "ties",
        f"of {len(pairs)} pairs, 2 of them with equal sides, learns from {len(kept)} and names the others; a win rate "
        f"tells {tied.wins} win and {tied.ties} ties of {tied.pairs} apart",
        f"learns from equal sides too: loss {measured['eval_loss']:.4f}, accuracy {measured['eval_accuracy']:.0f}; "
        "trl 0.11 called a tie right",
        "a pair of equal sides has no gradient, and a tie is neither right nor a preference",
    )


@torch.no_grad()
def dropout_that_is_off(setting: Setting, model: OPT, example: Example) -> Difference:
    """How far two training passes over the same row lie apart."""
    batch = collate([example])
    set_dropout(model, 0.0)

    def hidden(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.train()(batch.input_ids, batch.positions, batch.rows)

    ours = float((hidden(1) - hidden(2)).abs().max())
    model.eval()

    reference = OPTForCausalLM.from_pretrained(
        setting.model, dtype=torch.float32, local_files_only=True, dropout=DROPOUT
    )
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
    """The loss over held-out rows in batches whose answers are of different lengths."""
    size = 5
    starts = range(0, len(examples), size)

    def loss(batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        hidden = model(batch.input_ids, batch.positions, batch.rows)
        return *completion_cross_entropy(hidden, model.head, batch.labels, batch.positions), {}

    def eval_batches() -> Iterator[Batch]:
        return (collate(examples[start : start + size]) for start in starts)

    task = Task(model, loss, lambda step: (), eval_batches, 0, lambda folder: None, "supervised_tokens")
    ours = evaluate(task, torch.device("cpu"), torch.float32)["loss"]
    trainer = sft_trainer(setting, tokenizer, rows, per_device_eval_batch_size=size)
    theirs = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        sums = [loss(batch)[:2] for batch in eval_batches()]
    sizes = [len(examples[start : start + size]) for start in starts]
    of_means = sum(n * float(total / count) for n, (total, count) in zip(sizes, sums, strict=True)) / sum(sizes)
    tokens = sum(int(count) for _, count in sums)
    return Difference(
        "evaluation loss",
        f"{ours:.6f}, the mean over {tokens:,} tokens of {len(examples)} rows",
        f"{theirs:.6f} on the same rows; the means of batches of {size}, weighted by rows, give {of_means:.6f}",
        "the loss per token should not depend on which rows share a batch",
    )


def special_tokens_in_text(setting: Setting, tokenizer: Tokenizer, row: Row) -> Difference:
    """A row whose text spells the end token."""
    text = f"What does {tokenizer.eos_token} mean?"
    end = tokenizer.eos_token_id
    ours = tokenizer.encode(text)[1:].count(end)
    theirs = reference_tokenizer(setting.model)(text)["input_ids"][1:].count(end)
    return Difference(
        "special tokens spelled in a row's text",
        f"{text!r} holds {ours} end tokens",
        f"it holds {theirs}",
        "text is text: a row, or a user's question, should not be able to end a response",
    )


def margins(setting: Setting) -> Difference:
    """The Bradley–Terry loss of four pairs with margins."""
    better, worse = torch.tensor([2.0, 1.0, 0.5, -1.0]), torch.tensor([1.0, 1.5, 0.0, -2.0])
    wanted = torch.tensor([0.0, 1.0, 2.0, 3.0])
    total, count = bradley_terry(better, worse, wanted, torch.ones(4))
    # trl 0.11.4's line: the model's rewards are (B, 1), the collator's margins (B,).
    broadcast = -F.logsigmoid(better[:, None] - worse[:, None] - wanted)
    return Difference(
        "margins",
        f"{float(total / count):.4f}, the mean over {int(count)} pairs",
        f"trl 0.11's formula gives {float(broadcast.mean()):.4f}, over {broadcast.numel()} pairs of a reward and a "
        "margin; trl 1.16 agrees with minift",
        "each pair has a margin of its own",
    )


def sft_trainer(setting: Setting, tokenizer: Tokenizer, rows: Sequence[Row], **values: Any) -> SFTTrainer:
    """trl's trainer with these rows to train and to evaluate on."""
    texts = []
    for row in rows:
        prompt, completion = split_row(row, tokenizer, TEMPLATE, TEMPLATE.response_template)
        texts.append({"prompt": "".join(prompt), "completion": "".join(completion[:-1])})
    trainer = SilentSFTTrainer(
        model=reference_model(OPTForCausalLM, setting.model, "float32"),
        processing_class=reference_tokenizer(setting.model),
        train_dataset=Dataset.from_list(texts),
        eval_dataset=Dataset.from_list(texts),
        args=SFTConfig(**reference_values(PLAN, setting.scratch), **values),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
