"""Supervised fine-tuning, top to bottom: `python train_sft.py` tunes the model in data/; `--help` lists the flags."""

from minift.commands.cli import leave_on_signals, run_command

if __name__ == "__main__":  # Ctrl-C while torch is imported ends in one line
    leave_on_signals()
from functools import partial

from torch import Tensor

from minift.batching import Batch, Loader, collate
from minift.commands import terminal
from minift.commands.flags import parse
from minift.encode import encode_rows
from minift.files.datasets import TRAINING_SCHEMAS
from minift.files.pretrained import load_for_sft
from minift.files.templates import load_template
from minift.lora import merge
from minift.losses import completion_cross_entropy, next_token_targets
from minift.run.distributed import RANKS
from minift.run.exam import compare_answers, held_out_prompts, row_as_seen, sit_exam
from minift.run.folder import Run
from minift.run.setup import export, load_splits, max_length_for, prepare
from minift.trainer import Task, train


def main() -> None:
    """Fine-tune a language model on instructions; measure held-out loss, BLEU and pass rate before and after."""
    config = parse("sft")
    terminal.print_values(config, "sft")
    run = Run("sft", config)  # nothing on disk yet

    # 1. A pre-trained model and its tokenizer.
    model, tokenizer = load_for_sft(run.find_model(), dtype=run.weights_dtype, mapped=config.fsdp)
    model = prepare(model, run)  # device, dropout, LoRA

    # 2. How text becomes ids and labels: the completion and its end token are supervised, the prompt is not.
    template = load_template(config.template)
    encode = partial(
        encode_rows, tokenizer=tokenizer, template=template, max_length=max_length_for(config, model),
        response_template=config.response_template, supervise=config.supervise,
    )  # fmt: skip

    # 3. Rows to train on, and rows held out.
    train_set, eval_set = load_splits(run, TRAINING_SCHEMAS, encode)
    terminal.print_summaries(train_set, eval_set)
    terminal.show_labels(train_set.examples, tokenizer)

    # 4. A batch is the flat list of its real tokens; an optimiser step accumulates grad_accum of them.
    train_batches = Loader(train_set.examples, collate, config.batch_size, run.grad_accum, config.seed, config.order)
    eval_batches = Loader(eval_set.examples, collate, config.batch_size)

    def loss(batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the summed loss, the number of supervised tokens, and metrics; the trainer divides once per step."""
        wanted, targets = next_token_targets(batch.labels, batch.positions)  # (M,), (M,)
        hidden = model(batch.input_ids, batch.positions, batch.rows, wanted=wanted)  # (M, E): the loss makes logits
        total, count = completion_cross_entropy(hidden, model.head, targets)  # scalars
        return total, count, {}

    # 5. The examination: held-out prompts, answered greedily before and after; answers to rows with checks are run.
    questions = held_out_prompts(eval_set.rows, tokenizer, template, config, model.config.max_position_embeddings)
    run.open(template)  # run.json: values, template, versions, fingerprints, commits
    terminal.print_plan(train_batches, config)
    before = run.before_training(partial(sit_exam, model, tokenizer, questions, "before training"), len(questions))

    # 6. Train.
    write_model = partial(export, model, tokenizer, template, run.model_files)
    task = Task(model, loss, train_batches, eval_batches, write_model, "supervised_tokens", run.dtype, RANKS)
    train(task, config, run)
    write_model(run.folder)

    # 7. What it learned.
    if not config.fsdp:
        merge(model)  # adapters, if any: a plain model answers faster
    after = sit_exam(model, tokenizer, questions, "after training")
    samples = [question.sample(b, a) for question, b, a in zip(questions, before, after, strict=True)]
    seen = row_as_seen(model, tokenizer, (eval_set.examples or train_set.examples)[0])  # for the report
    results = run.finish(compare_answers(questions, before, after), samples, seen)
    terminal.print_answers(samples)
    terminal.print_results(results, run.folder, samples)
    terminal.print_chat(run.folder)


if __name__ == "__main__":
    run_command(main)
