"""A causal LM as this project sees it: decoder blocks and the (out, in) matrices inside them.

With experts.py the only module that knows architectures. Blocks and matrices are found from the model's structure:
the lists of modules that hold linear maps, and in each of them every nn.Linear, every Conv1D (GPT-2) and every expert
of a stack of experts. Embeddings, norms, the head and routers are not pruned; `uncovered` has what else
a block holds.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor, nn

from .activations import Store
from .blocks import Changes, StopForward, accepted, find_blocks, find_body, is_causal, replaced_forward
from .digest import digest
from .errors import RunError
from .experts import Mixtures, is_linear, matrix_parameters, never_prunable
from .masks import Pattern
from .memory import copy_to_host, is_finite

PROBE_LENGTH = 7  # tokens, to try a model on; no other axis is that long
NEGLIGIBLE = 0.01  # a share of the blocks' weights that may stay dense without a word


@dataclass(frozen=True, eq=False)
class Matrix:
    """One prunable matrix, shown as (out, in) however the model stores it.

    name is the module's full name; an expert's ends in its tensor's name and its number, of `experts` in all. A matrix
    that several modules share is one: the last of them, whose block it belongs to; `earlier` has it as the others hold
    it.
    """

    name: str
    block: int
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None
    experts: int = 1
    transposed: bool = False
    earlier: tuple["Matrix", ...] = ()

    @property
    def uses(self) -> tuple["Matrix", ...]:
        """This matrix as a part of each module that shares it, in order."""
        return (*self.earlier, self)

    @property
    def weight(self) -> Tensor:
        """(out, in), a view of the model's own storage."""
        return self.view(self.stored.data)

    @property
    def stored(self) -> nn.Parameter:
        """The parameter that holds it; of an expert also the other experts of its stack."""
        return getattr(self.module, self.parameter)

    def view(self, tensor: Tensor) -> Tensor:
        """This matrix's part (out, in) of a tensor that is laid out as `stored` is."""
        if self.expert is not None:
            tensor = (tensor if tensor.dim() == 3 else tensor.unflatten(0, (self.experts, -1)))[self.expert]
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
    blocks      the decoder's blocks in the order of its forward, from one list of modules or several
    block_names their full names
    body        what turns token ids into the last hidden state
    matrices    every prunable matrix, in module order
    uncovered   parameters inside blocks that are matrices or stacks of them, yet of no known kind
    save_dtypes    parameter or buffer -> the dtype that it is saved in, where that is not its own (lib/storage.py)
    notes       what was found at loading and is worth an event
    streamed    whether blocks have values only while they are resident (lib/shards.py)
    """

    streamed = False

    def __init__(self, model: nn.Module, tokenizer=None, name: str = ""):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.name = name or type(model).__name__
        found = find_blocks(model, self.name)
        self.block_names, self.blocks = list(found), list(found.values())
        self.body = find_body(model, self.block_names, self.name)
        self.save_dtypes: dict[str, torch.dtype] = {}
        self.notes: list[str] = []
        self.matrices: list[Matrix] = []
        self.uncovered: list[str] = []
        for index, (name, block) in enumerate(found.items()):
            matrices, uncovered = _find_matrices(block, name, index)
            self.matrices += matrices
            self.uncovered += uncovered
        self.matrices = _each_once(self.matrices)

    @property
    def device(self) -> torch.device:
        """The device of the input embeddings, which takes token ids."""
        return self.model.get_input_embeddings().weight.device

    @property
    def devices(self) -> list[torch.device]:
        """The devices that hold any of the model's parameters."""
        found = {parameter.device for parameter in self.model.parameters() if not parameter.is_meta}
        return sorted(found or {self.device}, key=str)

    def matrices_of(self, block: int) -> list[Matrix]:
        return [matrix for matrix in self.matrices if matrix.block == block]

    def uses_in(self, block: int) -> list[tuple[Matrix, Matrix]]:
        """Every matrix that the block reads, as (its use in this block, the entry of `matrices`)."""
        return [(use, matrix) for matrix in self.matrices for use in matrix.uses if use.block == block]

    def groups(self) -> Iterator[list[Matrix]]:
        """The matrices by the tensor that stores them: one each, or all experts of a fused tensor; in module order."""
        for _, group in groupby(self.matrices, key=lambda matrix: (id(matrix.module), matrix.parameter)):
            yield list(group)

    @contextmanager
    def resident(self, matrices: list[Matrix]):
        """While the values of `matrices` are read; a streamed model loads them. A model in memory does nothing."""
        yield

    @contextmanager
    def resident_block(self, index: int, pruned_upto: int | None = None):
        """While the block `index` is run or changed; likewise. Of replaced blocks those after `pruned_upto`, if given,
        are read as they were before, and so is what they share with this one.
        """
        yield

    @contextmanager
    def resident_in_forward(self, index: int):
        """While forward passes of the whole model reach the block `index`; likewise."""
        yield

    def keep_resident(self, names: Iterable[str]) -> None:
        """Keep the values of these parameters, which are resident, in memory from now on; likewise."""

    @contextmanager
    def restored(self, store: Store | None = None) -> Iterator[Callable | None]:
        """While matrices are changed on trial: in the end they are as they were.

        Yields what is to be called with the index of each block that was changed, while it is resident; None where
        there is no need. A copy of the weights is held meanwhile: on the host, or in `store` those of a streamed model.
        """
        weights = {matrix: copy_to_host(matrix.weight) for matrix in self.matrices}
        try:
            yield None
        finally:
            for matrix, weight in weights.items():
                matrix.write(weight)

    def block_state(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block, which is resident, by name."""
        return self.blocks[index].state_dict(prefix=f"{self.block_names[index]}.")

    def state(self) -> dict[str, Tensor]:
        """The model's tensors by name, each tied one once."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        return {name: value for name, value in self.model.state_dict().items() if name not in tied}

    def non_block_state(self) -> dict[str, Tensor]:
        """Those of `state` that are outside the blocks: embeddings, final norm, head."""
        blocks = tuple(f"{name}." for name in self.block_names)
        return {name: value for name, value in self.state().items() if not name.startswith(blocks)}

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
    def dense_share(self) -> float:
        """Share of the blocks' weights that lies in `uncovered` parameters."""
        weights = {id(parameter): parameter.numel() for block in self.blocks for parameter in block.parameters()}
        dense = {id(parameter): parameter.numel() for parameter in map(self.model.get_parameter, self.uncovered)}
        return sum(dense.values()) / sum(weights.values())

    @property
    def stays_dense(self) -> str | None:
        """A warning about the weights in blocks that are not prunable; None where they are few."""
        if self.dense_share <= NEGLIGIBLE:
            return None
        names = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in self.uncovered)
        return f"{100 * self.dense_share:.1f} % of the blocks' weights stay dense: {', '.join(names)}"

    @cached_property
    def digest(self) -> str:
        """Digest of the prunable matrices as loaded (lib/digest.py); read it before pruning."""
        return digest(self)

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
            "dense_share": self.dense_share,
            "stays_dense": self.stays_dense,
        }

    def check(self, pattern: Pattern, *windows: Tensor | None) -> None:
        """Raises RunError for windows with tokens that the model does not have, for the first matrix that N:M does
        not fit, for the first parameter that holds NaN or infinity, and for a model that reads ahead, that changes its
        own weights, or whose logits are not to be had from its last hidden state.
        """
        known = check_tokens(self.name, self.model, *windows)
        for matrix in self.matrices:
            if pattern.group and matrix.shape[1] % pattern.group:
                raise RunError(
                    f"--sparsity_type: {matrix.name} has {matrix.shape[1]} inputs, not a multiple of {pattern.group}"
                )
        for name, parameter in self.model.named_parameters():
            if not parameter.is_meta and not is_finite(parameter):
                raise RunError(f"--model {self.name}: {name} holds NaN or infinity")
        given = next(
            (tokens for tokens in windows if tokens is not None), torch.arange(PROBE_LENGTH).remainder(known)[None]
        )
        few = given[:1, :PROBE_LENGTH]
        with self.resident_in_forward(0), self.unchanged():
            causal = few.numel() == 1 or is_causal(self.hidden_states, self.blocks[0], few.to(self.device))
        if not causal:
            decoder = getattr(self.model.config, "is_decoder", None)
            advice = '; "is_decoder": true in its config.json makes it one' if decoder is False else ""
            raise RunError(
                f"--model {self.name}: {type(self.model).__name__} is no causal LM as it is: what it gives for a "
                f"token depends on those that follow{advice}"
            )
        if not self.streamed:
            with self.unchanged():
                self.logits(self.hidden_states(few))

    @contextmanager
    def unchanged(self):
        """While forward passes are run. Raises RunError at the end for a model that changes its own weights in one."""
        with Changes(self.model) as changes:
            yield
        if changes.found:
            keeps = getattr(self.model.config, "rescale_every", 0)  # RWKV's, for half precision
            advice = '; "rescale_every": 0 in its config.json keeps it from that' if keeps else ""
            raise RunError(
                f"--model {self.name}: {type(self.model).__name__} changes its own weights in its forward pass "
                f"({changes.found}), so that what is pruned and saved is not what was loaded{advice}"
            )

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Last hidden state of token ids (B, S), after the final norm and before the head; (B, S, d).

        The model itself calls its body, with whatever it makes of the tokens.
        """
        forward, found = self.body.forward, []

        def body(*args, **kwargs):
            found.append(forward(*args, **kwargs))
            raise StopForward

        with replaced_forward(self.body, body):
            try:
                self._run(tokens)
            except StopForward:
                if not found:  # of whoever asked for no more than a block
                    raise
        if not found:
            raise self._without_body()
        self._output_class = type(found[0])  # the head's code may ask the body for more than hidden states
        return found[0] if isinstance(found[0], Tensor) else found[0][0]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own path from hidden states (B, S, d) to logits (B, S, vocabulary).

        Whatever the model does around its head (scaling, soft caps) is done by its own forward, which finds
        `hidden` where its body's output would be. `hidden_states` has to be asked first.
        """
        kind, asked = self._output_class, []
        plain = {Tensor: hidden, tuple: (hidden,), list: [hidden]}
        output = plain[kind] if kind in plain else kind(last_hidden_state=hidden)

        def body(*args, **kwargs):
            asked.append(True)
            return output

        try:
            with replaced_forward(self.body, body):
                logits = self.forward_logits(torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device))
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise RunError(
                f"--model {self.name}: {type(self.model).__name__} computes its logits from more than its last hidden "
                "state; it is not supported"
            ) from error
        if not asked:
            raise self._without_body()
        if logits.shape[:2] != hidden.shape[:2]:
            raise RunError(
                f"--model {self.name}: {type(self.model).__name__} does not give logits for every token "
                f"({logits.shape[1]} of {hidden.shape[1]}); it is not supported"
            )
        return logits

    def forward_logits(self, tokens: Tensor) -> Tensor:
        """Logits (B, S, vocabulary) of token ids (B, S) by the model's own forward pass."""
        output = self._run(tokens)
        return output if isinstance(output, Tensor) else output[0] if type(output) is tuple else output.logits

    def _run(self, tokens: Tensor):
        options = accepted(self.model.forward, use_cache=False, return_dict=True)
        return self.model(input_ids=tokens.to(self.device), **options)

    def _without_body(self) -> RunError:
        return RunError(
            f"--model {self.name}: {type(self.model).__name__} computes its logits without its "
            f"{type(self.body).__name__}; it is not supported"
        )


