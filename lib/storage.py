"""The dtypes in which a model is saved, and its weights with the values that they have there."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .errors import RunError


def settle(state: Mapping[str, Tensor], saved_as: Mapping[str, torch.dtype]) -> Iterator[str]:
    """Round every tensor, in place, to the values of the dtype that it is saved in, so that what is measured of the
    model holds for its checkpoint. Yields what is worth saying.

    Raises RunError for values beyond what the dtype can hold.
    """
    for name, tensor in state.items():
        dtype = saved_as.get(name, tensor.dtype)
        if not tensor.is_floating_point() or torch.promote_types(dtype, tensor.dtype) == dtype:
            continue
        rounded, label = tensor.to(dtype), str(dtype).removeprefix("torch.")
        if beyond := int((tensor.isfinite() & ~rounded.isfinite()).sum()):
            raise RunError(
                f"--save_dtype: {beyond} values of {name} are beyond {label}; save with --save_dtype float32"
            )
        if lost := int(((rounded == 0) & (tensor != 0)).sum()):
            yield f"{lost} values of {name} are too small for {label}, in which it is saved, and became zero"
        tensor.copy_(rounded)


def as_saved(state: Mapping[str, Tensor], saved_as: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The tensors on the CPU in the dtypes that they are saved in; what shares storage still does."""
    made, cast = {}, {}
    for name, tensor in state.items():
        dtype = saved_as.get(name, tensor.dtype) if tensor.is_floating_point() else tensor.dtype
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), dtype)
        made[name] = cast.setdefault(key, tensor.to("cpu", dtype))
    return made
