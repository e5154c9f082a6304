"""Reward modelling, top to bottom: `python train_rm.py` trains on the pairs in data/; `--help` lists the flags."""

from minift.commands.cli import leave_on_signals, run_command

if __name__ == "__main__":  # Ctrl-C while torch is imported ends in one line
    leave_on_signals()
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from minift.batching import Loader
from minift.commands import terminal
from minift.commands.flags import parse
from minift.files.datasets import PAIR_SCHEMAS
from minift.files.pretrained import load_for_rm
from minift.files.templates import load_template
from minift.lora import merge
from minift.losses import bradley_terry, completion_cross_entropy, next_token_targets, preference_metrics
from minift.model import last_tokens
from minift.pairs import PairBatch, Ranking, collate_rankings, encode_rankings
from minift.run.distributed import RANKS
from minift.run.exam import compare_rewards, ranking_as_seen, ranking_sample, score_held_out
from minift.run.folder import Run
from minift.run.setup import export, group_by_chosen, load_splits, max_length_for, prepare, swap_half
from minift.trainer import Task, train


def main() -> None:
    """Turn a language model into a reward model; measure held-out accuracy before and after."""
    config = parse("rm")
    terminal.print_values(config, "rm")
    run = Run("rm", config)  # nothing on disk yet

    # 1. A language model's body with a fresh head of one output, and its tokenizer.
    files = run.find_model()
    model, tokenizer = load_for_rm(files, seed=config.seed, dtype=run.weights_dtype, mapped=config.fsdp)
    model = prepare(model, run)  # device, dropout, LoRA

    # 2. How text becomes ids: the prompt with each of its responses, best first, and the end token.
    template = load_template(config.template)
    length = max_length_for(config, model)
    encode = partial(
        encode_rankings, tokenizer=tokenizer, template=template, max_length=length, margin_field=config.margin_field
    )

    # 3. Pairs to train on, and pairs held out.
    train_set, eval_set = load_splits(run, PAIR_SCHEMAS, encode)
    terminal.print_summaries(train_set, eval_set)
    rankings: Sequence[Ranking] = train_set.examples
    if config.shuffle_labels:  # the control experiment: half of the pairs change sides
        rankings = swap_half(rankings, train_set.categories, config.seed)
    elif config.group_prompts:
        rankings = group_by_chosen(rankings)
    are_grouped = config.group_prompts and any(ranking.best_only for ranking in rankings)
    terminal.show_pairs(rankings, len(train_set.examples), tokenizer, are_grouped=are_grouped)

    # 4. A batch is the flat list of its tokens; a prompt that responses share is in it once.
    train_batches = Loader(rankings, collate_rankings, config.batch_size, run.grad_accum, config.seed, config.order)
    eval_batches = Loader(eval_set.examples, collate_rankings, config.batch_size)

    def loss(batch: PairBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the sum to minimise, the number of rankings, and metrics; the trainer divides once per step."""
        last = last_tokens(batch.rows)  # (R,) where the rewards are read
        lm_wanted, lm_targets = next_token_targets(batch.labels, batch.positions)  # (M,), (M,) for --lm-weight
        wanted = torch.cat([last, lm_wanted]) if config.lm_weight else last  # (R + M,) or (R,)
        hidden = model.decoder(batch.input_ids, batch.positions, batch.rows, wanted=wanted)
        rewards = model.rewards(hidden[: len(last)])  # (R,); without --lm-weight: model(input_ids, positions, rows)
        batch = batch.to(rewards.device)
        chosen, rejected = rewards[batch.chosen], rewards[batch.rejected]  # (P,), (P,)
        total, count = bradley_terry(chosen, rejected, batch.margins, batch.weights, config.center_rewards)  # scalars
        metrics = preference_metrics(chosen, rejected, batch.weights)
        # Logged as `loss` in both splits: Bradley–Terry alone, ln 2 for equal rewards, whatever else is minimised.
        metrics["loss"], _ = bradley_terry(chosen.detach(), rejected.detach(), batch.margins, batch.weights)
        if config.lm_weight:  # -log p(prompt and best response) of the same body
            lm_total, lm_count = completion_cross_entropy(hidden[len(last) :], model.head, lm_targets)  # scalars
            total = total + config.lm_weight * lm_total
            metrics |= {"lm_loss": lm_total.detach(), "lm_loss_count": lm_count}  # logged as the mean per token
        return total, count, metrics

    # 5. The examination: does the better response of each held-out pair get the higher reward? A pair is two rows.
    run.open(template)  # run.json: values, template, versions, fingerprints, commits
    terminal.print_plan(train_batches, config)
    score = partial(score_held_out, model, eval_set.examples, 2 * config.batch_size)
    before = run.before_training(score, len(eval_set.examples))

    # 6. Train.
    write_model = partial(export, model, tokenizer, template, run.model_files)
    unit = "prompts" if are_grouped else f"{train_set.noun}s"
    task = Task(model, loss, train_batches, eval_batches, write_model, unit, run.dtype, RANKS)
    train(task, config, run)
    write_model(run.folder)

    # 7. What it learned.
    if not config.fsdp:
        merge(model)  # adapters, if any: a plain model scores faster
    after = score()
    samples = [ranking_sample(row, b, a) for row, b, a in zip(eval_set.rows, before, after, strict=True)]
    seen = ranking_as_seen(model, tokenizer, (eval_set.examples or rankings)[0])  # for the report
    results = run.finish(compare_rewards(before, after, eval_set.categories), samples, seen)
    terminal.print_rewards(samples)
    terminal.print_results(results, run.folder)
    terminal.print_best_of(run.folder, config.recipe)


if __name__ == "__main__":
    run_command(main)
