"""Sparsities from scores: worked by hand, published reference points, and the exact budget as a property."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from shared import SHARED, needs_shared

from lib import Problem, RunError, allocate
from lib.allocation import ALLOCATIONS
from lib.allocation.activations import linear_reconstruction_error, median_score, outliers
from lib.allocation.base import MAPPINGS
from lib.allocation.budget import S_MAX, UnreachableError, fit_budget, round_to_pattern, shift_to_budget
from lib.allocation.fixed import lamp_quantiles
from lib.allocation.search import KAPPA
from lib.stats import InputStats


def problem(scores, sizes=None, sparsity=0.5, epsilon=0.2, mapping="block_wise", per_block=1) -> Problem:
    names = [f"m{i}" for i in range(len(scores))]
    sizes = sizes or [1] * len(scores)
    blocks = {name: i // per_block for i, name in enumerate(names)}
    return Problem(
        dict(zip(names, sizes, strict=True)), blocks, sparsity, dict(zip(names, scores, strict=True)), mapping,
        options={"epsilon": epsilon},
    )  # fmt: skip


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
    with pytest.raises(RunError, match="cannot be reached"):
        fit_budget(ratios, {"a": 1, "b": 1}, sparsity)


@pytest.mark.parametrize(
    ("method", "options", "advice"),
    [
        ("ww", {"epsilon": 1.0}, "ask for less, or for --epsilon closer to 0"),
        ("ramp", {"ramp_beta": 0.9}, "ask for less, or for --ramp_beta closer to 0"),
        ("ramp", {"ramp_beta": -0.9}, "ask for less, or for --ramp_beta closer to 0"),
    ],
)
def test_what_cannot_be_reached_names_the_allocations_own_flag(method, options, advice):
    case = dataclasses.replace(problem([0.0] * 8 + [1.0], sparsity=0.7), options=options)
    with pytest.raises(RunError) as error:
        allocate(method, case)
    assert str(error.value) == f"--sparsity_ratio 0.7: cannot be reached with every matrix between 0 and 0.99; {advice}"


def test_a_budget_inside_a_block_that_cannot_be_reached_names_the_whole_runs_ratio():
    case = problem([0.0, 1.0, 5.0, 6.0], sparsity=0.5, epsilon=1.0, mapping="mixed", per_block=2)
    with pytest.raises(RunError, match=r"^--sparsity_ratio 0.5: cannot be reached .* --epsilon"):
        allocate("ww", case)


@pytest.mark.parametrize("method", ALLOCATIONS)
def test_allocations_without_a_parameter_have_no_flag_to_name(method, monkeypatch):
    def solve(_problem):
        raise UnreachableError("cannot be reached")

    monkeypatch.setitem(ALLOCATIONS._entries, method, dataclasses.replace(ALLOCATIONS[method], solve=solve))
    with pytest.raises(RunError) as error:
        allocate(method, problem([0.0, 1.0]))
    flags = {
        "ww": "epsilon", "owl": "owl_lambda", "dlp": "dlp_alpha", "lsa": "lsa_alpha", "ramp": "ramp_beta",
        "search": "search_strength",
    }  # fmt: skip
    named = f", or for --{flags[method]} closer to 0" if method in flags else ""
    assert str(error.value) == f"--sparsity_ratio 0.5: cannot be reached; ask for less{named}"


def test_a_shift_meets_the_budget_by_hand():
    # keep = 0, 0.2, 0.6 with sizes 1, 1, 2 at S = 0.5: mean(keep) is 0.35.
    sizes = {"a": 1, "b": 1, "c": 2}
    assert list(shift_to_budget(0.5, {"a": 0, "b": 0.2, "c": 0.6}, sizes).values()) == pytest.approx([0.85, 0.65, 0.25])
    # keep = 0, 0, 1: with the shift of 1 that nothing held back would ask for, a and b would lose all; held at 0.99
    # they leave 0.02 for the two of c.
    assert list(shift_to_budget(0.5, {"a": 0, "b": 0, "c": 1}, sizes).values()) == pytest.approx([0.99, 0.99, 0.01])
    with pytest.raises(RunError, match="cannot be reached"):
        shift_to_budget(0.995, {"a": 0, "b": 0, "c": 0}, sizes)


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


def test_an_allocation_that_a_pattern_undoes_says_so():
    """1.6, 2.0 and 2.4 of 4 are 2 of 4 each."""
    events = []
    assert set(allocate("ww", problem([1, 2, 3]), 4, events=events).values()) == {0.5}
    assert [event["message"] for event in events] == [
        "all sparsities are the same in whole zeros of 4 weights: ww changes nothing"
    ]
    for method, scores, group in (("ww", [1, 2, 3], 8), ("ww", [1, 1, 1], 4), ("uniform", [1, 2, 3], 4)):
        allocate(method, problem(scores), group, events=(other := []))
        assert not other


def test_matrices_of_a_block_share_their_n():
    found = allocate("ww", problem([1, 2, 3, 4, 9, 9], per_block=2), 8)
    values = list(found.values())
    assert values[::2] == values[1::2]
    assert sum(values) / 6 == pytest.approx(0.5)


# ---------------------------------------------------------------- allocations beyond AlphaPruning

OPTIONS = {
    "epsilon": 0.2,
    "owl_lambda": 0.08,
    "owl_m": 5.0,
    "dlp_alpha": 0.15,
    "lsa_alpha": 0.15,
    "ramp_beta": 0.02,
    "search_strength": 1.0,
}


def with_options(case: Problem, **changes) -> Problem:
    return dataclasses.replace(case, options=OPTIONS, **changes)


def matrix_and_stats(out: int, into: int, seed: int) -> tuple[torch.Tensor, InputStats, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(out, into, generator=generator), torch.randn(50, into, generator=generator).exp()
    stats = InputStats("gram")
    stats.add(x)
    stats.finish()
    return weight, stats, x


def test_owl_by_hand():
    # keep is (0, 0.08, 0.16), its mean 0.08
    found = allocate("owl", with_options(problem([1, 2, 3], sparsity=0.7)))
    assert list(found.values()) == pytest.approx([0.78, 0.70, 0.62])


@pytest.mark.parametrize("method", ["dlp", "lsa"])
def test_dlp_and_lsa_by_hand(method):
    # importance 1 - (1, 2, 3) / 6, so the first keeps most: keep is (0.3, 0.15, 0), its mean 0.15
    found = allocate(method, with_options(problem([1, 2, 3], sparsity=0.7)))
    assert list(found.values()) == pytest.approx([0.55, 0.70, 0.85])


def test_own_block_scores_go_before_the_mean():
    case = with_options(problem([1, 9, 9, 1], sparsity=0.7, per_block=2), block_scores={0: 1.0, 1: 2.0})
    assert list(allocate("owl", case).values()) == pytest.approx([0.78, 0.78, 0.62, 0.62])


def test_ramp_by_hand():
    assert list(allocate("ramp", with_options(problem([0] * 4))).values()) == pytest.approx([0.47, 0.49, 0.51, 0.53])


def test_er_densities_follow_the_shapes():
    shapes = {"m0": (10, 10), "m1": (10, 40)}
    case = with_options(problem([0, 0], sizes=[100, 400], sparsity=0.7), shapes=shapes)
    found = allocate("er", case)
    density = {name: 1 - sparsity for name, sparsity in found.items()}
    assert density["m0"] / density["m1"] == pytest.approx((20 / 100) / (50 / 400))
    assert mean(found, case.sizes) == pytest.approx(0.7)


def test_outliers_and_medians_by_their_definition():
    matrices = [matrix_and_stats(6, 8, 0), matrix_and_stats(4, 12, 1)]
    pairs = [(weight, stats) for weight, stats, _ in matrices]
    scores = np.concatenate(
        [(w.double().abs().numpy() * np.linalg.norm(x.double().numpy(), axis=0)).ravel() for w, _, x in matrices]
    )
    assert outliers(pairs, {"owl_m": 2.0}) == pytest.approx(100 * (scores > 2 * scores.mean()).mean(), rel=1e-5)
    assert median_score(pairs, {}) == pytest.approx(np.sort(scores)[(len(scores) - 1) // 2], rel=1e-5)


def test_reconstruction_error_by_trying_every_next_weight():
    weight, stats, x = matrix_and_stats(3, 160, 2)  # a whole group of 128 columns and one of 32
    w, x, expected = weight.double().numpy(), x.double().numpy(), 0.0
    for begin, end in ((0, 128), (128, 160)):
        for row in w[:, begin:end]:
            part, gone = x[:, begin:end], []
            for _ in range((end - begin) // 2):
                left = [i for i in range(end - begin) if i not in gone]
                errors = [np.square(part[:, [*gone, i]] @ row[[*gone, i]]).sum() for i in left]
                gone.append(left[int(np.argmin(errors))])
            expected += np.square(part[:, gone] @ row[gone]).sum()
    assert linear_reconstruction_error(weight, stats.gram) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_lamp_is_one_threshold_on_all_scores(sparsity):
    weights = [torch.randn(20, 30) * scale for scale in (1.0, 0.2, 3.0)]
    every = []
    for weight in weights:
        squares = np.sort(weight.double().numpy().ravel() ** 2)
        every.append(squares / np.cumsum(squares[::-1])[::-1])
    threshold = np.quantile(np.concatenate(every), sparsity)
    case = with_options(problem([0] * 3, sizes=[600] * 3, sparsity=sparsity))
    case = dataclasses.replace(case, scores={f"m{i}": lamp_quantiles([(w, None)], {}) for i, w in enumerate(weights)})
    found = allocate("lamp", case)
    assert list(found.values()) == pytest.approx([(scores < threshold).mean() for scores in every], abs=0.01)
    assert mean(found, case.sizes) == pytest.approx(sparsity)


@pytest.mark.parametrize("method", [name for name in ALLOCATIONS if ALLOCATIONS[name].reads_mapping])
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_granularity_meets_the_budget(method, mapping):
    scores, sizes = [3.0, 1.0, 2.0, 5.0, 4.0, 6.0], [10, 20, 30, 10, 20, 30]
    case = with_options(problem(scores, sizes, 0.6, mapping=mapping, per_block=2))
    found = allocate(method, case)
    assert mean(found, case.sizes) == pytest.approx(0.6, abs=1e-9)
    # The names are of one kind, and so are the matrices to `search`, which knows blocks and kinds.
    assert len(set(found.values())) == (3 if mapping == "block_wise" or method == "search" else 6)


# ---------------------------------------------------------------- search


def measured(parts: list[float], mapping: str, sparsity: float = 0.6) -> Problem:
    """Two kinds, a small and a large one, in each of two blocks."""
    names, sizes = ["b.0.q", "b.0.d", "b.1.q", "b.1.d"], [10, 30, 10, 30]
    return Problem(
        dict(zip(names, sizes, strict=True)), dict(zip(names, (0, 0, 1, 1), strict=True)), sparsity,
        dict(zip(names, parts, strict=True)), mapping, options=OPTIONS,
    )  # fmt: skip


def test_search_equalises_the_marginal_losses():
    """With parts that are a product of block and kind, every m_k exp(KAPPA s_k) comes out the same."""
    worth = [2.0 * 1.0, 2.0 * 3.0, 1.0 * 1.0, 1.0 * 3.0]
    case = measured([w * size for w, size in zip(worth, (10, 30, 10, 30), strict=True)], "layer_wise")
    found = allocate("search", case)
    marginal = [w * math.exp(KAPPA * s) for w, s in zip(worth, found.values(), strict=True)]
    assert marginal == pytest.approx([marginal[0]] * 4)
    assert mean(found, case.sizes) == pytest.approx(0.6, abs=1e-9)
    blocks = allocate("search", dataclasses.replace(case, mapping="block_wise"))
    assert blocks["b.0.q"] == blocks["b.0.d"] == pytest.approx(blocks["b.1.q"] - math.log(2) / KAPPA)
    mixed = allocate("search", dataclasses.replace(case, mapping="mixed"))
    assert (10 * mixed["b.0.q"] + 30 * mixed["b.0.d"]) / 40 == pytest.approx(blocks["b.0.q"])
    assert mixed["b.0.q"] - mixed["b.0.d"] == pytest.approx(math.log(3) / KAPPA)


def test_search_of_strength_zero_is_uniform():
    case = measured([-1.0, 40.0, 1.0, 9.0], "layer_wise")
    none = dataclasses.replace(case, options={**OPTIONS, "search_strength": 0.0})
    assert list(allocate("search", none).values()) == pytest.approx([0.6] * 4)


def test_a_block_that_seems_worth_nothing_counts_as_a_fifth_of_the_median():
    found = allocate("search", measured([-1.0, -3.0, 10.0, 30.0], "block_wise"))
    median = (1.0 + -0.1) / 2
    assert found["b.0.q"] - found["b.1.q"] == pytest.approx(-math.log(0.2 * median) / KAPPA)
