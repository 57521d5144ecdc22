"""Sparsities from scores: worked by hand, published reference points, and the exact budget as a property."""

import itertools
import random

import numpy as np
import pytest
from shared import SHARED, needs_shared

from lib import Problem, RunError, allocate
from lib.allocation.budget import S_MAX, fit_budget, round_to_pattern


def problem(scores, sizes=None, sparsity=0.5, epsilon=0.2, mapping="block_wise", per_block=1) -> Problem:
    names = [f"m{i}" for i in range(len(scores))]
    sizes = sizes or [1] * len(scores)
    blocks = {name: i // per_block for i, name in enumerate(names)}
    return Problem(
        dict(zip(names, sizes, strict=True)), blocks, sparsity, dict(zip(names, scores, strict=True)), epsilon, mapping
    )


def mean(solution: dict[str, float], sizes: dict[str, int]) -> float:
    return sum(solution[name] * sizes[name] for name in sizes) / sum(sizes.values())


def test_by_hand():
    # ratios 0.8, 1.0, 1.2; their mean is 1
    assert list(allocate("ww", problem([1, 2, 3])).values()) == pytest.approx([0.4, 0.5, 0.6])
    # sizes 3, 1: ratios 0.8 and 1.2, mean 0.9, so s = 0.5 / 0.9 * r
    assert list(allocate("ww", problem([1, 2], sizes=[3, 1])).values()) == pytest.approx([0.4 / 0.9, 0.6 / 0.9])


def test_equal_scores_are_uniform():
    assert list(allocate("ww", problem([2, 2, 2])).values()) == [0.5] * 3
    assert list(allocate("uniform", problem([1, 2, 3])).values()) == [0.5] * 3


def test_mappings():
    scores = [1, 3, 4, 4]  # block means 2 and 4
    block = list(allocate("ww", problem(scores, per_block=2)).values())
    assert block == pytest.approx([0.4, 0.4, 0.6, 0.6])
    layer = list(allocate("ww", problem(scores, per_block=2, mapping="layer_wise")).values())
    ratios = np.array([0.8, 0.8 + 0.4 * 2 / 3, 1.2, 1.2])
    assert layer == pytest.approx(list(0.5 * ratios / ratios.mean()))
    mixed = list(allocate("ww", problem(scores, per_block=2, mapping="mixed")).values())
    assert mixed == pytest.approx([0.4 * 0.8, 0.4 * 1.2, 0.6, 0.6])


@needs_shared
@pytest.mark.parametrize(
    ("model", "width", "inner", "epsilon", "expected"),
    [
        ("llama2-7b-hf", 4096, 11008, 0.3, {0: 0.462, 20: 0.858}),
        ("llama-7b-hf", 4096, 11008, 0.2, {9: 0.568, 25: 0.852}),
    ],
)
def test_published_reference_points(model, width, inner, epsilon, expected):
    alphas = np.load(SHARED / "data" / "alpha_peak" / model / "alpha_peak.npy", allow_pickle=False)
    sizes = ([width * width] * 4 + [width * inner] * 3) * (len(alphas) // 7)
    found = allocate("ww", problem(alphas.tolist(), sizes, 0.7, epsilon, per_block=7))
    for block, value in expected.items():
        assert found[f"m{7 * block}"] == pytest.approx(value, abs=5e-4)


@needs_shared
@pytest.mark.parametrize("sparsity", [0.7, 0.8])
@pytest.mark.parametrize(("model", "epsilon"), [("llama-7b-hf", 0.3), ("llama-13b-hf", 0.5), ("llama2-70b-hf", 0.4)])
def test_where_the_published_code_passes_one_the_budget_still_holds(model, epsilon, sparsity):
    alphas = np.load(SHARED / "data" / "alpha_peak" / model / "alpha_peak.npy", allow_pickle=False)
    case = problem(alphas.tolist(), None, sparsity, epsilon, per_block=7)
    events: list[dict] = []
    found = allocate("ww", case, events=events)
    assert max(found.values()) <= S_MAX
    assert mean(found, case.sizes) == pytest.approx(sparsity, abs=1e-9)
    assert bool(events) == (max(found.values()) == S_MAX)


def test_budget_is_exact_and_proportional_where_it_is_free():
    rng = random.Random(0)
    for _ in range(300):
        names = [f"m{i}" for i in range(rng.randint(1, 12))]
        sizes = {name: rng.randint(1, 1000) for name in names}
        ratios = {name: rng.uniform(0.05, 2) for name in names}
        low, high, target = rng.uniform(0, 0.3), rng.uniform(0.7, 1), rng.uniform(0.3, 0.7)
        found = fit_budget(ratios, sizes, target, low, high)
        assert mean(found, sizes) == pytest.approx(target, abs=1e-9)
        assert all(low <= value <= high for value in found.values())
        free = {name: value / ratios[name] for name, value in found.items() if low < value < high}
        if free:
            scale = next(iter(free.values()))
            assert list(free.values()) == pytest.approx([scale] * len(free))
            for name, value in found.items():  # those at a bound would be outside at the common scale
                assert value != low or scale * ratios[name] <= low + 1e-9
                assert value != high or scale * ratios[name] >= high - 1e-9


def test_excess_goes_back_in_proportion_by_hand():
    # r = 1, 2, 3 with sizes 1 at S = 0.8: 0.4, 0.8, 1.2; the last is held at 0.99, and the 1.41 left
    # is shared 1 : 2.
    found = fit_budget({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 1, "c": 1}, 0.8)
    assert list(found.values()) == pytest.approx([0.47, 0.94, 0.99])


@pytest.mark.parametrize(("ratios", "sparsity"), [({"a": 0.0, "b": 1.0}, 0.6), ({"a": 1.0, "b": 1.0}, 0.995)])
def test_a_budget_that_cannot_be_reached_is_refused(ratios, sparsity):
    with pytest.raises(RunError, match="--sparsity_ratio"):
        fit_budget(ratios, {"a": 1, "b": 1}, sparsity)


def test_rounding_to_n_of_m_is_the_closest_for_equal_blocks():
    rng = random.Random(0)
    for _ in range(50):
        count, group = rng.randint(1, 5), rng.choice([4, 8])
        target = rng.uniform(0.2, 0.8)
        raw = {f"m{i}": rng.uniform(0.5, 1.5) for i in range(count)}
        sizes = dict.fromkeys(raw, 10)
        exact = fit_budget(raw, sizes, target)
        found = round_to_pattern(exact, sizes, [[name] for name in raw], target, group)
        assert all(value * group == int(value * group) <= group - 1 for value in found.values())
        if max(exact.values()) <= 1 - 1 / group:  # else what one cannot take goes to the others
            assert all(abs(found[name] - exact[name]) < 1 / group for name in raw)
        options = itertools.product(range(group), repeat=count)
        closest = min(abs(sum(zeros) / group / count - target) for zeros in options)
        assert abs(mean(found, sizes) - target) == pytest.approx(closest, abs=1e-9)


def test_mixed_n_of_m_by_hand():
    # 3.2, 4.0 and 4.8 of 8: whole parts 3, 4, 4 leave one for the largest remainder
    found = allocate("ww", problem([1, 2, 3]), 8)
    assert [value * 8 for value in found.values()] == [3, 4, 5]


def test_matrices_of_a_block_share_their_n():
    found = allocate("ww", problem([1, 2, 3, 4, 9, 9], per_block=2), 8)
    values = list(found.values())
    assert values[::2] == values[1::2]
    assert sum(values) / 6 == pytest.approx(0.5)
