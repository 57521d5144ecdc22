"""The calibration set of a run, its held-out windows and those of recovery."""

from dataclasses import dataclass, replace

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
    own          (n, S): recovery trains on these as well, which the dense model has written
    """

    calibration: Tensor | None = None
    held_out: Tensor | None = None
    recovery: Tensor | None = None
    own: Tensor | None = None

    def of_targets(self, label_share: float) -> tuple[Tensor, Tensor]:
        """All windows that recovery of the whole model trains on, and each one's share of labels (lib/distillation.py).

        Text that is sampled from the dense model's distribution has nothing to tell beside it.
        """
        own = self.recovery[:0] if self.own is None else self.own
        shares = torch.cat([torch.full((len(self.recovery),), label_share), torch.zeros(len(own))])
        return torch.cat([self.recovery, own]), shares


def corpus_windows(config: RunConfig, tokenizer, seqlen: int) -> Windows:
    """Windows cut from --calib_data; none where the model is to sample them."""
    if not config.calibrated or config.writes_own_text:
        return Windows()
    found = calibration_windows(
        config.calib_data, tokenizer, nsamples=config.nsamples, seqlen=seqlen, seed=config.seed,
        held_out=config.held_out, further=config.further, add_bos=config.add_bos, cache_dir=config.cache_dir,
    )  # fmt: skip
    return _parts(config, found)


def with_own_text(config: RunConfig, windows: Windows, model: LanguageModel, seqlen: int) -> Windows:
    """The windows with what the dense model writes: all (--calib_data self), some beside (--recover_self) or none."""
    if not config.samples_text:
        return windows
    if not config.writes_own_text:
        return replace(windows, own=_sampled(config, model, seqlen, config.recover_self))
    return _parts(config, _sampled(config, model, seqlen, config.nsamples + config.held_out + config.further))


def _sampled(config: RunConfig, model: LanguageModel, seqlen: int, count: int) -> Tensor:
    """The first windows that the dense model writes, cached from run to run."""
    settings = {
        "digest": model.digest, "seed": config.seed, "seqlen": seqlen, "add_bos": config.add_bos,
        "device": model.device.type, "dtype": str(model.model.dtype),
    }  # fmt: skip
    known = results.load_own_text(config, settings)
    if known is None or len(known) < count:
        known = own_text(model, count, seqlen=seqlen, seed=config.seed, add_bos=config.add_bos, known=known)
        results.save_own_text(config, settings, known)
    return known[:count]


def _parts(config: RunConfig, found: Tensor) -> Windows:
    calibration, rest = found[: config.nsamples], found[config.nsamples :]
    ranks.check_enough(f"--nsamples {config.nsamples}", trial_windows(calibration) if config.held_out else calibration)
    return Windows(calibration, rest[: config.held_out], torch.cat([calibration, rest[config.held_out :]]))
