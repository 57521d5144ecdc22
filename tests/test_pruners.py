"""Pruners against references written from their papers in float64, with another algebra where there is one."""

import numpy as np
import pytest
import torch

from lib import PRUNERS, Pattern, RunError
from lib.masks import lowest_of_rows
from lib.pruners import damping
from lib.stats import InputStats


def correlated_inputs(tokens: int, size: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, size)) @ rng.standard_normal((size, size)) / np.sqrt(size)
    return torch.tensor(x * rng.uniform(0.2, 3, size), dtype=torch.float32)


def stats_of(x: torch.Tensor, needs: str = "gram") -> InputStats:
    stats = InputStats(needs)
    for part in x.split(100):
        stats.add(part)
    stats.finish()
    return stats


def prune(name: str, weight: torch.Tensor, x: torch.Tensor, sparsity: float, pattern: Pattern = Pattern()):  # noqa: B008
    pruner = PRUNERS[name]
    stats = None if pruner.needs == "nothing" else stats_of(x, pruner.needs)
    return pruner.prune(weight, stats, sparsity, pattern)


def reference_sparsegpt(weight: torch.Tensor, x: torch.Tensor, sparsity: float, group: int, zeros=None) -> np.ndarray:
    """Optimal brain surgeon, column by column, each with the plain inverse of what remains of the Hessian."""
    w, x = weight.double().numpy().copy(), x.double().numpy()
    hessian = 2 * x.T @ x / len(x)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(len(hessian))]
    mask = np.zeros_like(w, dtype=bool)
    for j in range(w.shape[1]):
        if j % group == 0:
            end = min(j + group, w.shape[1])
            score = w[:, j:end] ** 2 / np.array([inverses[k][0, 0] for k in range(j, end)])
            if zeros is None:
                count = round(sparsity * w.shape[0] * end) - mask.sum()
                chosen = np.argsort(score, axis=None, kind="stable")[:count]
                mask[:, j:end].flat = np.isin(np.arange(score.size), chosen)
            else:
                order = np.argsort(score, axis=1, kind="stable")[:, :zeros]
                np.put_along_axis(mask[:, j:end], order, True, axis=1)
        error = np.where(mask[:, j], w[:, j], 0) / inverses[j][0, 0]
        w[:, j:] -= np.outer(error, inverses[j][0])
        w[mask[:, j], j] = 0
    return w


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("size", [96, 200, 300])
def test_sparsegpt_unstructured(size, sparsity):
    weight, x = torch.randn(24, size, generator=torch.Generator().manual_seed(1)), correlated_inputs(900, size)
    found, expected = (
        prune("sparsegpt", weight, x, sparsity).double().numpy(),
        reference_sparsegpt(weight, x, sparsity, 128),
    )
    # float32 may swap two weights of nearly equal score, which changes what compensates for them
    assert ((found == 0) != (expected == 0)).mean() < 0.002
    same = ((found == 0) == (expected == 0)).all(1)
    assert same.mean() > 0.7
    np.testing.assert_allclose(found[same], expected[same], rtol=2e-3, atol=2e-3)
    assert (found == 0).sum() == round(sparsity * weight.numel())


@pytest.mark.parametrize(("zeros", "group"), [(2, 4), (4, 8), (5, 8)])
def test_sparsegpt_n_of_m(zeros, group):
    weight, x = torch.randn(24, 160, generator=torch.Generator().manual_seed(1)), correlated_inputs(900, 160)
    found = prune("sparsegpt", weight, x, zeros / group, Pattern(group)).double().numpy()
    expected = reference_sparsegpt(weight, x, 0, group, zeros)
    same = ((found == 0) == (expected == 0)).all(1)
    assert same.mean() > 0.7
    np.testing.assert_allclose(found[same], expected[same], rtol=2e-3, atol=2e-3)
    assert ((found.reshape(-1, group) == 0).sum(1) == zeros).all()


