"""What a run leaves behind: run.json, layers.csv, the published text file, a line in results.tsv, a summary."""

import csv
import io
import json
import math
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from .. import ranks
from ..activations import Store
from ..config import RunConfig
from ..errors import RunError
from ..memory import resident_peak
from ..model import LanguageModel
from ..precision import float32_matmul_precision
from .cache import METRICS_FOLDER, TEXTS_FOLDER
from .checkpoint import RECORD_FILE
from .files import append_line, check_folder, write_text

COLUMNS = (
    "run", "model", "method", "sparsity_type", "target", "achieved", "metric", "epsilon", "mapping_type", "seed",
    "dataset", "seqlen", "windows", "perplexity_dense", "perplexity", "seconds", "accuracy_dense", "accuracy",
)  # fmt: skip


def prepare(config: RunConfig) -> None:
    """Make sure, before hours of work, that everything the run will write can be written."""
    check_folder("--save", Path(config.save))
    if config.ww_metric_cache is not None:
        check_folder("--WW_metric_cache", Path(config.ww_metric_cache))
    caches_metric = config.ww_metric_cache is None and (config.analyze_only or config.plot or config.scored)
    for folder in [METRICS_FOLDER] * caches_metric + [TEXTS_FOLDER] * config.samples_text:
        check_folder("--cache_dir", Path(config.cache_dir))
        check_folder("--cache_dir", Path(config.cache_dir) / folder)
    if config.stream:
        check_folder("--save", run_folder(config))
    if config.stream and not config.plan_only:
        check_folder("--save_model", Path(config.save_model).resolve().parent)
    if config.save_model is not None and not config.plan_only:
        others = {"--save": config.save, "--WW_metric_cache": config.ww_metric_cache, "--cache_dir": config.cache_dir}
        check_checkpoint_folder(config.save_model, others)


def check_checkpoint_folder(save_model: str, others: dict[str, str | None]) -> None:
    """Make the folder of a checkpoint. Raises RunError for one that holds `others`, by their flags, or other files."""
    path = Path(save_model)
    for flag, other in others.items():
        if other is not None and Path(other).resolve().is_relative_to(path.resolve()):
            raise RunError(
                f"--save_model {path}: holds {flag} {other}, and a checkpoint replaces its folder; name another"
            )
    check_folder("--save_model", path)
    if any(path.iterdir()) and not (path / RECORD_FILE).is_file():
        raise RunError(f"--save_model {path}: holds files that are not a checkpoint of this tool; name another folder")


def run_folder(config: RunConfig) -> Path:
    """The run's own folder."""
    return Path(config.save) / config.run_name


def activation_store(config: RunConfig) -> Store | None:
    """The store of a streamed run's activations; None for a model in memory."""
    if not config.stream:
        return None
    limit = None if config.activation_memory is None else int(config.activation_memory * 1e9)
    return Store(run_folder(config), limit)


def layer_records(model: LanguageModel, scores: dict, targets: dict, reached: dict | None = None) -> list[dict]:
    """The `layers` of run.json, from the score (where there is one), target and share of zeros of each matrix, which a
    plan has not reached.
    """
    return [
        {
            "name": matrix.name, "block": matrix.block, "shape": list(matrix.shape), "score": scores.get(matrix.name),
            "target_sparsity": targets[matrix.name], "sparsity": reached and reached[matrix.name],
        }
        for matrix in model.matrices
    ]  # fmt: skip


def build_record(
    config: RunConfig,
    model: dict,
    layers: list[dict],
    perplexity: dict | None,
    seconds: dict[str, float],
    events: list[dict],
    searches: Sequence[dict] = (),
    zero_shot: dict | None = None,
) -> dict:
    """The contents of run.json.

    `layers` is that of `layer_records`; of an analysis it holds {name, block, shape, scores}. `searches` are what
    was tried on windows held out, in order; `zero_shot` is that of lib/zero_shot.py.
    """
    return {
        "run": config.run_name,
        "config": {flag: list(value) if isinstance(value, tuple) else value for flag, value in asdict(config).items()},
        "model": model,
        "sparsity": None if config.analyze_only else _sparsity(config, layers),
        "searches": list(searches),
        "perplexity": perplexity,
        "zero_shot": zero_shot,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "events": events,
        "environment": environment(model),
        "layers": layers,
    }


def by_block(layers: list[dict]) -> dict[int, list[dict]]:
    """The layers of each block."""
    blocks: dict[int, list[dict]] = {}
    for layer in layers:
        blocks.setdefault(layer["block"], []).append(layer)
    return blocks


