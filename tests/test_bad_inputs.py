"""Bad input of every kind, through the real commands: one line that names what is wrong, a status, nothing changed.

`bad_inputs.md` is the table of all cases with their messages. It is what the commands print, or the last test fails;
`MINIFT_WRITE_BAD_INPUTS=1 python -m pytest tests/test_bad_inputs.py` writes it again.
"""

import gzip
import json
import os
import pickle
import re
import shlex
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.make.pretrain import initialise
from minift.files.adapters import save_adapters
from minift.files.text import LFS_POINTER
from minift.files.tokenizer import save_tokenizer
from minift.files.weights import save_model
from minift.lora import add_lora
from minift.model import OPT, OPTConfig, RewardModel
from minift.tokenizer import Tokenizer
from tests.forks import ROOT, Ended, forks
from tests.runs import snapshot, write_lines

TABLE = Path(__file__).with_name("bad_inputs.md")
LONGEST = 310  # characters of a message
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16, "word_embed_proj_dim": 8}
TRAINING = "--max-steps 2 --batch-size 2 --save-every 1 --device cpu --out new"
REST = {  # what "…" is in a command; of a flag that is given twice, the second value counts
    "train_sft.py": f"--model model --data rows.jsonl --bleu-samples 1 {TRAINING}",
    "train_rm.py": f"--model model --data pairs.jsonl {TRAINING}",
    "minift generate": "--model model --prompts prompts.jsonl --max-new-tokens 2 --device cpu",
    "minift chat": "--model model --max-new-tokens 2 --device cpu",
    "minift preview": "--model model --data rows.jsonl",
    "minift score": "--model judge --data pairs.jsonl --device cpu",
    "minift winrate": "--model-a model --model-b model --judge judge --prompts prompts.jsonl --max-new-tokens 2 "
    "--device cpu",
}
WORDS = {  # words of a command that are too long for the table, or that it cannot show
    "<400 digits>": "9" * 400,
    "<5,000 letters>": "x" * 5000,
    "<a byte that is not UTF-8>": "\udcff",
    "<an empty text>": "",
}

Content = str | bytes | None | Callable[[Path], object]


@dataclass
class Case:
    """A bad input: what is wrong, the command, what its message must contain, and how the files differ."""

    what: str
    command: str
    names: str
    files: dict[str, Content] = field(default_factory=dict)
    status: int = 2
    limits: dict[str, int] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()  # what may be new or changed: results so far, and never half a file


# --------------------------------------------------------------------------------------------------- how files differ


def lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def edit(**changes: Any) -> Callable[[Path], object]:
    """Change values of a JSON object; `...` removes one."""

    def change(path: Path) -> None:
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))

    return change


def cut(length: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:length])


def damage(at: int, new: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:at] + new + path.read_bytes()[at + len(new) :])


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(path: Path) -> None:
        state = load_file(path)
        change(state)
        save_file(state, path)

    return rewrite


def only(name: str, tensor: torch.Tensor) -> Callable[[Path], object]:
    return tensors(lambda state: state.update({name: tensor}))


def without(*names: str) -> Callable[[Path], object]:
    return tensors(lambda state: [state.pop(name) for name in names])


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def link_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def pickled(value: object) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path)


def as_bin(path: Path) -> None:
    """Write pytorch_model.bin beside the model.safetensors that `path` is, and delete this."""
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


class Evil:
    """What would run a command if its pickle were loaded."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch this_must_not_run",)


def parquet(**columns: list) -> Callable[[Path], object]:
    return lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path)


def directory(path: Path) -> None:
    path.mkdir()


def short(path: Path) -> None:
    """Give a judge 8 positions: too few for a question in its template."""
    edit(max_position_embeddings=8)(path / "config.json")
    name = "model.decoder.embed_positions.weight"
    tensors(lambda state: state.update({name: state[name][:10].clone()}))(path / "model.safetensors")


def many_tokens(path: Path) -> None:
    """Add tokens beyond the 480 rows of the model's embedding."""
    size = len(json.loads((path.parent / "vocab.json").read_text()))
    path.write_text(json.dumps({f"<{token_id}>": token_id for token_id in range(size, 481)}))


DEEP = "[" * 100_000
LFS = LFS_POINTER.decode() + "v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"
ROW = {"instruction": "Add.", "output": "a + b"}
PAIR = {"prompt": "Add.", "chosen": "a + b", "rejected": "a"}
EMBEDDING = "model.decoder.embed_tokens.weight"
Q_PROJ = "model.decoder.layers.0.self_attn.q_proj.weight"
LORA_A = "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight"
HTML = "<!DOCTYPE html>\n<html><body>Not found</body></html>\n"

SFT, RM = "train_sft.py …", "train_rm.py …"
NAMES = ("chat", "generate", "preview", "score", "winrate")
CHAT, GENERATE, PREVIEW, SCORE, WINRATE = (f"minift {name} …" for name in NAMES)
BLEU, REPORT = "minift bleu", "minift report"
RESUME = f"{SFT} --out run --resume"
LAST = "run/checkpoints/step-000002"

CASES: dict[str, list[Case]] = {}


def cases(section: str, *members: tuple) -> None:
    CASES[section] = [Case(*member) if isinstance(member, tuple) else member for member in members]


# ------------------------------------------------------------------------------------------------------------ commands

cases(
    "Commands and flags",
    ("a misspelt command", "minift genrate", "genrate: not a command, did you mean generate?"),
    ("an unknown command", "minift serve", "serve: not a command"),
    ("a flag before the command", "minift --model model", "--model: not a command"),
    ("a required flag is missing", "minift generate --model model", "--prompts"),
    ("a required flag is missing", "minift winrate --prompts prompts.jsonl", "--judge"),
    ("a required flag is missing", "minift chat --judge judge", "--model"),
    ("two places for prompts", f"{GENERATE} --prompt Add.", "--prompt: not allowed with argument --prompts"),
    ("an input without its prompt", f"{GENERATE} --input 3", "--input: it belongs to --prompt"),
    ("samples that nobody chooses from", f"{CHAT} --samples 4", "--samples 4: a reward model chooses among them"),
    ("a flag without its value", f"{SFT} --lr", "--lr: expected one argument"),
    ("a misspelt flag", f"{SFT} --batch-sise 4", "--batch-sise, did you mean --batch-size?"),
    ("trl's name of a flag", f"{SFT} --learning-rate 1e-4", "--learning-rate, did you mean --lr?"),
    ("an abbreviated flag", f"{SFT} --max-len 64", "--max-len, did you mean --max-length?"),
    ("a flag of the other script", f"{SFT} --center-rewards 0.1", "--center-rewards: only train_rm.py has it"),
    ("a flag of the other script", f"{RM} --bleu-samples 3", "--bleu-samples: only train_sft.py has it"),
    ("a value without its flag", f"{SFT} 64", "unexpected argument '64'"),
    ("a misspelt flag of a command", f"{PREVIEW} --row 2", "--row"),
    ("a value without its flag", f"{GENERATE} more", "more"),
    ("a value for a switch", f"{SFT} --resume=yes", "--resume: expected no value, got 'yes'"),
    ("text for a number", f"{SFT} --lr fast", "--lr: expected a number above 0"),
    ("text for a whole number", f"{SFT} --epochs ten", "--epochs: expected a whole number"),
    ("a fraction for a whole number", f"{SFT} --batch-size 1.5", "--batch-size: expected a whole number"),
    ("a number below the range", f"{SFT} --batch-size 0", "--batch-size: expected a whole number of at least 1"),
    ("a negative learning rate", f"{SFT} --lr -1e-4", "--lr: expected a number above 0"),
    ("NaN for a number", f"{SFT} --weight-decay nan", "--weight-decay: expected a number of at least 0"),
    ("infinity for a number", f"{SFT} --max-grad-norm inf", "--max-grad-norm: expected a number above 0"),
    ("a whole number that is too large", f"{SFT} --epochs <400 digits>", "--epochs: expected a whole number"),
    ("a number that is too large", f"{SFT} --lora-alpha 1e308", "--lora-alpha: expected a number above 0"),
    ("a seed that is too large", f"{SFT} --seed 4294967296", "--seed: expected a whole number"),
    ("digits of another script", f"{PREVIEW} --rows ²", "--rows"),
    ("a fraction of 1", f"{SFT} --eval-fraction 1", "--eval-fraction: expected a number of at least 0 and below 1"),
    ("nothing left to train on", f"{SFT} --eval-fraction 0.99", "--eval-fraction 0.99"),
    ("a value that is not a choice", f"{SFT} --schedule exponential", "--schedule: expected one of linear"),
    ("a value that is not a choice", f"{BLEU} hyp.txt ref.txt --tokenize zh2", "--tokenize"),
    ("a recipe that does not exist", f"{SFT} --recipe large", "--recipe: expected one of tiny, course"),
    ("an empty text", f"{SFT} --model <an empty text>", "--model: expected some text"),
    ("an empty text", f"{GENERATE} --model <an empty text>", "'': no such folder"),
    ("an empty name in a list", f"{SFT} --lora-rank 2 --lora-targets q_proj,,v_proj", "--lora-targets"),
    ("a byte that is not UTF-8 in a value", f"{SFT} --template '<a byte that is not UTF-8>'", "--template \\udcff"),
    ("a value of 5,000 characters", f"{SFT} --schedule '<5,000 letters>'", "--schedule: expected one of"),
    ("a model's name of 5,000 characters", f"{SFT} --model '<5,000 letters>'", "…: File name too long"),
    ("a device that does not exist", f"{SFT} --device cuda:7", "--device cuda:7"),
    ("a device that is not one", f"{SFT} --device tpu", "--device: expected auto, cpu, mps, cuda or cuda:N"),
    ("a device that is not one", f"{SCORE} --device gpu", "--device gpu"),
    ("a device of another machine", f"{GENERATE} --device mps", "--device mps: expected auto, cpu or one of"),
    ("--eval-data with --eval-fraction", f"{SFT} --eval-data rows.jsonl --eval-fraction 0.5", "--eval-fraction"),
    ("half precision for all weights", f"{SFT} --base-dtype float16", "--base-dtype float16"),
    ("two dtypes", f"{SFT} --lora-rank 2 --base-dtype bfloat16 --dtype float32", "--base-dtype bfloat16"),
    ("groups of shuffled labels", f"{RM} --group-prompts --shuffle-labels", "--group-prompts"),
    ("a rank that is too large", f"{SFT} --lora-rank 500", "--lora-rank is 500"),
    ("linears that the model does not have", f"{SFT} --lora-rank 2 --lora-targets c_attn", "--lora-targets"),
    ("a length beyond the model's positions", f"{SFT} --max-length 500", "--max-length 500"),
    ("a length beyond the model's positions", f"{PREVIEW} --max-length 500", "--max-length 500"),
    ("a revision of a folder", f"{SFT} --revision main", "--revision main"),
    ("a learning rate at which the loss overflows", f"{SFT} --schedule constant --lr 1e29", "--lr 1e+29",
        {}, 2, {}, ("new",)),
)  # fmt: skip

