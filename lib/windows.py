"""The calibration set of a run, its held-out windows and those of recovery."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ranks, results
from .config import RunConfig
from .data import calibration_windows
from .model import LanguageModel
from .sampling import sample_windows
from .trials import trial_windows


@dataclass(frozen=True)
class Windows:
    """What a run reads of them; None where it reads none.

    calibration  (n, S): statistics are taken of them
    held_out     (n, S): what is to be chosen is chosen on them
    recovery     (n, S): recovery trains on them; the first are the calibration's, and none is held out
    own          (n,) of these, whether the dense model has written it beside a corpus
    """

    calibration: Tensor | None = None
    held_out: Tensor | None = None
    recovery: Tensor | None = None
    own: Tensor | None = None

    def label_shares(self, share: float) -> Tensor:
        """Of each window of recovery, the share of labels in its targets (lib/distillation.py); (n,).

        Text that is sampled from the dense model's distribution has nothing to tell beside it.
        """
        return torch.where(self.own, 0.0, share)


def corpus_windows(config: RunConfig, tokenizer, seqlen: int) -> Windows:
    """Windows cut from --calib_data; none where the model is to sample them."""
    if not config.calibrated or config.samples_calibration:
        return Windows()
    found = calibration_windows(
        config.calib_data, tokenizer, nsamples=config.nsamples, seqlen=seqlen, seed=config.seed,
        held_out=config.held_out, recovery=config.recovery_windows, add_bos=config.add_bos, cache_dir=config.cache_dir,
    )  # fmt: skip
    return _parts(config, found)


def with_sampled_windows(config: RunConfig, windows: Windows, model: LanguageModel, seqlen: int) -> Windows:
    """The windows with what the dense model writes: all (--calib_data self), some beside (--calib_self, --recover_self)
    or none.
    """
    if not config.samples_text:
        return windows
    written = _sampled(config, model, seqlen)
    if config.samples_calibration:
        return _parts(config, written)
    calibration, held_out, beside = written.split(config.sampled_windows)
    mixed = _mixed(windows.calibration, calibration)
    own = _mixed(torch.zeros(config.nsamples, dtype=bool), torch.ones(len(calibration), dtype=bool))
    own_beside = torch.tensor([False] * config.recovery_windows + [True] * len(beside), dtype=bool)
    return Windows(
        calibration=mixed,
        held_out=_mixed(windows.held_out, held_out),
        recovery=torch.cat([mixed, windows.recovery[config.nsamples :], beside]),
        own=torch.cat([own, own_beside]),
    )


def _mixed(corpus: Tensor, own: Tensor) -> Tensor:
    """Both, evenly spread: what is taken of the front holds of both about the share that the whole does."""
    places = torch.cat([(torch.arange(len(part)) + 0.5) / len(part) for part in (corpus, own)])
    return torch.cat([corpus, own])[places.argsort(stable=True)]


def _sampled(config: RunConfig, model: LanguageModel, seqlen: int) -> Tensor:
    """The windows that the dense model writes, cached from run to run."""
    count = config.windows_written
    settings = {
        "digest": model.digest, "seed": config.seed, "seqlen": seqlen, "add_bos": config.add_bos,
        "device": model.device.type, "dtype": str(model.model.dtype), "drawn": "by inversion",
    }  # fmt: skip
    known = results.load_sampled_windows(config, settings)
    if known is None or len(known) < count:
        known = sample_windows(model, count, seqlen=seqlen, seed=config.seed, add_bos=config.add_bos, known=known)
        results.save_sampled_windows(config, settings, known)
    return known[:count]


def _parts(config: RunConfig, found: Tensor) -> Windows:
    calibration, held_out, beside = found.split([config.nsamples, config.held_out, config.recovery_windows])
    recovery = torch.cat([calibration, beside])
    every = torch.empty(config.nsamples + config.sampled_windows[0], 0)  # with what the dense model is still to write
    least = trial_windows(every, config.stands_in) if config.held_out else every
    ranks.check_enough(f"--nsamples {config.nsamples}", least)
    return Windows(calibration, held_out, recovery, torch.zeros(len(recovery), dtype=bool))
