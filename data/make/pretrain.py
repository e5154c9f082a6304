"""Make `data/model`: an OPT of 3.9 million parameters, a language model of Python's standard library.

    python -m data.make.pretrain --dtype bfloat16                 the model that ships
    python -m data.make.pretrain --untrained --out runs/random    the same shape and tokenizer, random weights

The corpus is the source of the standard library of the Python that runs this script, tests included: every installation
has it. The tokenizer is a byte-level BPE trained on it, in the files of an OPT checkpoint. minift's own loop trains the
model on 10.6 million tokens. The model that ships was made with Python 3.11.7 (the script prints the corpus's SHA-256:
c5348b6827d6cb7c…) in 43 minutes on two cores with AVX512-BF16; its held-out loss went from 8.756 to 2.702 per token.
Another Python, dtype or processor gives a similar model, not the same one.
"""

import argparse
import hashlib
import json
import sysconfig
import tempfile
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

from minift.batching import Batch, Loader, collate
from minift.commands.cli import CommandParser, run_command
from minift.config import Config
from minift.encode import Example
from minift.files.text import read_json_lines, write_json_lines, write_text
from minift.files.tokenizer import load_tokenizer, save_tokenizer
from minift.files.weights import save_model
from minift.losses import completion_cross_entropy, next_token_targets
from minift.model import OPT, OPTConfig
from minift.run import checkpoint
from minift.tokenizer import Tokenizer
from minift.trainer import Progress, Task, train

ROW_LENGTH = 512
BATCH_SIZE = 8
EVAL_ROWS = 64
VOCABULARY = 4096
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in OPT's vocabulary
# Tables of characters and generated reference text: long, and unlike other code.
LEFT_OUT = {"site-packages", "__pycache__", "encodings", "pydoc_data", "idlelib", "lib2to3", "turtledemo", "data"}

CONFIG = OPTConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    ffn_dim=1024,
    word_embed_proj_dim=128,
    max_position_embeddings=ROW_LENGTH,
    do_layer_norm_before=False,  # as facebook/opt-350m: post-LN, with projections around a narrower embedding
)


def main() -> None:
    parser = CommandParser("python -m data.make.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/model"))
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=42)
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="bfloat16 needs AVX512-BF16 or AMX")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in runs/pretrain")
    parser.add_argument("--untrained", action="store_true", help="random weights with the tokenizer of data/model")
    flags = parser.parse_args()

    model = OPT(CONFIG)
    initialise(model, flags.seed)
    print(f"parameters: {sum(parameter.numel() for parameter in model.parameters()):,}")
    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.untrained:
        save_tokenizer(load_tokenizer("data/model"), flags.out)
        save_model(model, flags.out, dtype=torch.float16)
        return

    texts = standard_library()
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    print(f"corpus: {len(texts)} files, {sum(map(len, texts)):,} characters, sha256 {digest[:16]}")
    tokenizer = train_tokenizer(texts)
    save_tokenizer(tokenizer, flags.out)
    rows = pack(texts, tokenizer)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(flags.seed)).tolist()
    eval_rows, train_rows = ([rows[i] for i in part] for part in (order[:EVAL_ROWS], order[EVAL_ROWS:]))
    print(f"tokens: {len(rows) * ROW_LENGTH:,} in rows of {ROW_LENGTH}, {EVAL_ROWS} rows held out")

    run = PretrainingRun(Path("runs/pretrain"), resume=flags.resume)
    train_language_model(model, train_rows, eval_rows, flags, run)
    held_out = {line["step"]: round(line["loss"], 3) for line in run.lines if line["split"] == "eval"}
    print("held-out loss by step:", held_out)
    save_model(model, flags.out, dtype=torch.float16)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draw fresh weights: N(0, 1 / fan-in) for matrices, N(0, 1 / width) for embeddings, biases 0, LayerNorms 1.

    The last matrix of each residual branch is smaller by √(2 · layers), as in GPT-2 (Radford et al. 2019, section 2.3).
    transformers' OPT draws everything from N(0, 0.02²). In a narrow model with a projected embedding, the token would
    then reach the first layer far smaller than its position does (√128 · 0.02² against 0.02), and post-LN training
    starts badly.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            ends_residual_branch = name.endswith(("out_proj", "fc2"))
            scale = (2 * model.config.num_hidden_layers) ** -0.5 if ends_residual_branch else 1.0
            module.weight.normal_(0.0, scale * module.in_features**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, module.embedding_dim**-0.5, generator=generator)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


def standard_library() -> list[str]:
    """Return the source files of this Python's standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    return [text for text in texts if len(text) > 200 and text.isascii()]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE on `texts`; return it as read from the files of an OPT checkpoint."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save_model(folder)
        names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
        config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False, **names}
        write_text(Path(folder, "tokenizer_config.json"), json.dumps(config, indent=1) + "\n")
        return load_tokenizer(folder)


def pack(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Concatenate the files, each after a `</s>` as in OPT's own training text; cut them into rows of equal length."""
    stream = [token for text in texts for token in tokenizer.encode(text)]
    return [stream[start : start + ROW_LENGTH] for start in range(0, len(stream) - ROW_LENGTH + 1, ROW_LENGTH)]


class PretrainingRun:
    """The loop's `Recorder` at its smallest: metrics.jsonl and checkpoints/ in a folder."""

    def __init__(self, folder: Path, *, resume: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.resume = folder, resume
        self.lines: list[dict[str, Any]] = []

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        if not self.resume:
            return Progress()
        progress = checkpoint.load(self.folder / "checkpoints", model, optimizer)
        lines = read_json_lines(self.folder / "metrics.jsonl")
        self.lines = [line for _, line in lines if line["step"] <= progress.step]
        return progress

    def log(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def save(self, task: Task, optimizer: torch.optim.Optimizer, progress: Progress, *, is_best: bool) -> None:
        write_json_lines(self.folder / "metrics.jsonl", self.lines)
        checkpoint.save(self.folder / "checkpoints", task.model, optimizer, progress, task.write_model, is_best=is_best)

    def guard(self) -> AbstractContextManager[list[int]]:
        return nullcontext([])


def train_language_model(
    model: OPT, train_rows: list[list[int]], eval_rows: list[list[int]], flags: argparse.Namespace, run: PretrainingRun
) -> None:
    config = Config(
        lr=flags.lr,
        schedule="cosine",
        max_steps=flags.steps,
        warmup_steps=min(200, flags.steps // 10),
        weight_decay=0.01,
        seed=flags.seed,
        log_every=10,
        eval_every=250,
        save_every=250,
    )

    def loss(batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        wanted, targets = next_token_targets(batch.labels, batch.positions)
        hidden = model(batch.input_ids, batch.positions, batch.rows, wanted=wanted)
        return *completion_cross_entropy(hidden, model.head, targets), {}

    train_set, eval_set = ([Example(row, row) for row in rows] for rows in (train_rows, eval_rows))
    task = Task(
        model=model,
        loss=loss,
        train_batches=Loader(train_set, collate, BATCH_SIZE, seed=flags.seed, order="shuffled"),
        eval_batches=Loader(eval_set, collate, BATCH_SIZE),
        write_model=partial(save_model, model),
        unit="supervised_tokens",
        dtype=getattr(torch, flags.dtype),
    )
    train(task, config, run)


if __name__ == "__main__":
    run_command(main)