cases(
    "Options of generation",
    ("no new token", f"{GENERATE} --max-new-tokens 0", "--max-new-tokens is 0"),
    ("more new tokens than positions", f"{GENERATE} --max-new-tokens 500", "prompts.jsonl: line 1"),
    ("a whole number that is too large", f"{GENERATE} --max-new-tokens <400 digits>", "--max-new-tokens"),
    ("text for a whole number", f"{GENERATE} --num-beams many", "--num-beams"),
    ("a negative temperature", f"{GENERATE} --temperature -1", "--temperature is -1.0"),
    ("a negative temperature", f"{CHAT} --temperature -1", "--temperature is -1.0"),
    ("samples that cannot differ", f"{CHAT} --judge judge --samples 2 --temperature 0", "--temperature 0.0"),
    ("no sample", f"{CHAT} --judge judge --samples 0", "--samples: '0': expected a whole number"),
    ("a temperature of NaN", f"{GENERATE} --temperature nan", "--temperature is nan"),
    ("a temperature that is too small", f"{GENERATE} --temperature 1e-39", "--temperature is 1e-39"),
    ("beams that sample", f"{GENERATE} --num-beams 2 --temperature 1", "--temperature is 1.0, expected 0 with beams"),
    ("top-p above 1", f"{GENERATE} --top-p 1.5", "--top-p is 1.5"),
    ("top-k where nothing is sampled", f"{GENERATE} --top-k 5 --temperature 0", "--top-k is 5"),
    ("a negative top-k", f"{GENERATE} --top-k -1", "--top-k is -1"),
    ("more samples than beams", f"{GENERATE} --num-beams 2 --num-samples 3", "--num-samples is 3"),
    ("more beams than tokens", f"{GENERATE} --num-beams 5000", "--num-beams"),
    ("a repetition penalty of 0", f"{GENERATE} --repetition-penalty 0", "--repetition-penalty is 0.0"),
    ("a negative seed", f"{GENERATE} --seed -1", "--seed is -1"),
    ("a length penalty that is too large", f"{GENERATE} --num-beams 2 --length-penalty 1e9", "--length-penalty"),
    ("an early stop that is not a choice", f"{GENERATE} --early-stopping maybe", "--early-stopping"),
)

# ----------------------------------------------------------------------------------------------------------------- rows

cases(
    "Files of rows",
    ("no such file", f"{SFT} --data missing.jsonl", "missing.jsonl: no such file"),
    ("no such data set", f"{SFT} --data nobody/nothing", "nobody/nothing"),
    ("a directory", f"{SFT} --data folder.jsonl", "folder.jsonl: a directory", {"folder.jsonl": directory}),
    ("a directory", f"{SFT} --data model", "model: a directory"),
    ("a file of another kind", f"{SFT} --data rows.tsv", "rows.tsv: expected a .json, .jsonl, .csv or .parquet file",
        {"rows.tsv": "instruction\toutput\nAdd.\ta\n"}),
    ("a link to itself", f"{SFT} --data loop.jsonl", "loop.jsonl: Too many levels",
        {"loop.jsonl": link_to("loop.jsonl")}),
    ("a link that leads nowhere", f"{SFT} --data lost.jsonl", "lost.jsonl: no such file",
        {"lost.jsonl": link_to("gone.jsonl")}),
    ("a file as a folder", f"{SFT} --data rows.jsonl/x.jsonl", "rows.jsonl/x.jsonl: no such file"),
    ("an empty file", f"{SFT} --data bad.jsonl", "bad.jsonl: no rows in it", {"bad.jsonl": ""}),
    ("blank lines only", f"{SFT} --data bad.jsonl", "bad.jsonl: no rows in it", {"bad.jsonl": "\n \n\t\n"}),
    ("an empty array", f"{SFT} --data bad.json", "bad.json: no rows in it", {"bad.json": "[]"}),
    ("a byte order mark only", f"{SFT} --data bad.jsonl", "bad.jsonl: no rows in it", {"bad.jsonl": "\ufeff"}),
    ("CSV in a .jsonl file", f"{SFT} --data bad.jsonl", "bad.jsonl:1:1: malformed JSON",
        {"bad.jsonl": "instruction,output\nAdd.,a\n"}),
    ("a CSV file of names only", f"{SFT} --data bad.csv", "bad.csv: no rows in it, expected a line of names",
        {"bad.csv": "instruction,output\n"}),
    ("a CSV row with too few fields", f"{SFT} --data bad.csv", "bad.csv:3: 1 fields, expected the 2",
        {"bad.csv": "instruction,output\nAdd.,a\nAdd.\n"}),
    ("a comma without quotes in CSV", f"{SFT} --data bad.csv", "bad.csv:4: 3 fields, expected the 2",
        {"bad.csv": 'instruction,output\n"Add\nthem.",a\nAdd, now.,a\n'}),
    ("a quote that does not end in CSV", f"{SFT} --data bad.csv", "bad.csv:2: malformed CSV: unexpected end of data",
        {"bad.csv": 'instruction,output\n"Add.,a\nAdd.,a\n'}),
    ("a name twice in CSV", f"{RM} --data bad.csv", "bad.csv:1: two fields have the name 'chosen'",
        {"bad.csv": "prompt,chosen,chosen\nAdd.,a,b\n"}),
    ("semicolons in CSV", f"{SFT} --data bad.csv", "bad.csv:2: no field of a row in it",
        {"bad.csv": "instruction;output\nAdd.;a\n"}),
    ("an HTML page", f"{SFT} --data bad.jsonl", "bad.jsonl:1:1: malformed JSON", {"bad.jsonl": HTML}),
    ("a Git LFS pointer", f"{SFT} --data bad.jsonl", "bad.jsonl: a Git LFS pointer", {"bad.jsonl": LFS}),
    ("a Git LFS pointer", f"{SFT} --data bad.parquet", "bad.parquet: a Git LFS pointer", {"bad.parquet": LFS}),
    ("a truncated line", f"{SFT} --data bad.jsonl", "bad.jsonl:2:", {"bad.jsonl": lines(ROW, '{"instruction": "Ad')}),
    ("two objects on one line", f"{SFT} --data bad.jsonl", "bad.jsonl:1:",
        {"bad.jsonl": json.dumps(ROW) + " " + json.dumps(ROW)}),
    ("single quotes", f"{SFT} --data bad.jsonl", "bad.jsonl:2:2: malformed JSON",
        {"bad.jsonl": lines(ROW, str(ROW))}),
    ("an array that does not end", f"{SFT} --data bad.json", "bad.json:1:", {"bad.json": json.dumps([ROW, ROW])[:-1]}),
    ("a raw line end in a string", f"{SFT} --data bad.jsonl", "bad.jsonl:1:",
        {"bad.jsonl": '{"instruction": "a\nb", "output": "c"}\n'}),
    ("NUL bytes", f"{SFT} --data bad.jsonl", "bad.jsonl:2:", {"bad.jsonl": lines(ROW) + "\0" * 20 + "\n"}),
    ("UTF-16", f"{SFT} --data bad.jsonl", "bad.jsonl:1: not UTF-8", {"bad.jsonl": lines(ROW).encode("utf-16")}),
    ("Latin-1", f"{SFT} --data bad.jsonl", "bad.jsonl:2: not UTF-8 text (byte 0xe9)",
        {"bad.jsonl": lines(ROW).encode() + '{"instruction": "é", "output": "a"}'.encode("latin-1")}),
    ("a damaged gzip file", f"{SFT} --data bad.jsonl.gz", "bad.jsonl.gz: truncated or damaged gzip",
        {"bad.jsonl.gz": gzip.compress(lines(ROW).encode(), mtime=0)[:-10]}),
    ("a gzip file of something else", f"{SFT} --data bad.json.gz", "bad.json.gz:1:1",
        {"bad.json.gz": gzip.compress(b"not JSON", mtime=0)}),
    ("a damaged parquet file", f"{SFT} --data bad.parquet", "bad.parquet: unreadable", {"bad.parquet": "PAR1"}),
    ("an empty parquet file", f"{SFT} --data bad.parquet", "bad.parquet", {"bad.parquet": ""}),
    ("a parquet file without rows", f"{SFT} --data bad.parquet", "bad.parquet: no rows in it",
        {"bad.parquet": parquet(instruction=pyarrow.array([], pyarrow.string()))}),
    ("parquet with bytes that are not UTF-8", f"{SFT} --data bad.parquet", "bad.parquet: row 1: field 'output'",
        {"bad.parquet": parquet(instruction=["a"], output=[b"\xff"])}),
    ("parquet under another name", f"{SFT} --data bad.jsonl", "bad.jsonl:",
        {"bad.jsonl": parquet(instruction=["a"] * 3, output=["b"] * 3)}),
    ("weights as data", f"{SFT} --data bad.json", "bad.json:", {"bad.json": safetensors({}, b"\xff" * 99)}),
    ("deeply nested arrays", f"{SFT} --data bad.jsonl", "bad.jsonl", {"bad.jsonl": DEEP}),
    ("deeply nested value of a field", f"{SFT} --data bad.jsonl", "bad.jsonl:1",
        {"bad.jsonl": '{"instruction": "a", "output": "b", "kind": ' + DEEP + "}"}),
    ("a number of 5,000 digits", f"{SFT} --data bad.jsonl", "bad.jsonl:1",
        {"bad.jsonl": '{"instruction": "a", "output": "b", "id": ' + "9" * 5000 + "}\n"}),
    ("NaN, which JSON does not have", f"{SFT} --data bad.jsonl", "bad.jsonl:1:43: malformed JSON: NaN",
        {"bad.jsonl": '{"instruction": "a", "output": "b", "id": NaN}\n'}),
    ("a number that is infinite", f"{SFT} --data bad.jsonl", "bad.jsonl:1:43: malformed JSON: 1e999",
        {"bad.jsonl": '{"instruction": "a", "output": "b", "id": 1e999}\n'}),
    ("no held-out file", f"{SFT} --eval-data missing.jsonl", "missing.jsonl: no such file"),
    ("a held-out file without rows", f"{SFT} --eval-data bad.jsonl", "bad.jsonl: no rows in it", {"bad.jsonl": ""}),
    ("a held-out file of pairs", f"{SFT} --eval-data pairs.jsonl", "pairs.jsonl:1"),
    ("no prompts", f"{GENERATE} --prompts bad.jsonl", "bad.jsonl: no rows in it", {"bad.jsonl": "\n"}),
    ("an empty standard input", f"{GENERATE} --prompts -", "standard input: no rows in it"),
    ("a hub data set's split of a local file", f"{SFT} --data rows.jsonl:train", "rows.jsonl:train"),
)  # fmt: skip


