"""Storage of many windows' hidden states and of copied weights: in memory, past a limit in memory-mapped files."""

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor

from .errors import RunError
from .memory import copy_to_host


@dataclass
class Store:
    """folder takes the files, which have no name left once they are open; `limit` bytes may stay in memory in all, and
    where it is None a quarter of what is free.
    """

    folder: Path
    limit: int | None = None
    held: int = field(default=0, init=False)  # bytes in memory

    def __post_init__(self):
        if self.limit is None:
            self.limit = psutil.virtual_memory().available // 4

    @property
    def available(self) -> int:
        """Bytes that may still be held in memory."""
        return max(self.limit - self.held, 0)

    def fits(self, size: int) -> bool:
        return size <= self.available

    def reserve(self, size: int, owner: object) -> None:
        """Count `size` bytes as used for as long as `owner` lives."""
        self.held += size
        weakref.finalize(owner, self._release, size)

    def _release(self, size: int) -> None:
        self.held -= size

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor on the host, in memory or in a file."""
        if not self.fits(tensor.nbytes):
            return self.map(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)
        copy = copy_to_host(tensor)
        self.reserve(tensor.nbytes, copy)
        return copy

    def map(self, size: int, dtype: torch.dtype) -> Tensor:
        """A memory-mapped tensor of `size` elements. Raises RunError where the disk has no room for it."""
        path = self.folder / f"activations-{os.getpid()}"
        try:
            with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT)) as file:
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)  # a hole met later would be a bus error
            return torch.from_file(str(path), shared=True, size=size, dtype=dtype)
        except OSError as error:
            raise RunError(
                f"--activation_memory: {path} cannot take {size * dtype.itemsize} bytes: {error.strerror}; "
                "make room, or allow more memory"
            ) from error
        finally:
            path.unlink(missing_ok=True)


class Activations:
    """One tensor a batch, such as its hidden state (B, S, d), put in order and replaced in place.

    Without a store they stay where they are made, with the block that they come from; with one they lie on the host and
    are read on the model's device. All batches together come to the size of `batches` such as the first.
    """

    def __init__(self, device: torch.device, batches: int, store: Store | None):
        self._device, self._count, self._store = device, batches, store
        self._batches: list[Tensor] = []
        self._mapped: Tensor | None = None

    def put(self, index: int, value: Tensor) -> None:
        """Append, or replace what is there."""
        if index == len(self):
            self._append(value)
        elif self._mapped is not None:
            self._batches[index].copy_(value)
        else:
            self._batches[index] = self._kept(value)

    def _append(self, value: Tensor) -> None:
        if self._store is not None and not self._batches:
            elements = value.numel() * self._count
            size = elements * value.element_size()
            if self._store.fits(size):
                self._store.reserve(size, self)
            else:
                self._mapped = self._store.map(elements, value.dtype)
        if self._mapped is None:
            self._batches.append(self._kept(value))
            return
        begin = sum(batch.numel() for batch in self._batches)
        place = self._mapped[begin : begin + value.numel()].view(value.shape)
        self._batches.append(place.copy_(value))

    def _kept(self, value: Tensor) -> Tensor:
        return value if self._store is None or not value.is_cuda else copy_to_host(value)

    def new_empty(self) -> "Activations":
        """An empty container for other tensors of the same windows."""
        return Activations(self._device, self._count, self._store)

    def copy(self) -> "Activations":
        """An independent copy."""
        other = self.new_empty()
        for index, value in enumerate(self._batches):
            other.put(index, value.clone())
        return other

    def same_layout(self, tensor: Tensor) -> bool:
        """Whether a batch's tensor has the shape, but for the batch size, and the dtype of these."""
        first = self._batches[0]
        return first.shape[1:] == tensor.shape[1:] and first.dtype == tensor.dtype

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Tensor:
        batch = self._batches[index]
        return batch if self._store is None else batch.to(self._device, non_blocking=batch.is_pinned())

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))
