"""RunConfig: every flag of the command, checked before any weight is read."""

from dataclasses import dataclass, fields
from pathlib import Path

import torch

from .allocation import ALLOCATIONS
from .allocation.base import MAPPINGS
from .allocation.budget import S_MAX, S_MIN
from .data import ADD_BOS, OWN_TEXT, find_corpus
from .errors import RunError
from .flags import Flags, flag, flag_of
from .load import choose_device, locate
from .masks import Pattern
from .metrics import METRICS
from .pruners import PRUNERS
from .zero_shot import PAPER

RECOVERIES = ("none", "block", "model")
RECOVERY_WINDOWS = 2  # in multiples of --nsamples
AUTO = "auto"  # chosen on held-out calibration windows
DTYPES = ("auto", "float32", "bfloat16", "float16")
TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 8192}  # a batch that stays in a CPU's caches, and that fills a GPU

# What takes less of a GPU's memory, by the stage that ran out of it.
RELIEF = {
    "sample": "a corpus to calibrate on (--calib_data)",
    "load": "a GPU with room for the model (--device)",
    "calibrate": "fewer --nsamples",
    "statistics": "a pruner without Gram matrices, such as wanda",
    "dense": "fewer --nsamples, or no --asymmetry and no --recover",
    "prune": "another pruner (wanda takes least)",
    "recover": "no --recover",
    "fisher": "no --fisher",
    "allocate": "an allocation that measures nothing, such as ww",
}


def prune_methods() -> dict[str, tuple[str, str]]:
    """Every --prune_method to its (pruner, allocation): a pruner's name alone is uniform."""
    methods = {pruner: (pruner, "uniform") for pruner in PRUNERS}
    for allocation in ALLOCATIONS:
        if allocation != "uniform":
            methods |= {f"{pruner}_{allocation}": (pruner, allocation) for pruner in PRUNERS}
    return methods


