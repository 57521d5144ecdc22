"""Passes for gradients in the fast type of the processor."""

import torch


def fast_type(device: str) -> torch.dtype:
    """bfloat16 where the processor multiplies in it (three times as fast on a CPU that does), else float32."""
    if device == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        has = any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if has else torch.float32


def mixed_precision(dtype: torch.dtype, device: str) -> torch.autocast:
    """The context for forward passes of a model of that type whose weights are in float32 while they take gradients."""
    fast = fast_type(device) if dtype == torch.float32 else dtype
    return torch.autocast(device, dtype=fast, enabled=fast in (torch.bfloat16, torch.float16))