def rows_case(what: str, row: object, names: str, command: str = SFT, flag: str = "--data") -> Case:
    """Return a case whose file has one bad line after a good one of the same schema."""
    good = {SFT: ROW, PREVIEW: ROW, RM: PAIR, SCORE: PAIR, GENERATE: ROW, WINRATE: ROW}[command]
    return Case(what, f"{command} {flag} bad.jsonl", f"bad.jsonl:2: {names}", {"bad.jsonl": lines(good, row)})


cases(
    "Rows of instructions",
    rows_case("a number", 3, "3, expected an object"),
    rows_case("an array", ["Add.", "a"], "["),
    rows_case("null", "null", "null, expected an object"),
    rows_case("no field", {}, "no field of a row in it"),
    rows_case("no field that is known", {"a": "b"}, "no field of a row in it"),
    rows_case("null in every field", {"instruction": None, "output": None}, "no field of a row in it"),
    rows_case("fields of other names", {"question": "Add.", "answer": "a"}, "no field of a row in it"),
    rows_case("'answer' for 'output'", {"instruction": "Add.", "answer": "a"}, "field 'output' is missing"),
    rows_case("no output", {"instruction": "Add."}, "field 'output' is missing"),
    rows_case("a null output", {"instruction": "Add.", "output": None}, "field 'output' is missing, or null"),
    rows_case("no instruction", {"output": "a"}, "field 'instruction' is missing"),
    rows_case("a number as output", {"instruction": "Add.", "output": 3}, "field 'output' is 3, expected a string"),
    rows_case("a list as output", {"instruction": "Add.", "output": ["a"]}, "field 'output' is [\"a\"]"),
    rows_case("an object as instruction", {"instruction": {}, "output": "a"}, "field 'instruction' is {}"),
    rows_case("a boolean as input", {"instruction": "Add.", "input": True, "output": "a"}, "field 'input' is true"),
    rows_case("a lone surrogate", {"instruction": "\ud800", "output": "a"}, "field 'instruction' has a lone surrogate"),
    rows_case("a lone surrogate in 'kind'", ROW | {"kind": "\udfff"}, "field 'kind' has a lone surrogate"),
    rows_case("half of a prompt and completion", {"prompt": "Add."}, "field 'completion' is missing"),
    rows_case("another schema", {"prompt": "Add.", "completion": "a"}, "this row has 'prompt' and 'completion'"),
    rows_case("a number as text", {"text": 3}, "field 'text' is 3, expected a string"),
    rows_case("a pair", PAIR, "field 'completion' is missing"),
    rows_case("a name of 5,000 characters", {"x" * 5000: "a"}, "no field of a row in it"),
    rows_case("control characters in a name", {"\x1b[2J": "a"}, "no field of a row in it"),
    ("a null key in every row", f"{SFT} --data bad.jsonl", "bad.jsonl:1: field 'output' is missing, or null",
        {"bad.jsonl": lines({"instruction": "a", "output": None}, {"instruction": "b", "output": None})}),
    ("the same key twice, last null", f"{SFT} --data bad.jsonl", "bad.jsonl:1: field 'output' is missing, or null",
        {"bad.jsonl": '{"instruction": "a", "output": "b", "output": null}\n'}),
    ("the rows are in an object", f"{SFT} --data bad.json", "bad.json: row 1: no field of a row in it",
        {"bad.json": json.dumps({"data": [ROW, ROW]}, indent=1)}),
    ("an array of arrays", f"{SFT} --data bad.json", "bad.json: row 1: [",
        {"bad.json": json.dumps([[ROW]])}),
    ("a row of an array", f"{SFT} --data bad.json", "bad.json: row 2: field 'output'",
        {"bad.json": json.dumps([ROW, {"instruction": "a"}])}),
    ("every row has an input", f"{SFT} --data bad.jsonl --no-input-only", "--no-input-only",
        {"bad.jsonl": lines(ROW | {"input": "1"})}),
    ("no response in the texts", f"{SFT} --data bad.jsonl --eval-fraction 0 --response-template '### Answer:'",
        "bad.jsonl: none of its 1 rows", {"bad.jsonl": lines({"text": "Question? Answer."})}),
    ("a response template in another case", f"{SFT} --data bad.jsonl --eval-fraction 0 --response-template ANSWER:",
        "upper and lower case", {"bad.jsonl": lines({"text": "Question? Answer: yes"})}),
    ("a response template with \\n in letters",
        f"{SFT} --data bad.jsonl --eval-fraction 0 --response-template 'Answer:\\n'",
        "a backslash and a letter", {"bad.jsonl": lines({"text": "Question?\nAnswer:\nyes"})}),
    ("no text rows for an empty template", f"{SFT} --data bad.jsonl --template none", "--response-template",
        {"bad.jsonl": lines({"text": "a"}, {"text": "b"})}),
    ("prompts longer than --max-length", f"{SFT} --max-length 4 --eval-fraction 0", "rows.jsonl: none of its 8 rows"),
    ("a row longer than the model's positions", f"{PREVIEW} --data bad.jsonl", "bad.jsonl: line 1",
        {"bad.jsonl": lines({"instruction": "word " * 500, "output": "a"})}),
    ("a flag of rows for pairs in preview", f"{PREVIEW} --data pairs.jsonl --supervise all",
        "--supervise: it is for rows"),
    ("rows and pairs in preview", f"{PREVIEW} --data bad.jsonl", "bad.jsonl:2: this row has 'chosen' and 'rejected'",
        {"bad.jsonl": lines(ROW, PAIR)}),
)  # fmt: skip

USER, ASSISTANT = ({"role": role, "content": "Hi"} for role in ("user", "assistant"))

