"""torchrun: several processes, the ranks, train one model. Rank 0 prints and writes; the others print only errors.

A step's micro-batches are dealt to the ranks in turn, and their gradients are summed over the ranks once a step. So K
ranks compute what one process does with K times the accumulation, to rounding. Started without torchrun, a process is
rank 0 of 1, and nothing here communicates.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minift.run import ranks
from minift.run.ranks import IS_ONE_MACHINE, NUM_RESTARTS, RANK, WORLD_SIZE, lost_rank
from minift.trainer import Ranks

BUCKET = 25 * 2**20  # bytes of gradients that are summed at a time; as in torch's DistributedDataParallel
before_gather: list[Callable[[], None]] = []  # called before a rank waits for the others; see `sharding.InStep`
Item = TypeVar("Item")
Result = TypeVar("Result")


def join(device: torch.device) -> None:
    """Wait for the other ranks that torchrun has started; a second call does nothing."""
    if WORLD_SIZE > 1 and not dist.is_initialized():
        is_gpu = device.type == "cuda"
        if is_gpu:
            torch.cuda.set_device(device)  # where NCCL puts what it sends
        with named_errors():
            store, rank, size = next(dist.rendezvous("env://"))
            if IS_ONE_MACHINE:  # torchrun keeps its store: after a restart the addresses of ended processes are in it
                store = dist.PrefixStore(f"restart {NUM_RESTARTS}", store)
            ranks.store = store
            dist.init_process_group("nccl" if is_gpu else "gloo", store=store, rank=rank, world_size=size)


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Let rank 0 run the block before the others do."""
    if RANK > 0:
        barrier()
    yield
    if RANK == 0:
        barrier()


def barrier() -> None:
    """Wait until all ranks have come here."""
    gather([None])


def gather(part: Sequence[Any]) -> list[Any]:
    """Return the items of all ranks in the order of `deal`: the first of each rank's part, then the second, …"""
    if WORLD_SIZE == 1:
        return list(part)
    for prepare in before_gather:
        prepare()
    parts: list[Any] = [None] * WORLD_SIZE
    with named_errors():
        dist.all_gather_object(parts, list(part))
    return [part[number] for number in range(len(parts[0])) for part in parts if number < len(part)]


def deal(function: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
    """Return `function(items)`, a result for each item, computed by all ranks: rank r of K does items r, r + K, …"""
    return gather(function(items[RANK::WORLD_SIZE]))


def sum_values(values: dict[str, float]) -> dict[str, float]:
    """Return the sums over the ranks. A rank may lack a name."""
    sums: dict[str, float] = {}
    for part in gather([values]):
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


@contextmanager
def summed_gradients(model: nn.Module, num_backward: int) -> Iterator[None]:
    """Sum the gradients of the block's `num_backward` backward passes over the ranks, once for all passes.

    The last pass completes the gradients in about the reverse order of the parameters. When a bucket of them is
    complete, its sum begins, while the pass goes on (Li et al. 2020, arXiv 2006.15704, section 3.2.3). The gradients of
    a sharded model are summed in every pass instead: otherwise each rank would hold all of them until the last pass.
    """
    if WORLD_SIZE == 1 or is_sharded(model):
        yield
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad][::-1]
    sizes = [parameter.numel() * parameter.element_size() for parameter in parameters]
    bucket_of = {p: before // BUCKET for p, before in zip(parameters, accumulate(sizes, initial=0), strict=False)}
    buckets = [list(group) for _, group in groupby(parameters, key=bucket_of.__getitem__)]
    passes = dict.fromkeys(parameters, 0)
    begun: list[tuple[Tensor, dist.Work]] = []  # the sums of the first buckets: all ranks must begin them in one order

    def begin() -> None:
        """Begin the sum of the next bucket; a parameter without gradient on this rank adds zeros."""
        bucket = buckets[len(begun)]
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in bucket])
        with named_errors():
            begun.append((flat, dist.all_reduce(flat, async_op=True)))

    def note(parameter: nn.Parameter) -> None:
        """Begin the sums of the buckets that this gradient completes."""
        passes[parameter] += 1
        while len(begun) < len(buckets) and all(passes[p] == num_backward for p in buckets[len(begun)]):
            begin()

    handles = [parameter.register_post_accumulate_grad_hook(note) for parameter in parameters]
    try:
        yield
        while len(begun) < len(buckets):
            begin()
    finally:
        for handle in handles:
            handle.remove()
    for bucket, (flat, work) in zip(buckets, begun, strict=True):
        with named_errors():
            work.wait()
        for parameter, grad in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = grad.view_as(parameter)


def is_sharded(model: nn.Module) -> bool:
    """Return whether `sharding.shard` has left this rank only a part of the model's weights."""
    return any(hasattr(module, "unshard") for module in model.modules())


def own_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


RANKS = Ranks(RANK, WORLD_SIZE, sum_values, summed_gradients, own_part)


def leave() -> None:
    """Wait for the other ranks and end the connection: a process that just exits can take the others with it."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


@contextmanager
def named_errors() -> Iterator[None]:
    """Raise ConnectionError where the other ranks cannot be reached."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:  # gloo raises RuntimeErrors
        raise ConnectionError(lost_rank(error)) from None
