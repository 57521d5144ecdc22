"""Spectra and fits against loops written straight from their definitions, known laws and WeightWatcher."""

import math

import numpy as np
import pytest
import torch

from lib.esd import DegenerateSpectrumError, Spectrum
from lib.metrics import METRICS


def spectrum_of(eigenvalues) -> Spectrum:
    """A spectrum with given eigenvalues, which no matrix had to be made for."""
    spectrum = Spectrum(torch.empty(0, 0))
    spectrum.__dict__["eigenvalues"] = torch.as_tensor(np.sort(eigenvalues), dtype=torch.float64)
    return spectrum


def naive_fits(eigenvalues: np.ndarray) -> dict[int, tuple[float, float]]:
    """Tail start -> (alpha, KS), one candidate and one eigenvalue at a time."""
    lam, fits = np.sort(eigenvalues), {}
    for i in range(len(lam) - 1):
        tail = lam[i:]
        n = len(tail)
        alpha = 1 + n / sum(math.log(x / tail[0]) for x in tail)
        ks = max(abs(1 - (x / tail[0]) ** (1 - alpha) - j / n) for j, x in enumerate(tail))
        fits[i] = (alpha, ks)
    return fits


def naive_alpha_peak(eigenvalues: np.ndarray, lower=math.log10) -> float:
    lam, fits = np.sort(eigenvalues), naive_fits(eigenvalues)
    counts, edges = np.histogram(np.log10(lam), bins=100)
    x = 10 ** edges[counts.argmax()]
    inside = [i for i in fits if lower(0.95 * x) <= lam[i] <= 1.5 * x and fits[i][0] > 1]
    return fits[min(inside, key=lambda i: fits[i][1])][0]


@pytest.fixture(params=[(60, 60), (40, 100), (100, 40)], ids=["square", "wide", "tall"])
def matrix(request):
    rng = np.random.default_rng(0)
    return rng.standard_t(3, request.param)  # heavy-tailed entries


def test_eigenvalues_are_squared_singular_values(matrix):
    found = Spectrum(torch.tensor(matrix, dtype=torch.float32)).eigenvalues
    expected = np.linalg.svd(matrix.astype(np.float32).astype(np.float64), compute_uv=False)[::-1] ** 2
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_every_alpha_and_every_distance(matrix):
    spectrum = Spectrum(torch.tensor(matrix))
    fits = naive_fits(spectrum.eigenvalues.numpy())
    np.testing.assert_allclose(spectrum.hill[:-1], [fits[i][0] for i in fits], rtol=1e-9)
    distances = spectrum.ks_distances(torch.arange(len(fits)))
    np.testing.assert_allclose(distances, [fits[i][1] for i in fits], rtol=1e-6, atol=1e-9)


def test_metrics_against_the_naive_search(matrix):
    spectrum = Spectrum(torch.tensor(matrix))
    lam = spectrum.eigenvalues.numpy()
    fits = naive_fits(lam)
    expected = {
        "alpha_peak": naive_alpha_peak(lam),
        "alpha_peak_window": naive_alpha_peak(lam, lower=lambda x: x),
        "alpha_mid": fits[len(lam) // 2][0],
        "alpha": min(fits.values(), key=lambda fit: fit[1])[0],
    }
    for name, value in expected.items():
        assert METRICS[name].score(spectrum) == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_pareto_gives_back_its_exponent(alpha):
    rng = np.random.default_rng(0)
    spectrum = spectrum_of((1 - rng.random(20000)) ** (-1 / (alpha - 1)))  # density ~ x^-alpha on x >= 1
    assert float(spectrum.hill[0]) == pytest.approx(alpha, rel=0.02)
    assert METRICS["alpha"].score(spectrum) == pytest.approx(alpha, rel=0.05)
    assert spectrum.best_fit(torch.arange(100)).ks < 0.02


def test_gaussian_spectrum_ends_at_the_marchenko_pastur_edge():
    weight = torch.randn(400, 800, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Spectrum(weight).eigenvalues
    assert float(found[-1]) == pytest.approx((math.sqrt(800) + math.sqrt(400)) ** 2, rel=0.03)
    assert float(found[0]) == pytest.approx((math.sqrt(800) - math.sqrt(400)) ** 2, rel=0.1)


def test_weightwatcher_agrees_on_alpha():
    import weightwatcher

    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(120, 120, bias=False), torch.nn.Linear(120, 200, bias=False))
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.distributions.StudentT(2.5).sample(layer.weight.shape))
    details = weightwatcher.WeightWatcher(model=layers).analyze()
    for layer, expected in zip(layers, details["alpha"], strict=True):
        assert METRICS["alpha"].score(Spectrum(layer.weight)) == pytest.approx(expected, rel=1e-3)


def test_zero_eigenvalues_are_left_out():
    torch.manual_seed(0)
    weight = torch.randn(30, 50)
    padded = torch.zeros(45, 70)
    padded[:30, :50] = weight
    torch.testing.assert_close(Spectrum(padded).eigenvalues, Spectrum(weight).eigenvalues)
    for name in METRICS:
        padded_score, score = METRICS[name].score(Spectrum(padded)), METRICS[name].score(Spectrum(weight))
        assert padded_score == pytest.approx(score, rel=1e-9), name


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("kind", ["zero", "rank one", "orthogonal", "row"])
def test_a_matrix_without_a_tail_is_a_named_error(name, kind):
    weight = {
        "zero": torch.zeros(8, 8),
        "rank one": torch.ones(8, 8),
        "orthogonal": torch.eye(8),
        "row": torch.ones(1, 8),
    }[kind]
    with pytest.raises(DegenerateSpectrumError):
        METRICS[name].score(Spectrum(weight))
