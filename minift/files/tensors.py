"""Named tensors: read from safetensors and `.bin` files with the names and shapes a model expects, and written."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minift.errors import UserError
from minift.files.pickles import load_pickle
from minift.files.text import atomic_write, check_not_pointer

EMBEDDING = "decoder.embed_tokens.weight"
HEAD = "lm_head.weight"  # tied: another name for the embedding
SCORE = "score.weight"  # a reward model's head, which is new and so is trained with adapters
STRAY = "decoder.version"  # fairseq's file version, which the first conversions kept


def read_state(
    files: Sequence[Path], shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, fresh: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return copies in `dtype` of the tensors that `shapes` names, or `fresh` ones for those that the files lack.

    The files hold them with or without a leading `model.`. They are copied one at a time out of one mapped file after
    the other, so they are never in memory twice. No code in a file runs.

    Raises UserError if a file is damaged, or if a tensor is missing, unexpected, of another shape, not of floating
    point numbers, or NaN or infinite in `dtype`.
    """
    state: dict[str, Tensor] = {}
    unexpected: set[str] = set()
    misshapen: dict[str, str] = {}
    for path in files:
        room = path.stat().st_size
        for full_name, tensor in _read_tensors(path):
            name = full_name.removeprefix("model.")
            if name == STRAY:
                continue
            if name in state or name not in shapes:
                unexpected.add(full_name)
            elif tensor.shape != torch.Size(shapes[name]):
                misshapen[name] = f"{full_name} {[*tensor.shape]} for {[*shapes[name]]}"
            else:
                # A pickle can spread one number over any shape. The head may share the embedding's bytes.
                room -= tensor.nbytes if name != HEAD else 0
                if room < 0:
                    raise UserError(f"{path}: damaged: {full_name} is said to be larger than the file has room for")
                # A copy even if nothing is cast: the tensor is a view of the mapped file.
                state[name] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
                # One NaN makes the extremes NaN; isfinite() of the whole tensor would allocate as much again.
                if not tensor.is_floating_point() or not all(limit.isfinite() for limit in state[name].aminmax()):
                    raise UserError(f"{path}: {full_name} holds NaN, infinite or whole numbers when read as {dtype}")

    where = files[0] if len(files) == 1 else files[0].parent
    head = state.pop(HEAD, None)  # a tied save may keep the tensor under either name or both
    if head is not None and not torch.equal(state.setdefault(EMBEDDING, head), head):
        raise UserError(f"{where}: lm_head.weight differs from embed_tokens.weight, expected a tied head")
    state = {**fresh, **state}
    missing = shapes.keys() - state.keys() - misshapen.keys() - {HEAD}
    odd = missing | unexpected
    if len(odd) == 1 and min(odd).endswith(SCORE) and not misshapen:
        subject = "these adapters are of" if min(odd).startswith("base_model.") else "this is"
        if missing:
            problem = f"no {SCORE}: {subject} a language model; train a reward model from it with train_rm.py"
        else:
            problem = f"has {SCORE}: {subject} a reward model, expected a language model"
        raise UserError(f"{where}: {problem}")
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": {*misshapen.values()}}
    found = [f"{len(names)} {problem}, first {min(names)}" for problem, names in problems.items() if names]
    if found:
        raise UserError(f"{where}: weights do not fit the model: {'; '.join(found)}")
    return state


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically, marked as PyTorch's. Raises like `atomic_write`."""
    with atomic_write(path) as unfinished:
        # safetensors writes under a random name first. A killed process would leave that file for ever, so it is
        # written in a folder, which the next write of `path` deletes.
        folder = unfinished.with_suffix(".folder")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
            (folder / path.name).replace(unfinished)
            folder.rmdir()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the named tensors of a file, as views of it wherever it can be mapped."""
    check_not_pointer(path)
    if path.suffix != ".safetensors":
        yield from load_pickle(path).items()
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path}: unreadable, truncated or damaged: download or copy it again ({error})") from None