@dataclass(frozen=True)
class RunConfig(Flags):
    """One run. Each field is the flag of its name; `metadata` holds its help, choices and further spellings.

    Raises RunError on construction for a value that cannot be honoured.
    """

    command = "main.py"
    purpose = "Layer-wise pruning of large language models (AlphaPruning)."
    apart = ("cache_dir", "save", "save_model", "quiet", "plot", "activation_memory", "restart")

    model: str = flag("", "hub name, local folder, .gguf file, or 'smollm2' (the embedded model) or 'gemma3-270m'")
    prune_method: str = flag("", "pruner, alone (uniform) or with an allocation", choices=lambda: list(prune_methods()))
    sparsity_ratio: float | None = flag(None, "share of the prunable weights to remove, in [0, 0.99]")
    sparsity_type: str = flag("unstructured", "unstructured, or N:M: N of every M weights along the input removed")
    use_variant: bool = flag(False, "wanda: a cumulative-score threshold in place of a fixed count a row")
    ww_metric: tuple[str, ...] = flag(
        ("alpha_peak",), "metric of layer quality for *_ww; with --analyze_only one or more", flags=("--WW_metric",),
        choices=lambda: list(METRICS),
    )  # fmt: skip
    ww_metric_cache: str | None = flag(
        None, "folder of the metric's values (default: one a model under --cache_dir)", flags=("--WW_metric_cache",)
    )
    epsilon: float | str = flag(0.2, "range of the pruning ratios around 1 for *_ww, in [0, 1], or auto")
    owl_lambda: float | str = flag(0.08, "half the range of sparsities for *_owl, or auto")
    owl_m: float = flag(5.0, "an outlier for *_owl is this many times the mean")
    dlp_alpha: float | str = flag(0.15, "half the range of sparsities for *_dlp, or auto")
    lsa_alpha: float | str = flag(0.15, "half the range of sparsities for *_lsa, or auto")
    ramp_beta: float | str = flag(0.01, "what the sparsity grows by from block to block for *_ramp, or auto")
    search_strength: float | str = flag(
        0.6, "how far *_search follows its measurements: 0 is uniform, 1 equal marginal losses; or auto"
    )
    asymmetry: float | str = flag(
        0.0, "aim sparsegpt and alps this part of the way at the dense model's outputs, in [0, 1], or auto"
    )
    fisher: float = flag(
        0.0, "sparsegpt and alps weigh each output's error by its Fisher information to this power, in [0, 1]"
    )
    recover: tuple[str, ...] = flag(
        ("none",), "train what pruning has left: block towards the dense block, model towards the dense model, or both",
        choices=lambda: list(RECOVERIES),
    )  # fmt: skip
    recover_nsamples: int | None = flag(
        None, f"windows that --recover trains on (default: {RECOVERY_WINDOWS} times --nsamples)"
    )
    mapping_type: str = flag("block_wise", "where sparsities may differ", choices=lambda: list(MAPPINGS))
    calib_data: str = flag("c4", "calibration text: c4, wikitext2, ptb, pydoc, a path, c4:PATH, or self")
    nsamples: int = flag(128, "calibration windows")
    seqlen: int | None = flag(None, "tokens a window (default: 2048, or the model's limit)")
    seed: int = flag(0, "seed of the calibration windows")
    eval_wikitext: bool = flag(True, "report perplexity on --eval_data")
    eval_data: str = flag("wikitext2", "evaluation text: wikitext2, c4, ptb, pydoc, a path, or c4:PATH")
    add_bos: str = flag(
        "once", "BOS in front of the text, as its tokenizer has it, or of every window", choices=lambda: list(ADD_BOS)
    )
    eval_windows: int | None = flag(None, "evaluate the first windows only (default: all)")
    eval_dense: bool = flag(False, "also evaluate before pruning")
    eval_zero_shot: bool = flag(False, "report accuracy on --tasks")
    tasks: tuple[str, ...] = flag(
        PAPER, "zero-shot tasks: names or groups of lm_eval, or .yaml files and folders of your own"
    )
    task_limit: int | None = flag(None, "evaluate the first documents of each task only (default: all)")
    batch_size: int | None = flag(None, "windows a forward pass (default: about 1024 tokens on the CPU, 8192 on cuda)")
    device: str = flag("auto", "auto (cuda where there is one), cpu, cuda, cuda:N")
    dtype: str = flag("auto", "auto: float32 on the CPU, on cuda as the checkpoint says", choices=lambda: list(DTYPES))
    cache_dir: str = flag("llm_weights", "folder for downloaded models and data, and metric values")
    trust_remote_code: bool = flag(False, "allow code that comes with a model from the hub")
    analyze_only: bool = flag(False, "measure every --WW_metric and stop; reads a checkpoint tensor by tensor")
    plot: bool = flag(False, "draw spectra, metrics and sparsities into the results, with a report.html")
    save: str = flag("results", "folder for results")
    save_model: str | None = flag(None, "folder for the pruned checkpoint (default: not saved)")
    save_dtype: str = flag(
        "auto", "dtype of the pruned checkpoint; auto: each tensor's own in the files", choices=lambda: list(DTYPES)
    )
    stream: bool = flag(False, "hold one block at a time; writes --save_model block by block, and can be resumed")
    activation_memory: float | None = flag(
        None, "GB of activations and trials that --stream keeps in memory (default: a quarter of what is free)"
    )
    restart: bool = flag(False, "with --stream: begin anew instead of going on after the last finished block")
    quiet: bool = flag(False, "no log and no progress bars")

    def __post_init__(self):
        self.make_tuples("ww_metric", "tasks", "recover")
        object.__setattr__(self, "recover", tuple(sorted(self.recover)))  # whatever the order, it is one run
        self.check_given("model", *([] if self.analyze_only else ["prune_method"]))
        self._check_numbers()
        self._check_combinations()
        choose_device(self.device)
        if not self.analyze_only:
            self._check_pattern()
            if self.calibrated and not self.writes_own_text:
                find_corpus("--calib_data", self.calib_data)
            if self.eval_wikitext:
                find_corpus("--eval_data", self.eval_data)
        locate(self.model, self.cache_dir)

    def _check_numbers(self) -> None:
        ratio = self.sparsity_ratio
        if ratio is not None and not S_MIN <= ratio <= S_MAX:
            raise RunError(
                f"--sparsity_ratio {ratio:g}: must lie in [{S_MIN:g}, {S_MAX:g}], the share of weights to remove"
            )
        for name, low, high in (
            ("epsilon", 0, 1), ("owl_lambda", 0, 1), ("dlp_alpha", 0, 1), ("lsa_alpha", 0, 1), ("ramp_beta", -1, 1),
            ("search_strength", 0, 2), ("asymmetry", 0, 1), ("fisher", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value == AUTO:
                continue
            if not isinstance(value, (int, float)):
                raise RunError(f"--{name}: '{value}' is neither a number nor {AUTO}")
            if not low <= value <= high:
                raise RunError(f"--{name} {value:g}: must lie in [{low}, {high}]")
        if not self.owl_m > 0:
            raise RunError(f"--owl_m {self.owl_m:g}: must be above 0")
        self.check_least(
            nsamples=1, recover_nsamples=1, seqlen=2, eval_windows=1, task_limit=1, batch_size=1, seed=0
        )  # fmt: skip

    def _check_pattern(self) -> None:
        pattern, ratio = Pattern.parse(self.sparsity_type)
        given = self.sparsity_ratio
        if ratio is None:
            if given is None:
                raise RunError("--sparsity_ratio: is missing; give the share of weights to remove, such as 0.7")
        elif given is not None:
            # With an allocation, M is the flag's and N the nearest to the mean: only a contradiction is refused.
            allowed = 1e-6 if self.allocation == "uniform" else 1 / pattern.group - 1e-6
            if abs(given - ratio) > allowed:
                raise RunError(
                    f"--sparsity_ratio {given:g}: contradicts --sparsity_type {self.sparsity_type}, which removes "
                    f"{ratio:g}; leave the ratio out or choose another N:M"
                )

    def _check_combinations(self) -> None:
        self.check_named("ww_metric")
        self.check_least(activation_memory=0)
        if self.analyze_only:
            return
        if self.stream and self.save_model is None:
            raise RunError("--stream: needs --save_model, the folder that the pruned blocks are written to")
        if self.stream and self.writes_own_text:
            raise RunError(f"--stream: holds one block at a time, while --calib_data {OWN_TEXT} takes the whole model")
        if not self.recover or (len(self.recover) > 1 and "none" in self.recover):
            raise RunError(
                f"--recover {' '.join(self.recover)}: none goes with no other; give none, block, model or both"
            )
        if self.stream and "model" in self.recover:
            raise RunError("--stream: holds one block at a time, while --recover model trains the whole model")
        if self.recovers and self.recover_nsamples is not None and self.recover_nsamples < self.nsamples:
            least = f"--nsamples {self.nsamples}"
            raise RunError(
                f"--recover_nsamples {self.recover_nsamples}: is less than {least}, of which recovery sees all"
            )
        if len(self.ww_metric) > 1:
            raise RunError(f"--WW_metric {' '.join(self.ww_metric)}: pruning takes one; several need --analyze_only")
        if self.use_variant and PRUNERS[self.pruner].variant is None:
            known = ", ".join(name for name in PRUNERS if PRUNERS[name].variant)
            raise RunError(f"--use_variant: --prune_method {self.prune_method} has no variant; only {known} has")
        if self.use_variant and self.sparsity_type != "unstructured":
            raise RunError(f"--use_variant: is not defined for --sparsity_type {self.sparsity_type}")
        for name in ("asymmetry", "fisher"):
            if getattr(self, name) and PRUNERS[self.pruner].needs != "gram":
                known = ", ".join(name for name in PRUNERS if PRUNERS[name].needs == "gram")
                raise RunError(
                    f"--{name} {_readable(getattr(self, name))}: is for {known}, which minimise errors of outputs"
                )
        if self.eval_dense and not (self.eval_wikitext or self.eval_zero_shot):
            raise RunError("--eval_dense: needs the evaluation that --no-eval_wikitext turns off, or --eval_zero_shot")
        if self.eval_zero_shot:
            self.check_named("tasks")

    @property
    def pruner(self) -> str:
        return prune_methods()[self.prune_method][0]

    @property
    def allocation(self) -> str:
        return prune_methods()[self.prune_method][1]

    @property
    def scored(self) -> bool:
        """Whether the allocation reads a metric."""
        return ALLOCATIONS[self.allocation].needs_scores

    @property
    def calibrated(self) -> bool:
        """Whether the pruner, the allocation or the recovery reads activations."""
        needs = {PRUNERS[self.pruner].needs, ALLOCATIONS[self.allocation].needs}
        return needs != {"nothing"} or self.recovers or self.held_out > 0

    @property
    def recovers(self) -> bool:
        """Whether what pruning leaves is trained."""
        return "none" not in self.recover

    @property
    def further(self) -> int:
        """Windows beside --nsamples that recovery trains on."""
        return (self.recover_nsamples or RECOVERY_WINDOWS * self.nsamples) - self.nsamples if self.recovers else 0

    @property
    def held_out(self) -> int:
        """Calibration windows beside --nsamples on which something is chosen: half as many, or none."""
        allocation = ALLOCATIONS[self.allocation]
        auto = AUTO in [self.asymmetry, *(self.options[name] for name in allocation.options)]
        return -(-self.nsamples // 2) if allocation.measured or auto else 0

    @property
    def weighs_rows(self) -> bool:
        """Whether the pruner weighs errors by --fisher."""
        return self.fisher > 0 and "fisher" not in self.unread()

    @property
    def takes_gradients(self) -> bool:
        return self.weighs_rows or ALLOCATIONS[self.allocation].measured

    @property
    def writes_own_text(self) -> bool:
        """Whether the dense model writes the calibration text."""
        return self.calibrated and self.calib_data == OWN_TEXT

    @property
    def streamed_windows(self) -> int:
        """Windows whose hidden states are held while blocks are pruned."""
        return self.nsamples + (self.further if "block" in self.recover else 0) if self.calibrated else 0

    @property
    def copies(self) -> int:
        """Of the prunable weights, what the run holds beside them at most: training has 17 bytes a weight."""
        return 8 if "model" in self.recover else int(self.held_out > 0)

    @property
    def options(self) -> dict[str, float | str]:
        """The parameters of all allocations."""
        return {name: getattr(self, name) for entry in ALLOCATIONS for name in ALLOCATIONS[entry].options}

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(self.sparsity_type)[0]

    @property
    def sparsity(self) -> float:
        """The target S: --sparsity_ratio, or N/M where it is left out."""
        return self.sparsity_ratio if self.sparsity_ratio is not None else Pattern.parse(self.sparsity_type)[1]

    def unused_flags(self) -> list[str]:
        """Flags that were changed from their default but that this run does not read."""
        unread = self.unread()
        return [flag_of(f) for f in fields(self) if f.name in unread and getattr(self, f.name) != f.default]

    def unread(self) -> set[str]:
        """Fields that this run does not read."""
        if self.analyze_only:
            read = ("model", "device", "trust_remote_code", "ww_metric", "ww_metric_cache", "cache_dir")
            read += ("analyze_only", "plot", "save", "quiet")
            return {f.name for f in fields(self)} - {*read}
        unread = [name for name in self.options if name not in ALLOCATIONS[self.allocation].options]
        if not ALLOCATIONS[self.allocation].granular:
            unread += ["mapping_type"]
        if not self.scored and not self.plot:
            unread += ["ww_metric", "ww_metric_cache"]
        if not self.calibrated:
            unread += ["calib_data", "nsamples"]
        if not self.recovers:
            unread += ["recover_nsamples"]
        if not self.eval_wikitext:
            unread += ["eval_data", "eval_windows"]
        if not self.eval_zero_shot:
            unread += ["tasks", "task_limit"]
        if not (self.calibrated or self.eval_wikitext or self.eval_zero_shot):
            unread += ["add_bos"]
        if self.pattern.group is not None:
            unread += ["fisher"]  # N of every M are chosen within a row
        if not self.stream:
            unread += ["activation_memory", "restart"]
        return set(unread)

    def batch(self, seqlen: int) -> int:
        """Windows a forward pass."""
        kind = torch.device(choose_device(self.device)).type
        return self.batch_size or max(1, TOKENS_AT_ONCE[kind] // seqlen)

    @property
    def in_parts(self) -> bool:
        """Whether the model is read in parts."""
        return self.stream or self.analyze_only

    def relief(self, stage: str | None) -> str:
        """What takes less of a GPU's memory at that stage."""
        helps = RELIEF.get(stage, "--batch_size 1")
        if stage == "statistics" and PRUNERS[self.pruner].needs != "gram":
            helps = "--batch_size 1"
        if not self.in_parts and "model" not in self.recover:
            helps = f"--stream, which holds one block at a time, or {helps}"
        return helps

    @property
    def run_name(self) -> str:
        """Readable, and unique to what decides the result: the end is a digest of those flags."""
        if self.analyze_only:
            return "-".join(["analysis", Path(self.model).name, self.digest])
        parts = [self.prune_method, f"{self.sparsity:g}"]
        if self.sparsity_type != "unstructured":
            parts.append(self.sparsity_type.replace(":", "of"))
        if self.scored:
            parts += self.ww_metric
        for name in ALLOCATIONS[self.allocation].options:
            parts.append(f"{'eps' if name == 'epsilon' else name}{_readable(getattr(self, name))}")
        if self.asymmetry:
            parts.append(f"asymmetry{_readable(self.asymmetry)}")
        if self.fisher:
            parts.append(f"fisher{self.fisher:g}")
        if self.recovers:
            parts.append("_".join(["recover", *self.recover]))
        if self.add_bos != "once":
            parts.append(f"bos_{self.add_bos}")
        return "-".join([*parts, f"seed{self.seed}", self.digest])


def _readable(value: float | str) -> str:
    return value if value == AUTO else f"{value:g}"
