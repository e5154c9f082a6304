"""Make `data/model`: an OPT of a few million parameters, a plain language model of Python's own standard library.

    .venv/bin/python data/pretrain.py --dtype bfloat16                 the model that ships
    .venv/bin/python data/pretrain.py --untrained --out runs/random    the same shape and tokenizer, random weights

The corpus is the source of the standard library of the Python that runs this script, tests included: every installation
has it. The tokenizer is a byte-level BPE trained on it and laid out as OPT's (vocab.json, merges.txt); the model is
trained by minift's own loop on 10.6 million tokens. The model that ships was made with Python 3.11.7 (the script prints
the corpus's SHA-256: c5348b6827d6cb7c…) in 43 minutes on two cores with AVX512-BF16; its held-out loss went from 8.756
to 2.702 nats a token. Another Python, dtype or processor gives another model of the same kind.
"""

import hashlib
import json
import sysconfig
import tempfile
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer

from minift.batching import Batch, Sampler, collate
from minift.config import Config
from minift.errors import CommandParser, run_command
from minift.losses import completion_cross_entropy
from minift.model import OPT, OPTConfig, initialise
from minift.tokenizer import Tokenizer, load_tokenizer
from minift.trainer import Task, train
from minift.weights import save_model

ROW_LENGTH = 512
ROWS_A_STEP = 8
EVAL_ROWS = 64
VOCABULARY = 4096
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in OPT's vocabulary
# Tables of characters and generated reference text: long, and nothing like the code around them.
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
    parser = CommandParser("data/pretrain.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/model"))
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dtype", default="float32", help="bfloat16 is faster on CPUs with AVX512-BF16 or AMX only")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in runs/pretrain")
    parser.add_argument("--untrained", action="store_true", help="random weights beside the tokenizer of data/model")
    flags = parser.parse_args()

    model = OPT(CONFIG)
    initialise(model, flags.seed)
    print(f"parameters: {sum(parameter.numel() for parameter in model.parameters()):,}")
    if flags.untrained:
        load_tokenizer("data/model").save(flags.out)
        save_model(model, flags.out, dtype=torch.float16)
        return

    texts = standard_library()
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    print(f"corpus: {len(texts)} files, {sum(map(len, texts)):,} characters, sha256 {digest[:16]}")
    flags.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts)
    tokenizer.save(flags.out)
    rows = pack(texts, tokenizer)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(flags.seed)).tolist()
    eval_rows, train_rows = ([rows[i] for i in part] for part in (order[:EVAL_ROWS], order[EVAL_ROWS:]))
    print(f"tokens: {len(rows) * ROW_LENGTH:,} in rows of {ROW_LENGTH}, {EVAL_ROWS} rows held out")

    run = Path("runs/pretrain")
    run.mkdir(parents=True, exist_ok=True)
    train_language_model(model, train_rows, eval_rows, flags, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: round(line["loss"], 3) for line in lines if line["split"] == "eval"}
    print("held-out loss by step:", held_out)
    save_model(model, flags.out, dtype=torch.float16)


def standard_library() -> list[str]:
    """The source files of this Python's standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    return [text for text in texts if len(text) > 200 and text.isascii()]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of `texts`, in the files of an OPT checkpoint."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    with tempfile.TemporaryDirectory() as made:
        bpe.save_model(made)
        names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
        config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False, **names}
        (Path(made) / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
        return load_tokenizer(Path(made))


def pack(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Files end to end, each led by `</s>` as OPT's own training text was, cut into rows of equal length."""
    stream = [token for text in texts for token in tokenizer.encode(text)]
    return [stream[start : start + ROW_LENGTH] for start in range(0, len(stream) - ROW_LENGTH + 1, ROW_LENGTH)]


def train_language_model(model: OPT, train_rows: list[list[int]], eval_rows: list[list[int]], flags, run: Path) -> None:
    config = Config(
        lr=flags.lr,
        schedule="cosine",
        warmup_steps=min(200, flags.steps // 10),
        weight_decay=0.01,
        seed=flags.seed,
        dtype=flags.dtype,
        log_every=10,
        eval_every=250,
        save_every=250,
        resume=flags.resume,
    )
    sampler = Sampler(len(train_rows), ROWS_A_STEP, 1, flags.seed)

    def loss(batch: Batch):
        hidden = model(batch.input_ids, batch.positions, batch.rows)
        return *completion_cross_entropy(hidden, model.head, batch.labels, batch.positions), {}

    def batches(rows: list[list[int]], chosen: list[list[int]]) -> list[Batch]:
        return [collate([(rows[i], rows[i]) for i in numbers]) for numbers in chosen]

    evaluation = [list(range(start, start + ROWS_A_STEP)) for start in range(0, EVAL_ROWS, ROWS_A_STEP)]
    task = Task(
        model=model,
        loss=loss,
        micro_batches=lambda step: batches(train_rows, sampler.micro_batches(step)),
        eval_batches=lambda: batches(eval_rows, evaluation),
        total_steps=flags.steps,
        write_model=lambda folder: save_model(model, folder),
        counted="supervised_tokens",
    )
    train(task, config, run)


if __name__ == "__main__":
    run_command(main)
