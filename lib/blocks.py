"""A model's blocks, in the order in which its forward reaches them, and the body that they are part of."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

from .errors import RunError
from .experts import is_linear

PROBE_TOKENS = 4


def find_blocks(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Full name -> module, of every block on the way from token ids to logits.

    The blocks are the members of the outermost lists of modules with linear maps in them. Where there is more than one
    such list, the model's own forward says which blocks it reaches, and in which order. Raises RunError where it
    has none, and where it cannot say.
    """
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
                f"--model {name}: {type(model).__name__} has several lists of blocks ({', '.join(lists)}), and which of "
                f"them it uses, in which order, only a forward pass can tell, which fails: {error}"
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
    device = model.get_input_embeddings().weight.device
    model(input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device), use_cache=False)


def find_body(model: nn.Module, blocks: list[str], name: str) -> nn.Module:
    """The part of the model between token ids and the last hidden state: the innermost module that holds all blocks
    and takes token ids. Raises RunError where that is the whole model.
    """
    paths = [block.split(".") for block in blocks]
    shared = next(i for i, steps in enumerate(zip(*paths, strict=False)) if len(set(steps)) > 1 or i == len(paths[0]) - 1)
    for length in range(shared, 0, -1):
        module = model.get_submodule(".".join(paths[0][:length]))
        if _takes_tokens(module.forward):
            return module
    raise RunError(f"--model {name}: {type(model).__name__} has no body apart from its head")


def _takes_tokens(forward: Callable) -> bool:
    return "input_ids" in inspect.signature(forward).parameters
