"""AlphaPruning's linear map from layer quality to sparsity (Lu et al. 2024, section 3.3, eq. 3)."""

from collections.abc import Mapping

from ..options import Option, multiples
from .base import Problem, allocation, by_mapping
from .budget import fit_budget

EPSILON = Option(
    "epsilon", 0.2, "parameter of *_ww: blocks' pruning ratios run from 1 - epsilon to 1 + epsilon, then scaled "
    "to the budget, in [0, 1]; or auto: chosen by the loss on windows held out", within=(0, 1), auto=multiples(0.2),
    label="eps",
)  # fmt: skip


@allocation("ww", needs_scores=True, options=(EPSILON,), reads_mapping=True)
def ww(problem: Problem) -> dict[str, float]:
    """r_k = 1 - eps + 2 eps (q_k - min q) / (max q - min q), scaled to the budget."""

    epsilon = problem.options["epsilon"]

    def sparsities(scores: Mapping[str, float], sparsity: float) -> dict[str, float]:
        low, high = min(scores.values()), max(scores.values())
        ratios = {name: 1 - epsilon + 2 * epsilon * (score - low) / (high - low) for name, score in scores.items()}
        return fit_budget(ratios, problem.sizes, sparsity)

    return by_mapping(problem, sparsities)
