"""What an output of a matrix matters to the loss: the empirical Fisher information of the weights that make it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from . import ranks
from .gradients import visit_gradients
from .model import LanguageModel, Matrix

LEAST = 1e-6  # of the mean: what an output is taken to matter at least


def row_fisher(model: LanguageModel, windows: Tensor) -> dict[str, Tensor]:
    """matrix name -> (out,) mean over the windows and the row's weights of the squared gradient of a window's loss.

    windows (n, seqlen) token ids, of which each rank takes its share. The diagonal of the empirical Fisher information
    averaged over rows (Kronecker-factored pruning, as in the LLM Surgeon, van der Ouderaa et al., ICLR 2024,
    arXiv 2312.17244, keeps more of it).
    """
    found = {m.name: torch.zeros(m.shape[0], device=m.weight.device) for m in model.matrices}

    def add(matrix: Matrix, gradient: Tensor) -> None:
        found[matrix.name] += gradient.float().square().mean(1) / len(windows)

    visit_gradients(model, windows, add)
    for fisher in found.values():
        ranks.add_up(fisher)
    return found


def row_weights(fisher: Mapping[str, Tensor], power: float) -> dict[str, Tensor]:
    """matrix name -> (out,) what each output's error is multiplied with: (F_i / mean F)^(power / 2).

    A matrix that no loss depends on (an expert without a token) weighs all its outputs alike.
    """
    return {
        name: (f / f.mean()).clamp(min=LEAST).pow(power / 2) if f.any() else torch.ones_like(f)
        for name, f in fisher.items()
    }
