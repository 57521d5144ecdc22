"""Sequential pruning: of each block collect the inputs' statistics, prune its matrices, propagate, and so on."""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ranks
from .activations import Store
from .blockwise import BlockwisePass, DenseReference
from .errors import RunError, linalg_errors
from .masks import Pattern
from .model import LanguageModel, Matrix
from .precision import exact_matmul
from .progress import progress
from .pruners import PRUNERS, Pruner
from .pruners.asymmetry import asymmetric_weights
from .recovery import RECIPE, recover
from .stats import InputStats
from .stopwatch import Stopwatch
from .storage import round_to_save_dtypes

log = logging.getLogger(__name__)


@exact_matmul()
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
    commit: Callable[[int, dict[str, dict], list[dict]], None] | None = None,
    asymmetry: float = 0.0,
    recovery: bool = False,
    stats_windows: int | None = None,
    row_weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Prune every matrix in place to its target, block by block, on what the blocks already pruned give.

    windows (nsamples, seqlen) token ids, of which each rank takes its share; not read by a pruner that needs nothing
    of its input. What is zero already stays zero and counts towards the target. Retries, fallbacks and matrices with
    more zeros than their targets are appended to `events`. The first `done` blocks are pruned already and only
    run through; `commit(block, statistics, events)` is called when one more is. With `asymmetry` every matrix is first
    aimed at that part of the way to the dense model's output (lib/pruners/asymmetry.py); with `recovery` the weights
    that every block has left are trained towards the dense block's output (lib/recovery.py), on all of the windows,
    while statistics are of the first `stats_windows` only. row_weights, by matrix name (out,), multiply each output's
    error in what the pruner minimises (lib/fisher.py). Raises RunError with the matrix's name for NaN or infinity.
    """
    clock, events = clock or Stopwatch(), [] if events is None else events
    prunes = any(targets.values())
    needs = pruner.needs if prunes else "nothing"
    if recovery and prunes:
        needs = "diagonal" if needs == "nothing" else needs
        batch_size = RECIPE.batch(batch_size, stats_windows or 0)
    steps = walk(
        model, windows, needs, batch_size=batch_size, clock=clock, store=store, done=done,
        cross=asymmetry > 0, dense=recovery or asymmetry > 0, stats_windows=stats_windows,
    )  # fmt: skip
    seen: dict[str, dict] = {}  # of the block, what a commit records of its statistics
    found: list[dict] = []
    for step in steps:
        block, matrices, stats = step.block, step.matrices, step.stats
        share = sum(targets[m.name] * m.size for m in matrices) / max(1, sum(m.size for m in matrices))
        log.info("block %d of %d: pruning %d matrices to %.4f", block + 1, len(model.blocks), len(matrices), share)
        with clock("prune"):
            owners = _owners(matrices, stats)
            for matrix, owner in zip(matrices, owners, strict=True):
                if owner == ranks.rank() and prunes:
                    rows = row_weights[matrix.name] if row_weights else None
                    _prune_matrix(
                        matrix, pruner, stats.get(matrix.name), targets[matrix.name], pattern, asymmetry, rows, found,
                        step.no_stats.get(matrix.name),
                    )  # fmt: skip
            for matrix, owner in zip(matrices, owners, strict=True):
                matrix.write(ranks.broadcast(matrix.weight, owner))
        if commit is not None:
            seen |= {name: one.summary() for name, one in stats.items()}
        stats.clear()  # they may be gigabytes, and the next are about to be gathered
        if not step.last:
            continue
        if recovery and step.dense is not None and (whole := model.matrices_of(block)):
            with clock("recover"):
                weights = {matrix.stored for matrix in whole}
                frozen = [parameter for parameter in model.blocks[block].parameters() if parameter not in weights]
                forward = functools.partial(step.blockwise.output, step.visit)
                first, final = recover(whole, forward, step.dense.hidden, step.blockwise.windows, frozen)
            log.info("block %d: error %.4f of the dense output, %.4f after training", block + 1, first, final)
        found = [event for events_of_rank in ranks.all_gather(found) for event in events_of_rank]
        # So that the next block reads what is saved.
        for message in round_to_save_dtypes(model.block_state(block), model.save_dtypes):
            log.warning("%s", message)
            found.append({"matrix": None, "message": message})
        events += found
        if commit is not None:
            with clock("commit"):
                commit(block, seen, found)
        seen, found = {}, []


def _owners(matrices: list[Matrix], stats: dict[str, InputStats]) -> list[int]:
    """The rank that prunes each matrix; those that share statistics stay together, and so does what is derived."""
    shared = [id(stats.get(matrix.name, matrix)) for matrix in matrices]
    costs: dict[int, float] = {}
    for matrix, key in zip(matrices, shared, strict=True):
        costs[key] = costs.get(key, 0.0) + matrix.size * matrix.shape[1]
    owner = dict(zip(costs, ranks.balance(list(costs.values())), strict=True))
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
    no_stats: str | None = None,
) -> None:
    def note(message: str) -> None:
        log.warning("%s: %s", matrix.name, message)
        events.append({"matrix": matrix.name, "message": message})

    weight = matrix.weight
    pattern = pattern.on(weight)
    least = pattern.min_zeros(target)
    share = least / matrix.size
    if least > round(target * matrix.size) and round(share, 4) > round(target, 4):
        note(f"zeros that are there already make it {share:.4f} sparse, more than its target of {target:.4f}")
    if target == 0:
        return
    largest = 1.0 if stats is None else float(stats.sum_squares.max())
    if not math.isfinite(largest):
        raise _not_finite(matrix, "its calibration input holds", "the model as pruned so far yields them")
    if pruner.needs != "nothing" and (stats is None or largest == 0):
        note(f"{no_stats if stats is None else 'its input is always zero'}; pruned by magnitude")
        pruner, stats, rows = PRUNERS["magnitude"], None, None
    try:
        with linalg_errors():
            if asymmetry and stats is not None:
                weight = asymmetric_weights(weight, stats, asymmetry)
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

    stats      of their inputs, by name, over all blocks that share them; none of a matrix that saw no token on any rank
    no_stats   name -> why it has none
    visit      the pass's call of the block that this is, its last
    last       whether this is all of the block that is left
    blockwise  the pass of the calibration windows, about to enter the block; None where no token is run
    dense      the same windows in the dense model, just past the block; None where nobody asked
    """

    block: int
    matrices: list[Matrix]
    stats: dict[str, InputStats]
    no_stats: dict[str, str]
    visit: int
    last: bool = True
    blockwise: BlockwisePass | None = None
    dense: BlockwisePass | None = None


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
    stats_windows: int | None = None,
) -> Iterator[Step]:
    """Yield a step for each block from `done` to the last; what one changes, the next one's inputs come from.

    A matrix that several blocks share, or whose block is called again, is given once, at its last use, with the
    statistics of all uses; until then it is as it was. The blocks before `done` are run through as they are. With needs
    "nothing" no token is run. With `dense` the windows also go through the unchanged blocks, and with `cross` the
    statistics hold how the two belong together; a block then comes in stages, each with the inputs that the stages
    before have left it. Statistics are of the first `stats_windows` windows only, whole batches of every rank.
    """
    clock = clock or Stopwatch()
    blockwise = dense_blockwise = None
    if needs != "nothing":
        with clock("calibrate"):
            blockwise = BlockwisePass(
                model, ranks.shard(windows), batch_size, store, stats_windows=len(ranks.shard(windows[:stats_windows]))
            )
            dense_blockwise = blockwise.copy() if dense else None
    held: dict[str, InputStats] = {}  # by name, of the uses met so far
    no_stats: dict[str, str] = {}
    without_tokens = [(block, block) for block in range(done, len(model.blocks))]
    visits = list(enumerate(blockwise.visits)) if blockwise else without_tokens

    def collect(visit: int, uses: list[Matrix], reference: DenseReference | None) -> None:
        bar.set_description("statistics")
        with clock("calibrate"), clock("statistics"):
            found, missing = blockwise.collect(visit, uses, needs, reference)
            held.update(_both(held, _over_ranks(found, uses, needs, cross)))
            no_stats.update(missing)

    def advance(one: BlockwisePass, visit: int, part: str) -> None:
        if visit + 1 < len(visits) or one is dense_blockwise:
            bar.set_description(part)
            with clock("calibrate"), clock(part):
                one.advance(visit)

    with progress(visits, "blocks", "block") as bar:
        for visit, block in bar:
            ends = blockwise is None or visit == blockwise.route.last_visit(block)
            uses = model.uses_in(block)
            again = [use for use, matrix in uses if matrix.block >= max(done, block + ends)]  # by a later visit
            if not (ends and block >= done):  # nothing is pruned: what is, was when its last visit came
                if again or dense_blockwise is not None or not ends:
                    with model.resident_block(block, pruned_upto=-1):
                        if again:
                            collect(visit, again, DenseReference(dense_blockwise, visit) if cross else None)
                        if dense_blockwise is not None:
                            advance(dense_blockwise, visit, "dense")
                        if not ends:
                            advance(blockwise, visit, "propagation")
                if ends:
                    with model.resident_block(block, pruned_upto=block):
                        advance(blockwise, visit, "propagation")
                continue
            with model.resident_block(block):
                if dense_blockwise is not None and not cross:
                    advance(dense_blockwise, visit, "dense")
                matrices = model.matrices_of(block)
                last_uses = [use for use, matrix in uses if matrix.block == block]
                reference = DenseReference(dense_blockwise, visit) if cross and blockwise else None
                stages = blockwise.stages(visit, last_uses) if reference else [last_uses]
                turn = {use.name: index for index, stage in enumerate(stages) for use in stage}
                for index, stage in enumerate(stages):
                    last = index == len(stages) - 1
                    if reference is not None and last:
                        reference.advances, reference.residual_writer = True, blockwise.residual_writer(visit, stage)
                    if blockwise is not None:
                        collect(visit, stage if index else stage + again, reference)
                    bar.set_description("pruning")
                    now = [matrix for matrix in matrices if turn[matrix.name] == index]
                    stats = {matrix.name: held.pop(matrix.name) for matrix in now if matrix.name in held}
                    yield Step(block, now, stats, no_stats, visit, last, blockwise, dense_blockwise)
                    del stats
                if blockwise is not None:
                    advance(blockwise, visit, "propagation")