cases(
    "Conversations",
    rows_case("no answer", {"messages": [USER]}, "field 'messages' has no answer of the assistant"),
    rows_case("no message", {"messages": []}, "field 'messages' is [], expected a list"),
    rows_case("a text as messages", {"messages": "Hi"}, "field 'messages' is \"Hi\", expected a list"),
    rows_case("a text as message", {"messages": ["Hi"]}, "message 1 of 'messages' is \"Hi\""),
    rows_case("the system alone", {"messages": [USER | {"role": "system"}]}, "field 'messages' has no message of"),
    rows_case("an unknown role", {"messages": [USER, {"role": "tool", "content": "a"}]},
        "message 2 of 'messages': 'role' is \"tool\", expected system, user or assistant"),
    rows_case("a role of ShareGPT's that is unknown", {"conversations": [{"from": "bing", "value": "a"}]},
        "message 1 of 'conversations': 'from' is \"bing\""),
    rows_case("a list as content", {"messages": [USER | {"content": ["Hi"]}, ASSISTANT]},
        "message 1 of 'messages': 'content' is [\"Hi\"], expected a string"),
    rows_case("a null content", {"messages": [USER, {"role": "assistant", "content": None}]},
        "message 2 of 'messages': 'content' is null, expected a string"),
    rows_case("two questions in a row", {"messages": [USER, USER, ASSISTANT]},
        "message 2 of 'messages': 'role' is \"user\", expected assistant"),
    rows_case("an answer first", {"messages": [ASSISTANT, USER, ASSISTANT]},
        "message 1 of 'messages': 'role' is \"assistant\", expected system or user"),
    rows_case("the system in the middle", {"messages": [USER, ASSISTANT, USER | {"role": "system"}]},
        "message 3 of 'messages': 'role' is \"system\", expected user"),
    rows_case("a lone surrogate", {"messages": [USER | {"content": "\ud800"}, ASSISTANT]},
        "message 1 of 'messages': field 'content' has a lone surrogate"),
    rows_case("a conversation under another name", {"dialog": [USER, ASSISTANT]}, "no field of a row in it"),
    rows_case("a history that is a text", ROW | {"history": "Hi"}, "field 'history' is \"Hi\", expected a list"),
    rows_case("a history of three texts", ROW | {"history": [["a", "b", "c"]]}, "field 'history' is [["),
    rows_case("sides with two questions", {"chosen": [USER, ASSISTANT],
        "rejected": [USER | {"content": "Yo"}, ASSISTANT]}, "'chosen' and 'rejected' differ in more than", RM),
    rows_case("a side that ends with a question", {"chosen": [USER, ASSISTANT], "rejected": [USER]},
        "the last message of 'rejected' is the user's", RM),
    rows_case("no message to answer", {"messages": []}, "field 'messages' is []", GENERATE, "--prompts"),
)  # fmt: skip

cases(
    "Preference pairs and rankings",
    rows_case("no rejected side", {"prompt": "Add.", "chosen": "a"}, "field 'rejected' is missing", RM),
    rows_case("a null chosen side", PAIR | {"chosen": None}, "field 'chosen' is missing, or null", RM),
    rows_case("a number as side", PAIR | {"rejected": 0}, "field 'rejected' is 0, expected a string", RM),
    rows_case("a list of messages as side", PAIR | {"chosen": [{"role": "user"}]}, "field 'chosen' is [{", RM),
    rows_case("a number as prompt", PAIR | {"prompt": 1}, "field 'prompt' is 1, expected a string", RM),
    rows_case("a question of another name", {"question": "Add.", "chosen": "a", "rejected": "b"},
        "'question' is not read: rename it to 'prompt'", RM),
    rows_case("rows of instructions", ROW, "no field of a row in it", RM),
    rows_case("a ranking among pairs", {"prompt": "Add.", "responses": ["a", "b"]}, "this row has 'responses'", RM),
    rows_case("a ranking of one response", {"prompt": "Add.", "responses": ["a"]}, "field 'responses'", RM),
    rows_case("a ranking that is a text", {"prompt": "Add.", "responses": "ab"}, "field 'responses'", RM),
    rows_case("a number in a ranking", {"prompt": "Add.", "responses": ["a", 1]}, "field 'responses'", RM),
    rows_case("a lone surrogate in a side", PAIR | {"chosen": "\udc80"}, "field 'chosen' has a lone surrogate", RM),
    ("both sides are equal", f"{RM} --data bad.jsonl --eval-fraction 0", "bad.jsonl: none of its 1 pairs",
        {"bad.jsonl": lines(PAIR | {"rejected": "a + b"})}),
    ("a ranking with the same response twice", f"{RM} --data bad.jsonl --eval-fraction 0", "its sides are equal",
        {"bad.jsonl": lines({"prompt": "Add.", "responses": ["a", "b", "a"]})}),
    ("sides longer than --max-length", f"{RM} --max-length 4 --eval-fraction 0", "pairs.jsonl: none of its 8 pairs"),
    ("no margin field", f"{RM} --margin-field gap", "field 'gap', its --margin-field, is missing"),
    ("a text as margin", f"{RM} --data bad.jsonl --margin-field gap --eval-fraction 0",
        "bad.jsonl: line 1: field 'gap'",
        {"bad.jsonl": lines(PAIR | {"gap": "wide"})}),
    ("a margin that is too large", f"{RM} --data bad.jsonl --margin-field gap --eval-fraction 0",
        "bad.jsonl: line 1: field 'gap'", {"bad.jsonl": lines(PAIR | {"gap": 10**400})}),
    ("one pair to train on and hold out", f"{RM} --data bad.jsonl", "--eval-fraction 0.1",
        {"bad.jsonl": lines(PAIR)}),
)  # fmt: skip

cases(
    "Rows to generate from and to score",
    rows_case("no prompt", {"output": "a"}, "no field of a row in it", GENERATE, "--prompts"),
    rows_case("a number as prompt", {"prompt": 3}, "field 'prompt' is 3", GENERATE, "--prompts"),
    rows_case("a null prompt", {"prompt": None}, "no field of a row in it", GENERATE, "--prompts"),
    ("a completion is there already", f"{GENERATE} --prompts bad.jsonl", "bad.jsonl: line 1: the row has a field",
        {"bad.jsonl": lines({"prompt": "a", "completion": "b"})}),
    ("'sample' is there already", f"{GENERATE} --prompts bad.jsonl --num-samples 2", "a field 'sample'",
        {"bad.jsonl": lines({"prompt": "a", "sample": 1})}),
    ("a lone surrogate in another field", f"{GENERATE} --prompts bad.jsonl", "bad.jsonl: line 1: field 'id' has a lone",
        {"bad.jsonl": lines({"prompt": "a", "id": ["\ud800"]})}),
    ("a prompt longer than the positions", f"{GENERATE} --prompts bad.jsonl", "bad.jsonl: line 1: the prompt has",
        {"bad.jsonl": lines({"prompt": "word " * 500})}),
    ("an input that the template does not have", f"{GENERATE} --prompts bad.jsonl --template short.txt", "bad.jsonl",
        {"bad.jsonl": lines({"instruction": "a", "input": "b"}), "short.txt": "Q: {instruction} A: {response}"}),
    rows_case("no response", {"prompt": "Add."}, "field 'response' is missing", SCORE),
    rows_case("a response among pairs", {"prompt": "Add.", "response": "a"}, "this row has", SCORE),
    rows_case("a number as response", {"prompt": "Add.", "response": 3}, "field 'response' is 3", SCORE),
    ("a response without a question", f"{SCORE} --data bad.jsonl", "bad.jsonl:1: field 'prompt' is missing",
        {"bad.jsonl": lines({"response": "a"})}),
    ("a score is there already", f"{SCORE} --data bad.jsonl --out scored.jsonl", "the row has a field 'score_chosen'",
        {"bad.jsonl": lines(PAIR | {"score_chosen": 1})}),
    ("a response longer than the positions", f"{SCORE} --data bad.jsonl", "bad.jsonl: line 1: chosen",
        {"bad.jsonl": lines(PAIR | {"chosen": "word " * 500})}),
    ("an answer is there already", f"{WINRATE} --prompts bad.jsonl --out won.jsonl", "the row has a field 'answer_a'",
        {"bad.jsonl": lines({"prompt": "a", "answer_a": "b"})}),
    ("a question that the judge cannot take", WINRATE, "prompts.jsonl: line 1: the question alone", {"judge": short}),
    ("answers that the judge cannot take", f"{WINRATE} --prompts bad.jsonl --max-new-tokens 100 --judge-template none",
        "bad.jsonl", {"bad.jsonl": lines({"prompt": "word " * 30})}),
)  # fmt: skip

# --------------------------------------------------------------------------------------------------------------- models

CONFIG, WEIGHTS, INDEX = "model/config.json", "model/model.safetensors", "model/model.safetensors.index.json"

