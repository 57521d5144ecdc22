"""Layer quality: every metric asked for of every matrix, from one decomposition each."""

import logging
from collections.abc import Callable

from .errors import RunError
from .esd import DegenerateSpectrumError, Spectrum, as_published
from .metrics import METRICS
from .model import LanguageModel
from .progress import progress
from .results.cache import MetricCache

log = logging.getLogger(__name__)

DRAWN = "alpha_peak"  # the fit in the pictures of a metric that is no power law's exponent


def layer_quality(
    model: LanguageModel,
    *metrics: str,
    cache: MetricCache | None = None,
    portraits: dict[str, dict] | None = None,
    events: list[dict] | None = None,
) -> dict[str, dict[str, float]]:
    """metric -> matrix name, in module order -> score.

    A matrix for which a metric is undefined (zero, rank one ...) gets the mean of the others of its block, or of all
    where there are none; this is appended to `events`. What `cache` holds is not computed again, and it grows as the
    work goes on. `portraits`, where given, is filled with what the pictures show of each spectrum (`portrait`).
    Raises RunError where no matrix has a score, and with the matrix's name for NaN or infinity.
    """
    wanted = {name: (METRICS[name].version, METRICS[name].score) for name in metrics}
    drawn = next((name for name in metrics if METRICS[name].fit), DRAWN)
    if portraits is not None:
        wanted[f"{drawn}.esd"] = (METRICS[drawn].version, lambda spectrum: portrait(spectrum, drawn))
    found = measure(model, wanted, cache)
    if portraits is not None:
        portraits.update({name: value for name, value in found[f"{drawn}.esd"].items() if isinstance(value, dict)})
    return {name: _complete(model, name, found[name], [] if events is None else events) for name in metrics}


def portrait(spectrum: Spectrum, metric: str) -> dict:
    """What a picture shows of a spectrum: its histogram over log10(lam), and the power law behind `metric`.

    `tail` is the share of the eigenvalues at and above lam_min.
    """
    low, high, counts = spectrum.histogram
    fit = METRICS[metric].fit(spectrum)
    tail = float((spectrum.eigenvalues >= fit.lam_min).double().mean())
    return {
        "metric": metric, "alpha": fit.alpha, "lam_min": fit.lam_min, "ks": fit.ks, "tail": tail,
        "low": low, "high": high, "counts": [int(count) for count in counts],
    }  # fmt: skip


def measure(
    model: LanguageModel, wanted: dict[str, tuple[int, Callable]], cache: MetricCache | None
) -> dict[str, dict[str, object]]:
    """entry -> matrix name -> what its function, in {entry: (version, function of a Spectrum)}, says of the matrix;
    where that is undefined, the reason as a string.
    """
    found = {entry: cache.read(entry, version) if cache else {} for entry, (version, _) in wanted.items()}
    with progress(None, " ".join(wanted), "matrix", total=len(model.matrices)) as bar:
        try:
            for group in model.groups():
                todo = {m: [entry for entry in wanted if m.name not in found[entry]] for m in group}
                bar.update(sum(not entries for entries in todo.values()))
                todo = {matrix: entries for matrix, entries in todo.items() if entries}
                with model.resident(list(todo)):
                    for matrix, entries in todo.items():
                        bar.set_postfix_str(matrix.name, refresh=False)
                        spectrum = Spectrum(as_published(matrix.weight))
                        values = {entry: _say(wanted[entry][1], spectrum, matrix.name) for entry in entries}
                        for entry, value in values.items():
                            found[entry][matrix.name] = value
                        if cache:
                            cache.add(matrix.name, values)
                        bar.update()
        finally:  # of an interrupted analysis nothing is lost
            if cache:
                cache.write()
    return found


def _say(function: Callable, spectrum: Spectrum, name: str) -> object:
    try:
        return function(spectrum)
    except DegenerateSpectrumError as error:
        return str(error)
    except ValueError as error:
        raise RunError(f"{name}: {error}") from error


def _complete(model: LanguageModel, metric: str, found: dict, events: list[dict]) -> dict[str, float]:
    """Every matrix's score, those that have none at their block's mean."""
    scored = {name: value for name, value in found.items() if not isinstance(value, str)}
    if not scored:
        reason = next(iter(found.values()))
        raise RunError(f"--WW_metric {metric}: is defined for no matrix of {model.name}: {reason}")
    result = {}
    for matrix in model.matrices:
        if matrix.name in scored:
            result[matrix.name] = scored[matrix.name]
            continue
        peers = [scored[m.name] for m in model.matrices_of(matrix.block) if m.name in scored] or list(scored.values())
        message = f"{metric} is undefined ({found[matrix.name]}); scored as the mean of its block"
        log.warning("%s: %s", matrix.name, message)
        events.append({"matrix": matrix.name, "message": message})
        result[matrix.name] = sum(peers) / len(peers)
    return result
