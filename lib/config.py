"""RunConfig: every flag of the command, checked before any weight is read."""

from dataclasses import dataclass, fields
from pathlib import Path

import torch

from .allocation import ALLOCATIONS
from .allocation.base import Allocation
from .allocation.budget import S_MAX, S_MIN
from .data import SAMPLED, find_corpus
from .errors import RunError
from .flags import AUTO, fields_of, flag_of
from .load import choose_device
from .masks import Pattern
from .metrics import METRICS
from .options import Option, options_of
from .pruners import PRUNERS
from .run_flags import OPTIONED, RECOVERY_WINDOWS, RunFlags, prune_methods
from .shared_flags import DISTILL

TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 8192}  # a batch that stays in a CPU's caches, and that fills a GPU

# What takes less of a GPU's memory, by the stage that ran out of it.
RELIEF = {
    "sample": "no text of the model's own (--calib_data, --calib_self, --recover_self)",
    "load": "a GPU with room for the model (--device)",
    "calibrate": "fewer windows (--nsamples, --calib_self)",
    "statistics": "a pruner without Gram matrices, such as wanda",
    "dense": "fewer windows (--nsamples, --calib_self), or no --asymmetry and no --recover",
    "prune": "another pruner (wanda takes least)",
    "recover": "no --recover",
    "fisher": "no --fisher",
    "allocate": "an allocation that measures nothing, such as ww",
}

# Fields that an analysis reads.
ANALYSIS = (
    "model", "device", "trust_remote_code", "ww_metric", "ww_metric_cache", "cache_dir", "analyze_only", "plot", "save",
    "quiet",
)  # fmt: skip
# Fields that come after the sparsities are known, where --plan_only stops.
AFTER_PLAN = (
    "recover", "eval_wikitext", "eval_data", "eval_windows", "eval_dense", "eval_zero_shot", "tasks", "task_limit",
    "save_model", "save_dtype", "restart",
)  # fmt: skip