cases(
    "Models: config.json",
    ("no such folder", f"{SFT} --model modle", "modle: no such folder"),
    ("no such folder", f"{PREVIEW} --model runs/sft", "runs/sft"),
    ("a file as model", f"{SFT} --model rows.jsonl", "rows.jsonl: no such folder"),
    ("an empty folder", f"{SFT} --model empty", "empty", {"empty": directory}),
    ("not in the hub's cache", f"{SFT} --model nobody/nothing", "nobody/nothing"),
    ("a hub id that is not one", f"{SFT} --model a/b/c", "a/b/c: no such folder"),
    ("no config.json", SFT, "model/config.json: no such file", {CONFIG: None}),
    ("an empty config.json", SFT, "model/config.json:1:1: malformed JSON", {CONFIG: ""}),
    ("a truncated config.json", SFT, "model/config.json:", {CONFIG: cut(50)}),
    ("an array", SFT, "model/config.json: expected a JSON object", {CONFIG: "[]"}),
    ("deeply nested arrays", SFT, "model/config.json", {CONFIG: DEEP}),
    ("not UTF-8", SFT, "model/config.json:1: not UTF-8", {CONFIG: b"\xff\xfe"}),
    ("a Git LFS pointer", SFT, "model/config.json: a Git LFS pointer", {CONFIG: LFS}),
    ("a directory", SFT, "model/config.json: a directory", {CONFIG: lambda path: (path.unlink(), path.mkdir())}),
    ("another architecture", SFT, "model/config.json: model_type is 'gpt2'", {CONFIG: edit(model_type="gpt2")}),
    ("a head of its own", SFT, "model/config.json: tie_word_embeddings is False",
        {CONFIG: edit(tie_word_embeddings=False)}),
    ("text for a number", SFT, "model/config.json: vocab_size is '480'", {CONFIG: edit(vocab_size="480")}),
    ("a fraction for a whole number", SFT, "model/config.json: ffn_dim is 16.5", {CONFIG: edit(ffn_dim=16.5)}),
    ("text for a boolean", SFT, "model/config.json: enable_bias is 'false'", {CONFIG: edit(enable_bias="false")}),
    ("a number below the range", SFT, "model/config.json: num_hidden_layers is 0", {CONFIG: edit(num_hidden_layers=0)}),
    ("heads that do not divide the width", SFT, "model/config.json: hidden_size is 16",
        {CONFIG: edit(num_attention_heads=3)}),
    ("an unknown activation", SFT, "model/config.json: activation_function is 'swish'",
        {CONFIG: edit(activation_function="swish")}),
    ("dropout above 1", SFT, "model/config.json: dropout is 1.5", {CONFIG: edit(dropout=1.5)}),
    ("a pad outside of the vocabulary", SFT, "model/config.json: pad_token_id is 9999",
        {CONFIG: edit(pad_token_id=9999)}),
    ("a size of 400 digits", SFT, "model: truncated or of another model", {CONFIG: edit(vocab_size=10**400)}),
    ("more layers than the file can hold", SFT, "model: truncated or of another model",
        {CONFIG: edit(num_hidden_layers=10**6)}),
    ("another width", SFT, "model/model.safetensors: weights do not fit", {CONFIG: edit(hidden_size=32)}),
    ("more layers than there are", SFT, "model/model.safetensors: weights do not fit",
        {CONFIG: edit(num_hidden_layers=3)}),
    ("fewer layers than there are", SFT, "model/model.safetensors: weights do not fit",
        {CONFIG: edit(num_hidden_layers=1)}),
    ("fewer positions than there are", SFT, "model/model.safetensors: weights do not fit",
        {CONFIG: edit(max_position_embeddings=64)}),
    ("fewer positions as text", PREVIEW, "model/config.json: max_position_embeddings is '64'",
        {CONFIG: edit(max_position_embeddings="64")}),
    ("a smaller vocabulary than the tokenizer's", PREVIEW, "model: its tokenizer doesn't fit",
        {CONFIG: edit(vocab_size=100)}),
    ("a negative number of positions", PREVIEW, "model/config.json: max_position_embeddings is -1",
        {CONFIG: edit(max_position_embeddings=-1)}),
    ("a reward model as language model", f"{GENERATE} --model judge", "judge/config.json: this is a reward model"),
    ("a language model as judge", f"{SCORE} --model model", "model/model.safetensors: no score.weight"),
    ("a language model as judge", f"{WINRATE} --judge model", "model/model.safetensors: no score.weight"),
    ("a language model as judge", f"{CHAT} --judge model", "model/model.safetensors: no score.weight"),
    ("a reward model that answers", f"{CHAT} --model judge", "judge/config.json: this is a reward model"),
    ("a reward model that answers", f"{WINRATE} --model-b judge", "judge/config.json: this is a reward model"),
    ("a reward model to fine-tune", f"{SFT} --model judge", "judge/config.json: this is a reward model"),
)  # fmt: skip

cases(
    "Models: weights",
    ("no weights", SFT, "model: no weights", {WEIGHTS: None}),
    ("an empty file", SFT, "model", {WEIGHTS: ""}),
    ("a truncated file", SFT, "model/model.safetensors: unreadable, truncated or damaged", {WEIGHTS: cut(9000)}),
    ("a header that is not JSON", SFT, "model/model.safetensors: unreadable", {WEIGHTS: damage(8, b"xxxx")}),
    ("a header longer than the file", SFT, "model/model.safetensors: unreadable", {WEIGHTS: damage(0, b"\xff" * 7)}),
    ("a tensor larger than its bytes", SFT, "model/model.safetensors: unreadable",
        {WEIGHTS: safetensors({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 4]}}, b"1234")}),
    ("no tensor", SFT, "model/model.safetensors: weights do not fit", {WEIGHTS: safetensors({})}),
    ("a Git LFS pointer", SFT, "model/model.safetensors: a Git LFS pointer", {WEIGHTS: LFS}),
    ("an HTML page", SFT, "model/model.safetensors: unreadable", {WEIGHTS: HTML}),
    ("a pickle under this name", SFT, "model/model.safetensors: unreadable", {WEIGHTS: pickle.dumps({})}),
    ("a missing tensor", SFT, "1 missing, first decoder.embed_tokens.weight", {WEIGHTS: without(EMBEDDING)}),
    ("an unexpected tensor", SFT, "1 unexpected, first adapter.weight",
        {WEIGHTS: only("adapter.weight", torch.ones(2))}),
    ("a transposed tensor", SFT, "of another shape", {WEIGHTS: only(EMBEDDING, torch.ones(8, 480))}),
    ("whole numbers", SFT, f"{Q_PROJ} holds NaN, infinite or whole numbers",
        {WEIGHTS: only(Q_PROJ, torch.ones(16, 16, dtype=torch.int64))}),
    ("NaN", SFT, f"{Q_PROJ} holds NaN", {WEIGHTS: only(Q_PROJ, torch.full((16, 16), torch.nan))}),
    ("infinity", GENERATE, f"{Q_PROJ} holds NaN", {WEIGHTS: only(Q_PROJ, torch.full((16, 16), torch.inf))}),
    ("numbers too large for half precision", f"{GENERATE} --dtype float16", "when read as torch.float16",
        {WEIGHTS: only(Q_PROJ, torch.full((16, 16), 1e6))}),
    ("a head that differs from the embedding", SFT, "lm_head.weight differs",
        {WEIGHTS: only("lm_head.weight", torch.ones(480, 8))}),
    ("a reward model's head in a language model", f"{GENERATE} --model judge",
        "judge/model.safetensors: has score.weight",
        {"judge/config.json": edit(architectures=["OPTForCausalLM"])}),
    ("a judge's head of two labels", SCORE, "judge/model.safetensors: weights do not fit",
        {"judge/model.safetensors": only("score.weight", torch.ones(2, 8))}),
    ("a pickle with code", SFT, "model/pytorch_model.bin: holds more than weights",
        {WEIGHTS: None, "model/pytorch_model.bin": pickled({"a": Evil()})}),
    ("an old pickle with code", SFT, "model/pytorch_model.bin: holds more than weights",
        {WEIGHTS: None, "model/pytorch_model.bin": pickle.dumps(Evil(), protocol=2)}),
    ("a pickle of a list", SFT, "model/pytorch_model.bin: expected a state dict",
        {WEIGHTS: None, "model/pytorch_model.bin": pickled([1, 2])}),
    ("a truncated pickle", SFT, "model/pytorch_model.bin: unreadable",
        {WEIGHTS: as_bin, "model/pytorch_model.bin": cut(500)}),
    ("an empty pickle", SFT, "model", {WEIGHTS: None, "model/pytorch_model.bin": ""}),
    ("an index that is not JSON", SFT, f"{INDEX}:1:1", {WEIGHTS: None, INDEX: "x"}),
    ("an index without a map", SFT, f"{INDEX}: expected a weight_map", {WEIGHTS: None, INDEX: "{}"}),
    ("an index with a path", SFT, f"{INDEX}: weight_map names '../judge/model.safetensors'",
        {WEIGHTS: None, INDEX: json.dumps({"weight_map": {"a": "../judge/model.safetensors"}})}),
    ("an index of a missing file", SFT, f"{INDEX}: weight_map names 'part-2.safetensors'",
        {WEIGHTS: None, INDEX: json.dumps({"weight_map": {"a": "part-2.safetensors"}})}),
    ("an index of numbers", SFT, f"{INDEX}: weight_map names 3",
        {WEIGHTS: None, INDEX: json.dumps({"weight_map": {"a": 3}})}),
    ("an index of a list", SFT, f"{INDEX}: weight_map names",
        {WEIGHTS: None, INDEX: json.dumps({"weight_map": {"a": ["part-2.safetensors"]}})}),
    ("an index of another format", SFT, f"{INDEX}: weight_map names 'config.json'",
        {WEIGHTS: None, INDEX: json.dumps({"weight_map": {"a": "config.json"}})}),
)  # fmt: skip

VOCAB, MERGES, SETTINGS, JSON = (
    f"model/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")
)

