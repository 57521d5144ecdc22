"""The arguments that blocks are called with, compared tensor by tensor."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Call = tuple[tuple, dict]


def share_tensors(new, old):
    """`new` with every tensor that equals its counterpart in `old` replaced by it: batches share their masks.

    A GPU is waited for once, however many blocks are called: most are called with the same tensors.
    """
    pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    _replaced(new, old, lambda one, other: pairs.setdefault((id(one), id(other)), (one, other)) is None)
    equal = {key for key, (one, other) in pairs.items() if one is other}
    unknown: dict[torch.device, dict[tuple[int, int], Tensor]] = {}
    for key, (one, other) in pairs.items():
        alike = (one.device, one.dtype, one.shape) == (other.device, other.dtype, other.shape)
        if alike and key not in equal:
            unknown.setdefault(one.device, {})[key] = (one == other).all()
    for found in unknown.values():
        equal.update(key for key, yes in zip(found, torch.stack([*found.values()]).tolist(), strict=True) if yes)
    return _replaced(new, old, lambda one, other: (id(one), id(other)) in equal)


def _replaced(new, old, same: Callable[[Tensor, Tensor], bool]):
    """`new` with every tensor that is the `same` as its counterpart in `old` replaced by it."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return old if same(new, old) else new
    if type(new) is not type(old):
        return new
    if isinstance(new, dict):
        return {key: _replaced(value, old.get(key), same) for key, value in new.items()}
    if type(new) in (list, tuple) and len(new) == len(old):
        return type(new)(_replaced(a, b, same) for a, b in zip(new, old, strict=True))
    return new


def same_values(one, other) -> bool:
    """Whether two calls' arguments are the same, tensor by tensor; of other objects only the kind is compared."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.shape != other.shape:
            return False
        return torch.allclose(one, other.to(one.device, one.dtype), rtol=0, atol=0, equal_nan=True)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_values(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_values, one, other))
    return one == other if isinstance(one, (bool, int, float, str)) else True


def same_tensors(one, other) -> bool:
    """Whether two calls are made of the very same tensors."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(a is b for a, b in pairs if isinstance(a, Tensor) or isinstance(b, Tensor))
