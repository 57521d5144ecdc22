"""The dtypes in which a model is saved, and its weights with the values that they have there."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from .errors import RunError

AT_ONCE = 2**22  # elements of a tensor that are copied at a time: embeddings may be the largest there is


def round_to_save_dtypes(state: Mapping[str, Tensor], save_dtypes: Mapping[str, torch.dtype]) -> Iterator[str]:
    """Round every tensor, in place, to the values of the dtype that it is saved in, so that what is measured of the
    model holds for its checkpoint. Yields a message for each tensor that lost values.

    Raises RunError for values beyond what the dtype can hold.
    """
    for name, tensor in state.items():
        dtype = save_dtypes.get(name, tensor.dtype)
        if not tensor.is_floating_point() or torch.promote_types(dtype, tensor.dtype) == dtype:
            continue
        label, beyond, lost = str(dtype).removeprefix("torch."), 0, 0
        rows = tensor if tensor.dim() else tensor[None]
        for part in rows.split(max(1, AT_ONCE * len(rows) // max(1, tensor.numel()))):
            rounded = part.to(dtype)
            beyond += (part.isfinite() & ~rounded.isfinite()).sum()
            lost += ((rounded == 0) & (part != 0)).sum()
            part.copy_(rounded)
        beyond, lost = int(beyond), int(lost)
        if beyond:
            raise RunError(
                f"--save_dtype: {beyond} values of {name} are beyond {label}; save with --save_dtype float32"
            )
        if lost:
            yield f"{lost} values of {name} are too small for {label}, in which it is saved, and became zero"


@contextmanager
def held_in_save_dtypes(model: nn.Module, save_dtypes: Mapping[str, torch.dtype]):
    """While parameters and buffers of a rounded model are held in the dtypes that they are saved in, where these are
    smaller: writing needs no second copy.
    """
    wide = []
    try:
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            saved = save_dtypes.get(name, tensor.dtype)
            if tensor.is_floating_point() and not tensor.is_meta and saved.itemsize < tensor.dtype.itemsize:
                wide.append((tensor, tensor.dtype))
                tensor.data = tensor.data.to(saved)
        yield
    finally:
        for tensor, dtype in wide:
            tensor.data = tensor.data.to(dtype)


def in_save_dtypes(state: Mapping[str, Tensor], save_dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The tensors on the CPU in the dtypes that they are saved in; tensors that share storage still do."""
    made, cast = {}, {}
    for name, tensor in state.items():
        dtype = save_dtypes.get(name, tensor.dtype) if tensor.is_floating_point() else tensor.dtype
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), dtype)
        made[name] = cast.setdefault(key, tensor.to("cpu", dtype))
    return made