cases(
    "Tokenizers",
    ("no tokenizer", SFT, "model: no tokenizer here", {VOCAB: None}),
    ("no merges.txt", SFT, "model: no tokenizer here", {MERGES: None}),
    ("an empty vocab.json", SFT, "model/vocab.json:1:1: malformed JSON", {VOCAB: ""}),
    ("an empty object", SFT, "model", {VOCAB: "{}"}),
    ("a truncated vocab.json", SFT, "model/vocab.json:1:", {VOCAB: cut(100)}),
    ("text for ids", SFT, "model/vocab.json: expected an object", {VOCAB: '{"a": "0"}'}),
    ("merges of tokens that are not there", SFT, "model", {MERGES: "#version: 0.2\nxyz abc\n"}),
    ("merges.txt is not UTF-8", SFT, "model/merges.txt:1: not UTF-8", {MERGES: b"\xff\xfe\n"}),
    ("a Git LFS pointer", SFT, "model/vocab.json: a Git LFS pointer", {VOCAB: LFS}),
    ("tokenizer_config.json is an array", SFT, "model/tokenizer_config.json: expected a JSON object", {SETTINGS: "[]"}),
    ("no EOS", SFT, "model: its EOS token is", {SETTINGS: edit(eos_token="<|im_end|>")}),
    ("a number as EOS", SFT, "eos_token is 2", {SETTINGS: edit(eos_token=2)}),
    ("an object without content as EOS", SFT, "eos_token is {", {SETTINGS: edit(eos_token={"lstrip": False})}),
    ("a BOS that is not a token", SFT, "add_bos_token is set", {SETTINGS: edit(bos_token="<|start|>")}),
    ("added tokens with a gap", SFT, "model: the added token '<x>' can't have id 9999",
        {SETTINGS: edit(added_tokens_decoder={"9999": {"content": "<x>"}})}),
    ("an added token whose id is text", SFT, "added_tokens_decoder",
        {SETTINGS: edit(added_tokens_decoder={"one": {"content": "<x>"}})}),
    ("added tokens as a list", SFT, "added_tokens_decoder", {SETTINGS: edit(added_tokens_decoder=["<x>"])}),
    ("ids beyond the embedding", SFT, "model: its tokenizer doesn't fit",
        {"model/added_tokens.json": many_tokens}),
    ("added tokens with a gap", f"{PREVIEW}", "the added token '<x>' can't have id 9999",
        {"model/added_tokens.json": '{"<x>": 9999}'}),
    ("WordPiece", SFT, "the algorithm is WordPiece",
        {JSON: json.dumps({"model": {"type": "WordPiece", "vocab": {}, "unk_token": "[UNK]"}})}),
    ("Unigram", SFT, "the algorithm is Unigram",
        {JSON: json.dumps({"model": {"type": "Unigram", "vocab": [], "unk_id": 9}})}),
    ("a damaged character map", SFT, "the algorithm is SentencePiece",
        {JSON: json.dumps({"model": {}, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "x"}})}),
    ("a truncated tokenizer.json", SFT, "model/tokenizer.json:1:", {JSON: '{"model": {"type": "BPE", "vocab": {'}),
    ("tokenizer.json without a model", SFT, "model", {JSON: "{}"}),
    ("BPE that is not byte-level", SFT, "model",
        {JSON: json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})}),
)  # fmt: skip

cases(
    "Templates",
    ("no such template", f"{SFT} --template vicuna", "--template vicuna: no such file"),
    ("a misspelt name", f"{GENERATE} --template Alpaca", "--template Alpaca: no such file"),
    ("an empty file", f"{SFT} --template t.txt", "--template t.txt: expected {response} once, found it 0 times",
        {"t.txt": ""}),
    ("no {response}", f"{SFT} --template t.txt", "--template t.txt: expected {response} once, found it 0 times",
        {"t.txt": "Q: {instruction} A:"}),
    ("two {response}", f"{SFT} --template t.txt", "--template t.txt: expected {response} once, found it 2 times",
        {"t.txt": "{instruction} {response} {response}"}),
    ("no {instruction}", f"{SFT} --template t.txt", "--template t.txt: expected {instruction}",
        {"t.txt": "A: {response}"}),
    ("{input} after {response}", f"{SFT} --template t.txt", "--template t.txt: expected {instruction}",
        {"t.txt": "{instruction} {response} {input}"}),
    ("10 MB", f"{SFT} --template t.txt", "--template t.txt: 10,000,023 characters",
        {"t.txt": "x" * 10**7 + "{instruction}{response}"}),
    ("a directory", f"{SFT} --template model", "--template model: a directory"),
    ("not UTF-8", f"{SFT} --template t.txt", "--template t.txt:1: not UTF-8",
        {"t.txt": b"\xff{instruction}{response}"}),
    ("JSON with one of the two texts", f"{SFT} --template t.json", "--template t.json: expected a JSON object of two",
        {"t.json": '{"with_input": "{instruction}{input}{response}"}'}),
    ("JSON with a number", f"{SFT} --template t.json", "--template t.json: expected a JSON object of two",
        {"t.json": '{"with_input": 1, "without_input": "{instruction}{response}"}'}),
    ("JSON that does not use the input", f"{SFT} --template t.json", "{input}",
        {"t.json": json.dumps(dict.fromkeys(("with_input", "without_input"), "{instruction}") | {
            "with_input": "Q {instruction} {response}", "without_input": "{instruction} {response}"})}),
    ("truncated JSON", f"{SFT} --template t.json", "--template t.json:1", {"t.json": '{"with_input": '}),
    ("an array", f"{SFT} --template t.json", "--template t.json: expected a JSON object", {"t.json": "[]"}),
    ("a BOS that the tokenizer does not have", f"{SFT} --template t.txt --model model", "{bos}",
        {"t.txt": "{bos}{instruction}{response}", SETTINGS: edit(bos_token=..., add_bos_token=False)}),
    ("a judge's template", f"{WINRATE} --judge-template t.txt", "--judge-template t.txt: expected {response} once",
        {"t.txt": "{instruction}"}),
)  # fmt: skip

ADAPTER, LORA = "adapters/adapter_config.json", "adapters/adapter_model.safetensors"
MERGED = f"{GENERATE} --model adapters"

