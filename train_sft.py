"""Instruction tuning, top to bottom: `python train_sft.py` tunes the model in data/, `--help` lists the flags."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from minift.adapters import save_adapters
from minift.answers import answer, bleu_by_kind, questions
from minift.batching import Batch, Sampler, collate
from minift.checkpoint import open_run, recorded_commits, versions
from minift.config import describe, length_limit, parse, to_dict
from minift.cost import announce
from minift.datasets import drop_rows_with_input, fingerprint, load_rows, split
from minift.encode import encode_rows
from minift.errors import UserError, run_command
from minift.files import write_text
from minift.hub import at_commit, commit_of, data_files
from minift.lora import add_lora, merge, num_adapter_parameters, unmerge
from minift.losses import completion_cross_entropy
from minift.model import set_dropout
from minift.preview import safe, show
from minift.prompts import load_template
from minift.report import write_report
from minift.tokenizer import check_fits, load_tokenizer
from minift.trainer import Task, pick_device, pick_dtype, train, weights_dtype
from minift.weights import fingerprint as weights_fingerprint
from minift.weights import load_model, resolve, save_model

SHOWN, LINES = 3, 12  # examples printed before training, answers after it, and at most so many lines of each


def main() -> None:
    """From a pre-trained model and rows to a tuned model, examined before and after."""
    config = parse("sft")
    print(describe(config, "sft"), "\n")
    device = pick_device(config.device)

    # 1. A pre-trained model and its tokenizer.
    # A run that goes on does so with what it began with: the hub's branches may have moved on since.
    began = recorded_commits(Path(config.out), to_dict(config, "sft")) if config.resume else {}
    source = resolve(config.model, began.get("weights") or config.revision)
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=weights_dtype(config)).to(device)
    check_fits(tokenizer, model.config.vocab_size, config.model)
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    if config.lora_rank:
        torch.manual_seed(config.seed)
        try:
            add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
        except ValueError as error:
            raise UserError(f"--lora-{error}") from None
        print(f"LoRA: {num_adapter_parameters(model):,} parameters to train")

    # 2. Rows to learn from, and rows held out.
    files = {"data": config.data} | ({"eval_data": config.eval_data} if config.eval_data else {})
    files = {name: at_commit(file, began.get(name)) for name, file in files.items()}

    def read(path: str):
        return drop_rows_with_input(load_rows(path)) if config.no_input_only else load_rows(path)

    rows = read(files["data"])
    train_indices, eval_indices = split(len(rows), config.eval_fraction, config.seed)
    train_rows, eval_rows = [rows[i] for i in train_indices], [rows[i] for i in eval_indices]
    if config.eval_data:
        eval_rows = read(files["eval_data"])

    # 3. Text becomes ids and labels: the completion and its end token are supervised, the prompt is not.
    template = load_template(config.template)
    options = {
        "max_length": length_limit(config, model.config.max_position_embeddings),
        "positions": model.config.max_position_embeddings,
        "response_template": config.response_template,
        "supervise": config.supervise,
    }
    examples, _, report = encode_rows(train_rows, tokenizer, template, source=config.data, **options)
    print("\n".join(report.lines()))
    eval_examples = []
    if eval_rows:
        where = config.eval_data or f"held out of {config.data}"
        eval_examples, kept, report = encode_rows(eval_rows, tokenizer, template, source=where, **options)
        eval_rows = [eval_rows[i] for i in kept]
        print("\n".join(report.lines()))
    print()
    show(examples, tokenizer, SHOWN, sys.stdout)

    # 4. A batch is the flat list of its real tokens; an optimiser step sees grad_accum of them.
    sampler = Sampler(len(examples), config.batch_size, config.grad_accum, config.seed, config.order == "shuffled")
    total_steps = config.max_steps or config.epochs * sampler.steps_per_epoch

    def micro_batches(step: int):
        return (collate([examples[i] for i in numbers]) for numbers in sampler.micro_batches(step))

    def eval_batches():
        starts = range(0, len(eval_examples), config.batch_size)
        return (collate(eval_examples[start : start + config.batch_size]) for start in starts)

    def loss(batch: Batch):
        hidden = model(batch.input_ids, batch.positions, batch.rows)
        return *completion_cross_entropy(hidden, model.head, batch.labels, batch.positions), {}

    def write_model(folder: Path) -> None:
        if config.lora_rank:
            save_adapters(model, folder / "adapter", config.model, commit_of(source))
        adapters = merge(model)
        save_model(model, folder)
        unmerge(model, adapters)
        tokenizer.save(folder)

    # 5. The examination: held-out prompts, answered before and after.
    asked = questions(
        eval_rows,
        tokenizer,
        template,
        config.response_template,
        how_many=config.bleu_samples,
        positions=model.config.max_position_embeddings,
        plain_text=config.supervise == "all",
    )

    # 6. Train.
    fingerprints = {name: fingerprint(file) for name, file in files.items()}
    commits = {name: commit_of(data_files(file)[0]) for name, file in files.items()}
    record = {
        "task": "sft",
        "values": to_dict(config, "sft"),
        "template": asdict(template),
        "versions": versions(),
        "fingerprints": fingerprints | {"weights": weights_fingerprint(source)},
        "commits": commits | {"weights": commit_of(source)},
    }
    run = open_run(Path(config.out), record, resume=config.resume)
    if device.type == "cpu":
        print(announce(model, micro_batches, total_steps, pick_dtype(config, device)), flush=True)
    before = answer(model, tokenizer, asked, "before") if asked else []
    train(
        Task(
            model=model,
            loss=loss,
            micro_batches=micro_batches,
            eval_batches=eval_batches,
            total_steps=total_steps,
            write_model=write_model,
            counted="supervised_tokens",
        ),
        config,
        run,
    )
    write_model(run)

    # 7. What it learned.
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if line["split"] == "eval"]
    results = {"eval_loss": {"before": losses[0], "after": losses[-1]}} if losses else {}
    samples = []
    if asked:
        merge(model)
        after = answer(model, tokenizer, asked, "after")
        results["bleu"] = {"before": bleu_by_kind(asked, before), "after": bleu_by_kind(asked, after)}
        for question, was, became in zip(asked, before, after, strict=True):
            prompt = tokenizer.decode(question.prompt_ids)
            texts = {"prompt": prompt, "reference": question.reference, "before": was, "after": became}
            samples.append({"kind": question.kind, **texts})
        write_text(run / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    write_text(run / "run.json", json.dumps(record | {"results": results}, indent=1) + "\n")
    write_report(run)
    for sample in samples[:SHOWN]:
        for part in ("prompt", "before", "after", "reference"):
            lines = safe(sample[part], sys.stdout).strip().splitlines() or ["(nothing)"]
            print("", f"── {part}", *lines[:LINES], *(["…"] if len(lines) > LINES else []), sep="\n")
    print_results(results)
    print(f"\nleft in {run}: {', '.join(sorted(path.name for path in run.iterdir()))}")


def print_results(results: dict) -> None:
    print(f"\n{'':30}{'before':>10}{'after':>10}")
    if "eval_loss" in results:
        print(f"{'eval loss':30}{results['eval_loss']['before']:10.3f}{results['eval_loss']['after']:10.3f}")
    for kind in results.get("bleu", {}).get("before", {}):
        name = "BLEU" if kind == "all" else f"  {kind}"
        print(f"{name:30}{results['bleu']['before'][kind]:10.1f}{results['bleu']['after'][kind]:10.1f}")


if __name__ == "__main__":
    run_command(main)
