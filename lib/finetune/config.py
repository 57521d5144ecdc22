"""FinetuneConfig: every flag of script/finetune.py, checked before any weight is read."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import TOKENS_AT_ONCE
from ..data import find_corpus
from ..errors import RunError
from ..flags import flag
from ..load import choose_device
from ..precision import fast_dtype
from ..shared_flags import DISTILL, SharedFlags

METHODS = ("lora", "full")
PASSES = ("auto", "float32", "bfloat16")
ALL = "all"

# What takes less of a GPU's memory, by the stage that ran out of it.
RELIEF = {
    "load": "a GPU with room for the model (--device), or --method lora",
    "teacher": "a GPU with room for the teacher's largest block and its head (--device)",
    "train": "--batch_size 1, a shorter --seqlen, or --method lora",
}


def optimisers() -> list[str]:
    """The names that the Trainer knows."""
    from transformers.training_args import OptimizerNames  # takes a moment to import

    return [each.value for each in OptimizerNames]


@dataclass(frozen=True)
class FinetuneConfig(SharedFlags):
    """One fine-tuning. Each field is the flag of its name, as in lib/run_flags.py.

    Raises RunError on construction for a value that cannot be honoured.
    """

    command = "script/finetune.py"
    purpose = "Fine-tuning of a pruned language model with its zeros kept (AlphaPruning)."
    apart = ("cache_dir", "save", "save_model", "quiet", "activation_memory", "restart", "save_steps")
    first = ("model", "method", "data", "save_model")

    model: str = flag("", "the pruned model: local folder or hub name", group="model")
    dtype: str = flag(
        "auto", "compute dtype of forward and backward passes; auto: bfloat16 where the processor multiplies in it, "
        "else float32", group="model", choices=lambda: list(PASSES),
    )  # fmt: skip
    method: str = flag(
        "lora", "what is trained: low-rank updates of the matrices, or every weight left", group="method",
        choices=lambda: list(METHODS),
    )  # fmt: skip
    rank: int = flag(8, "rank of the updates", group="method", least=1)
    alpha: float = flag(16.0, "LoRA's alpha: updates are scaled by alpha / rank", group="method", above=0)
    lora_targets: tuple[str, ...] = flag(
        (ALL,), "names of the matrices to update, such as q_proj v_proj, or all", group="method"
    )
    keep_adapter: bool = flag(
        False, "train and save an ordinary adapter of peft, without the mask, and merge nothing", group="method"
    )
    teacher: str | None = flag(
        None, "the dense model, whose distribution is aimed at too; it is read block by block", group="method",
        shown="none",
    )  # fmt: skip
    distill: float | None = flag(
        None, "share of the loss that is the divergence from the teacher, in (0, 1]", group="method",
        shown=f"{DISTILL} with a teacher",
    )  # fmt: skip
    data: str = flag(
        "c4", "training text: c4, wikitext2, ptb, pydoc, a path, or c4:PATH, as for --calib_data of main.py",
        group="training",
    )  # fmt: skip
    nsamples: int | None = flag(None, "training windows", group="training", least=1, shown="all, at most 1024")
    validation_windows: int = flag(
        16, "windows of the training text held out, to choose settings by; 0: none", group="training", least=0
    )
    seqlen: int | None = flag(
        None, "tokens a window", group="training", least=2,
        shown="the calibration's; without a record of the pruning 2048, or the model's limit",
    )  # fmt: skip
    learning_rate: float = flag(1e-4, "at the start; it falls to zero linearly", group="training", above=0)
    weight_decay: float = flag(0.0, "of the optimiser, for matrices", group="training", least=0)
    optim: str = flag("adamw_torch", "optimiser, by the Trainer's name for it", group="training", choices=optimisers)
    epochs: float = flag(1.0, "passes over the training windows", group="training", above=0)
    batch_size: int = flag(1, "windows a pass, in each process", group="training", least=1)
    gradient_accumulation: int = flag(8, "forward and backward passes per optimiser step", group="training", least=1)
    seed: int = flag(0, "seed of the windows, of their order and of the updates", group="training", least=0)
    save_model: str = flag("", "folder for the fine-tuned checkpoint", group="output", metavar="DIR")
    save_steps: int = flag(
        100, "optimiser steps between checkpoints, from which a broken run resumes", group="large models", least=1
    )
    activation_memory: float | None = flag(
        None, "GB of the teacher's states kept in memory, the rest in a file", group="large models", least=0,
        shown="a quarter of what is free", metavar="GB",
    )  # fmt: skip
    restart: bool = flag(
        False, "begin anew instead of going on where the same command was broken off", group="large models"
    )

    def __post_init__(self):
        self.make_tuples()
        self.check_each("model", "save_model")
        self._check_combinations()
        find_corpus("--data", self.data)
        self._check_folders()
        self.check_shared()

    def _check_combinations(self) -> None:
        if self.distill is not None and self.teacher is None:
            raise RunError(f"--distill {self.distill:g}: needs --teacher, the model to learn from")
        if self.distill is not None and not 0 < self.distill <= 1:
            raise RunError(f"--distill {self.distill:g}: must lie in (0, 1], the teacher's share of the loss")
        if self.method != "lora":
            for name in ("rank", "alpha", "lora_targets", "keep_adapter"):
                if getattr(self, name) != getattr(type(self), name):
                    raise RunError(f"--{name}: is of --method lora, and this is --method {self.method}")
        if self.keep_adapter and self.save_dtype != "auto":
            raise RunError("--save_dtype: is of a checkpoint, and --keep_adapter saves none")

    def _check_folders(self) -> None:
        out = Path(self.save_model).resolve()
        for name in ("model", "teacher"):
            if (path := getattr(self, name)) and Path(path).exists() and Path(path).resolve().is_relative_to(out):
                raise RunError(f"--save_model {self.save_model}: holds --{name} {path}; name another folder")

    @property
    def share(self) -> float:
        """The teacher's share of the loss."""
        if self.teacher is None:
            return 0.0
        return DISTILL if self.distill is None else self.distill

    @property
    def passes(self) -> torch.dtype:
        """The type that forward and backward passes multiply in."""
        if self.dtype == "auto":
            return fast_dtype(torch.device(choose_device(self.device)).type)
        return getattr(torch, self.dtype)

    def held(self, checkpoint_dtype) -> str:
        """The type that the model is held and evaluated in: one that has every value of its files, and for a low-rank
        update on a GPU no wider than need be.
        """
        narrow = self.method == "lora" and torch.device(choose_device(self.device)).type == "cuda"
        fits = checkpoint_dtype == self.passes == torch.bfloat16
        return "bfloat16" if narrow and fits else "float32"

    def evaluation_batch(self, seqlen: int) -> int:
        """Windows, or requests, of so many tokens a pass that takes no gradients."""
        kind = torch.device(choose_device(self.device)).type
        return max(self.batch_size, TOKENS_AT_ONCE[kind] // seqlen)

    def relief(self, stage: str | None) -> str:
        """What takes less of a GPU's memory at that stage."""
        return RELIEF.get(stage, "a shorter --seqlen")

    @property
    def run_name(self) -> str:
        """Readable, and unique to what decides the result."""
        return "-".join(["finetuned", Path(self.model).name, self.method, f"seed{self.seed}", self.digest])