cases(
    "Adapters",
    ("no weights", MERGED, "adapters", {LORA: None}),
    ("truncated weights", MERGED, f"{LORA}: unreadable", {LORA: cut(300)}),
    ("a Git LFS pointer", MERGED, f"{LORA}: a Git LFS pointer", {LORA: LFS}),
    ("a settings file that is not JSON", MERGED, f"{ADAPTER}:1:1", {ADAPTER: "x"}),
    ("no base model", MERGED, f"{ADAPTER}: base_model_name_or_path is None",
        {ADAPTER: edit(base_model_name_or_path=...)}),
    ("a base model that is not there", MERGED, f"{ADAPTER}: the base model of these adapters",
        {ADAPTER: edit(base_model_name_or_path="gone/")}),
    ("themselves as base", MERGED, f"{ADAPTER}: its base adapters is not a model",
        {ADAPTER: edit(base_model_name_or_path="adapters")}),
    ("a number as base", MERGED, f"{ADAPTER}: base_model_name_or_path is 3",
        {ADAPTER: edit(base_model_name_or_path=3)}),
    ("another rank", MERGED, f"{LORA}: weights do not fit", {ADAPTER: edit(r=8)}),
    ("text as rank", MERGED, f"{ADAPTER}: expected a rank", {ADAPTER: edit(r="2")}),
    ("rank 0", MERGED, f"{ADAPTER}: expected a rank of at least 1", {ADAPTER: edit(r=0)}),
    ("a rank beyond the width", MERGED, f"{ADAPTER}: rank", {ADAPTER: edit(r=10**6)}),
    ("another method", MERGED, f"{ADAPTER}: peft_type is 'IA3'", {ADAPTER: edit(peft_type="IA3")}),
    ("DoRA", MERGED, f"{ADAPTER}: use_dora is True", {ADAPTER: edit(use_dora=True)}),
    ("trained biases", MERGED, f"{ADAPTER}: bias is 'all'", {ADAPTER: edit(bias="all")}),
    ("a text as targets", MERGED, f"{ADAPTER}: expected a rank", {ADAPTER: edit(target_modules="q_proj")}),
    ("targets of another model", MERGED, f"{ADAPTER}: targets", {ADAPTER: edit(target_modules=["c_attn"])}),
    ("an embedding as target", MERGED, f"{ADAPTER}: targets", {ADAPTER: edit(target_modules=["embed_tokens"])}),
    ("no targets", MERGED, f"{ADAPTER}", {ADAPTER: edit(target_modules=[])}),
    ("a missing matrix", MERGED, f"{LORA}: weights do not fit the model: 1 missing", {LORA: without(LORA_A)}),
    ("a matrix of another shape", MERGED, "of another shape", {LORA: only(LORA_A, torch.ones(16, 2))}),
    ("NaN", MERGED, "holds NaN", {LORA: only(LORA_A, torch.full((2, 16), torch.nan))}),
    ("alpha of NaN", MERGED, f"{ADAPTER}", {ADAPTER: edit(lora_alpha=float("nan"))}),
    ("dropout of 1", MERGED, f"{ADAPTER}", {ADAPTER: edit(lora_dropout=1)}),
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------- runs

cases(
    "Folders of runs on --resume",
    ("no run yet", f"{SFT} --resume", "--resume: new/run.json does not exist"),
    ("no checkpoint yet", RESUME, "--resume: run has no checkpoint", {"run/checkpoints": None}),
    ("no run.json", RESUME, "--resume: run/run.json does not exist", {"run/run.json": None}),
    ("an empty run.json", RESUME, "--resume: run/run.json is damaged", {"run/run.json": ""}),
    ("run.json is an array", RESUME, "--resume: run/run.json is damaged", {"run/run.json": "[]"}),
    ("run.json without values", RESUME, "--resume: run/run.json is damaged", {"run/run.json": edit(values=...)}),
    ("values that are a number", RESUME, "--resume: run/run.json is damaged", {"run/run.json": edit(values=3)}),
    ("fingerprints that are a list", RESUME, "--resume: run/run.json is damaged",
        {"run/run.json": edit(fingerprints=[1])}),
    ("deeply nested run.json", RESUME, "--resume: run/run.json is damaged", {"run/run.json": DEEP}),
    ("commits that are numbers", RESUME, "run/run.json",
        {"run/run.json": edit(commits={"weights": 3, "data": 3}, values=3)}),
    ("another learning rate in run.json", RESUME, "--resume: --lr was fast",
        {"run/run.json": lambda path: path.write_text(path.read_text().replace('"lr": 2e-05', '"lr": "fast"'))}),
    ("another flag", f"{RESUME} --weight-decay 0.5", "--resume: --weight-decay was 0.0"),
    ("other data", RESUME, "--resume: the fingerprint of data", {"rows.jsonl": lines(*[ROW] * 8)}),
    ("another tokenizer", RESUME, "--resume: the fingerprint of tokenizer", {SETTINGS: edit(model_max_length=9)}),
    ("other weights", RESUME, "--resume: the fingerprint of weights", {WEIGHTS: only(Q_PROJ, torch.ones(16, 16))}),
    ("another config", RESUME, "--resume: the fingerprint of config", {CONFIG: edit(activation_function="gelu")}),
    ("another template", f"{RESUME} --template alpaca", "--resume: the template's with_input"),
    ("the other script's run", f"{SFT} --out rewards --resume", "its task is 'rm'"),
    ("the other script's run", f"{RM} --out run --resume", "its task is 'sft'"),
    ("a progress.json of an array", RESUME, f"--resume: {LAST}/progress.json is damaged",
        {f"{LAST}/progress.json": "[]"}),
    ("an empty progress.json", RESUME, f"--resume: {LAST}/progress.json is damaged", {f"{LAST}/progress.json": ""}),
    ("no progress.json", RESUME, f"--resume: {LAST}/progress.json is damaged", {f"{LAST}/progress.json": None}),
    ("a step that is text", RESUME, "step is 'two'", {f"{LAST}/progress.json": edit(step="two")}),
    ("a step below 1", RESUME, "step is -1", {f"{LAST}/progress.json": edit(step=-1)}),
    ("a loss that is text", RESUME, "are not all numbers", {f"{LAST}/progress.json": edit(best_loss="low")}),
    ("no step", RESUME, "its names are", {f"{LAST}/progress.json": edit(step=...)}),
    ("no parameters", RESUME, f"{LAST}/training.safetensors", {f"{LAST}/training.safetensors": None}),
    ("truncated parameters", RESUME, f"{LAST}/training.safetensors is damaged",
        {f"{LAST}/training.safetensors": cut(999)}),
    ("an empty file of parameters", RESUME, f"{LAST}/training.safetensors is damaged",
        {f"{LAST}/training.safetensors": ""}),
    ("a Git LFS pointer", RESUME, f"{LAST}/training.safetensors: a Git LFS pointer",
        {f"{LAST}/training.safetensors": LFS}),
    ("a missing parameter", RESUME, f"{LAST} is of another model",
        {f"{LAST}/training.safetensors": without(f"parameter.{EMBEDDING.removeprefix('model.')}")}),
    ("a missing moment", RESUME, "has only the moments",
        {f"{LAST}/training.safetensors": without(f"exp_avg.{EMBEDDING.removeprefix('model.')}")}),
    ("a moment of whole numbers", RESUME, "is torch.int64",
        {f"{LAST}/training.safetensors":
            only(f"exp_avg.{EMBEDDING.removeprefix('model.')}", torch.ones(480, 8, dtype=torch.int64))}),
    ("metrics that are not JSON", RESUME, "run/metrics.jsonl:2:1: malformed JSON",
        {"run/metrics.jsonl": lines({"step": 0, "split": "eval"}, "garbage", {"step": 1, "split": "train"})}),
    ("a number in the metrics", RESUME, "run/metrics.jsonl:1: expected a JSON object", {"run/metrics.jsonl": "3\n"}),
    ("metrics that are not UTF-8", RESUME, "run/metrics.jsonl:1: not UTF-8", {"run/metrics.jsonl": b"\xff\n"}),
    ("NUL bytes in the metrics", RESUME, "run/metrics.jsonl:1:1", {"run/metrics.jsonl": "\0\0\0\n"}),
    ("metrics without a step", RESUME, "run/metrics.jsonl:1: expected a number as `step`",
        {"run/metrics.jsonl": lines({"split": "train"})}),
    ("a loss that is text in the metrics", RESUME, "run/metrics.jsonl:1: expected a number as `loss`",
        {"run/metrics.jsonl": lines({"step": 1, "split": "train", "loss": "low"})}),
)  # fmt: skip

cases(
    "Reports",
    ("no run", f"{REPORT}", "run"),
    ("no such folder", f"{REPORT} gone", "gone"),
    ("a file", f"{REPORT} rows.jsonl", "rows.jsonl"),
    ("a folder that is not a run", f"{REPORT} model", "model"),
    ("two runs", f"{REPORT} run rewards", "rewards"),
    ("no metrics", f"{REPORT} run", "run/metrics.jsonl: no such file", {"run/metrics.jsonl": None}),
    ("a truncated line of metrics", f"{REPORT} run", "run/metrics.jsonl:1:", {"run/metrics.jsonl": '{"step": 1, "spl'}),
    ("a split that is not one", f"{REPORT} run", "run/metrics.jsonl:1: expected a number as `step` and train or eval",
        {"run/metrics.jsonl": lines({"step": 1, "split": "test"})}),
    ("a step that is a boolean", f"{REPORT} run", "run/metrics.jsonl:1: expected a number as `step`",
        {"run/metrics.jsonl": lines({"step": True, "split": "train"})}),
    ("samples that are not objects", f"{REPORT} run", "run/samples.jsonl:1: expected a JSON object",
        {"run/samples.jsonl": "[]\n"}),
    ("deeply nested samples", f"{REPORT} run", "run/samples.jsonl:1", {"run/samples.jsonl": DEEP}),
    ("values nested hundreds deep", f"{REPORT} run", "run",
        {"run/run.json": edit(values={"a": json.loads("[" * 900 + "]" * 900)})}),
    ("run.json is an array", f"{REPORT} run", "run/run.json: expected a JSON object", {"run/run.json": "[]"}),
    ("report.html is a directory", f"{REPORT} run", "run/report.html: a directory",
        {"run/report.html": lambda path: (path.unlink(), path.mkdir())}),
    ("report.html is a named pipe", f"{REPORT} run", "run/report.html: a named pipe",
        {"run/report.html": lambda path: (path.unlink(), os.mkfifo(path))}),
)  # fmt: skip

cases(
    "BLEU",
    ("no file", BLEU, "expected HYP REF"),
    ("no references", f"{BLEU} hyp.txt", "expected HYP REF"),
    ("no such file", f"{BLEU} hyp.txt gone.txt", "gone.txt: no such file"),
    ("a directory", f"{BLEU} model ref.txt", "model: a directory"),
    ("other numbers of lines", f"{BLEU} hyp.txt long.txt", "long.txt has 3 lines, hyp.txt has 2",
        {"long.txt": "a\nb\nc\n"}),
    ("an empty file", f"{BLEU} hyp.txt empty.txt", "empty.txt: empty", {"empty.txt": ""}),
    ("a binary file", f"{BLEU} hyp.txt model/model.safetensors", "model/model.safetensors:1: not UTF-8",
        {"model/model.safetensors": safetensors({}, b"\xff" * 64)}),
    ("a Git LFS pointer", f"{BLEU} hyp.txt ref.txt", "ref.txt: a Git LFS pointer", {"ref.txt": LFS}),
    ("files and --jsonl", f"{BLEU} hyp.txt ref.txt --jsonl bleu.jsonl", "--jsonl bleu.jsonl"),
    ("the same field twice", f"{BLEU} --jsonl bleu.jsonl --reference-field completion", "--reference-field completion"),
    ("no such field", f"{BLEU} --jsonl bleu.jsonl --hypothesis-field answer", "bleu.jsonl:1: no field 'answer'"),
    ("no references in a row", f"{BLEU} --jsonl bad.jsonl", "bad.jsonl:1: field 'output' must be",
        {"bad.jsonl": lines({"completion": "a", "output": []})}),
    ("a null reference", f"{BLEU} --jsonl bad.jsonl", "bad.jsonl:1: field 'output'",
        {"bad.jsonl": lines({"completion": "a", "output": None})}),
    ("a number as reference", f"{BLEU} --jsonl bad.jsonl", "bad.jsonl:1: field 'output' must be",
        {"bad.jsonl": lines({"completion": "a", "output": ["b", 3]})}),
    ("a number as hypothesis", f"{BLEU} --jsonl bad.jsonl", "bad.jsonl:1: field 'completion' must be",
        {"bad.jsonl": lines({"completion": 3, "output": "b"})}),
    ("a row that is not an object", f"{BLEU} --jsonl bad.jsonl", "bad.jsonl:1: expected a JSON object",
        {"bad.jsonl": "3\n"}),
    ("no rows", f"{BLEU} --jsonl bad.jsonl", "bad.jsonl: no rows in it", {"bad.jsonl": "\n"}),
    ("a truncated line", f"{BLEU} --jsonl bad.jsonl", "bad.jsonl:1:", {"bad.jsonl": '{"completion": "a'}),
    ("a negative smoothing value", f"{BLEU} hyp.txt ref.txt --smooth-method floor --smooth-value -1",
        "--smooth-value -1"),
    ("a smoothing value of infinity", f"{BLEU} hyp.txt ref.txt --smooth-value inf", "--smooth-value inf"),
)  # fmt: skip

cases(
    "Outputs",
    ("a directory", f"{GENERATE} --out model", "--out model: a directory"),
    ("no such directory", f"{GENERATE} --out gone/out.jsonl", "--out gone/out.jsonl"),
    ("a file as directory", f"{GENERATE} --out rows.jsonl/out", "--out rows.jsonl/out"),
    ("the file of the prompts", f"{GENERATE} --out prompts.jsonl",
        "--out prompts.jsonl: this is the file that --prompts"),
    ("the file of the prompts, spelt differently", f"{GENERATE} --out model/../prompts.jsonl",
        "--out model/../prompts.jsonl"),
    ("a link to the file of the rows", f"{PREVIEW} --out link.jsonl", "--out link.jsonl: this is the file that --data",
        {"link.jsonl": link_to("rows.jsonl")}),
    ("a link to itself", f"{PREVIEW} --out loop", "--out loop", {"loop": link_to("loop")}),
    ("a named pipe", f"{SCORE} --out pipe", "--out pipe: a named pipe", {"pipe": os.mkfifo}),
    ("an open stream", f"{GENERATE} --out /dev/stdout", "--out /dev/stdout: an open stream"),
    ("an empty text", f"{GENERATE} --out <an empty text>", "--out '': expected a file's name"),
    ("a name of 5,000 characters", f"{WINRATE} --out '<5,000 letters>'", "--out x"),
    ("a file as a run's folder", f"{SFT} --out rows.jsonl", "--out rows.jsonl"),
    ("a run's folder below a file", f"{SFT} --out rows.jsonl/run", "--out rows.jsonl/run"),
    ("a folder that is not a run", f"{SFT} --out model", "--out model: not empty and not an earlier run"),
    ("a link to itself as folder", f"{SFT} --out loop", "--out loop", {"loop": link_to("loop")}),
    ("a link that leads nowhere as folder", f"{SFT} --out link", "--out link", {"link": link_to("gone")}),
    ("a named pipe as folder", f"{SFT} --out pipe", "--out pipe", {"pipe": os.mkfifo}),
    ("a folder's name of 5,000 characters", f"{SFT} --out '<5,000 letters>'", "--out x"),
    ("files may have 20,000 bytes", f"{SFT}", "the machine failed", {}, 1, {"RLIMIT_FSIZE": 20_000}, ("new",)),
    ("files may have 100 bytes", f"{PREVIEW} --out tokens.jsonl", "the machine failed", {}, 1, {"RLIMIT_FSIZE": 100}),
)  # fmt: skip

# --------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def run_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Ended]]:
    """Run a command of the table in a folder."""
    cache = str(tmp_path_factory.mktemp("hub"))
    with forks(HF_HUB_OFFLINE="1", HF_HOME=cache) as run:

        def run_in(folder: Path, command: str, limits: dict[str, int] | None = None) -> Ended:
            ended = run(words_of(command), folder, limits)
            return Ended(ended.status, *(without_what_differs(text, folder) for text in ended[1:]))

        def without_what_differs(text: str, folder: Path) -> str:
            """Replace what depends on the place, and argparse's quotes, which depend on the version of Python."""
            text = text.replace(str(folder), "FOLDER").replace(cache, "CACHE").replace(f"{ROOT}/", "")
            return re.sub(r"\(choose from [^)]*\)", lambda found: found[0].replace("'", ""), text)

        yield run_in


def words_of(command: str) -> list[str]:
    name = next((name for name in REST if command.startswith(name)), "")
    for short_word, word in {"…": REST.get(name, "")}.items():
        command = command.replace(short_word, word)
    spelt = re.sub(r"(?<!')(<[^>]*>)(?!')", r"'\1'", command)
    return [WORDS.get(word, word) for word in shlex.split(spelt)]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, run_in: Callable[..., Ended]) -> Path:
    """Make a folder with all that the commands read, each without a fault."""
    folder = tmp_path_factory.mktemp("start")
    config = OPTConfig(vocab_size=480, max_position_embeddings=128, **SIZES)
    for name, model in {"model": OPT(config), "judge": RewardModel(config), "adapters": OPT(config)}.items():
        initialise(model, 0)
        if name == "adapters":
            add_lora(model, 2, 4.0, 0.0, ("q_proj", "v_proj"))
            save_adapters(model, folder / name, "model")
        else:
            save_model(model, folder / name)
            save_tokenizer(tokenizer, folder / name)
    write_lines(folder / "rows.jsonl", [ROW | {"instruction": f"Add {n}."} for n in range(8)])
    write_lines(folder / "pairs.jsonl", [PAIR | {"prompt": f"Add {n}."} for n in range(8)])
    write_lines(folder / "prompts.jsonl", [{"instruction": "Add."}])
    write_lines(folder / "bleu.jsonl", [{"completion": "a b c d", "output": "a b c e"}])
    for name in ("hyp.txt", "ref.txt"):
        (folder / name).write_text("one two three four\nfive six seven eight\n")
    for command in (f"{SFT} --out run", f"{RM} --out rewards", CHAT, GENERATE, PREVIEW, SCORE, WINRATE, MERGED, RESUME,
                    f"{BLEU} hyp.txt ref.txt", f"{BLEU} --jsonl bleu.jsonl", f"{REPORT} run"):  # fmt: skip
        ended = run_in(folder, command)
        assert ended.status == 0, ended.err
    return folder