def _sparsity(config: RunConfig, layers: list[dict]) -> dict:
    """Of all prunable weights and of each block's; of a plan its targets, and `achieved` is None."""
    target, key = config.sparsity, "target_sparsity" if config.plan_only else "sparsity"
    return {
        "target": overall_sparsity(layers, "target_sparsity") if target is None else target,
        "achieved": None if config.plan_only else overall_sparsity(layers),
        "blocks": [overall_sparsity(block, key) for block in by_block(layers).values()],
    }


def overall_sparsity(layers: list[dict], key: str = "sparsity") -> float:
    """Of all the weights in the layers of run.json."""
    sizes = [math.prod(layer["shape"]) for layer in layers]
    return sum(layer[key] * size for layer, size in zip(layers, sizes, strict=True)) / sum(sizes)


def peak_memory() -> dict[str, int]:
    """Largest resident set of this process so far and, on cuda, the largest allocation of each device."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"process": resident_peak() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    for index in range(torch.cuda.device_count()):
        peaks[f"cuda:{index}"] = torch.cuda.max_memory_allocated(index)
    return peaks


def environment(model: dict) -> dict:
    """Versions, devices and precision of the run."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        revision = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": model["device"],
        "device_name": _device_names(model["device"]),
        "dtype": model["dtype"],
        "float32_products": float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "processes": ranks.world_size(),
        "git_revision": revision,
    }


def _device_names(devices: str) -> str:
    """What the devices of `model` in run.json are called, each name once."""
    names = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
        for device in devices.split(", ")
    )
    return ", ".join(dict.fromkeys(names))


def write_run(config: RunConfig, record: dict) -> Path:
    """Write run.json and layers.csv, and the published text file once there is a perplexity. Returns the folder."""
    folder = run_folder(config)
    write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")
    write_text(folder / "layers.csv", _layers_table(record["layers"]))
    if record["perplexity"]:
        achieved, pruned = record["sparsity"]["achieved"], record["perplexity"]["pruned"]
        header = "method\tactual_sparsity\tppl_test\n"
        write_text(folder / _published_file(record), f"{header}{config.prune_method}\t{achieved:.4f}\t{pruned:.4f}\n")
    return folder


def _published_file(record: dict) -> str:
    """The name of the text file that the published code writes."""
    return f"perplexity_{record['config']['prune_method']}_sparsity_{record['sparsity']['target']:g}.txt"


def flatten_scores(layer: dict) -> dict:
    """A layer of run.json with an analysis's scores as fields of their own."""
    return {key: value for key, value in layer.items() if key != "scores"} | layer.get("scores", {})


