"""The statistics of one block's inputs, gathered from its forward passes."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from torch import Tensor, nn

from .blocks import StopForward
from .experts import is_linear
from .model import Matrix
from .products import Products
from .stats import InputStats


class Collector:
    """Gathers the statistics of one block's inputs from its forward passes.

    Matrices that read the very same tensor share one InputStats, to which it is added once. What of the block
    lies behind its last matrix's input is not computed unless `whole`: nobody reads it here. With `cross`, each batch
    comes first in the dense model (`reference`), and the statistics hold both inputs' cross Gram. What a module's
    matrix is multiplied with while the module itself is not called (`dt_proj.weight @ x`) is its input as well.
    """

    def __init__(self, matrices: list[Matrix], needs: str, cross: bool = False, whole: bool = False):
        self.needs, self.cross, self._whole = needs, cross, whole
        self.stats: dict[str, InputStats] = {}
        self._matrices = matrices
        self._of_module = {m.module: [] for m in matrices}
        for matrix in matrices:
            self._of_module[matrix.module].append(matrix)
        self._modules = list(self._of_module)
        self._reached: set[nn.Module] = set()
        self._uncalled: list[Matrix] = []  # whose matrices are read all the same
        self._order: list[nn.Module] = []  # in which the current batch reached the modules
        self._last: nn.Module | None = None  # the module at which a pass may end, once known
        self._dense: dict[nn.Module, Tensor | None] = {}  # what each module reads of this batch in the dense model
        self._seen: dict[tuple, tuple[Tensor, InputStats]] = {}  # this batch's tensors, kept alive so ids stay unique

    @contextmanager
    def reference(self, dense_modules: dict[nn.Module, nn.Module], whole: bool):
        """While the batch that comes next runs through the dense model's block; through all of it if `whole`.

        dense_modules are that block's modules by those of this one.
        """

        def record_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
            again = pruned_module[module] in self._dense  # of experts called one by one: which of them, is not known
            self._dense[pruned_module[module]] = None if again else (*args, *kwargs.values())[0]
            if pruned_module[module] is self._last and not whole:
                raise StopForward

        self._dense.clear()
        pruned_module = {dense_modules[module]: module for module in self._modules}
        with ExitStack() as stack, suppress(StopForward):
            for module in pruned_module:
                stack.callback(module.register_forward_pre_hook(record_input, with_kwargs=True).remove)
            yield

    @contextmanager
    def batch(self, block: nn.Module):
        """While one batch runs through `block`."""
        self._order.clear()
        self._seen.clear()
        with ExitStack() as stack:
            for module in self._modules:
                stack.callback(module.register_forward_pre_hook(self._observe, with_kwargs=True).remove)
            if self._uncalled:
                stack.enter_context(self._products(self._uncalled))
            try:
                yield
            except StopForward:
                return
        # The first whole pass tells the order; a pass may end early only where each module was reached just once.
        if self._last is None and sorted(map(id, self._order)) == sorted(map(id, self._modules)):
            self._last = self._order[-1]

    @property
    def not_called(self) -> list[Matrix]:
        """Matrices of linear maps whose module no pass has called so far."""
        return [matrix for matrix in self._matrices if matrix.expert is None and matrix.module not in self._reached]

    @contextmanager
    def watch_products(self):
        """While the first batch runs through the block once more: finds those of `not_called` that are multiplied with
        all the same.
        """
        before = set(self.stats)
        with self._products(self.not_called):
            yield
        self._uncalled = [matrix for matrix in self.not_called if matrix.name in self.stats.keys() - before]

    @contextmanager
    def _products(self, matrices: list[Matrix]):
        with Products(matrices) as products:
            yield
        for matrix, x in products.found:
            if matrix.module not in self._reached:  # or else its hook has seen it
                self._add(matrix.name, x, None)

    def _observe(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._order.append(module)
        self._reached.add(module)
        dense = self._dense.get(module)
        # The dense model's input goes where the pruned one's is routed.
        matrices = self._of_module[module]
        rest = (*args, *kwargs.values())[1:]
        paired = {}
        if dense is not None and keeps_token_order(matrices, rest):
            paired = dict(matrix_inputs(matrices, (dense, *rest), {}))
        for matrix, x in matrix_inputs(matrices, args, kwargs):
            if x.numel():
                self._add(matrix.name, x, paired.get(matrix))
        if module is self._last and not self._whole and len(self._order) == len(self._modules):
            raise StopForward

    def _add(self, name: str, x: Tensor, dense: Tensor | None) -> None:
        key = (x.data_ptr(), x.shape, x.stride(), x._version)
        if key in self._seen:
            self.stats.setdefault(name, self._seen[key][1])
            return
        stats = self.stats.setdefault(name, InputStats(self.needs, self.cross))
        stats.add(x, dense if dense is not None and dense.shape == x.shape else None)
        self._seen[key] = (x, stats)

    def finish(self) -> dict[str, InputStats]:
        self._seen.clear()
        for stats in set(self.stats.values()):
            stats.finish()
        return self.stats

    def missing_reasons(self, block: nn.Module) -> dict[str, str]:
        """Of every matrix without statistics, why it has none."""
        lists = [held for held in block.modules() if isinstance(held, nn.ModuleList)]
        beside: dict[nn.Module, list[nn.Module]] = {}  # module -> the members of the lists that it is in
        for held in lists:
            for member in held:
                for module in member.modules():
                    beside.setdefault(module, []).extend(held)

        seen = {(m.module, m.parameter) for m in self._matrices if m.name in self.stats}

        def routed(matrix: Matrix) -> bool:
            if matrix.expert is not None:
                return (matrix.module, matrix.parameter) in seen
            others = {inner for member in beside.get(matrix.module, []) for inner in member.modules()}
            return matrix.module in self._reached or not self._reached.isdisjoint(others)

        return {
            matrix.name: "no calibration token is routed to it"
            if routed(matrix)
            else "its block shows no product with it"
            for matrix in self._matrices
            if matrix.name not in self.stats
        }


def matrix_inputs(matrices: list[Matrix], args: tuple, kwargs: dict) -> Iterator[tuple[Matrix, Tensor]]:
    """What the matrices of one module read, from the arguments its forward was called with.

    Yields (matrix, input (..., in)), a matrix that reads nothing not at all. A linear map reads its one argument;
    for a stack the module's own forward is run, as written rather than in a faster form, and its products are watched.
    """
    module = matrices[0].module
    if matrices[0].expert is None:
        yield matrices[0], (*args, *kwargs.values())[0]
        return
    with Products(matrices) as products:
        inspect.unwrap(type(module).forward)(module, *args, **kwargs)
    yield from products.found


def keeps_token_order(matrices: list[Matrix], rest: tuple) -> bool:
    """Whether the module of these matrices is called with all tokens in their own order, however they are routed: a
    linear map is, and experts are where the chosen ones come in the `rest` of the call, as integers.
    """
    chosen = (value for value in rest if isinstance(value, Tensor))
    return is_linear(matrices[0].module) or any(not value.is_floating_point() for value in chosen)
