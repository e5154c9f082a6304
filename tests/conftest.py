"""What several test files use: small byte-level BPE tokenizers, laid out as OPT's and as GPT-2's files are."""

import json
import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test may reach the real one

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from minift.files.tokenizer import load_tokenizer
from minift.model import OPT, RewardModel
from minift.tokenizer import Tokenizer
from tests.runs import saved

# `make test &` starts with SIGINT ignored, and the runs that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Repeated, so that BPE learns "\n\n", "\n    " and " word" as tokens: those are what joins a prompt to its response.
CORPUS = [
    "### Instruction:\nWrite a function that adds two numbers.\n\n### Input:\n1, 2\n\n### Response:\n",
    "def add(first, second):\n    return first + second\n\n\ndef name(text):\n    return text.lower()\n\n    x\n\n",
    "\n\nHuman: What is a list?\n\nAssistant: A list holds values, in order: [1, 2, 3].\n",
    "for number in range(10):\n    print(number)\n\nclass Stack:\n\n    def push(self, value):\n        values = []\n",
] * 30
OPT_TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "add_prefix_space": False,
    "bos_token": "</s>",
    "eos_token": "</s>",
    "unk_token": "</s>",
    "pad_token": "<pad>",
    "errors": "replace",
    "tokenizer_class": "GPT2Tokenizer",
}


def _train(special_tokens: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder laid out as OPT's: vocab.json, merges.txt, tokenizer_config.json; <pad> is 1, </s> is 2."""
    directory = tmp_path_factory.mktemp("opt_tokenizer")
    _train(["<s>", "<pad>", "</s>", "<unk>"]).model.save(str(directory))
    (directory / "tokenizer_config.json").write_text(json.dumps(OPT_TOKENIZER_CONFIG))
    return directory


@pytest.fixture(scope="session")
def gpt2_tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tokenizer.json as GPT-2's: no BOS in front, no pad, a post-processor that trims offsets."""
    directory = tmp_path_factory.mktemp("gpt2_tokenizer")
    backend = _train(["<|endoftext|>"])
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_directory)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder that MINIFT_REAL_DATA names, with OPT's own tokenizer and CodeAlpaca rows; skip without it."""
    if "MINIFT_REAL_DATA" not in os.environ:
        pytest.skip("MINIFT_REAL_DATA names no folder with opt_tokenizer/ and code_alpaca_2k.json")
    return Path(os.environ["MINIFT_REAL_DATA"])


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Return the folder of a small reward model of random weights."""
    return saved(RewardModel, tmp_path_factory.mktemp("judge"), 0, tokenizer)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Return the folder of a small language model of random weights."""
    return saved(OPT, tmp_path_factory.mktemp("model"), 1, tokenizer, max_position_embeddings=128)
