"""--fsdp: each rank keeps a part of every weight, of its gradient and of AdamW's moments, for models that do not fit.

A layer's weights are gathered when a pass needs them and freed after it; its gradients are summed over the ranks, and
each rank gets its part of the sums (ZeRO stage 3: Rajbhandari et al. 2020, arXiv 1910.02054; torch's `fully_shard`:
Zhao et al. 2023, arXiv 2304.11277). So all ranks must run the same number of passes: see `InStep`.
"""

import os
import sys
import warnings
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minift.files.weights import to_dtype
from minift.lora import adapters_of, add_lora, last_name, merge
from minift.model import OPT, Decoder, Model, RewardModel
from minift.run.distributed import before_gather, gather, named_errors
from minift.run.ranks import LOCAL_WORLD_SIZE, RANK, WORLD_SIZE

FILE_SIZE = 2**28  # bytes of all ranks together; a file is in memory once more while it is written
ROOM = 2.5  # times the size of a copy must be free for it: the cache takes memory too, and on a CPU prepacked weights
CONTAINER_MEMORY = [  # the limit of a container and what it uses, in Linux's control groups of version 2 and 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
]
WAITS, FORWARD, BACKWARD = range(3)  # what a rank does next; BACKWARD is both passes


def shard(model: OPT | RewardModel, device: torch.device, dtype: torch.dtype) -> None:
    """Leave in a model this rank's part of every weight, the rows that `torch.chunk` gives it, on `device`.

    The weights may be views of files. They are read one layer at a time, so no rank ever has all of them, and cast to
    `dtype`; those to train, to float32 at least. Raises UserError if one is not finite.
    """
    from torch.distributed.fsdp import fully_shard  # 0.6 s, which other runs need not wait for

    decoder = model.decoder
    mesh = dist.init_device_mesh(device.type, (WORLD_SIZE,))
    if isinstance(model, RewardModel):
        decoder.add_module("score", model.score)  # the decoder's passes gather the reward head too
    layers: dict[str, nn.Module] = {f"decoder.layers.{number}": layer for number, layer in enumerate(decoder.layers)}
    for prefix, module in {**layers, "decoder": decoder}.items():  # then the rest: embeddings (one is the head), norms
        for name, parameter in module.named_parameters(prefix):
            if not hasattr(parameter, "to_local"):  # not sharded yet
                wanted = torch.promote_types(dtype, torch.float32) if parameter.requires_grad else dtype
                parameter.data = to_dtype(parameter.data, wanted, f"--model: {name}").to(device)
        group = fully_shard(module, mesh=mesh)
        group.set_gradient_divide_factor(1.0)  # sums, not means: the trainer divides by the count of all ranks
        group.set_force_sum_reduction_for_comms(True)
        group.set_reduce_scatter_unused_params(True)  # in the passes of `InStep` the reward head has no gradient
    if isinstance(model, RewardModel):
        del decoder.score
    before_gather.append(InStep(decoder).wait)


class InStep:
    """Let a rank that waits for the others take part in their passes, which need its part of the weights.

    Ranks have different numbers of micro-batches, prompts and tokens to generate. Each announces its forward passes. A
    rank that waits then runs a pass too, on a single token; in its backward pass the gradient is zero.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.is_waiting = False
        self.group = dist.new_group(backend="gloo")  # on the CPU, so that no pass waits for a GPU
        decoder.register_forward_pre_hook(self.announce, prepend=True)  # before the hook that gathers the weights

    def announce(self, module: nn.Module, inputs: Any) -> None:
        """Tell the others that this rank runs a forward pass, and a backward pass if gradients are on."""
        if not self.is_waiting:
            self._exchange(BACKWARD if torch.is_grad_enabled() else FORWARD)

    def wait(self) -> None:
        """Take part in the others' passes until all ranks wait. Free the weights that the last pass gathered."""
        self.is_waiting = True
        while (act := self._exchange(WAITS)) != WAITS:
            zero = torch.zeros(1, dtype=torch.long, device=self.decoder.embed_tokens.weight.device)
            with torch.set_grad_enabled(act == BACKWARD):
                hidden = self.decoder(zero, zero, zero[:, None])  # (1, E)
            if act == BACKWARD:
                hidden.backward(torch.zeros_like(hidden))
        self.is_waiting = False
        self.decoder.reshard()  # type: ignore[operator]

    def _exchange(self, act: int) -> int:
        """Return the largest `act` of all ranks."""
        number = torch.tensor(act)
        with named_errors():
            dist.all_reduce(number, dist.ReduceOp.MAX, self.group)
        return int(number)


