"""The exact budget: sparsities whose parameter-weighted mean is the target, by a factor or by a shift."""

from collections.abc import Mapping, Sequence

from ..errors import RunError

# No matrix is ever removed whole: the published mapping, unbounded, exceeds 1 for LLaMA-7B at S = 0.8.
S_MIN, S_MAX = 0.0, 0.99


class UnreachableError(RunError):
    """A mean sparsity that the bounds do not allow; `allocate` adds which flags to change."""


def fit_budget(
    ratios: Mapping[str, float],
    sizes: Mapping[str, int],
    sparsity: float,
    s_min: float = S_MIN,
    s_max: float = S_MAX,
) -> dict[str, float]:
    """s_k = clip(c * r_k, s_min, s_max) with the one c that makes sum(n_k s_k) / sum(n_k) = S, to 1e-9.

    Where nothing clamps this is r_k * S * sum(n) / sum(n_k r_k), the published mapping. What clamping
    takes from some is put back on the others in proportion to r_k n_k, until none is outside.
    Raises UnreachableError where no c reaches S.
    """
    fixed: dict[str, float] = {}
    budget = sparsity * sum(sizes[name] for name in ratios)
    while True:
        free = [name for name in ratios if name not in fixed]  # in order: sums must not depend on a set's
        left = budget - sum(fixed[name] * sizes[name] for name in fixed)
        weight = sum(ratios[name] * sizes[name] for name in free)
        scale = left / weight if weight > 0 else 0.0
        over = [name for name in free if ratios[name] * scale > s_max]
        under = [name for name in free if ratios[name] * scale < s_min]
        if not over and not under:
            break
        # Fix the side that is further out first: fixing both at once could pass the solution.
        excess = sum((ratios[name] * scale - s_max) * sizes[name] for name in over)
        lack = sum((s_min - ratios[name] * scale) * sizes[name] for name in under)
        bound, names = (s_max, over) if excess >= lack else (s_min, under)
        fixed |= dict.fromkeys(names, bound)
    result = {name: fixed[name] if name in fixed else ratios[name] * scale for name in ratios}
    return _reaching(sparsity, result, sizes, s_min, s_max)


def shift_to_budget(sparsity: float, keep: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """clip(c - keep, S_MIN, S_MAX) with the c at which their mean, weighted by `sizes`, is `sparsity`, by bisection.

    Where nothing is clipped that is S + mean(keep) - keep: the larger `keep`, the less is removed. Raises
    UnreachableError where no c reaches S.
    """

    def at(c: float) -> dict[str, float]:
        return {name: min(S_MAX, max(S_MIN, c - kept)) for name, kept in keep.items()}

    total = sum(sizes[name] for name in keep)
    low, high = min(keep.values()), S_MAX + max(keep.values())
    for _ in range(100):
        middle = (low + high) / 2
        removed = sum(share * sizes[name] for name, share in at(middle).items())
        low, high = (middle, high) if removed < sparsity * total else (low, middle)
    return _reaching(sparsity, at(high), sizes, S_MIN, S_MAX)


def _reaching(
    sparsity: float, found: dict[str, float], sizes: Mapping[str, int], s_min: float, s_max: float
) -> dict[str, float]:
    """What was found, unless its mean is not the sparsity."""
    total = sum(sizes[name] for name in found)
    if abs(sum(share * sizes[name] for name, share in found.items()) - sparsity * total) > 1e-9 * total:
        raise UnreachableError(f"cannot be reached with every matrix between {s_min:g} and {s_max:g}")
    return found


def round_to_pattern(
    sparsities: Mapping[str, float],
    sizes: Mapping[str, int],
    units: Sequence[Sequence[str]],
    target: float,
    group: int,
) -> dict[str, float]:
    """Each unit (matrices that share one N) gets a whole number of zeros per `group` weights.

    A unit starts at the whole number below its own mean sparsity. Then, as long as that brings the
    parameter-weighted mean closer to `target`, the unit that is furthest below its own takes one more. None
    passes the bounds S_MIN and S_MAX. Returns multiples of 1/group.
    """
    weights = [sum(sizes[name] for name in unit) for unit in units]
    exact = [
        group * sum(sparsities[name] * sizes[name] for name in unit) / weight
        for unit, weight in zip(units, weights, strict=True)
    ]
    highest = int(S_MAX * group)
    zeros = [min(int(value + 1e-9), highest) for value in exact]
    missing = group * target * sum(weights) - sum(z * w for z, w in zip(zeros, weights, strict=True))
    while True:
        closer = [i for i, w in enumerate(weights) if zeros[i] < highest and abs(missing - w) < abs(missing)]
        if not closer:
            break
        i = max(closer, key=lambda i: exact[i] - zeros[i])
        zeros[i] += 1
        missing -= weights[i]
    return {name: zeros[i] / group for i, unit in enumerate(units) for name in unit}


def exact_multiples(sparsities: Mapping[str, float], group: int) -> dict[str, float]:
    """Multiples of 1/group that stay what they are. Raises RunError for a sparsity that is none."""
    zeros = {name: round(sparsity * group) for name, sparsity in sparsities.items()}
    for name, sparsity in sparsities.items():
        if abs(zeros[name] / group - sparsity) > 1e-6:
            raise RunError(
                f"--sparsity_type: {name} is to have the sparsity {sparsity:g}, which is no multiple of 1/{group}"
            )
    return {name: count / group for name, count in zeros.items()}
