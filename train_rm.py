"""Reward modelling, top to bottom: `python train_rm.py` trains on the pairs in data/, `--help` lists the flags."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch

from minift.adapters import save_adapters
from minift.batching import PairBatch, Sampler, collate_rankings
from minift.checkpoint import open_run, recorded_commits, versions
from minift.config import describe, length_limit, parse, to_dict
from minift.cost import announce
from minift.datasets import PAIR_KINDS, fingerprint, load_rows, split
from minift.encode import Ranking, encode_rankings, group_by_chosen, responses_of
from minift.errors import UserError, run_command
from minift.files import write_text
from minift.hub import at_commit, commit_of, data_files
from minift.lora import add_lora, merge, num_adapter_parameters, unmerge
from minift.losses import bradley_terry, completion_cross_entropy
from minift.model import set_dropout
from minift.prompts import load_template
from minift.report import write_report
from minift.scoring import examine, score_rows, table
from minift.tokenizer import Tokenizer, check_fits, load_tokenizer
from minift.trainer import Task, pick_device, pick_dtype, train, weights_dtype
from minift.weights import fingerprint as weights_fingerprint
from minift.weights import new_reward_model, resolve, save_model

SHOWN, LINES = 3, 12  # examples printed before training, scored ones after it, and at most so many lines of each
MEASURED = 1000  # rankings of which the share of tokens saved is taken


def main() -> None:
    """From a language model and pairs to a reward model, examined before and after."""
    config = parse("rm")
    print(describe(config, "rm"), "\n")
    device = pick_device(config.device)

    # 1. A language model's body under a fresh head of one output, and its tokenizer.
    # A run that goes on does so with what it began with: the hub's branches may have moved on since.
    began = recorded_commits(Path(config.out), to_dict(config, "rm")) if config.resume else {}
    source = resolve(config.model, began.get("weights") or config.revision)
    tokenizer = load_tokenizer(source)
    model = new_reward_model(source, dtype=weights_dtype(config), seed=config.seed).to(device)
    check_fits(tokenizer, model.config.vocab_size, config.model)
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    if config.lora_rank:
        torch.manual_seed(config.seed)
        try:
            add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
        except ValueError as error:
            raise UserError(f"--lora-{error}") from None
        print(f"LoRA: {num_adapter_parameters(model):,} parameters to train, and the head")

    # 2. Pairs to learn from, and pairs held out.
    files = {"data": config.data} | ({"eval_data": config.eval_data} if config.eval_data else {})
    files = {name: at_commit(file, began.get(name)) for name, file in files.items()}
    rows = load_rows(files["data"], PAIR_KINDS)
    train_indices, eval_indices = split(len(rows), config.eval_fraction, config.seed)
    train_rows, eval_rows = [rows[i] for i in train_indices], [rows[i] for i in eval_indices]
    if config.eval_data:
        eval_rows = load_rows(files["eval_data"], PAIR_KINDS)

    # 3. Text becomes ids: the prompt with each of its responses, best first, each closed by the end token.
    options = {
        "max_length": length_limit(config, model.config.max_position_embeddings),
        "positions": model.config.max_position_embeddings,
        "margin_field": config.margin_field,
    }
    template = load_template(config.template)
    rankings, kept, report = encode_rankings(train_rows, tokenizer, template, source=config.data, **options)
    print("\n".join(report.lines()))
    held_out: list[Ranking] = []
    if eval_rows:
        where = config.eval_data or f"held out of {config.data}"
        held_out, kept_held_out, report = encode_rankings(eval_rows, tokenizer, template, source=where, **options)
        eval_rows = [eval_rows[i] for i in kept_held_out]
        print("\n".join(report.lines()))
    if config.shuffle_labels:
        turn_half_round(rankings, [train_rows[i].get("kind") for i in kept], config.seed)
    elif config.group_prompts:
        pairs, rankings = len(rankings), group_by_chosen(rankings)
        repeated = pairs - sum(len(ranking.responses) - 1 if ranking.best_only else 1 for ranking in rankings)
        print(f"  {len(rankings):,} prompts with all their pairs, {repeated} pairs left out that another one repeats")
    show(rankings, tokenizer)

    # 4. A batch is the flat list of its tokens, a prompt's once for all its responses.
    sampler = Sampler(len(rankings), config.batch_size, config.grad_accum, config.seed, config.order == "shuffled")
    total_steps = config.max_steps or config.epochs * sampler.steps_per_epoch

    def micro_batches(step: int):
        return (collate_rankings([rankings[i] for i in numbers]) for numbers in sampler.micro_batches(step))

    def eval_batches():
        starts = range(0, len(held_out), config.batch_size)
        return (collate_rankings(held_out[start : start + config.batch_size]) for start in starts)

    def loss(batch: PairBatch):
        """(sum, count, metrics) of Bradley–Terry over the pairs; in training the best responses' -log p is added."""
        hidden = model.decoder(batch.input_ids, batch.positions, batch.rows, None)  # (N, E)
        rewards = model.rewards(hidden, batch.rows)  # (R,)
        better, worse = rewards[batch.better], rewards[batch.worse]  # (P,)
        metrics = {
            "accuracy": better > worse,  # a tie is wrong
            "margin": better - worse,
            "reward_chosen": better,
            "reward_rejected": worse,
        }
        sums = {name: (batch.weights * values.detach()).sum() for name, values in metrics.items()}
        nats, count = bradley_terry(better, worse, batch.margins, batch.weights, config.center_rewards)
        if config.lm_weight and model.training:
            surprise, _ = completion_cross_entropy(hidden, model.head, batch.labels, batch.positions)
            nats, sums["surprise"] = nats + config.lm_weight * surprise, surprise.detach()
        return nats, count, sums

    def write_model(folder: Path) -> None:
        if config.lora_rank:
            save_adapters(model, folder / "adapter", config.model, commit_of(source))
        adapters = merge(model)
        save_model(model, folder)
        unmerge(model, adapters)
        tokenizer.save(folder)

    # 5. The examination: which side of each held-out pair gets the higher reward.
    def rewards_held_out() -> list[list[float]]:
        responses = [response for ranking in held_out for response in ranking.responses]
        rewards = iter(score_rows(model, responses, 2 * config.batch_size))
        return [[next(rewards) for _ in ranking.responses] for ranking in held_out]

    # 6. Train.
    fingerprints = {name: fingerprint(file) for name, file in files.items()}
    commits = {name: commit_of(data_files(file)[0]) for name, file in files.items()}
    record = {
        "task": "rm",
        "values": to_dict(config, "rm"),
        "template": asdict(template),
        "versions": versions(),
        "fingerprints": fingerprints | {"weights": weights_fingerprint(source)},
        "commits": commits | {"weights": commit_of(source)},
    }
    run = open_run(Path(config.out), record, resume=config.resume)
    if device.type == "cpu":
        dtype, uses_head = pick_dtype(config, device), config.lm_weight > 0
        print(announce(model, micro_batches, total_steps, dtype, uses_head=uses_head), flush=True)
    before = rewards_held_out()
    train(
        Task(
            model=model,
            loss=loss,
            micro_batches=micro_batches,
            eval_batches=eval_batches,
            total_steps=total_steps,
            write_model=write_model,
            counted="prompts" if any(ranking.best_only for ranking in rankings) else "pairs",
        ),
        config,
        run,
    )
    write_model(run)

    # 7. What it learned.
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if line["split"] == "eval"]
    results = {"eval_loss": {"before": losses[0], "after": losses[-1]}} if losses else {}
    if held_out:
        merge(model)
        after = rewards_held_out()
        kinds = [row.get("kind") for row in eval_rows]
        exams = {"before": examine(before, kinds), "after": examine(after, kinds)}
        results |= {name: {when: exam[name] for when, exam in exams.items()} for name in exams["after"]}
        samples = [
            {name: row[name] for name in ("kind", "prompt") if name in row}
            | named(responses_of(row))
            | {"rewards_before": earlier, "rewards_after": later}
            for row, earlier, later in zip(eval_rows, before, after, strict=True)
        ]
        write_text(run / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
        for row, earlier, later in list(zip(eval_rows, before, after, strict=True))[:SHOWN]:
            print_part("prompt", row.get("prompt", "(in the responses)"))
            for (name, text), first, last in zip(named(responses_of(row)).items(), earlier, later, strict=True):
                print_part(f"{name}: reward {first:.2f} before, {last:.2f} after", text)
    write_text(run / "run.json", json.dumps(record | {"results": results}, indent=1) + "\n")
    write_report(run)
    if held_out:
        print("", *table(exams), sep="\n")
        print(f"{'eval loss':30}" + "".join(f"{value:24.3f}" for value in results["eval_loss"].values()))
    print(f"\nleft in {run}: the model, metrics.jsonl, samples.jsonl, report.html")


def named(responses: Sequence, best_only: bool = False) -> dict[str, Any]:
    """Responses, best first, by what they are called."""
    names = [f"response {place}" for place in range(1, len(responses) + 1)]
    if best_only:
        names = ["chosen", *(f"rejected {place}" for place in range(1, len(responses)))]
    return dict(zip(["chosen", "rejected"] if len(names) == 2 else names, responses, strict=True))


def turn_half_round(rankings: Sequence[Ranking], kinds: Sequence[Any], seed: int) -> None:
    """The control's labels: half of the pairs, and of each kind, get the worse response as the better, by `seed`."""
    generator = random.Random(seed)
    order = generator.sample(range(len(rankings)), len(rankings))
    order.sort(key=lambda number: str(kinds[number]))
    for two in zip(order[::2], order[1::2], strict=False):
        rankings[generator.choice(two)].responses.reverse()


def show(rankings: Sequence[Ranking], tokenizer: Tokenizer) -> None:
    """Print what the loss compares, and what it saves that a prompt is computed once for all its responses."""
    measured = rankings[:MEASURED]
    tokens = sum(len(response) for ranking in measured for response in ranking.responses)
    saved = 1 - sum(len(collate_rankings([ranking]).input_ids) for ranking in measured) / tokens
    some = f" (measured on the first {MEASURED:,})" if len(rankings) > MEASURED else ""
    print(f"  {saved:.0%} of the tokens saved: what a prompt's responses begin with is computed once for all{some}")
    print("\nWhat the loss compares: rewards, read at each response's last token; the chosen one's should be higher.")
    for number, ranking in enumerate(rankings[:SHOWN]):
        shared = len(commonprefix(ranking.responses))
        first = tokenizer.decode(ranking.responses[0][:shared], skip_special_tokens=False)
        what = "prompt" if ranking.best_only else "pair"
        print_part(f"{what} {number + 1} of {len(rankings):,}: {shared} tokens that all responses begin with", first)
        for name, ids in named(ranking.responses, ranking.best_only).items():
            print_part(f"{name}: {len(ids) - shared} more", tokenizer.decode(ids[shared:], skip_special_tokens=False))


def print_part(title: str, text: str) -> None:
    lines = text.strip("\n").splitlines() or ["(nothing)"]
    print("", f"── {title}", *lines[:LINES], *(["…"] if len(lines) > LINES else []), sep="\n")


if __name__ == "__main__":
    run_command(main)
