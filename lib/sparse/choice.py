"""Which matrices are worth holding without their zeros on this machine: measured, once for each shape."""

import operator
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graphs import captured
from .format import storage_kind
from .linear import SparseLinear, forms_for, multiply

MIN_SPARSITY = 0.3  # the sparsity below which nothing is tried: little memory is saved, and no time
MARGIN = 0.97  # of the dense product's time
TOKENS = (4, 16)  # at once, for which the kernel is tried against unpacking: each is compiled
NONE_AT_ONCE = 0
STEP = 0.05  # of sparsities that are told apart
FEWEST_TURNS, MOST_TURNS, CLEARLY = 6, 24, 1.2  # of a comparison
MOST_COPIES = 256

# Shape, machine and what was asked -> sparsity in steps -> form, tokens at once.
_known: dict[tuple, dict[int, tuple[type, int]]] = {}
_pays: dict[tuple, bool] = {}  # shape and machine -> whether 2:4 does


def fastest(make: Callable[[type], SparseLinear], weight: Tensor, *, compiled: bool = False) -> SparseLinear | None:
    """What multiplies one token by a matrix (rows, columns) fastest: `make(form)` of a form that its device has; None
    where the dense matrix is as fast, which it is then better left as. The layer's max_tokens are the most tokens at
    once for which its kernel is the fastest way through it. Of a model that will run `compiled`, a GPU's time counts,
    and Python's does not.

    What was measured for one matrix holds for others of its shape: where the form for many zeros paid it does at higher
    sparsities, where none did none does at lower ones.
    """
    machine = weight.device, torch.get_num_threads()
    key = (*weight.shape, weight.dtype, storage_kind(weight), *machine, compiled)
    step = round((1 - int(weight.count_nonzero()) / max(1, weight.numel())) / STEP)
    known, last, layer = _known.setdefault(key, {}), forms_for(weight)[-1], None
    if step not in known:
        lower = [at for at, (form, most) in known.items() if at < step and most and form is last]
        higher = [at for at, (_, most) in known.items() if at > step and not most]
        if lower or higher:
            known[step] = known[max(lower) if lower else min(higher)]
        else:
            layer, most = _measured(make, weight, compiled)
            known[step] = type(layer.packed), most
    form, most = known[step]
    if not most:
        return None
    layer = layer or make(form)
    layer.max_tokens = most
    return layer


def pays(make: Callable[[], nn.Module], size: int, weight: Tensor, *, compiled: bool = False) -> bool:
    """Whether a layer of `size` bytes, which `make()` makes, is faster for one token than the dense matrix (rows,
    columns), in a model that will run `compiled` or not; measured once for each shape.
    """
    key = (*weight.shape, weight.dtype, weight.device, torch.get_num_threads(), compiled)
    if key not in _pays:
        _pays[key] = _faster(cold_copies(make, size), weight, compiled)
    return _pays[key]


@torch.no_grad()
def _faster(layers: list[nn.Module], weight: Tensor, compiled: bool) -> bool:
    x = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    dense = [lambda w=w: F.linear(x, w, layers[0].bias) for w in cold_copies(weight.clone, weight.nbytes)]
    own = [lambda layer=layer: layer(x) for layer in layers]
    if not (compiled and weight.is_cuda):
        of_dense, of_own = _alternating(dense, own)
        return of_own <= MARGIN * of_dense
    graphs = [captured(lambda calls=calls: [call() for call in calls], weight.device) for calls in (dense, own)]
    of_dense, of_own = _alternating(*([graph] for graph in graphs))
    return of_own / len(own) <= MARGIN * of_dense / len(dense)


@torch.no_grad()
def _measured(make: Callable[[type], SparseLinear], weight: Tensor, compiled: bool) -> tuple[SparseLinear, int]:
    """The fastest layer, and for how many tokens at once."""
    layers, x = [], torch.ones(max(TOKENS), weight.shape[1], dtype=weight.dtype, device=weight.device)
    for layer in map(make, forms_for(weight)):
        others = cold_copies(layer.copy, layer.packed.bytes)
        calls = [[lambda own=own: own(x[:1]) for own in each] for each in (layers, others)]
        if not layers or operator.gt(*_alternating(*calls)):
            layers = others
    if not _faster(layers, weight, compiled):
        return layers[0], NONE_AT_ONCE
    most = 1
    for tokens in TOKENS:
        some, packed = x[:tokens], [own.packed for own in layers]
        kernel, unpacked = ([lambda p=p, n=n: multiply(p, some, n) for p in packed] for n in (tokens, 0))  # noqa: B023
        if operator.gt(*_alternating(kernel, unpacked)):
            break
        most = tokens
    return layers[0], most


def cold_copies(make: Callable, size: int) -> list:
    """So many copies of what has `size` bytes that they do not fit into the caches: used in turn, as the layers of a
    model are, each is read from memory. Small ones may fit after all.
    """
    return [make() for _ in range(min(MOST_COPIES, 1 + 2 * _cache_bytes() // size))]


def _alternating(one: Sequence[Callable], other: Sequence[Callable]) -> tuple[float, float]:
    """The least seconds of a call of each, in turn; until it is clear which is less, or that it cannot matter."""
    clock = time.perf_counter if torch.cuda.is_available() or torch.get_num_threads() > 1 else time.thread_time
    fastest = [float("inf")] * 2
    for turn in range(MOST_TURNS):
        for which, calls in enumerate((one, other)):
            _wait()
            begin = clock()
            calls[turn % len(calls)]()
            _wait()
            if turn:  # the first compiles
                fastest[which] = min(fastest[which], clock() - begin)
        if turn >= FEWEST_TURNS and not 1 / CLEARLY < fastest[0] / fastest[1] < CLEARLY:
            break
    return tuple(fastest)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cache_bytes() -> int:
    """Of the processor's last cache, where Linux tells, up to 128 MB; else 32 MB."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return min(int(size.removesuffix("K")) << 10, 128 << 20)
    except (OSError, ValueError):
        return 32 << 20