def check_tokens(name: str, model: nn.Module, *windows: Tensor | None) -> int:
    """How many tokens the model has. Raises RunError for windows with others."""
    known = model.get_input_embeddings().weight.shape[0]
    if any(tokens is not None and int(tokens.max()) >= known for tokens in windows):
        raise RunError(f"--model {name}: its tokenizer gives tokens beyond the {known} that the model has")
    return known


def _find_matrices(block: nn.Module, prefix: str, index: int) -> tuple[list[Matrix], list[str]]:
    """The block's prunable matrices, and the names of the parameters that are none but not dense by nature either."""
    matrices, uncovered, mixtures = [], [], Mixtures(block)
    for name, module in block.named_modules(prefix=prefix):
        stacks = {stack.parameter: stack for stack in mixtures.stacks.get(module, ())}
        nature = never_prunable(module) or "norm" in name.rpartition(".")[2]
        for parameter, value in [] if nature else matrix_parameters(module):
            full_name = f"{name}.{parameter}"
            if value in mixtures.routers:
                continue
            if not (is_linear(module) or parameter in stacks):
                uncovered.append(full_name)
                continue
            if not value.is_floating_point():
                raise RunError(f"--model: {name} holds {value.dtype} weights; load an unquantised checkpoint")
            if stack := stacks.get(parameter):
                matrices += [
                    Matrix(f"{full_name}.{expert}", index, module, parameter, expert, stack.count, stack.transposed)
                    for expert in range(stack.count)
                ]
            else:
                matrices.append(Matrix(name, index, module, transposed=not isinstance(module, nn.Linear)))
    return matrices, uncovered


def _each_once(matrices: list[Matrix]) -> list[Matrix]:
    """Without the repetitions of what several modules share."""
    uses: dict[tuple, list[Matrix]] = {}
    for matrix in matrices:
        uses.setdefault((id(matrix.stored), matrix.expert), []).append(matrix)
    last = {id(found[-1]): found for found in uses.values()}
    return [
        replace(m, earlier=tuple(replace(use, name=m.name) for use in last[id(m)][:-1])) if len(last[id(m)]) > 1 else m
        for m in matrices
        if id(m) in last
    ]
