"""State dicts that torch.save wrote: read with every call in the pickle checked before any of it runs."""

import io
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from minift.errors import UserError

CALLS = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}  # the pickle operations that name a function
MAKES_TENSORS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a `.bin` file, its tensors as views of the mapped file if that is a zip.

    Raises UserError if the file is damaged, holds anything but tensors by name, or calls a function that does not make
    tensors: torch's `weights_only` allows a few more, with which a small file can take any amount of memory.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\3\4"  # torch decides by the same bytes
            file.seek(0)
            # Files from before torch 1.6 begin with five pickles; the fourth is the state dict.
            for pickled in [_pickle_of_archive(path)] if is_zip else [file] * 5:
                for operation, name, _ in pickletools.genops(pickled):
                    is_storage = isinstance(name, str) and re.fullmatch(r"torch \w+Storage", name)
                    if operation.name in CALLS and not is_storage and name not in MAKES_TENSORS:
                        problem = f"holds more than weights ({operation.name} {name}) and was not run"
                        raise UserError(f"{path}: {problem}, expected a plain state dict, of pickle protocol 2")
        with warnings.catch_warnings(action="ignore"):  # torch warns about a pickle before it refuses it
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the bytes of a damaged pickle decide how it fails
        raise UserError(f"{path}: unreadable, truncated or damaged: copy it again ({type(error).__name__})") from None
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(state[key], Tensor) for key in state):
        raise UserError(f"{path}: expected a state dict, a dictionary of tensors by name")
    return state


def _pickle_of_archive(path: Path) -> IO[bytes]:
    """Return the pickle that torch will read. Its reader can find another one in a zip than Python's."""
    with zipfile.ZipFile(path) as archive:
        is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    if is_stored:
        reader = torch._C.PyTorchFileReader(str(path))
        if sum(map(reader.get_record_size, reader.get_all_records())) <= path.stat().st_size:
            return io.BytesIO(reader.get_record("data.pkl"))
    raise UserError(f"{path}: not an archive as torch.save writes it, uncompressed: save it again")
