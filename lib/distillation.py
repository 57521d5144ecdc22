"""Recovery of the whole model: what pruning has left is trained towards the dense model's distribution and the text.

The loss is the Kullback-Leibler divergence to the dense model's distribution mixed with the token that follows
(knowledge distillation, Hinton et al. 2015), of which the likeliest tokens are told apart and the rest is one.
"""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ranks
from .blockwise import last_hidden_states
from .evaluate import logits_in_parts
from .gradients import gradient_checkpointing
from .model import LanguageModel
from .precision import choose_autocast, mixed_precision
from .progress import progress
from .training import Recipe, train

log = logging.getLogger(__name__)

TOP_K = 32  # probabilities of a token that are told apart
NONE = -1  # in place of a token
MIN_LOG_PROB = -100.0  # of a log-probability: of one that is 0 there is no product with 0
AT_ONCE = 2**21  # logits whose divergence is computed together: in float32 they stay in a CPU's caches

# The best of three learning rates on held-out windows, of one model (docs/log.md).
RECIPE = Recipe(epochs=1, windows=2, learning_rate=3e-3, min_lr_ratio=0.1, warmup_steps=8)


@dataclass(frozen=True)
class Targets:
    """What should follow each token of this rank's windows, on the host.

    windows    (n, S) token ids
    ids        (n, S, TOP_K) int32, the tokens that the dense model takes to be the likeliest to follow each; the one
               that does is among them where it has a share
    log_probs  (n, S, TOP_K + 1) float32, their log-probabilities in nats, and last that of all others together
    """

    windows: Tensor
    ids: Tensor
    log_probs: Tensor


@torch.no_grad()
def dense_targets(
    model: LanguageModel, windows: Tensor, label_share: float | Tensor = 0.0, *, batch_size: int = 1
) -> Targets:
    """The targets of windows (n, S), of which each rank takes its share; of a model that is not pruned yet.

    A target is the model's distribution times 1 - label_share, and label_share, of all windows or of each (n,), for the
    token that follows. Towards such a mixture the divergence is, but for a constant, the two losses in these shares.
    The last token of a window, which none follows, has the model's distribution alone. Windows that have labels alone
    are not passed through the model; their last tokens have no target.

    A model in float32 is passed in bfloat16 where the processor multiplies in it, as it is in training: that moves its
    distribution by less than a thousandth of a nat (docs/log.md).
    """
    shard, found = ranks.shard(windows), []
    shares = ranks.shard(torch.as_tensor(label_share, dtype=torch.float32).expand(len(windows)))
    asked = shares < 1
    if not asked.any():
        return Targets(shard, *_labels(shard, 1))
    passes = nullcontext
    if model.model.dtype == torch.float32:
        mixed = partial(mixed_precision, torch.float32, model.device.type)
        passes, _ = choose_autocast(mixed, lambda: model.forward_logits(windows[:1]))
    batches = zip(last_hidden_states(model, shard[asked], batch_size), shares[asked].split(batch_size), strict=True)
    with passes(), progress(None, "dense model", "window", total=int(asked.sum())) as bar:
        for (tokens, hidden), share in batches:
            following, parts = _following(tokens), []
            for logits in logits_in_parts(model, hidden):
                here, following = following.tensor_split([logits.shape[1]], dim=1)
                parts.append(_mixed(logits, here.to(logits.device), share.to(logits.device)))
            found += zip(*(torch.cat(kind, dim=1).cpu() for kind in zip(*parts, strict=True)), strict=True)
            bar.update(len(tokens))
    labels = zip(*_labels(shard[~asked], found[0][0].shape[-1]), strict=True)
    mixtures = iter(found)
    targets = [next(mixtures if of_model else labels) for of_model in asked.tolist()]
    return Targets(shard, *(torch.stack(kind) for kind in zip(*targets, strict=True)))


def _following(tokens: Tensor) -> Tensor:
    """Of each token (n, S) the one that follows, NONE where none does."""
    return F.pad(tokens[:, 1:], (0, 1), value=NONE)


def _labels(windows: Tensor, told_apart: int) -> tuple[Tensor, Tensor]:
    """Targets' ids and log-probabilities that are the labels alone, beside so many tokens; no target where none
    follows.
    """
    label = _following(windows)[..., None]
    ids = torch.arange(told_apart).repeat(*windows.shape, 1)  # whatever they are: they have no share
    ids[..., -1:] = torch.where(label >= told_apart, label, ids[..., -1:])
    log_probs = torch.full((*windows.shape, told_apart + 1), MIN_LOG_PROB)
    log_probs[..., :-1].masked_fill_(ids == label, 0.0)
    return ids.int(), log_probs


