"""Layer quality: every metric asked for of every matrix, from one decomposition each; and allocations' own scores."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from types import MappingProxyType

from torch import Tensor

from . import ranks
from .allocation import ALLOCATIONS
from .errors import RunError
from .esd import DegenerateSpectrumError, Fit, Spectrum, cores_for_blas, published_precision
from .metrics import METRICS
from .model import LanguageModel, Matrix
from .precision import exact_matmul
from .progress import progress
from .results.cache import MetricCache
from .sequential import walk
from .stats import NEEDS

log = logging.getLogger(__name__)

DRAWN = "alpha_peak"  # the fit in the pictures of a metric that is no power law's exponent


def layer_quality(
    model: LanguageModel,
    *metrics: str,
    cache: MetricCache | None = None,
    options: Mapping[str, object] = MappingProxyType({}),
    esds: dict[str, dict] | None = None,
    events: list[dict] | None = None,
) -> dict[str, dict[str, float]]:
    """metric -> matrix name, in module order -> score.

    A matrix for which a metric is undefined (zero, rank one ...) gets the mean of the others of its block, or of all
    where there are none; this is appended to `events`. What `cache` holds is not computed again, and it grows as the
    work goes on. `options` are values of metrics' parameters that are not the defaults. `esds`, where given, is
    filled with what the pictures show of each spectrum (`esd_summary`).
    Raises RunError where no matrix has a score, and with the matrix's name for NaN or infinity.
    """
    entries = {name: METRICS[name].entry(name, options) for name in (*metrics, DRAWN)}
    wanted = {entries[name]: (METRICS[name].version, METRICS[name].at(options).score) for name in metrics}
    drawn = next((name for name in metrics if METRICS[name].fit), DRAWN)
    picture, fit = f"{entries[drawn]}.esd", METRICS[drawn].at(options).fit
    if esds is not None:
        wanted[picture] = (METRICS[drawn].version, lambda spectrum: esd_summary(spectrum, drawn, fit))
    found = measure(model, wanted, cache)
    if esds is not None:
        esds.update({name: value for name, value in found[picture].items() if isinstance(value, dict)})
    return {name: _complete(model, name, found[entries[name]], [] if events is None else events) for name in metrics}


def esd_summary(spectrum: Spectrum, metric: str, fit: Callable[[Spectrum], Fit]) -> dict:
    """What a picture shows of a spectrum: its histogram over log10(lam), and the power law `fit` behind `metric`.

    `tail` is the share of the eigenvalues at and above lam_min.
    """
    low, high, counts = spectrum.histogram
    law = fit(spectrum)
    tail = float((spectrum.eigenvalues >= law.lam_min).double().mean())
    return {
        "metric": metric, "alpha": law.alpha, "lam_min": law.lam_min, "ks": law.ks, "tail": tail,
        "low": low, "high": high, "counts": [int(count) for count in counts],
    }  # fmt: skip


def measure(
    model: LanguageModel, wanted: dict[str, tuple[int, Callable]], cache: MetricCache | None
) -> dict[str, dict[str, object]]:
    """entry -> matrix name -> what its function, in {entry: (version, function of a Spectrum)}, says of the matrix;
    where that is undefined, the reason as a string.
    """
    found = ranks.from_main(
        lambda: {entry: cache.read(entry, version) if cache else {} for entry, (version, _) in wanted.items()}
    )
    missing = {m.name for m in model.matrices if any(m.name not in values for values in found.values())}
    groups = [group for group in model.groups() if any(matrix.name in missing for matrix in group)]
    with progress(None, " ".join(wanted), "matrix", total=len(missing)) as bar:
        try:
            for group in _rounds(groups):
                values = {}
                with model.resident(group) if group else contextlib.nullcontext():
                    for matrix in group:
                        entries = [entry for entry in wanted if matrix.name not in found[entry]]
                        if entries:
                            bar.set_postfix_str(matrix.name, refresh=False)
                            with cores_for_blas(matrix.shape):
                                spectrum = Spectrum(published_precision(matrix.weight))
                                values[matrix.name] = {e: _say(e, wanted[e][1], spectrum, matrix.name) for e in entries}
                for measured in ranks.all_gather(values):
                    for name, of_matrix in measured.items():
                        for entry, value in of_matrix.items():
                            found[entry][name] = value
                        if cache and ranks.is_main():
                            cache.add(name, of_matrix)
                    bar.update(len(measured))
        finally:  # of an interrupted analysis nothing is lost
            if cache:
                cache.write()
    return found


def _rounds(groups: list[list[Matrix]]) -> Iterator[list[Matrix]]:
    """This rank's group of each round; within a round all ranks have about as much to do.

    In the last round a rank may have none (an empty list). One process takes the groups in module order.
    """
    if ranks.world_size() > 1:
        groups = sorted(groups, key=lambda group: -sum(_cost(matrix) for matrix in group))
    for begin in range(0, len(groups), ranks.world_size()):
        index = begin + ranks.rank()
        yield groups[index] if index < len(groups) else []


def _cost(matrix: Matrix) -> float:
    """Operations of a decomposition: n^2 m + 4/3 n^3."""
    small, large = sorted(matrix.shape)
    return small**2 * (large + 4 / 3 * small)


def _say(entry: str, function: Callable, spectrum: Spectrum, name: str) -> object:
    try:
        found = function(spectrum)
    except DegenerateSpectrumError as error:
        return str(error)
    except ValueError as error:
        raise RunError(f"{name}: {error}") from error
    if not isinstance(found, dict) and not (isinstance(found, Real) and math.isfinite(found)):
        raise RunError(f"--WW_metric {entry}: gives {found!r} for {name}, which is no finite number")
    return found


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


@exact_matmul()
def allocation_scores(
    model: LanguageModel,
    names: Iterable[str],
    windows: Tensor | None,
    options: Mapping[str, float],
    mapping: str,
    **walking,
) -> dict[str, tuple[dict[str, object], dict[int, object]]]:
    """allocation -> what its own `score` says of each matrix and, for its granularity `mapping`, of each block.

    All from one pass of the one loop over blocks, without pruning; `walking` are the further arguments of
    `sequential.walk`.
    """
    allocations = {name: ALLOCATIONS[name] for name in names}
    found: dict[str, tuple[dict, dict]] = {name: ({}, {}) for name in allocations}
    needs = max((allocation.needs for allocation in allocations.values()), key=NEEDS.index)
    for step in walk(model, windows, needs, **walking):
        read = [(matrix.weight, step.stats.get(matrix.name)) for matrix in step.matrices]
        for name, allocation in allocations.items():
            own, whole = found[name]
            by_block = allocation.reads_mapping and mapping != "layer_wise"
            if by_block and read:
                whole[step.block] = allocation.score(read, options)
            for matrix, one in zip(step.matrices, read, strict=True):
                alone = not by_block or mapping == "mixed"
                own[matrix.name] = allocation.score([one], options) if alone else whole[step.block]
    return found
