"""Load a model, its tokenizer and template from a folder, hub id or peft adapters. Each name is resolved once.

To use a model: `load_language_model`, `load_judge`. To train one: `load_for_sft`, `load_for_rm`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from minift.errors import UserError
from minift.files import adapters, weights
from minift.files.adapters import ADAPTER_CONFIG, adapter_weights, load_adapters, pick_adapter_weights, read_base
from minift.files.hub import fetch, look_up, model_folder
from minift.files.language_model import LanguageModel
from minift.files.templates import template_of
from minift.files.text import sha256
from minift.files.tokenizer import FILES as TOKENIZER_FILES
from minift.files.tokenizer import check_fits, load_tokenizer
from minift.lora import merge
from minift.model import OPT, Model, RewardModel
from minift.prompts import Template
from minift.scoring import Judge
from minift.tokenizer import Tokenizer


class ModelFiles(NamedTuple):
    """Local folders of a model, or of adapters and their base model."""

    name: str  # as the user gave it
    own: Path  # its folder; for a hub id, that in the hub's cache
    folder: Path  # config.json and weights: `own`, or for adapters the folder of their base model

    @property
    def are_adapters(self) -> bool:
        """Return True if `own` holds adapters, to be merged into the model in `folder`."""
        return self.own != self.folder

    @property
    def tokenizer_folder(self) -> Path:
        """Return the folder with the tokenizer: `own`, unless adapters come without one."""
        has_tokenizer = any((self.own / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        return self.own if has_tokenizer else self.folder

    def fingerprints(self) -> dict[str, str]:
        """Return the SHA-256 of the weights, of the config and of the tokenizer's files, those of adapters included."""
        configs, tensors = [self.folder / "config.json"], weights.weight_files(self.folder)
        if self.are_adapters:
            configs, tensors = [*configs, self.own / ADAPTER_CONFIG], [*tensors, adapter_weights(self.own)]
        texts = [path for name in TOKENIZER_FILES if (path := self.tokenizer_folder / name).is_file()]
        return {"weights": sha256(tensors), "config": sha256(configs), "tokenizer": sha256(texts)}


def find_model(name: str | Path, revision: str | None = None, *, fetch_weights: bool = True) -> ModelFiles:
    """Resolve a folder or hub id to local files, and those of the base model for adapters.

    Raises UserError for a model that does not exist, for adapters without a base model that can be found, and like
    `hub.look_up`.
    """
    own = folder = _find_folder(name, revision, fetch_weights)
    if _holds_adapters(own):
        base, base_revision = read_base(own)
        try:
            folder = _find_folder(base, base_revision, fetch_weights)
        except UserError as error:
            raise UserError(f"{own / ADAPTER_CONFIG}: the base model of these adapters: {error}") from None
        if _holds_adapters(folder):
            raise UserError(f"{own / ADAPTER_CONFIG}: its base {base} is not a model but adapters: merge these first")
    return ModelFiles(str(name), own, folder)


def load_language_model(
    model: str | Path, *, template: str | None = None, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LanguageModel:  # fmt: skip
    """Load a language model, its tokenizer and its template; adapters are merged.

    `template` is a name or file; by default that of the training run, or `course`. Raises like `find_model` and the
    files' own loaders.
    """
    files = find_model(model)
    own_template = template_of(template, files.own, "course")
    loaded, tokenizer = load_for_sft(files, dtype=dtype)
    return LanguageModel(loaded.to(device).eval(), tokenizer, own_template, files.name)


def load_for_prompts(files: ModelFiles, *, template: str | None = None) -> tuple[Tokenizer, Template, int]:
    """Return a language model's tokenizer, template and number of positions. Raises like `load_language_model`."""
    config, tokenizer = weights.read_language_config(files.folder), load_tokenizer(files.tokenizer_folder)
    check_fits(tokenizer, config.vocab_size, files.name)
    return tokenizer, template_of(template, files.own, "course"), config.max_position_embeddings


def load_for_sft(
    files: ModelFiles, *, dtype: torch.dtype = torch.float32, mapped: bool = False
) -> tuple[OPT, Tokenizer]:
    """Load a language model to train, and its tokenizer; adapters are merged. Raises like `load_language_model`.

    With `mapped` the weights are views of the files, as they are stored, except for adapters and their base model.
    """
    return _load(files, weights.load_model, dtype, mapped=mapped)


def load_judge(
    model: str | Path, *, template: str | None = None, flag: str = "--template", batch_size: int = 32,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> Judge:  # fmt: skip
    """Load a reward model to score with; adapters are merged.

    `template` is a name or file; by default that of the training run, or `dialogue`. Raises UserError for a language
    model, and like `load_language_model`.
    """
    files = find_model(model)
    own_template = template_of(template, files.own, "dialogue", flag)
    seed = 0 if files.are_adapters else None  # they replace the head
    loaded, tokenizer = _load(files, partial(weights.load_reward_model, seed=seed), dtype)
    return Judge(loaded.to(device).eval(), tokenizer, own_template, batch_size, files.name)


def load_for_rm(
    files: ModelFiles, *, seed: int, dtype: torch.dtype = torch.float32, mapped: bool = False
) -> tuple[RewardModel, Tokenizer]:
    """Load a reward model to train, and its tokenizer: a language model's body with a fresh head drawn with `seed`.

    If the model already has a reward head, that is kept. `mapped` as for `load_for_sft`. Raises UserError like
    `load_language_model`.
    """
    return _load(files, partial(weights.load_reward_model, seed=seed), dtype, keep_reward_head=True, mapped=mapped)


def _load(
    files: ModelFiles, load: Callable[..., Model], dtype: torch.dtype, *,
    keep_reward_head: bool = False, mapped: bool = False,
) -> tuple[Model, Tokenizer]:  # fmt: skip
    """Return the model that `load` makes of a folder, with adapters merged into it, and its tokenizer.

    The model's config gets the tokenizer's special ids: programs that read the saved model stop and pad by these.
    """
    tokenizer = load_tokenizer(files.tokenizer_folder)
    mapped = mapped and not files.are_adapters  # merging changes the weights
    model = load(files.folder, dtype=dtype, mapped=mapped)
    if files.are_adapters:
        load_adapters(model, files.own, keep_reward_head=keep_reward_head)
        merge(model)
    check_fits(tokenizer, model.config.vocab_size, files.name)
    model.config = replace(model.config, **tokenizer.config_ids(model.config.pad_token_id))
    model.requires_grad_(True)
    return model if mapped else model.to(dtype=dtype), tokenizer


def _find_folder(name: str | Path, revision: str | None, fetch_weights: bool) -> Path:
    folder = model_folder(name, revision)
    if fetch_weights and not Path(name).is_dir():
        repository = look_up(str(name), "model", revision)
        files = [pick_adapter_weights(repository.files)]
        if ADAPTER_CONFIG not in repository.files or {*weights.LAYOUTS} & {*repository.files}:
            top = [file for file in repository.files if "/" not in file]
            files = weights.pick_weights(top, folder, repository)
        fetch(repository, files)
    return folder


def _holds_adapters(folder: Path) -> bool:
    """Return whether a folder holds adapters and no model; the model's config.json may lie beside them."""
    names = {path.name for path in folder.iterdir()}
    if ADAPTER_CONFIG not in names or {*weights.LAYOUTS} & names:
        return False
    return "config.json" not in names or bool({*adapters.LAYOUTS} & names)
