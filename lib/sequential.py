"""The one loop over blocks: collect, hand over, propagate (METHODS: Wanda, SparseGPT, sequentially)."""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ranks
from .activations import Store
from .errors import RunError
from .masks import Pattern
from .model import LanguageModel, Matrix
from .precision import exact_products
from .progress import progress
from .pruners import PRUNERS, Pruner
from .pruners.asymmetry import aim
from .pruners.damping import one_kind_of_failure
from .recovery import recover
from .stats import InputStats
from .stopwatch import Stopwatch
from .stream import Beside, Stream

log = logging.getLogger(__name__)


@exact_products()
def prune_model(
    model: LanguageModel,
    pruner: Pruner,
    targets: dict[str, float],
    pattern: Pattern,
    windows: Tensor | None = None,
    *,
    batch_size: int = 1,
    clock: Stopwatch | None = None,
    events: list[dict] | None = None,
    store: Store | None = None,
    done: int = 0,
    commit: Callable[[int, dict[str, InputStats], list[dict]], None] | None = None,
    asymmetry: float = 0.0,
    recovery: bool = False,
    row_weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Prune every matrix in place to its target, block by block, on the stream of the blocks already pruned.

    windows (nsamples, seqlen) token ids, of which each rank takes its share; not read by a pruner that needs nothing
    of its input. What is zero already stays zero and counts towards the target. Retries, fallbacks and matrices with
    more zeros than their targets are appended to `events`. The first `done` blocks are pruned already and only
    run through; `commit(block, statistics, events)` is called when one more is. With `asymmetry` every matrix is first
    aimed at that part of the way to the dense model's output (lib/pruners/asymmetry.py); with `recovery` the weights
    that every block has left are trained towards the dense block's output (lib/recovery.py). row_weights, by matrix
    name (out,), multiply each output's error in what the pruner minimises (lib/fisher.py). Raises RunError with the
    matrix's name for NaN or infinity.
    """
    clock, events = clock or Stopwatch(), [] if events is None else events
    asked = any(targets.values())
    needs = pruner.needs if asked else "nothing"
    if recovery and needs == "nothing" and asked:
        needs = "diagonal"
    steps = walk(
        model, windows, needs, batch_size=batch_size, clock=clock, store=store, done=done,
        cross=asymmetry > 0, dense=recovery or asymmetry > 0,
    )  # fmt: skip
    of_block: dict[str, InputStats] = {}
    found: list[dict] = []
    for step in steps:
        block, matrices, stats = step.block, step.matrices, step.stats
        share = sum(targets[m.name] * m.size for m in matrices) / max(1, sum(m.size for m in matrices))
        log.info("block %d of %d: pruning %d matrices to %.4f", block + 1, len(model.blocks), len(matrices), share)
        with clock("prune"):
            owners = _owners(matrices, stats)
            for matrix, owner in zip(matrices, owners, strict=True):
                if owner == ranks.rank() and asked:
                    rows = row_weights[matrix.name] if row_weights else None
                    target, of_input = targets[matrix.name], stats.get(matrix.name)
                    _prune_matrix(matrix, pruner, of_input, target, pattern, asymmetry, rows, found)
            for matrix, owner in zip(matrices, owners, strict=True):
                matrix.write(ranks.send_around(matrix.weight, owner))
        of_block |= stats
        if not step.last:
            continue
        if recovery and step.dense is not None:
            with clock("recover"):
                trained = model.matrices_of(block)
                weights = {matrix.stored for matrix in trained}
                others = [parameter for parameter in model.blocks[block].parameters() if parameter not in weights]
                recover(trained, functools.partial(step.stream.output, block), step.dense.hidden, others)
        found = [event for events_of_rank in ranks.gather(found) for event in events_of_rank]
        events += found
        if commit is not None:
            with clock("commit"):
                commit(block, of_block, found)
        of_block, found = {}, []


def _owners(matrices: list[Matrix], stats: dict[str, InputStats]) -> list[int]:
    """The rank that prunes each matrix; those that share statistics stay together, and so does what is derived."""
    shared = [id(stats.get(matrix.name, matrix)) for matrix in matrices]
    costs: dict[int, float] = {}
    for matrix, key in zip(matrices, shared, strict=True):
        costs[key] = costs.get(key, 0.0) + matrix.size * matrix.shape[1]
    owner = dict(zip(costs, ranks.deal(list(costs.values())), strict=True))
    return [owner[key] for key in shared]


def _prune_matrix(
    matrix: Matrix,
    pruner: Pruner,
    stats: InputStats | None,
    target: float,
    pattern: Pattern,
    asymmetry: float,
    rows: Tensor | None,
    events: list[dict],
) -> None:
    def note(message: str) -> None:
        log.warning("%s: %s", matrix.name, message)
        events.append({"matrix": matrix.name, "message": message})

    weight = matrix.weight
    pattern = pattern.on(weight)
    forced = pattern.forced(target)
    if forced > round(target * matrix.size):
        share = forced / matrix.size
        note(f"zeros that are there already make it {share:.4f} sparse, more than its target of {target:.4f}")
    if target == 0:
        return
    largest = 1.0 if stats is None else float(stats.sum_squares.max())
    if not math.isfinite(largest):
        raise _not_finite(matrix, "its calibration input holds", "the model as pruned so far yields them")
    if pruner.needs != "nothing" and (stats is None or largest == 0):
        note(f"{'saw no calibration token' if stats is None else 'its input is always zero'}; pruned by magnitude")
        pruner, stats, rows = PRUNERS["magnitude"], None, None
    try:
        with one_kind_of_failure():
            if asymmetry and stats is not None:
                weight = aim(weight, stats, asymmetry)
            if rows is None:
                weight = pruner.prune(weight, stats, target, pattern)
            else:
                rows = rows.to(weight.device)[:, None]
                weight = (pruner.prune(weight.float() * rows, stats, target, pattern) / rows).to(weight.dtype)
    except RunError as error:
        raise RunError(f"{matrix.name}: {error}") from error
    except torch.linalg.LinAlgError as error:
        advice = "give more calibration data (--nsamples) or prune with wanda"
        raise RunError(f"{matrix.name}: {str(error).splitlines()[0]}; {advice}") from error
    finally:
        while stats is not None and stats.events:
            note(stats.events.pop(0))
    if not weight.isfinite().all():
        raise _not_finite(matrix, "after pruning it holds", "prune with wanda, which changes no weight that stays")
    matrix.write(weight)


def _not_finite(matrix: Matrix, what: str, otherwise: str) -> RunError:
    """The error of NaN or infinity: float16 is short of range, and of another type there is `otherwise` to say."""
    advice = "try --dtype float32 or bfloat16" if matrix.weight.dtype == torch.float16 else otherwise
    return RunError(f"{matrix.name}: {what} NaN or infinity; {advice}")


@dataclass
class Step:
    """The turn of one block, or of one stage of it: it is resident, and these matrices may be changed.

    stats   of their inputs, by name; a matrix that saw no token on any rank has none
    last    whether this is all of the block that is left
    stream  the calibration windows, about to enter the block; None where no token is run
    dense   the same windows in the dense model, just past the block; None where nobody asked
    """

    block: int
    matrices: list[Matrix]
    stats: dict[str, InputStats]
    last: bool = True
    stream: Stream | None = None
    dense: Stream | None = None


def walk(
    model: LanguageModel,
    windows: Tensor | None,
    needs: str,
    *,
    batch_size: int = 1,
    clock: Stopwatch | None = None,
    store: Store | None = None,
    done: int = 0,
    dense: bool = False,
    cross: bool = False,
) -> Iterator[Step]:
    """Yield a step for each block from `done` to the last; what one changes, the next one's inputs come from.

    The blocks before `done` are run through as they are. With needs "nothing" no token is run. With `dense` the
    windows also go through the unchanged blocks, and with `cross` the statistics hold how the two belong together; a
    block then comes in stages, each with the inputs that the stages before have left it.
    """
    clock = clock or Stopwatch()
    stream = beside = None
    if needs != "nothing":
        with clock("calibrate"):
            stream = Stream(model, ranks.mine(windows), batch_size, store)
            beside = stream.copy() if dense else None
    with progress(range(0 if stream else done, len(model.blocks)), "blocks", "block") as bar:
        for block in bar:
            if block < done and beside is not None:
                with model.resident_block(block, original=True), clock("calibrate"), clock("dense"):
                    beside.advance(block)
            with model.resident_block(block):
                if block >= done:
                    if beside is not None and not cross:
                        with clock("calibrate"), clock("dense"):
                            beside.advance(block)
                    matrices = model.matrices_of(block)
                    twin = Beside(beside, block) if cross and stream else None
                    stages = stream.stages(block, matrices) if twin else [matrices]
                    for index, stage in enumerate(stages):
                        last, stats = index == len(stages) - 1, {}
                        if twin is not None and last:
                            twin.advances, twin.writer = True, stream.writer(block, stage)
                        if stream is not None:
                            bar.set_description("statistics")
                            with clock("calibrate"), clock("statistics"):
                                found = stream.collect(block, stage, needs, twin)
                                stats = _over_ranks(found, stage, needs, cross)
                        bar.set_description("pruning")
                        yield Step(block, stage, stats, last, stream, beside)
                if stream is not None and block + 1 < len(model.blocks):
                    bar.set_description("propagation")
                    with clock("calibrate"), clock("propagation"):
                        stream.advance(block)


def _over_ranks(stats: dict[str, InputStats], matrices: list[Matrix], needs: str, cross: bool) -> dict[str, InputStats]:
    """The statistics summed over the ranks, each of which saw its own windows."""
    if ranks.size() == 1:
        return stats
    readers: dict[int, list[str]] = {}
    for matrix in matrices:
        if matrix.name in stats:
            readers.setdefault(id(stats[matrix.name]), []).append(matrix.name)
    # An expert may have seen tokens on some ranks only; what is read together is the same on all that saw any.
    together = {tuple(names): None for each in ranks.gather([*readers.values()]) for names in each}
    matrix_of = {matrix.name: matrix for matrix in matrices}
    summed = {}
    for names in together:
        matrix = matrix_of[names[0]]
        one = stats.get(names[0]) or InputStats.empty(needs, matrix.shape[1], matrix.weight.device, cross)
        one.add_up(ranks.add_up)
        summed |= dict.fromkeys(names, one)
    return summed