def make(folder: Path, name: str, content: Content) -> None:
    path = folder / name
    if content is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


RESULTS: dict[str, tuple[int, str]] = {}
BY_NAME = {f"{section}: {case.what}: {case.command}": case for section in CASES for case in CASES[section]}


@pytest.mark.parametrize("name", BY_NAME)
def test_a_bad_input_ends_in_one_line_and_changes_nothing(name: str, start: Path, run_in, tmp_path: Path) -> None:
    case = BY_NAME[name]
    folder = tmp_path / "here"
    shutil.copytree(start, folder)
    for file, content in case.files.items():
        make(folder, file, content)
    before = snapshot(folder)
    ended = run_in(folder, case.command, case.limits)
    after = {path: digest for path, digest in snapshot(folder).items()
             if Path(path).relative_to(folder).parts[0] not in case.leaves and Path(path).name != ".lock"}  # fmt: skip
    assert "Traceback" not in ended.out + ended.err, ended.err
    *progress, message = ended.err.splitlines() or [""]
    RESULTS[name] = ended.status, message
    assert ended.status == case.status, ended.err
    assert case.leaves or not progress, ended.err
    assert message.startswith("error: ")
    assert case.names in message
    assert message.isprintable() and len(message) <= LONGEST + len("error: "), len(message)
    assert after == before
    assert not [path for path in folder.rglob("*") if path.name.endswith(".unfinished")]


def code(text: str) -> str:
    """Return text as code in a cell of a Markdown table."""
    fence = "``" if "`" in text else "`"
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")


def table() -> str:
    head = [
        "# Bad inputs",
        "",
        f"{len(BY_NAME)} bad inputs, each given to the real command, and the line that it prints on standard error",
        "(without `error: ` in front). Status 2 is a mistake of the user, 1 a fault of the machine. Written by",
        "`MINIFT_WRITE_BAD_INPUTS=1 python -m pytest tests/test_bad_inputs.py`; that file has the inputs themselves.",
        "",
        "In a command, … is",
        "",
        *(f"- `{name}`: `{rest}`" for name, rest in REST.items()),
        "",
        "and of a flag that is given twice the second value counts.",
    ]
    for section, members in CASES.items():
        head += ["", f"## {section}", "", "| what is wrong | command | status | message |", "|---|---|---|---|"]
        for case in members:
            status, message = RESULTS[f"{section}: {case.what}: {case.command}"]
            cells = (case.what, code(case.command), status, code(message.removeprefix("error: ")))
            head.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(head) + "\n"


def test_the_table_is_what_the_commands_print() -> None:
    assert len(BY_NAME) == sum(map(len, CASES.values())) >= 150
    if RESULTS.keys() != BY_NAME.keys():
        pytest.skip("not all cases were run")
    if os.environ.get("MINIFT_WRITE_BAD_INPUTS"):
        TABLE.write_text(table(), encoding="utf-8")
    assert table() == TABLE.read_text(encoding="utf-8")
