"""The device and dtypes of a run or command, from its options; the allocator; the name of the machine."""

import ctypes
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from minift.config import Config
from minift.errors import UserError
from minift.run.ranks import LOCAL_RANK, WORLD_SIZE


def pick_device(name: str) -> torch.device:
    """Return the device with this name; `auto` is the GPU if there is one, CUDA's before Apple's (`mps`).

    A CUDA device is also set up for batches of changing shapes. Started by torchrun, each process has a GPU of its own:
    `cuda` is the one with its number. Raises UserError for a GPU that does not exist.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if WORLD_SIZE > 1 and name.startswith("cuda:"):
        raise UserError(f"--device {name}: with torchrun each process has a GPU of its own, expected cuda or auto")
    if WORLD_SIZE > 1 and name == "cuda":
        name = f"cuda:{LOCAL_RANK}"
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name not in ["cpu", *["mps"] * has_mps, *["cuda"] * bool(gpus), *gpus]:
        others = "cpu, mps" if has_mps else "cpu"
        raise UserError(f"--device {name}: expected auto, {others} or one of the {len(gpus)} GPUs here, as in cuda:0")
    if name.startswith("cuda"):
        _set_up_cuda()
    return torch.device(name)


def _set_up_cuda() -> None:
    """Set up CUDA for batches of which no two are alike."""
    # cuDNN's attention makes a plan for each new shape, which takes longer than a step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Freed memory can then serve tensors of any size. torch reads this at the first tensor on a GPU.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which the user may have set
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def check_compiler(device: torch.device) -> None:
    """Raise UserError if --compile does not pay on the device, or if torch.compile would not find a C compiler."""
    if device.type != "cuda":
        raise UserError(f"--compile: it is for NVIDIA GPUs only, and this run is on {device.type}: leave it out")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise UserError("--compile: needs a C compiler, gcc or clang: install one, or leave it out")


def placement(device: str, dtype: str) -> dict[str, Any]:
    """Return the `device` and `dtype` that a command's flags choose; from now on, freed memory is kept.

    Raises UserError like `pick_device` and `check_dtype`.
    """
    picked = pick_device(device)
    check_dtype(picked, dtype)
    set_allocator(save_memory=False)
    return {"device": picked, "dtype": getattr(torch, dtype)}


def check_dtype(device: torch.device, dtype: str) -> None:
    """Raise UserError if the device does not have the dtype."""
    if device.type == "mps" and dtype == "float64":
        raise UserError(f"--dtype {dtype}: Apple's GPU (mps) does not have it: add --device cpu, or choose float32")


def pick_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward pass: that of the frozen weights, if they are in half precision.

    Otherwise `auto` is bfloat16 autocast on a GPU that has it, and float32 on a CPU. Trained weights stay in float32
    (float64 if asked for): an AdamW update is often below bfloat16's resolution and would round to zero. Raises
    UserError for float64 on a device that does not have it.
    """
    dtype = config.dtype if config.base_dtype == "float32" else config.base_dtype
    check_dtype(device, dtype)
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, dtype)


def weights_dtype(config: Config) -> torch.dtype:
    """Return the dtype to load the weights in: float64 if the forward pass is, else that of the frozen base."""
    return torch.float64 if config.dtype == "float64" else getattr(torch, config.base_dtype)


def set_allocator(save_memory: bool) -> None:
    """Tell glibc what to do with the memory that a step frees: keep it for the next step, or give it back at once.

    By default it gives large blocks back, and the system must clear them again in each step. That takes up to a tenth
    of a step's time, and a twentieth of generation's. Other C libraries are left as they are.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # of glibc's malloc.h
    keep = {trim_threshold: -1, mmap_max: 0}
    give_back = {trim_threshold: 131_072, mmap_max: 65_536, mmap_threshold: 65_536}  # the first two are the defaults
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in (give_back if save_memory else keep).items():
            libc.mallopt(option, value)


def machine(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor with the number of threads that torch uses."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "Apple's GPU"
    about = Path("/proc/cpuinfo")  # Linux; elsewhere `platform` knows the name
    found = re.search(r"model name\s*: (.+)", about.read_text(encoding="utf-8")) if about.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