def _layers_table(layers: list[dict]) -> str:
    """layers.csv: a column for each number of a layer, its shape as rows and columns, one metric a column."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    for index, layer in enumerate(layers):
        own = flatten_scores(layer)
        values = {"name": own.pop("name"), "block": own.pop("block")}
        values |= dict(zip(("rows", "columns"), own.pop("shape"), strict=True)) | own
        if index == 0:
            rows.writerow(values)
        rows.writerow("" if value is None else value for value in values.values())
    return table.getvalue()


def append_result(config: RunConfig, record: dict) -> None:
    """One line for the run at the end of results.tsv."""
    perplexity = record["perplexity"] or {}
    accuracy = record["zero_shot"]["mean"] if record["zero_shot"] else {}
    allocated = [*config.ww_metric, config.epsilon, config.mapping_type]
    values = (
        record["run"], config.model, config.prune_method, config.sparsity_type, record["sparsity"]["target"],
        f"{record['sparsity']['achieved']:.6f}", *(allocated if config.scored else ["", "", ""]), config.seed,
        *map(perplexity.get, ("dataset", "seqlen", "windows", "dense", "pruned")), f"{record['seconds']['total']:.1f}",
        *map(accuracy.get, ("dense", "pruned")),
    )  # fmt: skip
    line = "\t".join("" if value is None else str(value) for value in values) + "\n"
    append_line(Path(config.save) / "results.tsv", line, "\t".join(COLUMNS) + "\n")


def summary(record: dict) -> str:
    """The run as a small table for people."""
    config, folder = record["config"], Path(record["config"]["save"]) / record["run"]
    lines = _analysis_lines(record) if config["analyze_only"] else _pruning_lines(record)
    files = ["run.json", "layers.csv", *([_published_file(record)] if record.get("perplexity") else [])]
    if config["plot"]:
        files.append("report.html with its pictures")
    elif config["plan_only"]:
        files.append("plots/sparsity-depth.png")
    lines += ["", f"Results: {folder}/ ({', '.join(files)})"]
    if config["save_model"] and not config["plan_only"]:
        lines.append(f"Pruned model: {config['save_model']}/")
    if record["model"].get("stays_dense"):
        lines += ["", record["model"]["stays_dense"]]
    return "\n".join(lines)


def _pruning_lines(record: dict) -> list[str]:
    model, sparsity, perplexity = record["model"], record["sparsity"], record["perplexity"]
    method, blocks, planned = record["config"]["prune_method"], sparsity["blocks"], record["config"]["plan_only"]
    share = sparsity["target"] if planned else sparsity["achieved"]
    lines = [
        "",
        f"{method} on {model['id']}: {share:.2%} of {model['prunable_parameters']:,} prunable weights "
        f"{'to be removed, none is yet' if planned else 'removed'} ({model['coverage']:.1%} of the model is prunable)",
        "",
        f"{'':28}{'dense':>10}{'planned' if planned else 'pruned':>10}",
        f"{'share of zeros':28}{'':>10}{share:>10.4f}",
        f"{'  least pruned block':28}{'':>10}{min(blocks):>10.4f}",
        f"{'  most pruned block':28}{'':>10}{max(blocks):>10.4f}",
    ]
    if perplexity:
        dense = f"{perplexity['dense']:.3f}" if perplexity["dense"] else "-"
        name = f"perplexity, {Path(perplexity['dataset']).name}"
        lines.append(f"{name[:28]:28}{dense:>10}{perplexity['pruned']:>10.3f}")
        lines.append(f"{'  (lower is better)':28}")
    if record["zero_shot"]:
        lines += accuracy_lines(record["zero_shot"])
    if (bos := model.get("bos")) and bos["helps"]:
        lines += [
            "",
            f"Without BOS in front of every window these perplexities mean little: the model's loss on one is "
            f"{bos['loss_without_bos']:.3f}, with BOS {bos['loss_with_bos']:.3f}. Give --add_bos every.",
        ]
    return lines


def accuracy_lines(zero_shot: dict) -> list[str]:
    """A row for each task: its accuracy, or where it has none its first metric, with the standard error, at the two
    stages that it was taken.
    """
    first, last = zero_shot["stages"]
    limited = f", first {zero_shot['limit']} documents" if zero_shot["limit"] else ""
    lines = ["", f"zero-shot accuracy ({zero_shot['harness']}, {zero_shot['shots']} shots{limited})"]

    def row(name: str, was: float | None, now: float, error: float | None = None) -> str:
        was = "-" if was is None else f"{was:.4f}"
        return f"  {name[:26]:26}{was:>10}{now:>10.4f}" + (f" ± {error:.4f}" if error else "")

    for name, task in zero_shot["tasks"].items():
        numbers = [key for key, value in task[last].items() if value is not None and "_stderr" not in key]
        counted = (key for key in numbers if key.partition(",")[0] == zero_shot["mean"]["metric"])
        metric = next(counted, next(iter(numbers), None))
        if metric is None:
            lines.append(f"  {name}: gives no number")
            continue
        was = (task[first] or {}).get(metric)
        label = name if metric == zero_shot["mean"]["metric"] else f"{name}, {metric}"
        error = task[last].get("_stderr,".join(metric.split(",")) if "," in metric else f"{metric}_stderr")
        lines.append(row(label, was, task[last][metric], error))
    mean, count = zero_shot["mean"], len(zero_shot["mean"]["tasks"])
    if count:
        lines.append(row(f"mean of {count}", mean[first], mean[last]))
        lines.append(f"  (the mean of {mean['metric']}, as in the paper, and not of acc_norm)")
    return lines + [f"  {name}: left out, {why}" for name, why in zero_shot["missing"].items()]


def _analysis_lines(record: dict) -> list[str]:
    """By block: each metric's mean, and the matrices with the lowest and the highest value of the first."""
    metrics = record["config"]["ww_metric"]
    first, model = metrics[0], record["model"]
    members = by_block(record["layers"])

    def extreme(block: int, choose) -> str:
        layer = choose(members[block], key=lambda layer: layer["scores"][first])
        inside = re.split(r"\.\d+\.", layer["name"], maxsplit=1)[-1]  # of the block
        return f"{inside} {layer['scores'][first]:.3f}"

    widths = [max(12, len(metric) + 2) for metric in metrics]
    lines = [
        "",
        f"{len(record['layers'])} matrices of {model['id']} in {len(members)} blocks "
        f"({model['coverage']:.1%} of the model is prunable); mean by block, and the extremes of {first}",
        "",
        f"{'block':>5}" + "".join(f"{metric:>{width}}" for metric, width in zip(metrics, widths, strict=True))
        + f"  {'lowest':32}highest",
    ]  # fmt: skip
    for block, layers in members.items():
        means = [sum(layer["scores"][metric] for layer in layers) / len(layers) for metric in metrics]
        cells = "".join(f"{mean:>{width}.3f}" for mean, width in zip(means, widths, strict=True))
        lines.append(f"{block:>5}{cells}  {extreme(block, min):32}{extreme(block, max)}")
    if first.startswith("alpha"):
        lines += ["", "A low alpha is a heavy tail: a matrix that is trained well and should lose few weights."]
    return lines
