"""Spectra and fits against loops written straight from their definitions, known laws and WeightWatcher."""

import contextlib
import math

import numpy as np
import pytest
import torch
from shared import needs_model
from tiny import tiny_model

from lib import LanguageModel, RunError, esd, find_source, layer_quality, load_model
from lib.esd import DegenerateSpectrumError, Spectrum, published_precision
from lib.metrics import METRICS


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
        assert METRICS[name].at({}).score(spectrum) == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_pareto_gives_back_its_exponent(alpha):
    rng = np.random.default_rng(0)
    values = (1 - rng.random(20000)) ** (-1 / (alpha - 1))  # density ~ x^-alpha on x >= 1
    spectrum = Spectrum.from_eigenvalues(torch.tensor(values))
    assert float(spectrum.hill[0]) == pytest.approx(alpha, rel=0.02)
    assert METRICS["alpha"].score(spectrum) == pytest.approx(alpha, rel=0.05)
    assert spectrum.best_fit(torch.arange(100)).ks < 0.02


def test_gaussian_spectrum_ends_at_the_marchenko_pastur_edge():
    weight = torch.randn(400, 800, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Spectrum(weight).eigenvalues
    assert float(found[-1]) == pytest.approx((math.sqrt(800) + math.sqrt(400)) ** 2, rel=0.03)
    assert float(found[0]) == pytest.approx((math.sqrt(800) - math.sqrt(400)) ** 2, rel=0.1)


def test_early_rejection_loses_no_candidate():
    """best_fit against every distance, on spectra of many shapes, also with ties and with a constant part."""
    rng = np.random.default_rng(0)
    for trial in range(40):
        values = rng.pareto(1 + trial % 4, 50 + 37 * trial) + 0.01
        if trial % 3 == 0:
            values = np.round(values, 1) + 0.1
        spectrum = Spectrum.from_eigenvalues(torch.tensor(values))
        starts = spectrum.starts()
        starts = starts[spectrum.hill[starts].isfinite() & (spectrum.hill[starts] > 1)]
        distances = spectrum.ks_distances(starts)
        fit = spectrum.best_fit(spectrum.starts())
        assert fit.ks == pytest.approx(float(distances.min()), rel=1e-9)
        assert fit.lam_min == spectrum.eigenvalues[starts[int(distances.argmin())]]


@pytest.fixture(scope="module")
def real_matrices(embedded):
    """Square, wide and tall matrices of the embedded model, as the metrics read them; of 288 eigenvalues at most, for
    WeightWatcher's fits take seconds beyond.
    """
    model = load_model(find_source(str(embedded)), device="cpu")
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
    matrices = [m for m in model.matrices if m.block == 17 and m.name.endswith(kinds)]
    parts = [m.weight[:, :288] if m.shape[0] > m.shape[1] else m.weight[:288] for m in matrices]
    parts[0] = parts[0][:, :288]
    return [published_precision(part).float().clone() for part in parts]


@pytest.fixture(scope="module")
def watched(real_matrices):
    """WeightWatcher's own table of them."""
    import weightwatcher

    layers = torch.nn.Sequential(*(torch.nn.Linear(*w.shape[::-1], bias=False) for w in real_matrices))
    for layer, weight in zip(layers, real_matrices, strict=True):
        layer.weight.data = weight
    np.random.seed(0)
    return weightwatcher.WeightWatcher(model=layers).analyze(randomize=True)


@needs_model
@pytest.mark.parametrize(
    "name",
    [
        "alpha", "alpha_weighted", "entropy", "log_alpha_norm", "log_norm", "log_spectral_norm", "spectral_norm",
        "stable_rank",
    ],
)  # fmt: skip
def test_weightwatcher_agrees(name, real_matrices, watched):
    for weight, expected in zip(real_matrices, watched[name], strict=True):
        assert METRICS[name].at({}).score(Spectrum(weight)) == pytest.approx(expected, rel=1e-3)


@needs_model
def test_random_distance_is_weightwatchers(real_matrices, watched):
    """Another shuffle of the same weights: the distance is the same but for the draw."""
    for weight, expected in zip(real_matrices, watched["rand_distance"], strict=True):
        assert METRICS["random_distance"].score(Spectrum(weight)) == pytest.approx(expected, rel=0.03)


def test_mp_softrank_is_weightwatchers():
    import weightwatcher

    torch.manual_seed(0)
    layer = torch.nn.Linear(120, 90, bias=False)
    layer.weight.data = torch.randn(90, 120) + 0.3 * torch.randn(90, 1) @ torch.randn(1, 120)
    details = weightwatcher.WeightWatcher(model=torch.nn.Sequential(layer)).analyze(mp_fit=True)
    found = METRICS["mp_softrank"].score(Spectrum(layer.weight.data))
    assert found == pytest.approx(float(details["mp_softrank"].iloc[0]), rel=1e-3)
    assert 0 < found < 0.9


def test_randomised_metrics_are_seeded_and_leave_numpys_generator_alone():
    weight = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    np.random.seed(7)
    expected = np.random.random()
    np.random.seed(7)
    first = METRICS["random_distance"].score(Spectrum(weight))
    assert np.random.random() == expected
    assert METRICS["random_distance"].score(Spectrum(weight)) == first


@pytest.mark.parametrize("shape", [(30, 30), (30, 90), (64, 30)])
def test_farms_pools_sliding_square_windows(shape):
    weight = torch.distributions.StudentT(3.0).sample(shape)
    size = min(shape)
    pooled = []
    for length_r in range(0, shape[0] - size + 1):
        for length_c in range(0, shape[1] - size + 1):
            step_r, step_c = max(1, (shape[0] - size) // 14), max(1, (shape[1] - size) // 14)
            if length_r % step_r == 0 and length_c % step_c == 0 and max(length_r // step_r, length_c // step_c) < 15:
                window = weight[length_r : length_r + size, length_c : length_c + size].double().numpy()
                pooled.append(np.linalg.svd(window, compute_uv=False) ** 2)
    expected = naive_alpha_peak(np.concatenate(pooled))
    assert METRICS["farms"].score(Spectrum(weight)) == pytest.approx(expected, rel=1e-6)


def test_zero_eigenvalues_are_left_out():
    torch.manual_seed(0)
    weight = torch.randn(30, 50)
    padded = torch.zeros(45, 70)
    padded[:30, :50] = weight
    torch.testing.assert_close(Spectrum(padded).eigenvalues, Spectrum(weight).eigenvalues)
    for name in set(METRICS) - {"mp_softrank", "random_distance", "farms"}:  # these look at the shape as well
        padded_score, score = METRICS[name].at({}).score(Spectrum(padded)), METRICS[name].at({}).score(Spectrum(weight))
        assert padded_score == pytest.approx(score, rel=1e-9), name


DEGENERATE = {
    "zero": torch.zeros(8, 8),
    "rank one": torch.ones(8, 8),
    "constant": torch.full((6, 9), 0.25),
    "orthogonal": torch.eye(8),
    "row": torch.arange(1.0, 9.0)[None],
    "low rank": torch.arange(48.0).view(8, 6) @ torch.ones(6, 3) @ torch.arange(12.0).view(3, 4),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_a_degenerate_matrix_has_a_finite_value_or_a_named_error(name, kind):
    with contextlib.suppress(DegenerateSpectrumError):
        assert math.isfinite(METRICS[name].at({}).score(Spectrum(DEGENERATE[kind])))


@pytest.mark.parametrize("name", ["alpha_peak", "alpha_mid", "alpha_peak_window", "alpha", "alpha_weighted", "farms"])
@pytest.mark.parametrize("kind", ["zero", "rank one", "constant", "orthogonal"])
def test_no_power_law_without_a_tail(name, kind):
    with pytest.raises(DegenerateSpectrumError):
        METRICS[name].at({}).score(Spectrum(DEGENERATE[kind]))


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("stable_rank", "orthogonal", 8.0), ("entropy", "orthogonal", 1.0), ("stable_rank", "rank one", 1.0),
        ("spectral_norm", "row", 204.0), ("log_norm", "rank one", math.log10(64)), ("log_spectral_norm", "constant",
        math.log10(54 / 16)),
    ],
)  # fmt: skip
def test_values_worked_by_hand(name, kind, expected):
    assert METRICS[name].at({}).score(Spectrum(DEGENERATE[kind])) == pytest.approx(expected, rel=1e-9)


def test_signs_follow_what_noise_looks_like():
    """More noise-like, and so more to lose, has the larger signed score for every metric."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 300, generator=generator) / 20
    signal = torch.randn(200, 200, generator=generator) @ torch.diag(torch.arange(1.0, 201.0) ** -1.2)
    trained = noise + signal @ torch.randn(200, 300, generator=generator) / 4
    for name, metric in METRICS.items():
        if name in ("alpha_weighted", "log_alpha_norm"):  # products with a norm, which follows the scale
            continue
        assert metric.sign * metric.score(Spectrum(noise)) > metric.sign * metric.score(Spectrum(trained)), name


@pytest.mark.parametrize("up_to", [0, 2560])
def test_eigenvalues_that_do_not_converge_end_in_one_line_with_the_matrix(monkeypatch, up_to):
    def torch_fails(*_args, **_options):
        raise torch.linalg.LinAlgError("linalg.eigvalsh: failed to converge\nand more")

    def scipy_fails(*_args, **_options):
        raise np.linalg.LinAlgError("eigenvalues did not converge")

    monkeypatch.setattr(esd, "SCIPY_UP_TO", up_to)  # the rows up to which scipy's are taken, else torch's
    monkeypatch.setattr(torch.linalg, "eigvalsh", torch_fails)
    monkeypatch.setattr(esd, "eigvalsh", scipy_fails)
    model = LanguageModel(tiny_model("llama"))
    first = model.matrices[0].name
    with pytest.raises(RunError, match=rf"^{first}: no eigenvalues \(.*converge\); .*--device") as error:
        layer_quality(model, "alpha_peak")
    assert "\n" not in str(error.value)
