"""AlphaPruning's linear map from layer quality to sparsity (Lu et al. 2024, section 3.3, eq. 3)."""

from collections.abc import Mapping

from .base import Problem, allocation
from .budget import fit_budget


@allocation("ww", needs_scores=True)
def ww(problem: Problem) -> dict[str, float]:
    """r_k = 1 - eps + 2 eps (q_k - min q) / (max q - min q), scaled to the budget.

    block_wise  q is the mean score of the matrix's block
    layer_wise  q is the matrix's own score
    mixed       the block-wise sparsity is each block's budget, spread inside by the matrices' own scores
    """
    own, members = problem.scores, problem.members()
    if problem.mapping == "layer_wise":
        return linear_map(own, problem.sizes, problem.sparsity, problem.epsilon)
    mean = {block: sum(own[name] for name in names) / len(names) for block, names in members.items()}
    scores = {name: mean[block] for name, block in problem.blocks.items()}
    by_block = linear_map(scores, problem.sizes, problem.sparsity, problem.epsilon)
    if problem.mapping == "block_wise":
        return by_block
    result = {}
    for names in members.values():
        inside = {name: own[name] for name in names}
        result |= linear_map(inside, problem.sizes, by_block[names[0]], problem.epsilon)
    return result


def linear_map(
    scores: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, epsilon: float
) -> dict[str, float]:
    """Scores to sparsities between (1 - eps) and (1 + eps) times a common factor, mean `sparsity`."""
    low, high = min(scores.values()), max(scores.values())
    if high == low:
        return dict.fromkeys(scores, sparsity)
    ratios = {name: 1 - epsilon + 2 * epsilon * (score - low) / (high - low) for name, score in scores.items()}
    return fit_budget(ratios, sizes, sparsity)
