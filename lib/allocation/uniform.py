"""The same sparsity everywhere."""

from .base import Problem, allocation


@allocation("uniform")
def uniform(problem: Problem) -> dict[str, float]:
    """s_k = S."""
    return dict.fromkeys(problem.sizes, problem.sparsity)
