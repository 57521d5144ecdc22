"""Empirical Fisher information of a matrix's rows: how much each output matters to the loss."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import ranks
from .activations import Store
from .gradients import for_each_gradient
from .model import LanguageModel, Matrix

MIN_FISHER = 1e-6  # of the mean: what an output is taken to matter at least


def row_fisher(
    model: LanguageModel,
    windows: Tensor,
    store: Store | None = None,
    cached: Callable[[str, Callable], dict] = lambda _, measure: measure(),
) -> dict[str, Tensor]:
    """matrix name -> (out,) mean over the windows and the row's weights of the squared gradient of a window's loss.

    windows (n, seqlen) token ids, of which each rank takes its share; `store` takes what a streamed model's gradients
    need (lib/gradients.py), and `cached(key, measure)` gives `measure()` or what it was before. The diagonal of the
    empirical Fisher information averaged over rows (Kronecker-factored pruning, as in the LLM Surgeon, van der Ouderaa
    et al., ICLR 2024, arXiv 2312.17244, keeps more of it).
    """
    found: dict[str, Tensor] = {}

    def add(matrix: Matrix, gradient: Tensor) -> None:
        if matrix.name not in found:
            found[matrix.name] = gradient.new_zeros(matrix.shape[0], dtype=torch.float32)
        found[matrix.name] += gradient.float().square().mean(1) / len(windows)

    def measure() -> dict[str, list[float]]:
        for_each_gradient(model, windows, add, store=store)
        for matrix in model.matrices:  # an expert may have had no token
            ranks.all_reduce(found.setdefault(matrix.name, torch.zeros(matrix.shape[0], device=model.device)))
        return {matrix.name: found[matrix.name].tolist() for matrix in model.matrices}

    return {name: torch.tensor(rows) for name, rows in cached("fisher", measure).items()}


def row_weights(fisher: Mapping[str, Tensor], power: float) -> dict[str, Tensor]:
    """matrix name -> (out,) what each output's error is multiplied with: (F_i / mean F)^(power / 2).

    A matrix that no loss depends on (an expert without a token) weighs all its outputs alike.
    """
    return {
        name: (f / f.mean()).clamp(min=MIN_FISHER).pow(power / 2) if f.any() else torch.ones_like(f)
        for name, f in fisher.items()
    }