def test_sparsegpt_dead_inputs_go_and_change_nothing_else():
    weight, x = torch.randn(16, 40, generator=torch.Generator().manual_seed(1)), correlated_inputs(500, 40)
    x[:, [3, 17]] = 0
    found = prune("sparsegpt", weight, x, 0.5).double().numpy()
    assert (found[:, [3, 17]] == 0).all()
    expected = reference_sparsegpt(weight, x, 0.5, 128)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_sparsegpt_retries_are_noted_and_bounded():
    x = correlated_inputs(50, 8)
    stats = stats_of(x)
    stats.gram -= 0.05 * stats.gram.diagonal().mean() * torch.eye(8)  # no longer positive definite
    smallest = float(torch.linalg.eigvalsh(stats.gram.double())[0] / stats.gram.diagonal().mean())
    assert -0.1 < smallest < -0.01  # the first damping cannot do, the second can
    weight = torch.randn(4, 8)
    assert PRUNERS["sparsegpt"].prune(weight, stats, 0.5, Pattern()).isfinite().all()
    assert len(stats.events) == 1
    hopeless = stats_of(x)
    hopeless.gram.neg_()
    with pytest.raises(RunError, match=r"Cholesky factorisation .* fails"):
        PRUNERS["sparsegpt"].prune(weight, hopeless, 0.5, Pattern())
    assert len(hopeless.events) == damping.RETRIES + 1


def test_the_factor_is_computed_once_for_all_readers(monkeypatch):
    stats, calls = stats_of(correlated_inputs(300, 32)), []
    cholesky = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda *a, **k: (calls.append(1), cholesky(*a, **k))[1])
    for _ in range(3):
        PRUNERS["sparsegpt"].prune(torch.randn(8, 32), stats, 0.5, Pattern())
    assert len(calls) == 1


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_wanda(sparsity):
    weight, x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)), correlated_inputs(500, 64)
    found = prune("wanda", weight, x, sparsity)
    score = np.abs(weight.double().numpy()) * np.linalg.norm(x.double().numpy(), axis=0)
    expected = weight.numpy().copy()
    for i, row in enumerate(score):
        expected[i, np.argsort(row, kind="stable")[: int(64 * sparsity)]] = 0
    np.testing.assert_array_equal(found.numpy(), expected)


def test_wanda_by_hand():
    weight = torch.tensor([[1.0, -2, 3, -4], [4.0, 3, 2, 1]])
    x = torch.diag(torch.tensor([10.0, 4, 2, 1]))  # norms 10, 4, 2, 1: scores 10 8 6 4 and 40 12 4 1
    assert prune("wanda", weight, x, 0.5).tolist() == [[1, -2, 0, 0], [4, 3, 0, 0]]
    assert prune("magnitude", weight, x, 0.5).tolist() == [[0, 0, 3, -4], [4, 3, 0, 0]]
    assert prune("magnitude", weight, x, 0.5, Pattern(4)).tolist() == [[0, 0, 3, -4], [4, 3, 0, 0]]


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
def test_wanda_variant_is_the_published_bisection(sparsity):
    weight, x = torch.randn(30, 50, generator=torch.Generator().manual_seed(1)), correlated_inputs(500, 50)
    variant = PRUNERS["wanda"].variant
    found = variant.prune(weight, stats_of(x, "diagonal"), sparsity, Pattern()) == 0
    score = np.abs(weight.double().numpy()) * np.linalg.norm(x.double().numpy(), axis=0)
    order = np.argsort(score, axis=1)
    share = np.take_along_axis(score, order, 1).cumsum(1) / score.sum(1, keepdims=True)
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (share <= middle).mean() < sparsity else (low, middle)
    expected = np.zeros_like(score, dtype=bool)
    np.put_along_axis(expected, order, share <= high, axis=1)
    assert (found.numpy() == expected).all()
    assert int(found.sum()) == round(sparsity * weight.numel())
    assert len(set(found.sum(1).tolist())) > 1  # the rows differ, which is the point


