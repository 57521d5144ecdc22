"""Precision of matrix products: full float32, or mixed precision for gradients."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

T = TypeVar("T")


def float32_matmul_precision() -> str:
    """torch's float32 matmul precision: "highest" is float32 throughout, "high" and "medium" allow TF32 or bfloat16.

    Torch has two interfaces to ask through, which may contradict each other.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Products of float32 matrices in float32 throughout, whatever the process or its environment asks for: Gram
    matrices and what is solved with them do not survive TF32's 10 bits.
    """
    found = float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if found in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(found)
        else:
            torch.backends.cuda.matmul.fp32_precision = found


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the processor multiplies in it (three times as fast on a CPU that does), else float32."""
    if device == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        has = any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if has else torch.float32


def mixed_precision(dtype: torch.dtype, device: str) -> torch.autocast:
    """The context for passes of a model of that type whose weights are in float32 while they take gradients.

    A model in float16 too is passed in bfloat16: its gradients have no range in float16.
    """
    fast = fast_dtype(device) if dtype == torch.float32 else torch.bfloat16
    return torch.autocast(device, dtype=fast, enabled=fast == torch.bfloat16)


def choose_autocast(
    mixed: Callable[[], AbstractContextManager], first: Callable[[], T]
) -> tuple[Callable[[], AbstractContextManager], T]:
    """What gives the context of a model's passes, and what the `first` one returns: `mixed`, or none where the model's
    own code puts numbers of two types together once autocast has changed one (a few mixtures of experts).
    """
    try:
        with mixed():
            return mixed, first()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return nullcontext, first()
