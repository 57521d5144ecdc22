"""Where the hidden states of many windows live: in memory, or past a limit in a memory-mapped file."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from .errors import RunError


@dataclass(frozen=True)
class Store:
    """folder takes the file, which has no name left once it is open; `limit` bytes may stay in memory, and where it is
    None a quarter of what is free.
    """

    folder: Path
    limit: int | None = None

    def fits(self, size: int) -> bool:
        limit = psutil.virtual_memory().available // 4 if self.limit is None else self.limit
        return size <= limit

    def map(self, size: int, dtype: torch.dtype) -> Tensor:
        """A tensor of `size` elements whose memory is a file. Raises RunError where the disk has no room for it."""
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
    are read on the model's device.
    """

    def __init__(self, device: torch.device, windows: int, batch_size: int, store: Store | None):
        self._device, self._windows, self._batch_size, self._store = device, windows, batch_size, store
        self._batches: list[Tensor] = []
        self._mapped: Tensor | None = None

    def put(self, index: int, value: Tensor) -> None:
        """Append, or replace what is there."""
        if index == len(self):
            self._append(value)
        elif self._mapped is not None:
            self._batches[index].copy_(value)
        else:
            self._batches[index] = value if self._store is None else value.cpu()

    def _append(self, value: Tensor) -> None:
        if self._store is None:
            self._batches.append(value)
            return
        if not self._batches:
            elements = value.numel() * -(-self._windows // self._batch_size)
            if not self._store.fits(elements * value.element_size()):
                self._mapped = self._store.map(elements, value.dtype)
        if self._mapped is None:
            self._batches.append(value.cpu())
            return
        begin = sum(batch.numel() for batch in self._batches)
        place = self._mapped[begin : begin + value.numel()].view(value.shape)
        self._batches.append(place.copy_(value))

    def empty(self) -> "Activations":
        """A place for other tensors of the same windows."""
        return Activations(self._device, self._windows, self._batch_size, self._store)

    def copy(self) -> "Activations":
        """The same tensors, to go their own way."""
        other = self.empty()
        for index, value in enumerate(self._batches):
            other.put(index, value.clone())
        return other

    def alike(self, tensor: Tensor) -> bool:
        """Whether a window's tensor has the shape and the type of these."""
        first = self._batches[0]
        return first.shape[1:] == tensor.shape[1:] and first.dtype == tensor.dtype

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Tensor:
        batch = self._batches[index]
        return batch if self._store is None else batch.to(self._device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))
