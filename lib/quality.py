"""The metric of every matrix, from the cache where it is there."""

import logging

from torch import Tensor

from .errors import RunError
from .esd import DegenerateSpectrumError, Spectrum
from .metrics import METRICS
from .model import LanguageModel
from .progress import progress

log = logging.getLogger(__name__)


def as_published(weight: Tensor) -> Tensor:
    """The weights as the published estimator reads them: in float16.

    The histogram behind alpha_peak is sensitive to the last bits (two bins of nearly equal count), so this is
    part of the metric's definition: it makes the published values reproduce, whatever --dtype is. Nothing is
    lost of a float16 checkpoint, nor of a bfloat16 one but what is below 6e-8. Weights beyond float16's range stay
    as they are.
    """
    half = weight.half()
    return half if half.isfinite().all() else weight


def layer_quality(model: LanguageModel, metric: str, *, events: list[dict] | None = None) -> dict[str, float]:
    """Score of each matrix under the metric `metric`, by name, in module order.

    A matrix without a spectrum to fit (zero, rank one ...) gets the mean of the others of its block, or of all
    where there are none; this is appended to `events`. Raises RunError where no matrix has a score.
    """
    score, scored, failed = METRICS[metric].score, {}, []
    with progress(model.matrices, metric, "matrix") as bar:
        for matrix in bar:
            bar.set_postfix_str(matrix.name, refresh=False)
            try:
                scored[matrix.name] = score(Spectrum(as_published(matrix.weight)))
            except DegenerateSpectrumError as error:
                failed.append((matrix, str(error)))
    if not scored:
        raise RunError(f"--WW_metric {metric}: is defined for no matrix of {model.name}: {failed[0][1]}")
    result = dict(scored)
    for matrix, reason in failed:
        peers = [scored[m.name] for m in model.matrices_of(matrix.block) if m.name in scored] or list(scored.values())
        message = f"{metric} is undefined ({reason}); scored as the mean of its block"
        log.warning("%s: %s", matrix.name, message)
        if events is not None:
            events.append({"matrix": matrix.name, "message": message})
        result[matrix.name] = sum(peers) / len(peers)
    return {matrix.name: result[matrix.name] for matrix in model.matrices}
