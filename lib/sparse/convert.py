"""A pruned model that is smaller and faster: its matrices held without their zeros."""

import functools
import logging
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import RunError
from ..load import Source, choose_device, choose_dtype, find_source, load_config, load_model, open_model
from ..memory import eager_release
from ..model import LanguageModel, Matrix
from . import cuda
from .choice import MIN_SPARSITY, fastest, pays
from .linear import PACK, SparseLinear, forms_for

log = logging.getLogger(__name__)


def sparse_model(
    model: LanguageModel | nn.Module | Source | str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threshold: float | None = None,
    compiled: bool = False,
) -> nn.Module:
    """The transformers model, ready to generate, with every prunable matrix that is worth it held without its zeros.

    model      one in memory, whose layers are replaced (a LanguageModel is of no further use), or where to load one
               from: then block by block, so that the dense model is never held
    device     of one that is loaded
    dtype      likewise; auto: bfloat16 where the checkpoint is, float32 for others on the CPU, as main.py on cuda
    threshold  the sparsity, in [0, 1], from which a matrix is packed, on a CPU by masks and for one token at a time;
               None: where its product is faster for it on this machine, which is measured, as is in which form and
               for how many tokens
    compiled   whether it will run compiled, as `generate` does it on cuda with a static cache: what launching takes
               from Python does not count then

    Raises RunError where a model cannot be loaded. What stays dense, and why, is said in the log.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise RunError(f"threshold {threshold:g}: must lie in [0, 1]")
    with eager_release():
        if isinstance(model, (str, Path)):
            model = find_source(str(model))
        if isinstance(model, Source):
            model = _opened(model, device, dtype)
        elif not isinstance(model, LanguageModel):
            if any(isinstance(module, SparseLinear) for module in model.modules()):
                return model  # as it was made before
            model = LanguageModel(model)
        account = _Account()
        _convert(model, functools.partial(_converted, threshold=threshold, compiled=compiled, account=account))
    if account.two_of_four and (config := getattr(model.model, "generation_config", None)):
        config.disable_compile = True  # which was never tried with torch's tensors of 2:4
    account.report(model)
    return model.model


def _convert(model: LanguageModel, converted: Callable[[Matrix], nn.Module | None]) -> None:
    """Replace the layers, block by block, by what each is `converted` to, unless that is None."""
    pending: dict[Matrix, nn.Module] = {}
    for index in range(len(model.block_names)):
        with model.resident_block(index):
            for matrix in model.matrices_of(index):
                if layer := converted(matrix):
                    pending[matrix] = layer
            packed = {id(matrix.stored) for matrix in pending}
            model.keep_resident([name for name, value in model.block_state(index).items() if id(value) not in packed])
        if not model.streamed:  # layers that have gone are asked for when other blocks are read
            _replace(model.model, pending)
            pending = {}
    _replace(model.model, pending)


def own_dtype(source: Source, device: str, dtype: str = "auto") -> torch.dtype:
    """What `auto` is for a model that generates: bfloat16 where the checkpoint is, else as for one to prune."""
    own = load_config(source).dtype
    return torch.bfloat16 if dtype == "auto" and own == torch.bfloat16 else choose_dtype(dtype, device, own)


def _opened(source: Source, device: str, dtype: str) -> LanguageModel:
    device = choose_device(device)
    dtype = str(own_dtype(source, device, dtype)).removeprefix("torch.")
    if source.gguf:  # is not read in parts
        return load_model(source, device, dtype)
    model = open_model(source, device, dtype)
    model.load_non_blocks()
    model.keep_resident(model.non_block_state())
    return model


@dataclass
class _Account:
    """What became of the matrices; bytes of those that were packed, before and after."""

    packed: int = 0
    two_of_four: int = 0
    before: int = 0
    after: int = 0
    weights: int = 0
    zeros: int = 0
    dense: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def report(self, model: LanguageModel) -> None:
        share = self.zeros / max(1, self.weights)
        if not self.packed and share < MIN_SPARSITY:
            log.warning(
                "%s is not sparse (%.1f %% of its prunable weights are zero): it stays dense", model.name, 100 * share
            )
            return
        log.info(
            "%s: %.1f %% zeros; %d of %d matrices are held without them, in %.2f GB in place of %.2f",
            model.name, 100 * share, self.packed, len(model.matrices), self.after / 1e9, self.before / 1e9,
        )  # fmt: skip
        for why, names in self.dense.items():
            kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
            log.info("%d stay dense, %s: %s", len(names), why, ", ".join(kinds))


def _converted(matrix: Matrix, *, threshold: float | None, compiled: bool, account: _Account) -> nn.Module | None:
    """What takes the place of the matrix's module; None where it stays, which is put down."""
    weight, module = matrix.weight, matrix.module
    zeros = weight.numel() - int(weight.count_nonzero())
    account.weights += weight.numel()
    account.zeros += zeros
    if matrix.expert is not None:
        return account.dense["as one tensor holds several experts"].append(matrix.name)
    if zeros < (MIN_SPARSITY if threshold is None else threshold) * weight.numel():
        return account.dense["with too few zeros"].append(matrix.name)
    if not all(_is_plain(use.module, use.weight) for use in matrix.uses):
        return account.dense["as their layers do more than multiply"].append(matrix.name)
    as_two_of_four = functools.partial(cuda.semi_structured, module, weight)
    after = weight.nbytes * 9 // 16
    wanted = threshold is not None
    if cuda.is_two_of_four(weight) and (wanted or pays(as_two_of_four, after, weight, compiled=compiled)):
        layer = as_two_of_four()
        account.two_of_four += 1
    else:
        bias, transposed = getattr(module, "bias", None), matrix.transposed

        def packed(form: type) -> SparseLinear:
            return SparseLinear(PACK[form](weight), bias, weight.dtype, transposed=transposed)

        if wanted:
            layer = packed(forms_for(weight)[0])
            layer.max_tokens = cuda.AT_ONCE if weight.is_cuda else 1
        else:
            layer = fastest(packed, weight, compiled=compiled)
        if layer is None:
            return account.dense["as fast with their zeros"].append(matrix.name)
        after = layer.packed.bytes
    account.packed += 1
    account.before += weight.numel() * weight.element_size()
    account.after += after
    return layer


def _is_plain(module: nn.Module, weight: torch.Tensor) -> bool:
    """Whether the module is a product with its weight, a bias and nothing else: told by what it computes, unless it is
    an nn.Linear. Hooks are something else.
    """
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    expected = F.linear(x, weight, module.bias)
    try:
        found = module(x)
    except Exception:  # of whatever its own forward wants to be given
        return False
    close = {"rtol": 0.02, "atol": 0.02 * float(expected.abs().mean())}
    return (
        isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected, **close)
    )


def _replace(model: nn.Module, layers: dict[Matrix, nn.Module]) -> None:
    """Put each layer wherever the model holds the modules that use its matrix."""
    new = {id(use.module): layer for matrix, layer in layers.items() for use in matrix.uses}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]
