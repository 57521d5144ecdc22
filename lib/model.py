"""A causal LM as this project sees it: decoder blocks and the (out, in) matrices inside them.

The only module that knows architectures. Blocks and matrices are found from the model's structure: the
largest list of modules that hold linear maps, and in each of them every nn.Linear, every Conv1D (GPT-2) and
every expert of a fused three-dimensional expert tensor. Embeddings, norms, the head and MoE routers are none.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
import transformers
from torch import Tensor, nn

from . import ranks
from .errors import RunError
from .esd import as_published
from .masks import Pattern
from .memory import on_host
from .progress import progress

EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")  # of transformers' fused experts


@dataclass(frozen=True, eq=False)
class Matrix:
    """One prunable matrix, shown as (out, in) however the model stores it.

    name is the module's full name; an expert's ends in its tensor's name and its number.
    """

    name: str
    block: int
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """(out, in), a view of the model's own storage."""
        return self.view(self.stored.data)

    @property
    def stored(self) -> nn.Parameter:
        """The parameter that holds it, and with an expert the others of its kind."""
        return getattr(self.module, self.parameter)

    def view(self, tensor: Tensor) -> Tensor:
        """This matrix's part (out, in) of a tensor that is laid out as `stored` is."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor.T if self.transposed else tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.weight.shape)

    @property
    def size(self) -> int:
        return self.weight.numel()

    def write(self, weight: Tensor) -> None:
        """Replace the values in place: ties, dtype and device stay."""
        self.weight.copy_(weight)


class LanguageModel:
    """A transformers causal LM with its blocks and prunable matrices; wrap any model you have at hand.

    model       the transformers model, put into evaluation mode
    tokenizer   saved with the checkpoint; may be None
    blocks      the decoder's blocks, in order
    matrices    every prunable matrix, in module order
    uncovered   parameters inside blocks that are matrices or stacks of them, yet of no known kind
    prefix      the full name of the list of blocks
    streamed    whether blocks have values only while they are resident (lib/shards.py)
    """

    streamed = False

    def __init__(self, model: nn.Module, tokenizer=None, name: str = ""):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.name = name or type(model).__name__
        self.prefix, self.blocks = _find_blocks(model)
        self.matrices: list[Matrix] = []
        self.uncovered: list[str] = []
        for index, block in enumerate(self.blocks):
            matrices, uncovered = _find_matrices(block, f"{self.prefix}.{index}", index)
            self.matrices += matrices
            self.uncovered += uncovered
        # The part of the model between tokens and the last hidden state: the module that holds the blocks.
        self.body = model.get_submodule(self.prefix.rpartition(".")[0])
        if self.body is model:
            raise RunError(f"--model {self.name}: {type(model).__name__} has no body apart from its head")

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.model.get_input_embeddings().weight.device

    @property
    def devices(self) -> list[torch.device]:
        """All that the model lies on."""
        found = {parameter.device for parameter in self.model.parameters() if not parameter.is_meta}
        return sorted(found or {self.device}, key=str)

    def matrices_of(self, block: int) -> list[Matrix]:
        return [matrix for matrix in self.matrices if matrix.block == block]

    def groups(self) -> Iterator[list[Matrix]]:
        """The matrices by the tensor that stores them: one each, or all experts of a fused tensor; in module order."""
        for _, group in groupby(self.matrices, key=lambda matrix: (id(matrix.module), matrix.parameter)):
            yield list(group)

    @contextmanager
    def resident(self, matrices: list[Matrix]):
        """While the values of `matrices` are read. A model in memory has them at hand, and nothing is done."""
        yield

    @contextmanager
    def resident_block(self, index: int, original: bool = False):
        """While the block `index` is run or changed; likewise. A block that was replaced is read as it was before
        where `original` asks for it.
        """
        yield

    @contextmanager
    def resident_in_forward(self, index: int):
        """While forward passes of the whole model reach the block `index`; likewise."""
        yield

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def prunable_parameters(self) -> int:
        return sum(matrix.size for matrix in self.matrices)

    @property
    def coverage(self) -> float:
        """Share of the model's parameters that is prunable."""
        return self.prunable_parameters / self.parameters

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the prunable matrices' names and values, as loaded (take it before pruning).

        Of the values as the metrics read them, so that it does not depend on --dtype.
        """
        groups, found = list(self.groups()), {}
        owners = ranks.deal([sum(matrix.size for matrix in group) for group in groups])
        mine = [group for group, owner in zip(groups, owners, strict=True) if owner == ranks.rank()]
        for group in progress(mine, "reading weights", "tensor"):
            with self.resident(group):
                for matrix in group:
                    weight = as_published(matrix.weight)
                    digest = hashlib.sha256(f"{matrix.name} {weight.dtype} {tuple(weight.shape)}".encode())
                    digest.update(weight.contiguous().cpu().view(torch.uint8).numpy())
                    found[matrix.name] = digest.digest()
        for others in ranks.gather(found):
            found |= others
        return hashlib.sha256(b"".join(found[matrix.name] for matrix in self.matrices)).hexdigest()

    def describe(self) -> dict:
        """The `model` part of run.json."""
        return {
            "id": self.name,
            "revision": getattr(self.model.config, "_commit_hash", None),
            "digest": self.digest,
            "class": type(self.model).__name__,
            "parameters": self.parameters,
            "prunable_parameters": self.prunable_parameters,
            "coverage": self.coverage,
            "blocks": len(self.blocks),
            "device": ", ".join(map(str, self.devices)),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "uncovered": self.uncovered,
        }

    def check(self, pattern: Pattern, *windows: Tensor | None) -> None:
        """Raises RunError for windows with tokens that the model does not have, for the first matrix that N:M does
        not fit, and for the first parameter that holds NaN or infinity.
        """
        known = self.model.get_input_embeddings().weight.shape[0]
        if any(tokens is not None and int(tokens.max()) >= known for tokens in windows):
            raise RunError(f"--model {self.name}: its tokenizer gives tokens beyond the {known} that the model has")
        for matrix in self.matrices:
            if pattern.group and matrix.shape[1] % pattern.group:
                raise RunError(
                    f"--sparsity_type: {matrix.name} has {matrix.shape[1]} inputs, not a multiple of {pattern.group}"
                )
        for name, parameter in self.model.named_parameters():
            if not parameter.is_meta and not parameter.isfinite().all():
                raise RunError(f"--model {self.name}: {name} holds NaN or infinity")

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Last hidden state of token ids (B, S), after the final norm and before the head; (B, S, d)."""
        output = self.body(input_ids=tokens.to(self.device), use_cache=False, return_dict=True)
        self._output_class = type(output)  # the head's code may ask the body for more than hidden states
        return output[0]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own path from hidden states (B, S, d) to logits (B, S, vocabulary).

        Whatever the model does around its head (scaling, soft caps) is done by its own forward, which finds
        `hidden` where its body's output would be. `hidden_states` has to be asked first.
        """
        output, asked = self._output_class(last_hidden_state=hidden), []

        def body(*args, **kwargs):
            asked.append(True)
            return output

        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        with replaced_forward(self.body, body):
            logits = self.model(input_ids=tokens, use_cache=False, return_dict=True).logits
        if not asked:
            raise RuntimeError(f"{type(self.model).__name__} computes logits without its {type(self.body).__name__}")
        return logits


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


@contextmanager
def kept(model: LanguageModel) -> Iterator[dict[Matrix, Tensor]]:
    """The prunable weights, on the host; whatever is done to the model's is undone in the end."""
    weights = {matrix: on_host(matrix.weight) for matrix in model.matrices}
    try:
        yield weights
    finally:
        for matrix, weight in weights.items():
            matrix.write(weight)