def _mixed(logits: Tensor, following: Tensor, label_share: Tensor) -> tuple[Tensor, Tensor]:
    """The targets' ids and log-probabilities, of logits (b, n, vocabulary), the tokens (b, n) that follow, NONE where
    none does, and their windows' shares (b,).
    """
    ids, label = logits.topk(min(TOP_K, logits.shape[-1] - 1)).indices, following[..., None]
    share = label_share[:, None, None] * (label != NONE)
    unlikely = (share > 0) & (ids != label).all(-1, keepdim=True)
    ids[..., -1:] = torch.where(unlikely, label, ids[..., -1:])
    probabilities = log_probabilities(logits, ids).exp() * (1 - share)
    probabilities[..., :-1] += share * (ids == label)
    return ids.int(), probabilities.log().clamp(min=MIN_LOG_PROB)


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """Of logits (..., vocabulary) the log-probabilities of the tokens `ids` (..., K) and of all others together;
    (..., K + 1), float32.
    """
    told_apart, total = _grouped(logits.float(), ids)
    return (told_apart - total).clamp(min=MIN_LOG_PROB)


def _grouped(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of `ids` and, last, of all others as one (..., K + 1); and of all tokens as one (..., 1)."""
    rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    told_apart = torch.cat([logits.gather(-1, ids), rest], dim=-1)
    return told_apart, told_apart.logsumexp(-1, keepdim=True)


class Divergence(torch.autograd.Function):
    """The divergence, in nats, summed over N tokens, from targets (N, K + 1) of logits (N, vocabulary), of which the
    tokens `ids` (N, K) are told apart.

    The same as F.kl_div of log_probabilities, and its gradient, with what is as large as the logits computed a few
    tokens at a time: p_i - q_i for a token that is told apart, p_j (1 - q / p) for the others, with p and q the
    probabilities of these others together. Nothing where all that is wanted is MIN_LOG_PROB: there is no target.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor, wanted: Tensor) -> Tensor:
        found, totals = zip(*(_grouped(part.float(), ids[at]) for at, part in _few(logits)), strict=True)
        told_apart, total = torch.cat(found), torch.cat(totals)
        ctx.save_for_backward(logits, ids, wanted, total, told_apart)
        return F.kl_div((told_apart - total).clamp(min=MIN_LOG_PROB), wanted, reduction="sum", log_target=True)

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, wanted, total, told_apart = ctx.saved_tensors
        rest = told_apart[:, -1:]
        scale = scale * (wanted > MIN_LOG_PROB).any(-1, keepdim=True)
        # Where p underflows its tokens have none of the gradient: no product of 0 with infinity.
        others = 1 - (wanted[:, -1:] + (total - rest).clamp(max=80)).exp()
        own = (told_apart - total)[:, :-1].exp() - wanted[:, :-1].exp()
        gradient = torch.empty_like(logits)
        for at, part in _few(logits):
            of_part = (part.float() - total[at]).exp_().mul_(others[at])
            gradient[at] = of_part.scatter_(-1, ids[at], own[at]).mul_(scale[at])
        return gradient, None, None


def _few(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the rows, and where they are."""
    rows = max(1, AT_ONCE // logits.shape[-1])
    for begin in range(0, len(logits), rows):
        at = slice(begin, begin + rows)
        yield at, logits[at]


def distil(model: LanguageModel, targets: Targets, *, batch_size: int = 1) -> list[float]:
    """Train the surviving weights of all matrices towards the targets; the mean divergence in nats a token of each
    epoch's steps.

    Passes are of `batch_size` windows at most; a GPU keeps of each block its input only, from which the pass back
    computes it again. What is held beside the model, and how ranks share the work, lib/training.py says.
    """
    batch_size = RECIPE.batch(batch_size)
    windows, ids, wanted = (kind.split(batch_size) for kind in (targets.windows, targets.ids, targets.log_probs))
    tokens = sum(ranks.all_gather(targets.windows.numel()))

    def loss(batch: int) -> Tensor:
        logits = model.forward_logits(windows[batch]).flatten(0, 1)
        told_apart = ids[batch].to(logits.device, torch.int64).flatten(0, 1)
        bar.update(len(windows[batch]))
        return Divergence.apply(logits, told_apart, wanted[batch].to(logits.device).flatten(0, 1))

    passes = RECIPE.epochs * len(targets.windows) + len(windows[0])  # the first on trial
    with gradient_checkpointing(model), progress(None, "recovery", "window", total=passes) as bar:
        trained = {matrix.stored for matrix in model.matrices}
        frozen = [parameter for parameter in model.model.parameters() if parameter not in trained]
        totals = train(model.matrices, len(targets.windows), batch_size, loss, RECIPE, frozen)
    means = [total / tokens for total in totals]
    log.info("divergence from the targets: %s nats a token", ", ".join(f"{mean:.4f}" for mean in means))
    return means