@dataclass(frozen=True)
class RunConfig(RunFlags):
    """One run: the flags of lib/run_flags.py, checked, and what follows from them.

    Raises RunError on construction for a value that cannot be honoured.
    """

    def __post_init__(self):
        self.make_tuples()
        object.__setattr__(self, "recover", tuple(sorted(self.recover)))  # whatever the order, it is one run
        self.check_each("model", *([] if self.analyze_only else ["prune_method"]))
        self._check_ratio()
        self.check_named("ww_metric")
        if self.analyze_only and self.plan_only:
            raise RunError("--plan_only: stops before pruning, and --analyze_only before allocating; give one")
        if not self.analyze_only:
            self._check_method()
            self._check_recovery()
            self._check_streaming()
            if self.asks("eval_dense") and not (self.eval_wikitext or self.eval_zero_shot):
                raise RunError(
                    "--eval_dense: needs the evaluation that --no-eval_wikitext turns off, or --eval_zero_shot"
                )
            if self.calibrated and not self.samples_calibration:
                find_corpus("--calib_data", self.calib_data)
            if self.distils:
                # What the dense model writes is drawn from its distribution, and has nothing to tell beside it.
                usual = 1.0 if self.samples_calibration else DISTILL
                object.__setattr__(self, "distill", float(usual if self.distill is None else self.distill))
        self.check_shared()

    def _check_ratio(self) -> None:
        given = self.sparsity_ratio
        if given is not None and not S_MIN <= given <= S_MAX:
            raise RunError(
                f"--sparsity_ratio {given:g}: must lie in [{S_MIN:g}, {S_MAX:g}], the share of weights to remove"
            )
        if self.analyze_only:
            return
        pattern, ratio = Pattern.parse(self.sparsity_type)
        if self._allocation.given:
            return  # whose mean is known with the model
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

    def _check_method(self) -> None:
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
        for method, entry in ALLOCATIONS.items():
            for option in entry.options:
                value = getattr(self, option.name)
                if option.read and value is None and method == self.allocation:
                    raise RunError(f"--{option.name}: is missing; --prune_method {self.prune_method} reads it")
                if option.read and value is not None and method != self.allocation:
                    raise RunError(f"--{option.name} {value}: is for --prune_method {self.pruner}_{method}")

    def _check_recovery(self) -> None:
        if not self.recover or (len(self.recover) > 1 and "none" in self.recover):
            raise RunError(
                f"--recover {' '.join(self.recover)}: none goes with no other; give none, block, model or both"
            )
        if self.recovers and self.recover_nsamples is not None and self.recover_nsamples < self.nsamples:
            least = f"--nsamples {self.nsamples}"
            raise RunError(
                f"--recover_nsamples {self.recover_nsamples}: is less than {least}, of which recovery sees all"
            )
        read = self.effective()
        if read["recover_self"] is not None and read["recover_self"] < read["calib_self"]:
            raise RunError(
                f"--recover_self {self.recover_self}: is less than --calib_self {self.calib_self}, of which recovery "
                "sees all"
            )
        if self.recover_self == self.calib_self:  # what it is by default, by one name
            object.__setattr__(self, "recover_self", None)
        for name, more in (("calib_self", "--nsamples"), ("recover_self", "--recover_nsamples")):
            if read[name] and self.samples_calibration:
                already = f"--calib_data {SAMPLED} is the model's own text already"
                raise RunError(f"--{name} {read[name]}: {already}; give more {more}")

    def _check_streaming(self) -> None:
        if self.stream and self.save_model is None and not self.plan_only:
            raise RunError("--stream: needs --save_model, the folder that the pruned blocks are written to")
        if self.stream and self.samples_text:
            read = self.effective()
            name = next(name for name in ("calib_self", "recover_self", "calib_data") if read[name])
            raise RunError(f"--stream: holds one block at a time, while --{name} {read[name]} takes the whole model")
        if self.stream and self.distils:
            raise RunError("--stream: holds one block at a time, while --recover model trains the whole model")

    @property
    def pruner(self) -> str:
        return prune_methods()[self.prune_method][0]

    @property
    def allocation(self) -> str:
        return prune_methods()[self.prune_method][1]

    @property
    def _allocation(self) -> Allocation:
        return ALLOCATIONS[self.allocation]

    @property
    def _metric_options(self) -> list[Option]:
        return [option for name in self.ww_metric for option in METRICS[name].options]

    @property
    def scored(self) -> bool:
        """Whether the allocation reads a metric."""
        return self._allocation.needs_scores

    @property
    def calibrated(self) -> bool:
        """Whether the pruner, the allocation or the recovery reads activations."""
        needs = {self._allocation.needs, *([] if self.plan_only else [PRUNERS[self.pruner].needs])}
        return needs != {"nothing"} or self.recovers or self.held_out > 0

    @property
    def recovers(self) -> bool:
        """Whether what pruning leaves is trained; where it takes nothing, nothing is."""
        return "none" not in self.recover and self.sparsity != 0 and not self.plan_only

    @property
    def recovers_blocks(self) -> bool:
        """Whether each block is trained."""
        return self.recovers and "block" in self.recover

    @property
    def distils(self) -> bool:
        """Whether the whole model is trained."""
        return self.recovers and "model" in self.recover

    @property
    def samples_text(self) -> bool:
        """Whether the dense model writes what is calibrated or trained on."""
        return not self.analyze_only and self.windows_written > 0

    @property
    def windows_written(self) -> int:
        """Windows that the dense model writes in all."""
        if self.samples_calibration:
            return self.nsamples + self.held_out + self.recovery_windows
        return sum(self.sampled_windows)

    @property
    def recovery_windows(self) -> int:
        """Windows beside --nsamples that recovery trains on."""
        return (self.recover_nsamples or RECOVERY_WINDOWS * self.nsamples) - self.nsamples if self.recovers else 0

    @property
    def sampled_windows(self) -> tuple[int, int, int]:
        """Windows that the dense model writes: to calibrate on, held out, and of recovery beside these."""
        read = self.effective()
        calibration, recovery = read["calib_self"], read["recover_self"]
        beside = (recovery or calibration) - calibration
        return calibration, self._held_out_of(calibration), beside

    @property
    def _plans_on_trial(self) -> bool:
        """Whether sparsities are chosen by pruning on trial."""
        chosen = AUTO in [getattr(self, option.name) for option in self._allocation.options]
        return self._allocation.uses_trials or chosen

    @property
    def held_out(self) -> int:
        """Calibration windows beside --nsamples on which something is chosen."""
        return self._held_out_of(self.nsamples)

    def _held_out_of(self, windows: int) -> int:
        """Half as many, or none."""
        asymmetry = self.asymmetry == AUTO and not self.plan_only
        return -(-windows // 2) if self._plans_on_trial or asymmetry else 0

    @property
    def stands_in(self) -> bool:
        """Whether a cheaper pruner measures sparsities, unless the target is asymmetric (lib/trials.py)."""
        return self._allocation.uses_trials and PRUNERS[self.pruner].needs == "gram" and self.asymmetry in (0, AUTO)

    @property
    def weighs_rows(self) -> bool:
        """Whether the pruner weighs errors by --fisher."""
        return self.fisher > 0 and "fisher" not in self.unread()

    @property
    def takes_gradients(self) -> bool:
        return self.weighs_rows or self._allocation.uses_trials

    @property
    def samples_calibration(self) -> bool:
        """Whether the dense model writes the calibration text."""
        return self.calibrated and self.calib_data == SAMPLED

    @property
    def streamed_windows(self) -> int:
        """Windows whose hidden states are held while blocks are pruned."""
        calibration, _, beside = self.sampled_windows
        if self.recovers_blocks:
            return self.nsamples + self.recovery_windows + calibration + beside
        return self.nsamples + calibration if self.calibrated else 0

    @property
    def beside_weights(self) -> tuple[int, int]:
        """What the run holds at most beside the prunable weights: copies of them in their own dtype, and further bytes
        for each of them: training's value, gradient, two moments and mask (docs/scaling.md).
        """
        return (0, 17) if self.distils else (int(self.held_out > 0), 0)

    @property
    def options(self) -> dict[str, object]:
        """The parameters of all allocations, pruners and metrics; of a file, what it held when this was made."""
        return {
            name: self.contents.get(name) if option.read else getattr(self, name)
            for name, option in options_of(*OPTIONED).items()
        }

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(self.sparsity_type)[0]

    @property
    def sparsity(self) -> float | None:
        """The target S: --sparsity_ratio, or N/M where it is left out; None where the allocation is told it."""
        if self.sparsity_ratio is not None or self._allocation.given:
            return self.sparsity_ratio
        return Pattern.parse(self.sparsity_type)[1]

    def unused_flags(self) -> list[str]:
        """Flags that were changed from their default but that this run does not read."""
        unread = self.unread()
        return [flag_of(f) for f in fields(self) if f.name in unread and getattr(self, f.name) != f.default]

    def unread(self) -> set[str]:
        """Fields that this run does not read."""
        if self.analyze_only:
            return {*fields_of(self)} - {*ANALYSIS} - {option.name for option in self._metric_options}
        own = {option.name for entry in (self._allocation, PRUNERS[self.pruner]) for option in entry.options}
        if self.scored or self.plot:
            own |= {option.name for option in self._metric_options}
        unread = super().unread() | ({*options_of(*OPTIONED)} - own)
        if self.plan_only:
            unread |= {*AFTER_PLAN, *(("use_variant", "asymmetry", "fisher") if not self._plans_on_trial else ())}
            if self.stands_in and self.asymmetry != AUTO:
                unread |= {"fisher"}
        if self.sparsity == 0:
            unread |= {"recover"}
        if not self._allocation.reads_mapping:
            unread |= {"mapping_type"}
        if not self.scored and not self.plot:
            unread |= {"ww_metric", "ww_metric_cache"}
        if not (self.calibrated or self.eval_wikitext or self.eval_zero_shot):
            unread |= {"add_bos"}
        if self.pattern.group is not None:
            unread |= {"fisher"}  # N of every M are chosen within a row
        return unread

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
        if not (self.in_parts or self.distils or self.samples_text):
            helps = f"--stream, which holds one block at a time, or {helps}"
        return helps

    @property
    def run_name(self) -> str:
        """Readable, and unique to what decides the result: the end is a digest of those flags."""
        if self.analyze_only:
            return "-".join(["analysis", Path(self.model).name, self.digest])
        parts, read = ["plan"] if self.plan_only else [], self.effective()
        parts += [self.prune_method, *([] if self.sparsity is None else [f"{self.sparsity:g}"])]
        if self.sparsity_type != "unstructured":
            parts.append(self.sparsity_type.replace(":", "of"))
        if self.scored:
            parts += [*self.ww_metric, *(option.part(read[option.name]) for option in self._metric_options)]
        for option in (*self._allocation.options, *PRUNERS[self.pruner].options):
            if not option.read:
                parts.append(option.part(read[option.name]))
        if read["asymmetry"]:
            parts.append(f"asymmetry{_readable(read['asymmetry'])}")
        if read["fisher"]:
            parts.append(f"fisher{read['fisher']:g}")
        if "none" not in read["recover"]:
            parts.append("_".join(["recover", *read["recover"]]))
        if read["add_bos"] != "once":
            parts.append(f"bos_{read['add_bos']}")
        return "-".join([*parts, f"seed{self.seed}", self.digest])


def _readable(value: float | str) -> str:
    return value if value == AUTO else f"{value:g}"