def matrix_inputs(module: nn.Module, args: tuple, kwargs: dict) -> Iterator[tuple[str, int | None, Tensor]]:
    """What the matrices of a module read, from the arguments its forward was called with.

    Yields (parameter, expert, input (..., in)). A linear map reads its one argument. Fused experts are called
    with (hidden states, chosen experts, routing weights), and each reads the tokens routed to it.
    """
    args = (*args, *kwargs.values())
    if not _is_fused_experts(module):
        yield "weight", None, args[0]
        return
    hidden, chosen = args[0].reshape(-1, args[0].shape[-1]), args[1]
    first = "gate_up_proj" if module.has_gate else "up_proj"
    for expert in range(getattr(module, first).shape[0]):
        tokens = hidden[(chosen == expert).any(-1)]  # (tokens of this expert, in)
        yield first, expert, tokens
        weight = getattr(module, first)[expert]
        inner = tokens @ (weight if module.is_transposed else weight.T)
        if module.has_bias:
            inner = inner + getattr(module, f"{first}_bias")[expert]
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        yield "down_proj", expert, inner


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D))


def _is_fused_experts(module: nn.Module) -> bool:
    """An experts module of transformers 5: parameters (experts, ., .) under known names and a known layout."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "down_proj")


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    def linear_parameters(module: nn.Module) -> int:
        inner = [m for m in module.modules() if _is_linear(m) or _is_fused_experts(m)]
        return sum(parameter.numel() for m in inner for parameter in m.parameters(recurse=False))

    lists = {
        name: (sum(linear_parameters(block) for block in module), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(linear_parameters(block) for block in module)
    }
    if not lists:
        raise RunError(f"--model: {type(model).__name__} has no list of decoder blocks with linear maps in them")
    name = max(lists, key=lambda name: lists[name][0])  # an outer list comes before those inside it
    return name, lists[name][1]


def _find_matrices(block: nn.Module, prefix: str, index: int) -> tuple[list[Matrix], list[str]]:
    matrices, uncovered = [], []
    for name, module in block.named_modules(prefix=prefix):
        if _is_linear(module):
            if not module.weight.is_floating_point():
                raise RunError(f"--model: {name} holds {module.weight.dtype} weights; load an unquantised checkpoint")
            if not _is_router(block, prefix, name, module):
                transposed = isinstance(module, transformers.pytorch_utils.Conv1D)
                matrices.append(Matrix(name, index, module, transposed=transposed))
        elif _is_fused_experts(module):
            for parameter in EXPERT_PARAMETERS:
                tensor = getattr(module, parameter, None)
                for expert in range(0 if tensor is None else len(tensor)):
                    full_name = f"{name}.{parameter}.{expert}"
                    matrices.append(Matrix(full_name, index, module, parameter, expert, module.is_transposed))
        else:
            stacks = [
                key for key, value in module.named_parameters(recurse=False) if value.dim() == 3 and len(value) > 1
            ]
            uncovered += [f"{name}.{key}" for key in stacks if min(module.get_parameter(key).shape[1:]) > 1]
    return matrices, uncovered


def _is_router(block: nn.Module, prefix: str, name: str, module: nn.Module) -> bool:
    """A linear map beside the experts it chooses among: one output an expert, or one gate for a shared expert."""
    path = name[len(prefix) + 1 :].split(".")
    for depth in range(len(path) - 1, 0, -1):
        parent = block.get_submodule(".".join(path[:depth]))
        holders = {n: c for n, c in parent.named_children() if isinstance(c, nn.ModuleList) or _is_fused_experts(c)}
        if path[depth] in holders:
            return False  # inside an expert
        counts = {len(c) if isinstance(c, nn.ModuleList) else len(c.down_proj) for c in holders.values()}
        if counts and module.weight.shape[0] in counts | {1}:
            return True
    return False
