"""FinetuneConfig: every flag of script/finetune.py, checked before any weight is read."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import TOKENS_AT_ONCE
from ..data import ADD_BOS, find_corpus
from ..errors import RunError
from ..flags import Flags, flag
from ..load import choose_device, locate
from ..precision import fast_dtype
from ..zero_shot import PAPER

METHODS = ("lora", "full")
PASSES = ("auto", "float32", "bfloat16")
SAVED = ("auto", "float32", "bfloat16", "float16")
ALL = "all"
DISTILL = 0.5  # where there is a teacher and nothing is said

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
class FinetuneConfig(Flags):
    """One fine-tuning. Each field is the flag of its name, as in lib.config.RunConfig.

    Raises RunError on construction for a value that cannot be honoured.
    """

    command = "script/finetune.py"
    purpose = "Fine-tuning of a pruned language model with its zeros kept (AlphaPruning)."
    apart = ("cache_dir", "save", "save_model", "quiet", "activation_memory", "restart", "save_steps")

    model: str = flag("", "the pruned model: local folder or hub name")
    data: str = flag("c4", "training text: c4, wikitext2, ptb, pydoc, a path, or c4:PATH")
    save_model: str = flag("", "folder for the fine-tuned checkpoint")
    method: str = flag("lora", "what is trained: low-rank updates, or every weight left", choices=lambda: list(METHODS))
    rank: int = flag(8, "rank of the updates")
    alpha: float = flag(16.0, "an update counts alpha / rank times")
    lora_targets: tuple[str, ...] = flag((ALL,), "names of the modules to update, such as q_proj v_proj, or all")
    keep_adapter: bool = flag(False, "train and save an ordinary adapter of peft, without the mask, and merge nothing")
    learning_rate: float = flag(1e-4, "at the start; it falls to zero linearly")
    weight_decay: float = flag(0.0, "of the optimiser, for matrices")
    optim: str = flag("adamw_torch", "optimiser, by the Trainer's name for it", choices=optimisers)
    epochs: float = flag(1.0, "passes over the training windows")
    nsamples: int | None = flag(None, "training windows (default: all there are, at most 1024)")
    validation_windows: int = flag(16, "windows of the training text held out, to choose settings by; 0: none")
    seqlen: int | None = flag(None, "tokens a window (default: the calibration's, else 2048 or the model's limit)")
    batch_size: int = flag(1, "windows a pass, in each process")
    gradient_accumulation: int = flag(8, "passes a step")
    teacher: str | None = flag(None, "the dense model, whose distribution is aimed at too; it is read block by block")
    distill: float | None = flag(None, "share of the loss that is the divergence from the teacher (default: 0.5)")
    seed: int = flag(0, "seed of the windows, of their order and of the updates")
    eval_wikitext: bool = flag(True, "report perplexity on --eval_data, before and after")
    eval_data: str = flag("wikitext2", "evaluation text: wikitext2, c4, ptb, pydoc, a path, or c4:PATH")
    eval_windows: int | None = flag(None, "evaluate the first windows only (default: all)")
    add_bos: str = flag(
        "once", "BOS in front of the text, as its tokenizer has it, or of every window", choices=lambda: list(ADD_BOS)
    )
    eval_zero_shot: bool = flag(False, "report accuracy on --tasks, before and after")
    tasks: tuple[str, ...] = flag(
        PAPER, "zero-shot tasks: names or groups of lm_eval, or .yaml files and folders of your own"
    )
    task_limit: int | None = flag(None, "evaluate the first documents of each task only (default: all)")
    device: str = flag("auto", "auto (cuda where there is one), cpu, cuda, cuda:N")
    dtype: str = flag(
        "auto", "of the passes; auto: bfloat16 where the processor multiplies in it", choices=lambda: list(PASSES)
    )
    cache_dir: str = flag("llm_weights", "folder for downloaded models and data")
    trust_remote_code: bool = flag(False, "allow code that comes with a model from the hub")
    save: str = flag("results", "folder for results")
    save_dtype: str = flag(
        "auto", "dtype of the checkpoint; auto: each tensor's own in the files", choices=lambda: list(SAVED)
    )
    save_steps: int = flag(100, "steps from one state that a broken run goes on from to the next")
    activation_memory: float | None = flag(
        None, "GB of the teacher's states kept in memory, the rest in a file (default: a quarter of what is free)"
    )
    restart: bool = flag(False, "begin anew instead of going on where the same command was broken off")
    quiet: bool = flag(False, "no log and no progress bars")

    def __post_init__(self):
        self.make_tuples("lora_targets", "tasks")
        self.check_given("model", "save_model")
        self.check_least(
            rank=1, nsamples=1, validation_windows=0, seqlen=2, batch_size=1, gradient_accumulation=1, seed=0,
            eval_windows=1, task_limit=1, save_steps=1, weight_decay=0, activation_memory=0,
        )  # fmt: skip
        self.check_above_zero("alpha", "learning_rate", "epochs")
        self._check_combinations()
        choose_device(self.device)
        find_corpus("--data", self.data)
        if self.eval_wikitext:
            find_corpus("--eval_data", self.eval_data)
        self._check_folders()
        locate(self.model, self.cache_dir)

    def _check_combinations(self) -> None:
        if self.distill is not None and self.teacher is None:
            raise RunError(f"--distill {self.distill:g}: needs --teacher, the model to learn from")
        if self.distill is not None and not 0 < self.distill <= 1:
            raise RunError(f"--distill {self.distill:g}: must lie in (0, 1], the teacher's share of the loss")
        if self.method != "lora":
            for name in ("rank", "alpha", "lora_targets", "keep_adapter"):
                if getattr(self, name) != getattr(type(self), name):
                    raise RunError(f"--{name}: is of --method lora, and this is --method {self.method}")
        if self.eval_zero_shot:
            self.check_named("tasks")
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
