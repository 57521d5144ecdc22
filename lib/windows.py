"""The calibration set of a run, its held-out windows and those of recovery."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ranks, results
from .config import RunConfig
from .data import calibration_windows
from .model import LanguageModel
from .own_text import own_text
from .trials import trial_windows


@dataclass(frozen=True)
class Windows:
    """What a run reads of them; None where it reads none.

    calibration  (nsamples, S): statistics are taken of them
    held_out     (n, S): what is to be chosen is chosen on them
    recovery     (n, S): recovery trains on them; the first are the calibration's, and none is held out
    """

    calibration: Tensor | None = None
    held_out: Tensor | None = None
    recovery: Tensor | None = None


def corpus_windows(config: RunConfig, tokenizer, seqlen: int) -> Windows:
    """Windows cut from --calib_data; none where the model is to sample them."""
    if not config.calibrated or config.writes_own_text:
        return Windows()
    found = calibration_windows(
        config.calib_data, tokenizer, nsamples=config.nsamples, seqlen=seqlen, seed=config.seed,
        held_out=config.held_out, further=config.further, add_bos=config.add_bos, cache_dir=config.cache_dir,
    )  # fmt: skip
    return _parts(config, found)


def sampled_windows(config: RunConfig, model: LanguageModel, seqlen: int) -> Windows:
    """Windows sampled from the dense model (--calib_data self), cached from run to run."""
    settings = {
        "digest": model.digest, "seed": config.seed, "seqlen": seqlen, "add_bos": config.add_bos,
        "device": model.device.type, "dtype": str(model.model.dtype),
    }  # fmt: skip
    count, known = config.nsamples + config.held_out + config.further, results.load_own_text(config, settings)
    if known is None or len(known) < count:
        known = own_text(model, count, seqlen=seqlen, seed=config.seed, add_bos=config.add_bos, known=known)
        results.save_own_text(config, settings, known)
    return _parts(config, known[:count])


def _parts(config: RunConfig, found: Tensor) -> Windows:
    calibration, rest = found[: config.nsamples], found[config.nsamples :]
    ranks.check_enough(f"--nsamples {config.nsamples}", trial_windows(calibration) if config.held_out else calibration)
    return Windows(calibration, rest[: config.held_out], torch.cat([calibration, rest[config.held_out :]]))