def _both(held: dict[str, InputStats], found: dict[str, InputStats]) -> dict[str, InputStats]:
    """The sums of what is held and what was found, by name; one for all names that share both."""
    sums: dict[tuple[int, int], InputStats] = {}
    result = {}
    for name, stats in found.items():
        if name not in held:
            result[name] = stats
            continue
        pair = id(held[name]), id(stats)
        if pair not in sums:
            sums[pair] = held[name].merged(stats)
        result[name] = sums[pair]
    return result


def _over_ranks(stats: dict[str, InputStats], matrices: list[Matrix], needs: str, cross: bool) -> dict[str, InputStats]:
    """The statistics summed over the ranks, each of which saw its own windows."""
    if ranks.world_size() == 1:
        return stats
    readers: dict[int, list[str]] = {}
    for matrix in matrices:
        if matrix.name in stats:
            readers.setdefault(id(stats[matrix.name]), []).append(matrix.name)
    # An expert may have seen tokens on some ranks only; what is read together is the same on all that saw any.
    together = {tuple(names): None for each in ranks.all_gather([*readers.values()]) for names in each}
    matrix_of = {matrix.name: matrix for matrix in matrices}
    summed = {}
    for names in together:
        matrix = matrix_of[names[0]]
        one = stats.get(names[0]) or InputStats.empty(needs, matrix.shape[1], matrix.weight.device, cross)
        one.all_reduce(ranks.all_reduce)
        summed |= dict.fromkeys(names, one)
    return summed
