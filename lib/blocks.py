"""A model's blocks, in the order in which its forward reaches them, and the body that they are part of."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import RunError
from .experts import is_linear

PROBE_TOKENS = 4
LEAK = 1e-4  # of the hidden states, moved by a later token: more than rounding does in float32


class StopForward(Exception):  # noqa: N818 (not an error)
    """Ends a forward pass early: nothing that lies behind this point is wanted."""


def find_blocks(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Full name -> module, of every block on the way from token ids to logits.

    The blocks are the members of the outermost lists of modules with linear maps in them. Where there is more than one
    such list, the model's own forward says which blocks it reaches, and in which order. Raises RunError where it
    has none, where it cannot say, and where matrices are held in another form than as weights.
    """
    for path, module in model.named_modules():
        if getattr(module, "holds_packed", False):
            raise RunError(f"--model {name}: {path} is held without its zeros (sparse_model); load the checkpoint anew")
    lists = _lists(model)
    if not lists:
        raise RunError(f"--model: {type(model).__name__} has no list of decoder blocks with linear maps in them")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    lists = {path: held for path, held in lists.items() if held in inside} or lists
    blocks = {f"{path}.{index}": block for path, held in lists.items() for index, block in enumerate(held)}
    if len(lists) == 1:
        return blocks
    reached: dict[nn.Module, None] = {}  # in order
    with ExitStack() as stack:
        for block in blocks.values():
            stack.callback(block.register_forward_pre_hook(lambda module, _: reached.setdefault(module)).remove)
        try:
            _run(model)
        except Exception as error:  # whatever a model's own forward may raise
            raise RunError(
                f"--model {name}: {type(model).__name__} has several lists of blocks ({', '.join(lists)}); which of "
                f"them it uses, in which order, only a forward pass can tell, and that fails: {error}"
            ) from error
    paths = {block: path for path, block in blocks.items()}
    return {paths[block]: block for block in reached}


def _lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():  # an outer list comes before those inside it
        if any(path.startswith(f"{outer}.") for outer in found) or not isinstance(module, nn.ModuleList):
            continue
        if any(any(map(is_linear, block.modules())) for block in module) and not any(map(is_linear, module)):
            found[path] = module
    return found


@torch.no_grad()
def _run(model: nn.Module) -> None:
    """One forward pass. Where weights have no values yet, all are zero, and take no memory."""
    named = chain(model.named_parameters(), model.named_buffers())
    zeros = {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in named if value.is_meta}
    device = "cpu" if zeros else model.get_input_embeddings().weight.device
    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device)
    torch.func.functional_call(model, zeros, kwargs={"input_ids": tokens, **accepted(model.forward, use_cache=False)})


def find_body(model: nn.Module, blocks: list[str], name: str) -> nn.Module:
    """The part of the model between token ids and the last hidden state: the innermost module that holds all blocks
    and takes token ids. Raises RunError where that is the whole model.
    """
    paths = [block.split(".") for block in blocks]
    shared = next(
        i for i, steps in enumerate(zip(*paths, strict=False)) if len(set(steps)) > 1 or i == len(paths[0]) - 1
    )
    for length in range(shared, 0, -1):
        module = model.get_submodule(".".join(paths[0][:length]))
        if _takes_tokens(module.forward):
            return module
    raise RunError(f"--model {name}: {type(model).__name__} has no body apart from its head")


@torch.no_grad()
def is_causal(run: Callable[[Tensor], object], block: nn.Module, tokens: Tensor) -> bool:
    """Whether what a block (the first) gives for a token is the same whatever token follows; tokens (1, S)."""
    other = tokens.clone()
    other[0, -1] = tokens[0, 0] if tokens[0, -1] != tokens[0, 0] else tokens[0, 0] ^ 1
    outputs: list[Tensor] = []

    def seen(_module, _args, output) -> None:
        outputs.append(output[0] if isinstance(output, (tuple, list)) else output)
        raise StopForward

    hook = block.register_forward_hook(seen)
    try:
        for each in (tokens, other):
            with suppress(StopForward):
                run(each)
    finally:
        hook.remove()
    length, shape = tokens.shape[1], outputs[0].shape
    axis = shape.index(length) if length in shape else 1  # positions first in a few models, and more of them in others
    one, two = (output.narrow(axis, 0, length - 1).float() for output in outputs)
    return bool((one - two).norm() <= max(LEAK, torch.finfo(outputs[0].dtype).eps) * one.norm())


def accepted(forward: Callable, **options) -> dict:
    """Those of the options that a forward pass takes."""
    known = inspect.signature(forward).parameters
    every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return {name: value for name, value in options.items() if every or name in known}


@contextmanager
def replaced_forward(module: nn.Module, forward):
    """Give one module another forward for a while (a hook of accelerate's, set the same way, is put back)."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class Changes(TorchDispatchMode):
    """While active, notices what is written into a model's weights; `found` is the name of the first one changed."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.found: str | None = None
        self._named = dict(model.named_parameters())  # kept, so that their storages stay unique
        self._names = {_storage(parameter): name for name, parameter in self._named.items()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.found is None and func._schema.is_mutable and args and isinstance(args[0], Tensor):
            name = self._names.get(_storage(args[0]))
            others = any(isinstance(value, Tensor) for value in args[1:])
            if name is not None and (others or _changes(func, args, kwargs)):
                self.found = name
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _changes(func, args: tuple, kwargs: dict | None) -> bool:
    """Whether an operation in place on a tensor and no other changes numbers at all (a parameter may have none)."""
    number = torch.full((), 2.0)
    return bool(func(number, *args[1:], **(kwargs or {})) != 2.0)


def _takes_tokens(forward: Callable) -> bool:
    return "input_ids" in inspect.signature(forward).parameters