def whole(model: Model, device: torch.device | None = None) -> Model:
    """Return a plain copy of a sharded model on each rank's `device`; without one, on the CPU of rank 0 only.

    Then the copies of the other ranks have no values. The weights are gathered one at a time. All ranks must call it.
    """
    state = {}
    for name, part in model.state_dict().items():
        with named_errors():
            tensor = part.full_tensor()
        if device is not None or RANK == 0:
            state[name] = tensor.to(device or "cpu")
    with torch.device("meta"):
        plain = type(model)(model.config)
        if adapters := adapters_of(model):
            first = next(iter(adapters.values()))
            targets = sorted({last_name(name) for name in adapters})
            add_lora(plain, first.lora_A.out_features, first.alpha, first.dropout, targets)
    plain.load_state_dict(state, assign=True, strict=bool(state))
    return plain


def for_generation(model: Model) -> Model:
    """Return a plain copy of a sharded model if there is memory for it on all ranks, else the model itself.

    A sharded model gathers all its weights again for each token. All ranks must call it.
    """
    device = model.head.device
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if not all(gather([ROOM * size <= _free_memory(device)])):
        return model
    plain = whole(model, device)
    merge(plain)
    return plain


def _free_memory(device: torch.device) -> int:
    """Return how many bytes a rank can take on its device; 0 if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform != "linux":
        return 0
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit, used in CONTAINER_MEMORY:
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            free.append(int(most) - int(used.read_text()))
    return min(free) // LOCAL_WORLD_SIZE


def write_parts(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors into a folder, each rank its parts into safetensors files of its own. All ranks must call it."""
    import torch.distributed.checkpoint as dcp

    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
    starts = accumulate(sizes, initial=0)
    file_of = {name: 1 + start // FILE_SIZE for name, start in zip(tensors, starts, strict=False)}
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), file_of, save_distributed=True))
    except dcp.CheckpointException as error:
        raise _cause(error) from None


def read_parts(folder: Path, like: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the tensors in a folder's safetensors files, named `<measure>.<name of a parameter>`.

    They may be whole, or parts written by any number of ranks. Of a tensor whose parameter in `like` is sharded, only
    this rank's part is read. One without a parameter has no values. Those of a `model.safetensors` are left out. Raises
    ValueError if a part is missing, and like safetensors for damaged files.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DTensor, empty

    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for name, stored in metadata.items():
        measure, _, parameter_name = name.partition(".")
        if measure == "model":
            continue
        parameter = like.get(parameter_name)
        is_scalar = len(stored.size) == 0  # AdamW's step number, which is not sharded
        # `stored.size` is the size of the parts found, so a missing one shows only in comparison with the parameter.
        found = sum(part.sizes.numel() for part in stored.chunks)
        if parameter is not None and not is_scalar and found < max(stored.size.numel(), parameter.numel()):
            raise ValueError(f"a part of {name} is missing")
        if isinstance(parameter, DTensor) and not is_scalar:
            where: dict[str, Any] = {"device_mesh": parameter.device_mesh, "placements": parameter.placements}
            tensors[name] = empty(stored.size, dtype=stored.properties.dtype, **where)
        else:
            device = "meta" if parameter is None else parameter.device
            tensors[name] = torch.empty(stored.size, dtype=stored.properties.dtype, device=device)
    read = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "assuming the intent is to load in a single process": it is
            dcp.load(read, storage_reader=reader, no_dist=True)
    except dcp.CheckpointException as error:
        raise _cause(error) from None
    return tensors


def _cause(error: Any) -> BaseException:
    """Return the first rank's exception of those in a CheckpointException."""
    return min(error.failures.items())[1][0]
