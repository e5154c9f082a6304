"""Instruction tuning, top to bottom: `python train_sft.py` tunes the model in data/, `--help` lists the flags."""

import json
import sys
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm

from minift.batching import Batch, Sampler, collate
from minift.bleu import corpus_bleu
from minift.checkpoint import open_run, versions
from minift.config import describe, parse, to_dict
from minift.datasets import drop_rows_with_input, fingerprint, load_rows, split
from minift.encode import encode_rows, prompt_ids_and_reference
from minift.errors import UserError, run_command
from minift.files import write_text
from minift.generate import Options, generate
from minift.lora import add_lora, merge, num_adapter_parameters, unmerge
from minift.losses import completion_cross_entropy
from minift.model import set_dropout
from minift.preview import show
from minift.prompts import load_template
from minift.report import write_report
from minift.tokenizer import check_fits, load_tokenizer
from minift.trainer import Task, pick_device, train
from minift.weights import fingerprint as weights_fingerprint
from minift.weights import load_model, resolve, save_model

SHOWN, LINES = 3, 12  # examples printed before training, answers after it, and at most so many lines of each


def main() -> None:
    config = parse("sft")
    print(describe(config, "sft"), "\n")
    device = pick_device(config.device)

    # 1. A pre-trained model and its tokenizer.
    source = resolve(config.model, config.revision)
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=torch.float64 if config.dtype == "float64" else torch.float32).to(device)
    check_fits(tokenizer, model.config.vocab_size, config.model)
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    if config.lora_rank:
        torch.manual_seed(config.seed)
        try:
            add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
        except ValueError as error:
            raise UserError(f"--lora-targets: {error}") from None
        print(f"LoRA: {num_adapter_parameters(model):,} parameters to train")

    # 2. Rows to learn from, and rows held out.
    rows = load_rows(config.data)
    if config.no_input_only:
        rows = drop_rows_with_input(rows)
    train_indices, eval_indices = split(len(rows), config.eval_fraction, config.seed)
    train_rows, eval_rows = [rows[i] for i in train_indices], [rows[i] for i in eval_indices]
    if config.eval_data:
        eval_rows = load_rows(config.eval_data)

    # 3. Text becomes ids and labels: the completion and its end token are supervised, the prompt is not.
    template = load_template(config.template)
    options = {
        "max_length": config.max_length,
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

    def micro_batches(step: int):
        return (collate([examples[i] for i in numbers]) for numbers in sampler.micro_batches(step))

    def eval_batches():
        starts = range(0, len(eval_examples), config.batch_size)
        return (collate(eval_examples[start : start + config.batch_size]) for start in starts)

    def loss(batch: Batch):
        hidden = model(batch.input_ids, batch.positions, batch.rows)
        return *completion_cross_entropy(hidden, model.head, batch.labels, batch.positions), {}

    def write_model(folder: Path) -> None:
        adapters = merge(model)
        save_model(model, folder)
        unmerge(model, adapters)
        tokenizer.save(folder)

    # 5. The examination: held-out prompts answered greedily, in no more tokens than the longest reference has.
    ends = [example.labels[-1] == tokenizer.eos_token_id for example in eval_examples]
    asked = [row for row, is_whole in zip(eval_rows, ends, strict=True) if is_whole][: config.bleu_samples]
    questions = [prompt_ids_and_reference(row, tokenizer, template, config.response_template) for row in asked]
    prompts, references = [ids for ids, _ in questions], [reference for _, reference in questions]

    def answer_all(description: str) -> list[str]:
        room = model.config.max_position_embeddings - max(len(ids) for ids in prompts)
        longest = max(len(tokenizer.encode(reference)) for reference in references)
        options = Options(max_new_tokens=min(room, longest), eos_token_id=tokenizer.eos_token_id)
        with tqdm(total=len(prompts), desc=description, unit="answer") as bar:
            completions = generate(model, prompts, options, on_progress=bar.update)
        return [tokenizer.decode(ids) for (ids,) in completions]

    def bleu(answers: list[str]) -> dict[str, float]:
        scores = {}
        for kind in ["all", *sorted({row["kind"] for row in asked if "kind" in row})]:
            chosen = [i for i, row in enumerate(asked) if kind in ("all", row.get("kind"))]
            scores[kind] = corpus_bleu([answers[i] for i in chosen], [[references[i] for i in chosen]]).score
        return scores

    # 6. Train.
    files = {"data": config.data, "eval_data": config.eval_data}
    fingerprints = {name: fingerprint(file) for name, file in files.items() if file}
    record = {
        "task": "sft",
        "values": to_dict(config, "sft"),
        "versions": versions(),
        "fingerprints": fingerprints | {"weights": weights_fingerprint(source)},
    }
    run = open_run(Path(config.out), record, resume=config.resume)
    before = answer_all("before") if asked else []
    train(
        Task(
            model=model,
            loss=loss,
            micro_batches=micro_batches,
            eval_batches=eval_batches,
            total_steps=config.max_steps or config.epochs * sampler.steps_per_epoch,
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
    if asked:
        merge(model)
        after = answer_all("after")
        results["bleu"] = {"before": bleu(before), "after": bleu(after)}
        samples = [
            {"kind": row.get("kind"), "prompt": tokenizer.decode(ids), "reference": reference, "before": b, "after": a}
            for row, (ids, reference), b, a in zip(asked, questions, before, after, strict=True)
        ]
        write_text(run / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
        for sample in samples[:SHOWN]:
            for part in ("prompt", "before", "after", "reference"):
                lines = sample[part].strip().splitlines() or ["(nothing)"]
                print("", f"── {part}", *lines[:LINES], *(["…"] if len(lines) > LINES else []), sep="\n")
    write_text(run / "run.json", json.dumps(record | {"results": results}, indent=1) + "\n")
    write_report(run)
    print_results(results)
    print(f"\nleft in {run}: the model, metrics.jsonl, samples.jsonl, report.html")


def print_results(results: dict) -> None:
    print(f"\n{'':30}{'before':>10}{'after':>10}")
    if "eval_loss" in results:
        print(f"{'eval loss':30}{results['eval_loss']['before']:10.3f}{results['eval_loss']['after']:10.3f}")
    for kind in results.get("bleu", {}).get("before", {}):
        name = "BLEU" if kind == "all" else f"  {kind}"
        print(f"{name:30}{results['bleu']['before'][kind]:10.1f}{results['bleu']['after'][kind]:10.1f}")


if __name__ == "__main__":
    run_command(main)
