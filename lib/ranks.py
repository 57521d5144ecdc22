"""Several processes on one run (torch.distributed): who this one is, and how work and results are shared.

Started by `accelerate launch` (or torchrun) they are ranks of one group, gloo for what lies on CPUs and nccl for what
lies on GPUs; started plainly, the one process is rank 0 of 1 and everything here is free.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import RunError

T = TypeVar("T")

# How long a rank waits for another that is alive. One that dies is noticed at once by the launcher.
PATIENCE = timedelta(hours=12)


def join(device: str) -> None:
    """Join the group that the launcher's environment describes, if any. `device` is what --device asks for.

    Raises RunError, in every process, where they cannot have a GPU each.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
            if device not in ("auto", "cuda"):
                raise RunError(f"--device {device}: several processes take a GPU each; give auto, cuda or cpu")
            if here > gpus:
                raise RunError(f"--device {device}: {here} processes for the {gpus} GPUs of this machine; start {gpus}")
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    elif "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        raise RunError(
            "accelerate launch: started one process although it was asked for several; on CPUs add its flag --multi_gpu"
        )


def leave() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the main process, rank 0: the one that writes files and logs."""
    return rank() == 0


def reports_errors() -> bool:
    """Whether this process reports an error; before the group is joined all processes of a machine meet the same."""
    return dist.is_initialized() or int(os.environ.get("LOCAL_RANK", 0)) == 0


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def all_gather(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(make: Callable[[], T]) -> T:
    """The result of `make()` on rank 0, broadcast to every rank; any object that can be pickled."""
    if world_size() == 1:
        return make()
    value = [make() if is_main() else None]
    dist.broadcast_object_list(value, src=0)
    return value[0]


def all_reduce(tensor: Tensor) -> None:
    """Replace the tensor on every rank by the sum over the ranks."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def broadcast(tensor: Tensor, source: int) -> Tensor:
    """The tensor of rank `source`, on every rank; the others pass one of the same shape and dtype."""
    if world_size() > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=source)
    return tensor


def shard(windows: Tensor) -> Tensor:
    """This rank's share of windows (n, seqlen): every world_size()-th."""
    return windows[rank() :: world_size()]


def check_enough(given: str, windows: Tensor) -> None:
    """Raises RunError, which begins with the flag as `given`, where a rank would get none of the windows."""
    if len(windows) < world_size():
        read = f"{len(windows)} window" + "s" * (len(windows) > 1)
        raise RunError(f"{given}: comes to {read} at a time, less than one for each of {world_size()} processes")


def balance(costs: Sequence[float]) -> list[int]:
    """The rank that takes each piece of work: the ranks' sums of costs are about equal. The same on every rank."""
    load, owners = [0.0] * world_size(), [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(world_size()), key=lambda r: load[r])
        load[owners[i]] += costs[i]
    return owners