def test_the_better_pruner_leaves_the_smaller_error():
    weight, x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)), correlated_inputs(2000, 128)
    error = {name: float((x @ (prune(name, weight, x, 0.6) - weight).T).norm()) for name in PRUNERS}
    assert error["sparsegpt"] < 0.97 * error["wanda"] < error["magnitude"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRUNERS)
def test_dtype_stays_and_the_argument_is_untouched(name, dtype):
    weight, x = torch.randn(16, 32).to(dtype), correlated_inputs(200, 32)
    before = weight.clone()
    found = prune(name, weight, x, 0.5)
    assert found.dtype == dtype
    assert torch.equal(weight, before)
    if name not in ("sparsegpt", "alps"):  # which also change the weights that stay
        assert torch.equal(found[found != 0], weight[found != 0])


def test_rows_of_a_ragged_target_stay_within_one_weight():
    counts = lowest_of_rows(torch.rand(10, 7), 0.5).sum(1)
    assert int(counts.max() - counts.min()) <= 1


# ---------------------------------------------------------------- RIA


@pytest.mark.parametrize("sparsity", [0.25, 0.6])
def test_ria_by_its_formula(sparsity):
    x, weight = correlated_inputs(80, 12), torch.randn(5, 12)
    w, norms = weight.double().abs().numpy(), np.linalg.norm(x.double().numpy(), axis=0)
    score = np.empty_like(w)
    for i in range(5):
        for j in range(12):
            score[i, j] = (w[i, j] / w[:, j].sum() + w[i, j] / w[i].sum()) * norms[j] ** 0.5
    pruned = prune("ria", weight, x, sparsity)
    per_row = int(12 * sparsity)
    for i in range(5):
        gone = {*np.argsort(score[i])[:per_row]}
        assert gone <= {*np.flatnonzero(pruned[i].numpy() == 0)}
    assert int((pruned == 0).sum()) == round(sparsity * 60)


def test_ria_survives_rows_and_columns_of_zeros():
    x, weight = correlated_inputs(80, 12), torch.randn(5, 12)
    weight[2], weight[:, 3] = 0, 0
    assert prune("ria", weight, x, 0.5).isfinite().all()


# ---------------------------------------------------------------- ALPS


def layer_error(pruned: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float((x.double() @ (pruned - weight).double().T).square().sum())


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(group=4)])
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_alps_has_a_smaller_layer_error_than_sparsegpt_and_wanda(sparsity, pattern):
    x, weight = correlated_inputs(400, 64), torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    error = {name: layer_error(prune(name, weight, x, sparsity, pattern), weight, x) for name in PRUNERS}
    assert error["alps"] < 0.97 * error["sparsegpt"] < error["wanda"]
    pruned = prune("alps", weight, x, sparsity, pattern)
    assert int((pruned == 0).sum()) == round(sparsity * weight.numel())
    if pattern.group:
        assert ((pruned.reshape(-1, 4) == 0).sum(1) == 4 * sparsity).all()


def test_refinement_reaches_least_squares_on_the_support():
    """Against the normal equations of each row, solved in float64."""
    from lib.pruners.alps import normalise, refine

    x, weight = correlated_inputs(300, 10), torch.randn(6, 10)
    kept = torch.rand(6, 10) > 0.5
    scale, gram, _, _ = normalise(stats_of(x))
    dense = weight * scale
    found = refine(dense * kept, dense, gram, kept)  # ten steps for at most ten unknowns a row
    for i in range(6):
        s = kept[i].numpy()
        g, target = gram.double().numpy(), (dense @ gram)[i].double().numpy()
        assert found[i].numpy()[s] == pytest.approx(np.linalg.solve(g[np.ix_(s, s)], target[s]), rel=1e-3, abs=1e-3)
        assert (found[i].numpy()[~s] == 0).all()
